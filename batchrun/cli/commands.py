"""What each command does with what was typed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import click
from msgspec import Struct

from batchrun import console, secret, terminal
from batchrun.cli.config_file import FILE_PARAMS, unknown_variables
from batchrun.cli.endings import Bug, of_the_machine
from batchrun.cli.options import Given, Layer, build_config, key_variables, output_of
from batchrun.cli.streams import NoStdout, print_bytes, say
from batchrun.cli.values import parse_headers
from batchrun.cli.watch import watch
from batchrun.config import STDOUT, VERSION, Allowance, RunConfig, output_format
from batchrun.console import Progress, StatusFacts
from batchrun.errors import EXIT_OK, BatchrunError, Locked, NoKey, UsageError
from batchrun.process import interrupts_held
from batchrun.secret import Scrubber, Secret
from batchrun.summary import RunSummary


def submit(ctx: click.Context) -> int:
    with _given(ctx) as given:
        config = _settled(given)
        with interrupts_held():
            from batchrun.runs import run

        with _talk(given) as talk:
            try:
                summary = asyncio.run(run(config, talk, handle_signals=True))
            except Locked as exc:
                if config.if_locked != "skip":
                    raise
                summary = console.skipped_summary(exc, VERSION, config)
                talk.note(f"skipped: {exc.message}")
            else:
                _say_the_end(summary, config, talk, quiet=given.flag("quiet"))
        if given.flag("json"):
            print_bytes(console.to_json(summary))
        return summary.exit_code


def _settled(given: Given) -> RunConfig:
    """The config; a mistake in the input is said before a missing key."""
    try:
        return build_config(given)
    except NoKey:
        with interrupts_held():
            from batchrun.runs import look

        look(build_config(given, sends=False))
        raise


def _say_the_end(summary: RunSummary, config: RunConfig, talk: Progress, *, quiet: bool) -> None:
    facts = console.FinalFacts(output_bytes=_size(summary.output))
    block = console.final_block(summary, config, facts)
    talk.end()
    talk.print_block(block, console.final_lines(summary))
    talk.close()
    if summary.exit_code and (quiet or not talk.is_tty):
        say(block)


def _size(output: str | None) -> int | None:
    if output is None or output == STDOUT:
        return None
    try:
        return os.stat(output).st_size
    except OSError:
        return None


def validate(ctx: click.Context) -> int:
    with _given(ctx) as given:
        show = int(given.values["show"])
        if given.flag("json") and show:
            raise UsageError("--json and --show both write to stdout; choose one")
        with interrupts_held():
            from batchrun.runs import validate

        facts = validate(build_config(given, sends=False), show)
        for body in facts.bodies:
            print_bytes(f"{body}\n".encode())
        _tell(facts, console.validate_block(facts), given)
        return facts.exit_code


def estimate(ctx: click.Context) -> int:
    with _given(ctx) as given:
        config = replace(build_config(given, sends=False), sample=None, **output_of(given))
        with interrupts_held():
            from batchrun.runs import estimate, run

        facts = estimate(config)
        if (wanted := given.values.get("sample")) and facts.to_send and not facts.answered_before:
            measuring = replace(_settled(given), sample=wanted)
            with _talk(given) as talk:
                summary = asyncio.run(run(measuring, talk, handle_signals=True))
                talk.end()
            if not summary.published:
                say(console.final_block(summary, config, console.FinalFacts()))
                return summary.exit_code
            facts = estimate(config)
        _tell(facts, console.estimate_block(facts, config), given)
        return facts.exit_code


def status(ctx: click.Context) -> int:
    with _given(ctx) as given:
        with interrupts_held():
            from batchrun.runs import status

        outputs = given.texts("outputs")
        if given.path("state") is not None and outputs[1:]:
            raise UsageError("--state is that of one run; name one OUTPUT")

        def look() -> list[StatusFacts]:
            return [status(output, given.path("state")) for output in outputs]

        if given.flag("watch") and given.flag("json"):
            raise UsageError("--watch is for people, --json for programs; choose one")
        found = watch(look) if given.flag("watch") else look()
        for facts in found:
            name = f"{facts.output}\n" if found[1:] else ""
            _tell(facts, name + console.status_block(facts), given)
        # What goes on counts most, and then what has to be continued.
        states = {facts.state: facts.exit_code for facts in found}
        return next(
            states[state] for state in ("running", "stopped", "finished") if state in states
        )


def collect(ctx: click.Context) -> int:
    with _given(ctx) as given:
        output = given.text("output")
        if given.flag("json") and output == STDOUT:
            raise UsageError("--json and -o - both write to stdout; choose one")
        if output is not None and not output.endswith(".csv"):
            output_format(output)
        with interrupts_held():
            from batchrun.runs import collect

        facts = collect(str(given.text("collected_from")), given.path("state"), output)
        _tell(facts, console.collect_block(facts), given)
        return facts.exit_code


def merge(ctx: click.Context) -> int:
    with _given(ctx) as given:
        with interrupts_held():
            from batchrun.runs import merge

        allowed = Allowance.parse(given.text("allow_failures") or "0")
        facts = merge(str(given.text("merged")), allowed)
        _tell(facts, console.merge_block(facts), given)
        return facts.exit_code


def report(ctx: click.Context) -> int:
    with _given(ctx) as given:
        with interrupts_held():
            from batchrun.runs import make_page

        facts = make_page(str(given.text("paged")), given.text("output"))
        _tell(facts, console.report_block(facts), given)
        return EXIT_OK


def models(ctx: click.Context) -> int:
    with _given(ctx) as given:
        with interrupts_held():
            from batchrun.runs import models

        as_json = given.flag("json")
        to_stdout = replace(given, values={**given.values, "output": STDOUT, "json": False})
        names = asyncio.run(models(build_config(to_stdout)))
        if as_json:
            print_bytes(console.models_json(names))
        else:
            lines = (f"{terminal.one_line(name)}\n" for name in names)
            print_bytes("".join(lines).encode())
        return EXIT_OK


def mock_server(ctx: click.Context) -> int:
    from batchrun.mock import Knobs, serve

    typed = ctx.params
    knobs = Knobs(
        latency_s=typed["latency"],
        latency_jitter_s=typed["jitter"],
        seed=typed["seed"],
        faults=dict(parse_fault(text) for text in typed["fault"]),
        rpm=typed["rpm"],
        tpm=typed["tpm"],
        limit_headers=typed["limit_headers"],
        slots=typed["slots"],
        models=typed["model"],
        key=_required_key(typed["require_key_env"], os.environ),
        completion_tokens=typed["completion_tokens"],
    )
    ledger = None if typed["ledger"] is None else Path(typed["ledger"])
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(typed["host"], typed["port"], knobs, ledger, on_ready=_say_where))
    return EXIT_OK


COMMANDS: Mapping[str, Callable[[click.Context], int]] = {
    "submit": submit,
    "validate": validate,
    "estimate": estimate,
    "status": status,
    "collect": collect,
    "merge": merge,
    "report": report,
    "models": models,
    "mock-server": mock_server,
}


def _say_where(url: str) -> None:
    say(f"{'serving':<10}{url}/v1   (Ctrl-C ends it)")
    say(f"{'next':<10}batchrun submit INPUT --base-url {url} -m mock-small")


def parse_fault(text: str) -> tuple[str, float]:
    kind, equals, share = text.rpartition("=")
    try:
        if equals and kind:
            return kind, float(share)
    except ValueError:
        pass
    raise UsageError(f"--fault {text}: write it as KIND=SHARE, such as 429=0.05")


def _required_key(name: str | None, environ: Mapping[str, str]) -> str | None:
    if name is None:
        return None
    if not environ.get(name):
        raise UsageError(f"--require-key-env {name}: that variable is not set or empty")
    return environ[name]


def _tell(facts: Struct, block: str, given: Given) -> None:
    if given.flag("json"):
        print_bytes(console.to_json(facts))
    else:
        say(block)


_LAYERS = {layer.name: layer for layer in Layer}


@contextlib.contextmanager
def _given(ctx: click.Context) -> Iterator[Given]:
    """What was given, in bounds in which every end is fit to be shown: as JSON, without secrets."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = Given(
        values=ctx.params,
        layers={name: _LAYERS[s.name] for name, s in sources.items() if s and s.name in _LAYERS},
        environ=os.environ,
        file_params=ctx.meta.get(FILE_PARAMS, {}),
        argv=tuple(ctx.find_root().obj or ()),
    )
    with _ends_in_json(given), without_secrets(given):
        if not given.flag("quiet") and isinstance(group := ctx.find_root().command, click.Group):
            for warning in unknown_variables(given.environ, group.commands):
                say(f"{'note':<10}{terminal.one_line(warning)}")
        yield given


@contextlib.contextmanager
def _talk(given: Given) -> Iterator[Progress]:
    log_file = _open_log(given.text("log_file"))
    talk = Progress(quiet=given.flag("quiet"), verbose=given.flag("verbose"), log_file=log_file)
    try:
        yield talk
    except BatchrunError as exc:
        talk.log(f"error {exc.message}")
        raise
    finally:
        talk.end()
        talk.close()
        if log_file is not None:
            # What a full disk did not take is still in it; the writer has said so.
            with contextlib.suppress(OSError):
                log_file.close()


def _open_log(path: str | None) -> TextIO | None:
    if path is None:
        return None
    try:
        return open(path, "a", encoding="utf-8", errors="backslashreplace")
    except OSError as exc:
        raise UsageError(f"--log-file {path}: {exc.strerror}") from exc


@contextlib.contextmanager
def _ends_in_json(given: Given) -> Iterator[None]:
    """Print the object that ``--json`` promises also when the command ends in an exception."""
    try:
        yield
    except NoStdout:
        raise
    except (BatchrunError, Bug, KeyboardInterrupt) as exc:
        if given.flag("json"):
            # What ended the command is more than that nobody can be told on stdout.
            with contextlib.suppress(NoStdout):
                print_bytes(
                    console.to_json(console.error_summary(exc, VERSION, given.texts("inputs")))
                )
        raise


@contextlib.contextmanager
def without_secrets(given: Given) -> Iterator[None]:
    """Scrub keys and header values from whatever a bug or an endpoint put into an exception."""
    try:
        yield
    except (BatchrunError, BrokenPipeError, click.ClickException):
        raise
    except Exception as exc:
        if (trouble := of_the_machine(exc)) is not None:
            raise trouble from exc
        raise Bug(_scrubber(given).scrub(traceback.format_exc())) from None


def _scrubber(given: Given) -> Scrubber:
    names = {*key_variables(), given.text("api_key_env") or ""}
    keys = [Secret(given.environ[name]) for name in names if given.environ.get(name)]
    keys += secret.in_url(given.text("base_url") or "")
    if (key_file := given.path("api_key_file")) is not None:
        with contextlib.suppress(OSError, ValueError):
            keys.append(Secret(key_file.read_text(encoding="utf-8").strip()))
    values: list[Secret] = []
    with contextlib.suppress(UsageError):
        values = [value for _, value in parse_headers(given.texts("header"))]
    return Scrubber(keys, values)
