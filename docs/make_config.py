"""Write ``docs/config.md``, every key of the four programs, from the schemas: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gen.pipeline import GenerateConfig  # noqa: E402
from trainer.config.evaluate import EvaluateConfig  # noqa: E402
from trainer.config.fields import Row, rows  # noqa: E402
from trainer.config.report import ReportConfig  # noqa: E402
from trainer.config.schema import TrainConfig  # noqa: E402
from trainer.study.comparison.design import Arm, StudyDesign  # noqa: E402

PAGE = ROOT / "docs" / "config.md"
HEAD = """# Every key of the four programs

Made from the schemas by `make docs`; a test keeps it current. A key is set on the command line
(`python train.py data.context_length=8192`), or in a YAML file of your own that `--config-dir`
finds. Values outside what is allowed are refused before anything is read or written.
"""
STUDY = """
A study (`study=`) is a YAML that fills these keys; [study.md](study.md) tells how it runs.

| key | type | default | allowed | meaning |
|---|---|---|---|---|
"""
PROGRAMS = {
    "train.py": (TrainConfig, "conf/train"),
    "generate.py": (GenerateConfig, "conf/generate"),
    "evaluate.py": (EvaluateConfig, "conf/evaluate"),
    "report.py": (ReportConfig, "conf/report"),
}


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    for program, (schema, folder) in PROGRAMS.items():
        parts.append(f"\n## {program}\n")
        for group in choices(ROOT / folder):
            parts.append(group)
        parts.append("\n| key | type | default | allowed | meaning |\n|---|---|---|---|---|\n")
        parts.extend(line(row) for row in rows(schema))
        if schema is TrainConfig:
            parts.append(STUDY)
            parts.extend(line(row) for row in rows(StudyDesign, "hydra.sweeper."))
            parts.append("\nAn arm:\n\n| key | type | default | allowed | meaning |\n")
            parts.append("|---|---|---|---|---|\n")
            parts.extend(line(row) for row in rows(Arm, "hydra.sweeper.arms.NAME."))
    return "".join(parts)


def choices(folder: Path) -> list[str]:
    """One line for each config group: what ``group=`` can be."""
    lines = []
    for group in sorted(path for path in folder.rglob("*") if path.is_dir()):
        names = sorted(path.stem for path in group.glob("*.yaml"))
        if names:
            shown = ", ".join(f"`{name}`" for name in names)
            lines.append(f"\n`{group.relative_to(folder)}=` {shown}\n")
    return lines


def line(row: Row) -> str:
    """One row of the table."""
    if row.type == "group":
        return f"| **{row.key}** | | | | {cell(row.meaning)} |\n"
    allowed = " ".join(part for part in (row.allowed, row.unit) if part)
    return (
        f"| `{row.key}` | {row.type} | `{cell(row.default)}` | {cell(allowed)} | "
        f"{cell(row.meaning)} |\n"
    )


def cell(text: str) -> str:
    """Text that does not end its cell."""
    return text.replace("|", "\\|").replace("\n", "\\n")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE}")
