"""A run is what it read: streams built again are other data, the same streams elsewhere are not."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainer.conftest import StreamMaker
from trainer.config.schema import (
    DataConfig,
    ModelConfig,
    RecipeConfig,
    RuntimeConfig,
    TrackingConfig,
    TrainConfig,
)
from trainer.loop import train
from trainer.run.inputs import run_dir_of
from trainer.run.run_dir import finished_loss
from trainer.study.report import write_report
from trainer.study.runs import read_study

LENGTHS = [[12]] * 8


@pytest.fixture
def settings(make_stream: StreamMaker, tmp_path: Path) -> TrainConfig:
    for name in ("real", "val"):
        make_stream(name, LENGTHS)
    return TrainConfig(
        data=DataConfig(root=str(tmp_path), context_length=16, batch_size=2),
        recipe=RecipeConfig(epochs=1),
        model=ModelConfig(16, 32, 1, 2, 1),
        runtime=RuntimeConfig(num_threads=1),
        tracking=TrackingConfig(tensorboard=False),
        output=str(tmp_path / "runs"),
    )


def test_the_same_streams_elsewhere_are_the_same_run(
    make_stream: StreamMaker,
    settings: TrainConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loss = train(settings)
    for name in ("real", "val"):
        make_stream(name, LENGTHS, root=tmp_path / "moved")
    moved = replace(settings, data=replace(settings.data, root=str(tmp_path / "moved")))
    assert run_dir_of(moved) == run_dir_of(settings)
    assert train(moved) == loss
    assert "is already trained" in capsys.readouterr().out


Rebuild = Callable[[StreamMaker], object]


@pytest.mark.parametrize(
    "rebuild",
    [
        lambda make: make("real", LENGTHS, shift=1),  # other texts of the same lengths
        lambda make: make("val", LENGTHS, shift=1),
        lambda make: make("real", [[5, 7], *LENGTHS[1:]]),  # other members
        lambda make: make("real", LENGTHS, tokenizer_sha256="e" * 64),
        lambda make: make("real", LENGTHS[:-1]),
    ],
)
def test_streams_built_again_are_other_data(
    make_stream: StreamMaker, settings: TrainConfig, rebuild: Rebuild
) -> None:
    named = replace(settings, name="mine")
    loss = train(named)
    before = run_dir_of(settings)
    rebuild(make_stream)
    assert run_dir_of(settings) != before  # a new run: nothing old is found or read
    assert finished_loss(settings) is None
    result = Path(settings.output) / "mine" / "result.json"
    with pytest.raises(ValueError, match=r"other data .* \((real|val): \w{12} -> \w{12}\)"):
        train(named)
    result.unlink()
    with pytest.raises(ValueError, match=r"other data|another tokenizer"):  # nor is it resumed
        train(named)
    for name in ("real", "val"):
        make_stream(name, LENGTHS)
    assert train(named) == loss


def test_the_report_keeps_runs_of_different_data_apart(
    make_stream: StreamMaker, settings: TrainConfig, tmp_path: Path
) -> None:
    train(settings)
    make_stream("real", LENGTHS, shift=1)
    train(replace(settings, seed=1))
    study = read_study(Path(settings.output))
    assert [len(group.runs) for group in study.groups] == [1, 1]
    text, page = write_report(Path(settings.output), tmp_path / "report")
    assert "caution: real G=- was trained on different data, which is kept apart" in text
    assert "Caution: real G=- was trained" in page.read_text()

    make_stream("val", LENGTHS, shift=1)
    train(replace(settings, seed=2))
    with pytest.raises(ValueError, match="evaluated with content_sha256="):
        read_study(Path(settings.output))


def test_a_damaged_result_names_its_file(settings: TrainConfig) -> None:
    loss = train(settings)
    result = run_dir_of(settings) / "result.json"
    for content in (b"", b"\xff", b"{}", b"[1]", b'{"loss": {"iid": "x"}}'):
        result.write_bytes(content)
        with pytest.raises(ValueError, match=r"result\.json is damaged .* delete it and start"):
            train(settings)
    result.unlink()
    assert train(settings) == loss
    assert json.loads(result.read_text())["inputs"].keys() == {"real", "val"}
