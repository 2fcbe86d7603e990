"""What this project knows of SGLang by name fits the release that ``make sglang`` installs."""

import re
import subprocess

import httpx

from gen.serving.load import RUNNING, WAITING
from gen.serving.sglang import SglangConfig
from gen.serving.sglang_environment import VERSION, interpreter
from tests.gen.serving.target import Target

EVERY_OPTION = SglangConfig(
    mem_fraction_static=0.5,
    max_total_tokens=1000,
    max_running_requests=8,
    hierarchical_cache=True,
    ngram_speculation=True,
    kv_cache_dtype="fp8_e5m2",
    deterministic=True,
    load_format="dummy",
    tp_size=2,
    dp_size=2,
)


def test_every_flag_is_one_of_this_release() -> None:
    shown = subprocess.run(
        [interpreter("cpu"), "-m", "sglang.launch_server", "--help"],
        env={"SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    known = set(re.findall(r"--[a-z][\w-]*", shown))
    wanted = set()
    for device in ("cuda", "cpu"):
        EVERY_OPTION.device, EVERY_OPTION.python = device, "python"
        command = EVERY_OPTION.command("model", "model", 512, 1)
        wanted |= {flag.split("=")[0] for flag in command if flag.startswith("--")}
    assert wanted - known == set()


def test_the_gauges_have_the_names_we_read(target: Target) -> None:
    page = httpx.get(f"{target.url}/metrics", timeout=30.0).text
    shown = set(re.findall(r"^(sglang:\w+)", page, re.MULTILINE))
    wanted = {name for name in (*WAITING, *RUNNING) if name.startswith("sglang:")}
    assert wanted - shown == set()


def test_the_server_is_the_release_that_was_installed(target: Target) -> None:
    assert httpx.get(f"{target.url}/server_info", timeout=30.0).json()["version"] == VERSION
