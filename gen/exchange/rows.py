"""One row of somebody's file -> its source and its generations, or the reason why not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from gen.client.answers import CUT_OFF, FINISHED, split_thought
from gen.corpus.documents import hash_text
from gen.exchange.config import ImportConfig
from gen.generations.store import SCHEMA

Path = tuple[str, ...]
FINISH_REASONS = dict.fromkeys(FINISHED, "stop") | dict.fromkeys(CUT_OFF, "length")


@dataclass(frozen=True)
class Layout:
    """Where in a row everything stands."""

    id: Path | None  # of the source
    text: Path | None  # of the source; None: the row only names it
    metadata: Path | None
    generation: Path | None  # None: rows are sources alone
    carried: dict[str, Path]  # column of the store -> place
    as_is: bool = False  # empty generations and thoughts are kept

    @property
    def columns(self) -> list[str]:
        """Top-level columns that are read."""
        paths = (self.id, self.text, self.metadata, self.generation, *self.carried.values())
        return sorted({path[0] for path in paths if path})


def path_of(column: str, columns: Sequence[str]) -> Path:
    """A column's place; a name with dots that is a column itself is one."""
    return (column,) if column in columns else tuple(column.split("."))


def generation_layout(config: ImportConfig, columns: Sequence[str], where: str) -> Layout:
    """The layout of rows with generations.

    Args:
        config: names of columns.
        columns: that a row of the files has.
        where: file to name in errors.

    Raises:
        ValueError: a column is missing.
    """

    def place(setting: str, column: str | None) -> Path | None:
        """Where a column of the config lies in a row; None where none is named."""
        if column is None:
            return None
        path = path_of(column, columns)
        if path[0] not in columns:
            raise ValueError(
                f"{where} has no column {path[0]!r} (it has {', '.join(sorted(columns))}); set "
                f"import.{setting}"
            )
        return path

    return Layout(
        place("id_column", config.id_column),
        place("text_column", config.text_column),
        place("metadata_column", config.metadata_column),
        place("generation_column", config.generation_column),
        {
            name: place(f"columns.{name}", column)  # type: ignore[misc]
            for name, column in config.columns.items()
        },
        config.as_is,
    )


def source_layout(config: ImportConfig, columns: Sequence[str], where: str) -> Layout:
    """The layout of rows that are sources alone; errors as :func:`generation_layout`."""
    for setting, column in (
        ("source_id_column", config.source_id_column),
        ("source_text_column", config.source_text_column),
    ):
        if path_of(column, columns)[0] not in columns:
            raise ValueError(
                f"{where} has no column {column!r} (it has {', '.join(sorted(columns))}); set "
                f"import.{setting}"
            )
    metadata = path_of(config.metadata_column, columns) if config.metadata_column else None
    return Layout(
        path_of(config.source_id_column, columns),
        path_of(config.source_text_column, columns),
        metadata,
        None,
        {},
    )


@dataclass
class Row:
    """What a row holds that can be used, and what cannot, by reason."""

    document_id: str | None = None
    text: str | None = None  # of the source
    text_hash: str | None = None
    metadata: str = "{}"
    generations: list[dict[str, Any]] = field(default_factory=list)
    odd: list[tuple[str, str]] = field(default_factory=list)  # reason, detail


def read_row(row: dict[str, Any], layout: Layout) -> Row:
    """Source and generations of one row."""
    found = Row()
    if layout.text is not None:
        text = single(values_at(row, layout.text))
        problem = text_problem(text)
        if problem:
            found.odd.append((f"source_{problem}", shown(text)))
            return found
        found.text, found.text_hash = text, hash_text(text)
    if layout.id is None:
        found.document_id = found.text_hash
    else:
        identity = single(values_at(row, layout.id))
        if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
            found.odd.append(("no_id", shown(identity)))
            return found
        if not encodable(str(identity)):
            found.odd.append(("no_id", f"half of a surrogate pair: {shown(identity)}"))
            return found
        found.document_id = str(identity)
    if layout.metadata is not None:
        metadata = single(values_at(row, layout.metadata))
        found.metadata = metadata if is_json_object(metadata) else "{}"
        if isinstance(metadata, dict):
            found.metadata = json.dumps(metadata, default=str)
    if layout.generation is not None:
        texts = values_at(row, layout.generation)
        if not texts:
            found.odd.append(("no_generation", "an empty list"))
        carried = {name: values_at(row, path) for name, path in layout.carried.items()}
        for place, text in enumerate(texts):
            read_generation(text, place, len(texts), carried, found, layout.as_is)
    return found


def read_generation(
    text: Any, place: int, count: int, carried: dict[str, list[Any]], found: Row, as_is: bool
) -> None:
    """Append one generation to ``found``, or the reason why it is left out."""
    if text is None:
        found.odd.append(("no_generation", "null"))
        return
    problem = text_problem(text)
    if problem and not (as_is and problem == "empty"):
        found.odd.append((f"generation_{problem}", shown(text)))
        return
    if not as_is:
        _, answer = split_thought(text, found.text or "")
        if answer is None or not answer.strip():
            found.odd.append(("only_thinking", shown(text)))
            return
        text = answer
    generation: dict[str, Any] = {"text": text, "content": content_hash(text)}
    for name, values in carried.items():
        # One value for each generation, or one for all of them.
        value = values[place] if len(values) == count else single(values)
        accepted = of_type(value, SCHEMA.field(name).type)
        if name == "finish_reason":
            accepted = FINISH_REASONS.get(accepted, accepted)
        if value is not None and accepted is None:
            found.odd.append((f"odd_{name}", shown(value)))
        generation[name] = accepted
    if "index" in carried and (generation["index"] is None or generation["index"] < 0):
        found.odd.append(("no_index", "the column that numbers generations is empty"))
        return
    found.generations.append(generation)


def values_at(value: Any, path: Path) -> list[Any]:
    """The values at a path, lists on the way opened; None stands where a struct lacks it."""
    if isinstance(value, list):
        return [one for item in value for one in values_at(item, path)]
    if not path:
        return [value]
    if isinstance(value, dict):
        return values_at(value.get(path[0]), path[1:])
    return [None]


def single(values: list[Any]) -> Any:
    """The only value; None for none, the list for several."""
    if len(values) == 1:
        return values[0]
    return values or None


def text_problem(text: Any) -> str | None:
    """What is wrong with a text, as the end of a reason."""
    if not isinstance(text, str):
        return "empty" if text is None else "wrong_type"
    if not text.strip():
        return "empty"
    return None if encodable(text) else "not_utf8"


def encodable(text: str) -> bool:
    """False where JSON escaped one half of a character, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def of_type(value: Any, wanted: pa.DataType) -> Any:
    """The value if it fits the column of a store, else None."""
    if pa.types.is_boolean(wanted):
        return value if isinstance(value, bool) else None
    if isinstance(value, bool):
        return None
    if pa.types.is_integer(wanted):
        limit = 1 << (wanted.bit_width - 1)
        return value if isinstance(value, int) and -limit <= value < limit else None
    if pa.types.is_floating(wanted):
        return float(value) if isinstance(value, int | float) else None
    return value if isinstance(value, str) and encodable(value) else None


def content_hash(text: str) -> int:
    """64 bits that tell texts apart, signed as Parquet has it."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def is_json_object(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return isinstance(json.loads(value), dict)
    except ValueError:
        return False


def shown(value: Any) -> str:
    return repr(value)[:60]
