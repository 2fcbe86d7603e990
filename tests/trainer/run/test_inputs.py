"""A run is what it read: streams built again are other data, the same streams elsewhere are not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.conftest import EOS, VOCABULARY, StreamMaker
from trainer.config.evaluate import EvaluateConfig
from trainer.config.schema import (
    DataConfig,
    ModelConfig,
    RecipeConfig,
    RuntimeConfig,
    TrackingConfig,
    TrainConfig,
)
from trainer.evaluation import ensemble
from trainer.evaluation.command import evaluate
from trainer.loop import train
from trainer.model.llama import Llama
from trainer.run.export import hugging_face_config, save_shards
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


def write_weights(folder: Path, config: TrainConfig, seed: int) -> str:
    """A Llama folder that fits the streams' vocabulary."""
    model = replace(config.model, vocab_size=VOCABULARY)
    content = hugging_face_config(replace(config, model=model), EOS)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content))
    save_shards(Llama(model, seed, torch.float32).state_dict(), folder)
    return str(folder)


def test_other_weights_in_the_same_folder_are_another_run(
    settings: TrainConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "llama"
    settings = replace(settings, initial_weights=write_weights(folder, settings, 1))
    named = replace(settings, name="mine")
    loss, before = train(settings), run_dir_of(settings)
    train(named)
    shutil.move(folder, tmp_path / "moved")
    moved = replace(settings, initial_weights=str(tmp_path / "moved"))
    assert run_dir_of(moved) == before
    assert train(moved) == loss
    write_weights(folder, settings, 2)
    assert run_dir_of(settings) != before
    with pytest.raises(ValueError, match=r"other data .*\(initial_weights: \w{12} -> \w{12}\)"):
        train(named)
    assert train(settings) != loss


def test_a_lost_config_is_written_again_for_the_same_experiment_alone(
    settings: TrainConfig,
) -> None:
    named = replace(settings, name="mine")
    loss = train(named)
    config = run_dir_of(named) / "config.yaml"
    content = config.read_bytes()
    config.unlink()
    other = replace(named, recipe=replace(named.recipe, learning_rate=0.1))
    with pytest.raises(ValueError, match=r"no config\.yaml, and it is not the result of this"):
        train(other)
    assert train(named) == loss
    assert config.read_bytes() == content
    config.unlink()
    (config.parent / "result.json").unlink()
    with pytest.raises(ValueError, match=r"was trained with another config"):
        train(other)
    config.unlink()
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


def test_scores_are_of_the_weights_that_were_scored(
    settings: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (replace(settings, name=f"seed-{seed}", seed=seed) for seed in (0, 1))
    for named in (first, second):
        train(named)
    runs = [str(run_dir_of(named)) for named in (first, second)]
    both = str(tmp_path / "runs" / "ensembles" / "both.json")
    evaluate(EvaluateConfig(runs=runs[:1], sets=["real"]))
    evaluate(EvaluateConfig(runs=runs, output=both))
    study = read_study(tmp_path / "runs")
    assert [("real" in run.result["loss"]) for run in study.runs] == [True, False]
    assert [one.name for one in study.ensembles] == ["both"]

    folder = run_dir_of(first)
    shutil.rmtree(folder / "checkpoints")
    (folder / "result.json").unlink()
    train(replace(first, recipe=replace(first.recipe, learning_rate=0.1)))
    study = read_study(tmp_path / "runs")
    assert not any("real" in run.result["loss"] for run in study.runs)
    assert study.ensembles == []
    assert f"{folder}/sets.json holds scores of weights that were trained here before" in (
        caplog.text
    )
    assert f"both.json is left out: {folder} was trained again since" in caplog.text

    (folder / "sets.json").write_text("{")  # damage costs no evaluation either
    evaluate(EvaluateConfig(runs=runs[:1], sets=["real"]))
    evaluate(EvaluateConfig(runs=runs, output=both))
    study = read_study(tmp_path / "runs")
    assert sum("real" in run.result["loss"] for run in study.runs) == 1
    assert len(study.ensembles) == 1


def test_documents_that_a_run_may_know_are_said_before_it_is_evaluated(
    make_stream: StreamMaker, settings: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    make_stream("val", LENGTHS, shift=3)
    train(settings)
    run = run_dir_of(settings)
    evaluate(EvaluateConfig(runs=[str(run)]))
    assert "held out" not in caplog.text
    assert "trained on" not in caplog.text
    evaluate(EvaluateConfig(runs=[str(run)], sets=["real"]))
    assert f"{run} was trained on real: its loss there says nothing" in caplog.text
    make_stream("simple-g2", LENGTHS, shift=2)
    mixed = replace(settings.recipe, stream="simple", generations=2, mixing_fraction=0.5)
    second = replace(settings, recipe=mixed)
    train(second)
    evaluate(EvaluateConfig(runs=[str(run), str(run_dir_of(second))], sets=["simple-g2"]))
    assert f"{run_dir_of(second)} was trained on simple-g2" in caplog.text  # the first was not
    make_stream("val", LENGTHS, shift=1)  # another split of the same corpus, perhaps
    evaluate(EvaluateConfig(runs=[str(run)]))
    assert f"streams/val is not what {run} held out" in caplog.text
    assert "it may have been trained on some of these documents" in caplog.text


def test_a_member_or_a_set_that_does_not_fit_is_refused_before_any_is_loaded(
    make_stream: StreamMaker, settings: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(settings.data, context_length=32)
    both = (settings, replace(settings, data=data))
    for one in both:
        train(one)
    runs = [str(run_dir_of(one)) for one in both]
    monkeypatch.setattr(ensemble, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"read with data\.context_length=32"):
        evaluate(EvaluateConfig(runs=runs))
    make_stream("other", LENGTHS, tokenizer_sha256="e" * 64)
    with pytest.raises(ValueError, match=r"streams/other was written with eeeeeeeeeeee"):
        evaluate(EvaluateConfig(runs=runs[:1], sets=["other"]))


def test_a_copy_of_a_run_is_no_second_member(settings: TrainConfig, tmp_path: Path) -> None:
    train(settings)
    run = run_dir_of(settings)
    shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(ValueError, match=rf"a member twice: .*copy holds the weights of {run}"):
        evaluate(EvaluateConfig(runs=[str(run), str(tmp_path / "copy")]))


def test_a_config_beside_another_runs_result_is_noticed(
    settings: TrainConfig, tmp_path: Path
) -> None:
    other = replace(settings, seed=1, recipe=replace(settings.recipe, learning_rate=0.1))
    for one in (settings, other):
        train(one)
    shutil.copy(run_dir_of(other) / "config.yaml", run_dir_of(settings) / "config.yaml")
    with pytest.raises(ValueError, match=r"of two runs: recipe\.learning_rate, seed differ"):
        read_study(tmp_path / "runs")


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
