"""The four kinds of stream from documents and generations."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from gen.corpus.documents import Document
from gen.corpus.tokenizer import TokenizerConfig, train_bpe
from gen.generations.by_document import KEY_COLUMNS, Generations
from gen.generations.store import SCHEMA, DocumentPlaces
from gen.megadocs.assembly import Layout, Megadoc, latent, simple, stitched, with_texts
from gen.megadocs.tokens import starts_of
from trainer.data.format import REAL, REPHRASE, THOUGHT

DOCUMENTS = [
    Document(f"d{i}", f"Real text {i}, long enough to be cut into pieces.") for i in range(7)
]


def table(count: int, skip: tuple[str, int] | None = None) -> pa.Table:
    rows = [
        {"document_id": document.id, "index": index, "text": f"{document.id}/{index}"}
        for index in reversed(range(count))  # stored in any order
        for document in DOCUMENTS
        if (document.id, index) != skip
    ]
    rows.append({"document_id": "unknown", "index": 0, "text": "of another corpus"})
    edited = {"document_id": "d0", "index": 0, "text": "of an older text", "text_hash": "another"}
    return pa.Table.from_pylist(
        [*rows, edited],
        pa.schema([(name, SCHEMA.field(name).type) for name in [*KEY_COLUMNS, "text"]]),
    )


def generations_of(rows: pa.Table, count: int, may_lack: bool = False) -> Generations:
    place = DocumentPlaces(DOCUMENTS).of(rows)
    found = Generations(place, rows["index"].to_numpy(), DOCUMENTS, count, "store", may_lack)
    found.texts = rows["text"]
    return found


def megadocs_of(layout: Layout, styles: Sequence[Generations]) -> list[Megadoc]:
    return list(with_texts(layout, DOCUMENTS, styles, "<think>", "</think>"))


def test_stitched_puts_the_real_document_where_it_is_asked_for() -> None:
    generations = generations_of(table(4), 3)
    for place, kinds in (
        ("last", [REPHRASE, REPHRASE, REPHRASE, REAL]),
        ("first", [REAL, REPHRASE, REPHRASE, REPHRASE]),
        ("absent", [REPHRASE, REPHRASE, REPHRASE]),
    ):
        megadocs = megadocs_of(stitched(DOCUMENTS, [generations], place), [generations])
        assert [megadoc.id for megadoc in megadocs] == [document.id for document in DOCUMENTS]
        for megadoc in megadocs:
            assert [member.kind for member in megadoc.members] == kinds
            rephrases = [m.text for m in megadoc.members if m.kind == REPHRASE]
            assert rephrases == [f"{megadoc.id}/{index}" for index in range(3)]


def test_simple_holds_the_same_members_as_stitched_in_a_global_shuffle() -> None:
    generations = generations_of(table(4), 4)
    styles = [generations]
    shuffled = megadocs_of(simple(DOCUMENTS, styles, True, seed=0), styles)
    stitches = megadocs_of(stitched(DOCUMENTS, styles, "last"), styles)
    together = [member.text for megadoc in stitches for member in megadoc.members]
    assert all(len(megadoc.members) == 1 for megadoc in shuffled)
    texts = [megadoc.members[0].text for megadoc in shuffled]
    assert Counter(texts) == Counter(together)
    assert texts != together
    assert len({megadoc.id for megadoc in shuffled}) == len(shuffled)
    assert megadocs_of(simple(DOCUMENTS, styles, True, seed=0), styles) == shuffled
    assert REAL not in simple(DOCUMENTS, styles, False, 0).kind


def test_several_styles_stand_one_after_the_other_or_shuffled() -> None:
    def styled(name: str, count: int) -> Generations:
        rows = table(4).to_pylist()
        for row in rows:
            row["text"] = f"{name} {row['text']}"
        return generations_of(pa.Table.from_pylist(rows, table(4).schema), count)

    styles = [styled("faq", 2), styled("table", 1)]
    styles[1].take(np.array([place != 3 for place in range(len(DOCUMENTS))]))
    megadocs = megadocs_of(stitched(DOCUMENTS, styles, "last"), styles)
    texts = [member.text for member in megadocs[0].members]
    assert texts == ["faq d0/0", "faq d0/1", "table d0/0", DOCUMENTS[0].text]
    assert [member.style for member in megadocs[0].members[:3]] == [0, 0, 1]
    assert [member.text for member in megadocs[3].members[:-1]] == ["faq d3/0", "faq d3/1"]
    shuffled = megadocs_of(stitched(DOCUMENTS, styles, "last", shuffle_seed=1), styles)
    assert [sorted(m.text for m in d.members) for d in shuffled] == [
        sorted(m.text for m in d.members) for d in megadocs
    ]
    assert [d.members for d in shuffled] != [d.members for d in megadocs]
    assert all(d.members[-1].kind == REAL for d in shuffled)
    rows = megadocs_of(simple(DOCUMENTS, styles, True, 0), styles)
    counted = Counter(m.text for d in megadocs for m in d.members)
    assert Counter(m.text for d in rows for m in d.members) == counted


def test_documents_may_lack_what_others_generated() -> None:
    found = generations_of(table(3, skip=("d3", 1)), 3, may_lack=True)
    assert np.diff(stitched(DOCUMENTS, [found], "last").ends).tolist() == [4, 4, 3, 4, 4, 4]
    megadocs = megadocs_of(simple(DOCUMENTS, [found], False, 0), [found])
    texts = {member.text for megadoc in megadocs for member in megadoc.members}
    assert texts == {f"{d.id}/{i}" for d in DOCUMENTS for i in range(3)} - {"d3/1"}


def test_smaller_g_is_a_subset_of_larger_g() -> None:
    def texts(count: int) -> set[str]:
        generations = generations_of(table(8), count)
        megadocs = megadocs_of(stitched(DOCUMENTS, [generations], "absent"), [generations])
        return {member.text for megadoc in megadocs for member in megadoc.members}

    assert texts(4) < texts(8)


def test_latent_keeps_the_whole_document_in_order() -> None:
    tokenizer = train_bpe([d.text for d in DOCUMENTS], TokenizerConfig(vocab_size=300))
    generations = generations_of(table(3), 3)
    layout = latent(
        DOCUMENTS, generations, lambda place: starts_of(tokenizer, [DOCUMENTS[place].text])[0]
    )
    for megadoc, document in zip(megadocs_of(layout, [generations]), DOCUMENTS, strict=True):
        kinds = [member.kind for member in megadoc.members]
        assert kinds == [REAL, THOUGHT, REAL, THOUGHT, REAL, THOUGHT, REAL]
        assert "".join(m.text for m in megadoc.members if m.kind == REAL) == document.text
        assert megadoc.members[1].text == f"<think>{document.id}/0</think>"


def test_a_generation_that_is_there_twice_is_refused() -> None:
    rows = table(4)
    with pytest.raises(ValueError, match=r"store holds generation 3 of 'd0' twice \(1 such"):
        generations_of(pa.concat_tables([rows, rows.slice(0, 1)]), 4)


def test_g_larger_than_generated_is_refused_with_counts() -> None:
    with pytest.raises(ValueError, match=r"7 of 7 documents have fewer than G=9 .* with 8\)"):
        stitched(DOCUMENTS, [generations_of(table(8), 9)], "last")
    gap = generations_of(table(8, skip=("d3", 2)), 4)
    with pytest.raises(ValueError, match=r"1 of 7 documents .* 'd3' with 3"):
        simple(DOCUMENTS, [gap], True, 0)
