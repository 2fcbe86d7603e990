"""Finished runs as a report sees them: read, checked, grouped by what was learnt but for the seed.

A *group* is one configuration with its seeds. A *setting* is what must agree before recipes can be
compared: model size, mask, context and real tokens. The report's main setting is the one with the
most recipes.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer.config.schema import TrainConfig, load_config, to_dict
from trainer.data.format import real_document_of
from trainer.evaluation import downstream
from trainer.files import DamagedFileError, optional, read_sealed, sha256
from trainer.model.flops import training_flops
from trainer.run.inputs import training_data
from trainer.run.run_dir import JOB, state

logger = logging.getLogger(__name__)

NEEDED = (
    *("loss", "evaluation", "parameters", "steps", "seconds", "bits_per_byte"),
    *("loss_by_position", "tokens_seen", "epochs_seen"),
)  # in every result.json


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    config: TrainConfig
    result: dict[str, Any]
    metrics: list[dict[str, float]]
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)  # of lm-eval

    @property
    def kind(self) -> str:
        """``real``, the kind of the synthetic stream with its variant, or a stream ``alone``.

        A student of teachers is a kind of its own: it must not stand for its recipe, least of all
        for real-only training, which is the reference of data efficiency.
        """
        recipe = self.config.recipe
        kind = f"{recipe.real_stream} alone" if self.alone else recipe.stream or recipe.real_stream
        return f"{kind} distilled" if self.config.distillation.teachers else kind

    @property
    def alone(self) -> bool:
        """Whether the base is a synthetic stream; how much of it is real is not known here."""
        return self.config.recipe.stream is None and self.config.recipe.real_stream != "real"

    @property
    def generations(self) -> int:
        return self.config.recipe.used_generations

    @property
    def loss(self) -> float:
        """i.i.d. validation loss, nats per token."""
        loss: float = self.result["loss"]["iid"]
        return loss

    def stream_tokens(self, name: str) -> int:
        """Tokens of a whole stream, from the tokens and the passes over it."""
        tokens: float = self.result["tokens_seen"][name] / self.result["epochs_seen"][name]
        return round(tokens)

    @property
    def real_tokens(self) -> int:
        """Unique real tokens: of the base stream, all of it where it is read alone."""
        return self.stream_tokens(self.config.recipe.real_stream)

    @property
    def real_document(self) -> str | None:
        """Where it stands in the synthetic stream's megadocs: last, first, absent; else None."""
        name = self.config.recipe.synthetic
        if name is None:
            return None
        known = self.result.get("real_document", {})
        return known[name] if name in known else real_document_of(name)

    @property
    def generation_tokens(self) -> int:
        """Synthetic tokens that had to be generated, in tokens of this model's tokenizer."""
        name = self.config.recipe.synthetic
        if name is None:
            return 0
        real = 0 if self.real_document == "absent" else self.real_tokens
        return self.stream_tokens(name) - real

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return sum(self.result["tokens_seen"].values())

    @property
    def epochs_read(self) -> float:
        """Passes over the base stream; fewer than asked where a last, partial batch is left out."""
        passes: float = self.result["epochs_seen"][self.config.recipe.real_stream]
        return passes

    @property
    def synthetic_passes(self) -> float:
        name = self.config.recipe.synthetic
        return self.result["epochs_seen"][name] if name else 0.0

    @property
    def real_tokens_seen(self) -> int:
        """Real tokens trained on: of the base stream, and of the copies in the synthetic one."""
        copies = 0 if self.real_document == "absent" else self.synthetic_passes * self.real_tokens
        real: int = self.result["tokens_seen"][self.config.recipe.real_stream]
        return round(real + copies)

    @property
    def flops(self) -> int:
        """Model FLOPs; attention as if no mask cut the windows, so an upper bound under a mask."""
        pairs = self.tokens * (self.config.data.context_length + 1) // 2
        return training_flops(self.config.model, self.tokens, pairs)

    @property
    def hours(self) -> float:
        """Device hours: the time of every process (results of one process did not say so once)."""
        seconds: float = self.result["seconds"] * self.result.get("processes", 1)
        return seconds / 3600

    @property
    def device(self) -> str:
        """``GPU`` or ``CPU``, for the unit of hours."""
        return "GPU" if self.result.get("device") == "cuda" else "CPU"

    @property
    def setting(self) -> tuple[int, str, int, int]:
        """Parameters, mask, context length, real tokens."""
        data = self.config.data
        return (self.result["parameters"], data.mask.value, data.context_length, self.real_tokens)

    @property
    def inputs(self) -> dict[str, str]:
        """Content hashes of what was read, by name; of older runs only the folder is known."""
        return self.result.get("inputs") or {"data.root": self.config.data.root}

    @property
    def training_data(self) -> str:
        """Short identity of the training streams' content."""
        return training_data(self.config, self.inputs) or self.config.data.root

    @cached_property
    def group(self) -> str:
        """The same for runs that differ in their seeds alone."""
        data = replace(self.config.data, order_seed=0)
        return replace(self.config, seed=0, data=data).science_hash(self.inputs)


@dataclass(frozen=True)
class Group:
    """One configuration, its seeds."""

    runs: list[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]

    def losses(self, name: str = "iid") -> list[float]:
        """One loss a seed on an evaluation set."""
        return [run.result["loss"][name] for run in self.runs]

    def mean(self, name: str = "iid") -> float:
        return statistics.mean(self.losses(name))

    def spread(self, name: str = "iid") -> float:
        """Sample standard deviation over the seeds (n - 1); 0 for one seed."""
        losses = self.losses(name)
        return statistics.stdev(losses) if len(losses) > 1 else 0.0


@dataclass(frozen=True)
class Ensemble:
    """Scores of the ensembles of the first 1 to K members, written by ``evaluate.py``."""

    name: str
    mean: str
    losses: list[float]
    evaluation: dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Everything below one folder."""

    folder: Path
    runs: list[Run]
    unfinished: list[Path]
    ensembles: list[Ensemble]
    certificates: list[dict[str, Any]]  # of star searches

    @cached_property
    def groups(self) -> list[Group]:
        by_group: dict[str, list[Run]] = defaultdict(list)
        for run in self.runs:
            by_group[run.group].append(run)
        return [Group(runs) for runs in by_group.values()]

    @cached_property
    def main_setting(self) -> tuple[int, str, int, int]:
        """The setting with the most recipes; of equal ones the largest."""
        recipes: dict[tuple[int, str, int, int], set[tuple[str, int]]] = defaultdict(set)
        for run in self.runs:
            recipes[run.setting].add((run.kind, run.generations))
        return max(recipes, key=lambda setting: (len(recipes[setting]), setting))

    @cached_property
    def different_data(self) -> list[str]:
        """What stands under one name in the tables but was trained on different data."""
        by_name: dict[tuple[str, int, Hashable], dict[str, list[str]]] = {}
        for run in self.runs:
            found = by_name.setdefault((run.kind, run.generations, run.setting), defaultdict(list))
            found[run.training_data].append(run.path.name)
        return [
            f"{kind} G={generations or '-'} was trained on different data, which is kept apart: "
            + "; ".join(f"{data} by {', '.join(names)}" for data, names in found.items())
            for (kind, generations, _), found in by_name.items()
            if len(found) > 1
        ]

    @property
    def main(self) -> list[Group]:
        """The groups of the main setting."""
        return [group for group in self.groups if group.first.setting == self.main_setting]


Key = Callable[[Run], Hashable]


def best_by(groups: Iterable[Group], key: Key, name: str = "iid") -> dict[Any, Group]:
    """For each value of ``key``, in sorted order, the group of most seeds with the least mean loss.

    A search tries many configurations with one seed and the luckiest of them looks best, so it must
    not stand against one that was trained with several.
    """
    found: dict[Any, Group] = {}
    for group in groups:
        value = key(group.first)
        rank = (-len(group.runs), group.mean(name))
        if value not in found or rank < (-len(found[value].runs), found[value].mean(name)):
            found[value] = group
    return dict(sorted(found.items()))


def read_study(folder: Path) -> Study:
    """Everything finished below ``folder``, checked to be comparable.

    Raises:
        FileNotFoundError: no run is finished.
        ValueError: runs that cannot be compared, or a loss that is not a number.
    """
    runs, unfinished = read_runs(folder)
    check_comparable(runs)
    ensembles = read_ensembles(folder, runs[0])
    stars = [optional(path, read_sealed) for path in sorted(folder.rglob("star/*.json"))]
    certificates = [certificate for certificate in stars if certificate is not None]
    return Study(folder, runs, unfinished, ensembles, certificates)


def read_runs(folder: Path) -> tuple[list[Run], list[Path]]:
    """Finished runs below ``folder``, real first, and the folders of unfinished ones."""
    # A run that is still queued for the first time has no config yet.
    found = sorted({path.parent for name in ("config.yaml", JOB) for path in folder.rglob(name)})
    finished = [path for path in found if (path / "result.json").exists()]
    unfinished = [path for path in found if path not in finished]
    if not finished:
        raise FileNotFoundError(
            f"{folder} holds no finished run"
            + (f"; not finished: {names_and_states(unfinished)}" if unfinished else "")
            + "; train with python train.py first"
        )
    runs = []
    for path in finished:
        try:
            config = load_config(path / "config.yaml")
            result = read_sealed(path / "result.json")
            if missing := [key for key in NEEDED if key not in result]:
                raise DamagedFileError(f"result.json lacks {', '.join(missing)}")
            check_config_of_result(config, result)
            tasks = downstream.kept_scores(path / downstream.TASKS, result)
            result["sets"] = downstream.kept_scores(path / downstream.SETS, result)
            further = result["sets"] | further_readings(config, result)
            result["loss"] |= {name: one["loss"]["iid"] for name, one in further.items()}
            read_metrics = partial(metrics_of, expected=result.get("metrics_sha256"))
            metrics = optional(path / "metrics.jsonl", read_metrics) or []
            runs.append(Run(path, config, result, metrics, tasks))
        except (ValueError, KeyError, TypeError, OmegaConfBaseException, YAMLError) as error:
            raise ValueError(
                f"{path} cannot be read ({error!r}): it was written by another version or damaged; "
                "move it out of the folder"
            ) from error
    return sorted(runs, key=lambda run: (run.kind != "real", run.kind, run.generations)), unfinished


def check_config_of_result(config: TrainConfig, result: dict[str, Any]) -> None:
    """Raise DamagedFileError where ``config.yaml`` is that of another run than ``result.json``."""
    ours = {"recipe": to_dict(config)["recipe"], "seed": config.seed}
    told = {"recipe": result.get("recipe", {}), "seed": result.get("seed", config.seed)}
    known = ours["recipe"].keys() & told["recipe"].keys()  # an older version has others
    differs = [f"recipe.{key}" for key in known if ours["recipe"][key] != told["recipe"][key]]
    differs += ["seed"] if ours["seed"] != told["seed"] else []
    if differs:
        raise DamagedFileError(
            f"config.yaml and result.json are of two runs: {', '.join(sorted(differs))} differ"
        )


def further_readings(config: TrainConfig, result: dict[str, Any]) -> dict[str, Any]:
    """Scores of the held-out documents by other ways of reading than the one of the run's loss."""
    own = config.readings[0].name
    return {name: one for name, one in result.get("readings", {}).items() if name != own}


def names_and_states(runs: Iterable[Path]) -> str:
    """Which run is queued, running or cut off."""
    return ", ".join(f"{path.name} ({state(path)})" for path in runs)


def metrics_of(path: Path, expected: str | None) -> list[dict[str, float]]:
    """The log of a finished run.

    Raises:
        DamagedFileError: it is not what the run wrote.
    """
    if expected and sha256(path) != expected:
        raise DamagedFileError(
            f"{path} was changed after the run ended: for its curves delete {path.parent} and "
            "train it again"
        )
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise ValueError where losses of different things would stand in one table."""
    for run in runs:
        for name, loss in run.result["loss"].items():
            if not math.isfinite(loss):
                raise ValueError(
                    f"{run.path} has the loss {loss} on {name}; leave that run out or redo it"
                )
    seen: dict[str, Run] = {}
    for run in runs:
        twin = seen.setdefault(run.config.science_hash(run.inputs), run)
        if twin is not run:
            raise ValueError(
                f"{run.path} repeats {twin.path}, its seeds included; as two seeds they would make "
                "the error bars too small: move one of them out of the folder"
            )
    # How many tokens have a loss depends on how documents are laid into windows.
    first_reading: dict[Hashable, Run] = {}
    for run in runs:
        first = runs[0]
        for key in ("tokenizer_sha256", "stream", "documents", "content_sha256", "tokens"):
            if key == "tokens":
                first = first_reading.setdefault(run.config.readings[0], run)
            check_same_evaluation(
                str(first.path), first.result["evaluation"], str(run.path), run.result, key
            )

    scored: dict[str, Run] = {}
    for run in runs:
        for name, one in run.result["sets"].items():
            first = scored.setdefault(name, run)
            for key in ("tokenizer_sha256", "documents", "content_sha256"):
                expected = first.result["sets"][name]["evaluation"]
                check_same_evaluation(str(first.path), expected, str(run.path), one, key)


def trained_again(ensemble: dict[str, Any]) -> list[str]:
    """Members of a scored ensemble that hold other weights now than then, where both are known."""
    changed = []
    for member, told in zip(
        ensemble["members"], ensemble.get(downstream.TRAINED, []), strict=False
    ):
        result = optional(Path(member) / "result.json", read_sealed)
        if result and told and downstream.trained_by(result) not in ("", told):
            changed.append(member)
    return changed


def check_same_evaluation(
    first: str, expected: dict[str, Any], other: str, result: dict[str, Any], key: str
) -> None:
    """Raise ValueError where two results were measured on different things."""
    ours, theirs = expected.get(key), result["evaluation"].get(key)
    if key == "content_sha256" and None in (ours, theirs):
        return  # results of older versions do not say
    if ours != theirs:
        raise ValueError(
            f"{other} was evaluated with {key}={theirs}, {first} with {ours}: "
            "their losses cannot be compared; report them apart"
        )


def read_ensembles(folder: Path, first: Run) -> list[Ensemble]:
    """Ensembles that ``evaluate.py output=<folder>/ensembles/NAME.json`` scored."""
    found = []
    for path in sorted(folder.rglob("ensembles/*.json")):
        content = optional(path, read_sealed)
        if content is None:
            continue
        if "members" not in content:
            raise ValueError(f"{path} is no ensemble: evaluate.py wrote it for one run; move it")
        losses = [size["loss"]["iid"] for size in content["sizes"]]
        if not all(math.isfinite(loss) for loss in losses):
            raise ValueError(f"{path} holds the losses {losses}; score the ensemble again")
        for key in ("tokenizer_sha256", "stream", "documents", "content_sha256"):
            check_same_evaluation(
                str(first.path), first.result["evaluation"], str(path), content, key
            )
        if changed := trained_again(content):
            logger.warning(
                f"{path} is left out: {', '.join(changed)} was trained again since; start "
                "evaluate.py again"
            )
            continue
        found.append(Ensemble(path.stem, content["mean"], losses, content["evaluation"]))
    return found
