"""Settings from a TOML file and the environment, checked against what there is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import time as day_time
from typing import NamedTuple

import click

from batchrun import providers
from batchrun.cli.flags import ENV_PREFIX, Option, settable
from batchrun.cli.values import strict_json
from batchrun.config import JSONValue
from batchrun.errors import UsageError

FILE_PARAMS = "batchrun.file_params"


class ConfigFile(NamedTuple):
    """A ``--config`` file: values for Click by option name, and the ``param`` table."""

    values: Mapping[str, object]
    params: Mapping[str, JSONValue]


def _load(ctx: click.Context, _param: click.Parameter, path: str | None) -> str | None:
    group = ctx.parent.command if ctx.parent is not None else None
    if path is not None and isinstance(group, click.Group):
        file = read_config_file(path, group.commands, ctx.info_name or "")
        ctx.default_map = dict(file.values)
        ctx.meta[FILE_PARAMS] = file.params
    return path


CONFIG = Option(
    "--config",
    heading="Talk",
    typed_only=True,
    is_eager=True,
    callback=_load,
    expose_value=False,
    metavar="FILE.toml",
    help="Read options from this file; keys are option names.",
)


def read_config_file(path: str, commands: Mapping[str, click.Command], command: str) -> ConfigFile:
    """Top-level keys are options of any command; a table named as a command is for that one."""
    import tomllib

    try:
        with open(path, "rb") as file:
            tree = tomllib.load(file)
    except OSError as exc:
        raise UsageError(f"--config {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"--config {path}: not TOML: {exc}") from exc
    except RecursionError as exc:
        raise UsageError(f"--config {path}: nests too deep") from exc
    known = {name: settable(command) for name, command in commands.items()}
    shared = {key: value for key, value in tree.items() if key not in commands}
    own = tree.get(command, {})
    typed_only = _typed_only(commands)
    _check_keys(path, shared, _anywhere(commands), typed_only)
    for name in commands:
        if name in tree:
            if not isinstance(tree[name], dict):
                raise UsageError(f"--config {path}: [{name}] must be a table")
            _check_keys(f"{path} [{name}]", tree[name], known[name], typed_only)
    merged = {_key(key): value for key, value in {**shared, **own}.items()}
    params = merged.pop("param", {})
    values = {k: _for_click(k, v) for k, v in merged.items() if k in known.get(command, ())}
    return ConfigFile(values, _toml_params(path, params))


def _key(key: str) -> str:
    return key.replace("-", "_")


def _typed_only(commands: Mapping[str, click.Command]) -> set[str]:
    """What only the command line can say: options that nothing else may set, and click's own."""
    options = [option for command in commands.values() for option in command.params]
    return {option.name or "" for option in options}.union(("help", "version")) - _anywhere(
        commands
    )


def _anywhere(commands: Mapping[str, click.Command]) -> set[str]:
    return set().union(*map(settable, commands.values()))


def _check_keys(
    where: str, table: Mapping[str, object], known: set[str], typed_only: set[str]
) -> None:
    for key in table:
        if _key(key) in typed_only:
            raise UsageError(f"--config {where}: {key} can only be given on the command line")
        if _key(key) not in known:
            raise UsageError(f"--config {where}: unknown key {key}{_nearest(_key(key), known)}")


def _nearest(name: str, known: set[str]) -> str:
    import difflib

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
    known = {ENV_PREFIX + name.upper() for name in _anywhere(commands)}
    known.add(providers.DEFAULT_KEY_ENV)
    typed_only = _typed_only(commands)
    warnings = []
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name in known:
            continue
        if name.removeprefix(ENV_PREFIX).lower() in typed_only:
            warnings.append(f"{name} is ignored: only the command line can say that")
        else:
            warnings.append(f"{name} is unknown and ignored{_nearest(name, known)}")
    return warnings
