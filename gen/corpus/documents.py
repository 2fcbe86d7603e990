"""Reading documents: formats, duplicates, the held-out split, the token budget."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from gen.corpus import near_duplicates
from gen.corpus.files import files_below, lines_of, parquet_rows, whole_text
from trainer.config.fields import Place, setting
from trainer.data.format import describe, verify
from trainer.files import read_sealed, replace_file, write_sealed

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [("id", pa.string()), ("text", pa.string()), ("split", pa.string()), ("metadata", pa.string())]
)
BATCH_ROWS = 1000
JSON_LINES = tuple(
    name + packed for name in (".jsonl", ".json", ".ndjson") for packed in ("", ".gz", ".zst")
)
SOURCE = ("format", "path", "subset", "split")  # of the config: where documents come from


@dataclass
class CorpusConfig:
    """Where the real documents come from."""

    format: str = setting(
        "pydoc",
        "What the documents are read from; import: the files of generator=import.",
        choices=("pydoc", "text", "jsonl", "parquet", "huggingface", "import"),
    )
    path: str | None = setting(
        None, "Folder, file, or the name of a Hugging Face dataset.", place=Place.anywhere
    )
    pattern: str = setting("*.txt", "text: which files of the folder.")
    text_column: str = setting("text", "Column or key of the text.")
    id_column: str | None = setting(None, "Column or key of the id; null: a hash of the text.")
    subset: str | None = setting(None, "huggingface: configuration name.")
    split: str = setting("train", "huggingface: split.")
    held_out: float = setting(
        0.05,
        "Share of the documents for validation, chosen by a hash of the id.",
        at_least=0,
        below=1,
    )
    max_documents: int | None = setting(
        None, "Read no more than this many.", unit="documents", at_least=1
    )
    max_characters: int | None = setting(
        None, "Longer documents are left out and counted.", unit="characters", at_least=1
    )
    near_duplicates: str = setting(
        "report",
        "Held-out documents that training knows nearly word for word: counted (report), taken out "
        "of training (drop), or no longer held out (keep_in_training).",
        choices=("report", "drop", "keep_in_training"),
    )
    token_budget: int | None = setting(
        None,
        "Exact number of training tokens; the last document is cut. A document needs two: a token "
        "and its end.",
        unit="tokens",
        at_least=2,
    )


@dataclass(frozen=True)
class Document:
    """One real text."""

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def text_hash(self) -> str:
        """Tells from which text a generation was made."""
        return hash_text(self.text)


def hash_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def hash_of(documents: list[Document]) -> str:
    """Identity of documents and their order."""
    content = hashlib.sha256()
    for document in documents:
        content.update(f"{document.id}\0{document.text}\0".encode())
    return content.hexdigest()[:16]


def read_documents(config: CorpusConfig) -> Iterator[Document]:
    """All documents of the source as they are, in its order.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: unknown format, a file that is not UTF-8, a missing column.
    """
    readers: dict[str, Callable[[CorpusConfig], Iterator[Document]]] = {
        "pydoc": read_pydoc,
        "text": read_text_files,
        "jsonl": read_jsonl,
        "parquet": read_parquet,
        "huggingface": read_huggingface,
    }
    if config.format == "import":
        raise ValueError("corpus=import takes the documents that generator=import brings; add that")
    if config.format not in readers:
        raise ValueError(f"corpus.format={config.format} is not one of {', '.join(readers)}")
    return readers[config.format](config)


def read_pydoc(config: CorpusConfig) -> Iterator[Document]:
    """The Python language reference's topics, which every CPython carries."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document(name, text.strip())


def read_text_files(config: CorpusConfig) -> Iterator[Document]:
    """Every matching file of a folder is a document; its path below the folder is its id."""
    root = source_path(config)
    for path in sorted(root.rglob(config.pattern)) if root.is_dir() else [root]:
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(
                f"{path} is a link to {path.readlink()}, which does not exist; mend or remove it"
            )
        if path.is_file():
            name = path.relative_to(root) if root.is_dir() else path.name
            yield Document(str(name), whole_text(path))


def read_jsonl(config: CorpusConfig) -> Iterator[Document]:
    """One JSON object a line, in files of any of :data:`JSON_LINES`."""
    for path in matching_files(config, JSON_LINES):
        for number, line in lines_of(path):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                cut = "" if line.endswith("\n") else "; it is the file's last, is the file cut off?"
                raise ValueError(f"{path}, line {number} is not JSON: {error}{cut}") from error
            yield from_record(record, config, f"{path}, line {number}")


def read_parquet(config: CorpusConfig) -> Iterator[Document]:
    """Rows of Parquet files, a batch at a time."""
    for path in matching_files(config, (".parquet",)):
        for record in parquet_rows(path, BATCH_ROWS):
            yield from_record(record, config, str(path))


def read_huggingface(config: CorpusConfig) -> Iterator[Document]:
    """A Hugging Face dataset, streamed; ``path`` is a hub name or a local folder."""
    from datasets import load_dataset

    if config.path is None:
        raise ValueError("corpus.path must name a Hugging Face dataset or a local folder")
    rows = load_dataset(config.path, config.subset, split=config.split, streaming=True)
    for record in rows:
        yield from_record(record, config, f"dataset {config.path}")


def source_path(config: CorpusConfig) -> Path:
    """``corpus.path``, which must exist."""
    if config.path is None:
        raise ValueError(f"corpus.format={config.format} needs corpus.path")
    path = Path(config.path)
    if not path.exists():
        raise FileNotFoundError(f"corpus.path={path} does not exist")
    return path


def matching_files(config: CorpusConfig, endings: tuple[str, ...]) -> list[Path]:
    """The file itself, or the files of a folder with one of ``endings``; says what is not read."""
    files, others = files_below(source_path(config), endings, "corpus.path")
    if others:
        names = ", ".join(file.name for file in others[:3])
        logger.warning(
            f"corpus.path={config.path}: {len(others)} files are not read, they do not end in "
            f"{', '.join(endings)}: {names}{', ...' if len(others) > 3 else ''}"
        )
    return files


def from_record(record: Any, config: CorpusConfig, where: str) -> Document:
    """A document from a row; other columns become metadata."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not a JSON object but {str(record)[:60]!r}")
    missing = [
        column
        for column in (config.text_column, config.id_column)
        if column is not None and column not in record
    ]
    if missing:
        raise ValueError(
            f"{where} has no column {missing[0]!r} (it has {', '.join(sorted(record))}); "
            "set corpus.text_column or corpus.id_column"
        )
    text = record[config.text_column] or ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: {config.text_column!r} is not a text but {str(text)[:60]!r}")
    try:
        identity = hash_text(text) if config.id_column is None else str(record[config.id_column])
        (text + identity).encode()
    except UnicodeEncodeError as error:  # JSON can escape one half of a character
        raise ValueError(
            f"{where}: the text or id holds half of a surrogate pair at character {error.start}, "
            "which no file can hold; mend or remove it"
        ) from error
    used = (config.text_column, config.id_column)
    return Document(identity, text, {key: record[key] for key in record if key not in used})


def is_held_out(document_id: str, share: float) -> bool:
    """Whether a document is for validation: a hash of its id, so the split never moves."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def build_documents(
    config: CorpusConfig, root: Path, read: Callable[[], Iterator[Document]] | None = None
) -> dict[str, Any]:
    """Write ``root/documents/{train,val}.parquet`` and their manifest, unless they are current.

    Args:
        config: where the documents come from.
        root: corpus folder.
        read: yields the documents of ``format=import``.

    Returns:
        The manifest: how many documents were read, kept, empty, duplicate, too long, held out.

    Raises:
        ValueError: nothing is left, two different texts have one id, or the documents that are
            there come from another source.
    """
    folder = root / "documents"
    wanted = {**config.__dict__, "token_budget": None, "path": spelled_out(config.path)}
    if (current := current_manifest(config, folder, wanted)) is not None:
        return current
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.parquet.*.tmp"):  # of killed attempts
        leftover.unlink()
    found = read() if config.format == "import" and read else read_documents(config)
    counts, characters, content = write_documents(found, config, folder)
    found_near = near_duplicates.find(
        load_split(root, "train"), load_split(root, "val"), config.near_duplicates
    )
    near_duplicates.write_left_out(folder, found_near)
    manifest = {
        "counts": counts,
        "characters": characters,
        "content": content,
        "source": fingerprint(config),
        "config": wanted,
        "near_duplicates": found_near.to_dict(),
        "files": describe(
            [folder / name for name in ("train.parquet", "val.parquet", near_duplicates.LEFT_OUT)]
        ),
    }
    write_sealed(folder / "manifest.json", manifest)
    return manifest


def current_manifest(
    config: CorpusConfig, folder: Path, wanted: dict[str, Any]
) -> dict[str, Any] | None:
    """The manifest of documents that are there and current; None where they are to be built.

    Raises:
        ValueError: they come from another source, or are damaged.
    """
    if not (folder / "manifest.json").exists():
        return None
    manifest = documents_manifest(folder)
    manifest["config"]["path"] = spelled_out(manifest["config"]["path"])
    if manifest["config"] == wanted and manifest["source"] == fingerprint(config):
        return manifest
    different = [
        f"corpus.{key}: {manifest['config'].get(key)} -> {wanted[key]}"
        for key in SOURCE
        if manifest["config"].get(key) != wanted[key]
    ]
    if different:
        raise ValueError(
            f"{folder} was built from another corpus ({'; '.join(different)}). Name that one, "
            "use another root=..., or delete that folder to put these documents in its place"
        )
    return None


def documents_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of documents that are there, after their files were verified.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are damaged.
    """
    file = folder / "manifest.json"
    if not file.exists():
        raise FileNotFoundError(f"{folder} holds no documents; make them with generate.py corpus")
    again = f"delete {folder} and run the same command again"
    manifest = read_sealed(file, again)
    if "files" in manifest:
        verify(folder, manifest, again)
    return manifest


def write_documents(
    found: Iterator[Document], config: CorpusConfig, folder: Path
) -> tuple[dict[str, int], int, str]:
    """Write ``train.parquet`` and ``val.parquet``; what is there stays until all is read.

    Returns:
        How many documents were read, left out by reason and written by split; the characters
        written; a hash of ids and texts in their order.

    Raises:
        ValueError: no document is left in a split, or two different texts have one id.
    """
    counts = dict.fromkeys(("read", "empty", "duplicate", "too_long", "train", "val"), 0)
    characters = 0
    content = hashlib.sha256()
    with (
        replace_file(folder / "train.parquet") as train,
        replace_file(folder / "val.parquet") as val,
        pq.ParquetWriter(train, SCHEMA) as train_writer,
        pq.ParquetWriter(val, SCHEMA) as val_writer,
    ):
        writers = {"train": train_writer, "val": val_writer}
        waiting: dict[str, list[dict[str, str]]] = {"train": [], "val": []}
        for document, text_hash in sift(found, config, counts):
            split = "val" if is_held_out(document.id, config.held_out) else "train"
            counts[split] += 1
            characters += len(document.text)
            content.update(document.id.encode() + text_hash)
            waiting[split].append(
                {
                    "id": document.id,
                    "text": document.text,
                    "split": split,
                    "metadata": json.dumps(document.metadata, default=str),
                }
            )
            if len(waiting[split]) == BATCH_ROWS:
                writers[split].write_table(pa.Table.from_pylist(waiting[split], SCHEMA))
                waiting[split].clear()
        for split, rows in waiting.items():
            writers[split].write_table(pa.Table.from_pylist(rows, SCHEMA))
            if not counts[split]:
                raise ValueError(
                    f"no {split} document is left: {counts['read']} read, {counts['empty']} empty, "
                    f"{counts['duplicate']} duplicates, {counts['too_long']} longer than "
                    f"corpus.max_characters; corpus.held_out={config.held_out} decides the split"
                )
        # Only now: what cannot be read leaves the documents that are there as they are.
        (folder / "manifest.json").unlink(missing_ok=True)
        (folder / near_duplicates.LEFT_OUT).unlink(missing_ok=True)
    return counts, characters, content.hexdigest()


def sift(
    found: Iterator[Document], config: CorpusConfig, counts: dict[str, int]
) -> Iterator[tuple[Document, bytes]]:
    """Documents that are kept, each with a hash of its text; ``counts`` tells of the others.

    Raises:
        ValueError: two different texts have one id.
    """
    texts_seen: set[bytes] = set()
    ids: set[str] = set()
    for document in tqdm(found, desc="documents", unit="doc", leave=False):
        if counts["read"] == config.max_documents:
            return
        counts["read"] += 1
        text_hash = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if not document.text.strip():
            counts["empty"] += 1
        elif text_hash in texts_seen:
            counts["duplicate"] += 1
        elif config.max_characters and len(document.text) > config.max_characters:
            counts["too_long"] += 1
        elif document.id in ids:
            raise ValueError(
                f"two documents with different texts have the id {document.id!r}; choose "
                "another corpus.id_column, or null for a hash of the text"
            )
        else:
            texts_seen.add(text_hash)
            ids.add(document.id)
            yield document, text_hash


def spelled_out(path: str | None) -> str | None:
    """A local path in one spelling; the name of a dataset as it is."""
    return os.path.realpath(path) if path and os.path.exists(path) else path


def fingerprint(config: CorpusConfig) -> str:
    """Changes when the source's files do (names, sizes, times); hub datasets have only a name."""
    path = Path(config.path) if config.path else None
    if path is None or not path.exists():
        return f"{config.format}:{config.path}"
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stats = [
        (str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
    ]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def load_split(root: Path, split: str) -> Iterator[Document]:
    """The documents of ``train`` or ``val`` in corpus order, without near-duplicates left out."""
    folder = root / "documents"
    unused = near_duplicates.left_out(folder, split)
    parquet = pq.ParquetFile(folder / f"{split}.parquet", pre_buffer=False)  # not all of it
    for batch in parquet.iter_batches(BATCH_ROWS):
        for row in batch.to_pylist():
            if row["id"] not in unused:
                yield Document(row["id"], row["text"], json.loads(row["metadata"]))
