"""Whatever is killed, flipped, cut or filled: doing what is said ends in the undisturbed report.

``--damage-rounds 100`` runs more rounds than `make test` does. A round starts from a finished
study, of which a part may be taken away so that there is work to do; it is disturbed once, and then
a user starts the same command again, and does what the last error said, until it ends well; and
what a warning said, where something is missing from the report.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.damage.small_study import outcome
from tests.damage.user import Undisturbed, User

pytestmark = pytest.mark.slow

KINDS = ("kill", "flip", "truncate", "fill")
REMOVED = ("", "report", "runs", "runs/real-*", "streams", "streams/stitched-*", "generations", "*")
ATTEMPTS = 5  # starts until all must be well
LEFTOVERS = re.compile(r"\.tmp$|^\.step-|^\.part-")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        option = metafunc.config.getoption
        metafunc.parametrize(
            "seed", range(option("--first-damage-round"), option("--damage-rounds"))
        )


def test_a_disturbed_study_ends_as_the_undisturbed_one(
    seed: int, user: User, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    generator = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    root = tmp_path / "root"
    # Only root may mount; others have a limit on the size of every file in its place.
    mounts = kind == "fill" and os.geteuid() == 0 and generator.random() < 0.5
    room = generator.randrange(1 << 18) if mounts else None
    with disk_with(undisturbed.root, root, room) as disk:
        take_away(generator.choice(REMOVED), root)
        history = []
        if kind in ("flip", "truncate"):
            history.append(f"{kind} {damage(kind, root, generator)}")
        elif kind == "kill":
            user.start(root, seconds=generator.uniform(0, undisturbed.seconds))
        elif disk.full:
            user.start(root)
        else:
            user.start(root, file_limit=generator.randrange(1 << 16))
        disk.make_room()
        while user.start(root) != 0 or (user.warning() and outcome(root) != undisturbed.outcome):
            history.append(user.error() or user.warning())
            assert len(history) < ATTEMPTS, history
            follow(history[-1], root)
        assert outcome(root) == undisturbed.outcome, history
        left = [path for path in root.rglob("*") if LEFTOVERS.search(path.name)]
        assert left == [], history


@dataclass
class Disk:
    """Where a round's study lies."""

    root: Path
    full: bool  # a file system of its own, which has little room left

    def make_room(self) -> None:
        """What a user does about a full disk."""
        if self.full:
            subprocess.run(["mount", "-o", "remount,size=64m", self.root], check=True)


@contextlib.contextmanager
def disk_with(study: Path, root: Path, room: int | None) -> Iterator[Disk]:
    """A copy of a study; on a disk of its own with ``room`` bytes left where that is given."""
    if room is None:
        shutil.copytree(study, root)
        yield Disk(root, False)
        return
    used = sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in study.rglob("*"))
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={used + room}", "tmpfs", str(root)]
    subprocess.run(mount, check=True)
    try:
        shutil.copytree(study, root, dirs_exist_ok=True)
        yield Disk(root, True)
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)


def take_away(pattern: str, root: Path) -> None:
    """Remove a part of the study, so that there is work to do."""
    for path in root.glob(pattern) if pattern else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def damage(kind: str, root: Path, generator: random.Random) -> Path | None:
    """Flip a bit of a stored file, or cut one off; returns which."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.stat().st_size]
    if not files:
        return None
    file = generator.choice(files)
    content = bytearray(file.read_bytes())
    place = generator.randrange(len(content))
    if kind == "flip":
        content[place] ^= 1 << generator.randrange(8)
    else:
        del content[place:]
    file.write_bytes(content)
    return file


def follow(error: str, root: Path) -> None:
    """Do what an error says.

    It names what to delete or to move, after the words or as "it", "that file", "that folder" and
    before them; or to make room, or to start again, which the caller does.
    """
    paths = [Path(found.rstrip(".,:;)")) for found in re.findall(rf"{root}[^\s,;:()]*", error)]
    named = re.findall(rf"(?:delete|and) ({root}[^\s,;:()]*)", error)
    if named:
        doomed = [Path(found.rstrip(".,")) for found in named]
    elif re.search(r"delete (it|that file|that folder)|move it out", error):
        doomed = paths[:1]
    else:
        assert re.search(r"again|make room|free some space", error), f"no advice: {error}"
        return
    assert doomed, f"no path: {error}"
    for path in doomed:
        assert path.is_relative_to(root)
        assert path != root
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
