"""What a run says of itself for others to show; nobody decides anything by it."""

from __future__ import annotations

import contextlib

import msgspec

from batchrun.files import read_json, write_json
from batchrun.journal.state import StateDir
from batchrun.series import Series


class Status(msgspec.Struct, kw_only=True):
    """What ``batchrun status`` shows of a run that is going on, or has stopped."""

    pid: int
    host: str
    started_at_ms: int
    updated_at_ms: int
    command: str = ""
    inputs: list[str] = []
    output: str = ""
    endpoint: str = ""
    model: str | None = None
    total: int | None = None
    ok: int = 0
    failed: int = 0
    pending: int = 0
    rows_per_s: float = 0.0
    in_flight: int = 0
    bound_by: str | None = None
    state: str = "running"
    exit_code: int | None = None
    reason: str | None = None


def write_status(state: StateDir, status: Status) -> None:
    """Replace the status file; what cannot be written is left out, for it is not the truth."""
    with contextlib.suppress(OSError):
        write_json(state.status, status)


def write_series(state: StateDir, series: Series) -> None:
    """Replace the series; what cannot be written is left out, for nothing depends on it."""
    with contextlib.suppress(OSError):
        write_json(state.series, series)


def read_series(state: StateDir) -> Series | None:
    """The series of an unfinished run, or None when there is none that can be read."""
    try:
        return read_json(state.series, Series)
    except (OSError, ValueError, msgspec.MsgspecError, RecursionError):
        return None


def read_status(state: StateDir) -> Status | None:
    """The last status written, or None when there is none that can be read."""
    try:
        return read_json(state.status, Status)
    except (OSError, ValueError, msgspec.MsgspecError, RecursionError):
        return None
