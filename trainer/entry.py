"""What the four scripts share: Hydra, and mistakes on the command line told in one helpful line."""

from __future__ import annotations

import dataclasses
import functools
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from trainer.config.renamed import RENAMED
from trainer.errors import user_errors
from trainer.logs import LOGGING
from trainer.plugins import discover_plugins
from trainer.stop import Stopped, hand_on

Result = TypeVar("Result")

# Hydra copies the schemas, which nothing changes, for each of the ninety groups that --help lists.
ConfigStore.__deepcopy__ = lambda store, _: store  # type: ignore[attr-defined]
ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"


def program(name: str, schema: type) -> Callable[[Callable[[Any], Result]], Callable[[], Result]]:
    """Make a function of a config the program ``name``: its Hydra configs lie in ``conf/<name>``.

    The function is given an instance of ``schema``. Keys that have a new name, choices that belong
    to another program and keys that the schema lacks end the program with one line that says what
    to write instead.
    """

    def decorate(main: Callable[[Any], Result]) -> Callable[[], Result]:
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
        for part in ("job_logging", "hydra_logging"):  # of a job, and of a sweep's master
            ConfigStore.instance().store(group=f"hydra/{part}", name="plain", node=LOGGING)
        discover_plugins()

        @functools.wraps(main)
        def composed(config: DictConfig) -> Result:
            if unknown := sorted(unknown_keys(config, OmegaConf.structured(schema))):
                raise ValueError(
                    f"{name}.py has no key {', '.join(unknown)}; docs/config.md lists all there are"
                )
            if missing := sorted(OmegaConf.missing_keys(config)):
                raise ValueError(
                    f"{name}.py needs {', '.join(missing)}; docs/config.md says what to write"
                )
            try:
                return main(OmegaConf.to_object(config))
            except Stopped as stop:
                hand_on(stop)

        run: Callable[[], Result] = hydra.main(
            version_base="1.3", config_path=str(CONF / name), config_name="config"
        )(user_errors(composed))

        def start() -> Result:
            """What ``python NAME.py ...`` calls."""
            sys.argv = spelled_out(sys.argv)
            user_errors(check_overrides)(name, sys.argv[1:])
            try:
                return run()
            except KeyboardInterrupt:
                sys.exit(128 + signal.SIGINT)

        return start

    return decorate


def spelled_out(arguments: list[str]) -> list[str]:
    """``estimate=true`` is short for ``estimate.enabled=true``: Hydra takes a group for a file."""
    return [re.sub(r"^estimate=", "estimate.enabled=", argument) for argument in arguments]


def unknown_keys(config: Any, schema: Any, prefix: str = "") -> Iterator[str]:
    """Keys of ``config``, below ``prefix``, that ``schema`` does not have."""
    for key in config:
        if key not in schema.keys():  # noqa: SIM118  ('in' is false for what is missing)
            yield f"{prefix}{key}"
        elif dataclasses.is_dataclass(OmegaConf.get_type(schema, key)):  # a dict has any keys
            yield from unknown_keys(config[key], schema[key], f"{prefix}{key}.")


def check_overrides(name: str, arguments: list[str]) -> None:
    """Raise ValueError for an old key, or for a choice of another program's config group.

    A choice in a folder of the user's own is theirs, whatever it is called.
    """
    folders = [CONF / name, *own_folders(arguments)]
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            continue
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            continue  # Hydra says what is wrong with it
        key = override.key_or_group
        if key in RENAMED:
            value = argument.partition("=")[2]
            raise ValueError(f"{key} is called {RENAMED[key]} now: write {RENAMED[key]}={value}")
        choices = (
            [str(choice) for choice in override.sweep_string_iterator()]
            if override.is_sweep_override()
            else [str(override.value())]
        )
        own = options(folders, key)
        for other in ("train", "generate", "evaluate", "report"):
            theirs = set(options([CONF / other], key)) - set(own)
            if other == name or not theirs:
                continue
            if not own and not any((folder / key).exists() for folder in folders):
                raise ValueError(f"{key}= belongs to {other}.py; {name}.py has no such choice")
            if foreign := theirs.intersection(choices):
                raise ValueError(
                    f"{key}={', '.join(sorted(foreign))} belongs to {other}.py; {name}.py takes "
                    f"{key}={', '.join(own)}"
                )


def own_folders(arguments: list[str]) -> list[Path]:
    """Folders of configs that ``--config-dir`` and ``hydra.searchpath=[...]`` name."""
    flags, _ = get_args_parser().parse_known_args(arguments)
    found = [flags.config_dir, flags.config_path]
    for argument in arguments:
        if argument.startswith("hydra.searchpath="):
            found += OmegaConf.from_dotlist([argument]).hydra.searchpath
    return [Path(folder.removeprefix("file://")) for folder in found if folder]


def options(folders: list[Path], group: str) -> list[str]:
    """The choices of a config group in folders; none where they have no such group."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
