"""Rows that share a name: told to the user, and never a reason to stop."""

from __future__ import annotations

from array import array

import pyarrow as pa

from batchrun.chat import CUSTOM_ID, json_text
from batchrun.inputs.rows import BadRow, Row, Rows


class RepeatedIds:
    """Finds rows whose ``custom_id`` an earlier row has, in eight bytes a row."""

    def __init__(self) -> None:
        self._hashes = array("q")  # 0: a row without one

    def add(self, rows: Rows) -> None:
        self._hashes.extend(map(_id_hash, rows))

    def found(self) -> tuple[int, int, int] | None:
        """How many rows do, and the numbers of two that share one; None when none does."""
        if self._hashes.count(0) == len(self._hashes):
            return None
        import pyarrow.compute as pc  # only here, and not for nothing

        buffers = [None, pa.py_buffer(self._hashes)]
        hashes = pa.Array.from_buffers(pa.int64(), len(self._hashes), buffers)
        in_order = hashes.sort()
        later = in_order[1:]
        repeated = pc.and_(pc.equal(later, in_order[:-1]), pc.not_equal(later, 0))
        at = pc.index(repeated, True).as_py()
        if at < 0:
            return None
        value = later[at].as_py()
        first = self._hashes.index(value)
        again = self._hashes.index(value, first + 1)
        return repeated.true_count, first + 1, again + 1


def _id_hash(row: Row | BadRow) -> int:
    name = row.get(CUSTOM_ID) if type(row) is dict else None
    if name is None:
        return 0
    text = name if isinstance(name, str) else json_text(name)
    return (hash(text) or 1) if text else 0
