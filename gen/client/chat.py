"""One asynchronous client of OpenAI-compatible chat servers (SGLang, llama.cpp, vLLM, ...)."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import aiohttp
from tokenizers import Tokenizer

from gen.client.answers import (
    Completion,
    ConnectionsLost,
    GenerationFailed,
    StillThinking,
    completion_of,
    read_answer,
    start_of,
)
from gen.client.connection import Connection, api_of, proxy_for, root_of
from gen.client.routing import Routing

UNAVAILABLE = 503  # still loading, or its queue is full: not this request's fault
TOO_MANY_REQUESTS = 429
NOT_SERVED = {404, 405, 501}
SUSPECT = 3  # lost connections after which a request may be given up, at the earliest
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
LONGEST_TOLD_PAUSE = 600.0  # seconds: the most that a server's Retry-After is heeded
BYTES_A_TOKEN = 3  # where nothing counts tokens; fewer than in most texts, so prompts rather fit

Answer = TypeVar("Answer")


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
        connection: headers and certificates.
        extra_body: fields added to every request for a generation.
        tokenizer: counts prompts in place of the server's ``/tokenize``.
    """

    def __init__(
        self,
        routing: Routing,
        model: str,
        concurrency: int,
        timeout: float,
        attempts: int,
        connection: Connection | None = None,
        extra_body: Mapping[str, Any] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.routing = routing
        self.model = model
        self.attempts = attempts
        self.retries = 0
        self.suspects = asyncio.Lock()  # requests that may kill a server go one at a time
        self.concurrency = concurrency
        self.timeout = timeout
        self.connection = connection or Connection()
        self.extra_body = extra_body or {}
        self.tokenizer = tokenizer
        self.restarted: set[str] = set()  # servers that went away: another model may come back
        self.looks = asyncio.Lock()
        self.servers_count = True  # until one has no /tokenize
        self.apis = {url: api_of(url) for url in routing.urls}
        self.proxies = {url: proxy_for(url) for url in routing.urls}

    async def __aenter__(self) -> ChatClient:
        self.http = self.connection.session(self.apis, self.concurrency + 4, self.timeout)
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
            StillThinking: the model did not come to its answer.
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
            **self.extra_body,
        }
        prompt = "".join(part["content"] for part in messages)
        if template:
            path, body["messages"] = "/chat/completions", messages
        else:
            path, body["prompt"] = "/completions", prompt
        answer = await self.post(
            document_id, self.apis, path, body, lambda found: completion_of(found, prompt)
        )
        if not answer.thinking_ended:
            raise StillThinking(answer)
        return answer

    async def count_tokens(self, document_id: str, text: str) -> int:
        """Length of ``text`` in tokens.

        Counted by the tokenizer that was given, else by the server (llama.cpp, vLLM and SGLang have
        ``/tokenize``), else estimated from its bytes: the server's own refusal is the last word.
        """
        if self.tokenizer is not None:
            return len(self.tokenizer.encode(text, add_special_tokens=False).ids)
        if self.servers_count:
            body = {"model": self.model, "content": text, "prompt": text}
            roots = {url: root_of(url) for url in self.apis}
            try:
                return await self.post(document_id, roots, "/tokenize", body, number_of_tokens)
            except GenerationFailed as error:
                if error.reason not in {f"HTTP {status}" for status in NOT_SERVED}:
                    raise
                self.servers_count = False
        return -(-len(text.encode()) // BYTES_A_TOKEN)

    async def serves_the_model(self, server: str) -> bool:
        """Look at a server that is back: SGLang answers to any name, with the model it has.

        Raises:
            aiohttp.ClientError, TimeoutError: it does not answer.
            ServersLost: no other server is left.
        """
        async with self.looks:
            if server not in self.restarted:
                return True
            url = f"{self.apis[server]}/models"
            async with self.http.get(url, proxy=self.proxies[server]) as response:
                content = await response.read()
            if response.status == UNAVAILABLE:
                self.routing.down(server, f"HTTP {response.status}: {start_of(content)}")
                return False
            served = None
            if response.status == 200:
                served = models_of(read_answer(url, response.status, content)[0])
            if served is not None and self.model not in served:
                self.routing.refuse(
                    server,
                    f"{server} came back and serves {', '.join(served)}, not "
                    f"generator.model={self.model}; what was generated before is stored",
                )
                return False
            self.restarted.discard(server)
            return True

    async def post(
        self,
        document_id: str,
        bases: Mapping[str, str],
        path: str,
        body: dict[str, Any],
        read: Callable[[Any], Answer | None],
    ) -> Answer:
        """POST until the answer can be read; pauses grow twofold, with jitter.

        A request that lost its connection twice is sent while no other such request is, so that the
        one that kills servers is found out and the others get their answer.

        Args:
            document_id: chooses the server.
            bases: what ``path`` is below, by the server's URL.
            path: of the request.
            body: its JSON.
            read: what is wanted of an answer's JSON; None where it does not hold that.
        """
        problem, reason, attempt, lost, url = "no attempt", "unusable answer", 0, 0, path
        while attempt < self.attempts and lost < max(SUSPECT, self.attempts // 2):
            server = await self.routing.server_for(document_id)
            url = bases[server] + path
            try:
                if server in self.restarted and not await self.serves_the_model(server):
                    continue
                turn = self.suspects if lost >= SUSPECT - 1 else contextlib.nullcontext()
                request = self.http.post(url, json=body, proxy=self.proxies[server])
                async with turn, request as response:
                    status, content = response.status, await response.read()
                    pause = pause_told(response.headers)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                self.routing.down(server, f"{type(error).__name__}: {error}")
                self.restarted.add(server)
                continue
            except (aiohttp.ClientError, TimeoutError) as error:
                problem, reason = f"{type(error).__name__}: {error}", "connection lost"
                if isinstance(error, TimeoutError):  # it may hang, another one may not
                    reason = "timeout"
                    self.routing.down(server, problem, self.timeout)
                else:
                    lost += 1
                    self.restarted.add(server)
            else:
                if status == UNAVAILABLE or (status == TOO_MANY_REQUESTS and pause is not None):
                    self.routing.down(server, f"HTTP {status}: {start_of(content)}", told=pause)
                    continue
                self.routing.up(server)
                found, problem = read_answer(url, status, content)
                reason = "unusable answer" if status == 200 else f"HTTP {status}"
                if found is not None and (answer := read(found)) is not None:
                    return answer
            attempt += 1
            if attempt < self.attempts:
                self.retries += 1
                wait = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))
                await asyncio.sleep(wait * random.uniform(0.5, 1.5))
        failed = GenerationFailed if attempt == self.attempts else ConnectionsLost
        raise failed(f"{url}: {attempt} attempts failed, the last with {problem}", reason)


def models_of(listing: Any) -> list[str] | None:
    """Names in the answer of ``/v1/models``; None where it is no list of them."""
    try:
        return [str(entry["id"]) for entry in listing["data"]]
    except (KeyError, TypeError):
        return None


def pause_told(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to be left alone (Retry-After: seconds or a date)."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(LONGEST_TOLD_PAUSE, max(0.0, seconds)) if seconds == seconds else None


def number_of_tokens(answer: Any) -> int | None:
    """Of a ``/tokenize`` answer."""
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    return len(tokens) if isinstance(tokens, list) else None
