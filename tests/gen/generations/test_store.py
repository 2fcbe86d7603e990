"""The generation store: atomic parts, unique keys, refusals."""

import multiprocessing
import operator
import resource
import time
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gen.corpus.documents import Document
from gen.generations.store import Generation, GenerationStore, owns
from gen.prompts import MethodConfig, sibling_seed
from trainer.files import hash_file

DOCUMENTS = [Document(name, "A text.") for name in "abc"]


def row(document: str, index: int) -> Generation:
    return Generation(
        document, "rephrase", index, "text", "m", "v", 1.0, 1.0, 9, 0, "stop", 1, 1, 0, False
    )


def test_what_is_appended_is_done_and_can_be_read(tmp_path: Path) -> None:
    store = GenerationStore(tmp_path)
    store.append([row("a", 0), row("b", 1)], writer=0)
    store.append([row("a", 1)], writer=3)
    assert store.done(DOCUMENTS) == [{0, 1}, {1}, set()]
    assert store.read().num_rows == 3
    assert [part.name for part in store.parts()] == [
        "part-000-000000.parquet",
        "part-003-000000.parquet",
    ]


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    store = GenerationStore(tmp_path)
    store.claim({"model": "a", "max_tokens": 5})
    store.claim({"model": "a", "max_tokens": 5})
    with pytest.raises(ValueError, match="max_tokens: 5 -> 6"):
        store.claim({"model": "a", "max_tokens": 6})


def test_another_wording_is_refused_with_the_place_that_differs(tmp_path: Path) -> None:
    store = GenerationStore(tmp_path)
    long = "Rewrite the following document in the style of an encyclopedia, keeping every fact: "
    store.claim({"prompt": long + "{text}"})
    with pytest.raises(ValueError, match=r"prompt: at character \d+: .*every fact: .* -> .*figure"):
        store.claim({"prompt": long.replace("fact", "figure") + "{text}"})


def test_what_an_older_version_wrote_can_be_gone_on_with(tmp_path: Path) -> None:
    """Without a setting that is kept today, and without today's last column."""
    store = GenerationStore(tmp_path)
    store.claim({"model": "a"})
    store.claim({"model": "a", "vocabulary": "b"})
    store.append([row("a", 0)], 0)
    (part,) = store.parts()
    pq.write_table(pq.read_table(part).drop_columns("text_hash"), part)
    hash_file(part).unlink()
    store.append([replace(row("a", 1), text_hash=DOCUMENTS[0].text_hash)], 0)
    assert store.done(DOCUMENTS) == [{0, 1}, set(), set()]
    store.merge(0, 2)
    assert store.done(DOCUMENTS) == [{0, 1}, set(), set()]


def test_a_deleted_part_is_not_followed_by_one_that_replaces_another(tmp_path: Path) -> None:
    store = GenerationStore(tmp_path)
    for index in range(3):
        store.append([row("a", index)], 0)
    store.parts()[0].unlink()
    store.append([row("a", 3)], 0)
    assert store.done(DOCUMENTS[:1]) == [{1, 2, 3}]


def test_small_parts_are_merged_and_nothing_changes(tmp_path: Path) -> None:
    store = GenerationStore(tmp_path)
    for index in range(5):
        store.append([row("a", index), row("b", index)], 0)
        store.append([row("c", index)], 1)
    before, fingerprint = store.read().to_pylist(), store.fingerprint()
    store.merge(0, 6)
    assert len(store.parts()) == 10  # too few for it
    store.merge(0, 5)
    names = [path.name for path in store.parts()]
    assert names[0] == "part-000-000000-000004.parquet"
    assert len(names) == 1 + 5
    key = operator.itemgetter("document_id", "index")
    assert sorted(store.read().to_pylist(), key=key) == sorted(before, key=key)
    assert store.fingerprint() == fingerprint
    store.append([row("a", 5)], 0)
    assert store.fingerprint() != fingerprint
    assert store.parts()[1].name == "part-000-000005.parquet"
    for index in range(6, 9):
        store.append([row("a", index)], 0)
    store.merge(0, 2)
    assert [path.name for path in store.parts()][:2] == [
        "part-000-000000-000004.parquet",
        "part-000-000005-000008.parquet",
    ]
    assert store.done(DOCUMENTS) == [set(range(9)), set(range(5)), set(range(5))]


@pytest.mark.parametrize("deleted", range(5))
def test_a_merge_that_was_killed_repeats_nothing(tmp_path: Path, deleted: int) -> None:
    """Killed after the merged part was there and some of the small ones were gone."""
    store = GenerationStore(tmp_path)
    for index in range(4):
        store.append([row("a", index)], 0)
    copies = {path.name: path.read_bytes() for path in store.parts()}
    store.merge(0, 4)
    for name, content in list(copies.items())[deleted:]:
        (tmp_path / name).write_bytes(content)
    assert store.read().num_rows == 4
    assert len(store.parts()) == 1
    store.append([row("a", 4)], 0)
    store.merge(0, 4)
    assert sorted(path.name for path in tmp_path.glob("part-*.parquet")) == [
        "part-000-000000-000003.parquet",
        "part-000-000004.parquet",
    ]


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    """A limit on file sizes stands for the disk: the write fails in the middle of a part."""
    store = GenerationStore(tmp_path)
    store.append([row("a", 0)], 0)
    before = store.parts()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not write a part of .* make room"):
            store.append([row("a", index) for index in range(1, 40)], 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.parts() == before
    assert not list(tmp_path.glob(".*"))
    store.append([row("a", 1)], 0)
    assert store.done(DOCUMENTS[:1]) == [{0, 1}]


def hold_lock(folder: Path, ready: Event) -> None:
    with GenerationStore(folder).lock(0, 1):
        ready.set()
        time.sleep(60)


def test_a_second_job_is_refused_and_split_jobs_share(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=hold_lock, args=(tmp_path, ready))
    holder.start()
    try:
        assert ready.wait(60)
        with (
            pytest.raises(ValueError, match="another job is writing"),
            GenerationStore(tmp_path).lock(0, 1),
        ):
            pass
    finally:
        holder.kill()  # which leaves no lock behind
        holder.join()
    with GenerationStore(tmp_path).lock(0, 2), GenerationStore(tmp_path).lock(1, 2):
        for writer, writers in ((0, 2), (1, 2), (0, 1), (2, 4)):
            with (  # a writer twice, all documents, another division
                pytest.raises(ValueError, match="another job is writing"),
                GenerationStore(tmp_path).lock(writer, writers),
            ):
                pass
    with GenerationStore(tmp_path).lock(2, 4), GenerationStore(tmp_path).lock(0, 4):
        pass
    with GenerationStore(tmp_path).lock(0, 1):
        pass


def test_every_document_has_exactly_one_writer() -> None:
    names = [f"document {i}" for i in range(500)]
    owners = [[writer for writer in range(4) if owns(name, writer, 4)] for name in names]
    assert all(len(owner) == 1 for owner in owners)
    assert {owner[0] for owner in owners} == {0, 1, 2, 3}


def test_a_corrupted_part_is_named(tmp_path: Path) -> None:
    store = GenerationStore(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no generations"):
        store.read()
    store.append([row("a", 0)], 0)
    store.parts()[0].write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"part-000-000000\.parquet is corrupted"):
        store.read()


def test_siblings_have_different_seeds_and_the_same_ones_next_time() -> None:
    seeds = [sibling_seed(0, "doc", "rephrase", index) for index in range(32)]
    assert len(set(seeds)) == 32
    assert seeds == [sibling_seed(0, "doc", "rephrase", index) for index in range(32)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sibling_seed(1, "doc", "rephrase", 0) != seeds[0]


def test_prompts_take_documents_with_braces_and_wrong_templates_are_refused() -> None:
    method = MethodConfig(system="s", prompt="Rewrite: {text}")
    messages = method.messages(0, text="f'{prefix}' {text}")
    assert messages[1]["content"] == "Rewrite: f'{prefix}' {text}"
    assert MethodConfig(prompt="Say: {text}").version != method.version
    with pytest.raises(ValueError, match=r"must have \['text'\]"):
        MethodConfig(prompt="{prefix}").check()
    with pytest.raises(ValueError, match="generations=0"):
        MethodConfig(generations=0).check()
    with pytest.raises(ValueError, match=r"name='\.\./elsewhere' names a folder"):
        MethodConfig(name="../elsewhere").check()
    for method in (MethodConfig(temperature=-1.0), MethodConfig(top_p=0.0)):
        with pytest.raises(ValueError, match=r"method\.(temperature|top_p)=\S+ must be"):
            method.check()
