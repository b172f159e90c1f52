"""`lora-trainer health` reports what is wrong with a run, and what helps."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_trainer.cli import app
from lora_trainer.commands.health import Container, closing_block, look
from lora_trainer.errors import ConfigError

WELL = {
    "/health": (200, {"status": "healthy", "phase": "training"}),
    "/metrics": (200, {"current_step": 3, "total_steps": 9, "last_loss": 1.5}),
    "/status": (200, {}),
    "/history": (200, {}),
}
STALLED = {"status": "unhealthy", "reason": "no progress for 90 s", "remedy": "see train.log"}


@pytest.fixture
def answers() -> dict[str, tuple[int, dict[str, object]]]:
    return dict(WELL)


@pytest.fixture
def url(answers: dict[str, tuple[int, dict[str, object]]]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.headers.get("Authorization") in (None, "Bearer " + 16 * "t")
            code, body = answers[self.path] if is_known else (401, {})
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_answers_is_healthy_and_shows_the_step(url: str) -> None:
    done = CliRunner().invoke(app, ["health", "--url", url])
    assert done.exit_code == 0, done.output
    assert "step 3 of 9, loss 1.5" in done.output
    assert "nothing" not in done.output  # run.sh started none, yet one answers
    assert done.output.endswith("healthy\n")


def test_what_the_server_says_is_wrong_is_printed_with_its_remedy(url: str, answers) -> None:
    answers["/health"] = (503, STALLED)
    done = CliRunner().invoke(app, ["health", "--url", url, "--json"])
    assert done.exit_code == 1
    report = json.loads(done.output)
    assert report["problems"] == [{"what": "no progress for 90 s", "remedy": "see train.log"}]
    assert report["endpoints"] == {"/health": 503, "/metrics": 200, "/status": 200, "/history": 200}


def test_a_server_that_asks_for_a_token_gets_the_one_in_the_file(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    for token, problems in ((16 * "x", 4), (16 * "t", 0)):
        file.write_text(token)
        monkeypatch.setenv("HEALTH_TOKEN_FILE", str(file))
        assert len(look(tmp_path, url, [], "").problems) == problems


def test_nothing_that_answers_is_a_problem_with_a_remedy(tmp_path: Path) -> None:
    report = look(tmp_path, "http://127.0.0.1:9", [], "")
    assert [p.remedy for p in report.problems] == ["./training/run.sh starts one"]


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "https://127.0.0.1"])
def test_an_address_that_is_not_understood_is_a_usage_error(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        look(Path(), url, [], "")
    assert "http://HOST:PORT" in error.value.block()


def test_the_reason_of_a_failed_run_is_the_last_block_of_its_log() -> None:
    old = "an old fault\nexit code 70 (x)\n"
    last = "the disk is full\n  remedy: make room\nexit code 74 (disk)\n"
    log = f"step 3\n\n{old}\n{last}\nbye\n"
    assert closing_block(log) == ["the disk is full", "  remedy: make room", "exit code 74 (disk)"]
    assert closing_block("step 3\n\nstep 4\n") == []


@pytest.mark.parametrize(("status", "runs_in"), [("exited", "machine"), ("running", "container")])
def test_a_run_on_this_machine_is_newer_than_a_container_that_has_ended(
    status: str, runs_in: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_trainer.commands.health.own_address", lambda _: url)
    monkeypatch.setenv("HEALTH_PORT", "9")  # nobody else's run on this machine answers there
    (tmp_path / "events.jsonl").touch()
    container = Container("0123456789ab", "trainer", {"Status": status, "ExitCode": 78})
    assert look(tmp_path, "", [container], "").runs_in == runs_in
