"""Compare finished runs: ``python report.py runs=runs`` prints a table and writes an HTML page."""

from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from trainer.errors import user_errors
from trainer.report import write_report


@dataclass
class ReportConfig:
    """Which runs, and where the report goes."""

    runs: str = "runs"  # folder with run folders, at any depth
    output: str | None = None  # null: <runs>/report


ConfigStore.instance().store(name="report_schema", node=ReportConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="report")
@user_errors
def main(config: DictConfig) -> None:
    options = OmegaConf.to_object(config)
    assert isinstance(options, ReportConfig)
    runs = Path(options.runs)
    table, page = write_report(runs, Path(options.output) if options.output else runs / "report")
    print(table)
    print(f"\nreport: {page}")


if __name__ == "__main__":
    main()
