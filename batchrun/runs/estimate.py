"""``batchrun estimate``: what is still to be paid, before it is."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec

from batchrun import inputs, outputs, process
from batchrun.config import STDIN, RunConfig
from batchrun.console import Between, EstimateFacts
from batchrun.journal import Header, Held, Journal, StateDir
from batchrun.money import Price
from batchrun.runs import objects, passes, place
from batchrun.runs.asking import model_of, prompt_settings
from batchrun.runs.opening import header_of
from batchrun.runs.other_parts import take_over
from batchrun.runs.plan import Plan, make_plan, with_copies
from batchrun.runs.reuse import reuse
from batchrun.runs.sources import lay_out, never_stop, shapes
from batchrun.runs.unused import Unused
from batchrun.sending import longest_answer
from batchrun.types import Outcome, Usage

# What nobody has measured: English has some four bytes a token, Chinese two, code in between.
_BYTES_A_TOKEN, _FEWEST_BYTES, _MOST_BYTES = 4.0, 2.0, 7.0
_FRAME_BYTES, _FRAME_TOKENS = 60, 10  # of a body around its texts
_USUAL_ANSWER = 256
# Standard errors on either side of what was measured.
_SIGMAS = 3.0


class _Sums(msgspec.Struct):
    """Of pairs: what is known of every row, and what was measured of those that are answered."""

    n: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.n += 1
        self.x += x
        self.y += y
        self.xx += x * x
        self.xy += x * y
        self.yy += y * y

    def total(self, x: float, rows: int) -> Between:
        """The sum of ``y`` over ``rows`` others whose ``x`` add up to this, by their ratio."""
        ratio = self.y / self.x if self.x else 0.0
        squares = self.yy - 2 * ratio * self.xy + ratio * ratio * self.xx
        variance = max(0.0, squares) / max(1, self.n - 1)
        # Of the ratio, and of the rows themselves; few rows measured say little of a spread.
        few = 1 + 8 / self.n
        scale = x / (self.x / self.n) if self.x else rows
        spread = _SIGMAS * few * math.sqrt(variance * (scale * scale / self.n + rows))
        about = ratio * x
        return Between(about, max(0.0, about - spread), about + spread)


class _Found(msgspec.Struct):
    rows: int = 0
    bad: int = 0
    answered: int = 0
    failed: int = 0
    to_send: int = 0
    copies: int = 0
    body_bytes: int = 0
    bounded: int = 0  # tokens of answers at most
    unbounded: int = 0  # rows whose answers have no bound
    latency_s: float = 0.0
    prompts: _Sums = msgspec.field(default_factory=_Sums)
    answers: _Sums = msgspec.field(default_factory=_Sums)


def estimate(config: RunConfig) -> EstimateFacts:
    """Rows, tokens, cost and time still to come, measured by the answers that are held.

    Sends nothing and writes nothing beside a temporary directory.
    """
    with objects.inputs_at_hand(config) as local:
        return _estimate(local)


def _estimate(config: RunConfig) -> EstimateFacts:
    with tempfile.TemporaryDirectory(prefix="batchrun-") as directory:
        spool = None
        if STDIN in config.inputs:
            spool = inputs.spool(process.stdin(never_stop), StateDir(Path(directory, "stdin")))
        output = None if config.to_stdout else Path(config.output)
        files = objects.named(
            inputs.resolve(config.inputs, config.input_format, spool=spool, output=output)
        )
        sources = lay_out(files.files, prompt_settings(config), config)
        settings = config.request_settings(*shapes(sources)) | {"model": model_of(config)}
        state = StateDir(Path(directory, "state"))
        if output is not None:
            state = place.state_of(config.output, config.state_dir)
            if config.price is None:
                config = replace(config, price=place.remembered_price(config, state))
        header = header_of(config, settings)
        with closing(Journal.open(StateDir(Path(directory, "held")), header)) as book:
            for outcome in _held(config, header):
                # What was said is not needed again, and may be large.
                slim = msgspec.structs.replace(outcome, body=b"", message="")
                book.settled(book.claim(outcome.hash), slim)
            book.flush()
            plan = make_plan(sources, config, book, never_stop)
            Unused.of(config, state, synthetic=config.mock).take_back(book, never_stop)
            take_over(config, sources, plan.chosen, book, never_stop)
            reuse(config, book, never_stop)
            plan = with_copies(plan, book, config)
            found = _read(plan, config, book)
    return _facts(found, config)


def _held(config: RunConfig, header: Header) -> Iterator[Outcome]:
    """The outcomes of unfinished and finished runs with these settings."""
    if config.to_stdout:
        return
    state = place.state_of(config.output, config.state_dir)
    seen: set[str] = set()
    if (book := Journal.peek(state)) is not None:
        with closing(book):
            seen = book.imported
            if book.header.settings == header.settings:
                book.begin_pass()
                slots = book.unclaimed()
                for at in range(0, len(slots), inputs.BATCH_ROWS):
                    yield from filter(None, book.read_all(slots[at : at + inputs.BATCH_ROWS]))
    path = Path(config.output)
    footer = outputs.recognise(path) if path.is_file() else None
    if footer is None or footer.settings != header.settings:
        return
    if (footer.publication or footer.run_id) not in seen:
        yield from outputs.read_back(path)


def _read(plan: Plan, config: RunConfig, book: Journal) -> _Found:
    found = _Found(rows=plan.counts.total, bad=plan.counts.invalid)
    if plan.copies is not None:
        found.copies = plan.copies.rows
    to_send = passes.to_send(config)
    for request in passes.every(plan, book, config, tuple(Held)):
        held = book.held(request.slot)
        if held in to_send:
            found.to_send += 1
            found.body_bytes += len(request.body)
            longest = longest_answer(request.body)
            found.bounded += longest
            found.unbounded += not longest
        elif held is Held.OK:
            found.answered += 1
            _measure(found, len(request.body), book.read(request.slot))
        else:
            found.failed += 1
    return found


def _measure(found: _Found, body_bytes: int, outcome: Outcome) -> None:
    usage: Usage = outcome.usage
    found.latency_s += outcome.latency_s or 0.0
    if usage.prompt_tokens is not None and usage.completion_tokens is not None:
        found.prompts.add(body_bytes, usage.prompt_tokens)
        found.answers.add(1.0, usage.completion_tokens)


def _facts(found: _Found, config: RunConfig) -> EstimateFacts:
    prompt, answer = _measured(found) if found.prompts.n else _guessed(found)
    price = config.price
    return EstimateFacts(
        rows=found.rows,
        bad=found.bad,
        answered_before=found.answered,
        failed_before=found.failed,
        to_send=found.to_send,
        copies=found.copies,
        measured=found.prompts.n,
        prompt_tokens=prompt,
        completion_tokens=answer,
        cost_usd=None if price is None else _cost(price, prompt, answer),
        price=None if price is None else price.told(),
        seconds=_seconds(found, config, prompt.about + answer.about),
    )


def _measured(found: _Found) -> tuple[Between, Between]:
    """Tokens of prompts and answers still to come, by those that are held."""
    prompt = found.prompts.total(found.body_bytes, found.to_send)
    answer = found.answers.total(found.to_send, found.to_send)
    return prompt, answer if found.unbounded else answer.at_most(found.bounded)


def _guessed(found: _Found) -> tuple[Between, Between]:
    """The same where nothing is held that tells."""
    rows = found.to_send
    text = max(0, found.body_bytes - _FRAME_BYTES * rows)
    most_prompt = text / _FEWEST_BYTES + _FRAME_TOKENS * rows
    prompt = Between(text / _BYTES_A_TOKEN, text / _MOST_BYTES, most_prompt)
    most = None if found.unbounded else float(found.bounded)
    usual = float(_USUAL_ANSWER * rows)
    return prompt, Between(usual if most is None else min(usual, most), float(rows), most)


def _cost(price: Price, prompt: Between, answer: Between) -> Between:
    high = None
    if prompt.high is not None and answer.high is not None:
        high = price.most_usd(math.ceil(prompt.high), math.ceil(answer.high))
    cheapest = min(price.input, price.input if price.cached is None else price.cached)
    return Between(
        (prompt.about * price.input + answer.about * price.output) / 1e6,
        (prompt.low * cheapest + answer.low * price.output) / 1e6,
        high,
    )


def _seconds(found: _Found, config: RunConfig, tokens: float) -> float | None:
    """How long the rows to send take: by what paces them, None when nothing is known of it."""
    paces = []
    if config.rpm is not None:
        paces.append(found.to_send / config.rpm * 60)
    if config.tpm is not None:
        paces.append(tokens / config.tpm * 60)
    if config.concurrency is not None and found.answered and found.latency_s:
        paces.append(found.to_send * found.latency_s / found.answered / config.concurrency)
    return max(paces, default=None)
