"""The schema of ``report.py``."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.fields import Place, setting


@dataclass
class ReportConfig:
    """Which runs, and where the report goes."""

    runs: str = setting("runs", "Folder with run folders, at any depth.", place=Place.here)
    output: str | None = setting(
        None, "Folder of the report; null: <runs>/report.", place=Place.here
    )
    question: str | None = setting(
        None,
        "data_efficiency, or A_against_B with two arms of a study, such as whole_against_cut: "
        "print that answer and write nothing; null: the whole report.",
    )
