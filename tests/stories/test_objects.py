"""Inputs and outputs in object storage, on a server of S3's ways that nobody here wrote."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchrun
from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import MockRequest
from batchrun.runs.objects import Mirror

pytest.importorskip("moto.server")
boto3: Any = pytest.importorskip("boto3")

if TYPE_CHECKING:
    from conftest import StartMock, StartRun, Submit

WAIT_S = 60.0
BUCKET = "bucket"
SECRET = "canary-secret-5f2a"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as process:
        try:
            _until_it_listens(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def _until_it_listens(port: int) -> None:
    end = time.monotonic() + WAIT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.fixture
def s3(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of an empty bucket, and an environment in which batchrun finds it."""
    for name in list(os.environ):
        if name.upper().startswith(("BATCHRUN_", "AWS_")) or name.upper().endswith(
            ("_API_KEY", "_BASE_URL", "_PROXY")
        ):
            monkeypatch.delenv(name)
    environ = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    client = boto3.client("s3", endpoint_url=server)
    client.create_bucket(Bucket=BUCKET)
    for each in client.list_objects_v2(Bucket=BUCKET).get("Contents", ()):
        client.delete_object(Bucket=BUCKET, Key=each["Key"])
    return client


def put_rows(s3: Any, key: str, numbers: range) -> None:
    lines = [json.dumps({"n": n, "prompt": f"Question {n}?"}) for n in numbers]
    s3.put_object(Bucket=BUCKET, Key=key, Body="\n".join(lines).encode())


def body(s3: Any, key: str) -> bytes:
    found: bytes = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    return found


def keys(s3: Any) -> list[str]:
    return [each["Key"] for each in s3.list_objects_v2(Bucket=BUCKET).get("Contents", ())]


def table(s3: Any, key: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(body(s3, key)))


def to(url: str, *more: object) -> tuple[object, ...]:
    return ("s3://bucket/in.jsonl", "--base-url", url, "-m", "m", "-o", OUT, *more)


OUT = "s3://bucket/made/out.parquet"


def nothing_left() -> bool:
    return [p.name for p in Path().iterdir() if not p.name.startswith(".")] == []


def test_from_an_object_to_an_object_and_only_what_is_new_the_next_night(
    s3: Any, mock: StartMock, submit: Submit
) -> None:
    put_rows(s3, "in.jsonl", range(30))
    server = mock()
    ended = submit(*to(server.url), "--json")
    assert ended.code == 0, ended.err
    assert ended.summary["output"] == OUT
    assert ended.summary["inputs"] == ["s3://bucket/in.jsonl"]
    assert table(s3, "made/out.parquet")["n"].to_pylist() == list(range(30))
    assert SECRET not in ended.err + ended.out
    assert f"start s3://bucket/in.jsonl -> {OUT}, 30 rows" in ended.err
    assert nothing_left()
    # The object is the memory of the next run.
    put_rows(s3, "in.jsonl", range(40))
    assert submit(*to(server.url)).code == 0
    assert server.ledger.requests == 40
    assert table(s3, "made/out.parquet")["n"].to_pylist() == list(range(40))
    before = s3.head_object(Bucket=BUCKET, Key="made/out.parquet")["LastModified"]
    assert submit(*to(server.url)).code == 0
    assert server.ledger.requests == 40
    assert s3.head_object(Bucket=BUCKET, Key="made/out.parquet")["LastModified"] == before
    # Rows that are gone for a night keep their answers beside it.
    put_rows(s3, "in.jsonl", range(5))
    assert submit(*to(server.url)).code == 0
    assert "made/out.unused.parquet" in keys(s3)
    put_rows(s3, "in.jsonl", range(40))
    assert submit(*to(server.url)).code == 0
    assert server.ledger.requests == 40
    assert nothing_left()


@pytest.mark.parametrize(
    ("address", "numbers"),
    [
        ("s3://bucket/parts/*.jsonl", [0, 1, 2, 3]),
        ("s3://bucket/parts/a.jsonl", [0, 1]),
        ("s3://bucket/hive", [4, 5]),
        ("s3://bucket/one.csv", [7]),
        ("s3://bucket/one.parquet", [8, 9]),
    ],
)
def test_inputs_of_every_kind(s3: Any, submit: Submit, address: str, numbers: list[int]) -> None:
    put_rows(s3, "parts/a.jsonl", range(2))
    put_rows(s3, "parts/b.jsonl", range(2, 4))
    put_rows(s3, "parts/_hidden.jsonl", range(50, 60))
    put_rows(s3, "hive/day=1/x.jsonl", range(4, 5))
    put_rows(s3, "hive/day=2/x.jsonl", range(5, 6))
    s3.put_object(Bucket=BUCKET, Key="one.csv", Body=b"n,prompt\n7,Why?\n")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": [8, 9], "prompt": ["a", "b"]}), sink)
    s3.put_object(Bucket=BUCKET, Key="one.parquet", Body=sink.getvalue().to_pybytes())
    ended = submit(address, "--mock", "-o", "out.parquet")
    assert ended.code == 0, ended.err
    made = pq.read_table("out.parquet")
    assert [int(n) for n in made["n"].to_pylist()] == numbers
    if address.endswith("hive"):
        assert made["day"].to_pylist() == ["1", "2"]
    assert [p.name for p in Path().iterdir()] == ["out.parquet"]


def test_looks_at_an_object(s3: Any, cli: Submit, submit: Submit) -> None:
    put_rows(s3, "in.jsonl", range(10))
    assert submit("s3://bucket/in.jsonl", "--mock", "-o", OUT).code == 0
    status = cli("status", OUT)
    assert status.code == 0
    assert "10 answered" in status.err
    assert cli("collect", OUT, "-o", "here.jsonl").code == 0
    assert len(Path("here.jsonl").read_text().splitlines()) == 10
    assert cli("collect", OUT).code == 2
    assert cli("report", OUT).code == 0
    assert Path("out.html").exists()
    assert cli("validate", "s3://bucket/in.jsonl").code == 0
    assert "10 to send" not in cli("estimate", "s3://bucket/in.jsonl", "--mock", "-o", OUT).err
    assert batchrun.read(OUT).num_rows == 10


def test_a_killed_run_goes_on_and_pays_nothing_twice(
    s3: Any, mock: StartMock, running: StartRun, submit: Submit, cli: Submit
) -> None:
    put_rows(s3, "in.jsonl", range(200))
    server = mock(Knobs(latency_s=0.05))
    with running(*to(server.url, "-c", 8)) as run:
        end = time.monotonic() + WAIT_S
        while server.ledger.requests < 60:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert cli("status", OUT).code == 11
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert cli("status", OUT).code == 75
    assert submit(*to(server.url, "-c", 8)).code == 0
    assert server.ledger.requests <= 208
    assert table(s3, "made/out.parquet")["n"].to_pylist() == list(range(200))
    assert nothing_left()


def test_what_could_not_be_uploaded_is_uploaded_by_the_same_command(
    s3: Any, mock: StartMock, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_rows(s3, "in.jsonl", range(10))
    nowhere = "s3://no-such-bucket/out.parquet"
    s3.create_bucket(Bucket="no-such-bucket")

    def respond(request: MockRequest) -> None:
        if request.n == 1:
            s3.delete_bucket(Bucket="no-such-bucket")

    server = mock(respond=respond)
    how = to(server.url)[:-1]
    ended = submit(*how, nowhere, "--json")
    assert ended.code == 74
    assert ended.summary["next_steps"] == ["the same command uploads it"]
    assert ended.summary["published"] is False
    s3.create_bucket(Bucket="no-such-bucket")
    again = submit(*how, nowhere)
    assert again.code == 0, again.err
    assert server.ledger.requests == 10
    made = s3.get_object(Bucket="no-such-bucket", Key="out.parquet")["Body"].read()
    assert pq.read_table(pa.BufferReader(made)).num_rows == 10
    assert nothing_left()
    s3.delete_object(Bucket="no-such-bucket", Key="out.parquet")
    s3.delete_bucket(Bucket="no-such-bucket")


def test_an_object_of_somebody_else_is_never_replaced(
    s3: Any, mock: StartMock, submit: Submit
) -> None:
    put_rows(s3, "in.jsonl", range(3))
    s3.put_object(Bucket=BUCKET, Key="made/out.parquet", Body=b"something else")
    ended = submit(*to(mock().url))
    assert ended.code == 2
    assert body(s3, "made/out.parquet") == b"something else"
    s3.delete_object(Bucket=BUCKET, Key="made/out.parquet")

    def respond(_: object) -> None:
        s3.put_object(Bucket=BUCKET, Key="made/out.parquet", Body=b"meanwhile")

    server = mock(respond=respond)
    ended = submit(*to(server.url))
    assert ended.code == 74
    assert "somebody else wrote it meanwhile" in " ".join(ended.err.split())
    assert body(s3, "made/out.parquet") == b"meanwhile"
    s3.delete_object(Bucket=BUCKET, Key="made/out.parquet")


def test_overwriting_keeps_the_old_object_beside_it(
    s3: Any, mock: StartMock, submit: Submit
) -> None:
    put_rows(s3, "in.jsonl", range(3))
    server = mock()
    assert submit(*to(server.url)).code == 0
    old = body(s3, "made/out.parquet")
    how = ("s3://bucket/in.jsonl", "--base-url", server.url, "-m", "other", "-o", OUT)
    assert submit(*how).code == 2
    assert submit(*how, "--overwrite").code == 0
    kept = [key for key in keys(s3) if ".bak" in key]
    assert len(kept) == 1
    assert body(s3, kept[0]) == old


def test_a_bucket_that_is_not_there_is_said_before_anything_is_paid(
    s3: Any, mock: StartMock, submit: Submit
) -> None:
    put_rows(s3, "in.jsonl", range(3))
    server = mock()
    ended = submit(*to(server.url)[:-1], "s3://no-bucket/out.parquet")
    assert ended.code == 2
    assert "s3://no-bucket/out.parquet: there is no bucket 'no-bucket'" in " ".join(
        ended.err.split()
    )
    assert server.ledger.requests == 0
    assert nothing_left()


def test_keys_may_have_any_letters(s3: Any, submit: Submit, cli: Submit) -> None:
    key = "day=2026-11-27 10:00/ä #1%20.jsonl"
    put_rows(s3, key, range(3))
    out = "s3://bucket/o ü%2F#/out.parquet"
    for address in (
        f"s3://bucket/{key}",
        "s3://bucket/day=2026-11-27 10:00/",
        "S3://bucket/day=*/*",
    ):
        assert submit(address, "--mock", "-o", out).code == 0
    assert table(s3, "o ü%2F#/out.parquet")["n"].to_pylist() == [0, 1, 2]
    assert cli("status", out).code == 0
    assert batchrun.read(out).num_rows == 3


@pytest.mark.parametrize("command", ["status", "collect", "report"])
def test_what_is_not_there_is_named_by_its_address(s3: Any, cli: Submit, command: str) -> None:
    s3.put_object(Bucket=BUCKET, Key="foreign.parquet", Body=b"something else")
    more = {"collect": ("-o", "copy.csv"), "report": ("-o", "page.html")}.get(command, ())
    for name in ("nothing", "foreign"):
        ended = cli(command, f"s3://bucket/{name}.parquet", *more)
        assert ended.code == 2
        assert f"batchrun: s3://bucket/{name}.parquet: " in ended.err


@pytest.mark.parametrize(
    ("address", "code", "said"),
    [
        ("s3://bucket/nothing.jsonl", 2, "no such object"),
        ("s3://bucket/none/*.jsonl", 2, "no such object"),
        (f"s3://me:{SECRET}@bucket/in.jsonl", 2, "credentials do not belong in an address"),
    ],
)
def test_what_is_wrong_with_an_address_is_said_in_a_line(
    s3: Any, submit: Submit, address: str, code: int, said: str
) -> None:
    ended = submit(address, "--mock", "-o", "out.parquet")
    assert ended.code == code
    assert said in " ".join(ended.err.split())
    assert SECRET not in ended.err
    assert submit("s3://bucket/nothing.jsonl", "--mock").code == 2


@pytest.mark.parametrize(
    "command",
    [
        "submit ADDRESS --mock",
        "submit in.jsonl --mock -o ADDRESS",
        "submit in.jsonl --mock -o out.parquet --report ADDRESS",
        "submit in.jsonl --mock -o out.parquet --metrics-file ADDRESS",
        "submit in.jsonl --mock -o out.parquet --reuse ADDRESS",
        "estimate ADDRESS --mock",
        "validate ADDRESS --mock",
        "status ADDRESS",
        "collect ADDRESS -o copy.csv",
        "merge ADDRESS",
        "report ADDRESS",
    ],
)
def test_credentials_in_an_address_are_never_shown(s3: Any, cli: Submit, command: str) -> None:
    Path("in.jsonl").write_text('{"prompt": "a"}')
    words = command.replace("ADDRESS", f"s3://me:{SECRET}@bucket/x.parquet").split()
    ended = cli(*words)
    assert ended.code == 2
    assert "credentials do not belong" in " ".join(ended.err.split())
    assert SECRET not in ended.err + ended.out
    left = [path for path in Path().rglob("*") if path.is_file() and path.name != "in.jsonl"]
    assert not any(SECRET.encode() in path.read_bytes() for path in left)


def test_what_an_unfinished_run_lacks_is_said_by_its_address(
    s3: Any, mock: StartMock, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_rows(s3, "in.jsonl", range(3))
    monkeypatch.setenv("BATCHRUN_API_KEY", "canary-key")
    assert submit(*to(mock(Knobs(key="another")).url), "--allow-http").code == 4
    assert Mirror.of(OUT).directory.is_dir()
    with pytest.raises(batchrun.UsageError, match=f"^{OUT}: no output of batchrun there"):
        batchrun.read(OUT)


def test_a_directory_of_somebody_else_is_left_alone(
    s3: Any, mock: StartMock, submit: Submit
) -> None:
    put_rows(s3, "in.jsonl", range(3))
    own = Mirror.of(OUT).directory
    own.mkdir()
    (own / "mine.txt").write_text("mine")
    ended = submit(*to(mock().url))
    assert ended.code == 2
    assert "was not made by batchrun" in " ".join(ended.err.split())
    assert (own / "mine.txt").read_text() == "mine"


def test_a_bad_row_is_known_by_its_object(s3: Any, submit: Submit) -> None:
    s3.put_object(Bucket=BUCKET, Key="in.jsonl", Body=b'{"prompt": "a"}\n{"prompt": null}\n')
    assert submit("s3://bucket/in.jsonl", "--mock", "-o", OUT).code == 3
    errors = table(s3, "made/out.parquet")["error_message"].to_pylist()
    assert errors[1].startswith("s3://bucket/in.jsonl:2: ")


def test_parts_and_pages_are_local(s3: Any, submit: Submit, cli: Submit) -> None:
    put_rows(s3, "in.jsonl", range(3))
    assert submit("s3://bucket/in.jsonl", "--mock", "-o", OUT, "--shard", "1/2").code == 2
    assert "local files" in cli("merge", OUT).err
    ended = submit("s3://bucket/in.jsonl", "--mock", "-o", OUT, "--report", "s3://bucket/r.html")
    assert "s3://bucket/r.html: the page is a local file" in ended.err
