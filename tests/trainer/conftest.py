"""Small MDS streams in the format of ``gen/megadocs/streams.py``."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter

from gen.megadocs.shards import COLUMNS
from trainer.data.format import ContentHash, seal
from trainer.data.mds import MegadocStream

VOCABULARY = 97
EOS = 0

StreamMaker = Callable[..., MegadocStream]


def write_stream(
    folder: Path,
    members: list[list[int]],
    members_are_documents: bool = True,
    *,
    shift: int = 0,
    shard_bytes: int = 1 << 26,
    **changes: Any,
) -> MegadocStream:
    """Write a stream: token p of sample s is 1 + (31 s + p + shift) % 96, the last is EOS."""
    name = folder.name
    content = ContentHash(str(changes.get("tokenizer_sha256", "f" * 64)), members_are_documents)
    with MDSWriter(out=str(folder), columns=COLUMNS, size_limit=shard_bytes) as writer:
        for index, lengths in enumerate(members):
            size = sum(lengths)
            tokens = 1 + (31 * index + shift + np.arange(size)) % (VOCABULARY - 1)
            tokens[-1] = EOS
            row: dict[str, Any] = {
                "id": f"{name}-{index}",
                "tokens": tokens.astype(np.uint32),
                "member_ends": np.cumsum(lengths).astype(np.uint32),
                "member_kinds": np.zeros(len(lengths), dtype=np.uint8),
                "provenance": {"document_id": f"document-{index}"},
            }
            writer.write(row)
            content.add(row["tokens"], row["member_ends"], row["member_kinds"])
    lengths = [sum(sizes) for sizes in members]
    np.save(folder / "lengths.npy", np.array(lengths, dtype=np.uint32))
    flat = [size for sizes in members for size in sizes]
    np.save(folder / "member_lengths.npy", np.array(flat, dtype=np.uint32))
    manifest = {
        "name": name,
        "kind": name,
        "generations": 1,
        "samples": len(members),
        "tokens": sum(lengths),
        "bytes": 4 * sum(lengths),
        "vocab_size": VOCABULARY,
        "eos_id": EOS,
        "tokenizer_sha256": "f" * 64,
        "members_are_documents": members_are_documents,
        "content_sha256": content.hexdigest(),
        **changes,
    }
    seal(folder, manifest)
    return MegadocStream(folder)


@pytest.fixture
def make_stream(tmp_path: Path) -> StreamMaker:
    """:func:`write_stream` by the name of the stream."""

    def make(
        name: str,
        members: list[list[int]],
        members_are_documents: bool = True,
        *,
        root: Path = tmp_path,
        shift: int = 0,
        **changes: Any,
    ) -> MegadocStream:
        folder = root / "streams" / name
        shutil.rmtree(folder, ignore_errors=True)
        return write_stream(folder, members, members_are_documents, shift=shift, **changes)

    return make
