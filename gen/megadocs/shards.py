"""The shards of a stream, each written by whichever process has a core free.

Importing mosaicml-streaming for its writer costs every process more time and memory than writing
does, so the format, which is a few integers before the bytes, is written here; the library reads
it, in training and in the tests.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen.corpus.documents import Document
from gen.megadocs.assembly import Layout
from gen.megadocs.encoding import Encoding
from gen.megadocs.tokens import IdReader, Spans
from trainer.data.format import REAL, REPHRASE, THOUGHT, ContentHash
from trainer.files import replace_file, sha256, write_sealed

COLUMNS = {
    "id": "str",
    "tokens": "ndarray:uint32",
    "member_ends": "ndarray:uint32",
    "member_kinds": "ndarray:uint8",
    "provenance": "json",
}
STYLES_COLUMN = {"member_styles": "ndarray:uint8"}
AT_ONCE = 2048  # megadocs whose members are known to Python one by one
LARGEST = 1 << 32  # bytes of a shard, whose offsets are uint32


@dataclass(frozen=True)
class Form:
    """What is the same in all samples of a stream."""

    styles: list[str]  # methods of its rephrases, named in the samples where there are several
    end: bytes  # ids after the last member of a megadoc
    between: bytes  # after the others
    opening: bytes  # before a thought
    closing: bytes  # after it
    shard_bytes: int

    @classmethod
    def of(cls, encoding: Encoding, styles: list[str], shard_bytes: int) -> Form:
        ids = (encoding.end, encoding.between, encoding.opening, encoding.closing)
        end, between, opening, closing = (np.array(one, dtype="<u4").tobytes() for one in ids)
        return cls(styles, end, between, opening, closing, shard_bytes)

    @property
    def columns(self) -> dict[str, str]:
        """Names and encodings, in the order in which they are stored."""
        several = STYLES_COLUMN if len(self.styles) > 1 else {}
        return dict(sorted((COLUMNS | several).items()))

    def index_entry(self) -> dict[str, Any]:
        """What stands of every shard in ``index.json``, and in its own head."""
        return {
            "column_encodings": list(self.columns.values()),
            "column_names": list(self.columns),
            "column_sizes": [None] * len(self.columns),
            "compression": None,
            "format": "mds",
            "hashes": ["sha256"],
            "size_limit": self.shard_bytes,
            "version": 2,
        }


@dataclass(frozen=True)
class Members:
    """All members of a stream with their tokens: arrays ``[N]``, and ``[M]`` of the megadocs."""

    layout: Layout
    spans: Spans
    tokens: NDArray[np.int32]  # int32 [N]: ids of each, what stands around its text included
    lengths: NDArray[np.int64]  # int64 [M]: ids of each megadoc
    text_bytes: int

    @classmethod
    def of(cls, layout: Layout, spans: Spans, encoding: Encoding) -> Members:
        thought = layout.kind == THOUGHT
        thoughts = int(thought.sum())
        tokens = spans.count.astype(np.int32)
        text_bytes = int(spans.text_bytes.sum(dtype=np.int64))
        if layout.cuts is not None:
            piece = layout.kind == REAL
            tokens[piece] = layout.cuts[piece, 1] - layout.cuts[piece, 0]
            again = piece & ~layout.first_members()  # the first stands for the whole
            text_bytes -= int(spans.text_bytes[again].sum(dtype=np.int64))
        if thoughts:
            tokens[thought] += len(encoding.opening) + len(encoding.closing)
        tokens += len(encoding.between)
        tokens[layout.ends - 1] += len(encoding.end) - len(encoding.between)
        starts = np.concatenate(([0], layout.ends[:-1]))
        between = len(layout.kind) - len(layout.ends)
        return cls(
            layout,
            spans,
            tokens,
            np.add.reduceat(tokens, starts, dtype=np.int64)
            if len(layout.ends)
            else np.zeros(0, dtype=np.int64),
            text_bytes + thoughts * encoding.thought_bytes + between * encoding.between_bytes,
        )

    def shards(self, form: Form, documents: Sequence[Document]) -> list[range]:
        """The megadocs of each shard: as many as surely fit into its size, one at the least.

        They depend on the samples alone, not on who writes them.
        """
        if not len(self.lengths):
            return []
        ids = np.array([len(encode_basestring_ascii(document.id)) for document in documents])
        names = max(map(len, form.styles), default=0)
        sums = 4 * self.lengths + 120  # in place: as long as all megadocs
        sums += np.diff(self.layout.ends, prepend=np.int32(0)) * np.int32(36 + names)
        sums += (2 * ids.astype(np.int32))[self.layout.document]
        np.cumsum(sums, out=sums)
        head = len(json.dumps(form.index_entry())) + 64
        borders = [0]
        while borders[-1] < len(sums):
            before = sums[borders[-1] - 1] if borders[-1] else 0
            limit = before + form.shard_bytes - head
            borders.append(max(borders[-1] + 1, int(np.searchsorted(sums, limit, "right"))))
        return [range(*pair) for pair in itertools.pairwise(borders)]

    def samples(self, megadocs: range, documents: Sequence[Document]) -> Samples:
        """What a process needs to write some megadocs."""
        layout = self.layout
        first = int(layout.ends[megadocs.start - 1]) if megadocs.start else 0
        here = slice(megadocs.start, megadocs.stop)
        ends = layout.ends[here] - first
        own = slice(first, first + int(ends[-1]))
        return Samples(
            [documents[place].id for place in layout.document[here].tolist()],
            layout.row[here],
            ends,
            layout.kind[own],
            layout.index[own],
            layout.style[own],
            None if layout.cuts is None else layout.cuts[own, :2],
            Spans(*(getattr(self.spans, name)[own] for name in Spans.__dataclass_fields__)),
            self.tokens[own],
        )


@dataclass(frozen=True)
class Samples:
    """Some megadocs in a row: M of N members."""

    document_ids: list[str]
    row: NDArray[np.int32]  # int32 [M]: number behind the id, or -1
    ends: NDArray[np.int32]  # int32 [M]: cumulative, in members
    kind: NDArray[np.uint8]  # uint8 [N]
    index: NDArray[np.int32]  # int32 [N]
    style: NDArray[np.uint8]  # uint8 [N]
    cuts: NDArray[np.int32] | None  # int32 [N, 2]: tokens of pieces
    spans: Spans  # [N]
    tokens: NDArray[np.int32]  # int32 [N]

    def part(self, megadocs: slice) -> Samples:
        """Some of them."""
        first = int(self.ends[megadocs.start - 1]) if megadocs.start else 0
        ends = self.ends[megadocs] - first
        own = slice(first, first + int(ends[-1]))
        return Samples(
            self.document_ids[megadocs],
            self.row[megadocs],
            ends,
            self.kind[own],
            self.index[own],
            self.style[own],
            None if self.cuts is None else self.cuts[own],
            Spans(*(getattr(self.spans, name)[own] for name in Spans.__dataclass_fields__)),
            self.tokens[own],
        )


def encoded(samples: Samples, form: Form, reader: IdReader) -> Iterator[bytes]:
    """The bytes of each sample.

    Raises:
        DamagedTokensError: ids of a text are not what was written.
    """
    for start in range(0, len(samples.ends), AT_ONCE):  # lists take ten times what arrays do
        yield from encoded_part(samples.part(slice(start, start + AT_ONCE)), form, reader)


def encoded_part(samples: Samples, form: Form, reader: IdReader) -> Iterator[bytes]:
    """The bytes of each of a few samples."""
    spans = samples.spans
    texts = zip(
        *(column.tolist() for column in (spans.part, spans.first, spans.count, spans.checksum)),
        strict=True,
    )
    cuts = None if samples.cuts is None else samples.cuts.tolist()
    kinds, indices = samples.kind.tolist(), samples.index.tolist()
    several = len(form.styles) > 1
    marks = np.where(samples.kind == REPHRASE, samples.style + 1, 0).astype(np.uint8)
    names = [f", {json.dumps(name)}" if several else "" for name in (None, *form.styles)]
    marked = marks.tolist() if several else [0] * len(kinds)
    sums = samples.tokens.cumsum(dtype=np.int64)
    head = struct.Struct(f"<{len(form.columns)}I")
    start = passed = 0
    for document_id, row, end in zip(
        samples.document_ids, samples.row.tolist(), samples.ends.tolist(), strict=True
    ):
        pieces = []
        whole = b""
        for member in range(start, end):
            text = next(texts)
            kind = kinds[member]
            if cuts is not None and kind == REAL:
                if member == start:
                    whole = reader.read(*text)
                first, last = cuts[member]
                pieces.append(whole[4 * first : 4 * last])
            elif kind == THOUGHT:
                pieces += (form.opening, reader.read(*text), form.closing)
            else:
                pieces.append(reader.read(*text))
            pieces.append(form.between)
        pieces[-1] = form.end
        tokens = b"".join(pieces)
        ends = (sums[start:end] - passed).astype("<u4").tobytes()
        passed += len(tokens) >> 2
        quoted = encode_basestring_ascii(document_id)
        members = ", ".join(
            [f"[{kinds[m]}, {indices[m]}{names[marked[m]]}]" for m in range(start, end)]
        )
        count = shape_of(end - start)
        data = [
            (document_id if row < 0 else f"{document_id}#{row}").encode(),
            count + ends,
            count + samples.kind[start:end].tobytes(),
            f'{{"document_id": {quoted}, "members": [{members}]}}'.encode(),
            shape_of(len(tokens) >> 2) + tokens,
        ]
        if several:
            data.insert(3, count + marks[start:end].tobytes())
        yield head.pack(*map(len, data)) + b"".join(data)
        start = end


def shape_of(values: int) -> bytes:
    """What stands before the values of an array of one dimension."""
    for code, width in enumerate((1, 2, 4)):
        if values < 1 << 8 * width:
            return bytes([1 << 2 | code]) + values.to_bytes(width, "little")
    raise ValueError(f"a megadoc of {values:,} tokens is larger than a shard can be")


def write_shard(
    path: Path, entry_path: Path, samples: Samples, form: Form, parts: Sequence[Path]
) -> None:
    """Write one shard, then what ``index.json`` says of it; done already where that is there.

    Raises:
        ValueError: one megadoc is larger than a shard can be.
        OSError: the disk is full; nothing half-written stays.
    """
    if entry_path.exists():
        return
    settings = form.index_entry()
    text = json.dumps(settings, sort_keys=True).encode()
    count = len(samples.ends)
    begin = 4 + 4 * (count + 1) + len(text)
    sizes = [begin]
    reader = IdReader(parts)
    try:
        with replace_file(path) as unfinished, unfinished.open("wb") as file:
            file.seek(begin)
            for row in encoded(samples, form, reader):  # all in memory would be a shard a process
                file.write(row)
                sizes.append(len(row))
            offsets = np.array(sizes, dtype=np.int64).cumsum()
            if offsets[-1] >= LARGEST:
                raise ValueError(
                    f"a megadoc of {samples.document_ids[0]!r} makes a shard of {offsets[-1]:,} "
                    f"bytes; a shard holds {LARGEST:,}: leave long documents out with "
                    "corpus.max_characters"
                )
            file.seek(0)
            file.write(struct.pack("<I", count) + offsets.astype("<u4").tobytes() + text)
            file.flush()
            digest = sha256(unfinished)
    finally:
        reader.close()
    described = {
        "basename": path.name,
        "bytes": int(offsets[-1]),
        "hashes": {"sha256": digest},
    }
    entry = {**settings, "raw_data": described, "samples": count, "zip_data": None}
    write_sealed(entry_path, entry)


def read_back(path: Path, columns: Sequence[str], content: ContentHash) -> str:
    """Feed the samples of a shard to a stream's hash, some at a time; returns the file's own."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        samples = int(np.frombuffer(file.read(4), "<u4")[0])
        starts = np.frombuffer(file.read(4 * (samples + 1)), "<u4").astype(np.int64)
        file.seek(0)
        digest.update(file.read(int(starts[0])))
        for first in range(0, samples, AT_ONCE):
            here = starts[first : first + AT_ONCE + 1]
            data = file.read(int(here[-1] - here[0]))
            digest.update(data)
            add_content(content, data, here - here[0], columns)
        digest.update(file.read())
    return digest.hexdigest()


def add_content(
    content: ContentHash, samples: bytes, offsets: NDArray[np.int64], columns: Sequence[str]
) -> None:
    """Feed some samples to a stream's hash.

    Args:
        content: of the stream.
        samples: one after the other, as a shard holds them.
        offsets: where each begins, and the last ends: int64 ``[samples + 1]``.
        columns: names, in the order in which they are stored.
    """
    data = np.frombuffer(samples, np.uint8)
    head = 4 * len(columns)
    sizes = data[offsets[:-1, None] + np.arange(head)].view("<u4").astype(np.int64)
    ends = offsets[:-1, None] + head + sizes.cumsum(axis=1)
    first: dict[str, list[int]] = {}
    last: dict[str, list[int]] = {}
    for name in ("tokens", "member_ends", "member_kinds"):
        column = list(columns).index(name)
        place = ends[:, column] - sizes[:, column]
        first[name] = (place + 1 + (1 << (data[place] & 3).astype(np.int64))).tolist()
        last[name] = ends[:, column].tolist()
    view = memoryview(samples)
    for sample in range(len(offsets) - 1):
        content.add_bytes(
            *(
                view[first[name][sample] : last[name][sample]]
                for name in ("tokens", "member_ends", "member_kinds")
            )
        )
