"""The endpoint of ``--mock`` and ``batchrun mock-server``."""

from batchrun.mock.knobs import Knobs
from batchrun.mock.server import MockServer, serve

__all__ = [
    "Knobs",
    "MockServer",
    "serve",
]
