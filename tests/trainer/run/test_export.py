"""An export is what was trained: its tokenizer, its numbers, its files; and older folders load."""

import json
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

from gen.corpus.tokenizer import TokenizerConfig, encode, train_bpe
from tests.conftest import REPOSITORY, ObjectStore, run_with
from tests.trainer.conftest import StreamMaker
from tests.trainer.run import readers
from trainer.config.schema import (
    DataConfig,
    ModelConfig,
    RecipeConfig,
    RuntimeConfig,
    TrackingConfig,
    TrainConfig,
    load_config,
)
from trainer.files import sha256
from trainer.loop import train
from trainer.model.llama import Llama
from trainer.object_store import read
from trainer.run import export
from trainer.run.checkpoint import load_model
from trainer.run.export import export_run, load_hugging_face
from trainer.run.inputs import run_dir_of


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


def tokenizer_of_corpus(root: Path) -> dict[str, Any]:
    """Put :func:`tokenizer_that_adds` into a corpus; returns what streams say of it."""
    tokenizer, folder = tokenizer_that_adds(), root / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    sha = sha256(folder / "tokenizer.json")
    manifest = {"sha256": sha, "eos_token": "<|endoftext|>", "eos_id": 0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return {"vocab_size": tokenizer.get_vocab_size(), "tokenizer_sha256": sha}


@pytest.fixture
def run(make_stream: StreamMaker, tmp_path: Path) -> Path:
    described = tokenizer_of_corpus(tmp_path)
    for name in ("real", "val"):
        make_stream(name, [[12]] * 8, **described)
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


def encoded(text: str) -> list[int]:
    """As the streams are: no token is added, none cut off."""
    tokenizer = tokenizer_that_adds()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return encode(tokenizer, [text])[0]


def logits_of(run: Path, ids: list[int]) -> torch.Tensor:
    """The model's own, ``[T, V]``."""
    model, _ = load_model(run)
    length = len(ids)
    borders = torch.tensor([0, length], dtype=torch.int32)
    with torch.no_grad():
        hidden = model.hidden_states(torch.tensor(ids), torch.arange(length), borders, length)
        return hidden @ model.lm_head.weight.T


def log_likelihood(run: Path, context: str, answer: str) -> float:
    """The model's own, in nats; a text without context follows the end of another."""
    before, whole = encoded(context), encoded(context + answer)
    if not before:
        before, whole = [0], [0, *whole]
    scores = logits_of(run, whole).log_softmax(1)
    places = torch.arange(len(before) - 1, len(whole) - 1)
    return float(scores[places, torch.tensor(whole[len(before) :])].sum())


def seen(packages: str, *arguments: object) -> dict[str, Any]:
    """What :mod:`tests.trainer.run.readers` finds with the packages of a folder."""
    found: dict[str, Any] = json.loads(run_with(packages, "-m", readers.__name__, *arguments))
    return found


def test_an_export_to_a_bucket_is_the_one_to_a_folder(
    run: Path, tmp_path: Path, object_store: ObjectStore
) -> None:
    export_run(run, tmp_path / "out")
    export_run(run, "s3://bucket/models/mine")
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {name: read(f"s3://bucket/models/mine/{name}") for name in files} == files
    with pytest.raises(ValueError, match=r"export=s3://bucket/models/mine is not empty"):
        export_run(run, "s3://bucket/models/mine")


def test_the_tokenizer_of_the_corpus_adds_cuts_and_pads() -> None:
    ids = tokenizer_that_adds().encode("Hello world").ids
    assert ids[0] == tokenizer_that_adds().token_to_id("<s>")
    assert len(ids) == 20


@pytest.mark.slow
@pytest.mark.parametrize(("packages", "major"), [(None, 4), ("transformers-5", 5)])
def test_transformers_reads_what_was_trained(
    packages: str | None, major: int, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    export_run(run, folder)
    found = (
        seen(packages, "transformers", folder) if packages else readers.through_transformers(folder)
    )
    assert int(found["version"].partition(".")[0]) == major
    assert found["ids"] == [encoded(text) for text in readers.TEXTS]
    assert found["texts"] == readers.TEXTS
    ids = found["ids"][0]
    expected = logits_of(run, ids).log_softmax(1)
    theirs = torch.tensor(found["logits"]).log_softmax(1)
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=0)
    written: list[int] = []
    while len(written) < readers.GENERATED and 0 not in written:
        written.append(int(logits_of(run, ids + written)[-1].argmax()))
    assert found["written"] == written
    config = load_config(run / "config.yaml")
    head_dim = config.model.head_dim
    turns = config.model.rope_theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    torch.testing.assert_close(torch.tensor(found["inv_freq"]), turns)
    assert found["context_length"] == [config.data.context_length] * 2
    assert (found["dtype"], found["tied"]) == ("torch.float32", False)
    assert (found["special"], found["ends"]) == ([None, 0, None], [0, 0])


def test_the_exported_tokenizer_alone_adds_cuts_and_pads_nothing(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "out")
    alone = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in readers.TEXTS:
        assert alone.encode(text).ids == encoded(text)


def test_every_exported_file_has_the_mode_of_a_written_file(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "out")
    (tmp_path / "written").write_text("")
    expected = stat.S_IMODE((tmp_path / "written").stat().st_mode)
    files = list((tmp_path / "out").iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {expected}
    assert {file.name for file in files} > {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.slow
@pytest.mark.parametrize("age", ["oldest", "newest"])
def test_lm_eval_sees_the_models_own_log_likelihoods(age: str, run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "out")
    questions: list[dict[str, Any]] = [
        {"question": f"{word} world", "choices": [" this", " is a text.", ","], "answer": place % 3}
        for place, word in enumerate(["Hello", "This", "A", "Is", "text", "world"])
    ]
    write_task(tmp_path / "tasks", questions)
    found = seen(f"lm-eval-{age}", "lm_eval", tmp_path / "out", run, tmp_path / "tasks")
    if age == "oldest":
        extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        (allowed,) = extras["optional-dependencies"]["eval"]
        assert allowed == f"lm-eval[hf]>={found['version']}"
    expected = [log_likelihood(run, context, answer) for context, answer in readers.PAIRS]
    assert found["likelihoods"] == pytest.approx(expected, abs=1e-5)
    right = [
        max(range(3), key=lambda place: log_likelihood(run, one["question"], one["choices"][place]))
        == one["answer"]
        for one in questions
    ]
    assert 0 < sum(right) < len(questions)
    assert found["tasks"]["questions"]["acc"] == pytest.approx(sum(right) / len(questions))
    assert found["tasks"]["questions"]["questions"] == len(questions)


def write_task(folder: Path, questions: list[dict[str, Any]]) -> None:
    """A task of lm-eval with answers to choose from, ``questions``."""
    folder.mkdir()
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "questions.yaml").write_text(json.dumps(task))


def test_a_killed_export_stands_in_nobodys_way(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tmp_path / ".out.1234567.tmp"  # what a SIGKILL leaves
    half.mkdir()
    (half / "config.json").write_text("{")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export, "save_shards", full)
        with pytest.raises(OSError, match="No space left"):
            export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_run(run, tmp_path / "out")
    assert not list(tmp_path.glob(".out.*"))


def test_a_damaged_or_gone_tokenizer_is_named(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer" / "tokenizer.json"
    content = file.read_text()
    file.write_text(content + " ")
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing or not the one that was"):
        export_run(run, tmp_path / "out")
    file.write_text(content)
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", r"config\.json is damaged: .* copy the folder"),
        (
            "config.json",
            '{"model_type": "llama"}',
            r"config\.json is damaged: it lacks hidden_size",
        ),
        ("config.json", '{"model_type": "gpt2", "n_embd": 8}', "model_type=gpt2 is not supported"),
        ("model.safetensors", "x" * 100, r"model\.safetensors is damaged: .* copy the folder"),
        ("model.safetensors.index.json", "{}", r"index\.json is damaged: it lacks weight_map"),
        ("tokenizer.json", "{}", r"tokenizer\.json is damaged: .* copy the folder"),
    ],
)
def test_damaged_weights_to_start_from_are_named(
    name: str, content: str, message: str, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    export_run(run, folder)
    (folder / name).write_text(content)
    model = Llama(load_config(run / "config.yaml").model)
    with pytest.raises(ValueError, match=message):
        load_hugging_face(model, folder, tmp_path / "tokenizer" / "tokenizer.json")
