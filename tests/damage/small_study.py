"""A whole study of two seconds, in one call: corpus, generations, streams, two runs, a report.

It is what a user's script does with ``generate.py``, ``train.py`` and ``report.py``, in one process
that has imported everything already. Called again, it goes on with what is there.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import http.server
import json
import logging.config
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import streaming  # noqa: F401  (imported here, before a process of its own is forked)
import torch

from gen.corpus.documents import CorpusConfig
from gen.corpus.tokenizer import TokenizerConfig
from gen.megadocs.config import StreamConfig
from gen.pipeline import GenerateConfig, generate
from gen.prompts import MethodConfig
from gen.serving.servers import GeneratorConfig
from trainer.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    RecipeConfig,
    RuntimeConfig,
    TrackingConfig,
    TrainConfig,
)
from trainer.errors import user_errors
from trainer.logs import LOGGING
from trainer.loop import train
from trainer.study.report import write_report

DOCUMENTS = 20
WORDS = [f"word{number}" for number in range(50)]
TIMES = {"hours"}  # columns of the report that differ from run to run
REAL = RecipeConfig(epochs=2)
STITCHED = RecipeConfig("stitched", "real", "stitched", 2, 0.5, 2, 3e-3, 0.1)


class Rewriter(http.server.BaseHTTPRequestHandler):
    """An OpenAI server whose answer is a function of the request: the prompt's words, shuffled."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "rewriter"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "messages" not in asked:  # /tokenize
            return self.answer({"tokens": [1] * len(asked.get("content", ""))})
        words = asked["messages"][-1]["content"].split()
        random.Random(asked["seed"]).shuffle(words)
        choice = {"message": {"content": " ".join(words)}, "finish_reason": "stop"}
        usage = {"prompt_tokens": len(words), "completion_tokens": len(words)}
        return self.answer({"choices": [choice], "usage": usage})

    def answer(self, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its client was killed
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def rewriter() -> Iterator[str]:
    """URL of a running :class:`Rewriter`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rewriter) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def write_source(path: Path) -> None:
    """The real documents, as a user has them."""
    generator = random.Random(0)
    with path.open("w") as lines:
        for number in range(DOCUMENTS):
            text = " ".join(generator.choices(WORDS, k=40))
            print(json.dumps({"id": f"d{number}", "text": text}), file=lines)


def corpus_config(source: Path) -> CorpusConfig:
    return CorpusConfig("jsonl", str(source), id_column="id", held_out=0.3)


def generate_config(source: Path, root: Path, url: str) -> GenerateConfig:
    return GenerateConfig(
        root=str(root),
        corpus=corpus_config(source),
        tokenizer=TokenizerConfig(vocab_size=300),
        method=MethodConfig(prompt="{text}", generations=2, max_tokens=200),
        generator=GeneratorConfig("openai", model="rewriter", urls=[url], flush_seconds=0.02),
        streams=StreamConfig(generations=[2]),
    )


def study(source: Path, root: Path, url: str) -> str:
    """Everything that is missing below ``root``, and the report's table.

    Args:
        source: documents of the user, which no damage reaches.
        root: corpus folder, with ``runs`` and ``report`` in it.
        url: of the server that writes.
    """
    torch.set_num_threads(1)
    generate(generate_config(source, root, url))
    for recipe in (REAL, STITCHED):
        train(
            TrainConfig(
                data=DataConfig(str(root), context_length=256, batch_size=4),
                recipe=recipe,
                model=ModelConfig(16, 32, 1, 2, 1),
                tracking=TrackingConfig(tensorboard=False, num_evaluations=2, log_every=1),
                checkpoint=CheckpointConfig(count=4),
                runtime=RuntimeConfig(num_threads=1),
                output=str(root / "runs"),
            )
        )
    table, _ = write_report(root / "runs", root / "report")
    return table


def outcome(root: Path) -> dict[str, object]:
    """What the report says, without the times that differ from run to run."""
    found: dict[str, object] = {}
    for path in sorted((root / "report").iterdir()):
        found[path.name] = None
        if path.suffix == ".csv":
            with path.open() as rows:
                found[path.name] = [
                    {name: value for name, value in row.items() if name not in TIMES}
                    for row in csv.DictReader(rows)
                ]
        elif path.suffix == ".png":
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def as_a_user(source: Path, root: Path, url: str, said: Path, file_limit: int | None) -> None:
    """:func:`study` in a process of its own; what it says goes to ``said``.

    Args:
        file_limit: bytes that no file may grow beyond; None: no limit.
    """
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if file_limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    logging.config.dictConfig(LOGGING)
    user_errors(lambda: print(study(source, root, url)))()
