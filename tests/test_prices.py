"""List prices: by endpoint and model, from the list that is installed; unknown is null and said."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from batchrun.money import Price

if TYPE_CHECKING:
    from conftest import StartMock, Submit


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("BATCHRUN_") or name.endswith(("_API_KEY", "_BASE_URL")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"prompt": "a"}\n')


def test_a_known_model_has_its_price() -> None:
    pytest.importorskip("genai_prices")
    from batchrun.prices import listed

    price, said = listed("https://api.openai.com/v1/chat/completions", "gpt-4o-mini", binds=False)
    assert price == Price(0.15, 0.6, 0.075)
    assert said.startswith("price of gpt-4o-mini: $0.15 in, $0.60 out per million (genai-prices ")


def test_where_long_prompts_cost_more_a_budget_goes_by_that() -> None:
    pytest.importorskip("genai_prices")
    from batchrun.prices import listed

    url = "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions"
    usual, said = listed(url, "gemini-2.5-pro", binds=False)
    highest, _ = listed(url, "gemini-2.5-pro", binds=True)
    assert usual is not None
    assert highest is not None
    assert highest.input > usual.input
    assert "long prompts cost more" in said


def test_an_unknown_model_costs_nobody_knows_what(mock: StartMock, submit: Submit) -> None:
    pytest.importorskip("genai_prices")
    how = ("in.jsonl", "--base-url", mock().url, "-m", "my-own", "-o", "out.parquet")
    ended = submit(*how, "--price", "auto", "--json")
    assert ended.code == 0
    assert ended.summary["this_run"]["tokens"]["cost_usd"] is None
    assert any("has no price of my-own there" in note for note in ended.summary["notes"])
    again = submit(*how, "--overwrite", "--price", "auto", "--max-cost", 1)
    assert again.code == 2
    assert "no price is known" in again.err


def test_a_list_that_is_not_installed_is_said(
    submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    ended = submit("in.jsonl", "--mock", "-o", "out.parquet", "--price", "auto")
    assert ended.code == 2
    assert "--price auto needs the list of prices" in ended.err


def test_estimate_knows_the_list_too(cli: Submit) -> None:
    pytest.importorskip("genai_prices")
    how = ("in.jsonl", "--provider", "openai", "-m", "gpt-4o-mini", "--max-tokens", 100)
    ended = cli("estimate", *how, "--price", "auto")
    assert ended.code == 0
    assert "($0.15 in, $0.60 out per million)" in " ".join(ended.err.split())


def test_what_cached_tokens_save_is_told(submit: Submit) -> None:
    assert Price(1.0, 2.0, 0.1).saved_usd(2_000_000) == pytest.approx(1.8)
    assert Price(1.0, 2.0).saved_usd(5) is None
    assert Price(1.0, 2.0, 0.1).saved_usd(None) is None
    ended = submit("in.jsonl", "--mock", "-o", "out.parquet", "--price", "1,2,0.1", "--json")
    tokens = json.loads(ended.out)["output_totals"]["tokens"]
    cached = tokens["cached"]
    assert tokens["saved_usd"] == (None if cached is None else pytest.approx(cached * 0.9e-6))
