"""Flags, declared once: their words in ``--help``, their variables, their keys in a config file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import click

from batchrun import providers
from batchrun.cli.config_file import FILE_PARAMS, NO_VARIABLE, read_config_file
from batchrun.cli.options import DEFAULTS, ENV_PREFIX
from batchrun.cli.values import number_or_auto, seconds
from batchrun.config import INPUT_FORMATS
from batchrun.providers import PROVIDERS


class _Header(click.types.StringParamType):
    def split_envvar_value(self, rv: str) -> list[str]:
        # Click would split at spaces, which every header has.
        return rv.splitlines()


HEADINGS = (
    "What is sent",
    "Endpoint and key",
    "Pace",
    "Failures",
    "Output",
    "State",
    "Talk",
    "Options",
)


Function = TypeVar("Function", bound=Callable[..., object])


Decorator = Callable[[Function], Function]


class Command(click.Command):
    """A command whose ``--help`` has its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in HEADINGS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                heading = param.heading if isinstance(param, _Option) else HEADINGS[-1]
                sections[heading].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class _Option(click.Option):
    def __init__(self, *args: Any, heading: str, shows: str | None, **more: Any) -> None:
        super().__init__(*args, **more)
        self.heading = heading
        self._shows = shows

    def get_help_extra(self, ctx: click.Context) -> click.types.OptionHelpExtra:
        """The default without the brackets that Click puts around words."""
        extra = super().get_help_extra(ctx)
        if self._shows is not None:
            extra["default"] = self._shows
        return extra


def option(
    *names: str,
    heading: str = "Options",
    default: object = None,
    shows: str | None = None,
    variable: bool = True,
    **more: Any,
) -> Decorator[Any]:
    """An option with its BATCHRUN_* variable, if it has one, under its heading in ``--help``.

    The default is shown where there is one; ``shows`` says in words what happens without.
    """
    long = next(name for name in names if name.startswith("--")).removeprefix("--")
    name = long.replace("-", "_")
    if more.get("is_flag"):
        default = False
    return click.option(
        *names,
        name,
        cls=_Option,
        heading=heading,
        shows=shows,
        default=default,
        show_default=default is not None and default is not False,
        envvar=ENV_PREFIX + name.upper() if variable and name not in NO_VARIABLE else None,
        **more,
    )


def _stack(*decorators: Decorator[Any]) -> Decorator[Any]:
    """Several options as one decorator, in the order they are shown."""

    def decorate(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def _load_config(ctx: click.Context, _param: click.Parameter, path: str | None) -> str | None:
    group = ctx.parent.command if ctx.parent is not None else None
    if path is not None and isinstance(group, click.Group):
        file = read_config_file(path, group.commands, ctx.info_name or "")
        ctx.default_map = dict(file.values)
        ctx.meta[FILE_PARAMS] = file.params
    return path


_sent = partial(option, heading="What is sent")


_endpoint = partial(option, heading="Endpoint and key")


_pace = partial(option, heading="Pace")


_failures = partial(option, heading="Failures")


_output = partial(option, heading="Output")


_state = partial(option, heading="State")


_talk = partial(option, heading="Talk")


INPUTS = click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")


CONFIG = _talk(
    "--config",
    is_eager=True,
    callback=_load_config,
    expose_value=False,
    metavar="FILE.toml",
    help="Read options from this file; keys are option names.",
)


JSON = _talk("--json", is_flag=True, help="Print one JSON object on stdout at the end.")


STATE = _state(
    "--state", metavar="DIR", shows="OUTPUT.batchrun", help="Where the journal of the run lives."
)


REQUEST = _stack(
    _sent(
        "--model", "-m", shows="the preset's", help="Model; typed here it replaces the rows' own."
    ),
    _sent("--system", "-s", metavar="TEXT", help="System message for rows without one."),
    _sent(
        "--param",
        multiple=True,
        metavar="NAME=VALUE",
        help="Any field of the request; VALUE is JSON if it parses, else a string.",
    ),
    _sent("--temperature", type=float, shows="not sent", help="Same as --param temperature=X."),
    _sent("--max-tokens", type=int, shows="not sent", help="Same as --param max_tokens=N."),
    _sent(
        "--shape",
        type=click.Choice(["batch", "messages", "prompt", "body"]),
        shows="detected",
        help="What a row is.",
    ),
    _sent("--prompt-column", metavar="NAME", shows="prompt", help="The column with the prompt."),
    _sent(
        "--body-columns",
        metavar="A,B",
        help="More columns to send as fields of the request.",
    ),
    _sent(
        "--input-format",
        type=click.Choice(list(INPUT_FORMATS)),
        shows="by suffix",
        help="Format of the inputs.",
    ),
)


ENDPOINT = _stack(
    _endpoint(
        "--provider",
        metavar="NAME",
        help=f"Preset of URL and key variable: {', '.join(PROVIDERS)}.",
    ),
    _endpoint(
        "--base-url",
        metavar="URL",
        shows=providers.DEFAULT_BASE_URL,
        help="Any compatible endpoint.",
    ),
    _endpoint(
        "--api-key-env",
        metavar="NAME",
        shows="the provider's variable, else BATCHRUN_API_KEY",
        help="The variable that holds the key.",
    ),
    _endpoint("--api-key-file", metavar="FILE", help="A file that holds the key."),
    _endpoint("--allow-http", is_flag=True, help="Let a key travel over plain http."),
    _endpoint(
        "--header",
        "-H",
        type=_Header(),
        multiple=True,
        metavar="'NAME: VALUE'|@FILE",
        help="An extra header, kept secret; @FILE has one on each line.",
    ),
)


MOCK = _endpoint("--mock", is_flag=True, help="Synthetic answers from inside: no key, no network.")


DELIVERY = _stack(
    _sent("--stream", is_flag=True, help="Ask for server-sent events; records ttft_s."),
    _pace(
        "--concurrency",
        "-c",
        type=number_or_auto,
        metavar="N|auto",
        shows="auto, found while running, up to 512",
        help="Requests in flight, at most.",
    ),
    _pace("--rpm", type=float, shows="what headers say", help="Requests a minute, at most."),
    _pace("--tpm", type=float, shows="what headers say", help="Tokens a minute, at most."),
    _failures(
        "--max-retries",
        type=int,
        default=DEFAULTS.max_retries,
        help="After temporary failures; waiting out a rate limit does not count.",
    ),
    _failures(
        "--max-in-doubt-retries",
        type=int,
        default=DEFAULTS.max_in_doubt_retries,
        help="Of those, after attempts that may have been billed, over all runs.",
    ),
    _pace(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        default="600",
        help="One attempt, after connecting.",
    ),
    _pace(
        "--connect-timeout",
        type=seconds,
        metavar="SECONDS",
        default="10",
        help="DNS, TCP and TLS.",
    ),
    _pace(
        "--max-wait",
        type=seconds,
        metavar="SECONDS",
        default="600",
        help="Longest rate-limit wait; then exit 75.",
    ),
    _pace(
        "--max-outage",
        type=seconds,
        metavar="SECONDS",
        default="600",
        help="Longest time without success; then 75.",
    ),
    _pace("--deadline", metavar="2h|06:00", help="Start no request after this; then 75."),
    _pace(
        "--drain",
        type=seconds,
        metavar="SECONDS",
        default="25",
        help="Wait for answers in flight at an early end.",
    ),
    _failures(
        "--abort-after",
        type=int,
        default=DEFAULTS.abort_after,
        help="Exit 4 when the first N rows all fail alike; 0: never.",
    ),
)


ROWS = _stack(
    _sent("--limit", "-n", type=int, shows="all", help="Only the first N rows."),
    _failures("--retry-failed", is_flag=True, help="Also send rejected rows again."),
    _output(
        "--overwrite", is_flag=True, help="Replace an output made otherwise; keeps it as .bak."
    ),
    _failures(
        "--allow-failures",
        metavar="N|P%",
        default=str(DEFAULTS.allow_failures),
        help="So many failed rows still exit 0.",
    ),
    _state(
        "--if-locked",
        type=click.Choice(["fail", "wait", "skip"]),
        default=DEFAULTS.if_locked,
        help="When another run holds this output.",
    ),
    _state(
        "--keep-unused",
        metavar="DAYS|forever",
        default=f"{DEFAULTS.keep_unused_days:g}",
        help="Keep answers whose rows are gone so long; 0: not at all.",
    ),
)


OUTPUT = _stack(
    _output(
        "--output",
        "-o",
        metavar="FILE",
        shows="INPUT.results.parquet",
        help="*.parquet, *.jsonl, or - for lines on stdout.",
    ),
    _output(
        "--carry",
        metavar="all|none|A,B",
        default="all",
        help="Input columns that the output keeps.",
    ),
    _output("--no-response-body", is_flag=True, help="Leave out the column response_body."),
)


TALK = _stack(
    _talk("--quiet", "-q", is_flag=True, help="Nothing on success; else the final block only."),
    _talk("--verbose", "-v", is_flag=True, help="Also show how the limits move."),
    JSON,
    _talk("--log-file", metavar="FILE", help="Append a line a minute, and notes."),
    CONFIG,
)
