"""A file that holds something else altogether is named, and ends nothing in a traceback."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from gen.megadocs.progress import streams_status
from gen.pipeline import export_all, quality_report
from tests.damage.small_study import generate_config
from tests.damage.test_flips import files_of, finished, is_made_again, readers, restore  # noqa: F401
from tests.damage.user import User

pytestmark = pytest.mark.slow

CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "not UTF-8": lambda content: b"\xff" + content,
    "other JSON": lambda content: b"[1]",
}


def test_other_contents_of_any_file_are_found_and_named(
    finished: Path,  # noqa: F811
    user: User,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for place, (file, reader) in enumerate(list(readers(finished, user.source))):
        names = list(CONTENTS)
        for name in (names[place % 4], names[(place + 1) % 4]):
            intact = files_of(file.parent)
            file.write_bytes(CONTENTS[name](intact[file]))
            caplog.clear()
            try:
                reader()
            except (ValueError, OSError) as error:
                said = str(error)
            else:
                warnings = [one for one in caplog.records if one.levelno >= logging.WARNING]
                said = "\n".join(one.getMessage() for one in warnings)
                assert said or is_made_again(file), f"{file}, {name}: was believed"
            if said:
                named = {file.name, file.name.removesuffix(".sha256"), file.parent.name}
                assert any(one in said for one in named), f"{file}, {name}: {said}"
            restore(file.parent, intact)


@pytest.mark.parametrize("task", [quality_report, export_all])
def test_damaged_documents_reach_no_report_and_no_export(
    task: Callable[..., str],
    finished: Path,  # noqa: F811
    user: User,
) -> None:
    file = finished / "documents" / "train.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    config = generate_config(user.source, finished, "http://nobody")
    target = [finished.parent / "dataset"] if task is export_all else []
    with pytest.raises(ValueError, match=r"train\.parquet is damaged: .* delete .*/documents and"):
        task(config, finished, *target)


def test_the_status_of_the_streams_is_told_beside_what_is_damaged(
    finished: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = streams_status(finished).splitlines()
    (keys, *_) = finished.glob("tokens/*/*.keys")
    keys.write_bytes(b"")
    note = finished / "tokens" / "locks" / "writer-0.json"
    note.parent.mkdir(exist_ok=True)
    note.write_text("{")
    told = streams_status(finished).splitlines()
    assert "writer-0.json is damaged" in caplog.text
    assert len(told) == len(whole)
