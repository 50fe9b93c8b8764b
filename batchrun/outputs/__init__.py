"""Derived from the journal: one table of rows and answers, and the way back."""

from batchrun.outputs.aside import (
    ASIDE_SCHEMA,
    Mark,
    answers_in,
    aside_slice,
    read_marks,
    read_wanted,
)
from batchrun.outputs.batches import AnswerBatches
from batchrun.outputs.columns import NAMES
from batchrun.outputs.footer import Aside, Footer, RecordBatch, Schema, Table
from batchrun.outputs.parquet import parquet_file, parquet_series, table_of
from batchrun.outputs.parsed import more_columns, names, names_of
from batchrun.outputs.publish import publish
from batchrun.outputs.read_back import (
    partial_of,
    read_back,
    recognise,
    remove_partial,
    slices_of,
    untyped_slices,
)
from batchrun.outputs.rows import InvalidRow, Slice
from batchrun.outputs.tally import Causes, OutputTally, TokenSums, is_filtered, is_truncated
from batchrun.outputs.target import Target, backup, clean_leftovers, replacing

__all__ = [
    "ASIDE_SCHEMA",
    "NAMES",
    "AnswerBatches",
    "Aside",
    "Causes",
    "Footer",
    "InvalidRow",
    "Mark",
    "OutputTally",
    "RecordBatch",
    "Schema",
    "Slice",
    "Table",
    "Target",
    "TokenSums",
    "answers_in",
    "aside_slice",
    "backup",
    "clean_leftovers",
    "is_filtered",
    "is_truncated",
    "more_columns",
    "names",
    "names_of",
    "parquet_file",
    "parquet_series",
    "partial_of",
    "publish",
    "read_back",
    "read_marks",
    "read_wanted",
    "recognise",
    "remove_partial",
    "replacing",
    "slices_of",
    "table_of",
    "untyped_slices",
]
