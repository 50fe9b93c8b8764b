"""Choices and where they come from, settled into a RunConfig.

A choice comes from the highest of: command line, ``BATCHRUN_*``, ``--config`` file, provider
preset, default. The first three arrive here as a ``Given``; what follows is a function of values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from batchrun import providers, shell
from batchrun.cli.flags import ENV_PREFIX, SETTINGS
from batchrun.cli.values import FROM_STDIN, is_text, parse_headers, parse_param, strict_json
from batchrun.config import (
    STDIN,
    STDOUT,
    JSONValue,
    RunConfig,
    default_output,
    output_format,
    with_its_share,
)
from batchrun.errors import UsageError
from batchrun.money import AUTO_PRICE, Price
from batchrun.providers import MOCK, PROVIDERS, Endpoint
from batchrun.secret import Secret, hidden_in_url
from batchrun.shards import Shard


class Layer(IntEnum):
    """Who made a choice; higher is nearer to the user's fingers."""

    DEFAULT = 0
    DEFAULT_MAP = 1  # the --config file
    ENVIRONMENT = 2
    COMMANDLINE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What click read for a command, and where it comes from.

    An option that a command has not, or that is None, has its default. ``param`` holds what was
    typed, ``temperature`` and ``max_tokens`` what came from any layer; ``header`` is unparsed.
    """

    values: Mapping[str, Any]
    layers: Mapping[str, Layer] = field(default_factory=dict)  # who set each option
    environ: Mapping[str, str] = field(default_factory=dict)
    file_params: Mapping[str, JSONValue] = field(default_factory=dict)  # [param] of the config file
    argv: tuple[str, ...] = ()

    def text(self, name: str) -> str | None:
        text: str | None = self.values.get(name)
        return text

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(self.values.get(name, ()))

    def path(self, name: str) -> Path | None:
        path = self.text(name)
        return None if path is None else Path(path)

    def flag(self, name: str) -> bool:
        return bool(self.values.get(name))

    def layer(self, name: str) -> Layer:
        return self.layers.get(name, Layer.DEFAULT)

    def typed(self, name: str) -> bool:
        return self.layer(name) is Layer.COMMANDLINE


def build_config(given: Given, *, sends: bool = True) -> RunConfig:
    """Settle every choice, or say in a UsageError which one cannot work.

    Without ``sends`` no key is demanded or read, and several inputs need no output.
    """
    _check_text(given)
    _check_stdin(given)
    output = _settled_output(given) if sends else STDOUT
    if sends and given.flag("json") and output == STDOUT:
        raise UsageError("--json and -o - both write to stdout; choose one")
    headers = parse_headers(given.texts("header"))
    endpoint = MOCK if given.flag("mock") else _endpoint(given, headers, demands_key=sends)
    params, replacing = _params(given)
    settled: dict[str, Any] = {
        "inputs": given.texts("inputs"),
        "output": output,
        "output_format": output_format(output),
        "state_dir": given.path("state"),
        "model": given.text("model") or _default_model(given, endpoint),
        "model_replaces": given.typed("model"),
        "params": params,
        "params_replacing": replacing,
        "endpoint": endpoint,
        "headers": headers,
        "command": command_to_paste(given.argv),
    }
    if given.text("price") == AUTO_PRICE:
        settled["price"], settled["price_note"] = _listed_price(
            endpoint, settled["model"], binds=given.values.get("max_cost") is not None
        )
    return with_its_share(RunConfig(**{**_one_by_one(given), **settled}))


def _listed_price(endpoint: Endpoint, model: object, *, binds: bool) -> tuple[Price | None, str]:
    # Not above: nobody else looks at a list of prices.
    from batchrun.prices import listed

    return listed(endpoint.url, str(model or endpoint.default_model or "") or None, binds=binds)


def output_of(given: Given) -> dict[str, Any]:
    """The output of a command that writes none; stdout where no name follows from the input."""
    try:
        output = _settled_output(given)
    except UsageError:
        if given.text("output") is not None:
            raise
        output = STDOUT
    return {"output": output, "output_format": output_format(output)}


def _one_by_one(given: Given) -> dict[str, Any]:
    """The fields that one option each sets, whatever the others are."""
    return {
        option.field: value if option.read is None else option.read(value)
        for option in SETTINGS
        if (value := given.values.get(option.name or "")) is not None
    }


# Each may be read from a file, or from standard input.
_TEXTS = ("prompt", "messages", "schema")

# A file may be called by any bytes; a request holds text.
_PATHS = frozenset({"inputs", "output", "state", "api_key_file", "log_file"})


def _check_text(given: Given) -> None:
    for name, value in given.values.items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and name not in _PATHS and not is_text(text):
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag}: holds bytes that are not UTF-8 text; convert it first")


def _check_stdin(given: Given) -> None:
    """It is read once: as the rows, or as one text."""
    readers = [name for name in _TEXTS if given.text(name) == FROM_STDIN]
    if given.text("schema") == STDIN:  # it is a file's name with or without the @
        readers.append("schema")
    if STDIN in given.texts("inputs"):
        readers.append("inputs")
    if readers[1:]:
        flag, other = (f"--{name}" if name != "inputs" else "the input -" for name in readers[:2])
        raise UsageError(f"{flag} {FROM_STDIN}: {other} reads standard input too; name a file")


def _settled_output(given: Given) -> str:
    output, inputs = given.text("output"), given.texts("inputs")
    if (text := given.text("shard")) is not None:
        whole = default_output(inputs, mock=given.flag("mock")) if output is None else output
        output = Shard.parse(text, os.environ).output(whole)
    if output is None:
        return default_output(inputs, mock=given.flag("mock"))
    if output != STDOUT and any(
        Path(path).exists() and Path(path).resolve() == Path(output).resolve() for path in inputs
    ):
        raise UsageError(f"-o {output}: that is the input")
    return output


def _endpoint(
    given: Given, headers: Sequence[tuple[str, Secret]], *, demands_key: bool
) -> Endpoint:
    """Provider and URL are one choice, and the key belongs to it.

    One given nearer to the user's fingers sets the other aside: ``--base-url`` typed beside
    BATCHRUN_PROVIDER must not send that provider's key, nor ask for its model.
    """
    layers = {name: given.layer(name) for name in ("provider", "base_url")}
    top = max(layers.values())
    provider = given.text("provider") if layers["provider"] == top else None
    base_url = given.text("base_url") if layers["base_url"] == top else None
    key_env = given.text("api_key_env") if given.layer("api_key_env") >= top else None
    key_file = given.text("api_key_file") if given.layer("api_key_file") >= top else None
    return providers.resolve(
        provider=provider,
        base_url=base_url,
        api_key_env=key_env if demands_key and key_file is None else None,
        api_key_file=key_file if demands_key else None,
        allow_http=given.flag("allow_http") or not demands_key,
        environ=given.environ if demands_key else _without_keys(given.environ),
        # A header that authorises stands in for a key: where nothing is sent none is needed.
        explicit_headers=(
            frozenset(name.lower() for name, _ in headers)
            if demands_key
            else frozenset({"authorization"})
        ),
    )


def _default_model(given: Given, endpoint: Endpoint) -> str | None:
    if not given.flag("mock"):
        return endpoint.default_model
    preset = PROVIDERS.get(given.text("provider") or "")
    return (preset.model if preset else None) or providers.DEFAULT_MODEL


def _without_keys(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in key_variables()}


def key_variables() -> frozenset[str]:
    declared = {preset.key_env for preset in PROVIDERS.values() if preset.key_env}
    return frozenset({providers.DEFAULT_KEY_ENV, *declared})


def _params(given: Given) -> tuple[dict[str, JSONValue], frozenset[str]]:
    """Request parameters of all layers, and the names that were typed: those replace a row's."""
    typed = dict(parse_param(text) for text in given.texts("param"))
    below: dict[str, JSONValue] = {**given.file_params, **_env_params(given.environ)}
    for name in ("temperature", "max_tokens"):
        value = given.values.get(name)
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
