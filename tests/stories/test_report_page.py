"""A page of a run: it says what came out, runs nothing that came from outside, and eats no file."""

from __future__ import annotations

import html.parser
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest

from batchrun.mock.knobs import Knobs
from batchrun.mock.replies import MockReply, MockRequest, error_reply

if TYPE_CHECKING:
    from conftest import StartMock, Submit

HOSTILE = "<script>document.title='HACKED'</script><img src=x onerror=\"document.title='HACKED'\">"
VOID = {"meta", "link", "br", "img", "input", "hr"}


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("BATCHRUN_") or name.endswith(("_API_KEY", "_BASE_URL")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write_rows(*rows: Mapping[str, object]) -> None:
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(html.parser.HTMLParser):
    """Checks that elements nest, and keeps what the tests ask for."""

    def __init__(self, path: str = "page.html") -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = Path(path).read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), tag
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += f" {data} "

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def test_a_page_says_what_came_out(mock: StartMock, submit: Submit) -> None:
    def respond(request: MockRequest) -> MockReply | None:
        if "fail" in request.prompt:
            return error_reply(400, "not today", code="odd_day")
        return None

    write_rows(*({"prompt": f"fail {n}" if n < 5 else f"Why {n}?", "n": n} for n in range(100)))
    server = mock(Knobs(), respond=respond)
    how = ("in.jsonl", "--base-url", server.url, "-m", "tiny", "-o", "out.parquet")
    ended = submit(*how, "--report", "page.html", "--price", "1,2", "--allow-failures", "5")
    assert ended.code == 0, ended.err
    assert "a page to look at is page.html" in ended.err
    page = Page()
    for said in (
        *("95 answered of 100 rows", "5 failed 5% of all", "tiny at 127.0.0.1"),
        *("rejected odd_day 5 (5%) in.jsonl:1", "not today", "row 1 ·", "fail 0"),
        *("Rows settled", "Requests in flight", "Seconds for an answer", "Longest answers"),
        *("The pace was set by", "finish_reason"),
    ):
        assert said in page.words, said
    assert re.search(r"\$0\.\d+ cost", page.words)
    sampled = page.words.split("A sample")[1]
    assert len(re.findall(r"row \d+ · \d+", sampled)) == 20


def test_nothing_from_outside_runs_or_breaks_the_page(mock: StartMock, submit: Submit) -> None:
    def respond(request: MockRequest) -> MockReply | None:
        if "refuse" in request.prompt:
            return error_reply(400, HOSTILE, code=HOSTILE)
        return None

    column = f"</h4>{HOSTILE}"
    write_rows(
        {"prompt": HOSTILE + " \x00\x07 \ud83d\ude00", column: HOSTILE, "custom_id": HOSTILE},
        {"prompt": "refuse", column: "]]></script>", "custom_id": "b"},
    )
    how = ("in.jsonl", "--base-url", mock(Knobs(), respond=respond).url, "-m", HOSTILE)
    assert submit(*how, "-o", "out.parquet", "--report", "page.html").code == 3
    page = Page()
    assert page.source.count("<script") == 1
    assert not any(tag == "img" for tag, _ in page.elements)
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert not any(name in ("src", "href") for _, attrs in page.elements for name in attrs)
    assert page.words.count(HOSTILE) >= 5
    assert not re.search("[\x00-\x08\x0b-\x1f]", page.source)
    (policy,) = (attrs["content"] for _, attrs in page.elements if "http-equiv" in attrs)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    if (title := title_in_chromium("page.html")) is not None:
        assert title == "out.parquet · batchrun"


def title_in_chromium(path: str) -> str | None:
    """The title after everything on the page has run, in a browser without a network."""
    browser = shutil.which("chromium")
    if browser is None:
        return None
    dumped = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={Path.cwd() / 'profile'}", "--proxy-server=127.0.0.1:9"),
            *("--dump-dom", Path(path).absolute().as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # What the page's own script does shows that scripts run at all.
    assert '<div id="filter"><label>' in dumped.stdout
    found = re.search(r"<title>([^<]*)</title>", dumped.stdout)
    assert found is not None
    return found[1]


def test_the_picture_of_each_number_is_said_in_words(submit: Submit) -> None:
    write_rows(*({"prompt": f"{n}"} for n in range(30)))
    assert submit("in.jsonl", "--mock", "-o", "out.parquet", "--report", "page.html").code == 0
    page = Page()
    pictures = [attrs for tag, attrs in page.elements if tag == "svg"]
    assert len(pictures) >= 4
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in pictures)
    assert ("html", {"lang": "en"}) in page.elements
    assert "These answers are synthetic" in page.words
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(later - level <= 1 for level, later in itertools.pairwise(levels))


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_texts_stand_out_in_both_themes(submit: Submit) -> None:
    write_rows({"prompt": "a"})
    assert submit("in.jsonl", "--mock", "-o", "out.parquet", "--report", "page.html").code == 0
    themes = re.findall(r":root \{([^}]*--ground[^}]*)\}", Page().source)
    assert len(themes) == 3  # light, dark, print
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for ground in ("ground", "sheet"):
            for ink, least in (("ink", 7), ("quiet", 4.5), ("good", 3), ("bad", 4.5)):
                pair = sorted([luminance(colours[ground]), luminance(colours[ink])])
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= least, (ground, ink, theme)


def test_typed_columns_are_drawn_by_their_kind(submit: Submit) -> None:
    schema = {
        "type": "object",
        "properties": {
            "topic": {"enum": ["bug", "praise"]},
            "urgent": {"type": "boolean"},
            "score": {"type": "number"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["topic", "urgent", "score", "tags"],
    }
    Path("s.json").write_text(json.dumps(schema))
    write_rows(*({"prompt": f"{n}"} for n in range(40)))
    how = ("--mock", "--schema", "s.json", "-o", "out.parquet", "--report", "page.html")
    assert submit("in.jsonl", *how).code == 0
    typed = Page().words.split("Typed answers")[1].split("Rows to read")[0]
    for said in ("topic string", "bug", "urgent bool", "true", "score double", "tags"):
        assert said in typed, said


def test_a_page_can_be_made_later_and_is_the_same(submit: Submit, cli: Submit) -> None:
    write_rows(*({"prompt": f"{n}"} for n in range(50)))
    assert submit("in.jsonl", "--mock", "-o", "out.parquet", "--report", "page.html").code == 0
    ended = cli("report", "out.parquet", "--json")
    assert ended.code == 0
    assert ended.summary["page"] == "out.html"
    assert Path("out.html").read_bytes() == Path("page.html").read_bytes()
    # A rerun that sends nothing makes it too.
    Path("page.html").unlink()
    assert submit("in.jsonl", "--mock", "-o", "out.parquet", "--report", "page.html").code == 0
    assert Path("out.html").read_bytes() == Path("page.html").read_bytes()


def test_a_table_without_rows_has_a_page(submit: Submit) -> None:
    Path("in.jsonl").write_text("")
    assert submit("in.jsonl", "--mock", "-o", "out.parquet", "--report", "page.html").code == 0
    assert "0 answered of 0 rows" in Page().words


def test_the_series_goes_on_through_stops_and_reruns(mock: StartMock, submit: Submit) -> None:
    write_rows(*({"prompt": f"{n}"} for n in range(60)))
    server = mock(Knobs(latency_s=0.01, key="k-1234567890"))
    how = ("in.jsonl", "--base-url", server.url, "-m", "m", "-o", "out.parquet", "-c", 2)
    assert submit(*how).code == 4
    os.environ["BATCHRUN_API_KEY"] = "k-1234567890"
    try:
        assert submit(*how, "--allow-http").code == 0
        write_rows(*({"prompt": f"{n}"} for n in range(80)))
        assert submit(*how, "--allow-http", "--report", "page.html").code == 0
    finally:
        del os.environ["BATCHRUN_API_KEY"]
    metadata = pq.read_metadata("out.parquet").metadata
    series = json.loads(metadata[b"batchrun.series"])
    assert sum(point[2] for point in series["points"]) == 80
    assert len(series["points"]) >= 2
    assert "k-1234567890" not in Path("page.html").read_text()
    assert not Path("out.parquet.batchrun").exists()


def test_a_file_of_somebody_else_is_never_replaced(submit: Submit, cli: Submit) -> None:
    write_rows({"prompt": "a"})
    Path("mine.html").write_text("<h1>mine</h1>")
    Path("link.html").symlink_to("elsewhere.html")
    for name in ("mine.html", "link.html"):
        ended = submit("in.jsonl", "--mock", "-o", "out.parquet", "--report", name)
        assert ended.code == 2
        assert "is no page of batchrun's" in ended.err
        assert not Path("out.parquet").exists()
    assert submit("in.jsonl", "--mock", "-o", "out.parquet").code == 0
    assert cli("report", "out.parquet", "-o", "mine.html").code == 2
    assert Path("mine.html").read_text() == "<h1>mine</h1>"
    assert not Path("elsewhere.html").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-o", "out.jsonl"), "wants a Parquet output"),
        (("-o", "-"), "wants a Parquet output"),
        (("-o", "out.parquet", "--shard", "1/2"), "of a whole table"),
        (("-o", "out.parquet", "--report", "none/page.html"), "there is no directory none"),
    ],
)
def test_where_no_page_can_be_made_nothing_is_sent(
    submit: Submit, options: tuple[str, ...], said: str
) -> None:
    write_rows({"prompt": "a"})
    more = () if "--report" in options else ("--report", "page.html")
    ended = submit("in.jsonl", "--mock", *options, *more)
    assert ended.code == 2
    assert said in " ".join(ended.err.split())
    assert not Path("out.parquet").exists()


def test_what_is_no_output_has_no_page(cli: Submit, submit: Submit) -> None:
    write_rows({"prompt": "a"})
    assert cli("report", "in.jsonl").code == 2
    assert cli("report", "nothing.parquet").code == 2
    assert submit("in.jsonl", "--mock", "-o", "out.jsonl").code == 0
    ended = cli("report", "out.jsonl")
    assert ended.code == 2
    assert "a page is made from a Parquet output" in ended.err


def test_a_page_that_cannot_be_written_takes_nothing_from_the_run(
    mock: StartMock, submit: Submit
) -> None:
    def respond(request: MockRequest) -> MockReply | None:
        Path("page.html").write_text("somebody else's, meanwhile")
        return None

    write_rows({"prompt": "a"})
    how = ("in.jsonl", "--base-url", mock(Knobs(), respond=respond).url, "-m", "m")
    ended = submit(*how, "-o", "out.parquet", "--report", "page.html")
    assert ended.code == 0
    assert "no page was made: --report page.html: exists and is no page" in ended.err
    assert Path("page.html").read_text() == "somebody else's, meanwhile"
    assert pq.read_table("out.parquet").num_rows == 1
