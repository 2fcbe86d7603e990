"""Compare finished runs: ``python report.py runs=runs`` prints a table and writes an HTML page.

``python report.py question=data_efficiency runs=runs`` answers that question in a few lines, and
``question=whole_against_cut`` compares two arms of a study (``train.py -m study=...``).
"""

from pathlib import Path

from trainer.config.fields import check_bounds
from trainer.config.report import ReportConfig
from trainer.entry import program
from trainer.files import check_writable


@program("report", ReportConfig)
def main(config: ReportConfig) -> None:
    """Print the table or the answer asked for."""
    from trainer.study.comparison.answer import answer_question
    from trainer.study.comparison.design import arms_of
    from trainer.study.comparison.record import read_record
    from trainer.study.report import answer_data_efficiency, write_report

    check_bounds(config)
    runs = Path(config.runs)
    if config.question == "data_efficiency":
        print(answer_data_efficiency(runs))
        return
    if config.question is not None:
        if arms_of(config.question) is None:
            raise ValueError(
                f"question={config.question} is not one of data_efficiency, A_against_B (two arms "
                "of a study, such as whole_against_cut)"
            )
        print(answer_question(read_record(runs), config.question))
        return
    output = Path(config.output) if config.output else runs / "report"
    check_writable(output, "output=... to a folder for the report")
    table, page = write_report(runs, output)
    print(table)
    print(f"\nreport: {page}")


if __name__ == "__main__":
    main()
