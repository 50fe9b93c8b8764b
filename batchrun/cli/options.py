"""Choices and where they come from, settled into a RunConfig.

A choice comes from the highest of: command line, ``BATCHRUN_*``, ``--config`` file, provider
preset, default. The first three arrive here as an ``Options`` and a ``Given``; what follows is a
function of values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import IntEnum
from pathlib import Path

from msgspec import Struct

from batchrun import providers, shell
from batchrun.cli.values import (
    is_text,
    parse_carry,
    parse_deadline,
    parse_headers,
    parse_param,
    split_columns,
    strict_json,
)
from batchrun.config import (
    STDOUT,
    Allowance,
    IfLocked,
    InputFormat,
    JSONValue,
    RunConfig,
    default_output,
    output_format,
    parse_keep_unused,
)
from batchrun.errors import UsageError
from batchrun.providers import PROVIDERS, Endpoint
from batchrun.secret import Secret, hidden_in_url
from batchrun.types import Shape

ENV_PREFIX = "BATCHRUN_"


DEFAULTS = RunConfig(inputs=(), output=STDOUT, output_format="jsonl")


class Layer(IntEnum):
    """Who made a choice; higher is nearer to the user's fingers."""

    DEFAULT = 0
    DEFAULT_MAP = 1  # the --config file
    ENVIRONMENT = 2
    COMMANDLINE = 3


class Options(Struct, frozen=True, kw_only=True):
    """What was read for ``submit`` or ``validate``; a command without an option has its default.

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
    keep_unused: str = f"{DEFAULTS.keep_unused_days:g}"
    carry: str = "all"
    no_response_body: bool = False

    quiet: bool = False
    verbose: bool = False
    json: bool = False
    log_file: str | None = None


class Given(Struct, frozen=True, kw_only=True):
    """Where options come from, beside their values."""

    layers: Mapping[str, Layer] = {}  # option name -> the layer that set it
    environ: Mapping[str, str] = {}
    file_params: Mapping[str, JSONValue] = {}  # the ``param`` table of the config file
    argv: tuple[str, ...] = ()
    now: datetime | None = None  # for --deadline 06:00; None: the clock

    def layer(self, name: str) -> Layer:
        return self.layers.get(name, Layer.DEFAULT)

    def typed(self, name: str) -> bool:
        return self.layer(name) is Layer.COMMANDLINE


def build_config(options: Options, given: Given, *, sends: bool = True) -> RunConfig:
    """Settle every choice, or say in a UsageError which one cannot work.

    Without ``sends`` no key is demanded or read, and several inputs need no output.
    """
    _check_text(options)
    output = _settled_output(options) if sends else STDOUT
    if sends and options.json and output == STDOUT:
        raise UsageError("--json and -o - both write to stdout; choose one")
    headers = parse_headers(options.header)
    endpoint = (
        providers.MOCK if options.mock else _endpoint(options, given, headers, demands_key=sends)
    )
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
        keep_unused_days=parse_keep_unused(options.keep_unused),
        carry=parse_carry(options.carry),
        response_body=not options.no_response_body,
        command=command_to_paste(given.argv),
    )


# A file may be called by any bytes; a request holds text.
_PATHS = frozenset({"inputs", "output", "state", "api_key_file", "log_file"})


def _check_text(options: Options) -> None:
    for name in Options.__struct_fields__:
        value = getattr(options, name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and name not in _PATHS and not is_text(text):
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag}: holds bytes that are not UTF-8 text; convert it first")


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
    layers = {name: given.layer(name) for name in ("provider", "base_url")}
    top = max(layers.values())
    provider = options.provider if layers["provider"] == top else None
    base_url = options.base_url if layers["base_url"] == top else None
    key_env = options.api_key_env if given.layer("api_key_env") >= top else None
    key_file = options.api_key_file if given.layer("api_key_file") >= top else None
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


def _default_model(options: Options, endpoint: Endpoint) -> str | None:
    if not options.mock:
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
    if not is_text(text):
        raise UsageError(f"{ENV_PREFIX}PARAM: holds bytes that are not UTF-8 text")
    try:
        value = strict_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(f'{ENV_PREFIX}PARAM must be a JSON object, such as {{"top_p": 0.9}}')
    return value


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
        shown.append(hidden_in_url(arg))
    return shell.line(["batchrun", *shown])


def _redacted_header(text: str) -> str:
    if text.startswith("@"):
        return text
    name, colon, _ = text.partition(":")
    return f"{name}: ***" if colon else "***"
