"""The benchmark from generations to batches at tiny sizes."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.data import __main__ as data
from benchmarks.data import reading, stages


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that take seconds, in this process: what a child measures is measured elsewhere."""

    calls = itertools.count(1)

    def measured(call: Any, *arguments: Any) -> dict[str, Any]:
        seconds = float(next(calls))  # grows with the sizes, as costs do
        return {**(call(*arguments) or {}), "cpu_seconds": seconds, "peak_megabytes": seconds}

    monkeypatch.setattr(data, "measured", measured)
    monkeypatch.setattr(data, "PLANS", {"tiny": None})
    monkeypatch.setitem(reading.PLANS, "tiny", ((300, 100), (3000, 100)))
    monkeypatch.setattr(reading, "WALKED", 5)
    monkeypatch.setattr(reading, "BATCH_TOKENS", 1 << 14)


@pytest.mark.usefixtures("tiny")
def test_it_measures_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "result.json"
    monkeypatch.setattr(data, "measure_loading", lambda folder, seconds: {"waited": seconds})
    sizes = ["--documents", "10", "20", "--memory", "10", "20", "--loading", "3"]
    common = ["--scratch", str(tmp_path), "--output", str(output)]
    result = data.main([*sizes, *common])
    assert json.loads(output.read_text()) == result
    again = data.main(["--only", "loading", "--loading", "5", *common])
    assert again == {**result, "loading": {"waited": 5.0}} == json.loads(output.read_text())
    assert output.with_suffix(".png").exists()
    for size in result["sizes"]:
        assert size["judge"]["generations"] == size["generations"]
        assert size["read"]["tokens"] == size["read_streaming"]["tokens"]
        assert size["datasets"]["tokens"] > 0
        # Two of the ten streams are written again: those with the most generations.
        assert size["two_again"]["tokens"] < size["ten_streams"]["tokens"]
    assert result["plans"]["tiny"]["documents"] == 3000
    assert set(result["summary"]["memory"]) == {"resume", "judge", "report", "build", "open"}


@pytest.mark.slow
def test_ranks_wait_for_their_data(tmp_path: Path) -> None:
    stages.make_corpus(tmp_path / "corpus", 100, 100)
    name = f"stitched-g{stages.GENERATIONS}"
    stages.build_streams(tmp_path / "corpus", [name])
    for reader in reading.READERS:
        stream = tmp_path / "corpus" / "streams" / name
        found = reading.loading_share(reader, stream, 4096, seconds=0.5, ranks=2)
        assert 0 <= found["share_waited"] <= found["worst_rank"] < 1
        assert found["steps"] > 0
