"""Derived from the journal: one table of rows and answers, and the way back."""

from batchrun.outputs.footer import Aside, Footer, FooterRows, Schema
from batchrun.outputs.publish import publish
from batchrun.outputs.read_back import (
    ASIDE_SCHEMA,
    Mark,
    PublishedRow,
    aside_slice,
    partial_of,
    published_rows,
    read_back,
    read_marks,
    read_wanted,
    recognise,
    remove_partial,
    slices_of,
)
from batchrun.outputs.rows import InvalidRow, Slice
from batchrun.outputs.tally import Causes, OutputTally, TokenSums, is_filtered, is_truncated
from batchrun.outputs.target import Target, backup, clean_leftovers

__all__ = [
    "ASIDE_SCHEMA",
    "Aside",
    "Causes",
    "Footer",
    "FooterRows",
    "InvalidRow",
    "Mark",
    "OutputTally",
    "PublishedRow",
    "Schema",
    "Slice",
    "Target",
    "TokenSums",
    "aside_slice",
    "backup",
    "clean_leftovers",
    "is_filtered",
    "is_truncated",
    "partial_of",
    "publish",
    "published_rows",
    "read_back",
    "read_marks",
    "read_wanted",
    "recognise",
    "remove_partial",
    "slices_of",
]
