"""A page to look at: one published table becomes one HTML file that needs nothing else."""

from batchrun.report.facts import gather
from batchrun.report.page import is_page, page

__all__ = [
    "gather",
    "is_page",
    "page",
]
