"""Where requests go: presets, base URLs, and which key belongs to which host."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, quote, urlsplit, urlunsplit

from batchrun.errors import NoKey, UsageError
from batchrun.secret import Secret, hidden_in_url

DEFAULT_BASE_URL = "https://api.Mistral.com"
DEFAULT_MODEL = "Mistral-chat"
DEFAULT_KEY_ENV = "BATCHRUN_API_KEY"
CHAT_PATH = "/chat/completions"


@dataclass(frozen=True, slots=True)
class Provider:
    """One preset. ``key_env`` goes to ``hosts`` only; a leading dot means any subdomain."""

    name: str
    base_url: str
    key_env: str | None
    hosts: tuple[str, ...]
    model: str | None = None
    base_url_env: str | None = None


PROVIDERS: Mapping[str, Provider] = {
    p.name: p
    for p in (
        Provider(
            "mistral",
            "https://api.mistral.ai/v1",
            "MISTRAL_API_KEY",
            ("api.mistral.ai", ".mistral.ai"),
            model="mistral-small-latest",
        ),
        Provider(
            "openai",
            "https://api.openai.com/v1",
            "OPENAI_API_KEY",
            ("api.openai.com", ".api.openai.com"),
            base_url_env="OPENAI_BASE_URL",
        ),
        Provider("deepseek", "https://api.deepseek.com", "DEEPSEEK_API_KEY", ("api.deepseek.com",)),
        Provider("groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY", ("api.groq.com",)),
        Provider(
            "together",
            "https://api.together.ai/v1",
            "TOGETHER_API_KEY",
            ("api.together.ai", "api.together.xyz"),
        ),
        Provider(
            "openrouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", ("openrouter.ai",)
        ),
        Provider(
            "fireworks",
            "https://api.fireworks.ai/inference/v1",
            "FIREWORKS_API_KEY",
            ("api.fireworks.ai",),
        ),
        Provider(
            "gemini",
            "https://generativelanguage.googleapis.com/v1beta/openai",
            "GEMINI_API_KEY",
            ("generativelanguage.googleapis.com",),
        ),
        Provider("ollama", "http://127.0.0.1:11434/v1", None, ()),
        Provider("vllm", "http://127.0.0.1:8000/v1", None, ()),
    )
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where this run sends, with which key."""

    url: str  # the full one, which ends in ``path``
    host: str  # host, with the port when the URL names one; as the user wrote it
    base_url: str  # for people: what --base-url amounts to
    key: Secret | None
    key_name: str | None  # "$MISTRAL_API_KEY" or "key file key.txt"
    default_model: str | None
    provider: str | None
    path: str = CHAT_PATH  # of the API, below the base URL

    @property
    def models_url(self) -> str:
        """Where the endpoint lists its models: beside the API, with the same query."""
        parts = urlsplit(self.url)
        path = parts.path.removesuffix(self.path) + "/models"
        return urlunsplit(parts._replace(path=path))


# Inside this process, with --mock; its URL is known when it listens.
MOCK = Endpoint("", "mock", "mock", None, None, DEFAULT_MODEL, None)


def resolve(
    *,
    provider: str | None,
    base_url: str | None,
    api_key_env: str | None,
    api_key_file: str | None,
    allow_http: bool,
    environ: Mapping[str, str],
    explicit_headers: frozenset[str] = frozenset(),
    path: str = CHAT_PATH,
) -> Endpoint:
    """Settle URL and key; UsageError or NoKey, which say what to choose instead.

    A provider's key variable goes to that provider's hosts and nowhere else, unless ``api_key_env``
    names it. ``explicit_headers`` are the lower-case names given with -H: an Authorization among
    them stands in for a key.
    """
    preset = _preset(provider)
    base = base_url or _preset_base(preset, environ) or DEFAULT_BASE_URL
    url = full_url(base, path)
    base = hidden_in_url(base)
    parts = urlsplit(url)
    hostname = (parts.hostname or "").lower()
    owner = preset if preset and _owns(preset, hostname, base_url is None) else _owner(hostname)
    is_default = hostname == urlsplit(DEFAULT_BASE_URL).netloc.lower()

    key, key_name = _key(
        owner, hostname, api_key_env=api_key_env, api_key_file=api_key_file, environ=environ
    )
    own_auth = bool(explicit_headers & {"authorization", "api-key", "x-api-key"})
    demanded = is_default or any(p is not None and p.key_env for p in (owner, preset))
    if key is None and not own_auth and demanded:
        raise _no_key(base, _netloc(url), owner, environ)
    in_the_clear = parts.scheme == "http" and not is_loopback(hostname)
    if (key is not None or own_auth) and in_the_clear and not allow_http:
        raise UsageError(
            f"{base} is plain http: the key would cross the network in the clear",
            next_steps=("use an https:// URL, or --allow-http to send it all the same",),
        )
    if is_default:
        model: str | None = DEFAULT_MODEL
    else:
        model = preset.model if preset else None
    name = preset.name if preset else None
    return Endpoint(url, _netloc(url), base, key, key_name, model, name, path)


def full_url(base_url: str, api_path: str) -> str:
    """The URL of an API for a bare host, a base with a path, or a full URL; a query stays last."""
    text = base_url.strip()
    if "://" not in text:
        raise UsageError(
            f"--base-url {text}: say http:// or https:// in front",
            next_steps=(f"--base-url {_likely_scheme(text)}://{text}",),
        )
    parts = _split(text)
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            "--base-url holds a user name or password; put a key in a variable and name it",
            next_steps=("--api-key-env NAME",),
        )
    path = parts.path.rstrip("/")
    if not path.endswith(api_path):
        path = (path or "/v1") + api_path
    return urlunsplit((parts.scheme, _sent_netloc(parts), _quoted(path), _quoted(parts.query), ""))


def _split(text: str) -> SplitResult:
    """The parts of a URL that can work; UsageError for any other."""
    shown = _without_userinfo(text)
    try:
        parts = urlsplit(text)
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        raise UsageError(f"--base-url {shown}: not an http or https URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not has_port:
        raise UsageError(f"--base-url {shown}: not an http or https URL")
    if not _is_host(parts.hostname):
        raise UsageError(f"--base-url {shown}: {parts.hostname!r} is no host name")
    return parts


def _is_host(hostname: str) -> bool:
    if ":" in hostname:
        return _is_ipv6(hostname)
    try:
        labels = _ascii_host(hostname).removesuffix(".").split(".")
    except UnicodeError:
        return False
    return all(0 < len(label) <= 63 and _HOST_LABEL.fullmatch(label) for label in labels)


# Underscores are no host name's, but containers have them.
_HOST_LABEL = re.compile(r"[A-Za-z0-9_-]+")


def _is_ipv6(hostname: str) -> bool:
    try:
        ipaddress.IPv6Address(hostname)
    except ValueError:
        return False
    return True


def _ascii_host(hostname: str) -> str:
    """A host name as resolvers and certificates know it; UnicodeError when it cannot be one."""
    return hostname if hostname.isascii() else hostname.encode("idna").decode("ascii")


def _sent_netloc(parts: SplitResult) -> str:
    if parts.netloc.isascii():
        return parts.netloc
    port = f":{parts.port}" if parts.port is not None else ""
    return _ascii_host(parts.hostname or "") + port


def _quoted(text: str) -> str:
    """``text`` with what no URL may hold percent-encoded, and what is encoded left as it is."""
    return quote(text, safe="%/:?#[]@!$&'()*+,;=~")


def _likely_scheme(text: str) -> str:
    try:
        host = urlsplit(f"//{text}").hostname or ""
    except ValueError:
        host = ""
    return "http" if is_loopback(host) else "https"


def provider_of(url: str) -> Provider | None:
    """The preset whose host ``url`` names, for quirks that depend on who answers."""
    return _owner((urlsplit(url).hostname or "").lower())


def _preset(name: str | None) -> Provider | None:
    if name is None:
        return None
    preset = PROVIDERS.get(name.lower())
    if preset is None:
        raise UsageError(f"no provider {name!r}; there are: {', '.join(PROVIDERS)}")
    return preset


def _preset_base(preset: Provider | None, environ: Mapping[str, str]) -> str | None:
    if preset is None:
        return None
    from_env = environ.get(preset.base_url_env, "") if preset.base_url_env else ""
    return from_env or preset.base_url


def _owns(preset: Provider, hostname: str, url_is_presets: bool) -> bool:
    # OPENAI_BASE_URL belongs to the same owner as OPENAI_API_KEY: the pair is the user's own word.
    return url_is_presets or _matches(preset, hostname)


def _owner(hostname: str) -> Provider | None:
    return next((p for p in PROVIDERS.values() if _matches(p, hostname)), None)


def _matches(preset: Provider, hostname: str) -> bool:
    return any(
        hostname.endswith(host) if host.startswith(".") else hostname == host
        for host in preset.hosts
    )


def _key(
    owner: Provider | None,
    hostname: str,
    *,
    api_key_env: str | None,
    api_key_file: str | None,
    environ: Mapping[str, str],
) -> tuple[Secret | None, str | None]:
    if api_key_file is not None:
        return _checked(_read_key(api_key_file), f"key file {api_key_file}")
    if api_key_env is not None:
        value = environ.get(api_key_env, "").strip()
        if not value:
            raise NoKey(f"--api-key-env {api_key_env}: that variable is not set or empty")
        return _checked(value, f"${api_key_env}")
    if owner is not None and owner.key_env and (value := environ.get(owner.key_env, "").strip()):
        return _checked(value, f"${owner.key_env}")
    if value := environ.get(DEFAULT_KEY_ENV, "").strip():
        return _checked(value, f"${DEFAULT_KEY_ENV}")
    return None, None


def _checked(value: str, name: str) -> tuple[Secret, str]:
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise UsageError(
            f"{name} holds characters that no key has (a line break, a space or non-ASCII)"
        )
    return Secret(value), name


def _read_key(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else "not a text file"
        raise UsageError(f"--api-key-file {path}: {why}") from exc
    if not text:
        raise UsageError(f"--api-key-file {path}: the file is empty")
    return text


def _no_key(base: str, host: str, owner: Provider | None, environ: Mapping[str, str]) -> NoKey:
    wanted = owner.key_env if owner and owner.key_env else DEFAULT_KEY_ENV
    elsewhere = [
        p for p in PROVIDERS.values() if p.key_env and p is not owner and environ.get(p.key_env)
    ]
    if elsewhere:
        other = elsewhere[0]
        named = "the default endpoint is " if base == DEFAULT_BASE_URL else "this endpoint is "
        model = f", {other.model}" if other.model else " -m MODEL"
        return NoKey(
            f"{other.key_env} is set, but it is a key for {urlsplit(other.base_url).hostname} and\n"
            f"  {named}{base}. Nothing was sent. Choose:",
            next_steps=(
                f"--provider {other.name:<23}{urlsplit(other.base_url).hostname}{model}",
                f"--api-key-env {other.key_env:<20}send it to {host} all the same",
            ),
        )
    if base == DEFAULT_BASE_URL:
        return NoKey(
            f"no key for {base}. Set {wanted}, or choose",
            next_steps=(
                "--provider mistral (MISTRAL_API_KEY), --provider openai, ...",
                "--mock              try it without a key or network (synthetic answers)",
                "batchrun help endpoints   shows the others, with their keys",
            ),
        )
    return NoKey(
        f"no key for {base}. Set {wanted}, or choose",
        next_steps=(
            "--api-key-env NAME  another variable that holds the key",
            "--mock              try it without a key or network (synthetic answers)",
        ),
    )


def is_loopback(hostname: str) -> bool:
    """Whether what goes to this host stays on this machine."""
    if hostname == "localhost" or hostname.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return False


def _netloc(url: str) -> str:
    return urlsplit(url).netloc


def _without_userinfo(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
