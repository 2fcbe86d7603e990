"""An import that is killed again and again ends as one that was left alone."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gen.corpus.documents import load_split
from gen.generations.store import GenerationStore
from tests.conftest import REPOSITORY

METHODS = ("faq", "table")
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from gen.corpus.documents import CorpusConfig
from gen.exchange import staging
from gen.exchange.config import ImportConfig
from gen.exchange.importing import Import

def main():
    path, root = sys.argv[2:4]
    methods = {name: name for name in ("faq", "table")}
    config = ImportConfig(path, methods, processes=int(sys.argv[4]))
    corpus = CorpusConfig(format="import", path=path, held_out=0.2)
    importing = Import(config, "unused", corpus, Path(root))
    print("go", flush=True)
    importing.run()

staging.UNIT_BYTES = 20_000  # many units from few rows
if __name__ == "__main__":
    main()
"""


def contents(root: Path) -> tuple[Any, ...]:
    """Documents, and the rows of both stores without the time of the import."""
    documents = [list(load_split(root, split)) for split in ("train", "val")]
    stores = []
    for method in METHODS:
        table = GenerationStore.of_method(root, method, 0).read().drop_columns("created_at")
        rows = table.to_pylist()
        stores.append(sorted(rows, key=lambda row: (row["document_id"], row["index"])))
    return documents, stores


@pytest.mark.slow
def test_sigkill_at_any_moment_costs_nothing(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    files = tmp_path / "files"
    for method in METHODS:
        (files / method).mkdir(parents=True)
        for part in range(12):
            rows = [
                {
                    "id": f"d{number}",
                    "text": f"Source {number}. " * 20,
                    "generation": [f"{method} {index} of {number}. " * 15 for index in range(2)],
                }
                for number in range(part * 100, part * 100 + 110)  # some are in two files
            ]
            pq.write_table(pa.Table.from_pylist(rows), files / method / f"{part}.parquet")
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)

    def command(root: Path, processes: int) -> list[str]:
        return [sys.executable, str(script), str(REPOSITORY), str(files), str(root), str(processes)]

    began = time.monotonic()
    subprocess.run(command(tmp_path / "calm", 1), check=True, capture_output=True)
    duration = time.monotonic() - began
    moments = random.Random(0)
    killed, root = 0, tmp_path / "disturbed"
    while killed < pytestconfig.getoption("--kills"):
        with subprocess.Popen(
            command(root, 1 + killed % 2), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(moments.uniform(0.0, 0.3 * duration))
            process.send_signal(signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
        if process.returncode == 0:  # it had ended: begin with what a kill at the end leaves
            for method in METHODS:
                (root / "generations" / method / "import.json").unlink()
        for method in METHODS:  # whatever is there is complete
            store = GenerationStore.of_method(root, method, 0)
            if store.parts():
                store.read()
    subprocess.run(command(root, 2), check=True, capture_output=True)
    assert contents(root) == contents(tmp_path / "calm")
    assert not (root / "importing").exists()
    left_out = [
        json.loads((place / "generations" / method / "import.json").read_text())["left_out"]
        for place in (root, tmp_path / "calm")
        for method in METHODS
    ]
    assert left_out[:2] == left_out[2:]
    for folder in (root / "documents", *(root / "generations").iterdir()):
        assert not list(folder.glob(".*.tmp"))
