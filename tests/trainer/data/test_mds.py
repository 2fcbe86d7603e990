"""Reading streams: content, and every kind of damage named."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.conftest import StreamMaker
from tests.trainer.data.test_shards import assert_equal_rows
from trainer.data import format as stream_files
from trainer.data.mds import MegadocStream, check_same_tokenizer
from trainer.files import sha256


def test_samples_come_back(make_stream: StreamMaker) -> None:
    stream = make_stream("real", [[3, 4], [5]])
    sample = stream[0]
    assert sample.id == "real-0"
    assert sample.tokens.tolist() == [1, 2, 3, 4, 5, 6, 0]
    assert sample.member_ends.tolist() == [3, 7]
    assert stream.lengths.tolist() == [7, 5]
    sample.tokens[0] = 9  # a copy, not the shard
    assert stream[0].tokens[0] == 1


def test_a_share_is_the_same_documents_in_every_stream_and_in_a_larger_share(
    make_stream: StreamMaker,
) -> None:
    def kept(share: float) -> tuple[list[str], MegadocStream]:
        names, stream = [], None
        for name, members in (("real", [[5]] * 200), ("stitched-g2", [[3, 2, 4]] * 200)):
            stream = make_stream(name, members)
            whole = [stream[index].tokens.tolist() for index in range(len(stream))]
            stream.keep_share(share)
            names.append([stream.document_of(index) for index in range(len(stream))])
            assert stream.lengths.tolist() == [sum(members[0])] * len(stream)
            assert stream.member_lengths.tolist() == members[0] * len(stream)
            assert (stream.manifest.samples, stream.manifest.tokens) == (
                len(stream),
                sum(members[0]) * len(stream),
            )
            numbers = [int(one.rpartition("-")[2]) for one in names[-1]]
            assert [stream[index].tokens.tolist() for index in range(len(stream))] == [
                whole[number] for number in numbers
            ]
        assert names[0] == names[1]
        assert stream is not None
        return names[0], stream

    quarter, half = kept(0.25)[0], kept(0.5)[0]
    assert set(quarter) < set(half)
    assert 30 < len(quarter) < 70
    assert 75 < len(half) < 125
    with pytest.raises(ValueError, match=r"data.share=1e-09 leaves none of the 200 samples"):
        kept(1e-9)


def test_an_unfinished_stream_names_its_finished_neighbours(make_stream: StreamMaker) -> None:
    stream = make_stream("real", [[3]])
    with pytest.raises(FileNotFoundError, match=r"simple-g8 is not a finished .*: real\. Build"):
        MegadocStream(stream.path.parent / "simple-g8")


def test_a_truncated_shard_is_named(make_stream: StreamMaker) -> None:
    stream = make_stream("real", [[30]] * 5)
    shard = stream.path / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"shard\.00000\.mds has \d+ bytes, manifest\.json says"):
        MegadocStream(stream.path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard\.00000\.mds is missing"):
        MegadocStream(stream.path)


def test_one_flipped_bit_in_any_file_is_found_and_named(make_stream: StreamMaker) -> None:
    stream = make_stream("real", [[20, 10]] * 5)
    generator = random.Random(0)
    files = sorted(stream.path.iterdir())
    assert len(files) == 5
    for file in files:
        intact = file.read_bytes()
        for _ in range(20):
            damaged = bytearray(intact)
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
            file.write_bytes(damaged)
            problem = refusal(stream)
            if problem is None:  # another space, or the same number in other letters
                assert file.name == "manifest.json"
            else:
                assert file.name in problem
                assert "generate.py" in problem
        file.write_bytes(intact)
        MegadocStream(stream.path)


def refusal(stream: MegadocStream) -> str | None:
    """Why the stream cannot be opened; None where it is what it was."""
    try:
        again = MegadocStream(stream.path)
    except ValueError as error:
        return str(error)
    assert again.manifest == stream.manifest
    return None


def test_what_was_verified_is_remembered_until_it_is_written_again(
    make_stream: StreamMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = make_stream("real", [[30]] * 5)
    read: list[Path] = []

    def noted(file: Path) -> str:
        read.append(file)
        return sha256(file)

    monkeypatch.setattr("trainer.data.format.sha256", noted)
    MegadocStream(stream.path)
    assert read == []
    shard = stream.path / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes())
    MegadocStream(stream.path)
    assert shard in read


def test_content_is_identified_by_tokens_and_members_alone(make_stream: StreamMaker) -> None:
    def identity(*args: object, **changes: object) -> str:
        shutil.rmtree(here, ignore_errors=True)
        return make_stream("real", *args, **changes).manifest.content_sha256

    here = make_stream("real", [[3]]).path
    first = identity([[30]] * 5)
    assert identity([[30]] * 5) == first
    assert identity([[30]] * 5, bytes=7) == first
    others = [identity([[10, 20], *[[30]] * 4]), identity([[31], *[[30]] * 4])]
    others.append(identity([[30]] * 5, members_are_documents=False))
    assert len({first, *others}) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 3}, r"2 samples in the shards, 2 in lengths\.npy, 3 in manifest\.json"),
        ({"tokens": 8}, r"7 tokens in lengths\.npy, 8 in manifest\.json"),
    ],
)
def test_counts_that_do_not_fit_are_refused(
    make_stream: StreamMaker, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_stream("real", [[3], [4]], **changes)


def test_members_that_do_not_add_up_are_refused(make_stream: StreamMaker) -> None:
    folder = make_stream("real", [[3], [4]]).path
    np.save(folder / "member_lengths.npy", np.array([4, 3], dtype=np.uint32))
    content = json.loads((folder / "manifest.json").read_text())
    stream_files.seal(folder, content)
    with pytest.raises(ValueError, match=r"member_lengths\.npy does not add up to lengths\.npy"):
        MegadocStream(folder)


def test_a_stream_of_an_older_version_says_so(make_stream: StreamMaker) -> None:
    file = make_stream("real", [[3]]).path / "manifest.json"
    content = json.loads(file.read_text())
    del content["content_seal"]
    file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"manifest\.json holds no hashes: .* older version; build"
    ):
        MegadocStream(file.parent)


def test_tokens_outside_the_vocabulary_are_refused(make_stream: StreamMaker) -> None:
    stream = make_stream("real", [[30]], vocab_size=10)
    with pytest.raises(ValueError, match=r"sample 0 \(real-0\) holds token id 29, outside"):
        stream[0]


def test_streams_of_different_tokenizers_do_not_mix(make_stream: StreamMaker) -> None:
    one = make_stream("real", [[3]])
    other = make_stream("simple-g1", [[3]], tokenizer_sha256="e" * 64)
    check_same_tokenizer([one, one])
    with pytest.raises(ValueError, match=r"simple-g1 was written with another tokenizer"):
        check_same_tokenizer([one, other])


def test_the_real_writer_and_this_reader_agree(corpus_root: Path) -> None:
    for folder in sorted((corpus_root / "streams").iterdir()):
        stream = MegadocStream(folder)
        assert_equal_rows(stream)
        content = json.loads((folder / "manifest.json").read_text())
        assert sum(len(stream[i].tokens) for i in range(len(stream))) == content["tokens"]
