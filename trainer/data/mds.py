"""Reading megadoc streams: MDS shards by index, checked when they are opened.

The order of reading is the plan's (``trainer/data/plan.py``).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer import object_store
from trainer.data.format import (
    MANIFEST,
    DamagedStreamError,
    build_again,
    parse_manifest,
    read_manifest,
    verify,
)
from trainer.data.remote import CacheFolder, RemoteShards, bring_all
from trainer.data.shards import ShardFiles, read_index
from trainer.files import SEAL, only_one, replace_file
from trainer.object_store import is_remote

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
        path: the folder, or a remote one (``s3://``, ...) that fsspec or pyarrow can reach.
        cache: local folder for the shards of remote streams; needed only for those.
        cache_limit: bytes that the shards of all streams may take there; None: what the disk holds.
        as_needed: read what is asked for of a remote stream, and not all of it before the first
            sample (``trainer/data/remote.py``).

    Raises:
        FileNotFoundError: the folder holds no finished stream.
        OSError: a remote one cannot be reached, or is denied.
        ValueError: shards, lengths and manifest do not fit together; names the file.
    """

    def __init__(
        self,
        path: str | Path,
        cache: str | None = None,
        cache_limit: int | None = None,
        as_needed: bool = False,
    ) -> None:
        self.remote: RemoteShards | None = None
        self.held: CacheFolder | None = None
        if is_remote(path):
            self.held, content = open_remote(str(path), cache, cache_limit)
            self.path = self.held.path
            shards = read_index(self.path, content["files"])
            if as_needed:
                self.remote = RemoteShards(str(path), self.held, shards)
            else:
                bring_all(str(path), self.held, shards)
        else:
            self.path = Path(path)
            content = read_manifest(self.path)
        self.manifest = StreamManifest.of(content, self.path)
        if self.remote is not None:  # what there is besides shards is verified
            self.files = self.remote.files
        else:
            verify(self.path, content)
            self.files = ShardFiles(self.path, read_index(self.path, content["files"]))
        self.lengths: NDArray[np.int64] = np.load(self.path / "lengths.npy").astype(np.int64)  # [N]
        self.member_lengths: NDArray[np.integer[Any]] = np.load(
            self.path / "member_lengths.npy"
        )  # [M]
        self.places: NDArray[np.int64] | None = None  # int64 [N] in the shards; None: as they are
        self.check_lengths()

    def check_lengths(self) -> None:
        """Raise DamagedStreamError where shards, lengths and manifest were written differently."""
        manifest, samples = self.manifest, len(self.files.ends)
        found = f"{samples} samples in the shards, {len(self.lengths)} in lengths.npy"
        if not len(self.lengths) == samples == manifest.samples:
            problem = f"{found}, {manifest.samples} in {MANIFEST}"
        elif self.lengths.sum() != manifest.tokens:
            problem = f"{self.lengths.sum()} tokens in lengths.npy, {manifest.tokens} in {MANIFEST}"
        elif not self.members_add_up():
            problem = "member_lengths.npy does not add up to lengths.npy"
        else:
            return
        raise DamagedStreamError(f"{self.path}: {problem}; {build_again(self.path)}")

    def members_add_up(self) -> bool:
        """Whether every sample ends where one of its members does."""
        ends, samples = self.member_lengths.cumsum(dtype=np.int64), self.lengths.cumsum()
        if not len(ends) or not len(samples) or ends[-1] != samples[-1]:
            return len(ends) == len(samples) == 0
        return bool((ends[np.searchsorted(ends, samples)] == samples).all())

    def keep_share(self, share: float) -> None:
        """Keep the samples of a share of the documents, as if the stream held no others.

        Which they are is read from all samples; a larger share holds a smaller one.

        Raises:
            ValueError: no document is among them.
        """
        kept = np.array([in_share(self.document_of(index), share) for index in range(len(self))])
        if not kept.any():
            raise ValueError(
                f"data.share={share:g} leaves none of the {len(self)} samples of {self.path}; "
                "make it larger"
            )
        ends = self.member_lengths.cumsum(dtype=np.int64)
        members = kept[np.searchsorted(self.lengths.cumsum(), ends)]
        self.places = np.flatnonzero(kept)
        self.lengths, self.member_lengths = self.lengths[kept], self.member_lengths[members]
        size, tokens = len(self.lengths), int(self.lengths.sum())
        self.manifest = replace(self.manifest, samples=size, tokens=tokens)
        for axis in ("all_member_ends", "all_ends"):
            self.__dict__.pop(axis, None)  # of what it held before

    def document_of(self, index: int) -> str:
        """Id of the document that sample ``index`` comes from."""
        identity: str = self.read_row(index)["provenance"]["document_id"]
        return identity

    def place_of(self, index: int) -> int:
        """Where sample ``index`` lies in the shards."""
        return index if self.places is None else int(self.places[index])

    def __len__(self) -> int:
        return len(self.lengths)

    def close(self) -> None:
        """Of a remote stream: end what still comes of it, and let the cache evict it."""
        if self.remote is not None:
            self.remote.close()
        elif self.held is not None:
            self.held.release()

    def expect(self, documents: Iterable[int]) -> None:
        """Of a remote stream: begin to read samples that will be asked for soon."""
        if self.remote is not None:
            places = (self.place_of(int(index)) for index in documents)
            self.remote.expect(map(self.files.place_of, places))

    def read_row(self, index: int) -> dict[str, Any]:
        """The columns of sample ``index``."""
        shard, place = self.files.place_of(self.place_of(index))
        read = self.files.sample if self.remote is None else self.remote.sample
        return self.files.shards[shard].decode(read(shard, place))

    def read_tokens(
        self,
        out: NDArray[np.uint32],
        places: NDArray[np.int64],
        documents: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> None:
        """Read pieces of samples into ``out`` uint32.

        Args:
            out: token ids.
            places: where each piece goes in it, int64 ``[P]``.
            documents: the samples, int64 ``[P]``.
            starts: first token of each piece in its sample, int64 ``[P]``.
            counts: tokens of each piece, int64 ``[P]``.

        Raises:
            OSError: a remote shard cannot be reached.
            ValueError: a shard is shorter than it was.
        """
        samples = documents if self.places is None else self.places[documents]
        before_end = self.lengths[documents] - starts
        reader = self.files if self.remote is None else self.remote
        reader.read_tokens(out, places, samples, before_end, counts)

    @functools.cached_property
    def all_member_ends(self) -> NDArray[np.int64]:
        """Where every member ends on an axis of all samples, int64 ``[M]``."""
        return self.member_lengths.cumsum(dtype=np.int64)

    @functools.cached_property
    def all_ends(self) -> NDArray[np.int64]:
        """Where every sample ends on that axis, int64 ``[N]``."""
        return self.lengths.cumsum()

    @property
    def has_members(self) -> bool:
        """Whether some sample has several."""
        return len(self.member_lengths) > len(self.lengths)

    def member_ends(self, document: int) -> NDArray[np.int64]:
        """Cumulative member lengths of a sample, int64 ``[M]``."""
        end = self.all_ends[document]
        start = end - self.lengths[document]
        members = np.searchsorted(self.all_member_ends, [start, end], "right")
        ends: NDArray[np.int64] = self.all_member_ends[members[0] : members[1]] - start
        return ends

    def __getitem__(self, index: int) -> Sample:
        """Read sample ``index`` from its shard.

        Raises:
            OSError: a remote shard cannot be reached.
            ValueError: the shard is corrupted or holds token ids outside the vocabulary.
        """
        try:
            row = self.read_row(index)
            tokens = row["tokens"].astype(np.int64)
            member_ends = row["member_ends"].astype(np.int64)
        except (OSError, DamagedStreamError):
            raise
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
        shard, _ = self.files.place_of(self.place_of(index))
        return self.path / self.files.shards[shard].name


def in_share(document_id: str, share: float) -> bool:
    """Whether a document is among a share of all: by a hash that is not that of the split."""
    digest = hashlib.blake2b(f"share/{document_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def read_stream_manifest(path: str | Path) -> StreamManifest:
    """The manifest of a stream without its shards; of a remote one, what lies there now."""
    if not is_remote(path):
        return StreamManifest.of(read_manifest(Path(path)), Path(path))
    return StreamManifest.of(remote_manifest(str(path))[0], Path(path))


def remote_manifest(remote: str) -> tuple[dict[str, Any], bytes]:
    """The manifest of a remote stream as it lies there now, parsed and as bytes.

    Raises:
        FileNotFoundError: there is no finished stream.
        OSError: it cannot be reached, or is denied.
        DamagedStreamError: it is damaged, or that of an older version.
    """
    try:
        written = object_store.read(f"{remote}/{MANIFEST}")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{remote} is not a finished stream (no {MANIFEST}). Build it with generate.py and "
            "upload its folder"
        ) from error
    return parse_manifest(written, f"{remote}/{MANIFEST}", remote), written


def open_remote(
    remote: str, cache: str | None, limit: int | None
) -> tuple[CacheFolder, dict[str, Any]]:
    """The place of a remote stream in the cache, with all of it but its shards, and its manifest.

    The place is named by content: a stream that was built again is another one.

    Raises:
        ValueError: there is no cache, or a file in it is damaged.
    """
    if cache is None:
        raise ValueError(f"{remote} is remote: set data.cache to a local folder for its shards")
    manifest, written = remote_manifest(remote)
    below = f"{remote.split('://', 1)[1]}/{manifest[SEAL][:16]}"
    folder = CacheFolder(Path(cache), below, limit)
    with only_one(folder.path / "download.lock"):  # the ranks and runs of a machine share it
        if not (folder.path / MANIFEST).exists():
            for name in small_files(manifest):
                with replace_file(folder.path / name) as unfinished:
                    object_store.copy(f"{remote}/{name}", unfinished)
            with replace_file(folder.path / MANIFEST) as unfinished:
                unfinished.write_bytes(written)
    verify(folder.path, {"files": small_files(manifest)})
    return folder, manifest


def small_files(manifest: dict[str, Any]) -> dict[str, Any]:
    """What is said of a stream's files besides its shards."""
    return {name: said for name, said in manifest["files"].items() if not name.endswith(".mds")}


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
