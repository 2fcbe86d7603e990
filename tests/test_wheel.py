"""The built wheel in an environment of its own, beside Hugging Face's ``kernels`` package."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# The release of the time of the transformers in constraints.txt.
HUGGING_FACE_KERNELS = "kernels==0.10.5"
TRAINING = [
    "experiment=demo",
    "model=tiny",
    "data.context_length=64",
    "recipe.epochs=1",
    "runtime.num_threads=1",
]


def call(*command: object, cwd: Path, check: bool = True, **environment: str) -> str:
    """Output of a command; PYTHONPATH of this process is not handed on."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Environment:
    """A new virtual environment that borrows the large packages (torch, ...) of this one.

    Borrowed is what lies in this environment's site-packages: a path file appends it to the new
    one's ``sys.path``, so that what is installed in the new one comes first, and this environment's
    own editable ``megadocs`` is not seen.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = folder / "lib" / version / "site-packages"
        (self.site / "00-borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def pip(self, *arguments: object) -> None:
        python = self.folder / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        call(*pip, "--python", python, *arguments, cwd=self.folder)

    def python(self, code: str) -> str:
        return call(self.folder / "bin" / "python", "-c", code, cwd=self.folder)


def build_wheel(folder: Path) -> Path:
    """The wheel of this clone, in a folder that exists."""
    build = ("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    call(sys.executable, "-m", *build, REPOSITORY, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real package of Hugging Face that is called ``kernels`` too."""
    folder = tmp_path_factory.mktemp("hugging-face")
    kept = REPOSITORY / ".venv" / "wheels"  # make downloads it
    offline = ("--no-index", "--find-links", kept) if kept.exists() else ()
    download = ("pip", "download", "--quiet", "--no-deps", *offline, "--dest", folder)
    call(sys.executable, "-m", *download, HUGGING_FACE_KERNELS, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(
    tmp_path_factory: pytest.TempPathFactory, wheel: Path, hugging_face: Path
) -> Environment:
    """Both packages; the programs import transformers, which asks for the one called kernels."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "venv")
    environment.pip("install", "--no-deps", wheel, hugging_face)
    return environment


def test_the_wheel_holds_the_clone_below_one_folder(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"megadocs"}
    listed = subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True).splitlines()
    tree = re.compile(
        r"(kernels|trainer|gen|benchmarks|conf)/|(train|generate|evaluate|report)\.py$"
    )
    wanted = {
        f"megadocs/{path}"
        for path in listed
        if tree.match(path) and "/results/" not in path and (REPOSITORY / path).exists()
    }
    assert len(wanted) > 100
    assert not wanted - set(names)
    assert not [name for name in names if "/results/" in name or name.endswith(".pyc")]


@pytest.mark.slow
@pytest.mark.parametrize("megadocs_first", [True, False])
def test_hugging_faces_kernels_package_is_left_alone(
    tmp_path: Path, wheel: Path, hugging_face: Path, megadocs_first: bool
) -> None:
    environment = Environment(tmp_path / "venv")
    order = (wheel, hugging_face) if megadocs_first else (hugging_face, wheel)
    for one in order:
        environment.pip("install", "--no-deps", one)
    both = (
        "import kernels, megadocs.kernels, torch; print(kernels.get_kernel.__module__)\n"
        "lengths = torch.tensor([0, 3, 5], dtype=torch.int32)\n"
        "q = torch.randn(5, 2, 8)\n"
        "print(megadocs.kernels.varlen_attention(q, q, q, lengths, 3).shape)"
    )
    answer = environment.python(both)
    assert "kernels.utils" in answer
    assert "torch.Size([5, 2, 8])" in answer
    environment.pip("uninstall", "--yes", "megadocs")
    assert "kernels.utils" in environment.python(
        "import kernels; print(kernels.get_kernel.__module__)"
    )
    assert not (environment.site / "megadocs").exists()


@pytest.mark.slow
def test_programs_run_from_an_empty_folder(
    installed: Environment, corpus_root: Path, tmp_path: Path
) -> None:
    """Two ranks, a config and a plugin of the user's own, evaluation and report."""
    own = tmp_path / "own"
    (own / "conf" / "recipe").mkdir(parents=True)
    (own / "conf" / "recipe" / "mine.yaml").write_text("name: mine\nepochs: 1\n")
    plugins = own / "plugins" / "hydra_plugins"
    plugins.mkdir(parents=True)
    (plugins / "my_launcher.py").write_text(
        "from dataclasses import dataclass\n"
        "from hydra._internal.core_plugins.basic_launcher import BasicLauncher\n"
        "from hydra.core.config_store import ConfigStore\n"
        "@dataclass\n"
        "class Mine:\n"
        "    _target_: str = 'hydra_plugins.my_launcher.MyLauncher'\n"
        "ConfigStore.instance().store(group='hydra/launcher', name='mine', node=Mine)\n"
        "class MyLauncher(BasicLauncher):\n"
        "    def launch(self, *arguments, **options):\n"
        "        print('launched by my own plugin')\n"
        "        return super().launch(*arguments, **options)\n"
    )
    work = tmp_path / "empty"
    work.mkdir()
    megadocs = installed.folder / "bin" / "megadocs"
    python = installed.folder / "bin" / "python"

    status = call(megadocs, "generate", "status", f"root={corpus_root}", cwd=work)
    assert "generations/rephrase: " in status
    train = ["train", f"--config-dir={own / 'conf'}"]
    options = [*TRAINING, f"data.root={corpus_root}"]
    torchrun = (python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    call(*torchrun, "-m", "megadocs", *train, *options, "recipe=mine", cwd=work)
    swept = call(
        *(megadocs, *train, "--multirun", "hydra/launcher=mine", *options, "recipe=mine,real"),
        cwd=work,
        PYTHONPATH=str(plugins.parent),
    )
    assert "launched by my own plugin" in swept
    assert swept.count("(was finished)") == 1  # by the two ranks
    runs = sorted(path.parent for path in (work / "demo" / "runs").glob("*/result.json"))
    assert len(runs) == 2
    assert "--shapes" in call(megadocs, "-m", "benchmarks.cross_entropy", "--help", cwd=work)
    scores = call(megadocs, "evaluate", f"runs=[{runs[0].relative_to(work)}]", cwd=work)
    assert "bits per byte" in scores
    assert "report: demo/runs/report/report.html" in call(
        megadocs, "report", "runs=demo/runs", cwd=work
    )
    assert sorted(path.name for path in work.iterdir()) == ["demo"]


@pytest.mark.slow
def test_a_sweep_of_submitit_and_the_launchers_presets(
    installed: Environment, corpus_root: Path, tmp_path: Path
) -> None:
    """A job unpickles what the sweep was started with before any code of ours runs."""
    megadocs = installed.folder / "bin" / "megadocs"
    options = [*TRAINING, f"data.root={corpus_root}", "seed=0,1"]
    local = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=30"]
    swept = call(megadocs, "train", "--multirun", *local, *options, cwd=tmp_path)
    assert sorted(re.findall(r"^done   (seed=\d): \d\.\d{4}$", swept, re.MULTILINE)) == [
        "seed=0",
        "seed=1",
    ]
    assert len(list((tmp_path / "demo" / "runs").glob("*/result.json"))) == 2
    for program, launcher, target in (
        ("train", "slurm", "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"),
        ("train", "ray", "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"),
        ("generate", "slurm", "hydra_plugins.hydra_submitit_launcher.submitit_launcher.Slurm"),
    ):
        preset = call(megadocs, program, f"launcher={launcher}", "--cfg", "hydra", cwd=tmp_path)
        assert "mode: MULTIRUN" in preset
        assert f"_target_: {target}" in preset


def test_a_word_that_is_no_program(installed: Environment, tmp_path: Path) -> None:
    said = call(installed.folder / "bin" / "megadocs", "tran", cwd=tmp_path, check=False)
    assert "error: tran is no program of megadocs" in said
    assert "usage: megadocs {generate,train,evaluate,report}" in said


@pytest.mark.slow
def test_an_editable_installation_adds_one_name(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    environment.pip("install", "--no-deps", "--no-build-isolation", "--editable", REPOSITORY)
    found = environment.python(
        "import importlib.util\n"
        "names = ('kernels', 'trainer', 'gen', 'benchmarks', 'conf', 'train', 'megadocs')\n"
        "print([name for name in names if importlib.util.find_spec(name)])\n"
        "from megadocs.kernels import linear_cross_entropy\n"
        "print(linear_cross_entropy.__code__.co_filename)"
    )
    assert found == f"['megadocs']\n{REPOSITORY / 'kernels/cross_entropy/interface.py'}\n"
    version = call(environment.folder / "bin" / "megadocs", "--version", cwd=tmp_path)
    assert version.strip().endswith(f" in {REPOSITORY}")
