"""What is done, missing and failed, at what speed and cost, told from the stores alone."""

from __future__ import annotations

import datetime
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from gen.generations.failures import describe_reasons, failures_path, read_failures
from gen.generations.sessions import Session, latest_of_writers, read_sessions
from gen.generations.store import GenerationStore
from trainer.slurm_jobs import describe_job

ACTIVE = 120.0  # seconds since its last part after which a session no longer counts as running
JOBS = "jobs"  # folder of a corpus: the Slurm jobs of sweeps
COLUMNS = ["document_id", "index", "completion_tokens", "finish_reason"]


def status(root: Path) -> str:
    """A few lines for every store below ``root``, and one for every job in Slurm or cut off."""
    folders = sorted((root / "generations").glob("*/manifest.json"))
    stores = [store_status(GenerationStore(folder.parent)) for folder in folders]
    records = {path.stem: describe_job(path) for path in sorted((root / JOBS).glob("*.json"))}
    jobs = [f"{root}: {name}: {told}" for name, told in records.items() if told]
    return "\n".join([*(stores or [f"{root}: no generations yet"]), *jobs])


def store_status(store: GenerationStore) -> str:
    """Done, missing, failed, tokens, cached share, speed, time left and cost of one store."""
    sessions = read_sessions(store.folder)
    latest = latest_of_writers(sessions)
    expected = sum(session.expected for session in latest)
    # Files of an earlier division of the work tell of what has been tried again since.
    failures = [
        failure
        for session in latest
        for failure in read_failures(failures_path(store.folder, session.writer))
    ]
    failed = Counter(failure.reason for failure in failures)
    if not store.parts():
        return f"{store.folder}: empty" + (f" of {expected:,} generations" if expected else "")
    table = store.read(COLUMNS)
    # An edited document has generations of its old text as well.
    done = table.group_by(["document_id", "index"]).aggregate([]).num_rows
    documents = pc.count_distinct(table["document_id"]).as_py()
    generated = pc.sum(table["completion_tokens"]).as_py() or 0  # imported ones may not say
    cut = pc.sum(pc.equal(table["finish_reason"], "length")).as_py() or 0
    lines = [
        f"{store.folder}: {done:,} generations of {documents:,} documents, {generated:,} tokens, "
        f"{cut / table.num_rows:.0%} cut off by their length limit"
    ]
    if store.imported:
        lines.append(f"  {imported(store.import_record())}")
    if latest:
        lines.append(f"  {progress(done, expected, failed, latest)}")
        if done < expected:
            lines.append(f"  {', '.join(map(describe_writer, latest))}")
        lines.append(f"  {speed_and_cost(sessions, latest, generated, expected - done)}")
    return "\n".join(lines)


def imported(record: dict[str, Any]) -> str:
    """Where an imported store comes from, and what was left out of it by reason."""
    left_out = ", ".join(f"{count:,} {name}" for name, count in sorted(record["left_out"].items()))
    return f"imported from {len(record['files']):,} files; left out: {left_out or 'nothing'}"


def progress(done: int, expected: int, failed: Counter[str], latest: list[Session]) -> str:
    """Done and missing of what all writers owe."""
    missing = max(0, expected - done)
    text = f"{done / max(1, expected):.1%} done, {missing:,} missing, {failed.total():,} failed"
    if failed:
        text += f" ({describe_reasons(dict(failed.most_common()))})"
    absent = set(range(latest[0].writers)) - {session.writer for session in latest}
    if absent:
        names = ", ".join(map(str, sorted(absent)))
        text += f"; writers that have not begun and are not counted: {names} of {latest[0].writers}"
    return text


def describe_writer(session: Session) -> str:
    """Whether a writer runs, and how its last call ended."""
    silent = time.time() - session.now
    told = f"writer {session.writer} of {session.writers} "
    where = session.host + (f" as job {session.job}" if session.job else "")
    if session.ended:
        return f"{told}{session.ended}"
    if silent < ACTIVE:
        return f"{told}is running on {where}"
    ago = datetime.timedelta(seconds=round(silent))
    return f"{told}was cut off, last heard of {ago} ago on {where}"


def speed_and_cost(
    sessions: list[Session], latest: list[Session], generated: int, missing: int
) -> str:
    """Cached share, tokens a second, time left at that speed, GPU-hours."""
    prompt = sum(session.prompt_tokens for session in sessions)
    cached = sum(session.cached_tokens for session in sessions)
    speed = sum(session.completion_tokens / session.seconds for session in latest)
    rate = sum(session.generations / session.seconds for session in latest)
    running = any(not one.ended and time.time() - one.now < ACTIVE for one in latest)
    parts = [
        f"{cached / max(1, prompt):.1%} of {prompt:,} prompt tokens from the cache",
        f"{speed:,.0f} tokens/s {'now' if running and missing > 0 else 'in the last session'}",
    ]
    if missing > 0 and rate > 0:
        parts.append(f"{datetime.timedelta(seconds=round(missing / rate))} left at that speed")
    hours = sum(session.seconds * session.gpus for session in sessions) / 3600
    parts.append(f"{sum(session.seconds for session in sessions) / 3600:.2f} hours")
    if hours:
        parts.append(f"{hours:.2f} GPU-hours, {generated / hours:,.0f} tokens per GPU-hour")
    thoughts = sum(session.thoughts for session in sessions)
    if thoughts:
        thinking = sum(session.thinking_tokens for session in sessions)
        parts.append(f"{thinking:,} tokens of thinking before {thoughts:,} answers, not kept")
    if uncounted := sum(session.uncounted for session in sessions):
        parts.append(f"{uncounted:,} answers without counts of tokens")
    restarts = sum(session.restarts for session in sessions)
    return ", ".join(parts) + f", {len(sessions)} sessions, {restarts} server restarts"
