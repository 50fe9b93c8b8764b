"""Which proxy a URL is reached through, as curl reads HTTP(S)_PROXY, ALL_PROXY and NO_PROXY."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

from batchrun.errors import UsageError
from batchrun.providers import is_loopback


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for ``url``; UsageError for one that cannot work.

    Plain http to loopback goes directly, always: a key must not leave the machine in the clear.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    if parts.scheme == "http" and is_loopback(host):
        return None
    proxies = getproxies_environment()
    name = parts.scheme if proxies.get(parts.scheme) else "all"
    proxy = proxies.get(name)
    if not proxy or _goes_directly(host, parts.port, proxies.get("no", "")):
        return None
    return _usable(proxy if "://" in proxy else f"http://{proxy}", f"{name.upper()}_PROXY")


def _usable(proxy: str, variable: str) -> str:
    advice = (f"correct or unset {variable}, or list the endpoint in NO_PROXY",)
    try:
        parts = urlsplit(proxy)
        is_whole = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        raise UsageError(f"{variable} is not a proxy's URL", next_steps=advice) from None
    if parts.scheme.startswith("socks"):
        raise UsageError(
            f"{variable} names a {parts.scheme}:// proxy; only http:// and https:// proxies are"
            " supported",
            next_steps=advice,
        )
    if parts.scheme not in ("http", "https") or not is_whole or not proxy.isascii():
        raise UsageError(f"{variable} is not an http:// or https:// URL", next_steps=advice)
    if any(c.isspace() or not c.isprintable() for c in proxy):
        raise UsageError(f"{variable} is not a proxy's URL", next_steps=advice)
    return proxy


def _goes_directly(host: str, port: int | None, no_proxy: str) -> bool:
    """By NO_PROXY: names with their subdomains, addresses, networks; by commas or blanks."""
    entries = [entry for entry in re.split(r"[,\s]+", no_proxy.lower()) if entry]
    if entries == ["*"]:
        return True
    return any(_covers(entry, host, port) for entry in entries)


def _covers(entry: str, host: str, port: int | None) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name, _, only_port = entry.partition(":")
        name = name.strip(".")
        matches = host.rstrip(".") == name or host.rstrip(".").endswith(f".{name}")
        return bool(name) and matches and (not only_port or only_port == str(port))
    try:
        return address in ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        only_port = f":{port}"
        return port is not None and entry.removesuffix(only_port).strip("[]") == host
