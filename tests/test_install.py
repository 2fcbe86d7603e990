"""The tested versions fit every extra."""

import hashlib
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_extras_resolve_together_with_the_tested_versions(
    request: pytest.FixtureRequest,
) -> None:
    """Then each of them does alone. pip is asked once for every state of the two files."""
    files = [REPOSITORY / name for name in ("pyproject.toml", "constraints.txt")]
    state = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    cache = request.config.cache
    assert cache is not None
    if cache.get("megadocs/resolved", None) == state:
        return
    project = tomllib.loads(files[0].read_text())["project"]
    extras = ",".join(project["optional-dependencies"])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--dry-run", "--ignore-installed", "-c", files[1], f"{REPOSITORY}[{extras}]"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cache.set("megadocs/resolved", state)
