"""Who trains a run, and whether a requeued job gets anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config.schema import TrainConfig
from trainer.run.run_dir import JOB, check_progress, claimed, state
from trainer.slurm_jobs import queued_job, record_job


def test_a_job_that_is_requeued_twice_for_nothing_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(restarts: int, step: int, job: str = "7") -> None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        check_progress(tmp_path, step)

    for restarts, step in enumerate((0, 0, 12, 12)):  # the second start saved step 12
        start(restarts, step)
    with pytest.raises(ValueError, match="two starts in a row of job 7 made no progress past step"):
        start(4, 12)
    start(5, 13)
    start(0, 13, job="8")  # what another job did says nothing of this one
    start(1, 13, job="8")


def test_processes_of_one_job_that_do_not_know_of_each_other_are_told_how_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with claimed(tmp_path, TrainConfig()):
        with pytest.raises(ValueError, match=r"this same Slurm job 7.*srun python train\.py"):
            claimed(tmp_path, TrainConfig()).__enter__()
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        with pytest.raises(ValueError, match=r"on \S+, Slurm job 7, right now; wait for it"):
            claimed(tmp_path, TrainConfig()).__enter__()


@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b"[1]", b"{}"])
def test_a_damaged_record_of_a_job_is_named_and_ends_no_report(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record_job(tmp_path / JOB, "7")
    (tmp_path / JOB).write_bytes(content)
    with pytest.raises(ValueError, match=r"job\.json is damaged: .* delete that file"):
        queued_job(tmp_path / JOB)
    assert state(tmp_path) == "cut off before its first checkpoint"
    assert "job.json is damaged" in caplog.text


def test_a_damaged_start_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    check_progress(tmp_path, 0)
    starts = tmp_path / "starts.jsonl"
    starts.write_bytes(starts.read_bytes() + b'{"job": "7", "do')  # killed while it wrote
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    check_progress(tmp_path, 0)
    assert "starts.jsonl holds a damaged line" in caplog.text
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.raises(ValueError, match="made no progress"):
        check_progress(tmp_path, 0)
