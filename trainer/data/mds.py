"""Reading megadoc streams: MDS shards by index, checked when they are opened.

mosaicml-streaming gives the format and the downloads; the order of reading is the plan's
(``trainer/data/plan.py``). This is the only module of the trainer that imports it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.format import (
    MANIFEST,
    DamagedStreamError,
    build_again,
    read_manifest,
    verify,
)
from trainer.files import only_one

if TYPE_CHECKING:
    from streaming import LocalDataset
    from streaming.base.storage.download import CloudDownloader


NO_DEFAULT = (MISSING, MISSING)  # of a dataclass's field


@dataclass(frozen=True)
class StreamManifest:
    """The part of a stream's ``manifest.json`` that training needs."""

    name: str  # folder name, such as stitched-g8
    kind: str  # real, val, simple, stitched or latent
    generations: int
    samples: int
    tokens: int
    bytes: int  # UTF-8 length of all text, for losses in bits per byte
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    members_are_documents: bool  # False: a megadoc is one text, mask=document does not cut it
    content_sha256: str  # identity of tokens, members and their order
    # methods of its rephrases where there are several
    styles: list[str] = field(default_factory=list)
    # held-out: share of its documents that have a near-duplicate in training; None: not known
    near_duplicates: float | None = None
    # of megadocs: where the real document stands (last, first, absent); None: nothing to place
    real_document: str | None = None

    @classmethod
    def of(cls, content: dict[str, Any], folder: Path) -> StreamManifest:
        """From the whole manifest of ``folder``.

        Raises:
            DamagedStreamError: it lacks something.
        """
        present = [one for one in fields(cls) if one.name in content]
        optional = [one for one in fields(cls) if (one.default, one.default_factory) != NO_DEFAULT]
        known = {one.name for one in (*present, *optional)}
        if missing := [one.name for one in fields(cls) if one.name not in known]:
            raise DamagedStreamError(
                f"{folder / MANIFEST} lacks {', '.join(missing)}; {build_again(folder)}"
            )
        return cls(**{one.name: content[one.name] for one in present})


@dataclass(frozen=True)
class Sample:
    """One megadoc or document."""

    id: str
    tokens: NDArray[np.int64]  # int64 [L]
    member_ends: NDArray[np.int64]  # int64 [M], cumulative; the last is L
    member_kinds: NDArray[np.uint8]  # uint8 [M]: 0 real, 1 rephrase, 2 thought
    # uint8 [M]: 0 for none, else 1 + the place in the manifest's styles; None: there is one style
    member_styles: NDArray[np.uint8] | None = None


class MegadocStream:
    """A stream folder written by ``gen/megadocs/streams.py``, read by index.

    Args:
        path: the folder, or a remote one (``s3://``, ...) that mosaicml-streaming can reach.
        cache: local folder for a remote stream; needed only then.

    Raises:
        FileNotFoundError: the folder holds no finished stream.
        ValueError: shards, lengths and manifest do not fit together; names the file.
    """

    def __init__(self, path: str | Path, cache: str | None = None) -> None:
        if "://" in str(path):
            path = download_stream(str(path), cache)
        self.path = Path(path)
        content = read_manifest(self.path)
        self.manifest = StreamManifest.of(content, self.path)
        verify(self.path, content)
        self.lengths: NDArray[np.int64] = np.load(self.path / "lengths.npy").astype(np.int64)  # [N]
        self.member_lengths: NDArray[np.integer[Any]] = np.load(
            self.path / "member_lengths.npy"
        )  # [M]
        self.dataset = open_shards(self.path)
        self.check_lengths()

    def check_lengths(self) -> None:
        """Raise DamagedStreamError where shards, lengths and manifest were written differently."""
        manifest = self.manifest
        found = f"{len(self.dataset)} samples in the shards, {len(self.lengths)} in lengths.npy"
        if not len(self.lengths) == len(self.dataset) == manifest.samples:
            problem = f"{found}, {manifest.samples} in {MANIFEST}"
        elif self.lengths.sum() != manifest.tokens:
            problem = f"{self.lengths.sum()} tokens in lengths.npy, {manifest.tokens} in {MANIFEST}"
        elif not np.isin(self.lengths.cumsum(), self.member_lengths.cumsum(dtype=np.int64)).all():
            problem = "member_lengths.npy does not add up to lengths.npy"
        else:
            return
        raise DamagedStreamError(f"{self.path}: {problem}; {build_again(self.path)}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        """Read sample ``index`` from its shard.

        Raises:
            ValueError: the shard is corrupted or holds token ids outside the vocabulary.
        """
        try:
            row = self.dataset[index]
            tokens = row["tokens"].astype(np.int64)
            member_ends = row["member_ends"].astype(np.int64)
        except Exception as error:  # whatever the decoder stumbles over
            raise ValueError(
                f"{self.shard_of(index)} is corrupted at sample {index}: {error!r}; "
                f"{build_again(self.path)}"
            ) from error
        if len(tokens) != self.lengths[index] or member_ends[-1] != len(tokens):
            raise ValueError(
                f"{self.shard_of(index)} is corrupted: sample {index} has {len(tokens)} tokens, "
                f"lengths.npy says {self.lengths[index]}; {build_again(self.path)}"
            )
        if tokens.max() >= self.manifest.vocab_size:
            raise ValueError(
                f"{self.shard_of(index)}: sample {index} ({row['id']}) holds token id "
                f"{tokens.max()}, outside the vocabulary of {self.manifest.vocab_size}; build "
                f"{self.path} again with the tokenizer it is used with"
            )
        styles = row["member_styles"] if self.manifest.styles else None
        return Sample(row["id"], tokens, member_ends, row["member_kinds"], styles)

    def shard_of(self, index: int) -> Path:
        """The shard file that holds sample ``index``."""
        shard, _ = self.dataset.spanner[index]
        name: str = shard_files(self.path)[shard]["basename"]
        return self.path / name


def open_shards(path: Path) -> LocalDataset:
    """The MDS reader of a folder."""
    from streaming import LocalDataset  # takes seconds to import

    return LocalDataset(str(path))


def read_stream_manifest(path: str | Path, cache: str | None = None) -> StreamManifest:
    """The manifest of a stream without its shards; of a remote one, what lies there now."""
    if "://" not in str(path):
        return StreamManifest.of(read_manifest(Path(path)), Path(path))
    from streaming.base.storage.download import CloudDownloader

    local = cache_folder(str(path), cache) / "newest"
    local.mkdir(parents=True, exist_ok=True)
    with only_one(local / "download.lock"):
        (local / MANIFEST).unlink(missing_ok=True)
        CloudDownloader.get(str(path)).download(f"{path}/{MANIFEST}", str(local / MANIFEST))
        return StreamManifest.of(read_manifest(local), local)


def cache_folder(remote: str, cache: str | None) -> Path:
    """Where a remote stream lies on this machine."""
    if cache is None:
        raise ValueError(f"{remote} is remote: set data.cache to a local folder for its shards")
    return Path(cache) / remote.split("://", 1)[1]


def check_same_manifest(downloader: CloudDownloader, remote: str, local: Path) -> None:
    """Raise ValueError where ``local`` holds a stream that ``remote`` has since replaced."""
    kept, newest = local / "manifest.json", local / "manifest.json.newest"
    if not kept.exists():
        return
    newest.unlink(missing_ok=True)
    downloader.download(f"{remote}/manifest.json", str(newest))
    if newest.read_bytes() != kept.read_bytes():
        raise ValueError(
            f"{remote} was built again since it was downloaded to {local}; delete that folder, or "
            "set data.cache to another"
        )


def shard_files(path: Path) -> list[dict[str, Any]]:
    """Name and size of every shard, from the index."""
    shards = json.loads((path / "index.json").read_text())["shards"]
    return [shard["raw_data"] for shard in shards]


def check_same_tokenizer(streams: Sequence[MegadocStream]) -> None:
    """Raise ValueError where two streams were written with different tokenizers."""
    first = streams[0]
    for other in streams[1:]:
        if other.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
            raise ValueError(
                f"{other.path} was written with another tokenizer "
                f"({other.manifest.tokenizer_sha256[:12]}) than {first.path} "
                f"({first.manifest.tokenizer_sha256[:12]}); build both again with one tokenizer"
            )


def download_stream(remote: str, cache: str | None) -> Path:
    """Bring a remote stream into ``cache`` and return its local folder."""
    local = cache_folder(remote, cache)
    from streaming.base.storage.download import CloudDownloader

    local.mkdir(parents=True, exist_ok=True)
    downloader = CloudDownloader.get(remote)

    def fetch(name: str) -> None:
        downloader.download(f"{remote}/{name}", str(local / name))

    with only_one(local / "download.lock"):  # the ranks and runs of a machine share its cache
        check_same_manifest(downloader, remote, local)
        for name in ("index.json", "lengths.npy", "member_lengths.npy"):
            fetch(name)
        for shard in shard_files(local):
            fetch(shard["basename"])
        fetch("manifest.json")  # last: a folder without it is unfinished
    return local
