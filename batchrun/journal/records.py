"""One record of a journal as bytes: its frame, its checksum, and the numbers of an outcome.

A record is a frame:

    magic 4 | length u32 | crc32 u32 | type u8 | payload          length counts type and payload

* HEADER    first frame of the first segment, JSON; durable before the file has its name
* SENT      hash, occurrence: an attempt is about to begin
* FAILED    hash, occurrence, in doubt?: it ended, and the request is not settled; then the tokens
            it used, if it told any
* OUTCOME   numbers, a small JSON, then the endpoint's bytes as they came
* REOPEN    hash, occurrence: a settled failure counts as never settled
* IMPORTED  the run id of a published output whose answers were taken over
* SYNC      everything before this position is durable
* SEALED    first frame of a later segment: the length of the one before
* FILLER    where a hole was

*Why a frame is believed.* The checksum starts from a value made of the run's id and the segment's
number. So a frame that was moved, left over from another run, or sent to us inside a reply does
not pass, even where a search through a hole stumbles upon it.
"""

from __future__ import annotations

from struct import Struct
from struct import error as StructError
from typing import NamedTuple
from zlib import crc32

import msgspec
from msgspec.structs import astuple, replace

from batchrun.journal.slots import BEGAN, ENDED, ENDED_IN_DOUBT, REOPENED, Event, Held
from batchrun.types import NO_USAGE, Outcome, OutcomeKind, Usage

HEADER, SENT, FAILED, OUTCOME, REOPEN, IMPORTED, SYNC, SEALED, FILLER = range(1, 10)
# Not UTF-8, so no JSON that an endpoint sends holds it by chance.
MAGIC = b"\xf5BJ\xff"
FRAME = Struct("<4sIIB")
_PREFIX = Struct("<4sII")
CRC_END = _PREFIX.size  # what the checksum covers begins here, with the type
BODY_AT = FRAME.size
_TRIED = Struct("<B16sIB")  # with the type in front: SENT, FAILED and REOPEN are built in one go
POSITION = Struct("<Q")
_USED = Struct("<5q")
FAILED_BYTES = CRC_END + _TRIED.size + _USED.size  # with what was used
_TYPED_NUMBERS = Struct("<B16sIBBHIIqdd5qI")  # the last is the length of the JSON after it
_KEPT = Struct("<4sIIB16sIBBHIIqdd5qI")  # with all of the frame in front
# A frame and what replaying needs of an OUTCOME: hash in two words, occurrence, kind, flags, in
# doubt. SENT, FAILED and REOPEN have the first three in the same places.
_REPLAYED = Struct("<4sIIBQQIBB6xI")


# Their numbers are on disk: append, never reorder.
_KINDS: tuple[OutcomeKind, ...] = (
    "ok",
    "rejected",
    "rate_limit",
    "transient",
    "timeout",
    "invalid_response",
    "invalid_answer",
)


_KIND_NUMBER = {kind: number for number, kind in enumerate(_KINDS)}
_OK = _KIND_NUMBER["ok"]
_HELD_OK, _HELD_REJECTED, _HELD_PASSING = map(int, (Held.OK, Held.REJECTED, Held.PASSING))
_FINAL, _REBUILT = 1, 2
_NOT_A_NUMBER = float("nan")
_UNKNOWN = -1  # tokens not reported
_MOST_TOKENS = (1 << 63) - 1
# Longer blocks are not copied to be replayed; of short records a slice costs less than a view.
_MOST_COPIED = 1 << 20
# A position is a segment's number and a byte offset in it, so positions compare as the log runs.
OFFSET_BITS = 40
LAST_OFFSET = (1 << OFFSET_BITS) - 1


class _Meta(msgspec.Struct, omit_defaults=True, gc=False):
    code: str = ""
    message: str = ""
    request_id: str = ""
    model: str = ""


_encode_meta = msgspec.json.Encoder().encode
_decode_meta = msgspec.json.Decoder(_Meta).decode


def frame_of(kind: int, payload: bytes, salt: int) -> bytes:
    """A whole record; ``salt`` is that of its segment."""
    covered = bytes((kind,)) + payload
    return _PREFIX.pack(MAGIC, len(covered), crc32(covered, salt)) + covered


def salt_of(run_id: str, segment: int) -> int:
    """What the checksums of a segment start from; 0 for the header of a journal."""
    return crc32(f"{run_id}/{segment}".encode())


def tried(kind: int, hash_: bytes, occurrence: int, in_doubt: int, salt: int) -> bytes:
    """A whole SENT, FAILED or REOPEN."""
    covered = _TRIED.pack(kind, hash_, occurrence, in_doubt)
    return _PREFIX.pack(MAGIC, len(covered), crc32(covered, salt)) + covered


def failed(hash_: bytes, occurrence: int, in_doubt: int, usage: Usage, salt: int) -> bytes:
    """A whole FAILED with what the attempt used."""
    known = usage if all(map(_is_storable, astuple(usage))) else NO_USAGE
    used = _USED.pack(*(_UNKNOWN if n is None else n for n in astuple(known)))
    covered = _TRIED.pack(FAILED, hash_, occurrence, in_doubt) + used
    return _PREFIX.pack(MAGIC, len(covered), crc32(covered, salt)) + covered


def _is_storable(tokens: int | None) -> bool:
    return tokens is None or 0 <= tokens <= _MOST_TOKENS


def usage_at(frame: bytes, salt: int) -> Usage | None:
    """What the FAILED that a block begins with tells of tokens; None when none lies whole there."""
    end = frame_end(frame, 0, len(frame))
    if end != FAILED_BYTES or not is_whole(frame, 0, end, salt):
        return None
    numbers = _USED.unpack_from(frame, CRC_END + _TRIED.size)
    return Usage(*(None if n == _UNKNOWN else n for n in numbers))


def outcome_start(outcome: Outcome, occurrence: int, salt: int) -> bytes:
    """An OUTCOME up to the endpoint's bytes, which follow as they are."""
    try:
        head = _outcome_head(outcome, occurrence)
    except (StructError, UnicodeEncodeError):
        head = _outcome_head(_storable(outcome), occurrence)
    body = outcome.body
    return _PREFIX.pack(MAGIC, len(head) + len(body), crc32(body, crc32(head, salt))) + head


def position_of(segment: int, offset: int) -> int:
    return segment << OFFSET_BITS | offset


def frame_end(frame: bytes, at: int, limit: int) -> int:
    """Where the frame at ``at`` claims to end; 0 when none can begin here and end by ``limit``."""
    if len(frame) - at < FRAME.size:
        return 0
    magic, length, _ = _PREFIX.unpack_from(frame, at)
    end: int = at + CRC_END + length
    return end if magic == MAGIC and length and end <= limit else 0


def is_whole(frame: bytes, at: int, end: int, salt: int) -> bool:
    crc: int = _PREFIX.unpack_from(frame, at)[2]
    return crc32(memoryview(frame)[at + CRC_END : end], salt) == crc


def _outcome_head(outcome: Outcome, occurrence: int) -> bytes:
    """An OUTCOME from its type to its JSON; the body follows."""
    meta = _encode_meta(_Meta(outcome.code, outcome.message, outcome.request_id, outcome.model))
    latency_s, ttft_s = outcome.latency_s, outcome.ttft_s
    prompt, completion, total, cached, reasoning = astuple(outcome.usage)
    return (
        _TYPED_NUMBERS.pack(
            OUTCOME,
            outcome.hash,
            occurrence,
            _KIND_NUMBER[outcome.kind],
            (_FINAL if outcome.final else 0) | (_REBUILT if outcome.rebuilt else 0),
            outcome.http_status or 0,
            outcome.attempts,
            outcome.in_doubt,
            outcome.finished_at_ms,
            _NOT_A_NUMBER if latency_s is None else latency_s,
            _NOT_A_NUMBER if ttft_s is None else ttft_s,
            _UNKNOWN if prompt is None else prompt,
            _UNKNOWN if completion is None else completion,
            _UNKNOWN if total is None else total,
            _UNKNOWN if cached is None else cached,
            _UNKNOWN if reasoning is None else reasoning,
            len(meta),
        )
        + meta
    )


def _storable(outcome: Outcome) -> Outcome:
    """An endpoint may say anything: texts without lone surrogates, numbers that fit their fields.

    A token count that no 64-bit column can show is not reported, rather than shown wrong.
    """
    counts = (getattr(outcome.usage, name) for name in Usage.__struct_fields__)
    texts = {
        name: getattr(outcome, name).encode("utf-8", "replace").decode()
        for name in _Meta.__struct_fields__
    }
    return replace(
        outcome,
        **texts,
        http_status=min(outcome.http_status or 0, 0xFFFF),
        usage=Usage(*(n if _is_storable(n) else None for n in counts)),
    )


def outcome_at(block: bytes, at: int, salt: int) -> Outcome | None:
    """The outcome whose record lies whole there, its checksum verified; None when none does."""
    if at + _KEPT.size > len(block):
        return None
    (
        magic, covered, crc, type_, hash_, occurrence, kind, flags, status, attempts, in_doubt,
        finished_at_ms, latency_s, ttft_s, prompt, completion, total, cached, reasoning, meta_bytes,
    ) = _KEPT.unpack_from(block, at)  # fmt: skip
    end = at + CRC_END + covered
    if magic != MAGIC or type_ != OUTCOME or end > len(block):
        return None
    if crc32(block[at + CRC_END : end], salt) != crc:
        return None
    meta_at = at + _KEPT.size
    body_at = meta_at + meta_bytes
    meta = _decode_meta(block[meta_at:body_at])
    return Outcome(
        hash_,
        occurrence,
        _KINDS[kind],
        flags & _FINAL != 0,
        attempts,
        in_doubt,
        status or None,
        meta.code,
        meta.message,
        meta.request_id,
        meta.model,
        # NaN is the one value that differs from itself.
        latency_s if latency_s == latency_s else None,
        ttft_s if ttft_s == ttft_s else None,
        finished_at_ms,
        Usage(
            prompt if prompt >= 0 else None,
            completion if completion >= 0 else None,
            total if total >= 0 else None,
            cached if cached >= 0 else None,
            reasoning if reasoning >= 0 else None,
        ),
        block[body_at:end],
        flags & _REBUILT != 0,
    )


def held_by(ok: bool, final: bool) -> Held:
    """What an outcome makes of its request."""
    if ok:
        return Held.OK
    return Held.REJECTED if final else Held.PASSING


class Parsed(NamedTuple):
    """What a block of records says, and how many of its bytes are whole records."""

    events: list[Event]
    others: list[tuple[int, bytes]]  # type and payload of the frames that are no events
    length: int


def parsed(block: bytes, salt: int, position: int) -> Parsed:
    """The whole frames that a block begins with; ``position`` is where it lies.

    Of a block of more than 1 MB, which is one long frame as a rule, a short last one may be left.
    """
    events: list[Event] = []
    others: list[tuple[int, bytes]] = []
    unpack, add = _REPLAYED.unpack_from, events.append
    length, at = len(block), 0
    view: bytes | memoryview
    if length <= _MOST_COPIED:
        block += bytes(_REPLAYED.size)  # for frames at its end that are shorter than that
        view, last = block, length - 1
    else:
        view, last = memoryview(block), length - _REPLAYED.size
    # frame_end and is_whole in line: this runs once for every record there is.
    while at <= last:
        magic, covered, crc, kind, low, high, occurrence, number, flags, in_doubt = unpack(
            block, at
        )
        end = at + CRC_END + covered
        if magic != MAGIC or not covered or end > length:
            break
        if crc32(view[at + CRC_END : end], salt) != crc:
            break
        if kind == OUTCOME:
            held = _HELD_OK
            if number != _OK:
                held = _HELD_REJECTED if flags & _FINAL else _HELD_PASSING
            add((held, low, high, occurrence, position + at, in_doubt))
        elif kind == SENT:
            add((BEGAN, low, high, occurrence, 0, 0))
        elif kind == FAILED:
            # Where an OUTCOME has its kind, a FAILED says whether it is in doubt.
            used_at = position + at if covered > _TRIED.size else 0
            add((ENDED_IN_DOUBT if number else ENDED, low, high, occurrence, used_at, 0))
        elif kind == REOPEN:
            add((REOPENED, low, high, occurrence, 0, 0))
        else:
            others.append((kind, block[at + BODY_AT : end]))
        at = end
    return Parsed(events, others, at)
