"""Documents -> generations -> streams, as ``generate.py`` runs it."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from gen.client.answers import GenerationFailed
from gen.corpus import near_duplicates
from gen.corpus.documents import (
    CorpusConfig,
    Document,
    build_documents,
    documents_manifest,
    hash_of,
    load_split,
)
from gen.corpus.tokenizer import (
    TokenizerConfig,
    TokenizerManifest,
    build_tokenizer,
    cut_to_tokens,
    describe_losses,
    encode,
    load_tokenizer,
)
from gen.estimate import GenerateEstimate, estimate
from gen.exchange.card import CARD
from gen.exchange.config import ImportConfig
from gen.exchange.export import Export
from gen.exchange.importing import Import
from gen.exchange.upload import upload
from gen.generations.allocation import allotment
from gen.generations.job import run_job
from gen.generations.sessions import Session
from gen.generations.status import JOBS, status
from gen.generations.store import GenerationStore
from gen.megadocs.config import StreamConfig
from gen.megadocs.progress import streams_status
from gen.megadocs.streams import build_stream
from gen.prompts import MethodConfig
from gen.quality.gates import QualityConfig, ReportConfig
from gen.serving.servers import GeneratorConfig, serving
from gen.work import Work, hold_little_memory
from trainer.config.fields import Place, check_bounds, group, setting
from trainer.files import only_one
from trainer.object_store import is_remote, is_there, send
from trainer.stop import Stopped, stopping_at_once

logger = logging.getLogger(__name__)

TASKS = ("all", "corpus", "generate", "streams", "status", "report")


@dataclass
class GenerateConfig:
    """Everything ``generate.py`` can be told."""

    task: str = setting(
        "all", "What is done; all: the corpus, generations, streams.", choices=TASKS
    )
    root: str = setting(
        "data/pydoc", "Corpus folder: documents, generations, streams.", place=Place.here
    )
    export: str | None = setting(
        None,
        "Instead of a task: write documents, generations and megadocs of root to this new folder "
        "(or s3://..., gs://...), as Parquet that datasets.load_dataset opens.",
        place=Place.anywhere,
    )
    upload: str | None = setting(
        None,
        "Instead of a task: send the streams and the tokenizer of root there (s3://..., gs://...), "
        "where train.py data.root= reads them.",
        place=Place.anywhere,
    )
    corpus: CorpusConfig = group(CorpusConfig, "Where the real documents come from.")
    tokenizer: TokenizerConfig = group(TokenizerConfig, "What the streams are written with.")
    method: MethodConfig = group(MethodConfig, "How a model is asked to rewrite a document.")
    generator: GeneratorConfig = group(
        GeneratorConfig, "The model that writes, and how it is reached."
    )
    # generate.py calls this group import, which no field of Python can be called.
    imports: ImportConfig = group(ImportConfig, "Generations that exist already; say import.path=.")
    streams: StreamConfig = group(StreamConfig, "How megadocs are put together.")
    quality: QualityConfig = group(
        QualityConfig,
        "What is found in generations: keep counts one, drop leaves it out of the streams.",
    )
    report: ReportConfig = group(ReportConfig, "What the quality report shows.")
    # estimate=true says what the missing generations will cost, and generates nothing.
    estimate: GenerateEstimate = group(GenerateEstimate, "estimate=true: what it would cost.")

    def job_record(self) -> Path:
        """Where a sweep keeps the Slurm job of this task, of this writer."""
        method = self.method
        work = self.streams if self.task == "streams" else self.generator
        store = GenerationStore.of_method(
            Path(self.root), method.name, method.generations, method.latent
        )
        names = [self.task, store.folder.name, f"{work.writer}-of-{work.writers}"]
        return Path(self.root) / JOBS / f"{'-'.join(names)}.json"


def generate(config: GenerateConfig) -> None:
    """Run one task, or all of them in order; what is finished already is not done again.

    Raises:
        Stopped: a signal asked for it; what was finished is kept, the same call goes on.
    """
    hold_little_memory()
    try:
        with stopping_at_once(f"{config.root}: stopped; the same command goes on"):
            run_task(config)
    except Stopped as stop:
        logger.info(stop)
        raise


def run_task(config: GenerateConfig) -> None:
    """Print or make what ``config.task`` asks for; checked before anything is written."""
    check_bounds(config)
    root = Path(config.root)
    if config.task == "status":
        print("\n".join(filter(None, [status(root), streams_status(root)])))
        return
    config.method.check()
    config.quality.check()
    if config.export is not None:
        print(export_all(config, root, config.export))
        return
    if config.upload is not None:
        print(upload(root, config.upload))
        return
    if config.task == "report":
        print(quality_report(config, root))
        return
    config.generator.check()
    config.streams.check()
    if config.method.by_loss:
        check_by_loss(config)
    if config.generator.kind == "import":
        import_and_build(config, root)
        return
    with only_one(root / "corpus.lock"):  # several nodes may begin with a new corpus at once
        corpus = prepare_corpus(config, root)
    if config.estimate.enabled:
        arguments = (config.method, config.generator, config.estimate)
        print(estimate(*arguments, corpus.train, corpus.tokenizer, root))
        return
    if config.task in ("all", "generate"):
        generate_missing(config, corpus, root)
    if config.task in ("all", "streams", "corpus"):
        build_streams(config, corpus, root)


def check_by_loss(config: GenerateConfig) -> None:
    """Raise ValueError for streams that ``method.allocation=by_loss`` cannot make."""
    wanted = config.streams.generations
    if wanted and wanted != [config.method.generations]:
        raise ValueError(
            f"streams.generations={wanted}: with method.allocation=by_loss streams have the "
            f"method's G={config.method.generations}, because every G is allotted differently"
        )
    if config.streams.methods:
        raise ValueError(
            f"streams.methods={config.streams.methods}: method.allocation=by_loss allots the "
            "generations of one method"
        )
    if config.generator.kind == "import":
        raise ValueError(
            "generator=import takes the generations that there are; method.allocation=by_loss is "
            "for a generator that makes them"
        )


def generate_missing(config: GenerateConfig, corpus: Corpus, root: Path) -> None:
    """Generate what is missing; failures end the call unless streams may do without them."""
    try:
        session = run_job(
            config.method, config.generator, corpus.train, corpus.tokenizer, root, serving
        )
    except GenerationFailed as failed:
        if config.task == "generate" or config.streams.missing == "refuse":
            raise
        logger.warning(failed)  # how many of them a stream may lack is checked there
    else:
        logger.info(describe(config.method, session))


def import_and_build(config: GenerateConfig, root: Path) -> None:
    """``generator=import``: documents and generations from files, then streams of each method."""
    if config.estimate.enabled:
        raise ValueError("generator=import generates nothing: estimate=true has nothing to tell")
    corpus_config = config.corpus
    if corpus_config.format == "import":
        path = config.imports.sources or config.imports.path
        corpus_config = replace(corpus_config, path=path)
    with only_one(root / "corpus.lock"):
        records = Import(config.imports, config.method.name, corpus_config, root).run()
        if config.task == "generate":
            return
        corpus = prepare_corpus(replace(config, corpus=corpus_config), root)
    if config.task in ("all", "streams"):
        # Several styles in one stream are asked for instead of a stream of each.
        for name in list(records)[:1] if config.streams.methods else records:
            method = replace(config.method, name=name)
            build_streams(replace(config, method=method), corpus, root)


@dataclass(frozen=True)
class Corpus:
    """The documents of a corpus folder with their tokenizer."""

    train: list[Document]
    val: list[Document]
    tokenizer: Tokenizer
    vocabulary: TokenizerManifest

    @functools.cached_property
    def train_hash(self) -> str:
        return hash_of(self.train)

    @functools.cached_property
    def val_hash(self) -> str:
        return hash_of(self.val)


def prepare_corpus(config: GenerateConfig, root: Path) -> Corpus:
    """Documents and tokenizer, built where they are not there yet."""
    manifest = build_documents(config.corpus, root)
    counts = manifest["counts"]
    logger.info(
        f"{root}/documents: {counts['train']} training and {counts['val']} held-out documents, "
        f"{manifest['characters']:,} characters; left out: {counts['empty']} empty, "
        f"{counts['duplicate']} duplicate, {counts['too_long']} too long"
    )
    if manifest.get("near_duplicates", {}).get("held_out"):
        logger.info(near_duplicates.describe(manifest["near_duplicates"], counts["val"]))
    texts = (document.text for document in load_split(root, "train"))
    tokenizer, vocabulary = build_tokenizer(config.tokenizer, root, texts)
    train = list(load_split(root, "train"))
    if caution := describe_losses(tokenizer, (document.text for document in train)):
        logger.warning(caution)
    if config.corpus.token_budget is not None:
        train = cut_to_budget(train, config.corpus.token_budget, tokenizer)
    return Corpus(train, list(load_split(root, "val")), tokenizer, vocabulary)


def cut_to_budget(documents: list[Document], budget: int, tokenizer: Tokenizer) -> list[Document]:
    """The first documents that hold exactly ``budget`` tokens, end-of-text tokens included.

    Raises:
        ValueError: the corpus is smaller than the budget, or no document fits it.
    """
    if budget < 2:
        raise ValueError(
            f"corpus.token_budget={budget} must be at least 2: a token and the end of its document"
        )
    kept: list[Document] = []
    left = budget
    for document in documents:
        if left < 2:
            break
        tokens = len(encode(tokenizer, [document.text])[0]) + 1
        if tokens > left:
            text = cut_to_tokens(tokenizer, document.text, left - 1)
            document = Document(document.id, text, document.metadata)
            tokens = left
        kept.append(document)
        left -= tokens
    if left > 1:
        raise ValueError(
            f"corpus.token_budget={budget:,} is more than the {budget - left:,} training tokens "
            "there are; take it away or lower it"
        )
    return kept


def build_streams(config: GenerateConfig, corpus: Corpus, root: Path) -> None:
    """``real``, ``val`` and the synthetic streams that the method's generations allow."""
    allotted = None
    if config.method.by_loss and config.task != "corpus":
        allotted = allotment(config.method, corpus.train)
    with Work(config.streams.processes, config.streams.writer, config.streams.writers) as work:
        for kind, generations in streams_of(config, root):
            documents = corpus.val if kind == "val" else corpus.train
            build_stream(
                kind,
                config.method.name,
                generations,
                documents,
                corpus.val_hash if kind == "val" else corpus.train_hash,
                corpus.tokenizer,
                corpus.vocabulary,
                config.streams,
                config.quality,
                root,
                work,
                allotted,
            )


def streams_of(config: GenerateConfig, root: Path) -> Iterator[tuple[str, int]]:
    """Kind and G of each stream that a config asks for."""
    yield "real", 0
    yield "val", 0
    if config.task == "corpus":  # what a first model, real only, is trained with
        return
    if config.method.latent:  # thoughts belong to the cuts of one G
        yield "latent", config.method.generations
        return
    for generations in config.streams.generations or [default_generations(config, root)]:
        yield "simple", generations
        yield "stitched", generations


def default_generations(config: GenerateConfig, root: Path) -> int:
    """G of streams that do not say it: what was imported, else what is generated."""
    methods = config.streams.methods or [config.method.name]
    stores = [GenerationStore.of_method(root, method, 0) for method in methods]
    imported = [store.imported_generations for store in stores if store.imported]
    return max(imported, default=config.method.generations)


def export_all(config: GenerateConfig, root: Path, where: str) -> str:
    """Write everything in ``root`` to a folder or URI for others; returns what was written.

    Raises:
        FileNotFoundError: there are no documents, or no generations.
        ValueError: the folder is there already, or a stream is older than its generations.
        OSError: an object store cannot be reached, or not with these credentials.
    """
    documents_manifest(root / "documents")
    documents = list(load_split(root, "train"))
    tokenizer, vocabulary = load_tokenizer(root) if (root / "tokenizer").exists() else (None, None)
    if config.corpus.token_budget is not None and tokenizer is not None:
        documents = cut_to_budget(documents, config.corpus.token_budget, tokenizer)
    rest = (documents, tokenizer, vocabulary, config.quality)
    if not is_remote(where):
        return Export(root, Path(where), *rest).run()
    if is_there(f"{where}/{CARD}"):
        raise ValueError(f"export={where} is there already; name a new folder")
    with tempfile.TemporaryDirectory(dir=root, prefix=".export-") as folder:
        told = Export(root, Path(folder) / "dataset", *rest).run()
        send(Path(folder) / "dataset", where, CARD)
    return told.replace(f"{folder}/dataset", where)


def quality_report(config: GenerateConfig, root: Path) -> str:
    """Write ``root/reports/<store>.html`` about the method's generations; returns its table.

    Raises:
        FileNotFoundError: there are no documents or no generations yet.
    """
    from gen.quality.report import write_quality_report  # takes a second to import

    documents_manifest(root / "documents")
    documents = list(load_split(root, "train"))
    store = GenerationStore.of_method(
        root, config.method.name, config.method.generations, config.method.latent
    )
    path = root / "reports" / f"{store.folder.name}.html"
    table = write_quality_report(
        store, documents, hash_of(documents), config.quality, config.report, path
    )
    return f"{table}\n\nreport: {path}"


def describe(method: MethodConfig, session: Session) -> str:
    """One line about what a generation job did."""
    if not session.generations:
        return f"{method.name}: all G={method.generations} generations are there"
    return (
        f"{method.name}: {session.generations:,} generations, "
        f"{session.completion_tokens:,} tokens in {session.seconds:.0f} s "
        f"({session.completion_tokens / session.seconds:,.0f} tokens/s), "
        f"{session.cached_share:.1%} of {session.prompt_tokens:,} prompt tokens from the server's "
        f"cache, {session.retries} retries, {session.restarts} server restarts"
    )
