"""Facts become text. Decides nothing."""

from batchrun.console.after import final_block, final_lines, next_steps
from batchrun.console.beforehand import estimate_block
from batchrun.console.facts import (
    BadRowFacts,
    Between,
    CollectFacts,
    EstimateFacts,
    FileFacts,
    FinalFacts,
    MergeFacts,
    ReportFacts,
    StartFacts,
    StatusFacts,
    ValidateFacts,
    models_json,
    to_json,
)
from batchrun.console.found import (
    collect_block,
    merge_block,
    report_block,
    status_block,
    validate_block,
    watched,
)
from batchrun.console.instead import error_summary, error_text, skipped_summary
from batchrun.console.metrics import FIRST_LINE as METRICS_FIRST_LINE
from batchrun.console.metrics import metrics_text
from batchrun.console.progress import Progress, Snapshot
from batchrun.console.start import start_block, start_lines

__all__ = [
    "METRICS_FIRST_LINE",
    "BadRowFacts",
    "Between",
    "CollectFacts",
    "EstimateFacts",
    "FileFacts",
    "FinalFacts",
    "MergeFacts",
    "Progress",
    "ReportFacts",
    "Snapshot",
    "StartFacts",
    "StatusFacts",
    "ValidateFacts",
    "collect_block",
    "error_summary",
    "error_text",
    "estimate_block",
    "final_block",
    "final_lines",
    "merge_block",
    "metrics_text",
    "models_json",
    "next_steps",
    "report_block",
    "skipped_summary",
    "start_block",
    "start_lines",
    "status_block",
    "to_json",
    "validate_block",
    "watched",
]
