"""No secret gets past: wherever it was set, however it is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import quote

import pytest

from lora_trainer.events import Failed, PhaseChanged, StepDone, Warned
from lora_trainer.logfile import LONGEST_LINE_BYTES, copy, open_log
from lora_trainer.redaction import Redaction

CANARY = "canary+/secret=0123"


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path)}


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "aws_secret_access", "DB_PASSWORD", "PGPASSWD", "MY_CREDENTIALS"],
)
def test_value_of_a_variable_whose_name_says_secret_is_struck(name, home):
    redaction = Redaction.of(home | {name: CANARY})
    assert redaction.text(f"login with {CANARY}.") == "login with ***."


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "falsehood"),
        ("SECRET_SHORT", "false"),
        ("HF_TOKEN_FILE", "/run/secrets"),
        ("PATH", "ordinary"),
    ],
)
def test_what_is_no_secret_stays_readable(name, value, home):
    assert Redaction.of(home | {name: value}).text(f"it is {value}") == f"it is {value}"


@pytest.mark.parametrize(
    "written",
    [
        CANARY,
        json.dumps({"x": CANARY}),
        quote(CANARY, safe=""),
        f"https://host/?k={quote(CANARY)}",
        repr(CANARY),
    ],
)
def test_secret_is_struck_in_every_spelling(written):
    struck = Redaction([CANARY]).text(written)
    assert "canary" not in struck
    assert "***" in struck


def test_each_line_of_a_key_is_struck():
    key = "-----BEGIN KEY-----\nMIIEvAIBADANBg\nkqhkiG9w0BAQEF\n-----END KEY-----\n"
    struck = Redaction([key]).text("loaded kqhkiG9w0BAQEF and MIIEvAIBADANBg")
    assert struck == "loaded *** and ***"


def test_what_tools_have_stored_is_struck(home, tmp_path):
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "token").write_text("stored-by-login\n")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password netrc-canary\n")
    (tmp_path / "mounted").write_text("mounted-canary\n")
    redaction = Redaction.of(home | {"WANDB_API_KEY_FILE": str(tmp_path / "mounted")})
    text = redaction.text("stored-by-login netrc-canary mounted-canary")
    assert text == "*** *** ***"


@pytest.mark.parametrize(
    ("text", "struck"),
    [
        ("hf_" + "a1B2" * 8, "***"),
        ("Authorization: Bearer abcdefghijklmnop1234", "Authorization: Bearer ***"),
        ("https://me:hunter2@proxy:3128/x", "https://***@proxy:3128/x"),
        ("http://127.0.0.1:8080/a@b", "http://127.0.0.1:8080/a@b"),
    ],
)
def test_tokens_of_a_known_shape_are_struck_wherever_they_come_from(text, struck):
    assert Redaction().text(text) == struck


def test_events_lose_secrets_and_keep_everything_else():
    redaction = Redaction([CANARY, "training"])
    failed = Failed(time=1.0, exit_code=69, problems=[{"what": f"401 for {CANARY}", "why": "no"}])
    assert redaction.event(failed).problems == [{"what": "401 for ***", "why": "no"}]
    assert redaction.event(PhaseChanged(phase="training", detail="training")).phase == "training"
    warned = Warned(message="nothing in here")
    assert redaction.event(warned) is warned


def test_event_with_a_loss_that_is_no_number_is_left_as_it_is():
    step = StepDone(
        step=1, epoch=0.1, loss=float("nan"), learning_rate=0.1, grad_norm=1.0, step_seconds=1.0,
        tokens=1, trained_tokens=1, tokens_seen=1, memory_bytes=1,
    )  # fmt: skip
    redacted = Redaction(["whatever"]).event(step)
    assert redacted.to_line() == step.to_line()


def copied(tmp_path: Path, parts: list[bytes], redaction: Redaction) -> bytes:
    reading, writing = os.pipe()
    with (tmp_path / "log").open("wb") as log:
        thread = threading.Thread(target=copy, args=(reading, log.fileno(), redaction))
        thread.start()
        for part in parts:
            os.write(writing, part)
        os.close(writing)
        thread.join(30)
        os.close(reading)
    return (tmp_path / "log").read_bytes()


def test_secret_written_in_two_halves_is_struck_from_the_log(tmp_path):
    half = len(CANARY) // 2
    parts = [b"a " + CANARY[:half].encode(), CANARY[half:].encode() + b" b\nlast line \xff"]
    assert copied(tmp_path, parts, Redaction([CANARY])) == b"a *** b\nlast line \xff"


def test_secret_across_the_cut_of_an_endless_line_is_struck(tmp_path):
    fill = b"x" * 65_000
    parts = [fill] * (LONGEST_LINE_BYTES // len(fill) - 1)
    redaction = Redaction([CANARY])
    for shift in range(0, 130_000, 13_001):
        line = [*parts, b"y" * shift, CANARY.encode(), *parts]
        log = copied(tmp_path, line, redaction)
        assert b"canary" not in log
        assert b"***" in log


def test_log_goes_on_after_the_process_that_opened_it_was_stopped(tmp_path):
    # What the worker prints while the supervisor is stopped must not block the worker.
    path = tmp_path / "train.log"
    with open_log(path, Redaction([CANARY])) as log:
        done = subprocess.run(
            [sys.executable, "-c", f"print('{CANARY}'); print('x' * 300_000)"],
            stdout=log, check=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0
    text = path.read_text()
    assert text.startswith("***\nxxx")
    assert len(text) == 4 + 300_001


def test_log_on_a_full_disk_loses_lines_and_blocks_nobody():
    with open_log(Path("/dev/full"), Redaction()) as log:
        assert os.write(log, b"a line\n" * 9000) == 63_000
        assert os.write(log, b"a line\n" * 9000) == 63_000
