"""Settings that document and check themselves: meaning, unit, default and bounds in one place.

A config is a dataclass whose fields are declared with :func:`setting` and :func:`group`. From their
metadata come the checks (:func:`check_bounds`), the error messages and the page ``docs/config.md``
(:func:`rows`). Imports nothing of the project, so that every program can use it.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from omegaconf import MISSING


@dataclass(frozen=True)
class Bounds:
    """The interval that a number must lie in; null values are always allowed."""

    above: float | None = None  # exclusive
    at_least: float | None = None  # inclusive
    below: float | None = None  # exclusive
    at_most: float | None = None  # inclusive

    def hold(self, value: float) -> bool:
        """Whether ``value`` is finite and inside."""
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        low = self.above if self.above is not None else self.at_least
        high = self.below if self.below is not None else self.at_most
        if low is None and high is None:
            return ""
        if high is None:
            return f"above {low:g}" if self.above is not None else f"at least {low:g}"
        if low is None:
            return f"below {high:g}" if self.below is not None else f"at most {high:g}"
        opening = "(" if self.above is not None else "["
        closing = ")" if self.below is not None else "]"
        return f"in {opening}{low:g}, {high:g}{closing}"


class Place(enum.Enum):
    """Where a path may lead."""

    here = "here"  # this machine, or a folder it shares
    anywhere = "anywhere"  # also what a URI names


def setting(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: Sequence[str] = (),
    place: Place | None = None,
) -> Any:
    """A dataclass field with its meaning, its unit and the values that are allowed.

    Args:
        default: the value where the user gives none; lists and dictionaries are copied.
        meaning: one or two plain sentences, as ``docs/config.md`` shows them.
        unit: of the number, such as ``tokens`` or ``seconds``.
        above, at_least, below, at_most: bounds of a number, checked by :func:`check_bounds`.
        choices: the allowed strings, where an Enum would be too much.
        place: of a path: where it may lead.
    """
    metadata = {
        "meaning": meaning,
        "unit": unit,
        "bounds": Bounds(above, at_least, below, at_most),
        "choices": tuple(choices),
        "place": place,
    }
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(schema: type, meaning: str) -> Any:
    """A dataclass field that holds another config."""
    return field(default_factory=schema, metadata={"meaning": meaning})


def required_list(meaning: str, place: Place | None = None) -> Any:
    """A list without a default: Hydra asks for it where it is missing."""
    metadata = {"meaning": meaning, "bounds": Bounds(), "choices": (), "place": place}
    return field(default_factory=lambda: MISSING, metadata=metadata)


def size_in_bytes(text: str | None, name: str) -> int | None:
    """``200gb``, ``1.5 TB`` or a number as bytes, in powers of ten; None stays None.

    Raises:
        ValueError: it is no size; names the setting.
    """
    if text is None:
        return None
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", str(text).strip().lower())
    if found is None or found[2] not in units:
        raise ValueError(f"{name}={text} is no size; write it as 500mb, 200gb or 2tb")
    return int(float(found[1]) * units[found[2]])


def check_bounds(config: Any, prefix: str = "") -> None:
    """Raise ValueError naming the first key below ``prefix`` whose value is not allowed."""
    for one in dataclasses.fields(config):
        key, value = prefix + one.name, getattr(config, one.name)
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{key}.")
            continue
        metadata = one.metadata
        if value is None or "bounds" not in metadata:
            continue
        bounds, choices = metadata["bounds"], metadata["choices"]
        meaning = metadata["meaning"]
        values = value if isinstance(value, list) else [value]
        for single in values:
            if isinstance(single, int | float) and not isinstance(single, bool):
                if not bounds.hold(single):
                    wanted = str(bounds) or "a finite number"
                    verb = "must all be" if isinstance(value, list) else "must be"
                    raise ValueError(f"{key}={value} {verb} {wanted}: {meaning}")
            elif choices and single not in choices:
                raise ValueError(f"{key}={value} is not one of {', '.join(choices)}: {meaning}")
            elif metadata["place"] is not None:
                check_place(key, single, metadata["place"])


def check_place(key: str, path: str, place: Place) -> None:
    """Raise ValueError where a URI is no path, which would quietly be a folder ``s3:``."""
    if path.startswith("file:"):
        plain = url2pathname(urlsplit(path).path)
        raise ValueError(f"{key}={path} names a path of this machine: write {key}={plain}")
    if "://" in path and place is Place.here:
        raise ValueError(
            f"{key}={path} must be a path of this machine, or of a folder it shares with others; "
            "URIs are for data.root, upload, export, import.path and text sets"
        )


@dataclass(frozen=True)
class Row:
    """One line of ``docs/config.md``."""

    key: str
    type: str
    default: str
    allowed: str  # bounds or choices
    unit: str
    meaning: str


def rows(schema: type, prefix: str = "") -> Iterator[Row]:
    """Every key of a config with what is known of it, groups before their keys."""
    hints = typing.get_type_hints(schema)
    for one in dataclasses.fields(schema):
        key, hint, metadata = prefix + one.name, hints[one.name], one.metadata
        if "meaning" not in metadata:
            raise TypeError(f"{schema.__name__}.{one.name} has no meaning: declare it by setting()")
        if dataclasses.is_dataclass(hint):
            yield Row(key, "group", "", "", "", metadata["meaning"])
            yield from rows(typing.cast(type, hint), f"{key}.")
            continue
        plain, allowed = describe_type(hint)
        allowed = (
            allowed or ", ".join(metadata.get("choices", ())) or str(metadata.get("bounds", ""))
        )
        yield Row(
            key,
            plain,
            describe_default(one),
            allowed,
            metadata.get("unit", ""),
            metadata["meaning"],
        )


def describe_type(hint: Any) -> tuple[str, str]:
    """Name of a type, and the values of an Enum."""
    if isinstance(hint, types.UnionType):
        kinds = [one for one in typing.get_args(hint) if one is not type(None)]
        plain, allowed = describe_type(kinds[0])
        return f"{plain} or null", allowed
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "choice", ", ".join(one.name for one in hint)
    if typing.get_origin(hint) is not None:
        return str(hint).replace("typing.", ""), ""
    return hint.__name__, ""


def describe_default(one: dataclasses.Field[Any]) -> str:
    """The default as one would write it on a command line."""
    factory: Callable[[], Any] | Any = one.default_factory
    value = factory() if factory is not dataclasses.MISSING else one.default
    if value == MISSING:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
