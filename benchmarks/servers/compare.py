"""Is a server under our client as fast as its engine alone, and which server is faster here?

    python -m benchmarks.servers.compare --output benchmarks/results/NAME.json

SGLang and the embedded llama.cpp, each with a tiny random Llama and with SmolLM2-135M. SGLang
against its own offline benchmark (``alone``), and against that with every prompt computed once
before its siblings come, as our client lets it be (``alone, prompts first``); llama.cpp against a
loop over its C API. Every round gives all the same new documents, one after the other in changing
order, so that what else runs on the machine meets all of them alike; ratios are taken inside a
round. All write the same number of tokens: the end of a text is ignored. CPU seconds are those of
all processes of a side.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.data.stages import Texts
from benchmarks.generation import PROMPT, SYSTEM
from gen.corpus.documents import Document
from gen.corpus.tokenizer import TokenizerConfig, train_bpe
from gen.generations.job import run_job
from gen.prompts import MethodConfig
from gen.serving.servers import (
    EMBEDDED_MODEL,
    GeneratorConfig,
    Servers,
    embedded_server,
    embedded_weights,
    serving,
    sglang_model,
)
from gen.serving.sglang import SglangConfig
from gen.serving.sglang_environment import VERSION
from trainer.files import write_json

HERE = Path(__file__).parent
SIDES = ["tiny", "sglang", "tiny-llama.cpp", "llama.cpp"]
PROMPTS_FIRST = "alone, prompts first"
Run = Callable[[list[Document]], dict[str, float]]


@dataclass(frozen=True)
class Load:
    """What every side is given in a round."""

    documents: int
    characters: int
    generations: int
    tokens: int

    @property
    def method(self) -> MethodConfig:
        return MethodConfig(
            "compare",
            generations=self.generations,
            system=SYSTEM,
            prompt=PROMPT,
            max_tokens=self.tokens,
        )

    def chats(self, documents: list[Document]) -> list[list[dict[str, str]]]:
        """One for each document."""
        return [self.method.messages(0, text=document.text) for document in documents]


@dataclass
class Side:
    """One way to generate: how to run it, and the processes that it costs CPU time in."""

    run: Run
    processes: list[psutil.Process]
    started: float  # seconds until it answered

    def measure(self, documents: list[Document]) -> dict[str, float]:
        """Seconds, CPU seconds and tokens of one round."""
        before = cpu_seconds([*self.processes, psutil.Process()])
        found = self.run(documents)
        found["cpu_seconds"] = cpu_seconds([*self.processes, psutil.Process()]) - before
        found["tokens_per_second"] = found["completion_tokens"] / found["seconds"]
        found["tokens_per_cpu_second"] = found["completion_tokens"] / found["cpu_seconds"]
        return found


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


@contextlib.contextmanager
def new_processes() -> Iterator[list[psutil.Process]]:
    """The descendants that come into being inside, listed at its end."""
    before = set(psutil.Process().children(recursive=True))
    found: list[psutil.Process] = []
    yield found
    found += set(psutil.Process().children(recursive=True)) - before


def under_our_client(
    config: GeneratorConfig, load: Load, stack: contextlib.ExitStack, weights: Path | None = None
) -> Side:
    """A server started as ``generate.py`` starts it, and jobs on it."""
    began = time.monotonic()
    log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.log"
    with new_processes() as processes:
        if config.kind == "embedded":
            server = stack.enter_context(embedded_server(config, log, weights))
            servers = Servers([server.url])
        else:
            servers = stack.enter_context(serving(config, log))
    started = time.monotonic() - began
    tokenizer = train_bpe([], TokenizerConfig(vocab_size=257))  # only latent thoughts need one

    @contextlib.contextmanager
    def same(_: GeneratorConfig, __: Path) -> Iterator[Servers]:
        yield servers

    def run(documents: list[Document]) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as root:
            session = run_job(load.method, config, documents, tokenizer, Path(root), same)
        return {
            "seconds": session.seconds,
            "completion_tokens": session.completion_tokens,
            "requests": session.requests,
            "prompt_tokens": session.prompt_tokens,
            "cached_share": session.cached_share,
        }

    return Side(run, processes, started)


def peer(
    command: list[str],
    tasks: list[Callable[[list[Document]], dict[str, Any]]],
    environment: dict[str, str],
    stack: contextlib.ExitStack,
) -> list[Side]:
    """A program that answers a line with a line: a side for each way to use it."""
    began = time.monotonic()
    log = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    with new_processes() as processes:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **environment},
        )
        stack.callback(end, process)
        assert process.stdin is not None
        assert process.stdout is not None
        ask, answers = process.stdin, process.stdout

        def answer() -> dict[str, float]:
            line = answers.readline()
            if not line.startswith("{"):
                log.seek(0)
                told = log.read().decode(errors="replace")
                raise ValueError(f"{command[1]}: {line!r}; its log ends:\n{told[-3000:]}")
            found: dict[str, float] = json.loads(line)
            return found

        answer()

    def of(task: Callable[[list[Document]], dict[str, Any]]) -> Run:
        def run(documents: list[Document]) -> dict[str, float]:
            ask.write(json.dumps(task(documents)) + "\n")
            ask.flush()
            return answer()

        return run

    started = time.monotonic() - began
    return [Side(of(task), processes, started) for task in tasks]


def end(process: subprocess.Popen[str]) -> None:
    """End a peer with all that it started."""
    children = psutil.Process(process.pid).children(recursive=True)
    for one in [*children, process]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            one.kill()
    process.wait()


def sglang_sides(
    model: str, load: Load, options: argparse.Namespace, stack: contextlib.ExitStack
) -> dict[str, Side]:
    """SGLang's server under our client, and its engine in its own benchmark."""
    config = GeneratorConfig(
        "sglang",
        model=model,
        context_length=options.context_length,
        concurrency=options.sglang_concurrency,
        siblings_in_flight=load.generations,
        threads=options.threads,
        sglang=SglangConfig(
            device="cpu",
            max_running_requests=options.sglang_running,
            max_total_tokens=options.cache_tokens,
            arguments=options.sglang_argument,
        ),
        extra_body={"ignore_eos": True},
    )
    command = config.sglang.command(sglang_model(config), model, config.context_length, 1)
    interpreter, flags = config.sglang.interpreter(), command[command.index("-m") + 2 :]

    def task(documents: list[Document]) -> dict[str, Any]:
        same = {"generations": load.generations, "tokens": load.tokens}
        return {"chats": load.chats(documents), "prompts_first": False, **same}

    def task_of_prompts(documents: list[Document]) -> dict[str, Any]:
        return task(documents) | {"prompts_first": True}

    command = [*interpreter, str(HERE / "sglang_offline.py"), *flags]
    environment = config.sglang.environment(0, options.threads)
    client = under_our_client(config, load, stack)
    alone, ordered = peer(command, [task, task_of_prompts], environment, stack)
    return {"client": client, "alone": alone, PROMPTS_FIRST: ordered}


def llama_cpp_sides(
    weights: Path, load: Load, options: argparse.Namespace, stack: contextlib.ExitStack
) -> dict[str, Side]:
    """The embedded server under our client, and llama.cpp's C API in a loop."""
    config = GeneratorConfig(
        "embedded",
        model=EMBEDDED_MODEL,
        context_length=options.context_length,
        concurrency=options.slots,
        threads=options.threads,
        extra_body={"ignore_eos": True},
    )
    client = under_our_client(config, load, stack, weights)
    port = next(
        connection.laddr.port
        for process in client.processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    )

    def ask(path: str, body: dict[str, Any]) -> Any:
        url = f"http://127.0.0.1:{port}{path}"
        return httpx.post(url, json=body, timeout=60).raise_for_status().json()

    def task(documents: list[Document]) -> dict[str, Any]:
        texts = [
            ask("/apply-template", {"messages": chat})["prompt"] for chat in load.chats(documents)
        ]
        prompts = [
            ask("/tokenize", {"content": text, "parse_special": True})["tokens"] for text in texts
        ]
        return {"prompts": prompts, "generations": load.generations, "tokens": load.tokens}

    told = {
        "weights": str(weights),
        "sequences": options.slots,
        "context_length": options.context_length,
        "threads": options.threads,
    }
    command = [sys.executable, str(HERE / "llama_cpp_batched.py"), json.dumps(told)]
    (alone,) = peer(command, [task], {}, stack)
    return {"client": client, "alone": alone}


def tiny_gguf(folder: Path, stack: contextlib.ExitStack) -> Path:
    """The tiny Llama as llama.cpp reads it."""
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tiny.gguf"
    interpreter = SglangConfig(device="cpu").interpreter()
    command = [*interpreter, str(HERE / "tiny_gguf.py"), str(folder), str(file)]
    subprocess.run(command, check=True)
    return file


def compare(sides: dict[str, Side], load: Load, rounds: int, texts: Texts) -> list[dict[str, Any]]:
    """What every side did in every round; the first round, which warms up, is left out."""
    measured = []
    names = list(sides)
    for number in range(rounds + 1):
        documents = [
            Document(f"{number}-{place}", texts.one(f"{number}-{place}", load.characters))
            for place in range(load.documents)
        ]
        turned = names[number % len(names) :] + names[: number % len(names)]
        found = {name: sides[name].measure(documents) for name in turned}
        tokens = {one["completion_tokens"] for one in found.values()}
        assert len(tokens) == 1, f"the sides generated different numbers of tokens: {found}"
        print({name: round(one["tokens_per_second"], 1) for name, one in found.items()}, flush=True)
        if number:
            measured.append(found)
    return measured


def ratio(rounds: list[dict[str, Any]], above: str, below: str, what: str) -> dict[str, Any]:
    """Of one side to another inside each round: the median, and all."""
    each = [round(one[above][what] / one[below][what], 3) for one in rounds]
    return {"median": round(statistics.median(each), 3), "rounds": each}


def summary(sides: dict[str, Side], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of every side."""
    return {
        name: {
            "seconds_until_it_answered": round(side.started, 1),
            **{
                what: round(statistics.median(one[name][what] for one in rounds), 4)
                for what in rounds[0][name]
            },
        }
        for name, side in sides.items()
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", nargs="+", default=SIDES)
    parser.add_argument("--tiny", type=Path, help="folder of a tiny random Llama")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--characters", type=int, default=1000, help="of a document")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of a generation")
    parser.add_argument("--context-length", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--slots", type=int, default=8, help="of llama.cpp")
    parser.add_argument("--sglang-concurrency", type=int, default=64)
    parser.add_argument("--sglang-running", type=int, default=32)
    parser.add_argument("--sglang-argument", action="append", default=[])
    parser.add_argument("--cache-tokens", type=int, default=32768)
    parser.add_argument("--note", default="")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    load = Load(options.documents, options.characters, options.generations, options.tokens)
    groups: dict[str, dict[str, Side]] = {}
    with contextlib.ExitStack() as stack:
        if "tiny" in options.sides:
            groups["tiny"] = sglang_sides(str(options.tiny), load, options, stack)
        if "sglang" in options.sides:
            groups["sglang"] = sglang_sides(EMBEDDED_MODEL, load, options, stack)
        if "tiny-llama.cpp" in options.sides:
            tiny = tiny_gguf(options.tiny, stack)
            groups["tiny-llama.cpp"] = llama_cpp_sides(tiny, load, options, stack)
        if "llama.cpp" in options.sides:
            groups["llama.cpp"] = llama_cpp_sides(embedded_weights(), load, options, stack)
        sides = {
            f"{group} {name}": side for group, pair in groups.items() for name, side in pair.items()
        }
        rounds = compare(sides, load, options.rounds, Texts())
        result = {
            "command": "python -m benchmarks.servers.compare "
            + " ".join(arguments or sys.argv[1:]),
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()}-core {platform.machine()}",
            "note": options.note,
            "versions": {
                "python": platform.python_version(),
                "sglang": VERSION,
                "xllamacpp": importlib.metadata.version("xllamacpp"),
            },
            "load": vars(load),
            "sides": summary(sides, rounds),
            "ratios": {
                f"{above} / {below}": {
                    what: ratio(rounds, above, below, what)
                    for what in ("tokens_per_second", "tokens_per_cpu_second")
                }
                for above, below in ratios_of(groups)
            },
            "rounds": rounds,
        }
    print(json.dumps({name: result[name] for name in ("sides", "ratios")}, indent=1))
    if options.output:
        write_json(options.output, result)
    return result


def ratios_of(groups: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs of sides that are compared."""
    pairs = [
        (f"{group} client", f"{group} {other}")
        for group, sides in groups.items()
        for other in sides
        if other != "client"
    ]
    if {"sglang", "llama.cpp"} <= set(groups):
        pairs.append(("sglang client", "llama.cpp client"))
    return pairs


if __name__ == "__main__":
    main()
