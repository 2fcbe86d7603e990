"""The list for a GPU: rehearsed on a CPU, stopped in time, taken up again; the page's table."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, table
from benchmarks.gpu import STEPS, State, Step

MODULE = "tests.benchmarks.gpu_step"


@pytest.mark.slow
def test_the_whole_list_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    code = gpu.main(["--rehearse"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    lines = {line.split()[0]: line for line in printed.splitlines() if line}
    for step in STEPS:
        assert ("rehearsed" in lines[step.name]) == (step.rehearsal is not None)


def test_steps_end_in_time_and_failures_are_told(tmp_path: Path) -> None:
    [good, failing, slow] = (Step(what, MODULE, what, None) for what in ("write", "fail", "sleep"))
    assert gpu.run(good, tmp_path, 60) == ""
    assert (tmp_path / "write.json").exists()
    assert gpu.run(failing, tmp_path, 60) == "exit 1: no such kernel"
    assert gpu.run(slow, tmp_path, 0.2) is None
    assert (tmp_path / "logs" / "fail.txt").read_text() == "no such kernel\n"


def test_a_run_goes_on_where_the_last_one_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, failed = STEPS[:2]
    state = State(tmp_path)
    state.add(done, "", 1.0)
    state.add(failed, "exit 1", 1.0)
    state = State(tmp_path)
    assert [state.open(step) for step in STEPS[:3]] == [False, False, True]
    monkeypatch.setattr(gpu, "source_hash", lambda: "mended")
    assert [state.open(step) for step in STEPS[:3]] == [False, True, True]


def test_without_a_gpu_it_says_how_to_rehearse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "--rehearse" in capsys.readouterr().out


def test_the_list_and_the_table_name_each_other() -> None:
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    assert {figure.step for figure in table.FIGURES} <= set(names)


def test_the_page_holds_the_newest_table() -> None:
    page = table.PAGE.read_text()
    assert table.with_table(page) == page, "python -m benchmarks.table --write"


def forward_rows(**medians: float) -> list[dict[str, Any]]:
    shared = {"pack": "one", "pass": "forward"}
    return [shared | {"provider": who, "seconds": {"median": m}} for who, m in medians.items()]


def test_figures_are_read_from_the_results_and_nothing_is_made_up(tmp_path: Path) -> None:
    empty = table.markdown(tmp_path)
    assert empty.splitlines()[0] == "| figure | target | command |"
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    results = {
        "varlen-memory": {
            "results": [
                {"backend": "flash", "segments": 11, "peak_bytes": 2**30},
                {"backend": "flash", "segments": 4400, "failed": "OutOfMemoryError"},
            ]
        },
        "step-300m-4k-none": {
            "results": [
                {"way": "torch loss", "tokens_per_second": 1000.0, "mfu": 0.4},
                {"way": "triton loss", "tokens_per_second": 1250.0, "mfu": 0.5},
            ]
        },
        "attention": {"results": {"rows": forward_rows(triton=2.0, gluon=1.5, flash=3.0, fa3=1.2)}},
        "loss": {"results": [{"provider": "ours triton fast", "ratio_to_floor": 1.07}]},
        "tests": {"summary": "== 40 passed in 60.00s =="},
        "check-300m": {"results": {"attention": {"line": "attention: gluon, 2.00 ms"}}},
    }
    for name, content in results.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[2] for line in
             table.markdown(tmp_path).splitlines()[2:]}  # fmt: skip
    assert cells["attention that `auto` takes, 300M heads"] == "gluon, 2.00 ms"
    assert cells["GiB of FlashAttention's backward pass (segments)"] == "1.0 (11), failed (4,400)"
    assert (
        cells["300M, 64k tokens, 4k context, mask none"]
        == "50.0% MFU, 1,250 tokens/s (triton loss)"
    )
    assert cells["attention forward, one document"] == "0.80 x fa3 (gluon)"
    assert cells["loss over its three matrix products"] == "1.07 (ours triton fast)"
    assert cells["tests marked gpu"] == "40 passed in 60.00s"
    assert cells["300M, 32k context"] == ""
    assert cells["attention backward, one document"] == "failed, see the file"
    assert cells["the same of cuDNN's"] == ""
