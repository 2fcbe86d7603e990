"""An export is what was trained: its tokenizer, its numbers, its files; and older folders load."""

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

from gen.corpus.tokenizer import TokenizerConfig, encode, train_bpe
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
from trainer.model.llama import Llama
from trainer.run.checkpoint import load_model
from trainer.run.export import export_run, load_hugging_face
from trainer.run.inputs import run_dir_of

TEXTS = ["Hello world", "  two  spaces\n", "", "naïve 😀", "<s> no token"]


def tokenizer_that_adds() -> Tokenizer:
    """Byte-level BPE whose template puts a token before and after every text, as Llama 3's does."""
    tokenizer = train_bpe(["Hello world, this is a text."], TokenizerConfig(vocab_size=300))
    tokenizer.add_special_tokens(["<s>"])
    begin, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("<|endoftext|>")
    template = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", begin), ("<|endoftext|>", end)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    return tokenizer


@pytest.fixture
def run(make_stream: StreamMaker, tmp_path: Path) -> Path:
    tokenizer = tokenizer_that_adds()
    for name in ("real", "val"):
        make_stream(name, [[12]] * 8, vocab_size=tokenizer.get_vocab_size())
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    manifest = {"sha256": "f" * 64, "eos_token": "<|endoftext|>", "eos_id": 0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    settings = TrainConfig(
        data=DataConfig(root=str(tmp_path), context_length=16, batch_size=2),
        recipe=RecipeConfig(epochs=1),
        model=ModelConfig(16, 32, 2, 2, 1, rope_theta=2500.0),
        runtime=RuntimeConfig(num_threads=1),
        tracking=TrackingConfig(tensorboard=False),
        output=str(tmp_path / "runs"),
    )
    train(settings)
    return run_dir_of(settings)


def test_the_exported_tokenizer_adds_cuts_and_pads_nothing(run: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export_run(run, tmp_path / "out")
    training = tokenizer_that_adds()
    assert training.encode("Hello world").ids[0] == training.token_to_id("<s>")
    training.no_truncation()
    training.no_padding()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    alone = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text, ids in zip(TEXTS[:-1], encode(training, TEXTS[:-1]), strict=True):
        assert theirs(text).input_ids == ids
        assert alone.encode(text).ids == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == 0
    assert theirs.bos_token_id is None


def test_log_likelihoods_in_transformers_are_the_models_own(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    export_run(run, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor(AutoTokenizer.from_pretrained(tmp_path / "out")("Hello world").input_ids)
    ours, config = load_model(run)
    length = len(ids)
    with torch.no_grad():
        borders = torch.tensor([0, length], dtype=torch.int32)
        hidden = ours.hidden_states(ids, torch.arange(length), borders, length)
        expected = (hidden @ ours.lm_head.weight.T).log_softmax(1)
        found = theirs(ids[None]).logits[0].log_softmax(1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert theirs.config.max_position_embeddings == config.data.context_length
    assert theirs.config.tie_word_embeddings is False
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 0


def test_every_exported_file_has_the_mode_of_a_written_file(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "out")
    (tmp_path / "written").write_text("")
    expected = stat.S_IMODE((tmp_path / "written").stat().st_mode)
    files = list((tmp_path / "out").iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {expected}
    assert {file.name for file in files} > {"config.json", "model.safetensors", "tokenizer.json"}


def test_lm_eval_sees_the_models_own_log_likelihoods(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    export_run(run, tmp_path / "out")
    lm = HFLM(str(tmp_path / "out"), tokenizer=str(tmp_path / "out"), device="cpu", dtype="float32")
    ours, _ = load_model(run)
    training = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    training.no_truncation()
    training.no_padding()
    pairs = [("Hello", " world"), ("This is", " a text."), ("Hello world,", " this")]
    requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
    for (context, answer), (found, _) in zip(pairs, lm.loglikelihood(requests), strict=True):
        (before,), (whole,) = encode(training, [context]), encode(training, [context + answer])
        ids, length = torch.tensor(whole), len(whole)
        with torch.no_grad():
            borders = torch.tensor([0, length], dtype=torch.int32)
            hidden = ours.hidden_states(ids, torch.arange(length), borders, length)
            scores = (hidden @ ours.lm_head.weight.T).log_softmax(1)
        expected = scores[torch.arange(len(before) - 1, length - 1), ids[len(before) :]].sum()
        assert found == pytest.approx(float(expected), abs=1e-5)


def test_a_gone_tokenizer_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer: .* put that folder back"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_older_llamas_load_and_wrong_ones_are_named(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_run(run, folder)
    ours, config = load_model(run)
    weights = folder / "model.safetensors"
    state = load_file(weights)
    older = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
    save_file(state | older, weights)
    save_file({"tok_embeddings.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    fresh = Llama(config.model, seed=1)
    load_hugging_face(fresh, folder, tmp_path / "none.json")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)

    save_file(state | {"model.norm.bias": torch.ones(16)}, weights)
    with pytest.raises(ValueError, match=r"besides a Llama's 1 tensors \(model\.norm\.bias\)"):
        load_hugging_face(fresh, folder, tmp_path / "none.json")
    del state["model.norm.weight"]
    save_file(state, weights)
    with pytest.raises(ValueError, match=r"lacks 1 tensors \(model\.norm\.weight\)"):
        load_hugging_face(fresh, folder, tmp_path / "none.json")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        load_hugging_face(fresh, folder, tmp_path / "none.json")
