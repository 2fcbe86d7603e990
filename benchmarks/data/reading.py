"""From streams to batches: the plan of large corpora, and how long a step waits for its data."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config.schema import Mask
from trainer.data.plan import Plan, Source

RATE = 350_000  # tokens a second that the model of one rank would read
RANK_TOKENS = 32_768  # of a rank in a step
RANKS = 8
BATCH_TOKENS = 1 << 20  # of the plan's steps
WALKED = 2000  # batches
# Documents of the base stream and of the synthetic one, mean tokens of each.
PLANS = {
    "the paper's run": ((164_000, 1240), (5_200_000, 711)),
    "ten billion tokens": ((600_000, 500), (20_000_000, 500)),
}


def lognormal_lengths(documents: int, mean: int, seed: int) -> NDArray[np.int64]:
    """Lengths as a web corpus has them, int64 ``[documents]``."""
    spread = 1.1
    generator = np.random.default_rng(seed)
    lengths = generator.lognormal(np.log(mean) - spread**2 / 2, spread, documents)
    return np.clip(lengths, 1, 60_000).astype(np.int64)


def plan_of(name: str) -> Plan:
    """The plan of a run at 4,096 tokens, a quarter of what is read being real."""
    real, synthetic = (lognormal_lengths(*size, seed) for seed, size in enumerate(PLANS[name]))
    sources = [Source("real", real, 0.25), Source("simple", synthetic, 0.75)]
    return Plan(sources, 4096, BATCH_TOKENS // 4096, "whole", 0)


def plan_costs(root: Path, name: str) -> dict[str, Any]:
    """CPU seconds from lengths to the first batch, of the batches after it, and of resuming."""
    plan = plan_of(name)
    tokens = plan.source_tokens[1]
    began = time.process_time()
    plan.hash()
    plan.steps(8)
    plan.density()
    plan.windows(0)
    first = time.process_time() - began
    each = []
    for step in range(1, WALKED):
        began = time.process_time()
        plan.windows(step)
        each.append(time.process_time() - began)
    position = plan.position(WALKED)
    resumed = plan_of(name)
    began = time.process_time()
    resumed.hash()
    resumed.resume(position)
    resumed.windows(WALKED)
    return {
        "documents": len(plan.sources[1].lengths),
        "tokens": tokens,
        "first_batch_cpu_seconds": round(first, 2),
        "milliseconds_a_batch": round(1e3 * float(np.mean(each)), 3),
        "slowest_batch_milliseconds": round(1e3 * max(each), 1),  # packs a part of an epoch
        "epoch_cpu_seconds": round(float(np.mean(each)) * tokens / 0.75 / BATCH_TOKENS, 1),
        "resumed_first_batch_cpu_seconds": round(time.process_time() - began, 2),
    }


def our_steps(stream: Path, context: int, rank: int, ranks: int) -> Iterator[int]:
    """Tokens of each of this rank's steps, read as ``train.py`` reads them."""
    from trainer.data.batches import BatchLoader
    from trainer.data.mds import MegadocStream

    opened = MegadocStream(stream)
    lengths = opened.lengths
    plan = Plan([Source("one", lengths, 1.0)], context, ranks * RANK_TOKENS // context, "whole", 0)
    loader = BatchLoader(
        plan,
        [opened],
        Mask.megadoc,
        rank=rank,
        world_size=ranks,
        micro_batch_size=None,
        start_step=0,
        stop_step=plan.steps(1000),
    )
    for _, batches in loader:
        yield sum(batch.tokens for batch in batches)


def streaming_steps(stream: Path, context: int, rank: int, ranks: int) -> Iterator[int]:
    """The same by ``StreamingDataset``: samples on one axis, cut at a step's tokens, no borders."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(stream), shuffle=True, batch_size=1, replication=None)
    waiting: list[NDArray[np.integer[Any]]] = []
    tokens = 0
    while True:
        for sample in dataset:
            waiting.append(sample["tokens"])
            tokens += len(waiting[-1])
            while tokens >= RANK_TOKENS:
                axis = np.concatenate(waiting).astype(np.int64)
                waiting, tokens = [axis[RANK_TOKENS:]], tokens - RANK_TOKENS
                yield RANK_TOKENS


READERS = {"ours": our_steps, "StreamingDataset": streaming_steps}


def train_without_a_model(
    reader: str,
    stream: Path,
    context: int,
    rank: int,
    ranks: int,
    port: int,
    seconds: float,
    sender: Any,
) -> None:
    """One rank: takes its steps' data, and for each sleeps as long as a model would compute."""
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.distributed.init_process_group("gloo")
    steps = READERS[reader](stream, context, rank, ranks)
    next(steps)
    torch.distributed.barrier()  # all are warm
    waited = computed = 0.0
    cpu = time.process_time()
    tokens = 0
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        asked = time.monotonic()
        found = next(steps)
        waited += time.monotonic() - asked
        tokens += found
        computed += found / RATE
        time.sleep(max(0.0, began + waited + computed - time.monotonic()))
    sender.send((waited, computed, time.process_time() - cpu, tokens))
    torch.distributed.barrier()
    os._exit(0)  # StreamingDataset's threads would be waited for


def loading_share(
    reader: str, stream: Path, context: int, seconds: float, ranks: int = RANKS
) -> dict[str, Any]:
    """What the ranks of a machine wait for data, of the time of their steps."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    spawn = get_context("spawn")
    ends = [spawn.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        spawn.Process(
            target=train_without_a_model,
            args=(reader, stream, context, rank, ranks, port, seconds, ends[rank][1]),
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for _, sender in ends:
        sender.close()
    found = np.array([receiver.recv() for receiver, _ in ends])  # [ranks, 4]
    for process in processes:
        process.join()
    waited, computed, cpu, tokens = found.sum(0).tolist()
    return {
        "share_waited": waited / (waited + computed),
        "worst_rank": float((found[:, 0] / (found[:, 0] + found[:, 1])).max()),
        "steps": int(tokens // RANK_TOKENS),
        "tokens_per_cpu_second": round(tokens / cpu),
    }
