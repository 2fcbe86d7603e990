"""The generation job: what is missing, asked for in an order that shares prompt prefixes, stored.

The generations of one document travel together, so the server computes its prompt once. Everything
that is finished is on the disk a few seconds later; a job that was killed asks only for what is
missing. One that is told to stop waits a little for the requests in flight, and saves.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from tokenizers import Tokenizer
from tqdm import tqdm

from gen.client.answers import (
    Completion,
    ConnectionsLost,
    GenerationFailed,
    PromptTooLong,
    StillThinking,
)
from gen.client.chat import ChatClient
from gen.client.concurrency import AdaptiveLimit, Slots
from gen.client.fitting import counting_tokenizer, latent_fields, rephrase_fields
from gen.client.routing import Routing, ServersLost
from gen.corpus.documents import Document
from gen.corpus.split import split_text
from gen.generations.allocation import allotment
from gen.generations.failures import Failures
from gen.generations.sessions import Session
from gen.generations.siblings import Sameness, Siblings, Work
from gen.generations.store import Generation, GenerationStore, drop_leftovers, owns
from gen.prompts import MethodConfig, sibling_seed
from gen.serving.load import read_load
from gen.serving.servers import GeneratorConfig, Servers
from trainer.slurm_jobs import starts_in_vain
from trainer.stop import SIGNALS, StopSignals, stopped

logger = logging.getLogger(__name__)

FLUSH_ROWS = 512
LOOK_EVERY = 2.0  # seconds between looks at the servers' queues
SIGNAL_LOOK = 0.1  # seconds between looks whether a signal came
GRACE = 10.0  # seconds for requests in flight then; Slurm's SIGKILL comes 30 s after its SIGTERM


@dataclass
class Lane:
    """One server with its documents and the requests it may have at once."""

    url: str
    slots: Slots
    limit: AdaptiveLimit
    works: list[Work] = field(default_factory=list)
    shows_queue: bool = True

    def finished(self, seconds: float, tokens: int) -> None:
        """Learn from a request where the server shows no queue."""
        if not self.shows_queue and self.slots.full:
            self.slots.resize(self.limit.observe_request(seconds, tokens))


@dataclass
class Job:
    """One method over all documents."""

    method: MethodConfig
    config: GeneratorConfig
    store: GenerationStore
    session: Session
    servers: Servers
    client: ChatClient
    bar: tqdm
    failures: Failures
    stop: StopSignals
    unsaved: list[Generation] = field(default_factory=list)
    thinks: bool = False  # an answer ended before the model's thinking did
    sameness: Sameness = field(default_factory=Sameness)

    async def run(self, works: list[Work]) -> None:
        """Generate everything in ``works``; failures of requests are collected, not raised.

        Raises:
            Stopped: a signal asked for it; what was answered is stored, the rest is asked again.
            ServersLost: no server is left; what was generated is stored.
            OSError: the disk is full; what was stored stays.
        """
        lanes = self.lanes(works)
        try:
            async with self.client, asyncio.TaskGroup() as background:
                helpers = [background.create_task(self.save_regularly())]
                if self.config.adaptive:
                    helpers.append(background.create_task(self.adapt(lanes)))
                requests = background.create_task(self.ask_all(lanes))
                helpers.append(background.create_task(self.end_when_told(requests)))
                await asyncio.wait([requests])
                for helper in helpers:
                    helper.cancel()
        except BaseExceptionGroup as errors:
            error = first_error(errors)
            if not (self.stop.wanted and isinstance(error, ServersLost)):  # they were told as well
                raise error from None
        finally:
            self.bar.close()
            self.session.ended = self.describe_end(sys.exception())
            self.save()
        if self.stop.wanted:
            raise stopped(self.stop.wanted, self.describe_stop())

    async def ask_all(self, lanes: list[Lane]) -> None:
        """Every request of the job."""
        async with asyncio.TaskGroup() as group:
            for lane in lanes:
                group.create_task(self.open_documents(lane, group))

    async def end_when_told(self, requests: asyncio.Task[None]) -> None:
        """After a signal no request is begun; those in flight have :data:`GRACE` seconds."""
        while not self.stop.wanted:
            await asyncio.sleep(SIGNAL_LOOK)
        deadline = time.monotonic() + GRACE
        while not requests.done() and self.servers.wind_down() and time.monotonic() < deadline:
            await asyncio.sleep(SIGNAL_LOOK)
        requests.cancel()

    def describe_end(self, error: BaseException | None) -> str:
        if self.stop.wanted:
            return f"stopped by {SIGNALS[self.stop.wanted - 1].name}"
        return f"ended by {type(error).__name__}" if error else "ended"

    def describe_stop(self) -> str:
        """How far the writer is."""
        done = self.session.present + self.session.generations
        return (
            f"{self.store.folder}: stopped after {done:,} of {self.session.expected:,} "
            "generations; the same command goes on"
        )

    def lanes(self, works: list[Work]) -> list[Lane]:
        """The works by the server that each document sticks to."""
        most, adaptive = self.config.concurrency, self.config.adaptive
        lanes = {}
        for url in self.servers.urls:
            limit = AdaptiveLimit(
                most, self.config.siblings_in_flight, limit=0 if adaptive else most
            )
            lanes[url] = Lane(url, Slots(limit.limit), limit)
        for work in works:
            lanes[self.client.routing.order(work.document.id)[0]].works.append(work)
        return list(lanes.values())

    async def open_documents(self, lane: Lane, group: asyncio.TaskGroup) -> None:
        """Open documents one after the other, each when the open ones leave a slot free."""
        for work in lane.works:
            if self.stop.wanted:
                return
            opened = asyncio.Event()
            group.create_task(self.run_document(lane, work, opened))
            await opened.wait()

    async def run_document(self, lane: Lane, work: Work, opened: asyncio.Event) -> None:
        """All generations of a document, after one request has put its prompt into the cache.

        The document's first slot is this call's; siblings beside it wait for slots of their own.
        """
        siblings = Siblings(work, self.client, self.method, self.config.context_length)
        beside = min(self.config.siblings_in_flight, len(work.indices)) - 1
        async with asyncio.TaskGroup() as group, lane.slots.held():
            opened.set()
            if self.stop.wanted:
                return
            if beside and self.config.warm_up:
                await self.warm_up(siblings)
            elif beside:
                await self.generate_one(lane, siblings, siblings.next_index())
            for _ in range(beside):
                group.create_task(self.worker(lane, siblings))
            await self.make_all(lane, siblings)

    async def worker(self, lane: Lane, siblings: Siblings) -> None:
        async with lane.slots.held():
            await self.make_all(lane, siblings)

    async def make_all(self, lane: Lane, siblings: Siblings) -> None:
        """One generation after the other, until another worker has taken the last."""
        while siblings.to_come and not self.stop.wanted:
            await self.generate_one(lane, siblings, siblings.next_index())
            await lane.slots.yield_if_fewer()

    async def generate_one(self, lane: Lane, siblings: Siblings, index: int) -> None:
        """One generation, and what is learned from it."""
        began = time.monotonic()
        try:
            answer = await self.generate(siblings, index)
        except GenerationFailed as error:
            self.record_failure(siblings.document, index, error.reason, str(error))
            if isinstance(error, ConnectionsLost):
                self.give_up(siblings, error)
        else:
            lane.finished(time.monotonic() - began, answer.completion_tokens or 0)
            if self.bar.update():  # it was drawn
                self.bar.set_postfix(self.speed(), refresh=False)

    async def warm_up(self, siblings: Siblings) -> None:
        """Put the document's prompt into the server's cache: one token of the first sibling."""
        index = siblings.to_come[0]
        try:
            fields, _ = await siblings.fitted(index)
            self.count_answer(await self.request(siblings.document, index, fields, max_tokens=1))
        except ConnectionsLost as error:
            self.give_up(siblings, error)
        except StillThinking as thinking:
            self.count_answer(thinking.answer)
        except GenerationFailed:
            pass  # the siblings will say what is wrong, or a shorter document helps them

    def record_failure(self, document: Document, index: int, reason: str, problem: str) -> None:
        """Note a generation that this call does not make."""
        if self.stop.wanted:
            return  # its server may have been told to stop as well: it is asked for again
        self.failures.add(document.id, index, reason, problem)
        self.session.failed += 1
        self.bar.update()

    def give_up(self, siblings: Siblings, error: ConnectionsLost) -> None:
        """Do not try the siblings to come of a document whose prompt seems to kill servers."""
        while siblings.to_come:
            problem = f"not tried after: {error}"
            self.record_failure(siblings.document, siblings.next_index(), error.reason, problem)

    async def generate(self, siblings: Siblings, index: int) -> Completion:
        """One generation, its document cut as far as the context demands."""
        document = siblings.document
        fields, truncated = await siblings.fitted(index)
        more = self.config.thinking_tokens if self.thinks else 0
        while True:
            try:
                answer = await self.request(document, index, fields, self.method.max_tokens + more)
                break
            except StillThinking as unfinished:
                self.count_answer(unfinished.answer)
                if more or not self.config.thinking_tokens:
                    raise
                self.thinks, more = True, self.config.thinking_tokens
            except PromptTooLong:
                fields, truncated = siblings.shorter(fields), True
        self.count_answer(answer)
        self.record(document, index, answer, truncated)
        return answer

    async def request(
        self, document: Document, index: int, fields: dict[str, str], max_tokens: int
    ) -> Completion:
        """Send one request."""
        method = self.method
        return await self.client.chat(
            document.id,
            method.messages(index, **fields),
            template=method.chat,
            max_tokens=max_tokens,
            temperature=method.temperature,
            top_p=method.top_p,
            seed=sibling_seed(self.config.seed, document.id, method.name, index),
        )

    def count_answer(self, answer: Completion) -> None:
        """Add a request to the session."""
        self.session.requests += 1
        self.session.uncounted += answer.completion_tokens is None
        self.session.prompt_tokens += answer.prompt_tokens or 0
        self.session.cached_tokens += answer.cached_tokens
        self.session.thinking_tokens += answer.thinking_tokens
        self.session.thoughts += answer.thinking_tokens > 0

    def record(self, document: Document, index: int, answer: Completion, truncated: bool) -> None:
        """Note a finished generation; it reaches the disk with the next flush."""
        method = self.method
        self.session.generations += 1
        self.session.completion_tokens += answer.completion_tokens or 0
        if method.temperature and self.sameness.found(document.id, answer.text):
            logger.warning(
                f"{self.store.folder}: the server gives all siblings of a document the same text, "
                f"whatever method.temperature={method.temperature:g} and the seed say, so that "
                f"G={method.generations} are worth one. Delete that folder and ask for sampling in "
                "the server's own way with generator.extra_body (transformers serve: "
                "{generation_config: '{\"do_sample\": true}'})"
            )
        self.unsaved.append(
            Generation(
                document.id,
                method.name,
                index,
                answer.text,
                self.config.model,
                method.version,
                method.temperature,
                method.top_p,
                method.max_tokens,
                sibling_seed(self.config.seed, document.id, method.name, index),
                answer.finish_reason,
                answer.prompt_tokens,
                answer.completion_tokens,
                answer.cached_tokens,
                truncated,
                document.text_hash,
            )
        )
        if len(self.unsaved) >= FLUSH_ROWS:
            self.save()

    def save(self) -> None:
        """Write what is finished as one part, and how far the session is."""
        if self.unsaved:
            self.store.append(self.unsaved, self.config.writer)
            self.unsaved = []
            self.store.merge(self.config.writer, self.config.merge_parts)
        self.failures.save()
        self.session.retries = self.client.retries
        self.session.restarts = self.servers.restarts()
        self.session.save(self.store.folder)

    async def save_regularly(self) -> None:
        while True:
            await asyncio.sleep(self.config.flush_seconds)
            self.save()

    async def adapt(self, lanes: list[Lane]) -> None:
        """Keep the queue of each server that shows one short and never empty."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            for lane in lanes:
                try:
                    load = await read_load(self.client.http, lane.url)
                except (aiohttp.ClientError, TimeoutError):
                    continue  # a server that is down is the routing's matter
                lane.shows_queue = load is not None
                if load is not None:
                    limit = lane.limit.observe_queue(load.waiting, lane.slots.taken)
                    lane.slots.resize(limit)

    def speed(self) -> dict[str, str]:
        """Tokens per second and the cached share of the prompts, for the progress bar."""
        seconds = time.time() - self.session.began
        return {
            "tok/s": f"{self.session.completion_tokens / seconds:.0f}",
            "cached": f"{self.session.cached_share:.0%}",
        }


def first_error(errors: BaseExceptionGroup) -> BaseException:
    """The first single exception in nested groups."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def missing_works(
    method: MethodConfig,
    config: GeneratorConfig,
    store: GenerationStore,
    documents: list[Document],
    tokenizer: Tokenizer,
) -> tuple[list[Work], int]:
    """This writer's documents that lack generations, in corpus order, and how many it owes in all.

    The cuts of a document are asked for from the last to the first: the last one's prompt begins
    with all the text that stands before any other cut.
    """
    works, expected = [], 0
    allotted = allotment(method, documents)
    done_of = store.done(documents)
    for document, done, count in zip(documents, done_of, allotted.tolist(), strict=True):
        if not owns(document.id, config.writer, config.writers):
            continue
        if method.latent:
            pieces = split_text(document.text, method.generations + 1, tokenizer)
            wanted = range(len(pieces) - 2, -1, -1)
            fields = latent_fields(pieces)
        else:
            wanted = range(count)
            fields = rephrase_fields(document.text)
        expected += len(wanted)
        indices = [index for index in wanted if index not in done]
        if indices:
            works.append(Work(document, indices, fields))
    return works, expected


def run_job(
    method: MethodConfig,
    config: GeneratorConfig,
    documents: list[Document],
    tokenizer: Tokenizer,
    root: Path,
    serve: Callable[[GeneratorConfig, Path], contextlib.AbstractContextManager[Servers]],
) -> Session:
    """Generate what is missing of ``method`` and return what this call did.

    Raises:
        ValueError: settings differ from those of the store, or another job holds it.
        Stopped: a signal asked for it; what was generated until then is stored.
        GenerationFailed: some generations failed after all attempts; the rest is stored.
        ServersLost: no server is left; what was generated until then is stored.
        OSError: the disk is full; what was stored stays.
    """
    method.check()
    config.check()
    store = GenerationStore.of_method(root, method.name, method.generations, method.latent)
    store.claim(
        {
            "method": method.name,
            "prompt_version": method.version,
            "system": method.system,
            "prompt": method.prompt,
            "variants": method.variants,
            "model": config.model,
            "temperature": method.temperature,
            "top_p": method.top_p,
            "max_tokens": method.max_tokens,
            "seed": config.seed,
            "extra_body": config.extra_body,
            "extra_headers": config.extra_headers,
            # Cuts fall on borders of tokens: another tokenizer makes other ones.
            **({"vocabulary": hash_of_vocabulary(tokenizer)} if method.latent else {}),
        }
    )
    failures = Failures(store.folder, config.writer)
    with store.lock(config.writer, config.writers):
        if config.writers == 1:
            drop_leftovers(store.folder)
        works, expected = missing_works(method, config, store, documents, tokenizer)
        missing = sum(len(work.indices) for work in works)
        session = Session(
            config.writer, config.writers, expected, expected - missing, config.gpus_used
        )
        if not works:
            failures.path.unlink(missing_ok=True)
            return session
        starts = store.folder / f"starts-{config.writer}.jsonl"
        if job_id := starts_in_vain(starts, session.present):
            raise ValueError(
                f"two starts in a row of job {job_id} added nothing to {store.folder}: what ends "
                "them comes before the first answers; give the job more time (launcher=slurm: "
                "hydra.launcher.timeout_min)"
            )
        with serve(config, root / "generations" / f"server-{config.writer}.log") as servers:
            session.began = time.time()
            routing = Routing(servers.urls, config.outage_seconds, servers.failure)
            client = ChatClient(
                routing,
                config.model,
                config.concurrency * len(servers.urls),
                config.timeout,
                config.attempts,
                config.connection(),
                config.extra_body,
                counting_tokenizer(config.tokenizer) if config.tokenizer else None,
            )
            bar = tqdm(total=missing, desc=store.folder.name, unit="text", dynamic_ncols=True)
            with StopSignals() as stop:
                job = Job(method, config, store, session, servers, client, bar, failures, stop)
                asyncio.run(job.run(works))
        if failures.found:
            raise GenerationFailed(failures.describe())
        failures.path.unlink(missing_ok=True)
    return session


def hash_of_vocabulary(tokenizer: Tokenizer) -> str:
    content = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()[:12]
