"""A real Slurm on this machine: munge, a controller and two nodes, in a folder and on ports of its
own. Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from support.checkout import TRAINING
from support.trainer import Trainer, at_step, events_of

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
NODES = ("n0", "n1")
SECONDS = 240.0
CONFIG = """\
ClusterName=lora
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=120
MpiDefault=none
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=40000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=40000
PartitionName=spare Nodes=n0,n1 Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=n0,n1 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Return why Slurm cannot run here; empty if it can."""
    if os.geteuid():
        return "slurmd starts jobs as other users, so it needs root"
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    return f"{', '.join(absent)} missing: apt-get install slurm-wlm munge" if absent else ""


class Slurm:
    """Calls the cluster's commands."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}

    def call(self, *command: str, **changed: str) -> str:
        """Run a command; return what it printed."""
        done = subprocess.run(
            command,
            env=self.environment | changed,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return a job's state, such as RUNNING; empty once Slurm has forgotten it."""
        return self._shown(job, "JobState")

    def exit_code(self, job: str) -> int:
        """Return the exit code of a job that has ended."""
        return int(self._shown(job, "ExitCode").split(":")[0])

    def restarts(self, job: str) -> int:
        """Return how often a job was put back into the queue."""
        return int(self._shown(job, "Restarts"))

    def begin_now(self, job: str) -> None:
        """Start a job now: Slurm waits two minutes before it starts one again."""
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def cancel_all(self) -> None:
        """Cancel every job, and wait until none runs: jobs outlive the daemons."""
        until = time.monotonic() + SECONDS
        while jobs := self.call("squeue", "--noheader", "--format=%A").split():
            assert time.monotonic() < until, f"jobs {', '.join(jobs)} do not end"
            self.call("scancel", "--quiet", *jobs)
            time.sleep(1)

    def _shown(self, job: str, name: str) -> str:
        fields = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict((*field.split("=", 1), "")[:2] for field in fields).get(name, "")


@contextlib.contextmanager
def running(root: Path) -> Iterator[Slurm]:
    """Start the daemons, and end them."""
    munge = root / "munge"
    for folder in (munge, root / "state", *(root / f"spool-{node}" for node in NODES)):
        folder.mkdir(parents=True, mode=0o700)
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o400)
    host = socket.gethostname().split(".")[0]
    (root / "slurm.conf").write_text(CONFIG.format(root=root, host=host, ports=_free_ports(3)))
    slurm = Slurm(root)
    files = [f"--{name}={munge / name}" for name in ("socket", "key-file", "log-file", "pid-file")]
    files = [option.replace("/key-file", "/key") for option in files]
    daemons = [["munged", "--foreground", "--force", f"--seed-file={munge}/seed", *files]]
    daemons += [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    started = []
    with (root / "daemons.log").open("wb") as log:
        for command in daemons:
            started.append(subprocess.Popen(command, env=slurm.environment, stdout=log, stderr=log))
            time.sleep(1)
        try:
            until = time.monotonic() + 60
            while "idle" not in slurm.call("sinfo", "--noheader", "--format=%T"):
                assert time.monotonic() < until, (root / "slurmctld.log").read_text()
                time.sleep(0.5)
            try:
                yield slurm
            finally:
                slurm.cancel_all()
        finally:
            for process in reversed(started):
                process.terminate()
                process.wait(60)


class Job:
    """A job of deploy/slurm/train.sbatch."""

    def __init__(
        self, slurm: Slurm, trainer: Trainer, output: Path, *flags: str, **changed: object
    ) -> None:
        self.slurm, self.output = slurm, output
        self.log = output.with_suffix(".log")
        command = trainer.command(output, **changed)
        variables = trainer.environment() | {"LORA_VENV": sys.prefix}
        self.number = slurm.call(
            *("sbatch", "--parsable", f"--chdir={TRAINING.parent}", f"--output={self.log}"),
            *("--cpus-per-task=1", "--mem=3G"),
            *flags,
            str(TRAINING / "deploy" / "slurm" / "train.sbatch"),
            *command[command.index("--config") :],
            **variables,
        )

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is recorded."""
        is_it = at_step(step)
        self.wait_until(lambda: any(map(is_it, events_of(self.output))))

    def wait_for(self, *states: str) -> str:
        """Wait until the job is in one of these states; return it."""
        self.wait_until(lambda: self.slurm.state(self.number) in states)
        return self.slurm.state(self.number)

    def wait_until(self, is_so: Callable[[], object]) -> None:
        """Wait until something is so."""
        until = time.monotonic() + SECONDS
        while not is_so():
            printed = self.log.read_text() if self.log.exists() else "(no log)"
            state = self.slurm.state(self.number)
            assert time.monotonic() < until, f"job {self.number} is {state}:\n{printed}"
            time.sleep(0.2)

    def end(self) -> str:
        """Wait until the job has ended for good; return its state."""
        return self.wait_for("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")

    def go_on(self) -> str:
        """Start a job that is back in the queue; return the state that it ends in."""
        self.wait_for("PENDING")
        self.slurm.begin_now(self.number)
        self.wait_until(lambda: self.slurm.state(self.number) != "PENDING")
        return self.end()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
