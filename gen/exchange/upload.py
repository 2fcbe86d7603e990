"""``generate.py upload=s3://...``: a corpus's streams in an object store, to be trained on there.

mosaicml-streaming's uploader writes; ``train.py data.root=s3://...`` reads. A manifest goes last:
what has one is finished. A folder whose manifest is there already is not sent again.
"""

from __future__ import annotations

from pathlib import Path

from trainer import object_store
from trainer.data.format import MANIFEST


def upload(root: Path, where: str) -> str:
    """Send the tokenizer and every finished stream of ``root``; returns a line for each.

    Args:
        root: corpus folder.
        where: URI of a corpus folder elsewhere, or a local one.

    Raises:
        FileNotFoundError: there are no streams.
        OSError: the store cannot be reached, or not with these credentials.
    """
    streams = sorted(path.parent for path in (root / "streams").glob(f"*/{MANIFEST}"))
    if not streams:
        raise FileNotFoundError(f"{root} holds no streams to upload; build them first")
    lines = []
    for folder in (root / "tokenizer", *streams):
        below = folder.relative_to(root).as_posix()
        there = f"{where.rstrip('/')}/{below}"
        if is_current(f"{there}/{MANIFEST}", (folder / MANIFEST).read_bytes()):
            lines.append(f"{below}: is there already")
        else:
            sent = object_store.send(folder, there, MANIFEST)
            lines.append(f"{below}: {sent / 1e6:,.1f} MB sent")
    return "\n".join([*lines, f"train.py data.root={where} data.cache=FOLDER reads it there"])


def is_current(where: str, written: bytes) -> bool:
    """Whether a manifest elsewhere is this one."""
    try:
        return object_store.read(where) == written
    except FileNotFoundError:
        return False
