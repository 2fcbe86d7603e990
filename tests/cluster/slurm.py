"""A real Slurm of two nodes on this machine: a controller and two node daemons, munge between them.

Debian's packages are installed if they are missing and this user may; :class:`Unavailable` says why
it cannot be started. Each node pretends to have 16 cores and 4 GPUs (device files that nothing
runs on). There is no accounting database, so ``sacct`` fails, as it does on many small clusters.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ["slurm-wlm", "munge"]
PROGRAMS = ["slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged"]
NODES = ["node1", "node2"]


class Unavailable(RuntimeError):
    """This machine cannot have a Slurm of its own."""


class Slurm:
    """The cluster; :attr:`environment` is what a process needs to use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def __enter__(self) -> Slurm:
        install()
        start_munge()
        for name in ("state", "log", "devices", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        for number in range(4):
            os.mknod(self.folder / "devices" / f"gpu{number}", 0o20666, os.makedev(1, 3))
        (self.folder / "slurm.conf").write_text(self.configuration())
        (self.folder / "gres.conf").write_text(
            f"NodeName=node[1-2] Name=gpu File={self.folder}/devices/gpu[0-3]\n"
        )
        self.command("slurmctld")
        for node in NODES:
            self.start_node(node)
        deadline = time.monotonic() + 60
        while self.states() != ["idle", "idle"]:
            if time.monotonic() > deadline:
                log = (self.folder / "log" / "slurmctld.log").read_text()[-2000:]
                raise Unavailable(f"its nodes are {self.states()} after a minute: {log}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self.command("scancel", "--state=PENDING,RUNNING,SUSPENDED", "--user=root", check=False)
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld"):
            self.kill(name, signal.SIGTERM)

    def configuration(self) -> str:
        controller, first, second = free_ports(3)
        host = socket.gethostname().partition(".")[0]
        folder = self.folder
        return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmdParameters=config_overrides
SlurmdTimeout=10
ReturnToService=2
JobRequeue=1
KillWait=15
MinJobAge=3600
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
GresTypes=gpu
NodeName=DEFAULT CPUs=16 RealMemory=8000 Gres=gpu:4
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""

    def command(self, *words: str, check: bool = True) -> str:
        """Run one of Slurm's programs and return what it prints."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr or done.stdout}")
        return done.stdout

    def start_node(self, node: str) -> None:
        self.command("slurmd", "-N", node)

    def kill(self, daemon: str, how: int = signal.SIGKILL) -> None:
        """End a daemon: ``slurmctld`` or ``slurmd-<node>``."""
        path = self.folder / f"{daemon}.pid"
        if path.exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), how)

    def states(self) -> list[str]:
        return self.command("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False).split()

    def jobs(self) -> dict[str, str]:
        """State of every job by its id (of an array: ``12_0``), those that have ended included."""
        lines = self.command("squeue", "--states=all", "-h", "-r", "-o", "%i %T").splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}


def install() -> None:
    """Debian's packages, where they are missing.

    Raises:
        Unavailable: they cannot be installed; says why.
    """
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if os.geteuid() != 0:
        raise Unavailable("slurmctld and two slurmd need root here")
    if all(shutil.which(program, path=path) for program in PROGRAMS):
        return
    if shutil.which("apt-get") is None:
        raise Unavailable(f"{' '.join(PACKAGES)} are not installed, and there is no apt-get")
    for command in (["update", "-qq"], ["install", "-y", "-qq", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", *command],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Unavailable(f"apt-get {' '.join(command)} failed: {done.stderr.strip()[-500:]}")


def start_munge() -> None:
    """The daemon that vouches for who sends a message."""
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        return
    key, run = Path("/etc/munge/munge.key"), Path("/run/munge")
    run.mkdir(mode=0o755, exist_ok=True)
    shutil.chown(run, "munge", "munge")
    if not key.exists():
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        shutil.chown(key, "munge", "munge")
    done = subprocess.run(
        ["runuser", "-u", "munge", "--", "/usr/sbin/munged"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Unavailable(f"munged does not start: {done.stderr.strip()}")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
