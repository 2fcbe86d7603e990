"""A stream elsewhere, read as the plan needs it, and kept on this machine as far as it fits.

A sample is read from its shard where that lies in the cache, and by itself otherwise: one range
request, many at a time, for the steps ahead. A shard of which a sample was read comes whole in the
background, so that soon all of its samples are at hand. Nothing that is being read is ever evicted,
since in a shuffled order no shard is needed less than another; where a stream does not fit, a part
of it stays in the cache and the rest is read sample by sample. Shards of streams that no process
reads make room, the longest unread first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import queue
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from trainer import object_store
from trainer.data.format import MANIFEST, DamagedStreamError
from trainer.data.shards import WORD, Shard, ShardFiles
from trainer.files import only_one, replace_file, sha256

REQUESTS = 32  # samples asked for at a time
DOWNLOADS = 4  # shards that come at a time
OFFSETS_KEPT = 256  # shards of which the places of all samples are remembered
IN_USE = "in-use"  # of a stream's folder: held, shared, by every process that reads it

logger = logging.getLogger(__name__)


class CacheFolder:
    """A stream's folder in the cache; while it is held nothing of it is evicted.

    Args:
        cache: folder for the shards of all streams, ``data.cache``.
        below: name of this stream's folder in it.
        limit: bytes that the shards of all streams may take; None: what the disk holds.
    """

    def __init__(self, cache: Path, below: str, limit: int | None) -> None:
        self.cache = cache
        self.path = cache / below
        self.limit = limit
        self.path.mkdir(parents=True, exist_ok=True)
        self.held: IO[str] = (self.path / IN_USE).open("a")
        with only_one(cache / "room.lock"):
            fcntl.flock(self.held, fcntl.LOCK_SH)
        os.utime(self.path / IN_USE)

    def release(self) -> None:
        self.held.close()

    def has(self, shard: Shard) -> bool:
        return (self.path / shard.name).exists()

    def bring(self, remote: str, shard: Shard) -> bool:
        """Download a shard and compare it with its hash; False where there is no room for it.

        Another process may be bringing it: that is waited for.

        Raises:
            OSError: the server is away for long, or denies it.
            DamagedStreamError: it is not what was written.
        """
        with only_one(self.path / f".{shard.name}.lock"):
            if self.has(shard):
                return True
            unfinished = self.path / f".{shard.name}.tmp"
            with only_one(self.cache / "room.lock"):
                unfinished.unlink(missing_ok=True)  # of a killed process
                if not self.make_room(shard.size):
                    return False
                with unfinished.open("wb") as file:
                    file.truncate(shard.size)  # counts from now on
            try:
                object_store.copy(f"{remote}/{shard.name}", unfinished)
                if (found := sha256(unfinished)) != shard.sha256:
                    raise DamagedStreamError(
                        f"{remote}/{shard.name} is damaged, or was built again: its SHA-256 is "
                        f"{found[:12]}, the {MANIFEST} that was read says {shard.sha256[:12]}"
                    )
                unfinished.rename(self.path / shard.name)
            finally:
                unfinished.unlink(missing_ok=True)
        return True

    def make_room(self, wanted: int) -> bool:
        """Evict what no process reads until ``wanted`` bytes more are within the limit."""
        if self.limit is None:
            return True
        streams = sorted(self.cache.rglob(IN_USE), key=lambda mark: mark.stat().st_mtime)
        room = self.limit - wanted - sum(sum(sizes_of(mark.parent).values()) for mark in streams)
        for mark in streams:
            if room >= 0:
                return True
            with mark.open("a") as other:
                try:
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                for path, size in sizes_of(mark.parent).items():
                    if room < 0:
                        path.unlink()
                        room += size
        return room >= 0


def sizes_of(folder: Path) -> dict[Path, int]:
    """Bytes of every shard of a stream in the cache, unfinished ones too."""
    return {
        path: path.stat().st_size
        for path in folder.iterdir()
        if path.name.endswith((".mds", ".mds.tmp"))
    }


def tokenizer_folder(root: str, cache: str | None) -> Path:
    """The folder of a corpus's tokenizer; that of a remote one is brought into ``cache`` anew.

    Raises:
        ValueError: the corpus is remote, and there is no cache.
    """
    if not object_store.is_remote(root):
        return Path(root) / "tokenizer"
    if cache is None:
        raise ValueError(f"{root} is remote: set data.cache to a local folder")
    folder = Path(cache) / root.split("://", 1)[1] / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("manifest.json", "tokenizer.json"):
        with contextlib.suppress(FileNotFoundError), replace_file(folder / name) as unfinished:
            object_store.copy(f"{root}/tokenizer/{name}", unfinished)
    return folder


class RemoteShards:
    """The samples of a remote stream as bytes.

    Args:
        remote: URI of the stream.
        cache: where its shards are kept.
        shards: all of them, in their order.
    """

    def __init__(self, remote: str, cache: CacheFolder, shards: list[Shard]) -> None:
        self.remote = remote
        self.cache = cache
        self.shards = shards
        self.files = ShardFiles(cache.path, shards)  # those that are here
        self.whole: set[int] = set()  # shards that are known to be here
        self.expected: dict[tuple[int, int], Future[bytes]] = {}
        self.samples_wanted: queue.SimpleQueue[tuple[int, int, Future[bytes]] | None]
        self.samples_wanted = queue.SimpleQueue()
        self.shards_wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.asked: set[int] = set()
        self.failure: Exception | None = None
        self.is_full = False  # the cache, and it has been told
        self.downloaded = 0  # bytes, of whole shards and of samples
        self.offsets = functools.lru_cache(maxsize=OFFSETS_KEPT)(self.read_offsets)
        self.closed = False
        work = [self.answer_samples] * REQUESTS + [self.bring_shards] * DOWNLOADS
        for target in work:  # daemons: a server that is away does not keep a run from ending
            threading.Thread(target=target, daemon=True, name="remote-stream").start()

    def close(self) -> None:
        """End the threads, bring no further shard, and let the cache evict the stream."""
        self.closed = True
        for _ in range(REQUESTS):
            self.samples_wanted.put(None)
        for _ in range(DOWNLOADS):
            self.shards_wanted.put(None)
        self.files.close()
        self.cache.release()

    def expect(self, places: Iterable[tuple[int, int]]) -> None:
        """Begin to read samples, (shard, place in it), that will be asked for soon."""
        for shard, index in places:
            if (shard, index) not in self.expected and not self.has(shard):
                future: Future[bytes] = Future()
                self.expected[shard, index] = future
                self.samples_wanted.put((shard, index, future))
                self.ask_for(shard)

    def sample(self, shard: int, index: int) -> bytes:
        """One sample.

        Raises:
            OSError: the server is away for long, or denies it.
            DamagedStreamError: a shard is not what was written.
        """
        if self.failure is not None:
            raise self.failure
        if (future := self.expected.pop((shard, index), None)) is not None:
            return future.result()
        self.ask_for(shard)
        return self.read(shard, index)

    def ask_for(self, shard: int) -> None:
        """Have a shard brought whole, once."""
        if shard not in self.asked:
            self.asked.add(shard)
            if not self.has(shard):
                self.shards_wanted.put(shard)

    def has(self, shard: int) -> bool:
        """Whether a shard has come whole; none is evicted while the stream is read."""
        if shard not in self.whole and self.cache.has(self.shards[shard]):
            self.whole.add(shard)
        return shard in self.whole

    def read_tokens(
        self,
        out: NDArray[np.uint32],
        places: NDArray[np.int64],
        samples: NDArray[np.int64],
        before_end: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> None:
        """:meth:`ShardFiles.read_tokens`, from files or by what was expected.

        Raises:
            OSError: the server is away for long, or denies it.
            DamagedStreamError: a shard is not what was written.
        """
        shards = set(self.files.shards_of(samples).tolist())
        if not self.expected and self.failure is None and all(map(self.has, shards)):
            self.files.read_tokens(out, places, samples, before_end, counts)
            return
        columns = (places, samples, before_end, counts)
        for place, sample, back, count in zip(*(c.tolist() for c in columns), strict=True):
            content = self.sample(*self.files.place_of(sample))
            tokens = np.frombuffer(content, "<u4", count, len(content) - WORD * back)
            out[place : place + count] = tokens

    def read(self, shard: int, index: int) -> bytes:
        """A sample from the cache, or by a range request."""
        if self.has(shard):
            return self.files.sample(shard, index)
        file_elsewhere, offsets = self.offsets(shard)
        start, end = offsets[index : index + 2].tolist()
        self.downloaded += end - start
        return file_elsewhere.read(start, end)

    def read_offsets(self, shard: int) -> tuple[object_store.RemoteFile, NDArray[np.uint32]]:
        """A shard elsewhere, and where its samples begin and end in it, uint32 [samples + 1]."""
        samples = self.shards[shard].samples
        file = object_store.RemoteFile(f"{self.remote}/{self.shards[shard].name}")
        return file, np.frombuffer(file.read(WORD, WORD * (samples + 2)), "<u4")

    def answer_samples(self) -> None:
        """Work of a thread: samples that are expected."""
        while (wanted := self.samples_wanted.get()) is not None:
            shard, index, future = wanted
            try:
                future.set_result(self.read(shard, index))
            except Exception as error:  # shown where the sample is wanted
                future.set_exception(error)

    def bring_shards(self) -> None:
        """Work of a thread: whole shards, as long as there is room."""
        while (shard := self.shards_wanted.get()) is not None and not self.closed:
            try:
                if self.cache.bring(self.remote, self.shards[shard]):
                    self.downloaded += self.shards[shard].size
                elif not self.is_full:
                    self.is_full = True
                    logger.info(
                        f"{self.cache.cache} holds data.cache_limit={self.cache.limit} bytes: "
                        f"other shards of {self.remote} are read sample by sample"
                    )
            except Exception as error:  # shown where the next sample is wanted
                if getattr(error, "errno", None) == errno.ENOSPC:
                    logger.warning("%s is full; the rest is read by samples", self.cache.path)
                    return
                self.failure = error
                return


def bring_all(remote: str, cache: CacheFolder, shards: list[Shard]) -> None:
    """Bring a whole stream, as evaluation reads it.

    Raises:
        ValueError: the cache's limit is too small for it.
    """
    failures: list[Any] = []
    wanted: queue.SimpleQueue[Shard] = queue.SimpleQueue()
    for shard in shards:
        wanted.put(shard)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not failures:
                shard = wanted.get_nowait()
                try:
                    if not cache.bring(remote, shard):
                        total = sum(one.size for one in shards)
                        raise ValueError(
                            f"data.cache_limit={cache.limit} bytes has no room for {remote}, which "
                            f"is read as a whole ({total} bytes); set a larger one"
                        )
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(DOWNLOADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
