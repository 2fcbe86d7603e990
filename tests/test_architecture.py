"""Which way imports go, what every folder says of itself, and how many files it shows."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGES = ("kernels", "trainer", "gen", "benchmarks")
# Of trainer/: a module may import from its own part and from those in later lines.
ORDER = (
    ("plugins.hydra_plugins",),
    ("study",),
    ("estimate",),
    ("loop",),
    ("setup",),
    ("evaluation",),
    ("run",),
    ("parallel", "optim"),
    ("model",),
    ("data",),
    ("entry",),
    ("config",),
    ("pages",),
    ("object_store",),
    ("errors",),
    ("slurm_jobs",),
    ("files", "logs", "plugins", "stop"),
)
ORDER_IN_GEN = (
    ("pipeline",),
    ("estimate",),
    ("exchange",),
    ("megadocs",),
    ("quality",),
    ("generations",),
    ("serving",),
    ("client",),
    ("prompts",),
    ("corpus",),
    ("work",),
)
# What gen/ may know of trainer/: the contract of the streams, and what any program needs.
SHARED = (
    "trainer.data.format",
    "trainer.files",
    "trainer.object_store",
    "trainer.pages",
    "trainer.errors",
    "trainer.slurm_jobs",
    "trainer.stop",
    "trainer.config.fields",
)


def modules(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (REPOSITORY / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports anywhere: at its top, in functions, for types only."""
    package = path.relative_to(REPOSITORY).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            found = []
            for alias in node.names:  # `from trainer import files` names a module
                inner = f"{module}.{alias.name}"
                is_module = (REPOSITORY / inner.replace(".", "/")).with_suffix(".py").exists()
                found.append(inner if is_module else module)
        else:
            continue
        yield from (name for name in found if name.split(".")[0] in PACKAGES)


def edges(*packages: str) -> list[tuple[str, str]]:
    found = {(name_of(path), name) for path in modules(*packages) for name in imports(path)}
    return sorted(found)


def part(module: str) -> str:
    """``data`` of ``trainer.data.plan``; what Hydra loads is a part beside its loader."""
    if ".hydra_plugins" in module:
        return "plugins.hydra_plugins"
    return module.split(".")[1] if "." in module else ""


def test_kernels_know_nothing_else() -> None:
    assert not [edge for edge in edges("kernels") if not edge[1].startswith("kernels")]


def test_trainer_and_gen_meet_at_the_streams() -> None:
    for module, name in edges("trainer", "gen"):
        if module.startswith("trainer"):
            assert not name.startswith("gen"), module
        elif name.startswith("trainer"):
            assert name in SHARED, module


def test_nothing_imports_the_benchmarks() -> None:
    assert not [edge for edge in edges("kernels", "trainer", "gen") if "benchmarks" in edge[1]]


def test_parts_import_one_way() -> None:
    wrong = set()
    for package, order in (("trainer", ORDER), ("gen", ORDER_IN_GEN)):
        level = {part: place for place, parts in enumerate(order) for part in parts}
        for module, name in edges(package):
            above, below = part(module), part(name)
            if above and name.startswith(f"{package}.") and above != below:
                assert {above, below} <= level.keys(), "a new part needs its place in the order"
                if level[below] <= level[above]:
                    wrong.add((module, name))
    assert not wrong


def folders() -> list[Path]:
    return sorted(
        {path.parent for path in modules(*PACKAGES) if path.parent.name != "hydra_plugins"}
    )


@pytest.mark.parametrize("folder", folders(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_folder_says_what_it_is_for_and_shows_a_dozen_files(folder: Path) -> None:
    documented = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert documented, "say what it is for and what it may import"
    assert "import" in documented
    files = [path for path in folder.iterdir() if path.is_file() and path.name != "__init__.py"]
    assert len(files) <= 13
