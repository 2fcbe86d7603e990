"""The installed name of everything here: ``megadocs.kernels``, ``megadocs.trainer``, ...

A clone keeps ``kernels/``, ``trainer/``, ``gen/``, ``benchmarks/``, ``conf/`` and the four scripts
at its top level; a wheel holds the same tree inside this folder, because other distributions own
names like ``kernels`` in site-packages. Either way ``megadocs.kernels`` is the library of kernels
and the command ``megadocs`` runs the same scripts.
"""

from pathlib import Path

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent
ROOT = _HERE if (_HERE / "train.py").exists() else _HERE.parent  # where train.py and conf/ are
if str(ROOT) not in __path__:
    __path__.append(str(ROOT))
