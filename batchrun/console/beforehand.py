"""The text of estimate."""

from __future__ import annotations

from collections.abc import Callable

from batchrun import shell
from batchrun.config import RunConfig
from batchrun.console.blocks import labelled, nexts
from batchrun.console.facts import Between, EstimateFacts
from batchrun.words import count, dollars, duration

_TRIAL_ROWS = 50


def estimate_block(facts: EstimateFacts, config: RunConfig) -> str:
    lines = labelled("rows", _rows(facts))
    if facts.to_send:
        basis = f"measured on {count(facts.measured, 'answer')}" if facts.measured else ""
        lines += labelled("prompt", _tokens(facts.prompt_tokens, basis or "bytes / 4"))
        if facts.measured:
            lines += labelled("answer", _tokens(facts.completion_tokens, basis))
        else:
            lines += labelled("answer", f"unknown: {_unmeasured(facts.completion_tokens)}")
        lines += labelled("cost", _cost(facts))
        lines += labelled("time", _time(facts, config))
    if facts.to_send and not facts.measured:
        trial = shell.line(["batchrun", "estimate", *config.inputs])
        lines += nexts([f"{trial} --sample {_TRIAL_ROWS} ...    sends {_TRIAL_ROWS}, to measure"])
    return "\n".join(lines)


def _rows(facts: EstimateFacts) -> str:
    more = [f"{facts.bad:,} bad", f"{facts.answered_before:,} answered before"]
    if facts.failed_before:
        more.append(f"{facts.failed_before:,} failed before")
    if facts.copies:
        more.append(f"{facts.copies:,} the same as others")
    return f"{facts.to_send:,} to send ({', '.join(more)})"


def _whole(number: float) -> str:
    return f"{round(number):,}"


def _tokens(between: Between, basis: str) -> str:
    return f"about {_span(between, _whole)} tokens ({basis})"


def _span(between: Between, said: Callable[[float], str]) -> str:
    low, about, high = map(said, (between.low, between.about, between.high or between.about))
    return about if low == high else f"{about}, {low} to {high}"


def _unmeasured(answers: Between) -> str:
    at_most = "without bound" if answers.high is None else f"at most {_whole(answers.high)}"
    return f"perhaps {_whole(answers.about)}, {at_most}"


def _cost(facts: EstimateFacts) -> str:
    if facts.cost_usd is None or facts.price is None:
        return "unknown: name a price, --price IN,OUT"
    prices = f"({dollars(facts.price[0])} in, {dollars(facts.price[1])} out per million)"
    cost = facts.cost_usd
    if cost.high is None:
        return f"perhaps {dollars(cost.about)}, without bound: --max-tokens sets one {prices}"
    if facts.measured:
        return f"about {_span(cost, dollars)} {prices}"
    return f"perhaps {dollars(cost.about)}, at most {dollars(cost.high)} {prices}"


def _time(facts: EstimateFacts, config: RunConfig) -> str:
    if facts.seconds is None:
        return "unknown before a first run"
    pace = f"--rpm {config.rpm:g}" if config.rpm is not None else ""
    pace = pace or (f"--tpm {config.tpm:g}" if config.tpm is not None else "")
    pace = pace or f"-c {config.concurrency}"
    return f"about {duration(facts.seconds)} at {pace}"
