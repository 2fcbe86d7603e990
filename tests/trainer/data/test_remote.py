"""Streams in a real S3 server: read as they are needed, whatever happens to server and cache."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ObjectStore
from tests.trainer.conftest import write_stream
from trainer import object_store as reading
from trainer.config.schema import Mask
from trainer.data.batches import BatchLoader
from trainer.data.format import DamagedStreamError
from trainer.data.mds import MegadocStream
from trainer.data.plan import Plan, Source
from trainer.data.remote import DOWNLOADS, CacheFolder

REMOTE = "s3://bucket/corpus/streams/real"
SAMPLES, STEPS = 120, 4


@pytest.fixture
def local(tmp_path: Path) -> MegadocStream:
    """A stream of a dozen shards."""
    sizes = random.Random(0)
    members = [[sizes.randint(3, 60)] for _ in range(SAMPLES)]
    return write_stream(tmp_path / "real", members, shard_bytes=2500)


@pytest.fixture
def remote(local: MegadocStream, object_store: ObjectStore) -> str:
    """The same in a bucket."""
    return upload(local, object_store)


def upload(stream: MegadocStream, store: ObjectStore) -> str:
    for file in stream.path.iterdir():
        store.upload(file, f"corpus/streams/real/{file.name}")
    return REMOTE


def shards_of(stream: MegadocStream) -> list[Path]:
    return sorted(stream.path.glob("*.mds"))


def size_of(paths: Any) -> int:
    return sum(path.stat().st_size for path in paths)


def loader(stream: MegadocStream, rank: int = 0, ranks: int = 1) -> BatchLoader:
    plan = Plan([Source("real", stream.lengths, 1.0)], 64, 8, "whole", seed=1)
    return BatchLoader(
        *(plan, [stream], Mask.megadoc),
        rank=rank,
        world_size=ranks,
        micro_batch_size=None,
        start_step=0,
        stop_step=STEPS,
    )


def tokens(stream: MegadocStream, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    """Of every step, what this rank reads."""
    return [batches[0].input_ids.tolist() for _, batches in loader(stream, rank, ranks)]


def test_samples_are_those_of_the_local_stream(
    local: MegadocStream, remote: str, tmp_path: Path
) -> None:
    wanted = tokens(local)
    for as_needed in (True, False):
        stream = MegadocStream(remote, str(tmp_path / "cache"), as_needed=as_needed)
        assert tokens(stream) == wanted
        for index in (0, SAMPLES // 2, SAMPLES - 1):
            assert stream[index].tokens.tolist() == local[index].tokens.tolist()
        stream.close()
    assert len(shards_of(stream)) == len(shards_of(local)) > 9


@pytest.mark.parametrize("name", ["index.json", "lengths.npy", "manifest.json"])
def test_damage_in_the_cache_is_named(
    name: str, local: MegadocStream, remote: str, tmp_path: Path
) -> None:
    stream = MegadocStream(remote, str(tmp_path / "cache"), as_needed=True)
    stream.close()
    file = stream.path / name
    file.write_bytes(file.read_bytes()[:-9])
    if name == "manifest.json":  # that of the bucket is read
        assert MegadocStream(remote, str(tmp_path / "cache")).manifest == local.manifest
        return
    with pytest.raises(
        DamagedStreamError, match=rf"{name} has \d+ bytes, .*delete that local copy"
    ):
        MegadocStream(remote, str(tmp_path / "cache"))


def test_the_first_step_waits_for_its_samples_and_no_shard(
    local: MegadocStream, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring, may_come = CacheFolder.bring, threading.Event()

    def bring_later(*arguments: Any) -> bool:
        may_come.wait()
        return bring(*arguments)

    monkeypatch.setattr(CacheFolder, "bring", bring_later)
    stream = MegadocStream(remote, str(tmp_path / "cache"), as_needed=True)
    assert stream.remote is not None
    steps = iter(loader(stream))
    _, first = next(steps)
    assert not shards_of(stream)
    assert 0 < stream.remote.downloaded < size_of(shards_of(local))
    may_come.set()
    rest = [batches[0].input_ids.tolist() for _, batches in steps]
    assert [first[0].input_ids.tolist(), *rest] == tokens(local)
    stream.close()


def test_a_closed_stream_brings_no_further_shard(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring, may_come = CacheFolder.bring, threading.Event()

    def bring_later(*arguments: Any) -> bool:
        may_come.wait()
        return bring(*arguments)

    monkeypatch.setattr(CacheFolder, "bring", bring_later)
    before = set(threading.enumerate())
    stream = MegadocStream(remote, str(tmp_path / "cache"), as_needed=True)
    tokens(stream)
    stream.close()
    may_come.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    assert 0 < len(shards_of(stream)) <= DOWNLOADS  # those that had begun


def test_a_cache_that_is_too_small_is_never_overfilled(
    local: MegadocStream, remote: str, tmp_path: Path
) -> None:
    cache, limit = tmp_path / "cache", size_of(shards_of(local)) // 3
    stream = MegadocStream(remote, str(cache), limit, as_needed=True)
    for _ in range(2):
        for (_, batches), wanted in zip(loader(stream), tokens(local), strict=True):
            assert batches[0].input_ids.tolist() == wanted
            assert size_of(cache.rglob("*.mds*")) <= limit
    wait_until_it_is_full(cache, limit)
    with pytest.raises(ValueError, match=rf"cache_limit={limit} bytes has no room for {remote}"):
        MegadocStream(remote, str(cache), limit)
    stream.close()


def wait_until_it_is_full(cache: Path, limit: int) -> None:
    deadline = time.monotonic() + 30
    while size_of(cache.rglob("*.mds")) < limit - 5000:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_stream_that_nobody_reads_makes_room(
    local: MegadocStream, remote: str, tmp_path: Path, object_store: ObjectStore
) -> None:
    cache, limit = tmp_path / "cache", size_of(shards_of(local)) * 3 // 2
    before = MegadocStream(remote, str(cache), limit)
    members = [[length] for length in local.lengths.tolist()]
    upload(
        write_stream(tmp_path / "new" / "real", members, shift=1, shard_bytes=2500), object_store
    )
    with pytest.raises(ValueError, match=r"has no room"):  # the first is still open
        MegadocStream(remote, str(cache), limit)
    assert tokens(before) == tokens(local)
    before.close()
    after = MegadocStream(remote, str(cache), limit)
    assert after.path != before.path
    assert len(shards_of(after)) > len(shards_of(before))
    assert size_of(cache.rglob("*.mds")) <= limit
    assert tokens(after) != tokens(local)
    after.close()


def test_ranks_of_two_machines_bring_every_shard_once_a_machine(
    local: MegadocStream, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[Path] = []
    copy = reading.copy

    def copy_and_count(where: str, target: Path) -> None:
        copied.append(target)
        copy(where, target)

    monkeypatch.setattr(reading, "copy", copy_and_count)

    def run(rank: int) -> list[list[int]]:
        stream = MegadocStream(remote, str(tmp_path / f"machine-{rank // 2}"), as_needed=True)
        found = tokens(stream, rank, 4)
        stream.close()
        return found

    with ThreadPoolExecutor(4) as ranks:
        found = list(ranks.map(run, range(4)))
    assert found == [tokens(local, rank, 4) for rank in range(4)]
    shards = [path for path in copied if ".mds" in path.name]
    assert len(shards) == len(set(shards))


@pytest.mark.slow
def test_a_server_that_goes_away_is_waited_for(
    local: MegadocStream, remote: str, tmp_path: Path, object_store: ObjectStore
) -> None:
    stream = MegadocStream(remote, str(tmp_path / "cache"), 1, as_needed=True)  # nothing is kept
    wanted = tokens(local)
    object_store.stop()
    back = threading.Timer(2, object_store.start)
    back.start()
    assert tokens(stream) == wanted
    back.join()
    stream.close()


def test_what_is_denied_or_missing_is_said_at_once(
    remote: str, tmp_path: Path, object_store: ObjectStore
) -> None:
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/none is not a finished stream"):
        MegadocStream("s3://bucket/none", str(tmp_path))
    with pytest.raises(ValueError, match=r"set data\.cache"):
        MegadocStream(remote)
    object_store.check_credentials()
    with pytest.raises(
        OSError, match=rf"{remote}/manifest.json is denied: .*; check the credentials"
    ):
        MegadocStream(remote, str(tmp_path))


def test_a_stream_that_is_replaced_meanwhile_is_noticed(
    local: MegadocStream, remote: str, tmp_path: Path, object_store: ObjectStore
) -> None:
    stream = MegadocStream(remote, str(tmp_path / "cache"), as_needed=True)
    members = [[length] for length in local.lengths.tolist()]
    other = write_stream(tmp_path / "new" / "real", members, shift=1, shard_bytes=2500)
    upload(other, object_store)
    with pytest.raises(DamagedStreamError, match=r"is damaged, or was built again"):
        read_until_it_fails(stream)
    stream.close()
    again = MegadocStream(remote, str(tmp_path / "cache"), as_needed=True)
    assert tokens(again) == tokens(other)
    again.close()


def read_until_it_fails(stream: MegadocStream) -> None:
    """Shards come in the background: the first samples may be read before one has."""
    for _ in range(100):
        tokens(stream)
