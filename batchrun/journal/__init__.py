"""The truth: what the endpoint said, kept as it lands, found again after any death."""

from batchrun.journal.journal import Journal
from batchrun.journal.lock import Holder, Lock, holder, locked
from batchrun.journal.saved_command import Saved, read_saved, restored, save_config
from batchrun.journal.segments import FORMAT, Header, Recovery
from batchrun.journal.slots import Held, SlotTable, Survey
from batchrun.journal.state import StateDir, locate
from batchrun.journal.status_file import (
    Status,
    read_series,
    read_status,
    write_series,
    write_status,
)

__all__ = [
    "FORMAT",
    "Header",
    "Held",
    "Holder",
    "Journal",
    "Lock",
    "Recovery",
    "Saved",
    "SlotTable",
    "StateDir",
    "Status",
    "Survey",
    "holder",
    "locate",
    "locked",
    "read_saved",
    "read_series",
    "read_status",
    "restored",
    "save_config",
    "write_series",
    "write_status",
]
