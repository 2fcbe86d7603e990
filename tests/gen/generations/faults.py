"""A real HTTP proxy in front of a real server that spoils the answers it is told to spoil."""

import contextlib
import http.server
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import ClassVar

PASSING = (
    *("reset", "429", "500", "502", "503", "504"),
    *("garbage", "truncated", "abort", "uncounted", "timeout"),
)
POISON = b"a text that kills servers"  # requests with it always lose their connection
SLOW = 3.0  # seconds a timeout takes; the client under test must give up earlier


class Faults(http.server.BaseHTTPRequestHandler):
    """Spoils the first requests, each as its entry of ``faults`` says, and passes on the others."""

    upstream: ClassVar[str] = ""
    faults: ClassVar[list[str | None]] = []
    lock = threading.Lock()

    def do_GET(self) -> None:
        self.forward(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = "reset" if POISON in body else self.next_fault()
        if fault == "reset":
            self.connection.close()
        elif fault == "timeout":
            time.sleep(SLOW)
            self.connection.close()
        elif fault == "garbage":
            self.answer(200, b"<html>not json")
        elif fault == "abort":
            self.answer(200, json.dumps(aborted()).encode())
        elif fault == "uncounted":
            self.answer(200, json.dumps(finished("no prompt_tokens", {})).encode())
        elif fault == "surrogate":
            self.answer(200, json.dumps(finished("half \ud83d", {"prompt_tokens": 1})).encode())
        elif fault == "truncated":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.connection.close()
        elif fault:
            self.answer(int(fault), b"no")
        else:
            self.forward(body)

    def next_fault(self) -> str | None:
        with self.lock:
            return self.faults.pop(0) if self.faults else None

    def forward(self, body: bytes | None) -> None:
        request = urllib.request.Request(
            self.upstream + self.path, body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as response:
                self.answer(response.status, response.read())
        except urllib.error.HTTPError as error:
            self.answer(error.code, error.read())

    def answer(self, status: int, content: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def aborted() -> dict[str, object]:
    message = {"content": "half a sen"}
    return {
        "choices": [{"message": message, "finish_reason": "abort"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 3},
    }


def finished(text: str, usage: dict[str, int]) -> dict[str, object]:
    return {
        "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
        "usage": {"completion_tokens": 3, **usage},
        "timings": None,
    }


@contextlib.contextmanager
def faulty(upstream: str, faults: Sequence[str | None], port: int = 0) -> Iterator[str]:
    """The proxy's URL; None in ``faults`` stands for a request that passes."""
    Faults.upstream, Faults.faults = upstream, list(faults)
    http.server.ThreadingHTTPServer.allow_reuse_address = True
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Faults) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
        proxy.shutdown()
