"""One asynchronous client of OpenAI-compatible chat servers (SGLang, llama.cpp, vLLM, ...)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from gen.client.routing import Routing

RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 504}
UNAVAILABLE = 503  # still loading, or its queue is full: not this request's fault
CONNECT_TIMEOUT = 10.0  # seconds
SUSPECT = 3  # lost connections after which a request may be given up, at the earliest
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds


class GenerationFailed(ConnectionError):
    """A request that stayed without a usable answer."""


class ConnectionsLost(GenerationFailed):
    """A request during which the server went away again and again: it may be what kills it."""


class PromptTooLong(GenerationFailed):
    """The server says that prompt and answer do not fit its context."""


@dataclass(frozen=True)
class Completion:
    """A server's answer."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class ChatClient:
    """Keeps connections open, retries what may pass, sends a document always to one server.

    A server that refuses connections or is unavailable costs a request no attempt: it goes to
    another server, or waits until one is back. One that leaves a request without an answer for
    ``timeout`` seconds is left alone for a while, unless it answers another.

    Args:
        routing: the servers and what is known of them.
        model: the model's name as the servers know it.
        concurrency: requests in flight.
        timeout: seconds until a request counts as lost.
        attempts: tries before a request is given up.
        api_key: sent as a bearer token.
    """

    def __init__(
        self,
        routing: Routing,
        model: str,
        concurrency: int,
        timeout: float,
        attempts: int,
        api_key: str | None = None,
    ) -> None:
        self.routing = routing
        self.model = model
        self.attempts = attempts
        self.retries = 0
        self.suspects = asyncio.Lock()  # requests that may kill a server go one at a time
        self.concurrency = concurrency
        self.timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_TIMEOUT)
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def __aenter__(self) -> ChatClient:
        # aiohttp, because thousands of connections are open: httpx's pool looks at all of them for
        # every request.
        self.http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self.concurrency + 4),
            timeout=self.timeout,
            headers=self.headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.close()

    async def chat(
        self,
        document_id: str,
        messages: list[dict[str, str]],
        *,
        template: bool = True,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> Completion:
        """One completion of a chat or, without a chat template, of its text.

        Raises:
            PromptTooLong: the prompt does not fit; trying again would not help.
            GenerationFailed: every attempt failed; says how.
            ServersLost: no server is left.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "stream": False,
        }
        if template:
            path, body["messages"] = "/v1/chat/completions", messages
        else:
            path, body["prompt"] = "/v1/completions", "".join(part["content"] for part in messages)
        return completion_of(await self.post(document_id, path, body, is_answer))

    async def count_tokens(self, document_id: str, text: str) -> int:
        """Length of ``text`` in the server's tokens (llama.cpp and SGLang both have /tokenize)."""
        body = {"model": self.model, "content": text, "prompt": text}
        answer = await self.post(document_id, "/tokenize", body, lambda found: "tokens" in found)
        return len(answer["tokens"])

    async def post(
        self,
        document_id: str,
        path: str,
        body: dict[str, Any],
        usable: Callable[[dict[str, Any]], bool],
    ) -> dict[str, Any]:
        """POST until the answer is usable; pauses grow twofold, with jitter.

        A request that lost its connection twice is sent while no other such request is, so that the
        one that kills servers is found out and the others get their answer.
        """
        problem, attempt, lost, url = "no attempt", 0, 0, path
        while attempt < self.attempts and lost < max(SUSPECT, self.attempts // 2):
            server = await self.routing.server_for(document_id)
            url = server + path
            try:
                turn = self.suspects if lost >= SUSPECT - 1 else contextlib.nullcontext()
                async with turn, self.http.post(url, json=body) as response:
                    status, content = response.status, await response.read()
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                self.routing.down(server, f"{type(error).__name__}: {error}")
                continue
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = f"{type(error).__name__}: {error}"
                if isinstance(error, TimeoutError):  # it may hang, another one may not
                    self.routing.down(server, problem, self.timeout.total or 0.0)
                else:
                    lost += 1
            else:
                if status == UNAVAILABLE:
                    self.routing.down(server, f"HTTP 503: {start_of(content)}")
                    continue
                self.routing.up(server)
                answer, problem = read_answer(url, status, content)
                if answer is not None and usable(answer):
                    return answer
            attempt += 1
            if attempt < self.attempts:
                self.retries += 1
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
        failed = GenerationFailed if attempt == self.attempts else ConnectionsLost
        raise failed(f"{url}: {attempt} attempts failed, the last with {problem}")


def read_answer(url: str, status: int, content: bytes) -> tuple[dict[str, Any] | None, str]:
    """The JSON object of an answer, or None and what to say if trying again does not help.

    Raises:
        PromptTooLong: the server says so.
        GenerationFailed: a status that will not change.
    """
    if status == 200:
        try:
            answer = json.loads(content)
        except ValueError:
            return None, f"an answer that is not JSON: {start_of(content)!r}"
        return (
            answer if isinstance(answer, dict) else None,
            f"an unusable answer: {start_of(content)}",
        )
    if status == 400 and b"context" in content.lower():
        raise PromptTooLong(start_of(content))
    if status in RETRIED_STATUS:
        return None, f"HTTP {status}: {start_of(content)}"
    raise GenerationFailed(f"{url}: HTTP {status}: {start_of(content)}")


def start_of(content: bytes) -> str:
    """The beginning of an answer, for messages."""
    return content[:300].decode(errors="replace")


def is_answer(answer: dict[str, Any]) -> bool:
    """Whether a chat answer holds a finished text; an aborted one does not."""
    try:
        choice = answer["choices"][0]
        return (
            isinstance(text_of(choice), str)
            and choice["finish_reason"] in ("stop", "length")
            and isinstance(answer["usage"]["completion_tokens"], int)
            and isinstance(answer["usage"]["prompt_tokens"], int)
        )
    except (KeyError, IndexError, TypeError):
        return False


def text_of(choice: dict[str, Any]) -> Any:
    """What a choice says, in the form of a chat or of a plain completion."""
    return choice["message"]["content"] if "message" in choice else choice["text"]


def completion_of(answer: dict[str, Any]) -> Completion:
    """The parts of a chat answer that are kept."""
    choice, usage = answer["choices"][0], answer["usage"]
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens") or (answer.get("timings") or {}).get("cache_n") or 0
    # JSON can escape one half of a character, which no file can hold.
    text = text_of(choice).encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return Completion(
        text.strip(),
        choice["finish_reason"],
        usage["prompt_tokens"],
        usage["completion_tokens"],
        cached,
    )
