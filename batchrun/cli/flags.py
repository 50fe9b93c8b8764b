"""Every flag, said once: its words in ``--help``, how it is read, and who may set it.

A flag named as a field of RunConfig, but for the field's unit, sets that field and has its
default: such a flag is one line here and one field there. The others are settled together, in
``options.build_config``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from operator import not_
from typing import Any, Literal, get_args

import click

from batchrun import providers
from batchrun.cli.values import (
    load_schema,
    number_or_auto,
    parse_carry,
    parse_deadline,
    parse_escalate_on,
    parse_keep_unused,
    parse_messages,
    seconds,
    split_columns,
    text_or_file,
)
from batchrun.config import (
    STDOUT,
    Allowance,
    Engine,
    IfLocked,
    InputFormat,
    RunConfig,
    SchemaDialect,
    Shape,
)
from batchrun.money import AUTO_PRICE, Price
from batchrun.providers import PROVIDERS
from batchrun.shards import Shard

ENV_PREFIX = "BATCHRUN_"


Heading = Literal[
    "What is sent",
    "Endpoint and key",
    "Pace",
    "Failures",
    "Output",
    "State",
    "Talk",
    "Options",
]


class Command(click.Command):
    """A command whose ``--help`` has its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in get_args(Heading)}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections[getattr(param, "heading", "Options")].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


DEFAULTS = RunConfig(inputs=(), output=STDOUT, output_format="jsonl")


_FIELDS = {
    field.name.removesuffix("_s").removesuffix("_days"): field.name for field in fields(RunConfig)
}


_PATHS = frozenset(("FILE", "DIR", "FILE.json", "FILE|GLOB", "OUTPUT"))


class Option(click.Option):
    """An option that knows its heading, its variable, and the RunConfig field it sets, if any.

    ``shows`` says in the help what happens without it; a ``typed_only`` option has no variable and
    no key in a config file. ``read`` makes the field's value of what click read, so late that a
    mistake in it ends as any other of the run's.
    """

    def __init__(
        self,
        *names: str,
        heading: Heading = "Options",
        field: str | None = None,
        read: Callable[[Any], object] | None = None,
        default: object = None,
        shows: str | None = None,
        typed_only: bool = False,
        variable: bool = True,
        **more: Any,
    ) -> None:
        if more.get("metavar") in _PATHS:
            more.setdefault("type", click.Path())  # a shell completes it
        long = next(name for name in names if name.startswith("--"))
        name = long.removeprefix("--").replace("-", "_")
        self.field = _FIELDS.get(name, "") if field is None else field
        self.read = read
        self.heading = heading
        self.is_settable = not typed_only
        if self.field.endswith("_s") and read is None:
            more = {"type": seconds, "metavar": "SECONDS", **more}
        if self.field and default is None:
            default = getattr(DEFAULTS, self.field)
            if shows is None and not isinstance(default, bool | tuple | None):
                shows = f"{default:g}" if isinstance(default, float) else str(default)
        self._shows = shows
        super().__init__(
            [*names, name],
            default=False if more.get("is_flag") else None if read is not None else default,
            show_default=default is not None,
            envvar=ENV_PREFIX + name.upper() if variable and not typed_only else None,
            **more,
        )

    def get_help_extra(self, ctx: click.Context) -> click.types.OptionHelpExtra:
        """The default without the brackets that Click puts around words."""
        extra = super().get_help_extra(ctx)
        if self._shows is not None:
            extra["default"] = self._shows
        return extra


def settable(command: click.Command) -> set[str]:
    """The names of the options that environment and config file may set."""
    return {param.name or "" for param in command.params if getattr(param, "is_settable", False)}


class _Header(click.types.StringParamType):
    def split_envvar_value(self, rv: str) -> list[str]:
        # Click would split at spaces, which every header has.
        return rv.splitlines()


_sent = partial(Option, heading="What is sent")
_endpoint = partial(Option, heading="Endpoint and key")
_output = partial(Option, heading="Output")
_talk = partial(Option, heading="Talk")
_pace = partial(Option, heading="Pace")
_failures = partial(Option, heading="Failures")
_state = partial(Option, heading="State")


def _given_price(text: str) -> Price | None:
    """None for that of the list, which depends on endpoint and model."""
    return None if text == AUTO_PRICE else Price.parse(text)


INPUTS = click.Argument(["inputs"], nargs=-1, required=True, metavar="INPUT...", type=click.Path())
JSON = _talk("--json", is_flag=True, help="Print one JSON object on stdout at the end.")


ALLOW_FAILURES = _failures(
    "--allow-failures",
    read=Allowance.parse,
    metavar="N|P%",
    help="So many failed rows still exit 0.",
)


STATE = _state(
    "--state", metavar="DIR", shows="OUTPUT.batchrun", help="Where the journal of the run lives."
)


# What rows may be by themselves: templates are asked for by -p and --messages.
SHAPES = [shape for shape in get_args(Shape) if shape != "template"]
REQUEST = (
    _sent(
        "--model", "-m", shows="the preset's", help="Model; typed here it replaces the rows' own."
    ),
    _sent(
        "--prompt",
        "-p",
        read=text_or_file,
        metavar="TEXT|@FILE",
        help="The user message, a template over the row's columns: 'Summarise: {{ text }}'.",
    ),
    _sent("--system", "-s", metavar="TEXT", help="System message for rows without one."),
    _sent(
        "--messages",
        read=parse_messages,
        metavar="@FILE.json",
        help="Messages before the prompt, or all of them; their texts are templates.",
    ),
    _sent(
        "--image",
        multiple=True,
        metavar="COLUMN",
        help="A column with an image for the message: URL, path or bytes.",
    ),
    _sent(
        "--schema",
        read=load_schema,
        metavar="FILE.json",
        help="JSON Schema that every answer has to fit, or module:Model; fills parsed_* columns.",
    ),
    _sent(
        "--schema-dialect",
        type=click.Choice(get_args(SchemaDialect)),
        help="How the endpoint is asked for it; auto starts from the provider and steps down.",
    ),
    _sent(
        "--param",
        variable=False,  # BATCHRUN_PARAM is one JSON object; see options._env_params
        multiple=True,
        metavar="NAME=VALUE",
        help="Any field of the request; VALUE is JSON if it parses, else a string.",
    ),
    _sent("--temperature", type=float, shows="not sent", help="Same as --param temperature=X."),
    _sent("--max-tokens", type=int, shows="not sent", help="Same as --param max_tokens=N."),
    _sent(
        "--shape",
        type=click.Choice(SHAPES),
        shows="detected",
        help="What a row is.",
    ),
    _sent("--prompt-column", metavar="NAME", shows="prompt", help="The column with the prompt."),
    _sent(
        "--body-columns",
        read=split_columns,
        metavar="A,B",
        help="More columns to send as fields of the request.",
    ),
    _sent(
        "--input-format",
        type=click.Choice(get_args(InputFormat)),
        shows="by suffix",
        help="Format of the inputs.",
    ),
)


ENDPOINT = (
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


DELIVERY = (
    _sent("--stream", is_flag=True, help="Ask for server-sent events; records ttft_s."),
    _pace(
        "--concurrency",
        "-c",
        type=number_or_auto,
        metavar="N|auto",
        shows="auto, found while running, up to 512 for each process",
        help="Requests in flight, at most.",
    ),
    _pace(
        "--processes",
        type=int,
        metavar="N",
        shows="1; with ray one on each node",
        help="Processes that send, for more than one core.",
    ),
    _pace(
        "--engine",
        type=click.Choice(get_args(Engine)),
        help="Where they run: on this machine, or on a Ray cluster.",
    ),
    _pace(
        "--ray-address",
        metavar="ADDR",
        shows="a cluster of this machine alone",
        help="The Ray cluster.",
    ),
    _pace("--rpm", type=float, shows="what headers say", help="Requests a minute, at most."),
    _pace("--tpm", type=float, shows="what headers say", help="Tokens a minute, at most."),
    _failures(
        "--max-retries", help="After temporary failures; waiting out a rate limit does not count."
    ),
    _failures(
        "--max-schema-retries",
        type=int,
        metavar="N",
        help="How often an answer that does not fit the schema is asked for again.",
    ),
    _failures(
        "--escalate", metavar="MODEL", help="A stronger model for rows whose answer does not do."
    ),
    _failures(
        "--on",
        field="escalate_on",
        read=parse_escalate_on,
        metavar="A,B",
        shows="schema,refusal,empty,length",
        help="What --escalate is for.",
    ),
    _failures(
        "--max-in-doubt-retries",
        help="Of those, after attempts that may have been billed, over all runs.",
    ),
    _pace("--timeout", help="One attempt, after connecting."),
    _pace("--connect-timeout", help="DNS, TCP and TLS."),
    _pace("--max-wait", help="Longest rate-limit wait; then exit 75."),
    _pace("--max-outage", help="Longest time without success; then 75."),
    _pace(
        "--deadline",
        metavar="2h|06:00",
        read=parse_deadline,
        help="Start no request after this; then 75.",
    ),
    _pace("--drain", help="Wait for answers in flight at an early end."),
    _pace(
        "--max-cost",
        type=float,
        metavar="USD",
        help="Send nothing that could cost more in all, with --price; then 75.",
    ),
    _pace(
        "--token-budget",
        type=int,
        metavar="N",
        help="The same in tokens, prompts and answers together.",
    ),
    _failures("--abort-after", help="Exit 4 when the first N rows all fail alike; 0: never."),
)


DEDUPE = _sent(
    "--dedupe",
    is_flag=True,
    help="Send equal requests once; every row that asks so gets the answer.",
)


ROWS = (
    _output(
        "--price",
        read=_given_price,
        metavar="IN,OUT[,CACHED]|auto",
        help="US dollars per million tokens: what answers cost. auto: by the list.",
    ),
    _sent("--limit", "-n", typed_only=True, type=int, shows="all", help="Only the first N rows."),
    _sent(
        "--reuse",
        typed_only=True,
        multiple=True,
        metavar="FILE|GLOB",
        help="Other outputs, whose answers to equal requests count as held.",
    ),
    _sent(
        "--samples",
        type=int,
        metavar="K",
        help="Ask each row K times; the column sample tells the answers apart.",
    ),
    DEDUPE,
    _sent("--sample", typed_only=True, type=int, metavar="N", help="Only N rows, at random."),
    _sent(
        "--seed", typed_only=True, type=int, help="Chooses which; a larger sample holds a smaller."
    ),
    _sent(
        "--shard",
        typed_only=True,
        metavar="I/N|auto",
        shows="all rows",
        read=lambda text: Shard.parse(text, os.environ),
        help="Only part I of N, with an Nth of the rates; `batchrun merge` joins the parts.",
    ),
    _failures(
        "--retry-failed", typed_only=True, is_flag=True, help="Also send rejected rows again."
    ),
    _output(
        "--overwrite",
        typed_only=True,
        is_flag=True,
        help="Replace an output made otherwise; keeps it as .bak.",
    ),
    ALLOW_FAILURES,
    _state(
        "--if-locked",
        type=click.Choice(get_args(IfLocked)),
        help="When another run holds this output.",
    ),
    _state(
        "--keep-unused",
        read=parse_keep_unused,
        metavar="DAYS|forever",
        help="Keep answers whose rows are gone so long; 0: not at all.",
    ),
)


OUTPUT = (
    _output(
        "--output",
        "-o",
        field="",
        typed_only=True,
        metavar="FILE",
        shows="INPUT.results.parquet",
        help="*.parquet, *.jsonl, or - for lines on stdout.",
    ),
    _output(
        "--carry",
        read=parse_carry,
        shows="all",
        metavar="all|none|A,B",
        help="Input columns that the output keeps.",
    ),
    _output(
        "--no-response-body",
        field="response_body",
        read=not_,
        is_flag=True,
        help="Leave out the column response_body.",
    ),
)


TALK = (
    _talk("--quiet", "-q", is_flag=True, help="Nothing on success; else the final block only."),
    _talk("--verbose", "-v", is_flag=True, help="Also show how the limits move."),
    JSON,
    _talk("--log-file", metavar="FILE", help="Append a line a minute, and notes."),
    _talk("--report", metavar="FILE.html", help="A page to look at, made of the output."),
    _talk("--otel", is_flag=True, help="Tell an OpenTelemetry collector (OTEL_* variables)."),
    _talk("--metrics-file", metavar="FILE", help="Numbers for Prometheus, every few seconds."),
)


# Quotas and models in the environment are the client's: the server must not obey them too.
_knob = partial(Option, field="", typed_only=True)


KNOBS = (
    _knob("--host", default="127.0.0.1", help="Address to listen on."),
    _knob("--port", type=int, default=8000, help="Port; 0 takes a free one."),
    _knob(
        "--latency",
        type=seconds,
        metavar="SECONDS",
        default="0",
        help="How long every answer takes.",
    ),
    _knob(
        "--jitter",
        type=seconds,
        metavar="SECONDS",
        default="0",
        help="Up to so much longer, fixed per body.",
    ),
    _knob("--seed", type=int, default=0, help="Chooses which requests meet a fault."),
    _knob(
        "--fault",
        multiple=True,
        metavar="KIND=SHARE",
        help="A share of requests that fail, such as 429=0.05 or disconnect=0.01.",
    ),
    _knob("--rpm", type=float, shows="no limit", help="Requests a minute for each model."),
    _knob("--tpm", type=float, shows="no limit", help="Tokens a minute for each model."),
    _knob(
        "--limit-headers",
        type=click.Choice(["none", "mistral", "openai"]),
        default="none",
        help="How answers tell what is left of the quota.",
    ),
    _knob("--slots", type=int, shows="no limit", help="Requests worked on at a time; others wait."),
    _knob("--model", "-m", multiple=True, metavar="NAME", shows="any", help="A model there is."),
    _knob("--require-key-env", metavar="NAME", help="Demand the key in this variable."),
    _knob("--completion-tokens", type=int, shows="short", help="Length of every answer."),
    _knob("--ledger", metavar="FILE", help="Append a JSON line for each request."),
)


# What is read into the fields of RunConfig, one by one.
SETTINGS = tuple(
    option for option in (*OUTPUT, *REQUEST, MOCK, *DELIVERY, *ROWS, *TALK) if option.field
)
