"""Check a run's health: `lora-trainer health`, on this machine or in a container.

Shows its state, what each endpoint answers, the GPU and recent errors of its log; of a run that
has ended, how and why. Every problem comes with a remedy. `health-check.sh` finds the container
and passes on what Docker knows of it. Writes nothing and needs no torch.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ..errors import MEANINGS, ConfigError
from ..run.lock import own_address
from ..run_folder import RunFolder
from ..serve.gauges import GpuReading, open_nvml, read_gpus
from ..serve.server import read_token
from ..units import size

ENDPOINTS = ("/health", "/metrics", "/status", "/history")
ANSWER_SECONDS = 4.0
LOG_LINES = 200
SHOWN_ERRORS = 5
KILLED = 137
ERROR = re.compile(r"error|traceback|exit code [1-9]|killed|out of memory|no space", re.I)
CLOSING = re.compile(r"exit code [1-9]\d*")
RESUMES = "./training/run.sh resumes from the last checkpoint"

Outcome = Literal["", "finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem and its remedy."""

    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Container:
    """What Docker knows of a container: a line of `docker inspect`, as health-check.sh asks."""

    id: str
    service: str
    state: Mapping[str, Any]
    restarts: int = 0

    @property
    def status(self) -> str:
        """Return Docker's word for its state, such as `running` or `exited`."""
        return str(self.state.get("Status", ""))

    @property
    def exit_code(self) -> int:
        """Return the exit code of one that has ended."""
        return int(self.state.get("ExitCode", 0))

    @property
    def health(self) -> str:
        """Return what its HEALTHCHECK found; empty where it has none."""
        return str((self.state.get("Health") or {}).get("Status", ""))


@dataclass
class Report:
    """What was seen; the fields are those of `--json`."""

    runs_in: Literal["container", "machine", "nothing"] = "nothing"
    state: str = ""
    outcome: Outcome = ""
    exit_code: int | None = None
    url: str = ""
    endpoints: dict[str, int] = field(default_factory=dict)
    gpu: str = ""
    health: dict[str, Any] | None = None
    problems: list[Finding] = field(default_factory=list)
    recent_errors: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    container: str = ""
    results: str = ""

    @property
    def is_healthy(self) -> bool:
        """Return whether nothing is wrong; a run that finished or was stopped is well."""
        return not self.problems

    def problem(self, what: str, remedy: str) -> None:
        """Add a problem and what helps."""
        self.problems.append(Finding(what, remedy))

    def ended(self, exit_code: int, log: str, *, is_memory: bool = False) -> None:
        """Judge a run that has ended by its exit code and the block that it printed last."""
        self.exit_code = exit_code
        self.outcome = {0: "finished", 143: "stopped"}.get(exit_code, "failed")  # type: ignore[assignment]
        if self.outcome != "failed":
            return
        block = closing_block(log)
        if is_memory:
            self.problem(
                f"the kernel killed a process for memory ({_memory_limit()} allowed)",
                "raise LORA_MEMORY, or use --per_device_train_batch_size 1 "
                "--gradient_checkpointing true",
            )
        elif not block and exit_code == KILLED:
            self.problem("the run was killed from outside, by docker kill or SIGKILL", RESUMES)
        if block or not self.problems:
            remedies = (line.split("remedy:", 1)[1] for line in block if "remedy:" in line)
            self.problem(
                f"{block[0] if block else 'the run ended'} (exit code {exit_code}: "
                f"{MEANINGS.get(exit_code, 'see the log')})",
                next(remedies, "").strip()
                or "./training/run.sh logs shows the reason; ./training/run.sh resumes the run",
            )

    def ask(self, token: str) -> None:
        """Ask every endpoint of the server."""
        for path in ENDPOINTS:
            code, body = fetch(self.url, path, token)
            self.endpoints[path] = code
            answer = _json(body)
            if path == "/health" and code:
                self.health = answer
            if path == "/metrics" and code == http.HTTPStatus.OK:
                self.metrics = answer
            if code == 0:
                self._unanswered()
                return
            if path == "/health" and code == http.HTTPStatus.SERVICE_UNAVAILABLE:
                self.problem(str(answer.get("reason", "")), str(answer.get("remedy", "")))
            elif code == http.HTTPStatus.UNAUTHORIZED:
                self.problem(
                    f"{path} asks for a token", "HEALTH_TOKEN_FILE=FILE lora-trainer health"
                )
            elif code != http.HTTPStatus.OK:
                self.problem(f"{path} answers {code}", "./training/run.sh logs")

    def _unanswered(self) -> None:
        if self.runs_in == "nothing":
            self.problem(
                f"no run was found, and no server answers at {self.url}",
                "./training/run.sh starts one",
            )
            return
        self.problem(
            f"{self.url} does not answer",
            "./training/run.sh logs; if it uses another port: HEALTH_PORT=PORT",
        )

    def to_json(self) -> str:
        """Return what `--json` prints, one line."""
        left_out = ("metrics", "container", "results")
        values = {"is_healthy": self.is_healthy} | asdict(self)
        return json.dumps({k: v for k, v in values.items() if k not in left_out})

    def lines(self) -> Iterator[str]:
        """Return what a person reads."""
        runs_in = "" if self.runs_in == "nothing" else self.runs_in
        rows = {
            "run": ", ".join(filter(None, (runs_in, self.state))),
            "container": self.container,
        }
        if self.endpoints:
            codes = " ".join(f"{path}={code:03}" for path, code in self.endpoints.items())
            rows["server"] = f"{self.url}: {codes}"
        rows["phase"] = str((self.health or {}).get("phase", ""))
        if self.metrics:
            rows["training"] = (
                f"step {self.metrics.get('current_step')} of {self.metrics.get('total_steps')}, "
                f"loss {self.metrics.get('last_loss')}"
            )
        rows["GPU"] = self.gpu
        yield from (f"{name:<10} {text}" for name, text in rows.items() if text)
        yield from (f"{'log':<10} {line}" for line in self.recent_errors)
        for problem in self.problems:
            yield f"{problem.what}\n  remedy: {problem.remedy}"
        if self.is_healthy:
            ends = {
                "finished": f": the run has finished; results: {self.results}",
                "stopped": ": the run was stopped; ./training/run.sh resumes it",
            }
            yield f"healthy{ends.get(self.outcome, '')}"


def report_health(
    outputs: Path, *, url: str, is_json: bool, watch_seconds: int | None, is_docker: bool
) -> int:
    """Print what is seen, again and again with `watch_seconds`; return the exit code.

    `is_docker`: standard input holds what Docker knows (see `read_docker`).
    """
    containers, log = read_docker(sys.stdin.read()) if is_docker else ([], "")
    while True:
        report = look(outputs, url, containers, log)
        if watch_seconds and not is_json:
            print(f"{time.strftime('%H:%M:%S')}  every {watch_seconds} s")  # noqa: T201
        print(report.to_json() if is_json else "\n".join(report.lines()), flush=True)  # noqa: T201
        if not watch_seconds:
            return 0 if report.is_healthy else 1
        time.sleep(watch_seconds)


def look(outputs: Path, url: str, containers: list[Container], log: str) -> Report:
    """Look at the run at `url`, in the container, or the newest one in `outputs`."""
    report = Report(url=url, results=str(outputs))
    trainer = next((one for one in containers if one.service == "trainer"), None)
    # A run on this machine is newer than a container that has ended.
    has_ended = trainer is not None and trainer.status in ("exited", "dead", "created")
    if has_ended and _live_folder(outputs) is not None:
        containers = []
    if containers and not url:
        _look_at_container(report, containers, log)
    elif not url:
        log = _look_at_folder(report, outputs)
    if report.state in ("", "running", "restarting"):
        port = os.environ.get("HEALTH_PORT") or "8080"
        report.url = report.url or f"http://127.0.0.1:{port}"
        report.ask(_token())
        report.gpu = "; ".join(_of_gpu(gpu) for gpu in read_gpus(open_nvml())) or "none"
    if report.outcome != "finished":
        lines = [line for line in log.splitlines()[-LOG_LINES:] if ERROR.search(line)]
        report.recent_errors = lines[-SHOWN_ERRORS:]
    return report


def read_docker(text: str) -> tuple[list[Container], str]:
    """Read a line of JSON for each container, then the log of the one that says why it ended."""
    lines = text.splitlines(keepends=True)
    containers = []
    while lines and lines[0].startswith("{"):
        raw = json.loads(lines.pop(0))
        containers.append(Container(raw["id"], raw["service"], raw["state"], raw["restarts"]))
    return containers, "".join(lines)


def _look_at_container(report: Report, containers: list[Container], log: str) -> None:
    """Judge the trainer's container, and preflight's where it refused the start."""
    trainer = next(one for one in containers if one.service == "trainer")
    refused = next(
        (one for one in containers if one.service == "preflight" and one.exit_code), None
    )
    report.runs_in, report.state = "container", trainer.status
    report.container = (
        f"{trainer.id[:12]} is {trainer.status}"
        f"{f' ({trainer.health})' if trainer.health else ''}, restarted {trainer.restarts} times"
    )
    match trainer.status:
        case "exited" | "dead":
            code = trainer.exit_code
            report.container += f", exit code {code} ({MEANINGS.get(code, 'see the log')})"
            report.ended(code, log, is_memory=bool(trainer.state.get("OOMKilled")))
        case "created" if refused:
            report.ended(refused.exit_code, log)
        case "created" if why := trainer.state.get("Error"):
            report.outcome = "failed"
            report.problem(
                f"Docker could not start the container: {why}",
                "./training/run.sh shows the remedy",
            )
        case "restarting":
            report.problem(
                f"the container crashed and was restarted (exit code {trainer.exit_code})",
                "./training/run.sh logs",
            )
        case "running" if trainer.health == "unhealthy":
            report.problem("Docker reports the container as unhealthy", "see /health")


def _look_at_folder(report: Report, outputs: Path) -> str:
    """Find the newest run of this machine; return the last of its log."""
    folders = _folders(outputs)
    if not folders:
        return ""
    live = _live_folder(outputs)
    folder = live or folders[0]
    log = _tail(RunFolder(folder).log)
    report.runs_in, report.results = "machine", str(folder)
    if live is not None:
        report.state, report.url = "running", own_address(live)
        return log
    report.state = "ended"
    last = _json((_tail(RunFolder(folder).events).splitlines() or [""])[-1])
    code = 0 if RunFolder(folder).done.exists() else last.get("exit_code")
    report.ended(code if isinstance(code, int) else KILLED, log)
    return log


def _folders(outputs: Path) -> list[Path]:
    """Return the folders of runs, the newest first."""
    paths = (RunFolder(outputs).events, *outputs.glob(f"*/{RunFolder.events}"))
    events = [path for path in paths if path.is_file()]
    return sorted((path.parent for path in events), key=_changed, reverse=True)


def _live_folder(outputs: Path) -> Path | None:
    """Return the folder of the newest run whose server is on this machine."""
    return next((folder for folder in _folders(outputs) if own_address(folder)), None)


def fetch(url: str, path: str, token: str) -> tuple[int, str]:
    """Ask a server on this host, past any proxy; 0 where nothing answers in time."""
    address = urlsplit(url)
    if address.scheme != "http" or not address.hostname:
        raise ConfigError.of(
            "the address is invalid",
            where=f"--url {url}",
            why="it must be http://HOST:PORT",
            remedy="lora-trainer health --url http://127.0.0.1:8080",
        )
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        server = http.client.HTTPConnection(
            address.hostname, address.port or 80, timeout=ANSWER_SECONDS
        )
        server.request("GET", path, headers=headers)
        answer = server.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return 0, ""


def closing_block(log: str) -> list[str]:
    """Return the lines of the last paragraph that ends with an exit code; none if none does."""
    paragraphs = re.split(r"\n[ \t]*\n", log)
    for paragraph in reversed(paragraphs):
        lines = paragraph.strip("\n").splitlines()
        for end, line in enumerate(lines):
            if CLOSING.match(line):
                return lines[: end + 1]
    return []


def _of_gpu(gpu: GpuReading) -> str:
    used, total = gpu.memory_used_bytes or 0, gpu.memory_total_bytes or 0
    return f"{gpu.name}, {size(used)} of {size(total)} used"


def _token() -> str:
    file = os.environ.get("HEALTH_TOKEN_FILE") or os.environ.get("LORA_TRAINER_HEALTH_TOKEN_FILE")
    # A secret that Compose mounts from nowhere is an empty file.
    return read_token(file) if file and not _is_empty(file) else ""


def _is_empty(file: str) -> bool:
    try:
        return Path(file).stat().st_size == 0
    except OSError:
        return False


def _memory_limit() -> str:
    return os.environ.get("LORA_MEMORY") or "16g"


def _changed(folder: Path) -> float:
    try:
        return RunFolder(folder).events.stat().st_mtime
    except OSError:
        return 0.0


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 100_000))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
