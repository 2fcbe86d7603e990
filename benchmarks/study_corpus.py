"""The corpus of the study: sections of Python's documentation as plain prose, one JSON line each.

    apt-get download python3.11-doc && dpkg -x python3.11-doc_*.deb docs
    python -m benchmarks.study_corpus docs/usr/share/doc/python3.11/html/_sources > sections.jsonl
    python generate.py root=data/python-docs corpus=jsonl corpus.path=sections.jsonl \\
        corpus.id_column=id corpus.held_out=0.15 corpus.token_budget=250000 \\
        corpus.near_duplicates=drop method.generations=8 method.max_tokens=640 method.prompt=...

with the prompt of ``make demo``, which asks a small model for as many words as the text has.

A section is what stands between two headings. Directives, code, lists and tables are left out, the
marks of roles, literals and emphasis taken away. Sections under 600 characters are left out, longer
ones than 2,000 divided at paragraphs. The order is random, so that the first documents, which a
token budget takes, are of all parts. The documentation is under the PSF License 2.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

SHORTEST, LONGEST, PARAGRAPH = 600, 2000, 80  # characters
UNDERLINE = re.compile(r"^([=\-~^\"'*+#.`])\1{2,}\s*$")
NO_PROSE = (" ", "\t", "..", "|", "+--", "===", ">>>", "#", ":", "* ", "- ", "---")
MARKS = [
    (re.compile(r":[a-zA-Z:+-]+:`~?!?\.?([^`<]*?)(?:\s*<[^>`]*>)?`"), r"\1"),  # roles
    (re.compile(r"`([^`<]+?)(?:\s*<[^>`]*>)?`__?"), r"\1"),  # links
    (re.compile(r"``([^`]*)``"), r"\1"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^*\s][^*]*)\*"), r"\1"),
    (re.compile(r"\s+"), " "),
]


def plain(text: str) -> str:
    """One paragraph without the marks of reStructuredText."""
    for pattern, replacement in MARKS:
        text = pattern.sub(replacement, text)
    return text.strip().removesuffix("::").strip()


def sections(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Heading and paragraphs of each section of a file; the first may have no heading."""
    heading = ""
    paragraphs: list[str] = []
    block: list[str] = []
    for line in [*lines, ""]:
        if UNDERLINE.match(line) and len(block) == 1 and not block[0].startswith(" "):
            yield heading, paragraphs
            heading, paragraphs, block = plain(block[0]), [], []
        elif line.strip() and not UNDERLINE.match(line):
            block.append(line.rstrip())
        else:
            text = "\n".join(block)
            if len(text) > PARAGRAPH and not text.startswith(NO_PROSE):
                paragraphs.append(plain(text))
            block = []
    yield heading, paragraphs


def parts(paragraphs: Sequence[str]) -> Iterator[str]:
    """Texts of at most about :data:`LONGEST` characters, as even as the paragraphs allow."""
    total = sum(map(len, paragraphs))
    wanted = total / max(1, -(-total // LONGEST))
    held: list[str] = []
    for paragraph in paragraphs:
        held.append(paragraph)
        if sum(map(len, held)) >= wanted:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)


def documents(folder: Path) -> list[dict[str, str]]:
    """``id`` and ``text`` of every section of the ``.rst.txt`` files below a folder, shuffled."""
    found: dict[str, dict[str, str]] = {}  # by text: some sections are there twice
    for path in sorted(folder.rglob("*.rst.txt")):
        name = path.relative_to(folder).as_posix().removesuffix(".rst.txt")
        count = 0
        for heading, paragraphs in sections(path.read_text(encoding="utf-8").splitlines()):
            for body in parts(paragraphs):
                if SHORTEST <= len(body) <= 1.5 * LONGEST and body not in found:
                    count += 1
                    text = f"{heading}\n\n{body}" if heading else body
                    found[body] = {"id": f"{name}#{count}", "text": text}
    ordered = list(found.values())
    random.Random(0).shuffle(ordered)
    return ordered


def main() -> None:
    """Print the documents below the folder that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with .rst.txt files, at any depth")
    folder = parser.parse_args().folder
    if not (found := documents(folder)):
        parser.error(f"{folder} holds no .rst.txt files with sections of prose")
    for document in found:
        print(json.dumps(document, ensure_ascii=False))


if __name__ == "__main__":
    main()
