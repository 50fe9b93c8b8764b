"""Where the packages meet: whole runs, and the looks at them."""

from batchrun.runs.collect import collect
from batchrun.runs.complete import Rows, complete, make_config
from batchrun.runs.models import models
from batchrun.runs.status import look, status
from batchrun.runs.submit import run
from batchrun.runs.validate import validate

__all__ = [
    "Rows",
    "collect",
    "complete",
    "look",
    "make_config",
    "models",
    "run",
    "status",
    "validate",
]
