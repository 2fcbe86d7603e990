"""A real corpus folder, made once: real documents, a real model's generations, real shards."""

import functools
import logging.config
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from filelock import FileLock
from hypothesis import settings
from moto.server import ThreadedMotoServer

from tests.warm import Program
from trainer.logs import LOGGING

# The same examples every time: no test fails by chance. `make test-random` draws others.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("fixed")

# In the background of a shell SIGINT is ignored, and would be by all programs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parents[1]
# Short documents and generations: the whole pipeline in seconds.
TINY = [
    "scale=demo",
    "corpus.max_documents=40",
    "corpus.max_characters=900",
    "corpus.held_out=0.25",
    "tokenizer.vocab_size=512",
    "method.generations=2",
    "method.max_tokens=10",
    "generator.threads=1",  # pytest-xdist runs a test on each core
]


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    """Return as soon as ``condition`` holds; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run_script(
    script: str,
    *arguments: str,
    check: bool = True,
    fresh: bool = False,
    timeout: float = 280,
) -> subprocess.CompletedProcess[str]:
    """Run an entry point as a user would: ``fresh``, or but for its imports."""
    if fresh:
        command = [sys.executable, script, *arguments]
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout, check=False
        )
    else:
        with Program(script, *arguments) as program:
            output, errors = program.communicate(timeout=timeout)
        done = subprocess.CompletedProcess(program.arguments, program.wait(), output, errors)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_with(packages: str, *arguments: object) -> str:
    """What a Python prints that has the packages of a folder before this environment's.

    ``make`` puts them there: they, or what they need, are of other versions than this environment
    can have.
    """
    folder = Path(sys.prefix) / packages
    if not folder.exists():
        pytest.skip(f"{folder} is not there: this environment was not made by make")
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.addoption
    add(
        "--cluster",
        action="store_true",
        help="tests of a real Slurm and Ray: make test-cluster",
    )
    add("--damage-rounds", type=int, default=12, help="of a disturbed study; in full: 100")
    add("--first-damage-round", type=int, default=0, help="to go on with: rounds seed themselves")
    add("--kills", type=int, default=3, help="SIGKILLs of the generation client; in full: 50")
    add("--rehearsal", action="store_true", help="every GPU step on fake tensors: make rehearse")
    add("--sglang", action="store_true", help="the tests against the real SGLang: make test-sglang")
    add("--server-url", help="a running server for the tests marked server; else the embedded one")
    add("--server-model", default="SmolLM2-135M-Instruct", help="its name, as /v1/models lists it")
    add("--server-context", type=int, default=512, help="its context length in tokens")
    add("--server-siblings", type=int, default=1, help="generations of one document in flight")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The tests against SGLang, Slurm and Ray take minutes and more than a virtual environment."""
    for apart in ("sglang", "cluster"):
        if collection_path == REPOSITORY / "tests" / apart and not config.getoption(f"--{apart}"):
            return True
    return None


@pytest.fixture(scope="session", autouse=True)
def logs() -> None:
    """What is called in a test's own process is logged as a program would log it."""
    logging.config.dictConfig(LOGGING)


@pytest.fixture(scope="session")
def corpus_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished corpus folder with the streams real, val, simple-g2, stitched-g2, latent-g2."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # the same for every worker of this run
    root = shared / "corpus"
    with FileLock(shared / "corpus.lock"):
        if not (root / "streams" / "latent-g2").exists():
            run_script("generate.py", *TINY, f"root={root}", "method=rephrase")
            run_script("generate.py", *TINY, f"root={root}", "method=latent")
    return root


class ObjectStore:
    """An S3 server on this machine with the bucket ``bucket``; what it holds outlives a restart."""

    def __init__(self) -> None:
        self.port = 0
        self.start()

    def start(self) -> None:
        self.server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self.server.start()
        _, self.port = self.server.get_host_and_port()

    def stop(self) -> None:
        self.server.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def check_credentials(self, after: str = "0") -> None:
        """Deny every key after so many requests."""
        plain = {"Content-Type": "text/plain"}
        url = f"{self.url}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(url, after.encode(), plain)).close()

    def upload(self, file: Path, key: str) -> None:
        self.client.upload_file(str(file), "bucket", key)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket="bucket", Key=key)

    @functools.cached_property
    def client(self) -> Any:
        return boto3.client("s3")


@pytest.fixture
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A server that everything that speaks S3 is pointed to."""
    store = ObjectStore()
    for name in ("AWS_ENDPOINT_URL", "S3_ENDPOINT_URL"):  # of AWS's libraries, and of streaming
        monkeypatch.setenv(name, store.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    urllib.request.urlopen(f"{store.url}/moto-api/reset", data=b"").close()
    store.client.create_bucket(Bucket="bucket")
    yield store
    store.check_credentials(after="inf")  # the setting is the process's
    store.stop()
