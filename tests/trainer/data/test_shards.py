"""Samples of shards: what mosaicml-streaming reads, and pieces of it."""

import numpy as np
import pytest
from streaming import LocalDataset

from tests.trainer.conftest import StreamMaker
from trainer.data import shards
from trainer.data.mds import MegadocStream

MEMBERS = [[n % 7 + 2, n % 5 + 3] if n % 3 else [70_000] for n in range(40)]


def assert_equal_rows(stream: MegadocStream) -> None:
    """Every row is the one that mosaicml-streaming reads."""
    theirs = LocalDataset(str(stream.path))
    assert len(stream) == len(theirs) > 0
    for index in range(len(stream)):
        row, wanted = stream.read_row(index), theirs[index]
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            assert type(row[name]) is type(value)
            if isinstance(value, np.ndarray):
                assert row[name].dtype == value.dtype
            assert np.array_equal(row[name], value)
        assert stream.member_ends(index).tolist() == wanted["member_ends"].tolist()


def test_rows_are_those_that_mosaicml_streaming_reads(make_stream: StreamMaker) -> None:
    stream = make_stream("real", MEMBERS, shard_bytes=300_000)
    assert_equal_rows(stream)
    assert len(stream.files.shards) > 9


def pieces_of(stream: MegadocStream, rows: list[tuple[int, int, int]]) -> list[list[int]]:
    """Tokens of (sample, first token, tokens), read last to first into one array."""
    samples, starts, counts = np.array(rows).T
    places = counts[::-1].cumsum()[::-1] - counts
    out = np.full(int(counts.sum()), 2**32 - 1, dtype=np.uint32)
    stream.read_tokens(out, places, samples, starts, counts)
    return [out[p : p + n].tolist() for p, n in zip(places, counts, strict=True)]


def test_pieces_are_cut_from_their_samples(
    make_stream: StreamMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = make_stream("real", MEMBERS, shard_bytes=300_000)
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    generator = np.random.default_rng(0)
    rows = []
    for sample in generator.permutation(np.repeat(np.arange(len(stream)), 3)).tolist():
        start = int(generator.integers(stream.lengths[sample]))
        rows.append((sample, start, int(generator.integers(1, stream.lengths[sample] - start + 1))))
    wanted = [
        stream[sample].tokens[start : start + count].tolist() for sample, start, count in rows
    ]
    assert pieces_of(stream, rows) == wanted
    assert len(stream.files.files) == 2
    stream.keep_share(0.5)
    assert pieces_of(stream, [(0, 0, 2)]) == [stream[0].tokens[:2].tolist()]


def test_a_shard_that_is_cut_while_it_is_read_is_named(make_stream: StreamMaker) -> None:
    stream = make_stream("real", MEMBERS, shard_bytes=300_000)
    last = len(stream) - 1
    file = stream.shard_of(last)
    with file.open("r+b") as shard:
        shard.truncate(file.stat().st_size - 3)
    with pytest.raises(ValueError, match=rf"{file.name} ends before byte \d+: it was truncated"):
        pieces_of(stream, [(last, 0, int(stream.lengths[last]))])
    with pytest.raises(ValueError, match=rf"{file.name} is corrupted at sample {last}"):
        stream[last]
    with pytest.raises(IndexError, match=r"has 40 samples and none at 40"):
        stream.read_row(40)


def test_an_index_of_other_shards_is_refused(make_stream: StreamMaker) -> None:
    folder = make_stream("real", [[3]]).path
    file = folder / "index.json"
    for change in (("mds", "json"), ("ndarray:uint32", "ndarray:int32"), ("shard.00000", "other")):
        intact = file.read_text()
        file.write_text(intact.replace(*change))
        with pytest.raises(
            ValueError, match=r"index\.json tells of a shard that holds no megadocs"
        ):
            shards.read_index(folder, {"shard.00000.mds": {"sha256": ""}})
        file.write_text(intact)
    assert shards.read_index(folder, {"shard.00000.mds": {"sha256": ""}})[0].samples == 1
