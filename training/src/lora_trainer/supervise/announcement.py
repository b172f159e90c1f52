"""What a run does once it is over: `on_end_command` and `webhook_url`.

Both get the exit code and the results. Both have a time limit, and a stop signal ends the
wait; whatever goes wrong is a warning and never changes the exit code. A start that finds
its run finished already announces nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..config.environment import PREFIX
from ..config.schema import Config
from ..errors import TrainerError
from ..host import interrupts
from ..host.launcher import OWN_VARIABLES
from ..redaction import Redaction
from ..run.events import Warned
from ..run_folder import RunFolder
from ..serve.run_state import RunState
from .log_filter import open_log
from .stop_signals import STOPS

COMMAND_SECONDS = 60.0
WEBHOOK_SECONDS = 10.0
POLL_SECONDS = 0.05
# Else a run that the command starts would run the command at its end again.
OWN_KEYS = (
    *(f"{PREFIX}{key}" for key in ("ON_END_COMMAND", "WEBHOOK_URL", "WEBHOOK_URL_FILE")),
    *OWN_VARIABLES,  # it would be one of this run's processes
)


class EndedRun(Protocol):
    """What is needed of a run: a supervisor has it."""

    config: Config
    output_dir: Path
    run_name: str
    redaction: Redaction
    live: RunState
    display: Any  # called with an event and the status after it


@contextlib.contextmanager
def announced(run: EndedRun) -> Iterator[None]:
    """Announce the end of the run that is done within."""
    try:
        yield
    except TrainerError as error:
        if not interrupts.received:
            announce(run, error.exit_code)
        raise
    if run.live.status.exit_code is not None:
        announce(run, 0)


def announce(run: EndedRun, exit_code: int) -> None:
    """Run the command and call the webhook, each if it is configured."""
    monitoring = run.config.monitoring
    if monitoring.on_end_command is None and monitoring.webhook_url is None:
        return
    is_stopped = threading.Event()
    results = _results(run, exit_code)
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(interrupts.handled(lambda *_: is_stopped.set(), STOPS))
        faults = []
        if monitoring.on_end_command is not None:
            variables = {
                "LORA_EXIT_CODE": str(exit_code),
                "LORA_RUN_NAME": run.run_name,
                "LORA_OUTPUT_DIR": str(run.output_dir),
                "LORA_RESULTS": str(RunFolder(run.output_dir).results) if results else "",
            }
            command = monitoring.on_end_command
            faults.append(_run_command(command, variables, run, is_stopped))
        if monitoring.webhook_url is not None:
            body = {
                "text": f"{run.run_name}: {_outcome(exit_code)}",
                "exit_code": exit_code,
                "run_name": run.run_name,
                "results": results,
            }
            faults.append(_call(monitoring.webhook_url, run.redaction.value(body), is_stopped))
    for fault in filter(None, faults):
        event = run.redaction.event(Warned(message=fault))
        run.display(event, run.live.add(event))


def _outcome(exit_code: int) -> str:
    named = {0: "finished", 143: "stopped"}.get(exit_code, "failed")
    return f"{named} (exit code {exit_code})"


def _results(run: EndedRun, exit_code: int) -> dict[str, Any] | None:
    """Return what results.json says; None where it is of an earlier run, or is not there."""
    try:
        content = json.loads((RunFolder(run.output_dir).results).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    has_begun = run.live.status.exit_code is not None
    is_own = isinstance(content, dict) and (
        has_begun or (content.get("status"), content.get("exit_code")) == ("refused", exit_code)
    )
    return content if is_own else None


def _run_command(
    command: str, variables: Mapping[str, str], run: EndedRun, is_stopped: threading.Event
) -> str:
    """Run a shell command, its output in the run's log; return what went wrong."""
    environment = {k: v for k, v in os.environ.items() if k not in OWN_KEYS} | dict(variables)
    log_file = RunFolder(run.output_dir).log
    with contextlib.ExitStack() as stack:
        output = subprocess.DEVNULL
        if log_file.parent.is_dir():
            output = stack.enter_context(open_log(log_file, run.redaction))
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            return f"on_end_command was not run: {error.strerror}"
        if not _wait(lambda: process.poll() is not None, COMMAND_SECONDS, is_stopped):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            cause = "by a stop signal" if is_stopped.is_set() else f"after {COMMAND_SECONDS:g} s"
            return f"on_end_command was ended {cause}"
    code = process.returncode
    return (
        f"on_end_command ended with exit code {code}; its output is in {RunFolder.log}"
        if code
        else ""
    )


def _call(url: str, body: Mapping[str, Any], is_stopped: threading.Event) -> str:
    """Post JSON to a URL; return what went wrong, the URL not in it."""
    faults: list[str] = []

    def post() -> None:
        faults.append(_post(url, json.dumps(body).encode()))

    # A server that answers a byte at a time keeps no time limit of a socket.
    thread = threading.Thread(target=post, name="webhook", daemon=True)
    thread.start()
    if not _wait(lambda: not thread.is_alive(), WEBHOOK_SECONDS, is_stopped):
        return "webhook_url was not called in time"
    return faults[0] if faults else "webhook_url was not called"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Results go to the address that was configured, and to no other."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _post(url: str, body: bytes) -> str:
    headers = {"Content-Type": "application/json", "User-Agent": "lora-trainer"}
    try:
        request = urllib.request.Request(url, body, headers, method="POST")  # noqa: S310
        opener = urllib.request.build_opener(_NoRedirects)
        with opener.open(request, timeout=WEBHOOK_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        return f"webhook_url answered {error.code}"
    except urllib.error.URLError as error:
        reason = getattr(error.reason, "strerror", None) or type(error.reason).__name__
        return f"webhook_url cannot be reached: {reason}"
    except (OSError, ValueError) as error:  # its text may hold the URL
        return f"webhook_url was not called: {type(error).__name__}"


def _wait(is_done: Callable[[], bool], seconds: float, is_stopped: threading.Event) -> bool:
    until = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() >= until or is_stopped.wait(POLL_SECONDS):
            return is_done()
    return True
