"""Self-distillation as a user does it: a model trained here writes, a student reads."""

from pathlib import Path

from gen.generations.store import GenerationStore
from tests.conftest import run_script
from trainer.files import read_json

CORPUS = ["scale=demo", "corpus.max_documents=40", "corpus.held_out=0.25"]
TRAINING = [
    *("experiment=demo", "model=tiny", "data.context_length=64", "recipe.epochs=1"),
    "runtime.num_threads=1",
]


def test_a_student_of_a_model_trained_here(tmp_path: Path) -> None:
    root, runs, teacher = tmp_path / "data", tmp_path / "runs", tmp_path / "teacher"
    corpus = [*CORPUS, "tokenizer.vocab_size=400", f"root={root}"]
    training = [*TRAINING, f"data.root={root}", f"output={runs}"]
    run_script("generate.py", "corpus", *corpus)
    run_script("train.py", *training, "recipe=real", "name=teacher")
    run_script("evaluate.py", f"runs=[{runs / 'teacher'}]", f"export={teacher}")
    run_script(
        *("generate.py", *corpus, "method=self", "method.generations=2", "method.max_tokens=24"),
        *("generator=sglang", f"generator.model={teacher}", "generator.sglang.device=cpu"),
        *("generator.context_length=64", "generator.threads=1", "streams.real_document=absent"),
        timeout=3000,
    )
    rows = GenerationStore(root / "generations" / "self").read().to_pylist()
    assert {row["index"] for row in rows} == {0, 1}
    assert {row["prompt_tokens"] for row in rows} == {1}  # the end of a text before it, no more
    assert len({row["text"] for row in rows}) > len(rows) // 2
    stream = read_json(root / "streams" / "simple-g2-self-no-real" / "manifest.json")
    assert stream["synthetic_tokens"] == stream["tokens"] > 0
    run_script(
        *("train.py", *training, "recipe=simple", "recipe.stream=simple-self-no-real"),
        *("recipe.generations=2", "name=student"),
    )
    result = read_json(runs / "student" / "result.json")
    assert 0 < result["loss"]["iid"] < 10
