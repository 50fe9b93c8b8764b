"""The command line: which commands there are, and how each end becomes text and an exit code.

Nothing heavy is imported for ``--help``: what a command does is in ``commands``.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from batchrun import process
from batchrun.cli.config_file import CONFIG
from batchrun.cli.endings import say_why
from batchrun.cli.flags import (
    ALLOW_FAILURES,
    DEDUPE,
    DELIVERY,
    ENDPOINT,
    INPUTS,
    JSON,
    KNOBS,
    MOCK,
    OUTPUT,
    REQUEST,
    ROWS,
    STATE,
    TALK,
    Command,
    Option,
)
from batchrun.cli.streams import forget_stdout, say
from batchrun.config import STDIN, VERSION
from batchrun.errors import EXIT_OK, EXIT_USAGE, UsageError


class _Commands(click.Group):
    command_class = Command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        looks_like_input = os.path.exists(name) or "." in name or "/" in name or name == STDIN
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


@cli.command(
    epilog=_EPILOG,
    params=[INPUTS, *OUTPUT, *REQUEST, *ENDPOINT, MOCK, *DELIVERY, *ROWS, STATE, *TALK, CONFIG],
)
@click.pass_context
def submit(ctx: click.Context, /, **_: object) -> int:
    """Send every row of INPUT and publish the answers as one file."""
    return _perform(ctx)


_SHOW = Option(
    "--show", type=int, default=0, metavar="N", help="Print the first N bodies on stdout."
)


@cli.command(
    epilog=_EPILOG, params=[INPUTS, _SHOW, *REQUEST, DEDUPE, *ENDPOINT, MOCK, JSON, CONFIG]
)
@click.pass_context
def validate(ctx: click.Context, /, **_: object) -> int:
    """Say what would be sent, and every bad row; send nothing."""
    return _perform(ctx)


@cli.command(
    epilog=_EPILOG,
    params=[INPUTS, *OUTPUT, *REQUEST, *ENDPOINT, MOCK, *DELIVERY, *ROWS, STATE, JSON, CONFIG],
)
@click.pass_context
def estimate(ctx: click.Context, /, **_: object) -> int:
    """Say what submit would still cost; with --sample N send N rows first, to measure."""
    return _perform(ctx)


_RUNS_OF = click.Argument(
    ["outputs"], metavar="OUTPUT...", nargs=-1, required=True, type=click.Path()
)
_WATCH = Option(
    "--watch",
    heading="Talk",
    field="",
    typed_only=True,
    is_flag=True,
    help="Look again every second, until all have ended.",
)


@cli.command(epilog=_EPILOG, params=[_RUNS_OF, _WATCH, STATE, JSON, CONFIG])
@click.pass_context
def status(ctx: click.Context, /, **_: object) -> int:
    """Say where the run of OUTPUT stands (exit 0 finished, 75 resumable, 11 running)."""
    return _perform(ctx)


_COLLECTED_FROM = click.Argument(["collected_from"], metavar="OUTPUT", type=click.Path())


_COLLECTED = Option(
    *("--output", "-o"),
    heading="Output",
    field="",
    typed_only=True,
    metavar="FILE",
    shows="OUTPUT's stem + .partial.parquet",
    help="*.parquet, *.jsonl, *.csv for a spreadsheet, or - for lines on stdout.",
)


@cli.command(epilog=_EPILOG, params=[_COLLECTED_FROM, _COLLECTED, STATE, JSON, CONFIG])
@click.pass_context
def collect(ctx: click.Context, /, **_: object) -> int:
    """Write what OUTPUT's run holds so far, also beside a running process."""
    return _perform(ctx)


_MERGED = click.Argument(["merged"], metavar="OUTPUT", type=click.Path())


@cli.command(epilog=_EPILOG, params=[_MERGED, ALLOW_FAILURES, JSON, CONFIG])
@click.pass_context
def merge(ctx: click.Context, /, **_: object) -> int:
    """Make OUTPUT of the parts that submit --shard left beside it (exit 75: some are missing)."""
    return _perform(ctx)


_PAGED = click.Argument(["paged"], metavar="OUTPUT", type=click.Path())


_PAGE = Option(
    *("--output", "-o"),
    heading="Output",
    field="",
    typed_only=True,
    metavar="FILE.html",
    shows="OUTPUT with .html for its suffix",
    help="Where the page goes.",
)


@cli.command(epilog=_EPILOG, params=[_PAGED, _PAGE, JSON, CONFIG])
@click.pass_context
def report(ctx: click.Context, /, **_: object) -> int:
    """Make a page to look at of OUTPUT: what came out, how it went, why rows failed."""
    return _perform(ctx)


@cli.command(epilog=_EPILOG, params=[*ENDPOINT, MOCK, JSON, CONFIG])
@click.pass_context
def models(ctx: click.Context, /, **_: object) -> int:
    """List the models that the endpoint offers, one on each line."""
    return _perform(ctx)


@cli.command("mock-server", params=list(KNOBS))
@click.pass_context
def mock_server(ctx: click.Context, /, **_: object) -> int:
    """Serve synthetic chat completions, for dry runs and tests; Ctrl-C ends it."""
    return _perform(ctx)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print what a shell's start-up file needs to complete commands, options and files."""
    from click.shell_completion import get_completion_class

    complete = get_completion_class(shell)
    assert complete is not None
    click.echo(complete(cli, {}, "batchrun", "_BATCHRUN_COMPLETE").source())
    return EXIT_OK


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


def _perform(ctx: click.Context) -> int:
    with process.interrupts_held():
        from batchrun.cli.commands import COMMANDS
    return COMMANDS[ctx.command.name or ""](ctx)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console script."""
    args = list(sys.argv[1:] if argv is None else argv)
    process.hold_standard_streams()
    process.without_numpy_and_pandas()
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
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as exc:
        return say_why(exc)
