"""The generation job: what is missing, asked for in an order that shares prompt prefixes, stored.

The generations of one document travel together, so the server computes its prompt once. Everything
that is finished is on the disk a few seconds later; a job that was killed asks only for what is
missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from gen.client import ChatClient, Completion, GenerationFailed, PromptTooLong
from gen.corpus import Document
from gen.latent import split_text
from gen.prompts import MethodConfig, sibling_seed
from gen.routing import Routing, ServersLost
from gen.servers import GeneratorConfig, Servers
from gen.store import Generation, GenerationStore, drop_leftovers, owns

TEMPLATE_ROOM = 64  # tokens a chat template may add around the messages
FLUSH_ROWS = 512
SHORTEN = 0.95  # a prompt that the server still refuses loses 5 % of its document


@dataclass(frozen=True)
class Work:
    """The missing generations of one document."""

    document: Document
    indices: list[int]
    fields: Callable[[int], dict[str, str]]  # the template's fields of a generation


@dataclass
class Job:
    """One method over all documents."""

    method: MethodConfig
    config: GeneratorConfig
    store: GenerationStore
    tokenizer: Tokenizer
    failures: dict[str, str] = field(default_factory=dict)
    unsaved: list[Generation] = field(default_factory=list)
    generated_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def missing(self, documents: list[Document]) -> Iterator[Work]:
        """Documents of this writer that lack generations, in corpus order."""
        done = self.store.done()
        for document in documents:
            if not owns(document.id, self.config.writer, self.config.writers):
                continue
            if self.method.latent:
                pieces = split_text(document.text, self.method.generations + 1, self.tokenizer)
                wanted = range(len(pieces) - 1)
                fields = latent_fields(pieces)
            else:
                wanted = range(self.method.generations)
                fields = rephrase_fields(document.text)
            indices = [index for index in wanted if index not in done.get(document.id, ())]
            if indices:
                yield Work(document, indices, fields)

    async def run(self, servers: Servers, works: list[Work]) -> None:
        """Generate everything in ``works``; failures are collected, not raised.

        Raises:
            ServersLost: no server is left; what was generated is stored.
        """
        config = self.config
        total = sum(len(work.indices) for work in works)
        slots = asyncio.Semaphore(config.concurrency)
        documents = asyncio.Semaphore(max(1, config.concurrency // config.siblings_in_flight))
        bar = tqdm(total=total, desc=self.store.folder.name, unit="text", dynamic_ncols=True)
        began = time.monotonic()
        routing = Routing(servers.urls, config.outage_seconds, servers.failure)
        async with ChatClient(
            routing,
            config.model,
            config.concurrency,
            config.timeout,
            config.attempts,
            config.api_key,
        ) as client:

            async def one(work: Work, index: int) -> None:
                async with slots:
                    try:
                        await self.generate(client, work, index)
                    except GenerationFailed as error:
                        self.failures[f"{work.document.id}#{index}"] = str(error)
                bar.update()
                bar.set_postfix(self.speed(time.monotonic() - began), refresh=False)

            async def document(work: Work) -> None:
                try:
                    await one(work, work.indices[0])  # fills the server's cache for the others
                    size = config.siblings_in_flight
                    for first in range(1, len(work.indices), size):
                        siblings = work.indices[first : first + size]
                        await asyncio.gather(*(one(work, index) for index in siblings))
                finally:
                    documents.release()

            saver = asyncio.create_task(self.save_regularly())
            try:
                async with asyncio.TaskGroup() as group:
                    for work in works:
                        await documents.acquire()
                        group.create_task(document(work))
            except* ServersLost as errors:
                raise errors.exceptions[0] from None
            finally:
                saver.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await saver
                self.save()
                bar.close()

    async def generate(self, client: ChatClient, work: Work, index: int) -> None:
        """One generation, its document cut as far as the context demands."""
        method, document_id = self.method, work.document.id
        seed = sibling_seed(self.config.seed, document_id, method.name, index)
        fields, truncated = await self.fit(client, document_id, work.fields(index))
        while True:
            try:
                completion = await client.chat(
                    document_id,
                    method.messages(**fields),
                    max_tokens=method.max_tokens,
                    temperature=method.temperature,
                    top_p=method.top_p,
                    seed=seed,
                )
                break
            except PromptTooLong:
                shorter = shorten(fields, SHORTEN)
                if shorter == fields:
                    raise
                fields, truncated = shorter, True
        self.keep(work.document, index, seed, completion, truncated)

    async def fit(
        self, client: ChatClient, document_id: str, fields: dict[str, str]
    ) -> tuple[dict[str, str], bool]:
        """The fields cut so that prompt and answer fit the context, and whether they were cut."""
        room = self.config.context_length - self.method.max_tokens - TEMPLATE_ROOM

        async def tokens(candidate: dict[str, str]) -> int:
            text = "".join(part["content"] for part in self.method.messages(**candidate))
            if len(text.encode()) <= room:  # a token holds at least a byte
                return 0
            return await client.count_tokens(document_id, text)

        if await tokens(fields) <= room:
            return fields, False
        empty = dict.fromkeys(fields, "")
        if await tokens(empty) > room:
            raise GenerationFailed(
                f"generator.context_length={self.config.context_length} leaves {room} tokens for "
                f"the prompt beside method.max_tokens={self.method.max_tokens}: not even the "
                "instructions fit"
            )
        low, high = 0.0, 1.0  # shares of the document that fit and do not fit
        for _ in range(10):
            middle = (low + high) / 2
            if await tokens(shorten(fields, middle)) <= room:
                low = middle
            else:
                high = middle
        return shorten(fields, low), True

    def keep(
        self, document: Document, index: int, seed: int, answer: Completion, truncated: bool
    ) -> None:
        """Note a finished generation; it reaches the disk with the next flush."""
        self.generated_tokens += answer.completion_tokens
        self.prompt_tokens += answer.prompt_tokens
        self.cached_tokens += answer.cached_tokens
        self.unsaved.append(
            Generation(
                document.id,
                self.method.name,
                index,
                answer.text,
                self.config.model,
                self.method.version,
                self.method.temperature,
                self.method.top_p,
                self.method.max_tokens,
                seed,
                answer.finish_reason,
                answer.prompt_tokens,
                answer.completion_tokens,
                answer.cached_tokens,
                truncated,
            )
        )
        if len(self.unsaved) >= FLUSH_ROWS:
            self.save()

    def save(self) -> None:
        """Write what is finished as one part."""
        if self.unsaved:
            self.store.append(self.unsaved, self.config.writer)
            self.unsaved = []

    async def save_regularly(self) -> None:
        while True:
            await asyncio.sleep(self.config.flush_seconds)
            self.save()

    def speed(self, seconds: float) -> dict[str, str]:
        """Tokens per second and the cached share of the prompts, for the progress bar."""
        cached = self.cached_tokens / max(1, self.prompt_tokens)
        return {"tok/s": f"{self.generated_tokens / seconds:.0f}", "cached": f"{cached:.0%}"}


def run_job(
    method: MethodConfig,
    config: GeneratorConfig,
    documents: list[Document],
    tokenizer: Tokenizer,
    root: Path,
    serve: Callable[[GeneratorConfig, Path], contextlib.AbstractContextManager[Servers]],
) -> dict[str, Any]:
    """Generate what is missing of ``method`` and return statistics of this call.

    Raises:
        ValueError: settings differ from those of the store, or another job holds it.
        GenerationFailed: some generations failed after all attempts; the rest is stored.
        ServersLost: no server is left; what was generated until then is stored.
    """
    method.check()
    config.check()
    store = GenerationStore.of_method(root, method.name, method.generations)
    store.claim(
        {
            "method": method.name,
            "prompt_version": method.version,
            "model": config.model,
            "temperature": method.temperature,
            "top_p": method.top_p,
            "max_tokens": method.max_tokens,
            "seed": config.seed,
        }
    )
    with store.lock(config.writer, config.writers):
        if config.writers == 1:
            drop_leftovers(store.folder)
        job = Job(method, config, store, tokenizer)
        works = list(job.missing(documents))
        began = time.monotonic()
        if works:
            with serve(config, root / "generations" / "server.log") as servers:
                asyncio.run(job.run(servers, works))
        seconds = time.monotonic() - began
    failures = store.folder / "failures.json"
    failures.unlink(missing_ok=True)
    if job.failures:
        failures.write_text(json.dumps(job.failures, indent=1))
        names = sorted({key.rsplit("#", 1)[0] for key in job.failures})
        raise GenerationFailed(
            f"{len(job.failures)} generations of {len(names)} documents failed "
            f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}); the first: "
            f"{next(iter(job.failures.values()))}. All of them: {failures}. What succeeded is "
            "stored; the same command tries the rest again"
        )
    return {
        "generations": sum(len(work.indices) for work in works),
        "completion_tokens": job.generated_tokens,
        "prompt_tokens": job.prompt_tokens,
        "cached_tokens": job.cached_tokens,
        "seconds": seconds,
    }


def rephrase_fields(text: str) -> Callable[[int], dict[str, str]]:
    """Every generation of a document has the same prompt."""
    return lambda index: {"text": text}


def latent_fields(pieces: list[str]) -> Callable[[int], dict[str, str]]:
    """Generation ``index`` stands between the pieces before and after its cut."""

    def fields(index: int) -> dict[str, str]:
        return {
            "prefix": "".join(pieces[: index + 1]),
            "suffix": "".join(pieces[index + 1 :]),
        }

    return fields


def shorten(fields: dict[str, str], share: float) -> dict[str, str]:
    """Keep a share of the document: its beginning, or for a cut the text around the cut."""
    shorter = {name: text[: int(len(text) * share)] for name, text in fields.items()}
    if "prefix" in fields:
        prefix = fields["prefix"]
        shorter["prefix"] = prefix[len(prefix) - int(len(prefix) * share) :]
    return shorter
