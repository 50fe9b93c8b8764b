"""Files become rows. Knows no prompt and no column of the output."""

from batchrun.inputs.arrow import record_batches
from batchrun.inputs.carried import Carried
from batchrun.inputs.column_types import ColumnTypes
from batchrun.inputs.files import content_digest, resolve, unchanged
from batchrun.inputs.formats import head, read
from batchrun.inputs.images import image_urls
from batchrun.inputs.parquet import rows_of
from batchrun.inputs.repeated_ids import RepeatedIds
from batchrun.inputs.rows import (
    BATCH_ROWS,
    SAMPLE,
    BadRow,
    Batch,
    InputFile,
    Resolved,
    Row,
    Rows,
    with_sample,
)
from batchrun.inputs.spool import RowsOrTable, spool

__all__ = [
    "BATCH_ROWS",
    "SAMPLE",
    "BadRow",
    "Batch",
    "Carried",
    "ColumnTypes",
    "InputFile",
    "RepeatedIds",
    "Resolved",
    "Row",
    "Rows",
    "RowsOrTable",
    "content_digest",
    "head",
    "image_urls",
    "read",
    "record_batches",
    "resolve",
    "rows_of",
    "spool",
    "unchanged",
    "with_sample",
]
