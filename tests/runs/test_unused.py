"""Answers outlive their rows: inputs shrink and come back, and nothing is asked for twice.

Every test runs whole commands against a real server and asks its ledger what was sent.
"""

from __future__ import annotations

import json
import os
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mock_servers import MockServerThread

from batchrun.chat.identity import HASH_VERSION
from batchrun.cli.main import run_command
from batchrun.journal.journal import Journal
from batchrun.journal.segments import FORMAT, Header
from batchrun.journal.state import StateDir
from batchrun.mock.replies import MockReply, MockRequest, completion, error_reply
from batchrun.outputs.read_back import read_back, recognise

if TYPE_CHECKING:
    from conftest import Ended, StartMock, Submit

UNUSED = "out.unused.parquet"


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("BATCHRUN_") or name.endswith(("_API_KEY", "_BASE_URL")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write_rows(numbers: list[int]) -> None:
    rows = ({"n": n, "prompt": f"Question {n}?"} for n in numbers)
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Job:
    """One command, run again and again while its input changes."""

    def __init__(self, server: MockServerThread, submit: Submit, *options: object) -> None:
        self.server = server
        self._submit = submit
        self._options = options

    def __call__(self, numbers: list[int], *more: object, code: int = 0) -> Ended:
        write_rows(numbers)
        to = ("--base-url", self.server.url, "-m", "m", "-c", 16, "--json")
        output = () if "-o" in self._options else ("-o", "out.parquet")
        ended = self._submit("in.jsonl", *to, *output, *self._options, *more)
        assert ended.code == code, ended.err
        return ended

    @property
    def asked(self) -> int:
        return self.server.ledger.requests


@pytest.fixture
def job(mock: StartMock, submit: Submit) -> Job:
    return Job(mock(), submit)


def responses(path: str = "out.parquet") -> dict[int, str]:
    table = pq.read_table(path)
    return dict(zip(table["n"].to_pylist(), table["response"].to_pylist(), strict=True))


def expected(numbers: list[int]) -> dict[int, str]:
    return {n: f"[synthetic] Question {n}?" for n in numbers}


def set_aside(path: str = UNUSED) -> list[str]:
    found: list[str] = sorted(pq.read_table(path)["response"].to_pylist())
    return found


FIFTY = list(range(50))


@pytest.mark.parametrize(
    "options",
    [(), ("--no-response-body",), ("--carry", "none")],
    ids=["whole", "without response_body", "nothing carried"],
)
def test_an_input_that_shrinks_and_comes_back_asks_for_nothing_again(
    options: tuple[object, ...], mock: StartMock, submit: Submit
) -> None:
    job = Job(mock(), submit, *options)
    job(FIFTY)
    before = pq.read_table("out.parquet")
    for numbers in (FIFTY[:5], [], FIFTY):
        job(numbers)
        assert not Path("out.parquet.batchrun").exists()
    assert job.asked == 50
    assert pq.read_table("out.parquet").equals(before)
    assert sorted(os.listdir()) == ["in.jsonl", "out.parquet"]


def test_the_same_of_an_output_in_lines(mock: StartMock, submit: Submit) -> None:
    job = Job(mock(), submit, "-o", "out.jsonl")
    job(FIFTY)
    for numbers in (FIFTY[:5], [], FIFTY):
        job(numbers)
    assert job.asked == 50
    told = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    texts = [line["response"]["body"]["choices"][0]["message"]["content"] for line in told]
    assert texts == list(expected(FIFTY).values())
    assert sorted(os.listdir()) == ["in.jsonl", "out.jsonl"]


def test_edited_rows_that_are_edited_back_are_not_asked_again(job: Job) -> None:
    job(FIFTY)
    job([*FIFTY[:-3], 100, 101, 102])
    assert job.asked == 53
    ended = job(FIFTY)
    assert job.asked == 53
    assert ended.summary["unused"]["taken_back"] == 3
    assert responses() == expected(FIFTY)
    assert set_aside() == [f"[synthetic] Question {n}?" for n in (100, 101, 102)]


def test_what_is_set_aside_is_said_with_its_number(job: Job) -> None:
    job(FIFTY)
    ended = job(FIFTY[:5])
    assert ended.summary["unused"] == {
        "answers": 45,
        "file": UNUSED,
        "moved": 45,
        "taken_back": 0,
        "dropped": 0,
    }
    assert (
        f"45 answers of rows gone from the input are kept in {UNUSED} for 30 days (--keep-unused)"
        in ended.summary["notes"]
    )
    assert ended.summary["backup"] is None
    # The unchanged rerun leaves everything as it is, and still knows.
    before = os.stat(UNUSED).st_mtime_ns, os.stat("out.parquet").st_mtime_ns
    assert job(FIFTY[:5]).summary["unused"]["answers"] == 45
    assert (os.stat(UNUSED).st_mtime_ns, os.stat("out.parquet").st_mtime_ns) == before
    assert job([]).summary["unused"] | {"file": ""} == {
        **dict.fromkeys(("taken_back", "dropped"), 0),
        "answers": 50,
        "moved": 5,
        "file": "",
    }


def test_status_says_what_is_set_aside(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job(FIFTY)
    job(FIFTY[:5])
    assert run_command(["status", "out.parquet", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["unused_answers"], told["unused_file"]) == (45, UNUSED)
    assert run_command(["status", "out.parquet"]) == 0
    said = "".join(capsys.readouterr())
    assert f"unused    45 answers of rows gone from the input in {UNUSED}" in said


def test_equal_rows_are_kept_each(mock: StartMock, submit: Submit) -> None:
    job = Job(mock(), submit)
    numbers = [1, 1, 1, 2]
    job(numbers)
    job([1, 2])
    job([2])
    job([1, 1, 2])
    job(numbers)
    assert job.asked == 4
    assert not Path(UNUSED).exists()


def test_what_a_stopped_run_took_back_goes_to_no_other_row(mock: StartMock, submit: Submit) -> None:
    """Of six equal rows two have answers set aside; the key is refused after the third request."""
    asked = 0

    def respond(request: MockRequest) -> MockReply | None:
        nonlocal asked
        asked += 1
        if asked in (4, 5):
            return error_reply(401, "no")
        return completion(request, content=f"answer {asked}")

    job = Job(mock(respond=respond), submit, "-c", 1)
    job([7, 7])
    job([])
    job([7] * 6, code=4)
    asked = 10
    job([7] * 6)
    answers = pq.read_table("out.parquet")["response"].to_pylist()
    assert sorted(answers) == [
        "answer 1",
        "answer 11",
        "answer 12",
        "answer 13",
        "answer 2",
        "answer 3",
    ]


def test_rejected_rows_that_come_back_are_not_asked_again(mock: StartMock, submit: Submit) -> None:
    def respond(request: MockRequest) -> MockReply | None:
        return error_reply(400, "no") if request.prompt == "Question 3?" else None

    job = Job(mock(respond=respond), submit)
    job([1, 2, 3], code=3)
    job([1], code=0)
    job([1, 2, 3], code=3)
    assert job.asked == 3


# How long


def test_zero_days_keep_nothing_and_say_so(job: Job) -> None:
    job(FIFTY)
    job(FIFTY[:10])
    ended = job(FIFTY[:5], "--keep-unused", 0)
    assert ended.summary["unused"]["dropped"] == 45
    assert any("45 answers" in note and "dropped" in note for note in ended.summary["notes"])
    assert not Path(UNUSED).exists()


def test_answers_go_when_their_rows_were_gone_for_long_enough(job: Job) -> None:
    job(FIFTY)
    job(FIFTY[:10])
    _gone_for(UNUSED, days=31)
    assert job(FIFTY[:5], "--keep-unused", "forever").summary["unused"]["answers"] == 45
    ended = job(FIFTY[:4])
    assert ended.summary["unused"] | {"file": UNUSED} == {
        "answers": 6,
        "file": UNUSED,
        "moved": 1,
        "taken_back": 0,
        "dropped": 40,
    }
    _gone_for(UNUSED, days=31)
    # Also where nothing else is to do.
    assert job(FIFTY[:4]).summary["unused"]["dropped"] == 6
    assert not Path(UNUSED).exists()


def _gone_for(path: str, days: float) -> None:
    """Write the file anew as if everything in it had been set aside so many days ago."""
    footer = recognise(Path(path))
    assert footer is not None
    table = pq.read_table(path)
    at = table.schema.get_field_index("unused_since")
    earlier = [value.value - int(days * 86_400_000) for value in table["unused_since"]]
    table = table.set_column(at, table.schema.field(at), pa.array(earlier, table.schema.types[at]))
    told: dict[str, Any] = json.loads(pq.read_metadata(path).metadata[b"batchrun"])
    told["aside"]["oldest_ms"] = min(earlier)
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"batchrun": json.dumps(told)})


@pytest.mark.parametrize("days", ["-1", "soon", "nan", "inf"])
def test_a_time_that_is_none_is_refused(days: str, job: Job) -> None:
    job(FIFTY, "--keep-unused", days, code=2)


# Whose files


@pytest.mark.parametrize("kind", ["table", "text", "link", "directory", "pipe", "published"])
def test_a_file_of_that_name_that_is_not_ours_stays(kind: str, job: Job) -> None:
    taken = Path(UNUSED)
    if kind == "table":
        pq.write_table(pa.table({"precious": [1]}), taken)
    elif kind == "text":
        taken.write_text("precious")
    elif kind == "link":
        pq.write_table(pa.table({"precious": [1]}), "precious.parquet")
        taken.symlink_to("precious.parquet")
    elif kind == "directory":
        taken.mkdir()
    elif kind == "pipe":
        os.mkfifo(taken)
    job(FIFTY)
    if kind == "published":
        os.link("out.parquet", taken)
    before = os.lstat(taken)
    ended = job(FIFTY[:5])
    assert os.path.samestat(os.lstat(taken), before)
    assert ended.summary["unused"]["file"] == "out.unused.2.parquet"
    assert any(UNUSED in note and "stays" in note for note in ended.summary["notes"])
    job([])
    job(FIFTY)
    assert job.asked == 50
    assert not Path("out.unused.2.parquet").exists()


def test_two_outputs_of_one_stem_do_not_replace_each_others(
    mock: StartMock, submit: Submit
) -> None:
    server = mock()
    table, lines = Job(server, submit), Job(server, submit, "-o", "out.jsonl")
    table([1, 2])
    lines([3, 4])
    table([1])
    lines([3])
    assert set_aside(UNUSED) == ["[synthetic] Question 2?"]
    assert set_aside("out.unused.2.parquet") == ["[synthetic] Question 4?"]
    table([1, 2])
    lines([3, 4])
    assert server.ledger.requests == 4


def test_real_and_synthetic_answers_do_not_mix(job: Job, submit: Submit) -> None:
    write_rows([1, 2])
    assert submit("in.jsonl", "--mock", "-m", "m", "-o", "out.parquet").code == 0
    write_rows([1])
    assert submit("in.jsonl", "--mock", "-m", "m", "-o", "out.parquet").code == 0
    assert len(set_aside()) == 1
    job([1, 2], "--overwrite")
    assert job.asked == 2
    job([1])
    assert len(set_aside("out.unused.2.parquet")) == 1


def test_it_is_not_taken_for_an_input(job: Job, submit: Submit) -> None:
    os.mkdir("data")
    job(FIFTY)
    job(FIFTY[:5])
    os.rename(UNUSED, f"data/{UNUSED}")
    os.rename("in.jsonl", "data/in.jsonl")
    for source in ("data", "data/*"):
        ended = submit(source, "--mock", "-o", f"other-{len(source)}.parquet", "--json")
        assert ended.code == 0
        assert ended.summary["rows"]["total"] == 5
        assert UNUSED in ended.err


# Answers made with other settings


def test_what_overwriting_kept_stays_when_a_row_is_edited(job: Job) -> None:
    job([1, 2], "--system", "v1")
    ended = job([1, 2], "--system", "v2", "--overwrite")
    assert ended.summary["backup"] == "out.parquet.bak"
    first = Path("out.parquet.bak").read_bytes()
    ended = job([1, 3], "--system", "v2")
    assert ended.summary["backup"] is None
    assert Path("out.parquet.bak").read_bytes() == first
    # And when settings change once more: every one is kept, and said.
    ended = job([1, 3], "--system", "v3", "--overwrite")
    assert ended.summary["backup"] == "out.parquet.bak.2"
    assert Path("out.parquet.bak").read_bytes() == first


def test_a_file_of_the_backups_name_stays(job: Job) -> None:
    Path("out.parquet.bak").write_text("precious")
    job([1, 2])
    ended = job([1, 2], "--system", "v2", "--overwrite")
    assert ended.summary["backup"] == "out.parquet.bak.2"
    assert "out.parquet.bak.2" in ended.err
    assert Path("out.parquet.bak").read_text() == "precious"


# A journal and a published file that each lack what the other has


@pytest.mark.parametrize("left", [0, 10], ids=["void", "shortened"])
@pytest.mark.parametrize("output", ["out.parquet", "out.jsonl"])
def test_a_shortened_journal_of_the_published_run_takes_the_rest_from_the_file(
    output: str, left: int, mock: StartMock, submit: Submit
) -> None:
    job = Job(mock(), submit, "-o", output)
    job(FIFTY)
    leave_journal(Path(output), answers=left)
    job([*FIFTY[:-1], 100])
    assert job.asked == 51
    assert not Path(f"{output}.batchrun").exists()


def test_a_journal_that_read_an_earlier_publication_reads_the_later_one(job: Job) -> None:
    job(FIFTY[:10])
    earlier = recognise(Path("out.parquet"))
    assert earlier is not None
    job(FIFTY)
    leave_journal(Path("out.parquet"), answers=10, imported=earlier.publication)
    job([*FIFTY, 100])
    assert job.asked == 51


def test_a_void_journal_lets_nobody_replace_an_output_made_with_other_settings(job: Job) -> None:
    job(FIFTY)
    leave_journal(Path("out.parquet"), answers=0)
    ended = job(FIFTY, "--system", "Briefly.", code=2)
    assert "50 answers would be asked for again" in ended.err
    assert job.asked == 50
    assert responses() == expected(FIFTY)


def leave_journal(output: Path, *, answers: int, imported: str | None = None) -> None:
    """Beside the output, as a run killed while it removed its state might: the first answers."""
    footer = recognise(output)
    assert footer is not None
    header = Header(FORMAT, HASH_VERSION, footer.run_id, 0, "0.1.0", footer.settings, False)
    state = output.with_name(f"{output.name}.batchrun")
    state.mkdir(0o700)
    with closing(Journal.open(StateDir(state), header)) as book:
        for outcome in islice(read_back(output), answers):
            book.settled(book.claim(outcome.hash), outcome)
        if imported is not None:
            book.note_imported(imported)
        book.sync()


def test_answers_of_an_unfinished_run_with_other_settings_are_kept_and_found_again(
    mock: StartMock, submit: Submit
) -> None:
    def respond(request: MockRequest) -> MockReply | None:
        return error_reply(401, "no") if request.n == 21 else None

    job = Job(mock(respond=respond), submit, "-c", 1)
    job(FIFTY, code=4)
    ended = job(FIFTY[:5], "--system", "Briefly.", "--overwrite")
    assert ended.summary["unused"]["answers"] == 20
    assert sorted(os.listdir()) == ["in.jsonl", "out.parquet", UNUSED]
    job(FIFTY, "--overwrite")
    assert job.asked == 21 + 5 + 30
