"""How servers are reached: base URLs, proxies, secrets, a private certificate, pauses."""

import asyncio
import datetime
import email.utils
import http.server
import json
import os
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from gen.client.chat import ChatClient, pause_told
from gen.client.connection import Connection, api_of, proxy_for, root_of
from gen.client.routing import Routing
from gen.serving.servers import GeneratorConfig, serving


class Echo(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server that says what it was asked; it has no /tokenize and no usage."""

    seen: ClassVar[list[tuple[str, dict[str, str], Any]]] = []
    pauses: ClassVar[list[str]] = []  # Retry-After of the next answers

    def do_GET(self) -> None:
        self.seen.append((self.path, dict(self.headers), None))
        self.answer(200, {"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, dict(self.headers), body))
        if self.path.endswith("/tokenize"):
            self.answer(404, {})
        elif self.pauses:
            self.answer(429, {"error": "slow down"}, self.pauses.pop(0))
        else:
            choice = {"message": {"content": "A text."}, "finish_reason": "eos"}
            self.answer(200, {"choices": [choice]})

    def answer(self, status: int, content: Any, pause: str | None = None) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(encoded)))
        if pause is not None:
            self.send_header("Retry-After", pause)
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def echo(certificate: Path | None = None) -> Iterator[int]:
    """The port of a server; over TLS where it has a certificate."""
    Echo.seen, Echo.pauses = [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def ask(url: str, connection: Connection | None = None, **extra_body: Any) -> Any:
    async def run() -> Any:
        routing = Routing([url], 5.0)
        async with ChatClient(routing, "m", 1, 5.0, 2, connection, extra_body) as client:
            length = await client.count_tokens("d0", "twelve bytes")
            answer = await client.chat(
                "d0",
                [{"role": "user", "content": "Say it."}],
                max_tokens=5,
                temperature=1.0,
                top_p=1.0,
                seed=1,
            )
            return length, answer

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("url", "root", "api"),
    [
        ("http://a:1", "http://a:1", "http://a:1/v1"),
        ("http://a:1/", "http://a:1", "http://a:1/v1"),
        ("http://a:1/v1", "http://a:1", "http://a:1/v1"),
        ("https://a/api/v1/", "https://a/api", "https://a/api/v1"),
        ("https://a/api", "https://a/api", "https://a/api/v1"),
        ("https://a/api/paas/v4", "https://a/api/paas/v4", "https://a/api/paas/v4"),
        ("https://a/v1beta/openai/", "https://a/v1beta/openai", "https://a/v1beta/openai"),
    ],
)
def test_base_urls(url: str, root: str, api: str) -> None:
    assert (root_of(url), api_of(url)) == (root, api)


def test_a_server_without_tokenize_and_usage_is_asked_all_the_same(tmp_path: Path) -> None:
    with echo() as port:
        url = f"http://127.0.0.1:{port}/v1"
        length, answer = ask(url, Connection({"x-team": "a"}), top_k=20, min_p=0.1)
        assert length == 4  # three bytes a token
        assert (answer.text, answer.finish_reason, answer.completion_tokens) == (
            "A text.",
            "stop",
            None,
        )
        path, headers, body = Echo.seen[-1]
        assert path == "/v1/chat/completions"
        assert headers["x-team"] == "a"
        assert (body["top_k"], body["min_p"], body["max_tokens"]) == (20, 0.1, 5)
        config = GeneratorConfig("openai", model="other", urls=[url])
        with pytest.raises(ValueError, match="other is not served"), serving(config, tmp_path):
            pass


def test_loopback_never_goes_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "intranet")
    assert proxy_for("http://far.example:30000") == "http://127.0.0.1:9"
    for host in ("localhost", "127.0.0.1", "127.8.8.8", "[::1]", "intranet"):
        assert proxy_for(f"http://{host}:30000") is None
    with echo() as port:
        assert Connection().get(f"http://127.0.0.1:{port}/v1/models", 5.0).status_code == 200
        assert ask(f"http://127.0.0.1:{port}")[1].text == "A text."


def test_both_clients_go_through_the_environments_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with echo() as port:  # a proxy is asked for whole URLs
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert Connection().get("http://far.example/v1/models", 5.0).status_code == 200
        assert ask("http://far.example")[1].text == "A text."
        assert {path for path, *_ in Echo.seen} == {
            "http://far.example/v1/models",
            "http://far.example/tokenize",
            "http://far.example/v1/chat/completions",
        }
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"socks5.*add far\.example to NO_PROXY"):
        proxy_for("http://far.example")


def test_secrets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    connection = Connection.of("$MY_KEY", {"x-api-key": "${MY_KEY}", "x-team": "a"}, None)
    assert connection.headers == {
        "Authorization": "Bearer s3cret",
        "x-api-key": "s3cret",
        "x-team": "a",
    }
    assert "s3cret" not in repr(connection)
    with pytest.raises(ValueError, match="environment variable NOT_THERE, which is not set"):
        Connection.of("$NOT_THERE", {}, None)
    for config in (
        GeneratorConfig(api_key="s3cret"),
        GeneratorConfig(extra_headers={"X-Api-Key": "s3cret"}),
    ):
        with pytest.raises(ValueError, match="is a secret and must not stand in settings") as told:
            config.check()
        assert "s3cret" not in str(told.value)
    with pytest.raises(ValueError, match=r"extra_body\.max_tokens is sent already"):
        GeneratorConfig(extra_body={"max_tokens": 3}).check()


def test_a_private_certificate(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "RANDFILE": str(tmp_path / "random")},
    )
    both = tmp_path / "both.pem"
    both.write_text(key.read_text() + certificate.read_text())
    with echo(both) as port:
        url = f"https://localhost:{port}"
        trusting = Connection.of(None, {}, str(certificate))
        assert trusting.get(f"{url}/v1/models", 5.0).status_code == 200
        assert ask(url, trusting)[1].text == "A text."
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            Connection().get(f"{url}/v1/models", 5.0)
    with pytest.raises(ValueError, match=r"generator\.ca_file="):
        Connection.of(None, {}, str(tmp_path / "absent.pem"))


def test_retry_after_is_heeded_and_costs_no_attempt() -> None:
    with echo() as port:
        Echo.pauses = ["0", "1", "0"]  # more than there are attempts
        assert ask(f"http://127.0.0.1:{port}")[1].text == "A text."
        assert len(Echo.seen) == 5


def test_what_retry_after_may_say() -> None:
    assert pause_told({}) is None
    assert pause_told({"Retry-After": "7"}) == 7.0
    assert pause_told({"Retry-After": "soon"}) is None
    assert pause_told({"Retry-After": "1e9"}) == 600.0
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
    told = pause_told({"Retry-After": email.utils.format_datetime(later, usegmt=True)})
    assert told == pytest.approx(90.0, abs=5.0)
