"""More generations where a model's loss is high: the law, its file, the way from run to run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen.corpus.documents import Document
from gen.generations.allocation import by_rank, read_losses
from gen.generations.store import GenerationStore
from gen.pipeline import GenerateConfig, check_by_loss
from gen.prompts import MethodConfig
from tests.conftest import TINY, run_script
from trainer.data.format import LOSS_COLUMNS
from trainer.data.mds import MegadocStream

DOCUMENTS = [Document(f"d{place}", "text") for place in range(3)]


@given(st.lists(st.floats(0, 20), max_size=300), st.integers(1, 32))
def test_the_total_is_that_of_the_same_for_all(losses: list[float], generations: int) -> None:
    counts = by_rank(np.array(losses), generations)
    assert counts.sum() == len(losses) * generations
    ranks = np.argsort(np.argsort(losses, kind="stable"), kind="stable")
    exact = 1 + (generations - 1) * (2 * ranks + 1) / max(1, len(losses))
    assert (np.abs(counts - exact) < 1 + 1e-9).all()
    if losses:
        assert 1 <= counts.min() <= counts.max() <= 2 * generations - 1


def written(path: Path, losses: dict[str, float | None]) -> Path:
    columns = [pa.array(losses.keys()), pa.array(losses.values(), pa.float64())]
    pq.write_table(pa.table(columns, names=list(LOSS_COLUMNS)), path)
    return path


def test_losses_are_found_by_the_documents_id(tmp_path: Path) -> None:
    path = written(tmp_path / "losses.parquet", {"d2": 3.0, "other": 9.0, "d0": 1.0, "d1": 2.0})
    assert read_losses(path, DOCUMENTS).tolist() == [1.0, 2.0, 3.0]
    written(path, {"d0": 1.0, "d1": None})
    with pytest.raises(ValueError, match="no loss of 2 of 3 training documents, the first 'd1'"):
        read_losses(path, DOCUMENTS)
    path.write_text("losses")
    with pytest.raises(ValueError, match=r"is no table of losses .*document_losses=FILE"):
        read_losses(path, DOCUMENTS)
    with pytest.raises(FileNotFoundError, match="document_losses=FILE"):
        read_losses(tmp_path / "none.parquet", DOCUMENTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "by_loss"}, "by_loss needs the file"),
        ({"losses": "losses.parquet"}, "uniform none"),
        (
            {"allocation": "by_loss", "losses": "x", "latent": True, "prompt": "{prefix}{suffix}"},
            "use it with rewrites",
        ),
        ({"name": "faq-by-loss"}, "or the allocation in the name"),
    ],
)
def test_methods_that_cannot_be_allotted(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MethodConfig(**options).check()  # type: ignore[arg-type]


def test_streams_that_cannot_be_allotted() -> None:
    config = GenerateConfig(method=MethodConfig(allocation="by_loss", losses="x", generations=4))
    check_by_loss(config)
    config.streams.generations = [4]
    check_by_loss(config)
    config.streams.generations = [2, 4]
    with pytest.raises(ValueError, match="have the method's G=4"):
        check_by_loss(config)
    config.streams.generations, config.streams.methods = [], ["faq", "table"]
    with pytest.raises(ValueError, match="of one method"):
        check_by_loss(config)
    config.streams.methods, config.generator.kind = [], "import"
    with pytest.raises(ValueError, match="a generator that makes them"):
        check_by_loss(config)


@pytest.mark.slow
def test_from_a_run_to_a_run(corpus_root: Path, tmp_path: Path) -> None:
    """Real only, its losses, more generations by them, and a run on the megadocs made of them."""
    root, runs, losses = tmp_path / "corpus", tmp_path / "runs", tmp_path / "losses.parquet"
    shutil.copytree(corpus_root, root)
    store = GenerationStore.of_method(root, "rephrase", 2)
    there = len(store.read(["index"]))
    tiny = ["experiment=demo", "model=tiny", "data.context_length=64", "recipe.epochs=1"]
    training = [*tiny, f"data.root={root}", f"output={runs}", "runtime.num_threads=1"]
    run_script("train.py", *training, "recipe=real")
    (run,) = (path.parent for path in runs.glob("*/result.json"))
    run_script("evaluate.py", f"runs=[{run}]", "validation=real", f"document_losses={losses}")
    table = pq.read_table(losses)
    real = MegadocStream(root / "streams" / "real")
    assert table["document_id"].to_pylist() == [real.document_of(one) for one in range(len(real))]

    by_loss = ["method.allocation=by_loss", f"method.losses={losses}"]
    done = run_script("generate.py", *TINY, f"root={root}", "method=rephrase", *by_loss)
    counts = by_rank(table["loss"].to_numpy(), 2)
    assert {1, 3} <= set(counts.tolist())
    new = int((counts - 2).clip(0).sum())
    assert len(store.read(["index"])) == there + new  # those of the same for all are used
    stitched = MegadocStream(root / "streams" / "stitched-g2-by-loss")
    members = [len(stitched[place].member_ends) for place in range(len(stitched))]
    assert members == (counts + 1).tolist()
    simple = json.loads((root / "streams" / "simple-g2-by-loss" / "manifest.json").read_text())
    assert simple["samples"] == 3 * len(real)
    assert simple["judged"]["generations"] == 2 * len(real)
    assert "stitched-g2-by-loss" in done.stdout + done.stderr

    again = run_script("generate.py", *TINY, f"root={root}", "method=rephrase", *by_loss)
    assert (again.stdout + again.stderr).count("up to date") == 4
    trained = run_script("train.py", *training, "recipe=stitched", "recipe.stream=stitched-by-loss")
    assert "validation loss" in trained.stdout + trained.stderr
