"""The tables that context-parallel ranks share among their layers, without other processes."""

import torch

from trainer.config.schema import ModelConfig
from trainer.data.random_stream import random_windows
from trainer.model.llama import KernelBackends
from trainer.parallel.context_parallel import chunk_tiles, chunks_of, split_batch


def test_every_query_of_a_rank_is_in_one_tile_and_every_key_before_it() -> None:
    config = ModelConfig(32, 64, 2, 2, 1)
    whole = random_windows([[100, 1, 60, 200, 90]], 512)
    for rank in range(4):
        batch = split_batch(whole, rank, 4)
        tokens = len(batch.input_ids)
        tables = chunk_tiles(
            KernelBackends("triton"), config, rank, 4, batch.cu_seqlens, batch.max_seqlen, tokens
        )
        assert tables is not None
        for chunk, (rows, columns, tile) in zip(chunks_of(rank, 4), tables, strict=True):
            starts = whole.cu_seqlens[:-1].long()
            seen = []
            for first, count, key_start, diagonal, keys in rows[:-1].tolist():
                for row in range(count):
                    place = chunk * 64 + first + row
                    seen.append(place)
                    if place < whole.tokens:
                        assert key_start == starts[starts <= place].max()
                        assert key_start + diagonal + row == place
                        assert key_start + keys > place
            assert sorted(seen) == list(range(chunk * 64, (chunk + 1) * 64))
            assert int(columns[:, 1].sum()) == 512
            assert tile.q_tile > 0
    assert chunk_tiles(KernelBackends("flash"), config, 0, 4, whole.cu_seqlens, 256, 128) is None
    assert torch.equal(whole.cu_seqlens, split_batch(whole, 0, 4).cu_seqlens)
