"""A third real server, which has no /tokenize, no /metrics and no list of its local model."""

from pathlib import Path

from tokenizers import Tokenizer

from gen.corpus.documents import Document
from gen.generations.job import run_job
from gen.generations.store import GenerationStore
from gen.prompts import MethodConfig
from gen.serving.servers import GeneratorConfig, serving
from gen.serving.sglang_environment import folder
from gen.serving.supervisor import SupervisedServer, free_port


def test_a_job_runs_on_transformers_serve(
    tiny_llama: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    port = free_port()
    command = [
        *(str(folder("cpu") / "bin" / "transformers"), "serve", str(tiny_llama)),
        *("--device", "cpu", "--host", "127.0.0.1", "--port", str(port)),
    ]
    documents = [Document("short", "The harbour lies below."), Document("long", "sea " * 4000)]
    offline = {"HF_HUB_OFFLINE": "1"}
    with SupervisedServer("transformers", command, port, tmp_path / "log", 600, 0, offline) as one:
        for tokens_of in (None, str(tiny_llama)):  # estimated, and counted
            root = tmp_path / f"root-{tokens_of is None}"
            config = GeneratorConfig(
                "openai",
                model=str(tiny_llama),
                urls=[f"{one.url}/v1"],
                context_length=2048,
                concurrency=2,
                tokenizer=tokens_of,
            )
            method = MethodConfig(prompt="{text} Say it again.", generations=2, max_tokens=4)
            session = run_job(method, config, documents, tokenizer, root, serving)
            assert (session.generations, session.failed, session.uncounted) == (4, 0, 0)
            rows = GenerationStore(root / "generations" / "rephrase").read().to_pylist()
            longest = {row["document_id"]: row["prompt_tokens"] for row in rows}["long"]
            assert 600 < longest <= 2048 - 4
            assert all(row["truncated"] == (row["document_id"] == "long") for row in rows)
