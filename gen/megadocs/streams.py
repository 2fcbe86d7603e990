"""Megadocs become MDS streams: one megadoc a sample, a manifest beside the shards.

A stream is built under a hidden name and renamed when it is complete, so a folder with a
``manifest.json`` is finished. Whoever is killed leaves whole shards behind, which are kept; the
samples, their order and their shards do not depend on how many processes and machines wrote them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gen.corpus.documents import Document
from gen.corpus.near_duplicates import share_in
from gen.corpus.tokenizer import TokenizerManifest
from gen.generations.by_document import Generations
from gen.generations.store import GenerationStore
from gen.megadocs.assembly import Layout, latent, real_documents, simple, stitched
from gen.megadocs.config import StreamConfig
from gen.megadocs.encoding import Encoding
from gen.megadocs.missing import Missing
from gen.megadocs.selection import choose_generations, describe_judged
from gen.megadocs.shards import Form, Members, Samples, read_back, write_shard
from gen.megadocs.tokenizing import document_starts, tokenized
from gen.megadocs.tokens import DamagedTokensError
from gen.quality.gates import QualityConfig
from gen.work import Unit, Work
from trainer.data import format
from trainer.data.format import (
    MANIFEST,
    REAL,
    SYNTHETIC,
    ContentHash,
    DamagedStreamError,
    build_again,
    read_manifest,
    seal,
    verify,
)
from trainer.files import only_one, read_object, read_sealed, sync

logger = logging.getLogger(__name__)

FORMAT = 3  # of the samples and the manifest; a change rebuilds the streams
PLAIN = ("rephrase", "latent")  # methods that streams do not name: the paper's


def name_of(
    kind: str, method: str, generations: int, config: StreamConfig, by_loss: bool = False
) -> str:
    """Folder name: ``real``, ``val``, ``stitched-g8``, ``stitched-g8-faq-real-first``, ...

    The G in it counts all generations of a document: ``stitched-g2-faq+table`` has one a style.
    """
    styles = config.styles(kind, method)
    style = "" if len(styles) == 1 and styles[0] in PLAIN else "+".join(styles)
    return format.stream_name(kind, generations * len(styles), style, config.real_document, by_loss)


def build_stream(
    kind: str,
    method: str,
    generations: int,
    documents: list[Document],
    documents_hash: str,
    tokenizer: Tokenizer,
    vocabulary: TokenizerManifest,
    config: StreamConfig,
    quality: QualityConfig,
    root: Path,
    work: Work | None = None,
    allotted: NDArray[np.int64] | None = None,
) -> dict[str, Any]:
    """Write ``root/streams/<name>`` unless it is current.

    Args:
        kind: ``real``, ``val``, ``simple``, ``stitched`` or ``latent``.
        method: whose generations, where ``config.methods`` names none; ignored for ``real`` and
            ``val``.
        generations: G of each method; ignored for ``real`` and ``val``.
        documents: training documents (``val``: the held-out ones) in corpus order.
        documents_hash: identity of those documents.
        tokenizer: of the corpus.
        vocabulary: its manifest.
        config: separators, order, shards.
        quality: which generations are left out.
        root: corpus folder.
        work: processes that do it; None: as the config says.
        allotted: G of each document where a model's loss decides it, ``generations`` on the mean:
            int64 ``[documents]``; ignored for ``real`` and ``val``.

    Returns:
        The manifest.

    Raises:
        ValueError: G is larger than what was generated, or an option is unknown.
        OSError: the disk is full; what is whole is kept, nothing half-written is.
    """
    config.check()
    if kind not in SYNTHETIC:
        allotted = None
    name = name_of(kind, method, generations, config, allotted is not None)
    folder = root / "streams" / name
    styles = config.styles(kind, method)
    stores = [
        GenerationStore.of_method(root, style, generations, kind == "latent") for style in styles
    ]
    identity = identity_of(
        kind, styles, stores, generations, documents_hash, vocabulary, config, quality, root
    )
    if allotted is not None:
        identity["allotted"] = hashlib.sha256(allotted.astype("<i8").tobytes()).hexdigest()[:16]
    config_hash = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    if (current := current_manifest(folder, config_hash)) is not None:
        for known in current.get("missing", []):
            Missing(**known).check(config.missing, config.missing_share)
        logger.info(f"{folder}: up to date")
        return current
    with contextlib.ExitStack() as own:
        if work is None:
            work = own.enter_context(Work(config.processes, config.writer, config.writers))
        chosen, judged, lacking = choose_generations(
            stores,
            generations,
            documents,
            documents_hash,
            config,
            quality,
            tokenizer if kind == "latent" else None,
            allotted,
            work,
        )
        description = {
            **identity,
            "name": name,
            "judged": judged,
            "missing": [asdict(missing) for missing in lacking],
            "styles": styles if len(styles) > 1 else [],
            "vocab_size": vocabulary.vocab_size,
            "eos_id": vocabulary.eos_id,
            "members_are_documents": kind != "latent",
            "real_document": config.real_document if kind in ("simple", "stitched") else None,
            "config_hash": config_hash,
        }
        stream = Stream(folder, description, documents, chosen, tokenizer, config, root)
        try:
            manifest = stream.build(work)
        except OSError as error:
            raise OSError(
                f"could not write the stream {folder}: {error}; nothing half-written was left, "
                "make room and run the same command again"
            ) from error
    logger.info(
        f"{folder}: {manifest['samples']} samples, {manifest['tokens']:,} tokens "
        f"({manifest['synthetic_tokens']:,} synthetic){describe_judged(judged)}"
        + "".join(f"; {missing.describe()}" for missing in lacking)
    )
    return manifest


def identity_of(
    kind: str,
    styles: list[str],
    stores: list[GenerationStore],
    generations: int,
    documents_hash: str,
    vocabulary: TokenizerManifest,
    config: StreamConfig,
    quality: QualityConfig,
    root: Path,
) -> dict[str, Any]:
    """What a stream's samples depend on; one with another identity is built anew."""
    identity = {
        "format": FORMAT,
        "kind": kind,
        "method": "+".join(styles) or None,
        "generations": generations * len(styles),
        "config": identity_of_config(config, kind),
        "documents": documents_hash,
        "tokenizer_sha256": vocabulary.sha256,
        "generated": "+".join(store.fingerprint() for store in stores) or None,
        "quality": {**asdict(quality), "processes": None} if stores else None,
    }
    if kind == "val":
        identity["near_duplicates"] = share_in(root / "documents")
    return identity


def identity_of_config(config: StreamConfig, kind: str) -> dict[str, Any]:
    """The settings that a stream of this kind depends on.

    A stream of one method is the same as before there were several.
    """
    settings: dict[str, Any] = {**asdict(config), "generations": None}
    if not config.methods or kind not in ("simple", "stitched"):
        for name in ("methods", "shares", "member_order"):
            settings.pop(name)
    # They only permit, or divide the work.
    for name in ("missing", "missing_share", "processes", "writer", "writers"):
        settings.pop(name)
    return settings


def current_manifest(folder: Path, config_hash: str) -> dict[str, Any] | None:
    """The manifest of a stream that is there, whole and of this config; None to build it."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        manifest = read_manifest(folder)
        verify(folder, manifest)
    except DamagedStreamError as error:
        logger.warning(f"{folder} is built again: {str(error).partition('; build')[0]}")
        (folder / MANIFEST).unlink(missing_ok=True)
        return None
    return manifest if manifest["config_hash"] == config_hash else None


class Stream:
    """A stream that is being built, by this process and perhaps by others.

    Args:
        folder: where it will be.
        description: what its manifest says before its samples are known.
        documents: in corpus order.
        chosen: the generations that it takes of each style.
        tokenizer: of the corpus.
        config: separators, order, shards.
        root: corpus folder.
    """

    def __init__(
        self,
        folder: Path,
        description: dict[str, Any],
        documents: list[Document],
        chosen: list[Generations],
        tokenizer: Tokenizer,
        config: StreamConfig,
        root: Path,
    ) -> None:
        self.folder = folder
        self.description = description
        self.documents = documents
        self.chosen = chosen
        self.tokenizer = tokenizer
        self.config = config
        self.root = root
        self.building = folder.with_name(f".{folder.name}.{description['config_hash']}.building")
        self.unfinished = self.building / "stream"
        self.encoding = Encoding(
            tokenizer,
            description["eos_id"],
            config.separator,
            config.open_thought,
            config.close_thought,
            description["members_are_documents"],
        )
        styles = description["method"].split("+") if chosen else []
        self.form = Form.of(self.encoding, styles, config.shard_bytes)

    def build(self, work: Work) -> dict[str, Any]:
        """Tokenize what is not tokenized yet, write what is not written yet, and finish.

        Returns:
            The manifest.

        Raises:
            DamagedTokensError: of a token store that is damaged again and again.
            OSError: the disk is full.
        """
        starts = partial(document_starts, self.documents, self.tokenizer, self.root, work)
        layout = lay_out(self.description["kind"], self.documents, self.chosen, self.config, starts)
        try:
            try:
                members, parts = self.members(layout, work)
                self.write(members, parts, work)
            except DamagedTokensError:  # the damaged part is gone: its texts are tokenized anew
                members, parts = self.members(layout, work)
                self.write(members, parts, work)
            return self.finish(members)
        except FileNotFoundError:
            # Another writer finishes it and takes away what it was built of, at any moment.
            if not is_finished(self.folder, self.description["config_hash"]):
                raise
            shutil.rmtree(self.building, ignore_errors=True)
            return read_manifest(self.folder)

    def members(self, layout: Layout, work: Work) -> tuple[Members, list[Path]]:
        """All members with their tokens, and the files that these lie in."""
        spans, parts = tokenized(
            layout, self.documents, self.chosen, self.encoding, self.root, work
        )
        return Members.of(layout, spans, self.encoding), parts

    def entry(self, shard: int) -> Path:
        """What ``index.json`` will say of a shard; there when the shard is whole."""
        return self.building / "units" / f"{shard:05d}.json"

    def write(self, members: Members, parts: list[Path], work: Work) -> None:
        """Write every shard that is not there."""
        for folder in (self.unfinished, self.entry(0).parent):
            folder.mkdir(parents=True, exist_ok=True)
        units = []
        for shard, megadocs in enumerate(members.shards(self.form, self.documents)):
            if not self.entry(shard).exists():
                tokens = int(members.lengths[megadocs.start : megadocs.stop].sum())
                call = partial(self.prepare, members, parts, shard, megadocs)
                units.append(Unit(f"{shard:05d}", tokens, call))
        work.run(units, self.building / "locks", self.folder.name, "tok")

    def prepare(
        self, members: Members, parts: list[Path], shard: int, megadocs: range
    ) -> Callable[[], None]:
        """What a process is given to write one shard."""
        return partial(
            write_unless_finished,
            (self.folder, self.description["config_hash"]),
            self.unfinished / f"shard.{shard:05d}.mds",
            self.entry(shard),
            members.samples(megadocs, self.documents),
            self.form,
            parts,
        )

    def finish(self, members: Members) -> dict[str, Any]:
        """Join the shards to a stream, put it in its place and return its manifest.

        Raises:
            OSError: a shard is not what was written, or the disk is full.
        """
        with only_one(self.building / "locks" / "finish.lock"):
            if is_finished(self.folder, self.description["config_hash"]):  # by another writer
                shutil.rmtree(self.building, ignore_errors=True)
                return read_manifest(self.folder)
            for leftover in self.unfinished.glob(".*.tmp"):
                leftover.unlink()
            shards = len(members.shards(self.form, self.documents))
            again = "delete it and run the same command again: its shard is written again"
            entries = [read_sealed(self.entry(shard), again) for shard in range(shards)]
            content, known = self.read_back(entries)
            index = {"shards": entries, "version": 2}
            (self.unfinished / "index.json").write_text(json.dumps(index, sort_keys=True))
            np.save(self.unfinished / "lengths.npy", members.lengths.astype(np.uint32))
            np.save(self.unfinished / "member_lengths.npy", members.tokens.astype(np.uint32))
            tokens = int(members.lengths.sum())
            real = int(members.tokens[members.layout.kind == REAL].sum(dtype=np.int64))
            manifest = {
                **self.description,
                "samples": len(members.lengths),
                "tokens": tokens,
                "real_tokens": real,
                "synthetic_tokens": tokens - real,
                "bytes": members.text_bytes,
                "content_sha256": content.hexdigest(),
            }
            manifest = seal(self.unfinished, manifest, known)
            for file in self.unfinished.iterdir():
                sync(file)
            sync(self.unfinished)
            if self.folder.exists():
                shutil.rmtree(self.folder)
            os.replace(self.unfinished, self.folder)
            sync(self.folder.parent)
            for other in self.folder.parent.glob(f".{self.folder.name}.{'?' * 16}.building"):
                shutil.rmtree(other, ignore_errors=True)  # of other settings as well
        return manifest

    def read_back(
        self, entries: list[dict[str, Any]]
    ) -> tuple[ContentHash, dict[str, dict[str, Any]]]:
        """The hash of all samples as they lie in the shards; size and hash of each shard."""
        description = self.description
        content = ContentHash(description["tokenizer_sha256"], description["members_are_documents"])
        known = {}
        for shard, entry in enumerate(entries):
            described = entry["raw_data"]
            file = self.unfinished / described["basename"]
            sha256 = read_back(file, list(self.form.columns), content)
            if sha256 != described["hashes"]["sha256"]:
                self.entry(shard).unlink()
                raise OSError(f"{file} is not what was written; it is written again")
            known[file.name] = {"bytes": file.stat().st_size, "sha256": sha256}
        return content, known


def write_unless_finished(
    stream: tuple[Path, str],
    path: Path,
    entry: Path,
    samples: Samples,
    form: Form,
    parts: list[Path],
) -> None:
    """Write a shard, unless another writer has finished the stream since."""
    if not is_finished(*stream):
        write_shard(path, entry, samples, form, parts)


def is_finished(folder: Path, config_hash: str) -> bool:
    """Whether a stream of this config is in its place."""
    try:
        found = read_object(folder / MANIFEST, remedy=build_again(folder))
        return found.get("config_hash") == config_hash
    except FileNotFoundError:
        return False


def lay_out(
    kind: str,
    documents: list[Document],
    styles: list[Generations],
    config: StreamConfig,
    document_starts: Callable[[], Callable[[int], list[int]]],
) -> Layout:
    """The megadocs of a stream in their stored order.

    Args:
        kind: of the stream.
        documents: in corpus order.
        styles: the generations that it takes of each style.
        config: their order.
        document_starts: gives, for ``latent``, what tells where a document's tokens start.
    """
    if not styles:
        return real_documents(documents)
    if kind == "simple":
        return simple(documents, styles, config.real_document != "absent", config.shuffle_seed)
    if kind == "stitched":
        seed = config.shuffle_seed if config.member_order == "random" else None
        return stitched(documents, styles, config.real_document, seed)
    if kind == "latent":
        return latent(documents, styles[0], document_starts())
    raise ValueError(f"unknown stream {kind!r}; known: real, val, {', '.join(SYNTHETIC)}")
