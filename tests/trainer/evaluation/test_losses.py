"""Evaluation, ensembles, export and report on models trained for a moment."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import run_script
from trainer.config.evaluate import Mean
from trainer.config.schema import (
    DataConfig,
    Mask,
    ModelConfig,
    RecipeConfig,
    RuntimeConfig,
    TrackingConfig,
    TrainConfig,
    load_config,
)
from trainer.data.mds import MegadocStream
from trainer.evaluation.ensemble import (
    evaluate_ensemble,
    mean_logit_losses,
    mean_probability_losses,
)
from trainer.evaluation.losses import evaluation_batches, position_bucket
from trainer.loop import train
from trainer.model.llama import Llama
from trainer.run.checkpoint import load_model
from trainer.run.export import export_run, load_hugging_face
from trainer.run.progress import newest_checkpoint
from trainer.study.report import write_report


@pytest.fixture(scope="module")
def runs(corpus_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real-only seeds and a stitched run."""
    folder = tmp_path_factory.mktemp("runs")
    real = RecipeConfig("real", "real", None, 0, 0.0, 2, 3e-3, 1.6)
    stitched = RecipeConfig("stitched", "real", "stitched", 2, 0.5, 2, 3e-3, 0.4)
    for name, recipe, seed in (("a", real, 0), ("b", real, 1), ("c", stitched, 0)):
        train(
            TrainConfig(
                data=DataConfig(
                    str(corpus_root), context_length=64, batch_size=4, mask=Mask.megadoc
                ),
                recipe=recipe,
                model=ModelConfig(32, 64, 2, 4, 2),
                tracking=TrackingConfig(tensorboard=False, log_every=2),
                runtime=RuntimeConfig(num_threads=1),
                seed=seed,
                output=str(folder),
                name=name,
            )
        )
    return folder


def document_losses(run: Path, stream: MegadocStream) -> list[torch.Tensor]:
    """Loss of every token after the first, documents read whole, in float64."""
    model, _ = load_model(run)
    model = model.double()
    model.compute_dtype = torch.float64
    losses = []
    for index in range(len(stream)):
        ids = torch.from_numpy(stream[index].tokens)
        borders = torch.tensor([0, len(ids)], dtype=torch.int32)
        with torch.no_grad():
            hidden = model.hidden_states(ids, torch.arange(len(ids)), borders, len(ids))
        logits = hidden @ model.lm_head.weight.T
        losses.append(F.cross_entropy(logits[:-1], ids[1:], reduction="none"))
    return losses


def test_losses_equal_a_loop_over_whole_documents(runs: Path, corpus_root: Path) -> None:
    stream = MegadocStream(corpus_root / "streams" / "val")
    expected = document_losses(runs / "a", stream)
    config_path = runs / "a" / "config.yaml"
    text = config_path.read_text()
    unsealed = text.partition("\n")[2]
    config_path.write_text(unsealed.replace("context_length: 64", "context_length: 4096"))
    scores = evaluate_ensemble([runs / "a"])[-1]
    config_path.write_text(text)
    flat = torch.cat(expected)
    assert scores.loss["iid"] == pytest.approx(float(flat.detach().mean()), abs=1e-5)
    short = stream.lengths <= np.median(stream.lengths)
    only_short = torch.cat([loss for loss, chosen in zip(expected, short, strict=True) if chosen])
    assert scores.loss["short"] == pytest.approx(float(only_short.detach().mean()), abs=1e-5)
    second = torch.stack([loss[0] for loss in expected]).mean()
    assert scores.loss_by_position["1"] == pytest.approx(float(second.detach()), abs=1e-5)
    bits = float(flat.detach().sum()) / math.log(2) / stream.manifest.bytes
    assert scores.bits_per_byte == pytest.approx(bits, abs=1e-5)


@pytest.mark.parametrize("mask", list(Mask))
@pytest.mark.parametrize("context", [16, 100])
def test_every_token_is_scored_once(corpus_root: Path, mask: Mask, context: int) -> None:
    stream = MegadocStream(corpus_root / "streams" / "val")
    data = DataConfig(str(corpus_root), context_length=context, mask=mask)
    seen = np.zeros(int(stream.lengths.sum()), dtype=int)
    starts = np.concatenate(([0], stream.lengths.cumsum()))
    for batch, counts in evaluation_batches(stream, data):
        assert counts
        valid = batch.targets != -100
        np.add.at(
            seen,
            starts[batch.target_documents[valid].numpy()] + batch.target_positions[valid].numpy(),
            1,
        )
    firsts = np.isin(np.arange(len(seen)), starts[:-1])
    assert (seen[~firsts] == 1).all()
    assert (seen[firsts] <= (1 if mask is Mask.none else 0)).all()


def test_position_buckets_are_powers_of_two() -> None:
    places = np.array([0, 1, 2, 3, 4, 7, 8, 1023, 1024])
    assert position_bucket(places).tolist() == [0, 1, 2, 2, 3, 3, 4, 10, 11]


@pytest.mark.parametrize("mean", list(Mean))
def test_ensembles_equal_an_explicit_average_in_float64(mean: Mean) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(50, 8, generator=generator).double() * 9 for _ in range(3)]
    heads = [torch.randn(30, 8, generator=generator).double() for _ in range(3)]
    targets = torch.randint(30, (50,), generator=generator)
    targets[::7] = -100
    function = mean_logit_losses if mean is Mean.logits else mean_probability_losses
    losses = function(hidden, heads, targets)
    assert losses.shape == (3, 50)
    assert losses.dtype is torch.float64
    logits = torch.stack([h @ w.T for h, w in zip(hidden, heads, strict=True)])
    for size in (1, 2, 3):
        if mean is Mean.logits:
            logarithms = logits[:size].mean(0).log_softmax(-1)
        else:
            logarithms = logits[:size].softmax(-1).mean(0).log()
        expected = F.nll_loss(logarithms, targets, ignore_index=-100, reduction="none")
        torch.testing.assert_close(losses[size - 1], expected, atol=1e-12, rtol=1e-12)


def test_small_chunks_and_impossible_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target of probability exp(-800) underflows in float64, its loss does not."""
    heads = [torch.tensor([[0.0], [800.0]]).double()] * 2
    hidden, targets = [torch.ones(3, 1).double()] * 2, torch.tensor([0, 1, 0])
    expected = torch.tensor([[800.0, 0.0, 800.0]] * 2).double()
    torch.testing.assert_close(mean_probability_losses(hidden, heads, targets), expected)
    monkeypatch.setattr("trainer.evaluation.ensemble.CHUNK_ELEMENTS", 2)
    torch.testing.assert_close(mean_probability_losses(hidden, heads, targets), expected)
    torch.testing.assert_close(mean_logit_losses(hidden, heads, targets), expected)


def test_every_size_of_an_ensemble_is_scored(runs: Path) -> None:
    single = [evaluate_ensemble([runs / name])[-1].loss["iid"] for name in ("a", "b")]
    for mean in Mean:
        one, two = evaluate_ensemble([runs / "a", runs / "b"], mean=mean)
        assert one.loss["iid"] == pytest.approx(single[0], abs=1e-6)
        # Both means are convex: an ensemble is never worse than its members on average.
        assert two.loss["iid"] < sum(single) / 2
    with pytest.raises(ValueError, match="names a member twice"):
        evaluate_ensemble([runs / "a", runs / "a"])
    result = json.loads((runs / "a" / "result.json").read_text())
    assert single[0] == pytest.approx(result["loss"]["iid"], abs=1e-5)


def test_members_that_differ_are_refused(runs: Path, tmp_path: Path) -> None:
    text = (runs / "b" / "config.yaml").read_text()
    changed = text.partition("\n")[2].replace("mask: megadoc", "mask: none")
    try:
        (runs / "b" / "config.yaml").write_text(changed)
        with pytest.raises(ValueError, match=r"data\.mask"):
            evaluate_ensemble([runs / "a", runs / "b"])
    finally:
        (runs / "b" / "config.yaml").write_text(text)
    progress = newest_checkpoint(runs / "b") / "progress.json"
    other = {"tokenizer_sha256": "0" * 64, "content_seal": None}
    text = progress.read_text()
    try:
        progress.write_text(json.dumps(json.loads(text) | other))
        with pytest.raises(ValueError, match="trained with the tokenizer 000000000000"):
            evaluate_ensemble([runs / "b"])
        with pytest.raises(ValueError, match="trained with the tokenizer 000000000000"):
            export_run(runs / "b", tmp_path / "out")
    finally:
        progress.write_text(text)
    with pytest.raises(FileNotFoundError, match="holds no finished checkpoint"):
        load_model(tmp_path)


def test_export_gives_the_same_logits_in_transformers(runs: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = run_script("evaluate.py", f"runs=[{runs / 'a'}]", f"export={tmp_path / 'out'}")
    assert "written to" in done.stdout
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor(tokenizer("def main(): return 1, 2")["input_ids"])
    ours, _ = load_model(runs / "a")
    borders = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        hidden = ours.hidden_states(ids, torch.arange(len(ids)), borders, len(ids))
        expected = theirs(ids[None]).logits[0]
    torch.testing.assert_close(hidden @ ours.lm_head.weight.T, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="is not empty"):
        export_run(runs / "a", tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_transformers_wrote_are_read(tied: bool, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    theirs = LlamaForCausalLM(shape)
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = Llama(ModelConfig(64, 96, 2, 4, 2, 300))
    load_hugging_face(ours, tmp_path, tmp_path / "none" / "tokenizer.json")
    ids, borders = torch.arange(20), torch.tensor([0, 20], dtype=torch.int32)
    with torch.no_grad():
        logits = ours.hidden_states(ids, torch.arange(20), borders, 20) @ ours.lm_head.weight.T
        torch.testing.assert_close(logits, theirs(ids[None]).logits[0], atol=1e-5, rtol=1e-4)


def test_training_starts_from_exported_weights(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    export_run(runs / "a", folder)
    first = load_config(runs / "a" / "config.yaml")
    recipe = replace(first.recipe, learning_rate=1e-12)
    again = replace(
        first, recipe=recipe, output=str(tmp_path), name=None, initial_weights=str(folder)
    )
    assert again.science_hash({}) != replace(again, initial_weights=None).science_hash({})
    loss = json.loads((runs / "a" / "result.json").read_text())["loss"]["iid"]
    assert train(again) == pytest.approx(loss, abs=1e-6)

    wider = replace(again, model=replace(first.model, intermediate_size=96))
    with pytest.raises(ValueError, match=r"another shape .* add model\.intermediate_size=64"):
        train(wider)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<eot>"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="trained with another tokenizer than"):
        train(replace(again, seed=7))
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"llama"', '"qwen2"')
    )
    with pytest.raises(ValueError, match="model_type=qwen2 is not supported"):
        train(replace(again, seed=7))


def test_the_report_holds_every_run(runs: Path, tmp_path: Path) -> None:
    (runs / "unfinished").mkdir(exist_ok=True)
    (runs / "unfinished" / "config.yaml").write_text((runs / "a" / "config.yaml").read_text())
    table, page = write_report(runs, tmp_path)
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["real", "real", "stitched"]
    assert lines[-1] == "not finished, left out: unfinished (cut off before its first checkpoint)"
    content = page.read_text()
    drawn = len(list(tmp_path.glob("*.png")))
    assert drawn >= 3  # losses by generations, loss by position, training
    assert content.count("data:image/png;base64,") == drawn
    assert "<script" not in content


def test_reports_refuse_what_cannot_be_compared(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        write_report(tmp_path, tmp_path)
    path = runs / "b" / "result.json"
    text = path.read_text()
    try:
        for change, message in (
            ({"loss": {"iid": math.nan}}, "has the loss nan"),
            ({"evaluation": json.loads(text)["evaluation"] | {"documents": 3}}, "documents=3"),
            (
                {"evaluation": json.loads(text)["evaluation"] | {"tokenizer_sha256": "x"}},
                "tokenizer_sha256=x",
            ),
        ):
            path.write_text(json.dumps(json.loads(text) | change | {"content_seal": None}))
            with pytest.raises(ValueError, match=message):
                write_report(runs, tmp_path)
    finally:
        path.write_text(text)
