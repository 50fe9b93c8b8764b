"""What can be typed."""

from batchrun.cli.main import main, run_command

__all__ = [
    "main",
    "run_command",
]
