"""Where the packages meet: whole runs, and the looks at them."""

from batchrun.runs.answers import Answers, answers_schema
from batchrun.runs.asking import models
from batchrun.runs.collect import collect, read
from batchrun.runs.complete import complete
from batchrun.runs.estimate import estimate
from batchrun.runs.merge import merge
from batchrun.runs.pages import make_page
from batchrun.runs.status import status
from batchrun.runs.submit import run
from batchrun.runs.validate import look, validate

__all__ = [
    "Answers",
    "answers_schema",
    "collect",
    "complete",
    "estimate",
    "look",
    "make_page",
    "merge",
    "models",
    "read",
    "run",
    "status",
    "validate",
]
