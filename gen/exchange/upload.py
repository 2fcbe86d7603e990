"""``generate.py upload=s3://...``: a corpus's streams in an object store, to be trained on there.

mosaicml-streaming's uploader writes; ``train.py data.root=s3://...`` reads. A manifest goes last:
what has one is finished. A folder whose manifest is there already is not sent again.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from trainer import object_store
from trainer.data.format import MANIFEST

FILES_AT_A_TIME = 8

logger = logging.getLogger(__name__)


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
        sent = send(folder, f"{where.rstrip('/')}/{below}")
        lines.append(f"{below}: {f'{sent / 1e6:,.1f} MB sent' if sent else 'is there already'}")
    return "\n".join([*lines, f"train.py data.root={where} data.cache=FOLDER reads it there"])


def send(folder: Path, where: str) -> int:
    """Send a folder unless it is there; returns the bytes sent.

    Raises:
        OSError: the store cannot be reached, or not with these credentials; names it.
    """
    from streaming.base.storage.upload import CloudUploader  # takes seconds to import

    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    written = (folder / MANIFEST).read_bytes()
    if is_there(f"{where}/{MANIFEST}", written):
        return 0
    logging.getLogger("streaming").setLevel(logging.ERROR)  # it warns of every folder that is there
    try:
        uploader = CloudUploader.get((str(folder), where), keep_local=True, exist_ok=True)
        others = [name for name in files if name != MANIFEST]
        with ThreadPoolExecutor(FILES_AT_A_TIME) as threads:
            done = threads.map(uploader.upload_file, others)
            for _ in tqdm(done, desc=folder.name, total=len(others), unit="file", leave=False):
                pass
        uploader.upload_file(MANIFEST)
    except Exception as error:  # every store's library has its own
        raise OSError(f"upload={where}: {object_store.first_line(error)}") from error
    return sum((folder / name).stat().st_size for name in files)


def is_there(where: str, written: bytes) -> bool:
    """Whether a manifest elsewhere is this one."""
    try:
        return object_store.read(where) == written
    except FileNotFoundError:
        return False
