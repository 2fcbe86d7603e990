"""The generations of a store by hash of their text, without holding the texts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gen.generations.store import batches_of, texts_of_part
from gen.megadocs.tokens import as_keys, key_of, keys_of_column
from trainer.files import is_whole, replace_file, write_hash

SCHEMA = pa.schema([("high", pa.uint64()), ("low", pa.uint64())])


def keys_of_part(part: Path, kept: Path) -> NDArray[np.uint64]:
    """Hashes of the texts of a store's part: uint64 ``[rows, 2]``.

    Args:
        part: of the store.
        kept: file that remembers them until the part is written again.

    Raises:
        FileNotFoundError: the part is not there.
        ValueError: it is corrupted.
    """
    stat = part.stat()
    state = f"{stat.st_size}/{stat.st_mtime_ns}".encode()
    with contextlib.suppress(pa.ArrowException, OSError):  # damaged or not there: made again
        table = pq.read_table(kept, schema=SCHEMA, page_checksum_verification=True)
        if is_whole(kept) and (pq.read_schema(kept).metadata or {}).get(b"part") == state:
            halves: list[NDArray[np.uint64]] = [table[name].to_numpy() for name in SCHEMA.names]
            return np.stack(halves, axis=1)
    found = [
        keys_of_column(pa.chunked_array([batch["text"]])) for batch in batches_of(part, ["text"])
    ]
    keys: NDArray[np.uint64] = np.concatenate([np.zeros((0, 2), dtype=np.uint64), *found])
    columns = [pa.array(keys[:, half]) for half in range(2)]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(kept) as unfinished:
        pq.write_table(
            pa.table(columns, SCHEMA.with_metadata({"part": state})),
            unfinished,
            compression="none",
            write_page_checksum=True,
        )
        write_hash(kept, unfinished)
    return keys


def keys_of_edited(
    part: Path, rows: NDArray[np.integer[Any]], edit: Callable[[str], str]
) -> NDArray[np.uint64]:
    """Hashes of the texts of some rows once they are edited: uint64 ``[rows, 2]``."""
    return as_keys(key_of(edit(text).encode()) for text in texts_of_part(part, rows))
