"""Imports into fresh corpus folders, as ``generate.py`` runs them."""

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
