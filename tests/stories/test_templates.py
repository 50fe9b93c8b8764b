"""Tables asked with templates, through the command line, and what the endpoint is sent."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import StartMock, Submit
from mock_servers import MockServerThread

import batchrun
from batchrun.mock.replies import MockReply, MockRequest, error_reply

SAMPLES = Path(__file__).parents[2] / "sample_inputs"
TICKETS = Path("tickets.csv")
PNG = b"\x89PNG\r\n\x1a\n and more \xff"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(SAMPLES / TICKETS, TICKETS)


class Endpoint:
    """Keeps the bodies it was sent."""

    def __init__(self, mock: StartMock) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.refuse_after = 1_000
        self.server: MockServerThread = mock(respond=self._keep)

    def _keep(self, request: MockRequest) -> MockReply | None:
        self.bodies.append(json.loads(request.body))
        return error_reply(401, "no") if len(self.bodies) > self.refuse_after else None

    @property
    def to(self) -> tuple[str, ...]:
        return ("--base-url", self.server.url, "-m", "m")

    def messages(self) -> list[Any]:
        bodies, self.bodies = self.bodies, []
        return [body["messages"] for body in bodies]


@pytest.fixture
def endpoint(mock: StartMock) -> Endpoint:
    return Endpoint(mock)


def test_a_table_is_asked_and_never_twice(endpoint: Endpoint, submit: Submit) -> None:
    command = (TICKETS, *endpoint.to, "-c", 1, "-o", "out.parquet")
    ended = submit(*command, "-p", "Classify: {{ subject }}", "-s", "Say it in {{ language }}.")
    assert ended.code == 0, ended.err
    first = endpoint.messages()
    assert len(first) == 12
    assert first[0] == [
        {"role": "system", "content": "Say it in en."},
        {"role": "user", "content": "Classify: Refund not received"},
    ]
    table = pq.read_table("out.parquet")
    assert table.column_names[:4] == ["id", "subject", "body", "language"]
    Path("ask.txt").write_text("Classify: {{ subject }}\n")
    Path("say.txt").write_text("Say it in {{ language }}.")
    again = submit(*command, "-p", "@ask.txt", "-s", "Say it in {{ language }}.")
    assert again.code == 0
    assert endpoint.messages() == []
    other = submit(*command, "-p", "Sort: {{ subject }}")
    assert other.code == 2
    assert "prompt" in other.err
    assert endpoint.messages() == []


def test_an_unknown_column_is_said_before_anything_is_sent(
    endpoint: Endpoint, submit: Submit
) -> None:
    for template in ("{{ subjct }}", "{{ row['subjct'] }}", "{{ subjct | default('x') }}"):
        ended = submit(TICKETS, *endpoint.to, "-o", "out.parquet", "-p", template)
        assert ended.code == 2
        assert 'no column "subjct"' in ended.err
        assert "id, subject, body, language" in ended.err
    assert endpoint.messages() == []
    assert list(Path().iterdir()) == [TICKETS]


def test_a_null_is_an_error_row_unless_the_template_allows_it(
    endpoint: Endpoint, submit: Submit
) -> None:
    pq.write_table(pa.table({"name": ["a", None, "c"], "n": [1, 2, None]}), "in.parquet")
    command = ("in.parquet", *endpoint.to, "-c", 1, "-o", "out.parquet")
    assert submit(*command, "-p", "{{ name }} {{ n }}").code == 3
    table = pq.read_table("out.parquet")
    assert table["error_code"].to_pylist() == [None, "null_column", "null_column"]
    assert endpoint.messages() == [[{"role": "user", "content": "a 1"}]]
    ended = submit(*command, "--overwrite", "-p", "{{ name | default('?') }} {{ n | d(0) }}")
    assert ended.code == 0
    assert [each[0]["content"] for each in endpoint.messages()] == ["a 1", "? 2", "c 0"]


def test_a_list_that_a_filter_makes_is_the_same_on_every_pass(
    endpoint: Endpoint, submit: Submit
) -> None:
    Path("in.jsonl").write_text('{"tags": ["a", "b", "a"]}\n{"tags": ["c"]}\n')
    command = ("in.jsonl", *endpoint.to, "-c", 1, "-o", "out.parquet", "-p", "{{ tags | unique }}")
    assert submit(*command).code == 0
    assert [each[0]["content"] for each in endpoint.messages()] == ['["a","b"]', '["c"]']
    assert submit(*command).code == 0
    assert endpoint.messages() == []


def test_a_column_named_as_a_function_is_read(endpoint: Endpoint, submit: Submit) -> None:
    pq.write_table(pa.table({"range": ["near", "far"]}), "in.parquet")
    command = ("in.parquet", *endpoint.to, "-c", 1, "-o", "out.parquet")
    assert submit(*command, "-p", "{{ range | upper }}").code == 0
    assert [each[0]["content"] for each in endpoint.messages()] == ["NEAR", "FAR"]


def test_turns_come_before_the_prompt(endpoint: Endpoint, submit: Submit) -> None:
    turns = [
        {"role": "user", "content": "Sort: my card was charged twice"},
        {"role": "assistant", "content": "billing ({{ language }})"},
    ]
    Path("turns.json").write_text(json.dumps(turns))
    asked = ("--messages", "@turns.json", "-p", "Sort: {{ subject }}", "-s", "One word.")
    assert submit(TICKETS, *endpoint.to, "-c", 1, "-o", "out.parquet", *asked).code == 0
    assert [message["content"] for message in endpoint.messages()[2]] == [
        "One word.",
        "Sort: my card was charged twice",
        "billing (fr)",
        "Sort: Le colis est arrivé vide",
    ]


def test_images_go_with_the_prompt(endpoint: Endpoint, submit: Submit) -> None:
    Path("data").mkdir()
    Path("data/cat.png").write_bytes(PNG)
    table = pa.table(
        {
            "prompt": ["what?", "what?", "what?"],
            "image": ["cat.png", "https://example.org/a.png", "gone.png"],
            "raw": pa.array([PNG, PNG, PNG], pa.binary()),
        }
    )
    pq.write_table(table, "data/in.parquet")
    for asked in ((), ("-p", "{{ prompt }}")):
        images = ("--image", "image", "--image", "raw")
        ended = submit("data/in.parquet", *endpoint.to, "-c", 1, "-o", "x.parquet", *images, *asked)
        assert ended.code == (2 if asked else 3)
    contents = [messages[0]["content"] for messages in endpoint.messages()]
    url = "data:image/png;base64,iVBORw0KGgogYW5kIG1vcmUg/w=="
    assert contents[0] == [
        {"type": "text", "text": "what?"},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    assert contents[1][1]["image_url"]["url"] == "https://example.org/a.png"
    assert len(contents) == 2
    assert pq.read_table("x.parquet")["error_code"].to_pylist() == [None, None, "no_image"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-p", "@gone.txt"), "gone.txt: No such file"),
        (("-p", "@."), "Is a directory"),
        (("-p", "@latin"), "not UTF-8 text"),
        (("-p", "{{ subject"), "line 1"),
        (("-p", "{{ subject }}", "--shape", "prompt"), "leave out --shape"),
        (("-p", "{{ subject }}", "--prompt-column", "body"), "leave out --prompt-column"),
        (("--messages", "@latin"), "not UTF-8 text"),
        (("--messages", "[]"), "a JSON list of messages"),
        (("--messages", "{"), "not JSON"),
        (("--messages", '["x"]'), "item 1 is no message"),
        (("--messages", '[{"role": "user", "content": "{{ gone }}"}]'), 'no column "gone"'),
        (("-p", "x", "--image", "gone"), "--image asks for"),
    ],
)
def test_a_mistake_is_one_line_and_sends_nothing(
    endpoint: Endpoint, submit: Submit, options: tuple[str, ...], words: str
) -> None:
    Path("latin").write_bytes("é".encode("latin-1"))
    ended = submit(TICKETS, *endpoint.to, "-o", "out.parquet", *options)
    assert ended.code == 2
    assert words in ended.err
    assert endpoint.messages() == []


def test_a_stopped_run_is_collected_without_the_template(
    endpoint: Endpoint, submit: Submit, capsys: pytest.CaptureFixture[str]
) -> None:
    from batchrun.cli.main import run_command

    turns = '[{"role": "user", "content": "{{ body }}"}]'
    asked = ("-p", "{{ subject }}", "--messages", turns)
    endpoint.refuse_after = 4
    assert submit(TICKETS, *endpoint.to, "-c", 1, "-o", "out.parquet", *asked).code == 4
    assert run_command(["collect", "out.parquet", "-o", "part.parquet"]) == 0
    capsys.readouterr()
    assert pq.read_table("part.parquet")["status"].to_pylist().count("ok") == 4


def test_python_programs_ask_with_templates(endpoint: Endpoint) -> None:
    summary = batchrun.submit(
        [{"a": 1, "b": None}, {"a": 2, "b": "x"}],
        "out.parquet",
        prompt="{{ a }}{{ b | default('-') }}",
        base_url=endpoint.server.url,
        model="m",
        concurrency=1,
    )
    assert summary.exit_code == 0
    assert [messages[0]["content"] for messages in endpoint.messages()] == ["1-", "2x"]


def test_a_template_comes_from_stdin_which_only_one_may_read(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"city": "Oslo"}\n')

    def validate(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "batchrun", "validate", *args, "--show", "1"],
            input="Where is {{ city }}?\n",
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    shown = validate("in.jsonl", "-p", "@-")
    assert shown.returncode == 0
    assert json.loads(shown.stdout)["messages"][-1]["content"] == "Where is Oslo?"
    clashes = (
        ("-", "-p", "@-"),
        ("in.jsonl", "-p", "@-", "--messages", "@-"),
        ("-", "--schema", "-"),
    )
    for clash in clashes:
        refused = validate(*clash)
        assert refused.returncode == 2
        assert "reads standard input too" in refused.stderr


def test_a_template_from_stdin_is_asked_by_each_step_of_an_estimate(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    command = ("estimate", TICKETS, "-p", "@-", "--sample", "2", "--base-url", endpoint.server.url)
    subprocess.run(
        [sys.executable, "-m", "batchrun", *command, "-m", "m"],
        input=b"Classify: {{ subject }}\n",
        cwd=tmp_path,
        check=True,
    )
    asked = [messages[-1]["content"] for messages in endpoint.messages()]
    assert len(asked) == 2
    assert all(text.startswith("Classify: ") for text in asked)
