"""Sections of reStructuredText become plain documents."""

from pathlib import Path

from benchmarks.study_corpus import LONGEST, SHORTEST, documents

PROSE = (
    "The :func:`~asyncio.run` function *must* be called with ``main()``, see `the guide\n"
    "<https://example.org>`_ for **all** of its rules and for what they are worth to you. "
)
PLAIN = (
    "The asyncio.run function must be called with main(), see the guide for all of its rules and "
    "for what they are worth to you."
)


def test_sections_are_prose_without_marks(tmp_path: Path) -> None:
    page = [
        "Running things",
        "==============",
        "",
        ".. code-block:: python",
        "",
        "   " + "print('code is left out') " * 30,
        "",
        *[PROSE + "\n"] * 8,
        "Short",
        "-----",
        "",
        PROSE,
        "",
        "Long",
        "----",
        "",
        *[f"{place} {PROSE}\n" for place in range(40)],
    ]
    (tmp_path / "library").mkdir()
    for name in ("a", "copy"):  # of what is there twice one is kept
        (tmp_path / "library" / f"{name}.rst.txt").write_text("\n".join(page))
    found = {one["id"]: one["text"] for one in documents(tmp_path)}
    assert found["library/a#1"] == "\n\n".join(["Running things", *[PLAIN] * 8])
    long = [text for text in found.values() if text.startswith("Long\n\n")]
    assert len(found) == 1 + len(long)
    assert len(long) == 3
    assert sum(text.count(PLAIN) for text in long) == 40
    assert all(SHORTEST <= len(text) <= 1.5 * LONGEST + len("Long\n\n") for text in long)
