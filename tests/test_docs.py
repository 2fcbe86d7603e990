"""The documentation says what works: every command composes, every key, file and link exists."""

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import evaluate
import generate
import report
import train
from tests.conftest import REPOSITORY
from trainer.entry import CONF, check_overrides, spelled_out

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
SCRIPTS = {"train.py": train, "generate.py": generate, "evaluate.py": evaluate, "report.py": report}
TORCHRUN = ("torchrun", "srun")


def in_bash_blocks(page: Path) -> Iterator[str]:
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.split("  #")[0].strip()
            if command and not command.startswith("#"):
                yield command


def in_tables(page: Path) -> Iterator[str]:
    """Inline code that is a command, or only overrides: ``optimizer.kind=muon``."""
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        if code.startswith(("python ", "make ", "pip ", "pytest ")):
            yield code
        elif re.fullmatch(r"[a-z][\w./]*=[^\s\"]+( [a-z][\w./]*=[^\s\"]+)*", code):
            program = {"generate.md": "generate", "evaluate.md": "evaluate"}.get(page.name, "train")
            if code.startswith(("import", "streams.", "corpus", "quality")):
                program = "generate"
            if code.startswith("question="):
                program = "report"
            elif code.startswith(("tokenizer=", "generator=")):
                program = "generate"
            elif code.startswith("hydra.launcher.ray"):
                code = f"launcher=ray {code}"
            yield f"python {program}.py {code}"


def commands() -> list[tuple[str, str]]:
    found = {
        (page.name, command)
        for page in PAGES
        if page.name not in ("CHANGELOG.md", "LOG.md", "study.md", "config.md")
        for command in (*in_bash_blocks(page), *in_tables(page))
    }
    return sorted(found)


def compose(script: str, arguments: list[str]) -> None:
    """What ``python SCRIPT ARGUMENTS`` does before its work: compose a config of its types."""
    name = script.removesuffix(".py")
    if name == "generate":
        arguments = generate.as_overrides(arguments)
    arguments = spelled_out(arguments)
    flags = ("--multirun", "-m")
    overrides = [argument for argument in arguments if argument not in flags]
    check_overrides(name, overrides)
    if "--help" in overrides:
        return
    if len(overrides) < len(arguments) or any(o.startswith("launcher=") for o in overrides):
        overrides = [first_job(override) for override in overrides]
    with hydra.initialize_config_dir(str(CONF / name), version_base="1.3"):
        OmegaConf.to_object(hydra.compose("config", overrides))


def first_job(override: str) -> str:
    """An override as the first job of a sweep has it."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    return f"{parsed.get_key_element()}={next(parsed.sweep_string_iterator())}"


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_of_the_documentation_is_possible(page: str, command: str) -> None:
    words = shlex.split(command)
    if words[0] in TORCHRUN:
        place = next(i for i, word in enumerate(words) if word in SCRIPTS or word == "megadocs")
        if words[place] == "megadocs":  # ``torchrun -m megadocs train``
            return
        compose(words[place], words[place + 1 :])
    elif words[0] == "sbatch":
        place = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        assert (REPOSITORY / words[place]).exists()
        compose("train.py", words[place + 1 :])
    elif words[0] == "python" and words[1] == "-m":
        module = REPOSITORY / words[2].replace("NAME", "attention").replace(".", "/")
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()
    elif words[0] == "python":
        compose(words[1], words[2:])
    elif words[0] == "make":
        targets = re.findall(
            r"^([\w-]+|\$\(VENV\)/\S+):", (REPOSITORY / "Makefile").read_text(), re.M
        )
        named = [word.replace(".venv/", "$(VENV)/") for word in words[1:] if "=" not in word]
        assert not [target for target in named if target not in (*targets, "...")]
    elif words[0] == "pip" or "pip" in words[0]:
        extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        asked = re.findall(r"(?:megadocs|\.)\[([\w,]+)\]", command)
        assert {name for each in asked for name in each.split(",")} <= {
            *extras["optional-dependencies"]
        }
    else:
        assert words[0] in ("export", "pytest", "megadocs") or words[0].startswith(".venv/bin/")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if target.startswith("https://"):
            continue
        assert (page.parent / target).exists(), target
    if page.name in ("LOG.md", "CHANGELOG.md"):  # they tell of what was
        return
    tree = r"`((?:kernels|trainer|gen|conf|benchmarks|tests|docs)/[\w./{},-]*)`"
    for path in re.findall(tree, text):
        if not set(path) & set("{}"):
            assert (REPOSITORY / path).exists(), path


def test_the_page_of_all_keys_is_current() -> None:
    spec = importlib.util.spec_from_file_location(
        "make_config", REPOSITORY / "docs" / "make_config.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run `make docs`"
