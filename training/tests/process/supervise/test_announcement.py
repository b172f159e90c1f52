"""What happens once a run is over: the command, the webhook, and that neither changes the end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from lora_trainer.config.settings import Settings, resolve
from lora_trainer.errors import ConfigError, TrainerError
from lora_trainer.run.events import Finished, Warned
from lora_trainer.run_folder import RunFolder
from lora_trainer.supervise import announcement, endings
from lora_trainer.supervise.supervisor import Supervisor
from support.shell_worker import says, step_line, supervisor_of

FINISHED = Finished(
    step=1, train_seconds=0.1, tokens_seen=1, peak_memory_bytes=7, results=[], adapter_step=1
)
WHOLE = says(step_line(1), FINISHED.to_line())
Supervise = Callable[..., Supervisor]


class Receiver:
    """A server on this machine that keeps what is posted to it."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.answer: Callable[[BaseHTTPRequestHandler], None] = lambda h: h.send_response(204)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                receiver.bodies.append(json.loads(self.rfile.read(length)))
                receiver.answer(self)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook/T0PSECRETPATHSEGMENT"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


@pytest.fixture
def supervise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervise:
    monkeypatch.setattr(endings, "write_report", lambda _: None)

    def make(script: str, *arguments: str) -> Supervisor:
        run = supervisor_of(tmp_path, monkeypatch, script, *arguments)
        warned: list[str] = []
        run.display = lambda event, _: (
            warned.append(event.message) if isinstance(event, Warned) else None
        )
        run.warned = warned  # type: ignore[attr-defined]
        return run

    return make


def refuse(_: Settings) -> None:
    raise ConfigError.of("not like this", remedy="like that")


def keeping(folder: Path) -> str:
    return f'--on_end_command=echo "$LORA_EXIT_CODE $LORA_RESULTS" >> {folder}/said'


def test_command_gets_the_exit_code_and_the_results(supervise: Supervise, tmp_path: Path) -> None:
    run = supervise(WHOLE, keeping(tmp_path))
    assert run.run() == 0
    assert (tmp_path / "said").read_text() == f"0 {RunFolder(run.output_dir).results}\n"


def test_command_runs_after_a_failure_too(supervise: Supervise, tmp_path: Path) -> None:
    run = supervise("exit 78", keeping(tmp_path))
    with pytest.raises(TrainerError) as caught:
        run.run()
    assert (tmp_path / "said").read_text().split()[0] == str(caught.value.exit_code)


def test_command_of_a_refused_start_gets_no_results_of_another_run(
    supervise: Supervise, tmp_path: Path
) -> None:
    supervise(WHOLE).run()
    with pytest.raises(ConfigError):
        supervise("", keeping(tmp_path)).run(refuse)
    assert (tmp_path / "said").read_text() == "78 \n"


def test_run_that_is_finished_already_announces_nothing(
    supervise: Supervise, tmp_path: Path
) -> None:
    supervise(WHOLE).run()
    assert supervise("", keeping(tmp_path)).run() == 0
    assert not (tmp_path / "said").exists()


def test_failed_command_is_a_warning_and_leaves_the_exit_code(
    supervise: Supervise,
) -> None:
    run = supervise(WHOLE, "--on_end_command=echo to the log; exit 3")
    assert run.run() == 0
    assert run.warned == ["on_end_command ended with exit code 3; its output is in train.log"]
    assert "to the log" in (RunFolder(run.output_dir).log).read_text()


def test_command_that_hangs_is_ended(supervise: Supervise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcement, "COMMAND_SECONDS", 0.3)
    run = supervise(WHOLE, "--on_end_command=sleep 60")
    begun = time.monotonic()
    assert run.run() == 0
    assert time.monotonic() - begun < 30
    assert run.warned == ["on_end_command was ended after 0.3 s"]


def test_command_is_not_inherited_by_a_run_that_it_starts(
    supervise: Supervise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_TRAINER_ON_END_COMMAND", "true")
    supervise(WHOLE, f"--on_end_command=env > {tmp_path}/said").run()
    assert "LORA_TRAINER_ON_END_COMMAND" not in (tmp_path / "said").read_text()


def test_webhook_gets_the_exit_code_and_the_results(
    supervise: Supervise, receiver: Receiver
) -> None:
    assert supervise(WHOLE, f"--webhook_url={receiver.url}", "--run_name=demo").run() == 0
    (body,) = receiver.bodies
    assert (body["exit_code"], body["run_name"]) == (0, "demo")
    assert body["text"] == "demo: finished (exit code 0)"
    assert (body["results"]["status"], body["results"]["steps"]) == ("finished", 1)


def test_webhook_is_called_after_a_refusal(supervise: Supervise, receiver: Receiver) -> None:
    with pytest.raises(ConfigError):
        supervise("", f"--webhook_url={receiver.url}").run(refuse)
    assert receiver.bodies[0]["exit_code"] == 78


@pytest.mark.parametrize(
    ("code", "header", "fault"),
    [(500, "", "webhook_url answered 500"), (302, "Location", "webhook_url answered 302")],
)
def test_webhook_that_fails_is_a_warning_and_is_not_followed(
    supervise: Supervise, receiver: Receiver, code: int, header: str, fault: str
) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        if header:
            handler.send_header(header, receiver.url)

    receiver.answer = answer
    run = supervise(WHOLE, f"--webhook_url={receiver.url}")
    assert run.run() == 0
    assert run.warned == [fault]
    assert len(receiver.bodies) == 1


def test_webhook_that_never_answers_is_given_up(
    supervise: Supervise, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcement, "WEBHOOK_SECONDS", 0.3)
    receiver.answer = lambda handler: (time.sleep(1.0), handler.send_response(204))[0]
    run = supervise(WHOLE, f"--webhook_url={receiver.url}")
    assert run.run() == 0
    (fault,) = run.warned
    assert fault in (
        "webhook_url was not called in time",
        "webhook_url was not called: TimeoutError",
    )


def test_address_that_nothing_listens_on_is_a_warning(
    supervise: Supervise, receiver: Receiver
) -> None:
    receiver.server.shutdown()
    receiver.server.server_close()
    run = supervise(WHOLE, f"--webhook_url={receiver.url}")
    assert run.run() == 0
    assert run.warned == ["webhook_url cannot be reached: Connection refused"]


def test_the_address_is_in_no_file_of_the_run(supervise: Supervise, receiver: Receiver) -> None:
    leak = f"echo {receiver.url}; echo {receiver.url.partition('/hook/')[2]} >&2"
    run = supervise(f"{leak}\n{WHOLE}", f"--webhook_url={receiver.url}", f"--on_end_command={leak}")
    run.run()
    for path in run.output_dir.rglob("*"):
        if path.is_file():
            assert b"T0PSECRETPATHSEGMENT" not in path.read_bytes(), path
    assert (
        "T0PSECRETPATHSEGMENT"
        not in (run.output_dir.parent / "order").read_text().split("secrets")[0]
    )
    resolved = json.loads((RunFolder(run.output_dir).resolved).read_text())
    assert resolved["monitoring"]["webhook_url"]["value"] == "***"
    assert (RunFolder(run.output_dir).events).is_file()


def test_an_address_that_is_none_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(None, {}, ["--webhook_url=hooks.example/T0PSECRET"])
    assert "webhook_url" in caught.value.block()
    assert "T0PSECRET" not in caught.value.block()


def test_a_config_file_names_no_command(tmp_path: Path) -> None:
    config = tmp_path / "c.json"
    config.write_text('{"on_end_command": "true"}')
    with pytest.raises(ConfigError, match="a config file cannot name on_end_command"):
        resolve(config, {}, [])
    by_variable = resolve(None, {"LORA_TRAINER_ON_END_COMMAND": "true"}, [])
    assert by_variable.config.monitoring.on_end_command == "true"
