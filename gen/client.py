"""One asynchronous client of OpenAI-compatible chat servers (SGLang, llama.cpp, vLLM, ...)."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds


class GenerationFailed(ConnectionError):
    """A request that stayed without a usable answer."""


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

    Args:
        urls: servers that serve the same model; a document sticks to one by its hash.
        model: the model's name as the servers know it.
        concurrency: requests in flight.
        timeout: seconds until a request counts as lost.
        attempts: tries before a request is given up.
        api_key: sent as a bearer token.
    """

    def __init__(
        self,
        urls: list[str],
        model: str,
        concurrency: int,
        timeout: float,
        attempts: int,
        api_key: str | None = None,
    ) -> None:
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self.model = model
        self.attempts = attempts
        self.retries = 0
        self.http = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout, connect=10.0),
            limits=httpx.Limits(max_connections=concurrency + 4),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        )

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    def server_of(self, document_id: str) -> str:
        """The server that has this document's prompt in its cache."""
        return self.urls[zlib.crc32(document_id.encode()) % len(self.urls)]

    async def chat(
        self,
        server: str,
        messages: list[dict[str, str]],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> Completion:
        """One completion.

        Raises:
            PromptTooLong: the prompt does not fit; trying again would not help.
            GenerationFailed: every attempt failed; says how.
        """
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "stream": False,
        }
        return completion_of(await self.post(f"{server}/v1/chat/completions", body, is_answer))

    async def count_tokens(self, server: str, text: str) -> int:
        """Length of ``text`` in the server's tokens (llama.cpp and SGLang both have /tokenize)."""
        body = {"model": self.model, "content": text, "prompt": text}
        answer = await self.post(f"{server}/tokenize", body, lambda found: "tokens" in found)
        return len(answer["tokens"])

    async def post(
        self, url: str, body: dict[str, Any], usable: Callable[[dict[str, Any]], bool]
    ) -> dict[str, Any]:
        """POST until the answer is usable; pauses grow twofold, with jitter."""
        problem = "no attempt"
        for attempt in range(self.attempts):
            if attempt:
                self.retries += 1
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            try:
                response = await self.http.post(url, json=body)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == 400 and "context" in response.text.lower():
                raise PromptTooLong(response.text[:300])
            if response.status_code in RETRIED_STATUS:
                problem = f"HTTP {response.status_code}: {response.text[:300]}"
                continue
            if response.status_code != 200:
                raise GenerationFailed(f"{url}: HTTP {response.status_code}: {response.text[:300]}")
            try:
                answer = response.json()
            except ValueError:
                problem = f"an answer that is not JSON: {response.text[:100]!r}"
                continue
            if isinstance(answer, dict) and usable(answer):
                return answer
            problem = f"an unusable answer: {response.text[:300]}"
        raise GenerationFailed(f"{url}: {self.attempts} attempts failed, the last with {problem}")


def is_answer(answer: dict[str, Any]) -> bool:
    """Whether a chat answer holds a finished text; an aborted one does not."""
    try:
        choice = answer["choices"][0]
        return (
            isinstance(choice["message"]["content"], str)
            and choice["finish_reason"] in ("stop", "length")
            and isinstance(answer["usage"]["completion_tokens"], int)
        )
    except (KeyError, IndexError, TypeError):
        return False


def completion_of(answer: dict[str, Any]) -> Completion:
    """The parts of a chat answer that are kept."""
    choice, usage = answer["choices"][0], answer["usage"]
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens") or answer.get("timings", {}).get("cache_n") or 0
    return Completion(
        choice["message"]["content"].strip(),
        choice["finish_reason"],
        usage["prompt_tokens"],
        usage["completion_tokens"],
        cached,
    )
