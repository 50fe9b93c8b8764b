"""Options, where they come from, what is refused, and which code that gives."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import click
import pytest

from batchrun.cli.commands import parse_fault
from batchrun.cli.config_file import read_config_file, unknown_variables
from batchrun.cli.flags import DEFAULTS, SETTINGS
from batchrun.cli.main import cli, run_command
from batchrun.cli.options import (
    Given,
    Layer,
    build_config,
    command_to_paste,
)
from batchrun.cli.values import (
    parse_carry,
    parse_deadline,
    parse_duration,
    parse_headers,
    parse_param,
)
from batchrun.config import RunConfig, default_output, output_format
from batchrun.errors import UsageError
from batchrun.providers import DEFAULT_BASE_URL, DEFAULT_MODEL, MOCK

COMMANDS = sorted(cli.commands)
KEY = "sk-0123456789-very-secret"
LOCAL = {"inputs": ("a.jsonl",), "base_url": "http://127.0.0.1:8000"}


def _batchrun(
    *args: str, cwd: Path | None = None, environ: Mapping[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not _is_ours(name)}
    return subprocess.run(
        [sys.executable, "-m", "batchrun", *args],
        capture_output=True,
        text=True,
        input=stdin,
        cwd=cwd,
        env={**clean, "PYTHONPATH": str(Path(__file__).parents[2]), **(environ or {})},
        check=False,
    )


def _is_ours(name: str) -> bool:
    return name.startswith("BATCHRUN_") or name.endswith(("_API_KEY", "_BASE_URL"))


def _config(
    values: Mapping[str, object], *, environ: Mapping[str, str] | None = None, **layers: Layer
) -> RunConfig:
    return build_config(Given(values=values, layers=layers, environ=environ or {}))


# Help


def test_help_of_every_command_imports_no_heavy_library() -> None:
    script = f"""
import sys
from batchrun.cli import run_command
for command in {[[], *[[name] for name in COMMANDS]]!r}:
    assert run_command([*command, "--help"]) == 0
heavy = {{"aiohttp", "pyarrow", "tenacity", "tqdm"}} | {{"asyncio", "msgspec", "tomllib"}}
heavy &= set(sys.modules)
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_default_is_shown_where_it_tells_something(name: str) -> None:
    command = cli.commands[name]
    context = click.Context(command, info_name=name)
    for param in command.params:
        if isinstance(param, click.Option):
            record = param.get_help_record(context)
            assert record is not None
            shown = record[1].partition("[default: ")[2]
            assert shown or param.get_default(context) in (None, False, ()), param.name
            assert not shown.startswith(("(", "off", "none]")) or param.name == "limit_headers"


def test_help_has_its_options_under_headings() -> None:
    command = cli.commands["submit"]
    lines = command.get_help(click.Context(command, info_name="submit")).splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "What is sent:",
        "Endpoint and key:",
        "Pace:",
        "Failures:",
        "Output:",
        "State:",
        "Talk:",
        "Options:",
    ]


def test_every_shared_default_is_that_of_the_run_config() -> None:
    defaults = {param.name: param.get_default(click.Context(cli)) for param in _submit_options()}
    parsed = _config(LOCAL)
    assert float(str(defaults["timeout"])) == parsed.timeout_s == DEFAULTS.timeout_s
    assert float(str(defaults["connect_timeout"])) == DEFAULTS.connect_timeout_s
    assert float(str(defaults["max_wait"])) == DEFAULTS.max_wait_s
    assert float(str(defaults["max_outage"])) == DEFAULTS.max_outage_s
    assert float(str(defaults["drain"])) == DEFAULTS.drain_s
    assert defaults["max_retries"] == DEFAULTS.max_retries
    assert defaults["abort_after"] == DEFAULTS.abort_after


def _submit_options() -> list[click.Option]:
    return [param for param in cli.commands["submit"].params if isinstance(param, click.Option)]


def test_every_option_of_submit_is_a_field_and_has_its_own_variable() -> None:
    settled = {"output", "param", "temperature", "max_tokens", "provider", "base_url", "allow_http"}
    settled |= {"api_key_env", "api_key_file", "header", "state"}  # together, by build_config
    talk = {"quiet", "verbose", "json", "log_file"}
    fields = {option.name for option in SETTINGS} | settled | talk
    flags_only = {
        "shard",
        "limit",
        "reuse",
        "sample",
        "seed",
        "output",
        "overwrite",
        "retry_failed",
        "config",
        "param",
    }
    for option in _submit_options():
        name = option.name or ""
        if option.expose_value:
            assert name in fields
        assert option.envvar == (None if name in flags_only else f"BATCHRUN_{name.upper()}")


# Where a choice comes from


def test_a_typed_model_replaces_the_rows_own_and_one_from_elsewhere_fills_in() -> None:
    options = {**LOCAL, "model": "m"}
    assert _config(options, model=Layer.COMMANDLINE).model_replaces
    assert not _config(options, model=Layer.ENVIRONMENT).model_replaces
    assert not _config(options, model=Layer.DEFAULT_MAP).model_replaces


def test_typed_params_replace_and_lower_layers_fill_in() -> None:
    given = Given(
        values={**LOCAL, "param": ("seed=1",), "temperature": 0.2},
        layers={"param": Layer.COMMANDLINE, "temperature": Layer.ENVIRONMENT},
        environ={"BATCHRUN_PARAM": '{"top_p": 0.5, "seed": 7}'},
        file_params={"top_p": 0.1, "stop": ["x"]},
    )
    config = build_config(given)
    assert config.params == {"top_p": 0.5, "stop": ["x"], "seed": 1, "temperature": 0.2}
    assert config.params_replacing == {"seed"}


def test_typed_temperature_and_max_tokens_replace() -> None:
    config = _config(
        {**LOCAL, "temperature": 0.0, "max_tokens": 5},
        temperature=Layer.COMMANDLINE,
        max_tokens=Layer.COMMANDLINE,
    )
    assert config.params == {"temperature": 0.0, "max_tokens": 5}
    assert config.params_replacing == {"temperature", "max_tokens"}


def test_an_option_and_a_param_that_contradict_are_refused() -> None:
    options = {**LOCAL, "temperature": 0.2, "param": ("temperature=0.3",)}
    with pytest.raises(UsageError, match="contradict"):
        _config(options, temperature=Layer.COMMANDLINE, param=Layer.COMMANDLINE)


@pytest.mark.parametrize("text", ["model=x", "messages=[]"])
def test_params_that_are_not_parameters_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a parameter"):
        _config({**LOCAL, "param": (text,)})


@pytest.mark.parametrize("text", ["[1]", "{", '{"x": NaN}', "x=1"])
def test_params_in_the_environment_are_one_json_object(text: str) -> None:
    with pytest.raises(UsageError, match="BATCHRUN_PARAM"):
        _config(LOCAL, environ={"BATCHRUN_PARAM": text})


def test_a_typed_url_sets_the_environments_provider_and_its_key_aside() -> None:
    options = {**LOCAL, "provider": "mistral", "base_url": "http://127.0.0.1:8000"}
    config = _config(
        options,
        environ={"MISTRAL_API_KEY": KEY},
        provider=Layer.ENVIRONMENT,
        base_url=Layer.COMMANDLINE,
    )
    assert (config.endpoint.host, config.endpoint.key, config.model) == (
        "127.0.0.1:8000",
        None,
        None,
    )


def test_a_typed_provider_sets_the_environments_url_and_key_variable_aside() -> None:
    options = {
        **LOCAL,
        "provider": "mistral",
        "base_url": "http://node:8000",
        "api_key_env": "OTHER",
    }
    config = _config(
        options,
        environ={"MISTRAL_API_KEY": KEY, "OTHER": "other-key"},
        provider=Layer.COMMANDLINE,
        base_url=Layer.ENVIRONMENT,
        api_key_env=Layer.ENVIRONMENT,
    )
    assert config.endpoint.host == "api.mistral.ai"
    assert config.endpoint.key_name == "$MISTRAL_API_KEY"
    assert config.model == "mistral-small-latest"


def test_without_any_choice_the_default_endpoint_and_model_are_used() -> None:
    config = _config({"inputs": ("a.jsonl",)}, environ={"BATCHRUN_API_KEY": KEY})
    assert (config.endpoint.base_url, config.model) == (DEFAULT_BASE_URL, DEFAULT_MODEL)


def test_mock_needs_no_endpoint_and_no_key() -> None:
    config = _config({"inputs": ("a.jsonl",), "mock": True})
    assert config.endpoint is MOCK
    assert (config.output, config.model) == ("a.mock.parquet", DEFAULT_MODEL)


def test_what_sends_nothing_needs_and_reads_no_key() -> None:
    values = {"inputs": ("a.jsonl", "b.jsonl"), "provider": "mistral"}
    given = Given(values=values, environ={"MISTRAL_API_KEY": KEY})
    config = build_config(given, sends=False)
    assert config.endpoint.key is None
    assert config.endpoint.url == "https://api.mistral.ai/v1/chat/completions"


# Outputs


@pytest.mark.parametrize(
    ("path", "output"),
    [
        ("prompts.jsonl", "prompts.results.parquet"),
        ("data/prompts.jsonl.gz", "data/prompts.results.parquet"),
        ("prompts.ndjson.zst", "prompts.results.parquet"),
        ("prompts.parquet", "prompts.results.parquet"),
        ("prompts.v2.jsonl", "prompts.v2.results.parquet"),
        ("prompts.txt", "prompts.txt.results.parquet"),
    ],
)
def test_the_output_stands_beside_its_input(path: str, output: str) -> None:
    assert default_output((path,), mock=False) == output
    assert default_output((path,), mock=True) == output.replace(".results.", ".mock.")


@pytest.mark.parametrize("inputs", [("a.jsonl", "b.jsonl"), ("-",), ("*.jsonl",), (".",)])
def test_what_can_be_several_inputs_needs_an_output(inputs: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="-o"):
        default_output(inputs, mock=False)


def test_the_suffix_of_the_output_decides_its_format() -> None:
    assert output_format("a.parquet") == "parquet"
    assert output_format("a.jsonl") == "jsonl"
    assert output_format("-") == "jsonl"
    for name in ("a.txt", "a", "a.jsonl.gz", "a.parquet/"):
        with pytest.raises(UsageError, match=r"\.parquet or \.jsonl"):
            output_format(name)


def test_an_output_that_is_the_input_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.touch()
    with pytest.raises(UsageError, match="that is the input"):
        _config({**LOCAL, "inputs": (str(path),), "output": str(tmp_path / "." / "a.parquet")})


def test_two_things_cannot_both_have_stdout() -> None:
    with pytest.raises(UsageError, match="stdout"):
        _config({**LOCAL, "output": "-", "json": True})


# Small languages


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=0.5", 0.5),
        ("a=true", True),
        ("a=null", None),
        ('a={"b": [1]}', {"b": [1]}),
        ("a=hello", "hello"),
        ("a=x=y", "x=y"),
        ("a=", ""),
        ("a=NaN", "NaN"),
        ("a=Infinity", "Infinity"),
        ("a=[NaN]", "[NaN]"),
        ("a=1e999", "1e999"),
        ("a=12345678901234567890123", 12345678901234567890123),
    ],
)
def test_a_param_is_json_if_it_parses_else_a_string(text: str, value: object) -> None:
    assert parse_param(text) == ("a", value)


@pytest.mark.parametrize("text", ["a", "=1"])
def test_a_param_needs_a_name_and_a_value(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=VALUE"):
        parse_param(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("0.5", 0.5),
        ("2h", 7_200),
        ("1h30m", 5_400),
        ("1d", 86_400),
        ("5 minutes", 300),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-5", "1h30", "nan", "inf"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError):
        parse_duration(text)


def test_a_deadline_is_a_duration_or_the_next_such_time() -> None:
    evening = datetime(2026, 11, 21, 22, 0)
    assert parse_deadline("2h", evening) == 7_200
    assert parse_deadline("06:00", evening) == 8 * 3_600
    assert parse_deadline("6:00", evening) == 8 * 3_600
    assert parse_deadline("23:30", evening) == 5_400
    assert parse_deadline("22:00", evening) == 24 * 3_600


@pytest.mark.parametrize("text", ["tomorrow", "25:00", "0", ""])
def test_what_is_no_deadline(text: str) -> None:
    with pytest.raises(UsageError, match="--deadline"):
        parse_deadline(text)


def test_columns_to_carry() -> None:
    assert parse_carry("all") is None
    assert parse_carry("none") == ()
    assert parse_carry("id, category") == ("id", "category")


def test_headers_come_from_options_and_files_and_never_show(tmp_path: Path) -> None:
    file = tmp_path / "headers"
    file.write_text(f"# mine\n\nX-Token: {KEY}\r\n")
    headers = parse_headers(["X-Team:  a: b ", f"@{file}"])
    assert [(name, value.reveal()) for name, value in headers] == [
        ("X-Team", "a: b"),
        ("X-Token", KEY),
    ]
    assert KEY not in repr(headers)


@pytest.mark.parametrize(
    "text",
    [KEY, f"Bad Name: {KEY}", f"X: a\r\nInjected: {KEY}", f"X: \u00e9{KEY}", f"Host: {KEY}"],
    ids=["no colon", "space in the name", "line break", "not ascii", "ours"],
)
def test_a_bad_header_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_headers([text])
    assert KEY not in str(caught.value)


def test_faults_of_the_mock_server() -> None:
    assert parse_fault("429-retry-after=0.05") == ("429-retry-after", 0.05)
    with pytest.raises(UsageError, match="KIND=SHARE"):
        parse_fault("429")


def test_the_command_to_paste_is_quoted_and_has_no_secrets() -> None:
    argv = ["submit", "my file.jsonl", "-H", f"X-Token: {KEY}", f"-HAuthorization: Bearer {KEY}"]
    argv += [f"--header=X-Other: {KEY}", "-H", "@file", "--base-url", f"https://h/v1?api-key={KEY}"]
    command = command_to_paste(argv)
    assert KEY not in command
    assert shlex.split(command) == [
        *("batchrun", "submit", "my file.jsonl", "-H", "X-Token: ***", "-HAuthorization: ***"),
        *("--header=X-Other: ***", "-H", "@file", "--base-url", "https://h/v1?api-key=***"),
    ]


# Config file and environment


def _file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "batchrun.toml"
    path.write_text(text)
    return str(path)


def test_a_config_file_sets_options_by_name(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        """
        provider = "mistral"
        max-retries = 9
        carry = ["id", "category"]
        header = ["X-Team: a, b"]
        deadline = 06:00:00
        mock = true
        [param]
        top_p = 0.9
        stop = ["x"]
        [submit]
        max_retries = 3
        [validate]
        model = "other"
        """,
    )
    file = read_config_file(path, cli.commands, "submit")
    assert file.values == {
        "provider": "mistral",
        "max_retries": "3",
        "carry": "id,category",
        "header": ["X-Team: a, b"],
        "deadline": "06:00",
        "mock": True,
    }
    assert file.params == {"top_p": 0.9, "stop": ["x"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_retrys = 1", "did you mean max_retries"),
        ("[submit]\nmax_retrys = 1", "did you mean max_retries"),
        ("limit = 5", "only be given on the command line"),
        ("retry-failed = true", "only be given on the command line"),
        ("overwrite = true", "only be given on the command line"),
        ("x = ", "not TOML"),
        ("submit = 1", "must be a table"),
        ("param = 1", "must be a table"),
        ("[param]\nx = nan", "JSON"),
        ("[param]\nx = 2026-11-21", "JSON"),
    ],
)
def test_a_config_file_that_cannot_work_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_config_file(_file(tmp_path, text), cli.commands, "submit")


def test_unknown_variables_are_named_with_the_nearest_known_one() -> None:
    environ = {
        "BATCHRUN_MAX_RETRY": "1",
        "BATCHRUN_LIMIT": "5",
        "BATCHRUN_API_KEY": KEY,
        "BATCHRUN_PROVIDER": "mistral",
        "BATCHRUN_PARAM": "{}",
        "HOME": "/",
    }
    assert unknown_variables(environ, cli.commands) == [
        "BATCHRUN_LIMIT is ignored: only the command line can say that",
        "BATCHRUN_MAX_RETRY is unknown and ignored; did you mean BATCHRUN_MAX_RETRIES?",
    ]


def test_layers_win_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command line over environment over config file, as Click is asked to read them."""
    path = _file(tmp_path, 'rpm = 1\ntpm = 1\nmax-wait = 1\nmodel = "file"')
    read: dict[str, object] = {}
    command = click.Command(
        "submit",
        params=cli.commands["submit"].params,
        callback=lambda **values: read.update(values),
    )
    group = click.Group("batchrun", commands={"submit": command})
    args = ["submit", "a.jsonl", "--config", path, "--rpm", "3"]
    for name, value in {"RPM": "2", "TPM": "2", "HEADER": "A: b c\nD: e"}.items():
        monkeypatch.setenv(f"BATCHRUN_{name}", value)
    group.main(args, standalone_mode=False)
    assert (read["rpm"], read["tpm"], read["max_wait"], read["max_retries"]) == (3.0, 2.0, 1.0, 5)
    assert read["model"] == "file"
    assert read["header"] == ("A: b c", "D: e")


# The boundary


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("prompts.jsonl", "-m", "x"), "did you mean: batchrun submit prompts.jsonl -m x"),
        (("sumbit", "a.jsonl"), "submit"),
        (("submit",), "INPUT"),
        (("submit", "a.jsonl", "--rmp", "5"), "--rpm"),
        (("submit", "a.jsonl", "b.jsonl"), "several inputs need -o"),
        (("submit", "a.jsonl", "-o", "a.txt", "--mock"), ".parquet or .jsonl"),
        (("submit", "a.jsonl", "--timeout", "soon"), "not a duration"),
        (("submit", "a.jsonl", "-c", "many"), "neither a number nor auto"),
        (("submit", "a.jsonl", "-c", "0", "--mock"), "--concurrency 0"),
        (("submit", "a.jsonl", "--allow-failures", "200%", "--mock"), "--allow-failures 200%"),
        (("submit", "a.jsonl", "--config", "missing.toml"), "missing.toml"),
        (("submit", "a.jsonl", "--log-file", "missing/x.log", "--mock"), "missing/x.log"),
        (("submit", "-", "-o", "a.parquet"), "no key for https://api.Mistral.com"),
        (("submit", "a.jsonl", "--provider", "mistrl"), "no provider 'mistrl'"),
        (("mock-server", "--fault", "nonsense=0.5"), "no fault 'nonsense'"),
        (("mock-server", "--require-key-env", "NOT_SET"), "NOT_SET"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_work_is_exit_2_and_one_clear_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in filter(_is_ours, list(os.environ)):
        monkeypatch.delenv(name)
    code = run_command(list(args))
    stdout, stderr = capsys.readouterr()
    assert code == 2, stderr
    assert stderr.startswith("batchrun: ")
    assert says in " ".join(stderr.split())
    assert "Traceback" not in stderr
    assert stdout == ""


def test_json_is_printed_also_when_nothing_began(tmp_path: Path) -> None:
    done = _batchrun("submit", "a.jsonl", "b.jsonl", "--json", cwd=tmp_path)
    summary = json.loads(done.stdout)
    assert (done.returncode, summary["exit_code"], summary["state"]) == (2, 2, "error")
    assert summary["inputs"] == ["a.jsonl", "b.jsonl"]
    assert "several inputs" in summary["reason"]


def test_an_error_before_the_run_reaches_the_log_file(tmp_path: Path) -> None:
    args = ("submit", "missing.jsonl", "--mock", "--log-file", "x.log")
    done = _batchrun(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert "error" in (tmp_path / "x.log").read_text()
    assert "missing.jsonl" in (tmp_path / "x.log").read_text()


def test_unknown_variables_are_warned_about_and_quiet_is_quiet(tmp_path: Path) -> None:
    environ = {"BATCHRUN_MODLE": "x"}
    loud = _batchrun("submit", "missing.jsonl", "--mock", cwd=tmp_path, environ=environ)
    quiet = _batchrun("submit", "missing.jsonl", "--mock", "-q", cwd=tmp_path, environ=environ)
    assert "BATCHRUN_MODLE is unknown and ignored; did you mean BATCHRUN_MODEL?" in loud.stderr
    assert "MODLE" not in quiet.stderr


def test_a_traceback_of_a_bug_shows_no_secret() -> None:
    script = """
import os
import sys
import batchrun.cli
from batchrun.cli.commands import without_secrets
from batchrun.cli.options import Given
cli = sys.modules["batchrun.cli.main"]
@cli.cli.command("broken")
def broken():
    values = {"header": (f"X-Token: {os.environ['TOKEN']}",), "api_key_env": "MINE"}
    given = Given(values=values, environ=os.environ)
    with without_secrets(given):
        raise ValueError([os.environ[name] for name in ("TOKEN", "MINE", "OPENAI_API_KEY")])
raise SystemExit(cli.run_command(["broken"]))
"""
    secrets = {"TOKEN": f"{KEY}-1", "MINE": f"{KEY}-2", "OPENAI_API_KEY": f"{KEY}-3"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **secrets},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "report" in done.stderr
    assert KEY not in done.stderr


def test_an_interrupt_in_an_import_waits_for_its_end() -> None:
    script = """
import os, signal, sys
from batchrun import process
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell of the tests ignores
try:
    with process.interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        print("imported")
    print("not reached")
except KeyboardInterrupt:
    print("interrupted", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert done.stdout.splitlines() == ["imported", "interrupted True"]


def test_an_interrupt_before_anything_is_imported_ends_in_words() -> None:
    script = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupt:
    def find_spec(self, name, *rest):
        if name == "batchrun.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from batchrun.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "batchrun: interrupted\n")


def test_a_run_leaves_numpy_and_pandas_alone(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "x", "id": 1}\n')
    script = """
import atexit, sys
from batchrun.cli import main
HEAVY = {"numpy", "pandas", "pyarrow.compute"}
atexit.register(lambda: print("loaded:", sorted(HEAVY & set(sys.modules))))
main(["submit", "in.jsonl", "--mock"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=True,
    )
    assert done.stdout == "loaded: []\n"


def test_others_in_the_process_of_a_run_still_have_numpy() -> None:
    pytest.importorskip("numpy")
    script = """
from batchrun import process
process.without_numpy_and_pandas()
import pyarrow, sys
assert "numpy" not in sys.modules
import numpy
"""
    subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=True, timeout=60
    )


def test_version_and_help_are_exit_0() -> None:
    assert _batchrun("--version").returncode == 0
    assert _batchrun("submit", "-h").returncode == 0


def test_no_command_shows_the_help_and_is_exit_2() -> None:
    done = _batchrun()
    assert done.returncode == 2
    assert "Usage: batchrun" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the platform has no /dev/full")
def test_a_stderr_that_takes_nothing_changes_no_exit_code() -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "batchrun", "submit", "missing.jsonl", "--mock"],
            stderr=full,
            cwd=Path(__file__).parents[2],
            check=False,
        )
    assert ended.returncode == 2


def test_where_no_thread_can_be_started_all_is_said(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    script = """
import sys, threading
from batchrun.cli import main
def none_left(thread):
    raise RuntimeError("can't start new thread")
threading.Thread.start = none_left
main(["submit", "in.jsonl", "--mock"])
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert ended.returncode == 74
    assert "batchrun: not enough memory" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_input_mistake_is_said_before_a_missing_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("id,text\n1,x\n")
    (tmp_path / "b.jsonl").write_text('{"q": "x"}\n')
    (tmp_path / "c.jsonl").write_text('{"prompt": "x"}\n')
    said = {
        "gone.jsonl": "gone.jsonl: no such file",
        "a.jsonl": "CSV (2 columns",
        "b.jsonl": "--prompt-column q",
        "c.jsonl": "no key for",
    }
    for name, words in said.items():
        ended = _batchrun("submit", name, cwd=tmp_path)
        assert ended.returncode == 2
        assert words in ended.stderr
        assert ("no key" in ended.stderr) == (name == "c.jsonl")


@pytest.mark.parametrize("name", ["UP.JSONL", "up.Ndjson.GZ", "Up.PARQUET"])
def test_a_suffix_in_capitals_is_a_suffix(name: str) -> None:
    stem = name[:2]
    assert default_output((name,), mock=False) == f"{stem}.results.parquet"
    assert default_output((name,), mock=True) == f"{stem}.mock.parquet"
