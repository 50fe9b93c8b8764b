"""Which proxy a URL is reached through: curl's variables, read as curl reads them."""

from __future__ import annotations

import pytest

from batchrun.endpoint.proxies import proxy_for
from batchrun.errors import UsageError

PROXY = "http://proxy.example:3128"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def test_the_variable_of_the_scheme_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_for("https://api.example/v1") is None
    monkeypatch.setenv("ALL_PROXY", "http://all.example:1")
    monkeypatch.setenv("HTTP_PROXY", "proxy.example:3128")
    assert proxy_for("http://api.example/v1") == PROXY
    assert proxy_for("https://api.example/v1") == "http://all.example:1"


@pytest.mark.parametrize(
    ("no_proxy", "url", "is_direct"),
    [
        ("localhost,.internal", "https://node.internal/v1", True),
        (".internal", "https://internal/v1", True),
        ("internal", "https://node.internal/v1", True),
        ("internal", "https://not-internal/v1", False),
        ("a.example b.example", "https://b.example/v1", True),
        ("a.example,\tb.example , c.example", "https://c.example/v1", True),
        ("*", "https://any.example/v1", True),
        ("10.0.0.0/8", "https://10.1.2.3/v1", True),
        ("10.0.0.0/8", "https://11.1.2.3/v1", False),
        ("192.168.1.7/24", "https://192.168.1.9:8000/v1", True),
        ("10.1.2.3", "https://10.1.2.3:8000/v1", True),
        ("10.1.2.3:8000", "https://10.1.2.3:8000/v1", True),
        ("10.1.2.3:8001", "https://10.1.2.3:8000/v1", False),
        ("fd00::/8", "https://[fd00::1]/v1", True),
        ("[fd00::1]", "https://[fd00::1]/v1", True),
        ("API.example", "https://api.EXAMPLE/v1", True),
        ("api.example:443", "https://api.example:8443/v1", False),
        ("10.0.0.0/99 ,,", "https://10.1.2.3/v1", False),
        ("", "https://api.example/v1", False),
    ],
)
def test_no_proxy_is_read_as_curl_reads_it(
    monkeypatch: pytest.MonkeyPatch, no_proxy: str, url: str, is_direct: bool
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert proxy_for(url) == (None if is_direct else PROXY)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:1", "a.localhost"])
def test_plain_http_to_this_machine_never_leaves_it(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    assert proxy_for(f"http://{host}/v1") is None
    assert proxy_for(f"https://{host}/v1") == PROXY


@pytest.mark.parametrize(
    "proxy",
    ["http://", "http://proxy:port", "http://[::1", "ftp://proxy", "http://pro xy:1", "://"],
)
def test_a_proxy_that_cannot_be_one_is_said_without_its_password(
    monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy.replace("//", "//user:hidden@"))
    with pytest.raises(UsageError, match="HTTPS_PROXY is not") as caught:
        proxy_for("https://api.example/v1")
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["socks4", "socks5", "socks5h"])
def test_a_socks_proxy_is_said_not_to_be_supported(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://127.0.0.1:1080")
    with pytest.raises(UsageError, match=f"ALL_PROXY names a {scheme}:// proxy"):
        proxy_for("https://api.example/v1")
