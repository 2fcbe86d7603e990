"""How servers are reached: base URLs, headers and keys, proxies, private certificates.

One rule for the synchronous client (looking at a server before a job) and the asynchronous one (the
job): proxies are those of the environment (``HTTP_PROXY``, ``HTTPS_PROXY``, ``NO_PROXY``), and
never stand between this machine and itself.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
import ssl
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp
import httpx

VERSIONED = re.compile(
    r"/v\d"
)  # in the path of a base URL: .../v1, .../api/paas/v4, /v1beta/openai
CONNECT_TIMEOUT = 10.0  # seconds
SECRET = re.compile(r"authorization|api[-_]?key|token|secret|cookie", re.IGNORECASE)


def root_of(url: str) -> str:
    """The server itself, where ``/health``, ``/metrics`` and ``/tokenize`` are."""
    return url.rstrip("/").removesuffix("/v1")


def api_of(url: str) -> str:
    """Below which ``/chat/completions`` is: the base URL as it stands, or with ``/v1``."""
    url = url.rstrip("/")
    return url if VERSIONED.search(urlsplit(url).path) else f"{url}/v1"


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for ``url``.

    Raises:
        ValueError: it is not an HTTP proxy.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    named = urllib.request.getproxies()
    proxy = named.get(parts.scheme) or named.get("all")
    if proxy and not proxy.startswith(("http://", "https://")):
        raise ValueError(
            f"the environment names the proxy {proxy} for {url}; only http:// and https:// proxies "
            f"are supported: unset it, or add {host} to NO_PROXY"
        )
    return proxy or None


def from_environment(setting: str, value: str) -> str:
    """What ``$NAME`` stands for; other values stand for themselves.

    Raises:
        ValueError: the variable is not set.
    """
    if not value.startswith("$"):
        return value
    name = value.removeprefix("$").strip("{}")
    if not os.environ.get(name):
        raise ValueError(f"{setting} is the environment variable {name}, which is not set")
    return os.environ[name]


def check_secrets(api_key: str | None, headers: Mapping[str, str]) -> None:
    """Raise ValueError for a secret that stands in the settings, from where it would be copied."""
    found = {"generator.api_key": api_key or "$"} | {
        f"generator.extra_headers.{name}": value
        for name, value in headers.items()
        if SECRET.search(name)
    }
    for setting, value in found.items():
        if not value.startswith("$"):
            raise ValueError(
                f"{setting} is a secret and must not stand in settings or commands: put it into an "
                f"environment variable and name that, {setting}='$NAME'"
            )


@dataclass(frozen=True)
class Connection:
    """What every request to the servers of a job carries.

    Args:
        headers: with their values, keys included; these are never shown.
        ca_file: certificates of the authority that signed the servers'; None: the system's.
    """

    headers: dict[str, str] = field(default_factory=dict, repr=False)
    ca_file: str | None = None

    @classmethod
    def of(
        cls, api_key: str | None, extra_headers: Mapping[str, str], ca_file: str | None
    ) -> Connection:
        """A connection with its secrets read from the environment.

        Raises:
            ValueError: a variable is not set, or ``ca_file`` holds no certificates.
        """
        headers = {
            name: from_environment(f"generator.extra_headers.{name}", value)
            for name, value in extra_headers.items()
        }
        if api_key:
            headers["Authorization"] = f"Bearer {from_environment('generator.api_key', api_key)}"
        connection = cls(headers, ca_file)
        if ca_file is not None:
            try:
                assert connection.tls
            except OSError as error:  # ssl.SSLError is one
                raise ValueError(f"generator.ca_file={ca_file}: {error}") from error
        return connection

    @functools.cached_property
    def tls(self) -> ssl.SSLContext:
        """Whom https servers are trusted by; a tenth of a second, so made only for them."""
        return ssl.create_default_context(cafile=self.ca_file)

    def get(self, url: str, timeout: float) -> httpx.Response:
        """One GET; timeout in seconds.

        Raises:
            httpx.HTTPError: no answer.
        """
        with httpx.Client(
            trust_env=False,
            proxy=proxy_for(url),
            verify=self.tls if url.startswith("https:") else False,
            headers=self.headers,
            timeout=timeout,
        ) as http:
            return http.get(url)

    def session(
        self, urls: Iterable[str], connections: int, timeout: float
    ) -> aiohttp.ClientSession:
        """An asynchronous client; it must be given ``proxy=proxy_for(url)`` with every request.

        Args:
            urls: of the servers it is for.
            connections: kept open at once.
            timeout: seconds until a request counts as lost.
        """
        # aiohttp, because thousands of connections are open: httpx's pool looks at all of them for
        # every request.
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=connections,
                ssl=self.tls if any(url.startswith("https:") for url in urls) else True,
            ),
            timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_TIMEOUT),
            headers=self.headers,
        )
