"""What the programs' log shows, of which rank, and where."""

import logging

import pytest

from tests.conftest import run_script


@pytest.mark.parametrize(
    ("environment", "first", "prefix"),
    [
        ({}, True, ""),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True, "rank 0: "),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False, "rank 1: "),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, False, "rank 3: "),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, True, ""),
    ],
)
def test_information_of_the_first_rank_and_warnings_of_all(
    environment: dict[str, str],
    first: bool,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    logger = logging.getLogger("trainer.setup")
    logger.info("100% of it")
    logger.warning("a caution")
    logger.error("a fault")
    logger.debug("a detail")
    told = capsys.readouterr()
    assert told.out == ("100% of it\n" if first else "")
    assert told.err == f"{prefix}warning: a caution\n{prefix}error: a fault\n"


def test_libraries_are_quiet_unless_they_warn_or_are_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    library = logging.getLogger("some.library")
    library.info("a request was sent")
    library.warning("it is deprecated")
    library.setLevel(logging.DEBUG)  # as hydra.verbose=some.library does
    library.info("another request")
    told = capsys.readouterr()
    assert told.out == "another request\n"
    assert told.err == "warning: it is deprecated\n"


def test_hydras_own_options_of_the_log_work() -> None:
    quiet = run_script("report.py", "runs=nowhere", check=False)
    assert quiet.stdout == ""
    assert quiet.stderr.startswith("error: ")
    told = run_script("report.py", "runs=nowhere", "hydra.verbose=true", check=False).stdout
    assert "debug: Hydra" in told
    one = run_script("report.py", "runs=nowhere", "hydra.verbose=trainer", check=False)
    assert one.stdout == ""
