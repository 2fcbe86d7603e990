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
    *("garbage", "nested", "truncated", "abort", "timeout"),
)
POISON = b"a text that kills servers"  # requests with it always lose their connection
FILTERED = b"a text that is filtered"  # answers to it are taken back
THOUGHTFUL = b"a text to think about"  # answers to it begin with thinking
THINKING = 50  # tokens that takes
SLOW = 3.0  # seconds a timeout takes; the client under test must give up earlier


class Faults(http.server.BaseHTTPRequestHandler):
    """Spoils the first requests, each as its entry of ``faults`` says, and passes on the others."""

    upstream: ClassVar[str] = ""
    faults: ClassVar[list[str | None]] = []
    answered: ClassVar[list[int]] = []  # max_tokens of the completions that were passed on
    lock = threading.Lock()

    def do_GET(self) -> None:
        self.forward(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = "reset" if POISON in body else self.next_fault()
        if FILTERED in body:
            self.answer(200, json.dumps(answer_of("", 0, "content_filter")).encode())
        elif THOUGHTFUL in body:
            self.answer(200, json.dumps(thoughtful(json.loads(body)["max_tokens"])).encode())
        elif fault == "reset":
            self.connection.close()
        elif fault == "timeout":
            time.sleep(SLOW)
            self.connection.close()
        elif fault == "garbage":
            self.answer(200, b"<html>not json")
        elif fault == "abort":
            self.answer(200, json.dumps(answer_of("half a sen", 3, "abort")).encode())
        elif fault == "uncounted":
            self.answer(200, json.dumps({**answer_of("not counted", 3), "usage": [2**40]}).encode())
        elif fault == "nested":
            self.answer(200, b"[" * 100_000)
        elif fault == "surrogate":
            self.answer(200, json.dumps(answer_of("half \ud83d", 3)).encode())
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
                status, content = response.status, response.read()
                if body and self.path.endswith("/completions"):
                    self.answered.append(json.loads(body)["max_tokens"])
                self.answer(status, content)
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


def answer_of(text: str, tokens: int, finish_reason: str = "stop") -> dict[str, object]:
    return {
        "choices": [{"message": {"content": text}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 1, "completion_tokens": tokens},
        "timings": None,
    }


def thoughtful(max_tokens: int) -> dict[str, object]:
    """What a reasoning model says within so many tokens."""
    if max_tokens <= THINKING:
        return answer_of("<think>Okay, the user wants", max_tokens, "length")
    return answer_of("<think>Okay.</think>\n\nThe rewritten text.", THINKING + 4)


@contextlib.contextmanager
def faulty(upstream: str, faults: Sequence[str | None], port: int = 0) -> Iterator[str]:
    """The proxy's URL; None in ``faults`` stands for a request that passes."""
    Faults.upstream, Faults.faults, Faults.answered = upstream, list(faults), []
    http.server.ThreadingHTTPServer.allow_reuse_address = True
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Faults) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
        proxy.shutdown()
