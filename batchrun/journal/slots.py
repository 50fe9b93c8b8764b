"""Which requests are answered, in 45 bytes each: a compact dict in pure Python.

A ``set`` of 10 million 16-byte keys takes a gigabyte, and a dict of objects several. Here a request
has a *slot*, a small number, and everything known about it lies in arrays at that number. An
open-addressed index (the way CPython's own dict has worked since 3.6) leads from a key to its
slot; it stores no key itself, so it is cheap to double and can be thrown away and derived again.

Equal requests differ by their occurrence, and each has a slot of its own. The key of occurrence
``k`` is the hash moved on by ``k`` odd strides, so one table holds them all and no chain has to be
walked to reach the ten-millionth equal row. The invariant that replaces the chain: *the
occurrences of a hash in the table are 0, 1, 2 ... without gaps*, so the first one that is missing
ends a search.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from itertools import islice
from struct import Struct
from typing import BinaryIO, NamedTuple


class Held(IntEnum):
    """What is held for a slot. The values are on disk: never renumber."""

    NEW = 0  # no answer, or one that a REOPEN took back
    OK = 1  # an answer; nothing replaces it
    REJECTED = 2  # a final failure: only --retry-failed asks again
    PASSING = 3  # a failure that every rerun tries again


HASH_BYTES = 16
KEPT_BYTES = 30  # of a slot in ``columns``
MAX_IN_DOUBT = 255  # counts saturate: one byte a row, and retries in doubt are single digits
# What else than a Held an Event tells of its request.
BEGAN, ENDED, ENDED_IN_DOUBT, REOPENED = range(4, 8)
# One of those, or the Held of an outcome kept; the hash as two words and the occurrence; and of an
# outcome its position and attempts in doubt; of an attempt that ended and told its tokens where.
Event = tuple[int, int, int, int, int, int]
_KEY = Struct("<QQ")
_STRIDE = 0x9E3779B97F4A7C15  # odd, so a power-of-two table meets every place before repeating one
_WORD = (1 << 64) - 1
_EMPTY = 0xFFFF_FFFF
_SMALLEST = 1 << 10
# One byte a slot: what is held in the low bits, then
_HELD = 0b0011
_CLAIMED = 0b0100  # given out in this pass
_REPEAT = 0b1000  # occurrence 1 or later
_UNCLAIM = bytes(flags & ~_CLAIMED for flags in range(256))
_ONLY_HELD = bytes(flags & _HELD for flags in range(256))


_SETTLED_UNCLAIMED = bytes(
    flags & (_HELD | _CLAIMED) in (Held.OK, Held.REJECTED) for flags in range(256)
)


# Held answers are given out by worth, whatever their occurrence; the rest in order, then new ones.
_ORDER = (Held.OK, Held.REJECTED, Held.PASSING)
_ANY = len(_ORDER)
_CURSOR_BITS = 30
_CURSOR = (1 << _CURSOR_BITS) - 1


class Survey(NamedTuple):
    """What is held for a number of slots."""

    held: list[int]  # how many, by Held
    repeats: int  # how many are not the first of their hash


class SlotTable:
    """Slots of requests, found by hash and occurrence, and what is held for each.

    Hashes must be 16 uniformly distributed bytes, such as BLAKE2b gives.
    """

    def __init__(self) -> None:
        # All of one length, ahead of the slots in use: storing is cheaper than appending.
        self._low = array("Q")
        self._high = array("Q")
        self._flags = bytearray()
        self._position = array("Q")
        self._in_doubt = bytearray()
        # A repeat keeps its occurrence here; a first occurrence (0 by definition) keeps how far
        # this pass has come with its hash: the place in _ORDER and the next occurrence to look at.
        self._number = array("I")
        self._used = 0
        self._counts = [0, 0, 0, 0]  # by Held, without NEW
        self._sent: set[int] = set()  # sent and not ended, while a journal is replayed
        self._used_at: dict[int, list[int]] = {}
        self._index: array[int]
        self._mask: int
        self._clear_index(_SMALLEST)

    def __len__(self) -> int:
        return self._used

    # ── what is known of a slot ──────────────────────────────────────────────────────────────────

    def held(self, slot: int) -> Held:
        return _HELD_OF[self._flags[slot] & _HELD]

    def occurrence(self, slot: int) -> int:
        return self._number[slot] if self._flags[slot] & _REPEAT else 0

    def hash(self, slot: int) -> bytes:
        low = (self._low[slot] - self.occurrence(slot) * _STRIDE) & _WORD
        return _KEY.pack(low, self._high[slot])

    def are_first_of(self, hashes: list[bytes], slots: Sequence[int]) -> bool:
        """Whether these are the slots of the first requests with these hashes."""
        lows, highs, pack = self._low, self._high, _KEY.pack
        # The key of a first one is its hash, and no other key is.
        return [pack(lows[slot], highs[slot]) for slot in slots] == hashes

    def position(self, slot: int) -> int:
        """Where the outcome is kept; meaningless for a NEW slot."""
        return self._position[slot]

    def kept(self, slots: Sequence[int]) -> tuple[list[int], list[int]]:
        """Positions, ascending, and places in ``slots`` of those that hold an outcome."""
        flags = self._flags
        positions = list(map(self._position.__getitem__, slots))
        places = [at for at, slot in enumerate(slots) if flags[slot] & _HELD]
        places.sort(key=positions.__getitem__)
        return [positions[at] for at in places], places

    def places(self, slots: Sequence[int], held: Collection[Held]) -> list[int]:
        """Places in ``slots`` of those with one of these."""
        found = bytes(map(self._flags.__getitem__, slots)).translate(_ONLY_HELD)
        if not any(map(found.count, held)):
            return []
        return [at for at, each in enumerate(found) if each in held]

    def survey(self, slots: Sequence[int]) -> Survey:
        """What is held for these slots, in sum."""
        flags = bytes(map(self._flags.__getitem__, slots))
        held = flags.translate(_ONLY_HELD)
        return Survey(
            [held.count(each) for each in Held], sum(map(_REPEAT.__and__, flags)) // _REPEAT
        )

    def in_doubt(self, slot: int) -> int:
        return self._in_doubt[slot]

    def count(self, held: Held) -> int:
        return self._counts[held] if held else self._used - sum(self._counts)

    def total_in_doubt(self) -> int:
        return sum(self._in_doubt)

    def first_of(self, hash_: bytes) -> int:
        """The slot of the first occurrence of a hash; -1 for none. Within a pass only."""
        return self._lookup(*_KEY.unpack(hash_))

    def slots_of(self, hash_: bytes) -> Iterator[int]:
        """The slots of every occurrence of a hash, in order."""
        if not self._index:
            self._reindex(self._capacity_for(self._used))
        low, high = _KEY.unpack(hash_)
        while (slot := self._lookup(low, high)) >= 0:
            yield slot
            low = (low + _STRIDE) & _WORD

    def is_claimed(self, slot: int) -> bool:
        """Whether a row of this pass has it."""
        return bool(self._flags[slot] & _CLAIMED)

    def unclaimed(self) -> array[int]:
        """The slots with a settled outcome that no row of this pass has."""
        flags = self._flags.translate(_SETTLED_UNCLAIMED)
        found = array("I")
        slot = flags.find(1)
        while slot >= 0:
            found.append(slot)
            slot = flags.find(1, slot + 1)
        return found

    # ── passes over the input ────────────────────────────────────────────────────────────────────

    def claim(self, hash_: bytes) -> int:
        """The slot of the next row with this hash in this pass; no slot is given out twice.

        OK slots come first, then REJECTED, then PASSING, each by occurrence; then the others, and
        when all are given out a new one. Constant time, averaged over a pass.
        """
        return self.claim_all((hash_,))[0]

    def claim_all(self, hashes: Iterable[bytes]) -> list[int]:
        """The slots of several rows, as ``claim`` gives them one by one."""
        unpack, lows, highs, flags, number = (
            _KEY.unpack, self._low, self._high, self._flags, self._number,
        )  # fmt: skip
        ok = int(Held.OK)
        slots = []
        for hash_ in hashes:
            low, high = unpack(hash_)
            # The probing of _lookup, in line: this runs once for every row of the input.
            index, mask = self._index, self._mask
            place = low & mask
            while (slot := index[place]) != _EMPTY and (lows[slot] != low or highs[slot] != high):
                place = (place + 1) & mask
            if slot == _EMPTY:
                slot = self._insert(place, low, high)
                flags[slot] = _CLAIMED
                number[slot] = _ANY << _CURSOR_BITS | 1
            elif flags[slot] == ok and not number[slot]:
                # What resuming meets nearly always: the first claim of a hash that is answered.
                flags[slot] = ok | _CLAIMED
                number[slot] = 1
            else:
                slot = self._claim_next(slot, low, high)
            slots.append(slot)
        return slots

    def _claim_next(self, first: int, low: int, high: int) -> int:
        progress = self._number[first]
        stage, occurrence = progress >> _CURSOR_BITS, progress & _CURSOR
        flags_of = self._flags
        while True:
            slot = self._lookup((low + occurrence * _STRIDE) & _WORD, high) if occurrence else first
            if slot < 0 and stage < _ANY:
                stage, occurrence = stage + 1, 0
                continue
            if slot < 0:
                slot = self._insert_repeat(low, high, occurrence)
            occurrence += 1
            flags = flags_of[slot]
            if not flags & _CLAIMED and (stage == _ANY or flags & _HELD == _ORDER[stage]):
                break
        flags_of[slot] |= _CLAIMED
        self._number[first] = stage << _CURSOR_BITS | occurrence
        return slot

    def begin_pass(self) -> None:
        """Let claims start from the beginning again."""
        if not self._index:
            self._reindex(self._capacity_for(self._used))
        started = array("I", bytes(self._number.itemsize * len(self._number)))
        for slot in self._repeats():
            started[slot] = self._number[slot]
        self._number = started
        self._flags = self._flags.translate(_UNCLAIM)

    def forget_passes(self) -> None:
        """Free the index, a quarter of the memory; ``begin_pass`` derives it again."""
        self._index = array("I")

    def _repeats(self) -> Iterator[int]:
        return (slot for slot, flags in enumerate(self._flags) if flags & _REPEAT)

    # ── what happens to a slot ───────────────────────────────────────────────────────────────────

    def replay(self, events: Iterable[Event]) -> None:
        """Note what happened to requests, in this order, as the methods below do one by one."""
        lows, highs, flags, kept_at, doubts, counts, sent = (
            self._low, self._high, self._flags, self._position, self._in_doubt, self._counts,
            self._sent,
        )  # fmt: skip
        used_at = self._used_at
        index, mask = self._index, self._mask
        for what, low, high, occurrence, position, in_doubt in events:
            # The probing of _lookup, in line: this runs twice for every answer there is.
            place = low & mask
            while (slot := index[place]) != _EMPTY and (lows[slot] != low or highs[slot] != high):
                place = (place + 1) & mask
            if occurrence or slot == _EMPTY:
                slot = (
                    self._found(low, high, occurrence)
                    if occurrence
                    else self._insert(place, low, high)
                )
                index, mask = self._index, self._mask
            if what == BEGAN:
                if slot in sent:
                    self._add_doubt(slot)
                sent.add(slot)
            elif what < BEGAN and not flags[slot] & _HELD:
                # What nearly every outcome is: the first of its request.
                sent.discard(slot)
                if used_at:
                    used_at.pop(slot, None)
                flags[slot] |= what
                counts[what] += 1
                kept_at[slot] = position
                if in_doubt > doubts[slot]:
                    doubts[slot] = min(in_doubt, MAX_IN_DOUBT)
            elif what < BEGAN:
                self.settled(slot, what, position, in_doubt)
            elif what == REOPENED:
                self.reopened(slot)
            else:
                self.failed(slot, what == ENDED_IN_DOUBT, position)

    def find(self, hash_: bytes, occurrence: int) -> int:
        """The slot of this request, made when there is none; so are those of lower occurrences."""
        low, high = _KEY.unpack(hash_)
        return self._found(low, high, occurrence)

    def _found(self, low: int, high: int, occurrence: int) -> int:
        slot = self._lookup((low + occurrence * _STRIDE) & _WORD, high)
        if slot >= 0:
            return slot
        present = occurrence
        while present and self._lookup((low + (present - 1) * _STRIDE) & _WORD, high) < 0:
            present -= 1
        for missing in range(present, occurrence + 1):
            slot = self._insert_repeat(low, high, missing)
        return slot

    def sent(self, slot: int) -> None:
        """An attempt began. One before it that never ended may have been billed."""
        if slot in self._sent:
            self._add_doubt(slot)
        self._sent.add(slot)

    def failed(self, slot: int, in_doubt: bool, used_at: int = 0) -> None:
        """An attempt ended and did not settle the request; its tokens are told at a position."""
        self._sent.discard(slot)
        if used_at:
            self._used_at.setdefault(slot, []).append(used_at)
        if in_doubt:
            self._add_doubt(slot)

    def settled(self, slot: int, held: int, position: int, in_doubt: int) -> bool:
        """An outcome is kept at this position; False when an OK one was there and stays.

        ``in_doubt`` counts over all runs, so it never lowers what is known.
        """
        if self._sent:
            self._sent.discard(slot)
        if self._used_at:
            self._used_at.pop(slot, None)
        flags = self._flags[slot]
        before = flags & _HELD
        if before == Held.OK:
            return False
        self._flags[slot] = flags & ~_HELD | held
        if before:
            self._counts[before] -= 1
        self._counts[held] += 1
        self._position[slot] = position
        if in_doubt > self._in_doubt[slot]:
            self._in_doubt[slot] = min(in_doubt, MAX_IN_DOUBT)
        return True

    def reopened(self, slot: int) -> None:
        """A held failure counts as never settled; what may have been billed stays counted."""
        flags = self._flags[slot]
        before = flags & _HELD
        if before not in (Held.NEW, Held.OK):
            self._flags[slot] = flags & ~_HELD
            self._counts[before] -= 1

    def process_ended(self) -> None:
        """Whatever was still on its way will never end: it may have been billed."""
        for slot in self._sent:
            self._add_doubt(slot)
        self._sent.clear()

    def _add_doubt(self, slot: int) -> None:
        self._in_doubt[slot] = min(self._in_doubt[slot] + 1, MAX_IN_DOUBT)

    # ── keeping the whole table ──────────────────────────────────────────────────────────────────

    @property
    def on_their_way(self) -> list[int]:
        """The slots that were sent and have not ended."""
        return list(self._sent)

    @property
    def used_at(self) -> Mapping[int, Sequence[int]]:
        """Where attempts since the last outcome of a slot tell their tokens."""
        return self._used_at

    def columns(self) -> list[memoryview]:
        """The table as bytes, for ``load``. The table stays as it is until they go."""
        flags = self._flags.translate(_UNCLAIM)
        whole = (self._low, self._high, self._position, self._number, self._in_doubt, flags)
        return [memoryview(column)[: self._used].cast("B") for column in whole]

    @classmethod
    def load(
        cls,
        file: BinaryIO,
        slots: int,
        on_their_way: Iterable[int],
        used_at: Mapping[int, Sequence[int]],
    ) -> SlotTable:
        """The table whose columns these are; EOFError when the file is too short for them."""
        self = cls()
        for column in (self._low, self._high, self._position, self._number):
            column.fromfile(file, slots)
        self._in_doubt += file.read(slots)
        self._flags += file.read(slots)
        if len(self._flags) != slots:
            raise EOFError
        self._used = slots
        held = self._flags.translate(_ONLY_HELD)
        self._counts = [0, *(held.count(each) for each in _ORDER)]
        self._sent.update(on_their_way)
        self._used_at = {slot: list(positions) for slot, positions in used_at.items()}
        return self

    # ── the index ────────────────────────────────────────────────────────────────────────────────

    def _lookup(self, low: int, high: int) -> int:
        """The slot of a key, or -1."""
        index, mask, lows = self._index, self._mask, self._low
        place = low & mask
        while (slot := index[place]) != _EMPTY:
            if lows[slot] == low and self._high[slot] == high:
                return slot
            place = (place + 1) & mask
        return -1

    def _insert(self, place: int, low: int, high: int) -> int:
        """A slot for a key that is not in the table; ``place`` is where its search ended."""
        slot = self._used
        if slot == len(self._flags):
            self._lengthen()
        self._low[slot] = low
        self._high[slot] = high
        self._index[place] = slot
        self._used = slot + 1
        # Above two thirds full, searches for absent keys get long.
        if slot * 3 > self._mask * 2:
            self._reindex((self._mask + 1) * 2)
        return slot

    def _insert_repeat(self, low: int, high: int, occurrence: int) -> int:
        low = (low + occurrence * _STRIDE) & _WORD
        index, mask = self._index, self._mask
        place = low & mask
        while index[place] != _EMPTY:
            place = (place + 1) & mask
        slot = self._insert(place, low, high)
        if occurrence:
            self._flags[slot] = _REPEAT
            self._number[slot] = occurrence
        return slot

    def _lengthen(self) -> None:
        more = max(_SMALLEST, self._used >> 5)
        for column in (self._low, self._high, self._position, self._number):
            column.frombytes(bytes(more * column.itemsize))
        self._flags += bytes(more)
        self._in_doubt += bytes(more)

    def reserve(self, slots: int) -> None:
        """Make room in the index for this many slots, to save doublings on the way."""
        capacity = self._capacity_for(slots)
        if capacity > self._mask + 1:
            self._reindex(capacity)

    @staticmethod
    def _capacity_for(slots: int) -> int:
        return max(_SMALLEST, 1 << (slots * 3 // 2 + 1).bit_length())

    def _clear_index(self, capacity: int) -> None:
        self._index = array("I", [_EMPTY]) * capacity
        self._mask = capacity - 1

    def _reindex(self, capacity: int) -> None:
        # The old one goes first: two at once would be the peak of the whole run.
        self._index = array("I")
        self._clear_index(capacity)
        index, mask = self._index, self._mask
        for slot, low in enumerate(islice(self._low, self._used)):
            place = low & mask
            while index[place] != _EMPTY:
                place = (place + 1) & mask
            index[place] = slot


_HELD_OF = tuple(Held)
