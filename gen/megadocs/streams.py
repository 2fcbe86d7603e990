"""Megadocs become MDS streams: one megadoc a sample, a manifest beside the shards.

A stream folder is built under a temporary name and renamed when it is complete, so a folder with a
``manifest.json`` is finished and a killed build leaves nothing half-written.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from tokenizers import Tokenizer
from tqdm import tqdm

from gen.corpus.documents import Document
from gen.corpus.near_duplicates import share_in
from gen.corpus.tokenizer import TokenizerManifest
from gen.generations.store import GenerationStore
from gen.megadocs.assembly import (
    TEXT_COLUMNS,
    Generations,
    Megadoc,
    latent,
    real_documents,
    simple,
    stitched,
)
from gen.megadocs.encoding import Encoder, real_tokens
from gen.megadocs.missing import Missing, missing_of
from gen.quality.gates import QualityConfig, advice, gates, select, strip_preamble
from gen.quality.table import columns_of, quality_table
from trainer.config.fields import check_bounds, setting
from trainer.data import format
from trainer.data.format import (
    MANIFEST,
    REPHRASE,
    SYNTHETIC,
    ContentHash,
    DamagedStreamError,
    read_manifest,
    seal,
    verify,
)
from trainer.files import replace_folder

FORMAT = 3  # of the samples and the manifest; a change rebuilds the streams
COLUMNS = {
    "id": "str",
    "tokens": "ndarray:uint32",
    "member_ends": "ndarray:uint32",
    "member_kinds": "ndarray:uint8",
    "provenance": "json",
}
BATCH = 256  # megadocs tokenized together
PLAIN = ("rephrase", "latent")  # methods that streams do not name: the paper's


@dataclass
class StreamConfig:
    """How megadocs are put together."""

    generations: list[int] = setting(
        [],
        "G of the streams, of each method where there are several; empty: the method's.",
        unit="generations",
        at_least=1,
    )
    methods: list[str] = setting(
        [],
        "simple, stitched: styles whose generations they take, in this order; empty: the method's "
        "alone.",
    )
    shares: list[float] = setting(
        [],
        "Of each of methods, the share of the documents that take its generations, chosen by a "
        "hash of the id; empty: all of them.",
        at_least=0,
        at_most=1,
    )
    member_order: str = setting(
        "methods",
        "Order of a stitched megadoc's rephrases: as methods says, or random.",
        choices=("methods", "random"),
    )
    separator: str | None = setting(
        None,
        "Text between the members of a megadoc; null: the end-of-text token, which the evidence "
        "says the paper used.",
    )
    real_document: str = setting(
        "last",
        "Where the real document stands in a megadoc.",
        choices=("last", "first", "absent"),
    )
    open_thought: str = setting(
        "<think>",
        "Before a latent thought. The paper's delimiters are not known; these are what the public "
        "re-implementation uses.",
    )
    close_thought: str = setting("</think>", "After a latent thought.")
    missing: str = setting(
        "refuse",
        "Generations that are not there: refuse to build, or allow a share of them to be left out.",
        choices=("refuse", "allow"),
    )
    missing_share: float = setting(
        0.01,
        "allow: of all generations of the stream, at most.",
        at_least=0,
        at_most=1,
    )
    shuffle_seed: int = setting(0, "Of the order of the simple stream.", at_least=0)
    shard_bytes: int = setting(1 << 26, "Size of a shard.", unit="bytes", at_least=1)

    def check(self) -> None:
        """Raise ValueError for an unknown option or an impossible number."""
        check_bounds(self, "streams.")
        if len(set(self.methods)) != len(self.methods):
            raise ValueError(f"streams.methods={self.methods} names a method twice")
        if self.shares and len(self.shares) != len(self.methods):
            raise ValueError(
                f"streams.shares={self.shares} must hold one share for each of "
                f"streams.methods={self.methods}"
            )

    def styles(self, kind: str, method: str) -> list[str]:
        """The methods whose generations a stream of a kind takes."""
        return (self.methods if kind != "latent" and self.methods else [method]) * (
            kind in SYNTHETIC
        )


def name_of(kind: str, method: str, generations: int, config: StreamConfig) -> str:
    """Folder name: ``real``, ``val``, ``stitched-g8``, ``stitched-g8-faq-real-first``, ...

    The G in it counts all generations of a document: ``stitched-g2-faq+table`` has one a style.
    """
    styles = config.styles(kind, method)
    style = "" if len(styles) == 1 and styles[0] in PLAIN else "+".join(styles)
    return format.stream_name(kind, generations * len(styles), style, config.real_document)


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

    Returns:
        The manifest.

    Raises:
        ValueError: G is larger than what was generated, or an option is unknown.
        OSError: the disk is full; nothing half-written stays.
    """
    config.check()
    name = name_of(kind, method, generations, config)
    folder = root / "streams" / name
    styles = config.styles(kind, method)
    stores = [
        GenerationStore.of_method(root, style, generations, kind == "latent") for style in styles
    ]
    identity = identity_of(
        kind, styles, stores, generations, documents_hash, vocabulary, config, quality, root
    )
    config_hash = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    if (current := current_manifest(folder, config_hash)) is not None:
        for known in current.get("missing", []):
            Missing(**known).check(config.missing, config.missing_share)
        print(f"{folder}: up to date", flush=True)
        return current
    chosen, judged, lacking = choose_generations(
        stores,
        generations,
        documents,
        documents_hash,
        config,
        quality,
        tokenizer if kind == "latent" else None,
    )
    megadocs = assemble(kind, documents, chosen, tokenizer, config)
    try:
        with replace_folder(folder) as unfinished:
            statistics = write_shards(
                megadocs,
                unfinished,
                tokenizer,
                vocabulary,
                config,
                name,
                styles,
                members_are_documents=kind != "latent",
            )
            manifest = {
                **identity,
                "name": name,
                **statistics,
                "judged": judged,
                "missing": [asdict(missing) for missing in lacking],
                "styles": styles if len(styles) > 1 else [],
                "vocab_size": vocabulary.vocab_size,
                "eos_id": vocabulary.eos_id,
                "members_are_documents": kind != "latent",
                "real_document": config.real_document if kind in ("simple", "stitched") else None,
                "config_hash": config_hash,
            }
            manifest = seal(unfinished, manifest)
    except OSError as error:
        raise OSError(
            f"could not write the stream {folder}: {error}; nothing half-written was left, "
            "make room and run the same command again"
        ) from error
    print(
        f"{folder}: {manifest['samples']} samples, {manifest['tokens']:,} tokens "
        f"({manifest['synthetic_tokens']:,} synthetic){describe_judged(judged)}"
        + "".join(f"; {missing.describe()}" for missing in lacking),
        flush=True,
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


def choose_generations(
    stores: list[GenerationStore],
    generations: int,
    documents: list[Document],
    documents_hash: str,
    config: StreamConfig,
    quality: QualityConfig,
    tokenizer: Tokenizer | None,
) -> tuple[list[Generations], dict[str, Any], list[Missing]]:
    """What a stream takes of each store, what the quality gates found, and what is missing.

    Args:
        stores: one for each of the stream's methods.
        generations: G of each.
        documents: training documents in corpus order.
        documents_hash: their identity.
        config: shares, and what to do where generations are missing.
        quality: which generations are left out.
        tokenizer: of the corpus where these are thoughts, which it cuts for; else None.

    Raises:
        FileNotFoundError: a store is empty.
        ValueError: G is larger than what was generated or imported.
    """
    judged: dict[str, Any] = {}
    chosen, lacking = [], []
    for place, store in enumerate(stores):
        table = store.read(TEXT_COLUMNS)
        one = Generations(table, documents, generations, str(store.folder), store.imported)
        if store.imported and max(one.found, default=0) < generations:
            raise ValueError(
                f"no document has G={generations} generations in {store.folder}; the most are "
                f"{max(one.found, default=0)}: set streams.generations to that or less"
            )
        if not store.imported:
            missing = missing_of(one, documents, store, tokenizer)
            missing.check(config.missing, config.missing_share)
            one.may_lack = True
            if missing.generations:
                lacking.append(missing)
        found = select_generations(one, store, documents, documents_hash, quality)
        judged = sum_of(judged, found) if judged else found
        if config.shares and tokenizer is None:
            one.take(takers(documents, config.methods[place], config.shares[place]))
        chosen.append(one)
    return chosen, judged, lacking


def identity_of_config(config: StreamConfig, kind: str) -> dict[str, Any]:
    """The settings that a stream of this kind depends on.

    A stream of one method is the same as before there were several.
    """
    settings: dict[str, Any] = {**asdict(config), "generations": None}
    if not config.methods or kind not in ("simple", "stitched"):
        for name in ("methods", "shares", "member_order"):
            settings.pop(name)
    for name in ("missing", "missing_share"):  # they only permit
        settings.pop(name)
    return settings


def takers(documents: list[Document], method: str, share: float) -> np.ndarray:
    """Which documents take generations of a method: bool ``[documents]``, by a hash of their id.

    A larger share takes the documents of a smaller one and more.
    """
    keys = (f"{method}/{document.id}".encode() for document in documents)
    digests = (hashlib.blake2b(key, digest_size=8).digest() for key in keys)
    limit = share * 2**64
    return np.array([int.from_bytes(digest, "big") < limit for digest in digests], dtype=bool)


def sum_of(one: Any, other: Any) -> Any:
    """Counts of two stores together."""
    if isinstance(one, dict):
        return {name: sum_of(one[name], other[name]) for name in one}
    return one + other


def current_manifest(folder: Path, config_hash: str) -> dict[str, Any] | None:
    """The manifest of a stream that is there, whole and of this config; None to build it."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        manifest = read_manifest(folder)
        verify(folder, manifest)
    except DamagedStreamError as error:
        print(f"{folder} is built again: {str(error).partition('; build')[0]}", flush=True)
        return None
    return manifest if manifest["config_hash"] == config_hash else None


def select_generations(
    generations: Generations,
    store: GenerationStore,
    documents: list[Document],
    documents_hash: str,
    quality: QualityConfig,
) -> dict[str, Any]:
    """Drop what the quality gates say from ``generations``; returns the counts for the manifest."""
    table = quality_table(store, documents, documents_hash, quality.processes)
    columns = columns_of(table.filter(pc.less(table["index"], generations.count)))
    failed = gates(columns, quality)
    selection = select(failed, quality)
    strip = quality.preamble == "strip"
    generations.select(selection.kept, strip_preamble if strip else None)
    return {
        "generations": len(selection.kept),
        "kept": int(selection.kept.sum()),
        "failed": selection.failed,
        "dropped": selection.dropped,
        "stripped": int((failed["preamble"] & selection.kept).sum()) if strip else 0,
    }


def describe_judged(judged: dict[str, Any]) -> str:
    """What the quality gates found, for the line about a stream."""
    if not judged:
        return ""
    found = [f"{count:,} {gate}" for gate, count in judged["failed"].items() if count]
    left_out = judged["generations"] - judged["kept"]
    return (
        f"; of {judged['generations']:,} generations {left_out:,} left out; "
        f"gates: {', '.join(found) or 'none failed'}"
        + "".join(f"\n  {line}" for line in advice(judged["failed"], judged["generations"]))
    )


def assemble(
    kind: str,
    documents: list[Document],
    styles: list[Generations],
    tokenizer: Tokenizer,
    config: StreamConfig,
) -> Iterator[Megadoc]:
    """The megadocs of a stream in their stored order."""
    if not styles:
        return real_documents(documents)
    if kind == "simple":
        return simple(documents, styles, config.real_document != "absent", config.shuffle_seed)
    if kind == "stitched":
        seed = config.shuffle_seed if config.member_order == "random" else None
        return stitched(documents, styles, config.real_document, seed)
    if kind == "latent":
        return latent(documents, styles[0], tokenizer, config.open_thought, config.close_thought)
    raise ValueError(f"unknown stream {kind!r}; known: real, val, {', '.join(SYNTHETIC)}")


def write_shards(
    megadocs: Iterator[Megadoc],
    folder: Path,
    tokenizer: Tokenizer,
    vocabulary: TokenizerManifest,
    config: StreamConfig,
    name: str,
    styles: list[str],
    members_are_documents: bool,
) -> dict[str, int | str]:
    """Tokenize and write the samples, then read their count back.

    Returns:
        Counts of tokens and bytes, and the content's hash, for the manifest.
    """
    from streaming import LocalDataset, MDSWriter  # takes seconds to import

    encoder = Encoder(
        tokenizer,
        vocabulary.eos_id,
        config.separator,
        config.open_thought,
        config.close_thought,
        members_are_documents,
    )
    columns = COLUMNS | ({"member_styles": "ndarray:uint8"} if len(styles) > 1 else {})
    lengths: list[int] = []
    member_lengths: list[int] = []
    text_bytes = real = 0
    content = ContentHash(vocabulary.sha256, members_are_documents)
    with (
        MDSWriter(out=str(folder), columns=columns, size_limit=config.shard_bytes) as writer,
        tqdm(desc=name, unit="megadoc", leave=False) as bar,
    ):
        for batch in batches(megadocs):
            for megadoc, (tokens, ends) in zip(batch, encoder.encode(batch), strict=True):
                text_bytes += sum(len(member.text.encode()) for member in megadoc.members)
                if config.separator is not None and members_are_documents:
                    text_bytes += len(config.separator.encode()) * (len(megadoc.members) - 1)
                row = sample(megadoc, tokens, ends, styles)
                writer.write(row)
                content.add(row["tokens"], row["member_ends"], row["member_kinds"])
                lengths.append(len(tokens))
                member_lengths.extend(np.diff([0, *ends]).tolist())
                real += real_tokens(megadoc, ends)
            bar.update(len(batch))
    np.save(folder / "lengths.npy", np.array(lengths, dtype=np.uint32))
    np.save(folder / "member_lengths.npy", np.array(member_lengths, dtype=np.uint32))
    written = len(LocalDataset(str(folder)))
    if written != len(lengths):
        raise OSError(f"{len(lengths)} samples were written but {written} can be read back")
    total = sum(lengths)
    return {
        "samples": len(lengths),
        "tokens": total,
        "real_tokens": real,
        "synthetic_tokens": total - real,
        "bytes": text_bytes,
        "content_sha256": content.hexdigest(),
    }


def batches(megadocs: Iterator[Megadoc]) -> Iterator[list[Megadoc]]:
    """Groups that are tokenized together."""
    while batch := list(itertools.islice(megadocs, BATCH)):
        yield batch


def sample(
    megadoc: Megadoc, tokens: list[int], ends: list[int], styles: list[str]
) -> dict[str, Any]:
    """One MDS sample; with several styles it says of which of them every member is."""
    members: list[list[Any]] = [[member.kind, member.index] for member in megadoc.members]
    several = {}
    if len(styles) > 1:
        marks = [member.style + 1 if member.kind == REPHRASE else 0 for member in megadoc.members]
        several["member_styles"] = np.array(marks, dtype=np.uint8)
        for member, mark in zip(members, marks, strict=True):
            member.append(styles[mark - 1] if mark else None)
    return {
        "id": megadoc.id,
        "tokens": np.array(tokens, dtype=np.uint32),
        "member_ends": np.array(ends, dtype=np.uint32),
        "member_kinds": np.array([member.kind for member in megadoc.members], dtype=np.uint8),
        "provenance": {
            "document_id": megadoc.document_id,
            "members": members,
        },
        **several,
    }
