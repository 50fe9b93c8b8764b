"""Where the packages meet: whole runs, and the looks at them."""

from batchrun.runs.collect import collect
from batchrun.runs.complete import complete
from batchrun.runs.models import models
from batchrun.runs.status import look, status
from batchrun.runs.submit import run
from batchrun.runs.validate import validate

__all__ = [
    "collect",
    "complete",
    "look",
    "models",
    "run",
    "status",
    "validate",
]
