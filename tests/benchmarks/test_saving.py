"""The benchmark of checkpoints saves and loads as a run does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_two_processes_save_together(tmp_path: Path) -> None:
    output = tmp_path / "saving.json"
    words = ["--models", "tiny", "--ranks", "2", "--rounds", "1", "--output", str(output)]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.saving", *words, "--folder", tmp_path],
        cwd=REPOSITORY,
        check=True,
    )
    results = json.loads(output.read_text())["results"]
    row = results["tiny, 2 processes"]
    assert row["bytes"] == pytest.approx(12 * row["parameters"], rel=0.01)
    assert 0 < row["blocked"] < row["named"]
    assert row["named_a_gigabyte"] == pytest.approx(row["named"] / row["bytes"] * 1e9)
    assert list(tmp_path.iterdir()) == [output]  # gigabytes are not left behind
