"""The card of an exported dataset: what is in it, what made it, what is left for you to say."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gen.corpus.documents import documents_manifest

CARD = "README.md"


@dataclass
class Part:
    """One config of the dataset."""

    name: str
    settings: dict[str, Any]  # of the store or the stream
    imported: bool
    # Split -> documents (or megadocs), generations, characters of those (megadocs: of all text).
    counts: dict[str, list[int]] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)  # share that fails each gate
    path: str = ""  # of its files, where it is not its name

    @property
    def folder(self) -> str:
        return self.path or self.name

    @property
    def described(self) -> str:
        return "; ".join(
            f"{split}: {rows:,} rows, {generations:,} generations"
            for split, (rows, generations, _) in self.counts.items()
        )


def write_card(folder: Path, root: Path, parts: list[Part]) -> None:
    """``README.md`` with the YAML that ``datasets`` reads, in front of what people do."""
    documents = documents_manifest(root / "documents")
    stores = [part for part in parts if not part.path]
    streams = [part for part in parts if part.path]
    sections = [
        front_matter(parts),
        "# Documents with generations\n",
        "Written by `generate.py export=FOLDER` of megadocs. One config a method: a row is a "
        "document (`id`, `text`, `metadata` as JSON) with the list of its `generations`.\n",
        "```python\nfrom datasets import load_dataset\n"
        f'rows = load_dataset(FOLDER, "{parts[0].name}", split="train", streaming=True)\n```\n',
        "## Counts\n",
        counts_table(parts),
        "## Documents\n",
        documents_section(documents),
        "## Generations\n",
        *(store_section(part) for part in stores),
    ]
    if streams:
        sections += [
            "## Megadocs\n",
            "One config a stream: `text` is the megadoc, member `i` ends at character "
            "`member_ends[i]` (its separator included), is of `member_kinds[i]`, and where a model "
            "wrote it generation `member_indices[i]` of `member_methods[i]`.\n",
            *(stream_line(part) for part in streams),
        ]
    sections += [
        "\n## Licences\n",
        "- documents: FILL IN (their source's licence)",
        *(f"- {part.name}: {licence_of(part)}" for part in stores),
        "\n## How to build it again\n",
        rebuild(stores, documents["config"]["held_out"]),
    ]
    (folder / CARD).write_text("\n".join(sections), encoding="utf-8")


def front_matter(parts: list[Part]) -> str:
    """Where the files of each config and split lie."""
    lines = ["---", "license: other", "configs:"]
    for place, part in enumerate(parts):
        lines += [f'- config_name: "{part.name}"', *(["  default: true"] if not place else [])]
        lines.append("  data_files:")
        for split in part.counts:
            lines += [f"  - split: {split}", f'    path: "{part.folder}/{split}-*.parquet"']
    return "\n".join([*lines, "---", ""])


def counts_table(parts: list[Part]) -> str:
    """Rows, generations and characters of every part and split, as Markdown."""
    lines = [
        "| config | split | rows | generations | characters |",
        "|---|---|--:|--:|--:|",
    ]
    for part in parts:
        for split, (rows, generations, characters) in part.counts.items():
            lines.append(f"| {part.name} | {split} | {rows:,} | {generations:,} | {characters:,} |")
    return "\n".join(lines) + "\n"


def documents_section(manifest: dict[str, Any]) -> str:
    """Where they came from, and what was left out of them."""
    config, counts = manifest["config"], manifest["counts"]
    left_out = ", ".join(f"{counts[name]:,} {name}" for name in ("empty", "duplicate", "too_long"))
    return (
        f"Read from a source of format `{config['format']}`; left out: {left_out}. "
        f"{config['held_out']:.0%} are held out, chosen by a hash of the id, for evaluation.\n"
    )


def store_section(part: Part) -> str:
    """Model, prompt and sampling, or the import; quality figures."""
    lines = [f"### {part.name}\n"]
    if part.imported:
        lines.append(
            f"Imported from files; `provenance/{part.name}.json` has their hashes, what was left "
            f"out and why. Model: {part.settings['model']}.\n"
        )
    settings = {} if part.imported else part.settings
    for name, value in settings.items():
        if value not in (None, "", [], {}) and name not in ("method", "licence"):
            lines.append(f"- {name}: <code>{html.escape(str(value))}</code>")
    if part.quality:
        lines.append("\nShare of the generations of the training documents that fail each gate:\n")
        lines.append("| " + " | ".join(part.quality) + " |")
        lines.append("|" + "--:|" * len(part.quality))
        lines.append("| " + " | ".join(f"{share:.2%}" for share in part.quality.values()) + " |")
    return "\n".join(lines) + "\n"


def stream_line(part: Part) -> str:
    chosen = {
        name: part.settings[name]
        for name in ("separator", "real_document", "methods", "shares", "member_order")
        if part.settings.get(name)
    }
    return f"- {part.name}: " + ", ".join(f"{name} `{value}`" for name, value in chosen.items())


def licence_of(part: Part) -> str:
    return part.settings.get("licence") or "FILL IN (what the model's licence says of its output)"


def rebuild(stores: list[Part], held_out: float) -> str:
    """The command that reads such a folder back."""
    methods = " ".join(f"import.methods.{part.name}={part.name}" for part in stores)
    return (
        "```bash\npython generate.py root=NEW corpus=import generator=import import=megadocs \\\n"
        f"    corpus.held_out={held_out} import.path=FOLDER {methods}\n```\n"
    )
