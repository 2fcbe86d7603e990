"""What a wheel holds: the tree of the clone below one folder ``megadocs/``.

Other distributions own names like ``kernels`` at the top level of site-packages. An editable
installation needs no copy: ``megadocs/__init__.py`` finds the clone's folders.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDERS = ("kernels", "trainer", "gen", "benchmarks", "conf")
SCRIPTS = ("generate.py", "train.py", "evaluate.py", "report.py")
LEFT_OUT = {"__pycache__", "results"}  # of the benchmarks: measurements, not code


class TreeBelowMegadocs(BuildHookInterface[BuilderConfig]):
    """Adds the folders and scripts to a wheel, not to an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "standard":
            return
        root = Path(self.root)
        files = [root / script for script in SCRIPTS]
        for folder in FOLDERS:
            files += [
                path
                for path in sorted((root / folder).rglob("*"))
                if path.is_file() and not LEFT_OUT.intersection(path.relative_to(root).parts)
            ]
        for path in files:
            inside = path.relative_to(root).as_posix()
            build_data["force_include"][str(path)] = f"megadocs/{inside}"
