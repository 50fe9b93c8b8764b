"""The command line: options into a RunConfig, a run into an exit code.

A choice comes from the highest of: command line, ``BATCHRUN_*``, ``--config`` file, provider
preset, default. Click reads the first three into an ``Options``; ``build_config`` does the rest as
a function of values. ``main`` is the one boundary that turns what ends a run into text and a code.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import math
import os
import re
import shlex
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from datetime import time as day_time
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO, TypeVar

import click
import msgspec
from click.core import ParameterSource
from msgspec import Struct

from batchrun import providers, report
from batchrun.config import (
    STDIN,
    STDOUT,
    VERSION,
    Allowance,
    IfLocked,
    InputFormat,
    JSONValue,
    RunConfig,
    default_output,
    output_format,
)
from batchrun.errors import (
    EXIT_BUG,
    EXIT_OK,
    EXIT_USAGE,
    BatchrunError,
    Locked,
    UsageError,
)
from batchrun.progress import Progress
from batchrun.providers import PROVIDERS, Endpoint, Secret
from batchrun.types import RunSummary, Shape

ENV_PREFIX = "BATCHRUN_"
EXIT_INTERRUPTED = 130
DEFAULTS = RunConfig(inputs=(), output=STDOUT, output_format="jsonl")

Layer = ParameterSource
_RANK = {Layer.COMMANDLINE: 3, Layer.ENVIRONMENT: 2, Layer.DEFAULT_MAP: 1}


class Options(Struct, frozen=True, kw_only=True):
    """What Click read for ``submit`` or ``validate``; a command without an option has its default.

    ``param``, ``temperature`` and ``max_tokens`` hold what was typed or, for the last two, came
    from any layer; ``header`` is unparsed.
    """

    inputs: tuple[str, ...] = ()
    output: str | None = None
    input_format: InputFormat | None = None
    state: str | None = None

    model: str | None = None
    system: str | None = None
    param: tuple[str, ...] = ()
    temperature: float | None = None
    max_tokens: int | None = None
    shape: Shape | None = None
    prompt_column: str | None = None
    body_columns: str | None = None
    mock: bool = False

    provider: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    api_key_file: str | None = None
    allow_http: bool = False
    header: tuple[str, ...] = ()

    stream: bool = False
    concurrency: int | None = None
    rpm: float | None = None
    tpm: float | None = None
    max_retries: int = DEFAULTS.max_retries
    max_in_doubt_retries: int = DEFAULTS.max_in_doubt_retries
    timeout: float = DEFAULTS.timeout_s
    connect_timeout: float = DEFAULTS.connect_timeout_s
    max_wait: float = DEFAULTS.max_wait_s
    max_outage: float = DEFAULTS.max_outage_s
    deadline: str | None = None
    drain: float = DEFAULTS.drain_s
    abort_after: int = DEFAULTS.abort_after
    limit: int | None = None
    retry_failed: bool = False
    overwrite: bool = False
    allow_failures: str = str(DEFAULTS.allow_failures)
    if_locked: IfLocked = DEFAULTS.if_locked
    carry: str = "all"
    no_response_body: bool = False

    quiet: bool = False
    verbose: bool = False
    json: bool = False
    log_file: str | None = None


# Options to RunConfig


class Given(Struct, frozen=True, kw_only=True):
    """Where options come from, beside their values."""

    layers: Mapping[str, Layer] = {}  # option name -> the layer that set it
    environ: Mapping[str, str] = {}
    file_params: Mapping[str, JSONValue] = {}  # the ``param`` table of the config file
    argv: tuple[str, ...] = ()
    now: datetime | None = None  # for --deadline 06:00; None: the clock

    def rank(self, name: str) -> int:
        """Higher is nearer to the user's fingers; 0 is a default."""
        layer = self.layers.get(name)
        return 0 if layer is None else _RANK.get(layer, 0)

    def typed(self, name: str) -> bool:
        return self.layers.get(name) is Layer.COMMANDLINE


def build_config(options: Options, given: Given, *, sends: bool = True) -> RunConfig:
    """Settle every choice, or say in a UsageError which one cannot work.

    Without ``sends`` no key is demanded or read, and several inputs need no output.
    """
    output = _settled_output(options) if sends else STDOUT
    if sends and options.json and output == STDOUT:
        raise UsageError("--json and -o - both write to stdout; choose one")
    headers = parse_headers(options.header)
    endpoint = None if options.mock else _endpoint(options, given, headers, demands_key=sends)
    params, replacing = _params(options, given)
    return RunConfig(
        inputs=options.inputs,
        output=output,
        output_format=output_format(output),
        input_format=options.input_format,
        state_dir=None if options.state is None else Path(options.state),
        model=options.model or _default_model(options, endpoint),
        model_replaces=given.typed("model"),
        system=options.system,
        params=params,
        params_replacing=replacing,
        shape=options.shape,
        prompt_column=options.prompt_column,
        body_columns=split_columns(options.body_columns or ""),
        mock=options.mock,
        endpoint=endpoint,
        headers=headers,
        stream=options.stream,
        concurrency=options.concurrency,
        rpm=options.rpm,
        tpm=options.tpm,
        max_retries=options.max_retries,
        max_in_doubt_retries=options.max_in_doubt_retries,
        timeout_s=options.timeout,
        connect_timeout_s=options.connect_timeout,
        max_wait_s=options.max_wait,
        max_outage_s=options.max_outage,
        deadline_s=None
        if options.deadline is None
        else parse_deadline(options.deadline, given.now),
        drain_s=options.drain,
        abort_after=options.abort_after,
        limit=options.limit,
        retry_failed=options.retry_failed,
        overwrite=options.overwrite,
        allow_failures=Allowance.parse(options.allow_failures),
        if_locked=options.if_locked,
        carry=parse_carry(options.carry),
        response_body=not options.no_response_body,
        command=command_to_paste(given.argv),
    )


def _settled_output(options: Options) -> str:
    if options.output is None:
        return default_output(options.inputs, mock=options.mock)
    if options.output != STDOUT and any(
        Path(path).exists() and Path(path).resolve() == Path(options.output).resolve()
        for path in options.inputs
    ):
        raise UsageError(f"-o {options.output}: that is the input")
    return options.output


def _endpoint(
    options: Options, given: Given, headers: Sequence[tuple[str, Secret]], *, demands_key: bool
) -> Endpoint:
    """Provider and URL are one choice, and the key belongs to it.

    One given nearer to the user's fingers sets the other aside: ``--base-url`` typed beside
    BATCHRUN_PROVIDER must not send that provider's key, nor ask for its model.
    """
    ranks = {name: given.rank(name) for name in ("provider", "base_url")}
    top = max(ranks.values())
    provider = options.provider if ranks["provider"] == top else None
    base_url = options.base_url if ranks["base_url"] == top else None
    key_env = options.api_key_env if given.rank("api_key_env") >= top else None
    key_file = options.api_key_file if given.rank("api_key_file") >= top else None
    return providers.resolve(
        provider=provider,
        base_url=base_url,
        api_key_env=key_env if demands_key and key_file is None else None,
        api_key_file=key_file if demands_key else None,
        allow_http=options.allow_http or not demands_key,
        environ=given.environ if demands_key else _without_keys(given.environ),
        # A header that authorises stands in for a key: where nothing is sent none is needed.
        explicit_headers=(
            frozenset(name.lower() for name, _ in headers)
            if demands_key
            else frozenset({"authorization"})
        ),
    )


def _default_model(options: Options, endpoint: Endpoint | None) -> str | None:
    if endpoint is not None:
        return endpoint.default_model
    preset = PROVIDERS.get(options.provider or "")
    return (preset.model if preset else None) or providers.DEFAULT_MODEL


def _without_keys(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in key_variables()}


def key_variables() -> frozenset[str]:
    declared = {preset.key_env for preset in PROVIDERS.values() if preset.key_env}
    return frozenset({providers.DEFAULT_KEY_ENV, *declared})


def _params(options: Options, given: Given) -> tuple[dict[str, JSONValue], frozenset[str]]:
    """Request parameters of all layers, and the names that were typed: those replace a row's."""
    typed = dict(parse_param(text) for text in options.param)
    below: dict[str, JSONValue] = {**given.file_params, **_env_params(given.environ)}
    for name, value in (("temperature", options.temperature), ("max_tokens", options.max_tokens)):
        if value is None:
            continue
        if not given.typed(name):
            below[name] = value
        elif name in typed and typed[name] != value:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {value:g} and --param {name}={typed[name]} contradict")
        else:
            typed[name] = value
    reserved = {"messages", "model"} & {*typed, *below}
    if reserved:
        name = min(reserved)
        hint = "use --model" if name == "model" else "they come from the rows"
        raise UsageError(f"--param {name}=...: not a parameter; {hint}")
    return {**below, **typed}, frozenset(typed)


def _env_params(environ: Mapping[str, str]) -> dict[str, JSONValue]:
    text = environ.get(f"{ENV_PREFIX}PARAM", "")
    if not text:
        return {}
    try:
        value = strict_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(f'{ENV_PREFIX}PARAM must be a JSON object, such as {{"top_p": 0.9}}')
    return value


def parse_param(text: str) -> tuple[str, JSONValue]:
    """``K=V``: V is JSON if it parses, else the string itself. NaN and Infinity are not JSON."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--param {text}: write it as NAME=VALUE")
    try:
        return name.strip(), strict_json(value)
    except ValueError:
        return name.strip(), value


def strict_json(text: str) -> Any:
    """JSON as the RFC has it, with every number finite; else ValueError."""
    return json.loads(text, parse_constant=_not_json, parse_float=_finite)


def _not_json(text: str) -> NoReturn:
    raise ValueError(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OUR_HEADERS = frozenset({"content-length", "content-type", "host", "transfer-encoding"})


def parse_headers(texts: Sequence[str]) -> tuple[tuple[str, Secret], ...]:
    """``Name: value``, or ``@FILE`` with one on each line. No error repeats a value."""
    return tuple(_parse_header(line) for text in texts for line in _header_lines(text))


def _header_lines(text: str) -> list[str]:
    if not text.startswith("@"):
        return [text]
    try:
        lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "not a text file"
        raise UsageError(f"-H {text}: {why}") from exc
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _parse_header(line: str) -> tuple[str, Secret]:
    name, colon, value = line.partition(":")
    name, value = name.strip(), value.strip()
    if not colon or not _HEADER_NAME.fullmatch(name):
        raise UsageError("-H: write a header as 'Name: value', or @FILE with one on each line")
    if name.lower() in _OUR_HEADERS:
        raise UsageError(f"-H {name}: that header is batchrun's to set")
    if not value.isprintable() or not value.isascii():
        raise UsageError(f"-H {name}: the value holds characters no header can carry")
    return name, Secret(value)


def parse_carry(text: str) -> tuple[str, ...] | None:
    if text == "all":
        return None
    return () if text == "none" else split_columns(text)


def split_columns(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


_UNITS_S = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_DURATION = re.compile(
    r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?"
)


def parse_duration(text: str) -> float:
    """Seconds of ``90``, ``90s``, ``2h``, ``1h30m``; else ValueError."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None or not any(match.groups()):
        raise ValueError(text)
    return sum(
        float(number) * unit_s
        for number, unit_s in zip(match.groups(), _UNITS_S.values(), strict=True)
        if number
    )


def parse_deadline(text: str, now: datetime | None = None) -> float:
    """Seconds until a deadline: a duration, or the next such local time of day."""
    with contextlib.suppress(ValueError):
        if (seconds := parse_duration(text)) > 0:
            return seconds
    try:
        at = day_time.fromisoformat(text.zfill(5))  # 6:00 is 06:00
    except ValueError:
        raise UsageError(f"--deadline {text}: write 2h, 1h30m or a time such as 06:00") from None
    now = (now or datetime.now()).astimezone()
    # Built without an offset and localised afterwards, so that a change of clocks counts.
    today = datetime.combine(now.date(), at.replace(tzinfo=None))
    then = today.astimezone()
    if then <= now:
        then = (today + timedelta(days=1)).astimezone()
    return then.timestamp() - now.timestamp()


_SECRET_IN_URL = re.compile(
    r"([?&][^=&\s]*(?:key|token|sig|secret)[^=&\s]*=)[^&\s]+", re.IGNORECASE
)


def command_to_paste(argv: Sequence[str]) -> str:
    """The command line to type again, quoted for a shell, with nothing secret in it."""
    shown: list[str] = []
    redact_next = False
    for arg in argv:
        if redact_next:
            arg = _redacted_header(arg)
        elif arg.startswith("--header="):
            arg = "--header=" + _redacted_header(arg.removeprefix("--header="))
        elif arg.startswith("-H") and arg != "-H":
            arg = "-H" + _redacted_header(arg[2:])
        redact_next = not redact_next and arg in ("-H", "--header")
        shown.append(_SECRET_IN_URL.sub(r"\1***", arg))
    return shlex.join(["batchrun", *shown])


def _redacted_header(text: str) -> str:
    if text.startswith("@"):
        return text
    name, colon, _ = text.partition(":")
    return f"{name}: ***" if colon else "***"


# Config file and environment


class ConfigFile(Struct, frozen=True):
    """A ``--config`` file: values for Click by option name, and the ``param`` table."""

    values: Mapping[str, object] = {}
    params: Mapping[str, JSONValue] = {}


def read_config_file(path: str, commands: Mapping[str, click.Command], command: str) -> ConfigFile:
    """Top-level keys are options of any command; a table named as a command is for that one."""
    try:
        with open(path, "rb") as file:
            tree = tomllib.load(file)
    except OSError as exc:
        raise UsageError(f"--config {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"--config {path}: not TOML: {exc}") from exc
    known = {name: settable(command) for name, command in commands.items()}
    everywhere = set().union(*known.values())
    shared = {key: value for key, value in tree.items() if key not in commands}
    own = tree.get(command, {})
    _check_keys(path, shared, everywhere)
    for name in commands:
        if name in tree:
            if not isinstance(tree[name], dict):
                raise UsageError(f"--config {path}: [{name}] must be a table")
            _check_keys(f"{path} [{name}]", tree[name], known[name])
    merged = {_key(key): value for key, value in {**shared, **own}.items()}
    params = merged.pop("param", {})
    values = {k: _for_click(k, v) for k, v in merged.items() if k in known.get(command, ())}
    return ConfigFile(values, _toml_params(path, params))


def settable(command: click.Command) -> set[str]:
    """The option names that environment and config file may set."""
    return {
        param.name
        for param in command.params
        if isinstance(param, click.Option)
        and param.name
        and (param.envvar or param.name == "param")
    }


def _key(key: str) -> str:
    return key.replace("-", "_")


def _check_keys(where: str, table: Mapping[str, object], known: set[str]) -> None:
    for key in table:
        if _key(key) in FLAGS_ONLY:
            raise UsageError(f"--config {where}: {key} can only be given on the command line")
        if _key(key) not in known:
            raise UsageError(f"--config {where}: unknown key {key}{_nearest(_key(key), known)}")


def _nearest(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _for_click(key: str, value: object) -> object:
    """TOML's types as the texts Click's own conversions expect."""
    if key == "header":
        return [str(item) for item in value] if isinstance(value, list) else [str(value)]
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    if isinstance(value, day_time):
        return value.isoformat(timespec="minutes")
    return value if isinstance(value, bool) else str(value)


def _toml_params(path: str, params: object) -> dict[str, JSONValue]:
    try:
        value = strict_json(json.dumps(params, allow_nan=False))
    except (TypeError, ValueError) as exc:
        raise UsageError(f"--config {path}: [param] holds a value that JSON has not") from exc
    if not isinstance(value, dict):
        raise UsageError(f"--config {path}: param must be a table: [param]")
    return value


def unknown_variables(
    environ: Mapping[str, str], commands: Mapping[str, click.Command]
) -> list[str]:
    """One warning for each BATCHRUN_* variable that nothing reads."""
    options = set().union(*(settable(command) for command in commands.values()))
    known = {ENV_PREFIX + name.upper() for name in options} | {providers.DEFAULT_KEY_ENV}
    warnings = []
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name in known:
            continue
        if name.removeprefix(ENV_PREFIX).lower() in FLAGS_ONLY:
            warnings.append(f"{name} is ignored: only the command line can say that")
        else:
            warnings.append(f"{name} is unknown and ignored{_nearest(name, known)}")
    return warnings


# Click's side

FLAGS_ONLY = frozenset(
    {"config", "help", "limit", "output", "overwrite", "retry_failed", "version"}
)
_NO_VARIABLE = FLAGS_ONLY | {"param"}  # BATCHRUN_PARAM is one JSON object; see _env_params


def _seconds(value: object) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    try:
        return parse_duration(str(value))
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not a duration; write 90, 90s, 5m or 1h30m"
        ) from None


def _number_or_auto(value: object) -> int | None:
    if value == "auto":
        return None
    try:
        return int(str(value))
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor auto") from None


class _Header(click.types.StringParamType):
    def split_envvar_value(self, rv: str) -> list[str]:
        # Click would split at spaces, which every header has.
        return rv.splitlines()


Function = TypeVar("Function", bound=Callable[..., object])
Decorator = Callable[[Function], Function]


def _option(
    *names: str,
    default: object = None,
    shows: str | None = None,
    variable: bool = True,
    **more: Any,
) -> Decorator[Any]:
    """An option with its BATCHRUN_* variable, if it has one, and its default in ``--help``."""
    long = next(name for name in names if name.startswith("--")).removeprefix("--")
    name = long.replace("-", "_")
    if more.get("is_flag"):
        default, shows = False, shows or "off"
    return click.option(
        *names,
        name,
        default=default,
        show_default=shows if shows is not None else True,
        envvar=ENV_PREFIX + name.upper() if variable and name not in _NO_VARIABLE else None,
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
        ctx.meta[_FILE_PARAMS] = file.params
    return path


_FILE_PARAMS = "batchrun.file_params"

_INPUTS = click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")

_CONFIG = _option(
    "--config",
    is_eager=True,
    callback=_load_config,
    expose_value=False,
    metavar="FILE.toml",
    shows="none",
    help="Read options from this file; keys are option names.",
)
_JSON = _option("--json", is_flag=True, help="Print one JSON object on stdout at the end.")
_STATE = _option(
    "--state", metavar="DIR", shows="OUTPUT.batchrun", help="Where the journal of the run lives."
)

_REQUEST = _stack(
    _option(
        "--model", "-m", shows="the preset's", help="Model; typed here it replaces the rows' own."
    ),
    _option(
        "--system", "-s", metavar="TEXT", shows="none", help="System message for rows without one."
    ),
    _option(
        "--param",
        multiple=True,
        metavar="NAME=VALUE",
        shows="none",
        help="Any field of the request; VALUE is JSON if it parses, else a string.",
    ),
    _option("--temperature", type=float, shows="not sent", help="Same as --param temperature=X."),
    _option("--max-tokens", type=int, shows="not sent", help="Same as --param max_tokens=N."),
    _option(
        "--shape",
        type=click.Choice(["batch", "messages", "prompt", "body"]),
        shows="detected",
        help="What a row is.",
    ),
    _option("--prompt-column", metavar="NAME", shows="prompt", help="The column with the prompt."),
    _option(
        "--body-columns",
        metavar="A,B",
        shows="none",
        help="More columns to send as fields of the request.",
    ),
    _option(
        "--input-format",
        type=click.Choice(["jsonl", "parquet"]),
        shows="by suffix",
        help="Format of the inputs.",
    ),
)

_ENDPOINT = _stack(
    _option(
        "--provider",
        metavar="NAME",
        shows="none",
        help=f"Preset of URL and key variable: {', '.join(PROVIDERS)}.",
    ),
    _option(
        "--base-url",
        metavar="URL",
        shows=providers.DEFAULT_BASE_URL,
        help="Any compatible endpoint.",
    ),
    _option(
        "--api-key-env",
        metavar="NAME",
        shows="the provider's variable, else BATCHRUN_API_KEY",
        help="The variable that holds the key.",
    ),
    _option("--api-key-file", metavar="FILE", shows="none", help="A file that holds the key."),
    _option("--allow-http", is_flag=True, help="Let a key travel over plain http."),
    _option(
        "--header",
        "-H",
        type=_Header(),
        multiple=True,
        metavar="'NAME: VALUE'|@FILE",
        shows="none",
        help="An extra header, kept secret; @FILE has one on each line.",
    ),
)

_MOCK = _option("--mock", is_flag=True, help="Synthetic answers from inside: no key, no network.")

_DELIVERY = _stack(
    _option("--stream", is_flag=True, help="Ask for server-sent events; records ttft_s."),
    _option(
        "--concurrency",
        "-c",
        type=_number_or_auto,
        metavar="N|auto",
        shows="auto: found while running, up to 512",
        help="Requests in flight, at most.",
    ),
    _option("--rpm", type=float, shows="what headers say", help="Requests a minute, at most."),
    _option("--tpm", type=float, shows="what headers say", help="Tokens a minute, at most."),
    _option(
        "--max-retries",
        type=int,
        default=DEFAULTS.max_retries,
        help="For passing failures; waiting out a rate limit does not count.",
    ),
    _option(
        "--max-in-doubt-retries",
        type=int,
        default=DEFAULTS.max_in_doubt_retries,
        help="Of those, after attempts that may have been billed, over all runs.",
    ),
    _option(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        default="600",
        help="One attempt, after connecting.",
    ),
    _option(
        "--connect-timeout",
        type=_seconds,
        metavar="SECONDS",
        default="10",
        help="DNS, TCP and TLS.",
    ),
    _option(
        "--max-wait",
        type=_seconds,
        metavar="SECONDS",
        default="600",
        help="Longest rate-limit wait; then exit 75.",
    ),
    _option(
        "--max-outage",
        type=_seconds,
        metavar="SECONDS",
        default="600",
        help="Longest time without success; then 75.",
    ),
    _option(
        "--deadline", metavar="2h|06:00", shows="none", help="Start no request after this; then 75."
    ),
    _option(
        "--drain",
        type=_seconds,
        metavar="SECONDS",
        default="25",
        help="Wait for answers in flight at an early end.",
    ),
    _option(
        "--abort-after",
        type=int,
        default=DEFAULTS.abort_after,
        help="Exit 4 when the first N rows all fail alike; 0: never.",
    ),
)

_ROWS = _stack(
    _option("--limit", "-n", type=int, shows="all", help="Only the first N rows."),
    _option("--retry-failed", is_flag=True, help="Also send rejected rows again."),
    _option(
        "--overwrite", is_flag=True, help="Replace an output made otherwise; keeps it as .bak."
    ),
    _option(
        "--allow-failures",
        metavar="N|P%",
        default=str(DEFAULTS.allow_failures),
        help="So many failed rows still exit 0.",
    ),
    _option(
        "--if-locked",
        type=click.Choice(["fail", "wait", "skip"]),
        default=DEFAULTS.if_locked,
        help="When another run holds this output.",
    ),
)

_OUTPUT = _stack(
    _option(
        "--output",
        "-o",
        metavar="FILE",
        shows="INPUT.results.parquet",
        help="*.parquet, *.jsonl, or - for lines on stdout.",
    ),
    _option(
        "--carry",
        metavar="all|none|A,B",
        default="all",
        help="Input columns that the output keeps.",
    ),
    _option("--no-response-body", is_flag=True, help="Leave out the column response_body."),
)

_TALK = _stack(
    _option("--quiet", "-q", is_flag=True, help="Nothing on success; else the final block only."),
    _option("--verbose", "-v", is_flag=True, help="Also show how the limits move."),
    _JSON,
    _option("--log-file", metavar="FILE", shows="none", help="Append a line a minute, and notes."),
    _CONFIG,
)


class _Commands(click.Group):
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
    """


@cli.command(epilog=_EPILOG)
@_INPUTS
@_OUTPUT
@_REQUEST
@_ENDPOINT
@_MOCK
@_DELIVERY
@_ROWS
@_STATE
@_TALK
@click.pass_context
def submit(ctx: click.Context, /, **values: object) -> int:
    """Send every row of INPUT and publish the answers as one file."""
    options = msgspec.convert(values, Options)
    given = _given(ctx)
    with _ends_in_json(options.json, options.inputs), _without_secrets(given, options):
        if not options.quiet:
            _warn(given)
        return _submit(options, build_config(options, given))


def _submit(options: Options, config: RunConfig) -> int:
    from batchrun import runner

    with _talk(options) as talk:
        try:
            summary = asyncio.run(runner.run(config, talk, handle_signals=True))
        except Locked as exc:
            if config.if_locked != "skip":
                raise
            summary = report.skipped_summary(exc, VERSION, config)
            talk.note(f"skipped: {exc.message}")
        else:
            _say_the_end(summary, config, talk, quiet=options.quiet)
    if options.json:
        click.echo(report.to_json(summary), nl=False)
    return summary.exit_code


def _say_the_end(summary: RunSummary, config: RunConfig, talk: Progress, *, quiet: bool) -> None:
    facts = report.FinalFacts(
        prompt_column=summary.prompt_column, output_bytes=_size(summary.output)
    )
    block = report.final_block(summary, config, facts)
    talk.end()
    talk.print_block(block, report.final_lines(summary))
    talk.close()
    if summary.exit_code and (quiet or not talk.is_tty):
        click.echo(block, err=True)


def _size(output: str | None) -> int | None:
    if output is None or output == STDOUT:
        return None
    try:
        return os.stat(output).st_size
    except OSError:
        return None


@cli.command(epilog=_EPILOG)
@_INPUTS
@_option("--show", type=int, default=0, metavar="N", help="Print the first N bodies on stdout.")
@_REQUEST
@_ENDPOINT
@_MOCK
@_JSON
@_CONFIG
@click.pass_context
def validate(ctx: click.Context, /, show: int, **values: object) -> int:
    """Say what would be sent, and every bad row; send nothing."""
    from batchrun import views

    options = msgspec.convert(values, Options)
    given = _given(ctx)
    with _ends_in_json(options.json, options.inputs), _without_secrets(given, options):
        _warn(given)
        if options.json and show:
            raise UsageError("--json and --show both write to stdout; choose one")
        facts = views.validate(build_config(options, given, sends=False), show)
        for body in facts.bodies:
            click.echo(body)
        _tell(facts, report.validate_block(facts), as_json=options.json)
        return facts.exit_code


@cli.command(epilog=_EPILOG)
@click.argument("output")
@_STATE
@_JSON
@_CONFIG
@click.pass_context
def status(ctx: click.Context, output: str, state: str | None, json: bool) -> int:
    """Say where the run of OUTPUT stands (exit 0 finished, 75 resumable, 11 running)."""
    from batchrun import views

    with _ends_in_json(json, ()):
        _warn(_given(ctx))
        facts = views.status(output, None if state is None else Path(state))
        _tell(facts, report.status_block(facts), as_json=json)
        return facts.exit_code


@cli.command(epilog=_EPILOG)
@click.argument("collected_from", metavar="OUTPUT")
@_option(
    "--output",
    "-o",
    metavar="FILE",
    shows="OUTPUT's stem + .partial.parquet",
    help="*.parquet, *.jsonl, or - for lines on stdout.",
)
@_STATE
@_JSON
@_CONFIG
@click.pass_context
def collect(
    ctx: click.Context, collected_from: str, output: str | None, state: str | None, json: bool
) -> int:
    """Write what OUTPUT's run holds so far, also beside a running process."""
    from batchrun import views

    with _ends_in_json(json, ()):
        _warn(_given(ctx))
        if json and output == STDOUT:
            raise UsageError("--json and -o - both write to stdout; choose one")
        if output is not None:
            output_format(output)
        state_dir = None if state is None else Path(state)
        facts = views.collect(collected_from, state_dir, output)
        _tell(facts, report.collect_block(facts), as_json=json)
        return EXIT_OK


@cli.command(epilog=_EPILOG)
@_ENDPOINT
@_MOCK
@_JSON
@_CONFIG
@click.pass_context
def models(ctx: click.Context, /, **values: object) -> int:
    """List the models that the endpoint offers, one on each line."""
    from batchrun import views

    options = msgspec.convert({**values, "output": STDOUT}, Options)
    given = _given(ctx)
    with _ends_in_json(options.json, ()), _without_secrets(given, options):
        _warn(given)
        as_json = options.json
        config = build_config(msgspec.structs.replace(options, json=False), given)
        names = asyncio.run(views.models(config))
        if as_json:
            click.echo(report.models_json(names), nl=False)
        else:
            click.echo("".join(f"{name}\n" for name in names), nl=False)
        return EXIT_OK


def _knob(*names: str, **more: Any) -> Decorator[Any]:
    # Quotas and models in the environment are the client's: the server must not obey them too.
    return _option(*names, variable=False, **more)


@cli.command("mock-server")
@_knob("--host", default="127.0.0.1", help="Address to listen on.")
@_knob("--port", type=int, default=8000, help="Port; 0 takes a free one.")
@_knob(
    "--latency", type=_seconds, metavar="SECONDS", default="0", help="How long every answer takes."
)
@_knob(
    "--jitter",
    type=_seconds,
    metavar="SECONDS",
    default="0",
    help="Up to so much longer, fixed per body.",
)
@_knob("--seed", type=int, default=0, help="Chooses which requests meet a fault.")
@_knob(
    "--fault",
    multiple=True,
    metavar="KIND=SHARE",
    shows="none",
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
@_knob("--require-key-env", metavar="NAME", shows="none", help="Demand the key in this variable.")
@_knob("--completion-tokens", type=int, shows="short", help="Length of every answer.")
@_knob("--ledger", metavar="FILE", shows="none", help="Append a JSON line for each request.")
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
    from batchrun.mock_server import Knobs, serve

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
    click.echo(f"{'serving':<10}{url}/v1   (Ctrl-C ends it)", err=True)
    click.echo(f"{'next':<10}batchrun submit INPUT --base-url {url} -m mock-small", err=True)


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


def _tell(facts: Struct, block: str, *, as_json: bool) -> None:
    if as_json:
        click.echo(report.to_json(facts), nl=False)
    else:
        click.echo(block, err=True)


# The boundary


def _given(ctx: click.Context) -> Given:
    names = (param.name for param in ctx.command.params if param.name)
    layers = {name: source for name in names if (source := ctx.get_parameter_source(name))}
    argv = ctx.find_root().obj
    return Given(
        layers=layers,
        environ=os.environ,
        file_params=ctx.meta.get(_FILE_PARAMS, {}),
        argv=tuple(argv) if argv is not None else (),
    )


def _warn(given: Given) -> None:
    for warning in unknown_variables(given.environ, cli.commands):
        click.echo(f"{'note':<10}{warning}", err=True)


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
    except (BatchrunError, _Bug, KeyboardInterrupt) as exc:
        if wanted:
            click.echo(report.to_json(report.error_summary(exc, VERSION, inputs)), nl=False)
        raise


@contextlib.contextmanager
def _without_secrets(given: Given, options: Options) -> Iterator[None]:
    """Scrub keys and header values from whatever a bug or an endpoint put into an exception."""
    try:
        yield
    except (BatchrunError, BrokenPipeError, click.ClickException):
        raise
    except Exception:
        text = traceback.format_exc()
        for secret in _secrets(given, options):
            text = secret.scrub(text)
        raise _Bug(text) from None


def _secrets(given: Given, options: Options) -> list[Secret]:
    names = {*key_variables(), *([options.api_key_env] if options.api_key_env else [])}
    secrets = [Secret(given.environ[name]) for name in names if given.environ.get(name)]
    with contextlib.suppress(UsageError):
        secrets += [value for _, value in parse_headers(options.header)]
    if options.api_key_file is not None:
        with contextlib.suppress(OSError, ValueError):
            secrets.append(Secret(Path(options.api_key_file).read_text(encoding="utf-8").strip()))
    return secrets


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console script."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        sys.exit(run_command(args))
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter's own flush must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_OK)


def run_command(args: list[str]) -> int:
    """Run one command line and return its exit code; everything it says is said."""
    if sys.platform == "win32":
        _say("batchrun: runs on Linux and macOS; on Windows use it inside WSL")
        return EXIT_USAGE
    try:
        code = cli.main(args, prog_name="batchrun", standalone_mode=False, obj=args)
        sys.stdout.flush()
        return int(code or EXIT_OK)
    except BatchrunError as exc:
        _say(report.error_text(exc))
        return exc.exit_code
    except click.exceptions.NoArgsIsHelpError as exc:
        _say(exc.format_message())
        return EXIT_USAGE
    except click.ClickException as exc:
        _say(f"batchrun: {exc.format_message()}")
        context = exc.ctx if isinstance(exc, click.UsageError) else None
        _say(f"  see: {context.command_path if context else 'batchrun'} --help")
        return EXIT_USAGE
    except (KeyboardInterrupt, click.Abort):
        _say("batchrun: interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except _Bug as exc:
        return _bug(str(exc))
    except Exception:
        return _bug(traceback.format_exc())


def _bug(text: str) -> int:
    _say(text.rstrip())
    _say(
        "batchrun: this is a bug in batchrun; answers received so far are in the journal.\n"
        "  Please report it with the lines above, after a look that nothing private is in them."
    )
    return EXIT_BUG


def _say(text: str) -> None:
    """Print on stderr; one that takes nothing (a full disk) must not change the exit code."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)
