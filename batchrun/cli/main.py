"""The command line: what is typed into a run, and its end into an exit code.

Click reads flags, environment and config file into an ``Options``; ``main`` is the one boundary
that turns what ends a run into text and a code.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO

import click
import msgspec
from msgspec import Struct

from batchrun import console, process, secret, terminal
from batchrun.cli.config_file import FILE_PARAMS, unknown_variables
from batchrun.cli.flags import (
    CONFIG,
    DELIVERY,
    ENDPOINT,
    INPUTS,
    JSON,
    MOCK,
    OUTPUT,
    REQUEST,
    ROWS,
    STATE,
    TALK,
    Command,
    Decorator,
    option,
)
from batchrun.cli.options import Given, Layer, Options, build_config, key_variables
from batchrun.cli.streams import NoStdout, forget_stdout, print_bytes, say
from batchrun.cli.values import parse_headers, seconds
from batchrun.config import STDIN, STDOUT, VERSION, RunConfig, output_format
from batchrun.console import Progress
from batchrun.errors import (
    EXIT_BUG,
    EXIT_OK,
    EXIT_USAGE,
    BatchrunError,
    LocalIOError,
    Locked,
    NoKey,
    UsageError,
)
from batchrun.secret import Scrubber, Secret
from batchrun.summary import RunSummary

EXIT_INTERRUPTED = 130


class _Commands(click.Group):
    command_class = Command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        looks_like_input = Path(name).exists() or "." in name or "/" in name or name == STDIN
        if self.get_command(ctx, name) is None and looks_like_input and not name.startswith("--"):
            meant = shlex.join(["submit", *args])
            raise UsageError(f"no command {name}", next_steps=(f"did you mean: batchrun {meant}",))
        return super().resolve_command(ctx, args)


_EPILOG = (
    "Every option can also be set as BATCHRUN_<OPTION>, such as BATCHRUN_MAX_RETRIES, or in a"
    " --config file; the command line wins, then the environment, then the file. Exit codes:"
    " 0 done, 2 usage, 3 rows failed, 4 endpoint refuses, 11 locked, 74 local I/O, 75 stopped"
    " early (run the same command again), 128+N signal, 1 a bug."
)


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=_Commands, context_settings=_SETTINGS, epilog=_EPILOG)
@click.version_option(VERSION, prog_name="batchrun")
def cli() -> None:
    """A file of prompts in, a Parquet of answers out.

    Running the same command again is always safe: it continues, and never pays twice.
    The manual, also without a network: batchrun help
    """


@cli.command(epilog=_EPILOG)
@INPUTS
@OUTPUT
@REQUEST
@ENDPOINT
@MOCK
@DELIVERY
@ROWS
@STATE
@TALK
@click.pass_context
def submit(ctx: click.Context, /, **values: object) -> int:
    """Send every row of INPUT and publish the answers as one file."""
    options = msgspec.convert(values, Options)
    given = _given(ctx)
    with _ends_in_json(options.json, options.inputs), _without_secrets(given, options):
        if not options.quiet:
            _warn(given)
        return _submit(options, _settled(options, given))


def _settled(options: Options, given: Given) -> RunConfig:
    """The config; a mistake in the input is said before a missing key."""
    try:
        return build_config(options, given)
    except NoKey:
        from batchrun.runs import look

        look(build_config(options, given, sends=False))
        raise


def _submit(options: Options, config: RunConfig) -> int:
    from batchrun.runs import run

    with _talk(options) as talk:
        try:
            summary = asyncio.run(run(config, talk, handle_signals=True))
        except Locked as exc:
            if config.if_locked != "skip":
                raise
            summary = console.skipped_summary(exc, VERSION, config)
            talk.note(f"skipped: {exc.message}")
        else:
            _say_the_end(summary, config, talk, quiet=options.quiet)
    if options.json:
        print_bytes(console.to_json(summary))
    return summary.exit_code


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


@cli.command(epilog=_EPILOG)
@INPUTS
@option("--show", type=int, default=0, metavar="N", help="Print the first N bodies on stdout.")
@REQUEST
@ENDPOINT
@MOCK
@JSON
@CONFIG
@click.pass_context
def validate(ctx: click.Context, /, show: int, **values: object) -> int:
    """Say what would be sent, and every bad row; send nothing."""
    from batchrun.runs import validate

    options = msgspec.convert(values, Options)
    given = _given(ctx)
    with _ends_in_json(options.json, options.inputs), _without_secrets(given, options):
        _warn(given)
        if options.json and show:
            raise UsageError("--json and --show both write to stdout; choose one")
        facts = validate(build_config(options, given, sends=False), show)
        for body in facts.bodies:
            print_bytes(f"{body}\n".encode())
        _tell(facts, console.validate_block(facts), as_json=options.json)
        return facts.exit_code


@cli.command(epilog=_EPILOG)
@click.argument("output")
@STATE
@JSON
@CONFIG
@click.pass_context
def status(ctx: click.Context, output: str, state: str | None, json: bool) -> int:
    """Say where the run of OUTPUT stands (exit 0 finished, 75 resumable, 11 running)."""
    from batchrun.runs import status

    with _ends_in_json(json, ()):
        _warn(_given(ctx))
        facts = status(output, None if state is None else Path(state))
        _tell(facts, console.status_block(facts), as_json=json)
        return facts.exit_code


@cli.command(epilog=_EPILOG)
@click.argument("collected_from", metavar="OUTPUT")
@option(
    "--output",
    "-o",
    heading="Output",
    metavar="FILE",
    shows="OUTPUT's stem + .partial.parquet",
    help="*.parquet, *.jsonl, or - for lines on stdout.",
)
@STATE
@JSON
@CONFIG
@click.pass_context
def collect(
    ctx: click.Context, collected_from: str, output: str | None, state: str | None, json: bool
) -> int:
    """Write what OUTPUT's run holds so far, also beside a running process."""
    from batchrun.runs import collect

    with _ends_in_json(json, ()):
        _warn(_given(ctx))
        if json and output == STDOUT:
            raise UsageError("--json and -o - both write to stdout; choose one")
        if output is not None:
            output_format(output)
        state_dir = None if state is None else Path(state)
        facts = collect(collected_from, state_dir, output)
        _tell(facts, console.collect_block(facts), as_json=json)
        return facts.exit_code


@cli.command(epilog=_EPILOG)
@ENDPOINT
@MOCK
@JSON
@CONFIG
@click.pass_context
def models(ctx: click.Context, /, **values: object) -> int:
    """List the models that the endpoint offers, one on each line."""
    from batchrun.runs import models

    options = msgspec.convert({**values, "output": STDOUT}, Options)
    given = _given(ctx)
    with _ends_in_json(options.json, ()), _without_secrets(given, options):
        _warn(given)
        as_json = options.json
        config = build_config(msgspec.structs.replace(options, json=False), given)
        names = asyncio.run(models(config))
        if as_json:
            print_bytes(console.models_json(names))
        else:
            lines = (f"{terminal.one_line(name)}\n" for name in names)
            print_bytes("".join(lines).encode())
        return EXIT_OK


def _knob(*names: str, **more: Any) -> Decorator[Any]:
    # Quotas and models in the environment are the client's: the server must not obey them too.
    return option(*names, variable=False, **more)


@cli.command("mock-server")
@_knob("--host", default="127.0.0.1", help="Address to listen on.")
@_knob("--port", type=int, default=8000, help="Port; 0 takes a free one.")
@_knob(
    "--latency", type=seconds, metavar="SECONDS", default="0", help="How long every answer takes."
)
@_knob(
    "--jitter",
    type=seconds,
    metavar="SECONDS",
    default="0",
    help="Up to so much longer, fixed per body.",
)
@_knob("--seed", type=int, default=0, help="Chooses which requests meet a fault.")
@_knob(
    "--fault",
    multiple=True,
    metavar="KIND=SHARE",
    help="A share of requests that fail, such as 429=0.05 or disconnect=0.01.",
)
@_knob("--rpm", type=float, shows="no limit", help="Requests a minute for each model.")
@_knob("--tpm", type=float, shows="no limit", help="Tokens a minute for each model.")
@_knob(
    "--limit-headers",
    type=click.Choice(["none", "mistral", "openai"]),
    default="none",
    help="How answers tell what is left of the quota.",
)
@_knob("--slots", type=int, shows="no limit", help="Requests worked on at a time; others wait.")
@_knob("--model", "-m", multiple=True, metavar="NAME", shows="any", help="A model there is.")
@_knob("--require-key-env", metavar="NAME", help="Demand the key in this variable.")
@_knob("--completion-tokens", type=int, shows="short", help="Length of every answer.")
@_knob("--ledger", metavar="FILE", help="Append a JSON line for each request.")
def mock_server(
    host: str,
    port: int,
    latency: float,
    jitter: float,
    seed: int,
    fault: tuple[str, ...],
    rpm: float | None,
    tpm: float | None,
    limit_headers: Literal["none", "mistral", "openai"],
    slots: int | None,
    model: tuple[str, ...],
    require_key_env: str | None,
    completion_tokens: int | None,
    ledger: str | None,
) -> int:
    """Serve synthetic chat completions, for dry runs and tests; Ctrl-C ends it."""
    from batchrun.mock import Knobs, serve

    knobs = Knobs(
        latency_s=latency,
        latency_jitter_s=jitter,
        seed=seed,
        faults=dict(parse_fault(text) for text in fault),
        rpm=rpm,
        tpm=tpm,
        limit_headers=limit_headers,
        slots=slots,
        models=model,
        key=_required_key(require_key_env, os.environ),
        completion_tokens=completion_tokens,
    )
    ledger_file = None if ledger is None else Path(ledger)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(host, port, knobs, ledger_file, on_ready=_say_where))
    return EXIT_OK


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


@cli.command("help")
@click.argument("topic", required=False)
@click.pass_context
def show_help(ctx: click.Context, topic: str | None) -> int:
    """Read the manual: its topics, one of them, a recipe, or the help of a command."""
    from batchrun.cli import topics

    if topic is None:
        text = topics.contents(list(cli.commands))
    elif command := cli.commands.get(topic):
        text = command.get_help(click.Context(command, info_name=topic, parent=ctx.parent))
    else:
        text = topics.read(topic)
    click.echo(text)
    return EXIT_OK


def _tell(facts: Struct, block: str, *, as_json: bool) -> None:
    if as_json:
        print_bytes(console.to_json(facts))
    else:
        say(block)


_LAYERS = {layer.name: layer for layer in Layer}


def _given(ctx: click.Context) -> Given:
    names = (param.name for param in ctx.command.params if param.name)
    sources = {name: source for name in names if (source := ctx.get_parameter_source(name))}
    argv = ctx.find_root().obj
    return Given(
        layers={name: _LAYERS[s.name] for name, s in sources.items() if s.name in _LAYERS},
        environ=os.environ,
        file_params=ctx.meta.get(FILE_PARAMS, {}),
        argv=tuple(argv) if argv is not None else (),
    )


def _warn(given: Given) -> None:
    for warning in unknown_variables(given.environ, cli.commands):
        say(f"{'note':<10}{terminal.one_line(warning)}")


@contextlib.contextmanager
def _talk(options: Options) -> Iterator[Progress]:
    log_file = _open_log(options.log_file)
    talk = Progress(quiet=options.quiet, verbose=options.verbose, log_file=log_file)
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


class _Bug(Exception):
    """An exception nobody expected; its text is the traceback without secrets."""


@contextlib.contextmanager
def _ends_in_json(wanted: bool, inputs: Sequence[str]) -> Iterator[None]:
    """Print the object that ``--json`` promises also when the command ends in an exception."""
    try:
        yield
    except NoStdout:
        raise
    except (BatchrunError, _Bug, KeyboardInterrupt) as exc:
        if wanted:
            # What ended the command is more than that nobody can be told on stdout.
            with contextlib.suppress(NoStdout):
                print_bytes(console.to_json(console.error_summary(exc, VERSION, inputs)))
        raise


@contextlib.contextmanager
def _without_secrets(given: Given, options: Options) -> Iterator[None]:
    """Scrub keys and header values from whatever a bug or an endpoint put into an exception."""
    try:
        yield
    except (BatchrunError, BrokenPipeError, click.ClickException):
        raise
    except Exception as exc:
        if (trouble := _of_the_machine(exc)) is not None:
            raise trouble from exc
        raise _Bug(_scrubber(given, options).scrub(traceback.format_exc())) from None


def _of_the_machine(exc: BaseException) -> LocalIOError | None:
    """What the machine did not give, wherever in a run it was asked for it; None for a bug."""
    if isinstance(exc, BaseExceptionGroup):
        return next(filter(None, map(_of_the_machine, exc.exceptions)), None)
    if isinstance(exc, MemoryError) or "can't start new thread" in str(exc):
        return LocalIOError(
            "not enough memory, or a limit on it (ulimit -v, a container's); answers are saved:"
            " give it more, or use fewer -c, and run the same command again"
        )
    if isinstance(exc, OSError):
        where = f"{os.fsdecode(exc.filename)}: " if isinstance(exc.filename, (str, bytes)) else ""
        return LocalIOError(f"{where}{exc.strerror or exc}")
    return None


def _scrubber(given: Given, options: Options) -> Scrubber:
    names = {*key_variables(), *([options.api_key_env] if options.api_key_env else [])}
    keys = [Secret(given.environ[name]) for name in names if given.environ.get(name)]
    keys += secret.in_url(options.base_url or "")
    if options.api_key_file is not None:
        with contextlib.suppress(OSError, ValueError):
            keys.append(Secret(Path(options.api_key_file).read_text(encoding="utf-8").strip()))
    values: list[Secret] = []
    with contextlib.suppress(UsageError):
        values = [value for _, value in parse_headers(options.header)]
    return Scrubber(keys, values)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console script."""
    args = list(sys.argv[1:] if argv is None else argv)
    process.hold_standard_streams()
    code = EXIT_OK  # also when whoever reads our output has gone
    try:
        with contextlib.suppress(BrokenPipeError):
            code = run_command(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        forget_stdout()
    sys.exit(code)


def run_command(args: list[str]) -> int:
    """Run one command line and return its exit code; everything it says is said."""
    if sys.platform == "win32":
        say("batchrun: runs on Linux and macOS; on Windows use it inside WSL")
        return EXIT_USAGE
    try:
        code = cli.main(args, prog_name="batchrun", standalone_mode=False, obj=args)
        return int(code or EXIT_OK)
    except BatchrunError as exc:
        say(console.error_text(exc))
        return exc.exit_code
    except click.exceptions.NoArgsIsHelpError as exc:
        say(exc.format_message())
        return EXIT_USAGE
    except click.ClickException as exc:
        say(f"batchrun: {exc.format_message()}")
        context = exc.ctx if isinstance(exc, click.UsageError) else None
        say(f"  see: {context.command_path if context else 'batchrun'} --help")
        return EXIT_USAGE
    except (KeyboardInterrupt, click.Abort):
        say("batchrun: interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except _Bug as exc:
        return _bug(str(exc))
    except Exception as exc:
        if (trouble := _of_the_machine(exc)) is not None:
            say(console.error_text(trouble))
            return trouble.exit_code
        return _bug(traceback.format_exc())


def _bug(text: str) -> int:
    say(text.rstrip())
    say(
        "batchrun: this is a bug in batchrun; answers received so far are in the journal.\n"
        "  Please report it with the lines above, after a look that nothing private is in them."
    )
    return EXIT_BUG
