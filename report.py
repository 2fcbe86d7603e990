"""Compare finished runs: ``python report.py runs=runs`` prints a table and writes an HTML page.

``python report.py question=data_efficiency runs=runs`` answers that question in a few lines.
"""

from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from trainer.errors import user_errors
from trainer.study.report import answer_data_efficiency, write_report


@dataclass
class ReportConfig:
    """Which runs, and where the report goes."""

    runs: str = "runs"  # folder with run folders, at any depth
    output: str | None = None  # null: <runs>/report
    question: str | None = None  # data_efficiency: print that answer, write nothing


ConfigStore.instance().store(name="report_schema", node=ReportConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="report")
@user_errors
def main(config: DictConfig) -> None:
    options = OmegaConf.to_object(config)
    assert isinstance(options, ReportConfig)
    runs = Path(options.runs)
    if options.question is not None:
        if options.question != "data_efficiency":
            raise ValueError(f"question={options.question} is not one of data_efficiency")
        print(answer_data_efficiency(runs))
        return
    table, page = write_report(runs, Path(options.output) if options.output else runs / "report")
    print(table)
    print(f"\nreport: {page}")


if __name__ == "__main__":
    main()
