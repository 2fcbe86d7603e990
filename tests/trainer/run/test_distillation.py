"""A student of two teachers: the loss by its definition, and a run end to end."""

import json
from pathlib import Path

import pytest
import torch

from tests.trainer.test_loop import config
from trainer.config.schema import DistillationConfig
from trainer.loop import train
from trainer.model.llama import SoftTargets
from trainer.run import distillation
from trainer.run.distillation import distillation_loss
from trainer.run.inputs import run_dir_of


def test_the_loss_and_its_gradient_are_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(11, 4).requires_grad_(), normal(7, 4).requires_grad_()
    states, heads = [normal(11, 3), normal(11, 5)], [normal(7, 3), normal(7, 5)]
    targets = torch.randint(7, (11,), generator=generator)
    targets[2:4] = -100
    monkeypatch.setattr(distillation, "CHUNK_ELEMENTS", 3 * 7)  # ragged chunks
    soft = SoftTargets(0.3, states, heads, distillation_loss)
    loss = distillation_loss(hidden, weight, targets, torch.tensor(9.0), soft)

    student = (hidden @ weight.T).softmax(1)
    one, two = ((state @ head.T).softmax(1) for state, head in zip(states, heads, strict=True))
    mean = (one + two) / 2
    expected = torch.zeros((), dtype=torch.float64)
    for row, target in enumerate(targets.tolist()):
        if target >= 0:
            expected = expected - 0.7 * student[row, target].log()
            expected = expected - 0.3 * (mean[row] * student[row].log()).sum()
    torch.testing.assert_close(loss, expected / 9)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(expected / 9, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_heads_gradient_is_added_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error does not grow with the number of chunks, also where the head is given in bf16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2048, 16, generator=generator).bfloat16()
    weight = torch.randn(128, 16, generator=generator).bfloat16()
    state, head = (torch.randn(n, 16, generator=generator).bfloat16() for n in (2048, 128))
    targets = torch.randint(128, (2048,), generator=generator)

    def gradient(chunks: int, dtype: torch.dtype) -> torch.Tensor:
        monkeypatch.setattr(distillation, "CHUNK_ELEMENTS", 2048 * 128 // chunks)
        leaf = weight.to(dtype).requires_grad_()
        soft = SoftTargets(0.5, [state.to(dtype)], [head.to(dtype)], distillation_loss)
        loss = distillation_loss(hidden.to(dtype), leaf, targets, torch.tensor(1.0), soft)
        return torch.autograd.grad(loss, leaf)[0].double()

    exact = gradient(1, torch.float64)
    few, many = ((gradient(n, torch.bfloat16) - exact).norm() / exact.norm() for n in (1, 128))
    assert many < 1.2 * few


def test_a_student_of_two_runs_and_teachers_that_do_not_fit(
    corpus_root: Path, tmp_path: Path
) -> None:
    teachers = []
    for seed in (0, 1):
        settings = config(corpus_root, tmp_path, seed=seed)
        train(settings)
        teachers.append(str(run_dir_of(settings)))
    student = config(
        corpus_root, tmp_path, name="student", distillation=DistillationConfig(teachers, 0.7)
    )
    loss = train(student)
    results = [json.loads((Path(run) / "result.json").read_text()) for run in teachers]
    assert loss < max(result["loss"]["iid"] for result in results) + 0.3

    for path in (Path(teachers[1]) / "checkpoints").glob("step-*/progress.json"):
        other = {"tokenizer_sha256": "x", "content_seal": None}
        path.write_text(json.dumps(json.loads(path.read_text()) | other))
    wrong = config(
        corpus_root, tmp_path, name="wrong", distillation=DistillationConfig(teachers, 0.7)
    )
    with pytest.raises(ValueError, match="another tokenizer than that"):
        train(wrong)
    (Path(teachers[0]) / "result.json").unlink()
    with pytest.raises(FileNotFoundError, match="is not trained to its end"):
        train(wrong)
    missing = config(
        corpus_root, tmp_path, name="wrong", distillation=DistillationConfig(["nowhere"], 0.7)
    )
    with pytest.raises(FileNotFoundError, match="nowhere holds no finished checkpoint"):
        train(missing)
