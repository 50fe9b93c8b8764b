"""Which URL, which key, and that a key goes to no host but its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from batchrun.errors import UsageError
from batchrun.providers import CHAT_PATH, PROVIDERS, Endpoint, full_url, provider_of, resolve
from batchrun.secret import Secret

KEY = "sk-canary-0123456789"


def resolved(environ: Mapping[str, str] | None = None, **given: Any) -> Endpoint:
    choices: dict[str, Any] = {
        "provider": None,
        "base_url": None,
        "api_key_env": None,
        "api_key_file": None,
        "allow_http": False,
    }
    return resolve(**{**choices, **given}, environ=environ or {})


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://h", "http://h/v1/chat/completions"),
        ("http://h/", "http://h/v1/chat/completions"),
        ("http://h:8000", "http://h:8000/v1/chat/completions"),
        ("https://h/v1", "https://h/v1/chat/completions"),
        ("https://h/v1/", "https://h/v1/chat/completions"),
        ("https://h/openai/v1", "https://h/openai/v1/chat/completions"),
        ("https://h/v1beta/openai//", "https://h/v1beta/openai/chat/completions"),
        ("https://h/v1/chat/completions", "https://h/v1/chat/completions"),
        ("https://h/v1/chat/completions/", "https://h/v1/chat/completions"),
        ("https://h/v1?api-version=3", "https://h/v1/chat/completions?api-version=3"),
        ("https://h?x=1", "https://h/v1/chat/completions?x=1"),
        ("https://api.Mistral.com", "https://api.Mistral.com/v1/chat/completions"),
        ("https://api.Mistral.com/v1", "https://api.Mistral.com/v1/chat/completions"),
        ("http://[::1]:8000", "http://[::1]:8000/v1/chat/completions"),
        (" https://h/v1#part ", "https://h/v1/chat/completions"),
        ("https://h/größe/v1", "https://h/gr%C3%B6%C3%9Fe/v1/chat/completions"),
        ("https://h/a b/v1?q=ä%20", "https://h/a%20b/v1/chat/completions?q=%C3%A4%20"),
        ("https://bücher.example:8443", "https://xn--bcher-kva.example:8443/v1/chat/completions"),
        ("http://my_model.svc.", "http://my_model.svc./v1/chat/completions"),
    ],
)
def test_every_way_of_writing_the_base_url(given: str, url: str) -> None:
    assert full_url(given, CHAT_PATH) == url


@pytest.mark.parametrize(
    "given",
    [
        *("h", "ftp://h/v1", "https://", "http://h:port", "http://h:0", "https://user:pw@h/v1"),
        *("http://[::1/v1", "[::1", "http://[::g]/v1", "http://[user:pw@h/v1", "http://h h/v1"),
        *("http://api..example.com", "http://.example", "http://" + "a" * 64, "http://ü..example"),
    ],
)
def test_a_base_url_that_cannot_work_is_said_without_its_password(given: str) -> None:
    with pytest.raises(UsageError) as caught:
        full_url(given, CHAT_PATH)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "scheme"), [("localhost:8000", "http"), ("127.0.0.1:1", "http"), ("h:443", "https")]
)
def test_a_missing_scheme_is_advised(host: str, scheme: str) -> None:
    with pytest.raises(UsageError) as caught:
        full_url(host, CHAT_PATH)
    assert caught.value.next_steps == (f"--base-url {scheme}://{host}",)


def test_the_default_endpoint_has_its_model_and_demands_a_key() -> None:
    endpoint = resolved({"BATCHRUN_API_KEY": KEY})
    assert endpoint.url == "https://api.Mistral.com/v1/chat/completions"
    assert endpoint.default_model == "Mistral-chat"
    assert endpoint.key == Secret(KEY)
    assert endpoint.key_name == "$BATCHRUN_API_KEY"
    with pytest.raises(UsageError, match=r"no key for https://api\.Mistral\.com"):
        resolved()


def test_a_foreign_key_is_named_and_not_sent() -> None:
    with pytest.raises(UsageError, match=r"it is a key for api\.mistral\.ai") as caught:
        resolved({"MISTRAL_API_KEY": KEY})
    advice = "\n".join(caught.value.next_steps)
    assert "--provider mistral" in advice
    assert "--api-key-env MISTRAL_API_KEY" in advice
    assert "api.Mistral.com" in advice


@pytest.mark.parametrize("name", [name for name, p in PROVIDERS.items() if p.key_env])
def test_a_preset_takes_its_own_key_and_keeps_it_at_home(name: str) -> None:
    preset = PROVIDERS[name]
    assert preset.key_env is not None
    environ = {preset.key_env: KEY}
    endpoint = resolved(environ, provider=name)
    assert endpoint.key == Secret(KEY)
    assert endpoint.default_model == preset.model
    assert provider_of(endpoint.url) is preset
    with pytest.raises(UsageError, match="Nothing was sent"):
        resolved(environ, provider=name, base_url="https://elsewhere.example/v1")
    assert resolved(environ, base_url="https://elsewhere.example/v1").key is None


def test_an_explicit_variable_may_send_a_key_elsewhere() -> None:
    endpoint = resolved(
        {"OPENAI_API_KEY": KEY}, base_url="https://gateway.example", api_key_env="OPENAI_API_KEY"
    )
    assert endpoint.key == Secret(KEY)
    assert endpoint.key_name == "$OPENAI_API_KEY"


def test_a_key_file_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "key.txt"
    file.write_text(f"  {KEY}\n")
    environ = {"BATCHRUN_API_KEY": "another-key", "MISTRAL_API_KEY": "a-third"}
    assert resolved(environ, provider="mistral", api_key_file=str(file)).key == Secret(KEY)
    with pytest.raises(UsageError, match="No such file"):
        resolved(api_key_file=str(tmp_path / "missing"))


def test_openai_base_url_is_its_owners_word() -> None:
    environ = {"OPENAI_BASE_URL": "https://proxy.example/openai/v1", "OPENAI_API_KEY": KEY}
    endpoint = resolved(environ, provider="openai")
    assert endpoint.url == "https://proxy.example/openai/v1/chat/completions"
    assert endpoint.key == Secret(KEY)


def test_a_key_crosses_no_network_in_the_clear() -> None:
    environ = {"BATCHRUN_API_KEY": KEY}
    with pytest.raises(UsageError, match="plain http"):
        resolved(environ, base_url="http://node:8000")
    assert resolved(environ, base_url="http://node:8000", allow_http=True).key == Secret(KEY)
    for loopback in ("http://127.0.0.1:8000", "http://localhost", "http://[::1]:1"):
        assert resolved(environ, base_url=loopback).key == Secret(KEY)
    assert resolved(base_url="http://node:8000").key is None


def test_a_key_with_a_line_break_is_refused_before_it_is_a_header() -> None:
    with pytest.raises(UsageError) as caught:
        resolved({"BATCHRUN_API_KEY": "one\ntwo-secret"})
    assert "two-secret" not in str(caught.value)


def test_an_unknown_provider_is_answered_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="mistral, openai"):
        resolved(provider="mistrall")


def test_a_secret_does_not_show() -> None:
    secret = Secret(KEY)
    assert KEY not in f"{secret} {secret!r} {[secret]}"
    assert secret.scrub(f"bad key {KEY}!") == "bad key [key]!"


def test_models_are_asked_for_beside_the_completions() -> None:
    endpoint = resolved(base_url="https://h/openai/v1?v=1")
    assert endpoint.models_url == "https://h/openai/v1/models?v=1"
