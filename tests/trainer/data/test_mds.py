"""Reading streams: content, and every kind of damage named."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.conftest import StreamMaker
from trainer.data.mds import MegadocStream, check_same_tokenizer, download_stream


def test_samples_come_back(make_stream: StreamMaker) -> None:
    stream = make_stream("real", [[3, 4], [5]])
    sample = stream[0]
    assert sample.id == "real-0"
    assert sample.tokens.tolist() == [1, 2, 3, 4, 5, 6, 0]
    assert sample.member_ends.tolist() == [3, 7]
    assert stream.lengths.tolist() == [7, 5]
    sample.tokens[0] = 9  # a copy, not the shard
    assert stream[0].tokens[0] == 1


def test_an_unfinished_stream_names_its_finished_neighbours(make_stream: StreamMaker) -> None:
    stream = make_stream("real", [[3]])
    with pytest.raises(FileNotFoundError, match=r"simple-g8 is not a finished .*: real\. Build"):
        MegadocStream(stream.path.parent / "simple-g8")


def test_a_truncated_shard_is_named(make_stream: StreamMaker) -> None:
    stream = make_stream("real", [[30]] * 5)
    shard = stream.path / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"shard\.00000\.mds has \d+ bytes, index\.json says"):
        MegadocStream(stream.path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard\.00000\.mds is missing"):
        MegadocStream(stream.path)


def test_a_corrupted_shard_is_named(make_stream: StreamMaker) -> None:
    stream = make_stream("real", [[30]] * 5)
    shard = stream.path / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-150:] = b"\xff" * 150
    shard.write_bytes(content)
    damaged = MegadocStream(stream.path)
    with pytest.raises(ValueError, match=r"shard\.00000\.mds"):
        [damaged[index] for index in range(5)]


def test_tokens_outside_the_vocabulary_are_refused(make_stream: StreamMaker) -> None:
    stream = make_stream("real", [[30]], vocab_size=10)
    with pytest.raises(ValueError, match=r"sample 0 \(real-0\) holds token id 29, outside"):
        stream[0]


def test_lengths_that_do_not_fit_are_refused(make_stream: StreamMaker) -> None:
    stream = make_stream("real", [[3], [4]])
    np.save(stream.path / "lengths.npy", np.array([3], dtype=np.uint32))
    with pytest.raises(ValueError, match=r"2 samples in the shards, 1 in lengths\.npy"):
        MegadocStream(stream.path)


def test_streams_of_different_tokenizers_do_not_mix(make_stream: StreamMaker) -> None:
    one = make_stream("real", [[3]])
    other = make_stream("simple-g1", [[3]], tokenizer_sha256="e" * 64)
    check_same_tokenizer([one, one])
    with pytest.raises(ValueError, match=r"simple-g1 was written with another tokenizer"):
        check_same_tokenizer([one, other])


def test_a_remote_stream_needs_a_cache(make_stream: StreamMaker, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set data\.cache"):
        download_stream("s3://bucket/streams/real", None)


def test_processes_that_share_a_cache_download_every_file_once(
    make_stream: StreamMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_stream("real", [[30]] * 5).path
    fetched = []

    class Store:
        def download(self, remote: str, local: str) -> None:
            if not Path(local).exists():
                time.sleep(0.02)
                shutil.copy(store / Path(remote).name, local)
                fetched.append(Path(remote).name)

    monkeypatch.setattr("streaming.base.storage.download.CloudDownloader.get", lambda _: Store())
    with ThreadPoolExecutor(4) as ranks:
        folders = ranks.map(download_stream, ["s3://bucket/real"] * 4, [str(tmp_path)] * 4)
    assert {len(MegadocStream(folder)) for folder in folders} == {5}
    files = [name for name in fetched if name != "manifest.json"]
    assert len(files) == len(set(files)) == 4
    (store / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"s3://bucket/real was built again since"):
        download_stream("s3://bucket/real", str(tmp_path))


def test_the_real_writer_and_this_reader_agree(corpus_root: Path) -> None:
    for folder in sorted((corpus_root / "streams").iterdir()):
        stream = MegadocStream(folder)
        content = json.loads((folder / "manifest.json").read_text())
        assert sum(len(stream[i].tokens) for i in range(len(stream))) == content["tokens"]
