"""Where imported generations lie and how their rows meet documents."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gen.generations.store import SCHEMA
from trainer.config.fields import check_bounds, setting

# Columns of a store that a row may bring along with the text.
CARRIED = tuple(
    name for name in SCHEMA.names if name not in ("document_id", "method", "text", "text_hash")
)


@dataclass
class ImportConfig:
    """Files with generations; columns are names or paths into lists and structs, as ``a.b``."""

    path: str | None = setting(
        None, "Folder, glob, file or URI (hf://, s3://) of rows with generations."
    )
    methods: dict[str, str] = setting(
        {},
        "Method -> folder or glob below path; empty: everything at path is method.name.",
    )
    only: list[str] = setting([], "Of methods: those to import; empty: all.")
    generation_column: str = setting("generation", "A text, or a list of texts.")
    id_column: str | None = setting("id", "Of the source; null: a hash of its text.")
    text_column: str | None = setting(
        "text", "Of the source; null: rows only name it, by id_column."
    )
    metadata_column: str | None = setting(
        None, "Of the source: an object, or JSON; kept by corpus=import."
    )
    sources: str | None = setting(
        None, "corpus=import where rows hold no sources: folder, glob, file or URI of those."
    )
    source_id_column: str = setting("id", "Of sources.")
    source_text_column: str = setting("text", "Of sources.")
    columns: dict[str, str] = setting(
        {},
        "Column of the store -> column of the row, such as finish_reason, completion_tokens, model "
        "or index. Without an index, generations are numbered in the order of the files.",
    )
    as_is: bool = setting(
        False, "Keep empty generations and thoughts (<think>), which are left out otherwise."
    )
    model: str = setting("unknown", "That wrote them, where no column says so.")
    licence: str = setting("", "Of the generations, as you know it; kept with them.")
    processes: int | None = setting(
        None, "That read files; null: all cores for large ones.", unit="processes", at_least=1
    )

    def check(self) -> None:
        """Raise ValueError where a setting is missing or cannot work."""
        check_bounds(self, "import.")
        if self.path is None:
            raise ValueError(
                "generator=import needs import.path=FOLDER (or a glob, a file, hf://..., s3://...)"
            )
        unknown = sorted(set(self.columns) - set(CARRIED))
        if unknown:
            raise ValueError(
                f"import.columns has {unknown[0]!r}, which is no column of a store; choose from "
                f"{', '.join(CARRIED)}"
            )
        if self.text_column is None and self.id_column is None:
            raise ValueError(
                "import.text_column=null and import.id_column=null: rows must hold their source "
                "or name it"
            )
        if self.text_column is not None and self.sources is not None:
            raise ValueError(
                f"import.sources={self.sources} and import.text_column={self.text_column} are two "
                "places for the sources; set import.text_column=null if rows hold no source"
            )
        absent = sorted(set(self.only) - set(self.methods))
        if absent:
            raise ValueError(
                f"import.only names {absent[0]!r}, which is not among import.methods "
                f"({', '.join(self.methods) or 'none'})"
            )
        for name in self.methods:
            if not re.fullmatch(r"[\w.-]*\w", name):
                raise ValueError(
                    f"import.methods: {name!r} names a folder: use letters, digits, '_', '-', '.'"
                )
