"""The server of the conformance tests: one that is named, or the embedded one."""

import pytest

from tests.gen.serving.target import Target


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Target:
    option = request.config.getoption
    url = option("--server-url") or request.getfixturevalue("server")
    return Target(
        url.rstrip("/").removesuffix("/v1"),
        option("--server-model"),
        option("--server-context"),
        option("--server-siblings"),
    )
