"""``generator=import``: files of generations become stores, and the corpus where it is asked for.

Resumable and idempotent: what is read stays read (``staging``), a part is complete or not there,
and a store that holds what the files hold is left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gen.corpus.documents import CorpusConfig, Document, build_documents
from gen.exchange.config import ImportConfig
from gen.exchange.join import Joined, Joiner
from gen.exchange.staging import Stage, make_plan
from gen.generations.store import IMPORT_RECORD, GenerationStore, drop_leftovers
from trainer.files import write_sealed

logger = logging.getLogger(__name__)


class Import:
    """One import into one corpus folder."""

    def __init__(self, config: ImportConfig, method: str, corpus: CorpusConfig, root: Path) -> None:
        self.config = config
        self.root = root
        self.with_documents = corpus.format == "import"
        self.corpus = corpus
        limit = corpus.max_documents if self.with_documents else None
        self.plan = make_plan(config, method, self.with_documents, limit)
        self.stage = Stage(root / "importing", self.plan)
        self.threads = config.processes or os.cpu_count() or 1

    def store(self, method: str) -> GenerationStore:
        return GenerationStore.of_method(self.root, method, 0)

    def run(self) -> dict[str, dict[str, Any]]:
        """Documents and generations; returns the record of each method.

        Raises:
            ValueError: a store was made otherwise, or files changed since they were imported.
            OSError: the disk is full; what was written stays.
        """
        for method in self.plan.methods:
            self.check_settings(method)
        self.began = time.time()
        manifest = build_documents(self.corpus, self.root, self.read_documents)
        keys = {method: self.key(method, manifest) for method in self.plan.methods}
        missing = [one for one in self.plan.methods if self.record(one).get("key") != keys[one]]
        if missing:
            self.stage.run(self.config.processes, missing)
            with contextlib.closing(Joiner(self.stage, self.threads)) as joiner:
                joiner.documents(self.root)
                for method in missing:
                    self.import_method(method, joiner, keys[method])
        self.stage.remove()
        records = {method: self.record(method) for method in self.plan.methods}
        for method, record in records.items():
            logger.info(describe(method, record, method in missing))
        return records

    def key(self, method: str, documents: dict[str, Any]) -> str:
        """Identity of what is imported: files, settings, documents, which of them are held out."""
        held_out = documents["config"]["held_out"]
        settings = {**self.plan.settings, "methods": None}
        content = [self.files_of(method), settings, documents["content"], held_out]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def record(self, method: str) -> dict[str, Any]:
        store = self.store(method)
        return store.import_record() if store.imported else {}

    def read_documents(self) -> Iterator[Document]:
        """Documents from the files of this import."""
        self.stage.run(self.config.processes)
        with contextlib.closing(Joiner(self.stage, self.threads)) as joiner:
            yield from joiner.first_documents()

    def check_settings(self, method: str) -> None:
        """Claim the store, and raise ValueError where its files changed since."""
        settings = {**self.plan.settings, "methods": None, "path": self.place(method)}
        manifest = {
            "method": method,
            "imported": settings,
            "model": self.config.model,
            "licence": self.config.licence,
        }
        store = self.store(method)
        store.claim(manifest)
        found = self.record(method).get("files")
        if found is None:
            return
        now = {file["path"]: file for file in self.files_of(method)}
        then = {file["path"]: file for file in found}
        changed = sorted(
            path
            for path in then.keys() | now.keys()
            if any(
                then.get(path, {}).get(name) != now.get(path, {}).get(name)
                for name in ("size", "version")
            )
        )
        if changed:
            raise ValueError(
                f"{len(changed)} files changed, came or went since {store.folder} was imported "
                f"(the first: {changed[0]}). Import them with another root=..., or delete that "
                "folder to import them again"
            )

    def place(self, method: str) -> str:
        place: str = self.plan.settings["methods"][method]
        return place

    def files_of(self, method: str) -> list[dict[str, Any]]:
        """The files that a method's generations come from."""
        numbers = {
            piece.file for unit in self.plan.units if unit.method == method for piece in unit.pieces
        }
        return [asdict(self.plan.files[number]) for number in sorted(numbers)]

    def import_method(self, method: str, joiner: Joiner, key: str) -> None:
        """Fill one store; its record is written last."""
        store = self.store(method)
        with store.lock(0, 1):
            drop_leftovers(store.folder)
            (store.folder / IMPORT_RECORD).unlink(missing_ok=True)
            row = {
                "model": self.config.model,
                "prompt_version": "imported",
                "created_at": self.began,
            }
            joined = joiner.join(method, store, row, key)
            write_sealed(store.folder / IMPORT_RECORD, self.new_record(method, joined, key))

    def new_record(self, method: str, joined: Joined, key: str) -> dict[str, Any]:
        """Where every part came from, and what was left out and why."""
        counts = joined.counts
        units = {unit.number: unit for unit in self.plan.units}
        paths = [file.path for file in self.plan.files]
        files = [
            {
                **asdict(file),
                "sha256": counts.sha256.get(str(number)),
                "rows": counts.file_rows.get(str(number), 0),
            }
            for number, file in enumerate(self.plan.files)
            if file.path in {one["path"] for one in self.files_of(method)}
        ]
        return {
            "key": key,
            "generations": joined.generations,
            "documents": joined.documents,
            "largest_g": joined.highest,
            "characters": counts.characters,
            "left_out": counts.reasons,
            "examples": counts.examples,
            "model": self.config.model,
            "licence": self.config.licence,
            "files": files,
            "parts": {
                name: [
                    {"file": paths[piece.file], "row_groups": piece.groups}
                    for piece in units[number].pieces
                ]
                for name, number in joined.parts.items()
            },
            "seconds": round(time.time() - self.began, 3),
        }


def describe(method: str, record: dict[str, Any], new: bool) -> str:
    """What was imported, what was left out and the first examples of why."""
    if not new:
        return f"{method}: all {record['generations']:,} imported generations are there"
    lines = [
        f"{method}: {record['generations']:,} generations of {record['documents']:,} documents "
        f"from {len(record['files']):,} files in {record['seconds']:.0f} s"
    ]
    for reason, number in sorted(record["left_out"].items()):
        first = "" if reason == "held_out" else f" (the first: {record['examples'][reason][0]})"
        lines.append(f"  {reason}: {number:,}{first}")
    return "\n".join(lines)
