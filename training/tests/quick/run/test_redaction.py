"""No secret gets past: wherever it was set, however it is written."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from urllib.parse import quote

import pytest

from lora_trainer.host import streams
from lora_trainer.redaction import Redaction, given_secrets
from lora_trainer.report.console import Display
from lora_trainer.run.events import Failed, PhaseChanged, StepDone, Warned
from lora_trainer.supervise.log_filter import LONGEST_LINE_BYTES, copy
from support.redaction import CANARY


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
        ("https:/me:hunter2@proxy/x", "https:/***@proxy/x"),
        ("https://me:hun@ter2@proxy/x", "https://***@proxy/x"),
        ("https://:hunter2@proxy", "https://***@proxy"),
        ("https://atokenforuser@host/x", "https://***@host/x"),
        ("ssh://git@host/x", "ssh://git@host/x"),
        ("http://127.0.0.1:8080/a@b", "http://127.0.0.1:8080/a@b"),
        ("https://h/x?token=abc&n=1", "https://h/x?token=***&n=1"),
        ("https://h/x?n=1&access_token=a%20b&m=2", "https://h/x?n=1&access_token=***&m=2"),
        ("/x?X-Amz-Signature=ab&X-Amz-Date=1", "/x?X-Amz-Signature=***&X-Amz-Date=1"),
        ("https%3A%2F%2Fh%3Fapi_key%3Dabc%26n%3D1", "https%3A%2F%2Fh%3Fapi_key%3D***%26n%3D1"),
        ("https://h/#access_token=abc", "https://h/#access_token=***"),
        ("https://h/?monkey=1&tokenizer=2&keyword=3", "https://h/?monkey=1&tokenizer=2&keyword=3"),
        ("Authorization: Basic bWU6aHVudGVyMmh1bnRlcjI=", "Authorization: Basic ***"),
        ("github_pat_" + "a1" * 11, "***"),
        ("AKIA" + "A1" * 8, "***"),
    ],
)
def test_tokens_of_a_known_shape_are_struck_wherever_they_come_from(text, struck):
    assert Redaction().text(text) == struck


def test_keys_of_object_stores_are_struck_wherever_they_are_kept(home, tmp_path):
    aws, google = tmp_path / "aws", tmp_path / "google.json"
    aws.write_text("[default]\naws_access_key_id = AKIA-first\naws_secret_access_key=sea/cret+1\n")
    google.write_text(json.dumps({"type": "service_account", "private_key_id": "0123456789"}))
    redaction = Redaction.of(
        home
        | {
            "AWS_SHARED_CREDENTIALS_FILE": str(aws),
            "GOOGLE_APPLICATION_CREDENTIALS": str(google),
            "AZURE_STORAGE_CONNECTION_STRING": "AccountName=x;AccountKey=abcdefgh",
        }
    )
    text = "AKIA-first sea/cret+1 0123456789 AccountName=x;AccountKey=abcdefgh default"
    assert redaction.text(text) == "*** *** *** *** default"


def test_password_in_a_url_of_the_environment_is_struck_alone_too(home):
    redaction = Redaction.of(home | {"HTTPS_PROXY": f"http://me:{quote('hunter-2')}@proxy:1"})
    assert redaction.text("407 for me with hunter-2") == "407 for me with ***"


def test_secret_given_on_the_command_line_is_known():
    given = ["train", "--hf_token", "abc-def", "--api-key=ghi-jkl", "--max_new_tokens", "123456"]
    assert given_secrets(given) == ["abc-def", "ghi-jkl"]


def test_all_that_is_printed_is_struck(capsys):
    with streams.redacted(Redaction([CANARY])):
        print("printed", CANARY)
        sys.stdout.writelines([f"lines {CANARY}\n"])
        Display(None).print_line(f"noted {CANARY}")
        try:
            raise ValueError(CANARY)
        except ValueError:
            traceback.print_exc()
        assert not hasattr(sys.stdout, "buffer")
    printed = capsys.readouterr()
    assert "canary" not in printed.out + printed.err
    assert printed.out.startswith("printed ***\nlines ***\n")
    assert "ValueError: ***" in printed.err


def test_display_on_a_redacted_file_strikes_secrets(tmp_path):
    with (tmp_path / "log").open("w") as file:
        display = Display(streams.RedactedStream(file, Redaction(["canary-7"])))
        display.print_line("noted canary-7")
        display.close()
    assert "noted ***" in (tmp_path / "log").read_text()


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


def copied(tmp_path: Path, chunks: list[bytes], redaction: Redaction) -> bytes:
    reading, writing = os.pipe()
    with (tmp_path / "log").open("wb") as log:
        thread = threading.Thread(target=copy, args=(reading, log.fileno(), redaction))
        thread.start()
        for part in chunks:
            os.write(writing, part)
        os.close(writing)
        thread.join(30)
        os.close(reading)
    return (tmp_path / "log").read_bytes()


def test_secret_written_in_two_halves_is_struck_from_the_log(tmp_path):
    half = len(CANARY) // 2
    chunks = [b"a " + CANARY[:half].encode(), CANARY[half:].encode() + b" b\nlast line \xff"]
    assert copied(tmp_path, chunks, Redaction([CANARY])) == b"a *** b\nlast line \xff"


def test_secret_across_the_cut_of_an_endless_line_is_struck(tmp_path):
    fill = b"x" * 65_000
    chunks = [fill] * (LONGEST_LINE_BYTES // len(fill) - 1)
    redaction = Redaction([CANARY])
    for shift in range(0, 130_000, 13_001):
        line = [*chunks, b"y" * shift, CANARY.encode(), *chunks]
        log = copied(tmp_path, line, redaction)
        assert b"canary" not in log
        assert b"***" in log
