"""One finished study for all tests of damage; each copies it, or leaves it as it found it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.damage.small_study import outcome, rewriter, write_source
from tests.damage.user import Undisturbed, User


@pytest.fixture(scope="package")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    folder = tmp_path_factory.mktemp("user")
    write_source(folder / "source.jsonl")
    with rewriter() as url:
        yield User(folder / "source.jsonl", url, folder / "said.txt")


@pytest.fixture(scope="package")
def undisturbed(user: User, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("undisturbed") / "root"
    user.start(root.with_name("first"))  # imports what is imported late
    began = time.monotonic()
    assert user.start(root) == 0, user.said.read_text()
    return Undisturbed(root, time.monotonic() - began, outcome(root))
