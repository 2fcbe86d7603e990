"""Imports into fresh corpus folders, as ``generate.py`` runs them."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gen.corpus.documents import CorpusConfig
from gen.exchange.config import ImportConfig
from gen.exchange.importing import Import

RunImport = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def run_import(tmp_path: Path) -> RunImport:
    """Import ``path`` into ``tmp_path/root``; other arguments are settings of the import."""

    def run(
        path: Path | str,
        method: str = "rephrase",
        corpus: CorpusConfig | None = None,
        **settings: Any,
    ) -> dict[str, dict[str, Any]]:
        config = ImportConfig(path=str(path), **settings)
        if corpus is None:
            corpus = CorpusConfig(format="import", held_out=0.2)
        if corpus.format == "import":
            corpus = replace(corpus, path=config.sources or config.path)
        return Import(config, method, corpus, tmp_path / "root").run()

    return run


def with_datatrove(*arguments: object) -> str:
    """What a Python that has datatrove prints; ``make`` puts it beside the environment's packages.

    Not among them: its huggingface-hub is newer than transformers 4 takes.
    """
    packages = Path(sys.prefix) / "datatrove"
    if not packages.exists():
        pytest.skip(f"{packages} is not there: this environment was not made by make")
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(packages)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=120
    ).stdout
