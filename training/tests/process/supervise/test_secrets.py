"""Secrets planted in every way that users have are in no byte that a run leaves or prints."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from support.trainer import Ended, Run, Trainer

RUN_TOKEN = "canary-run-4711"  # also the run's name
SECRETS = {
    "environment": RUN_TOKEN,
    "config": "canary-config+/4711=",
    "command line": "canary-argument-4711",
    "netrc": "canary-netrc-4711",
    "stored by a login": "canary-stored-4711",
    "server": "canary-server-4711",
    "proxy": "canary-proxy-4711",
    "URL": "canary-url-4711",
    "query": "canary-query-4711",
}


class Secretive:
    """A trainer whose every start knows all of the secrets."""

    def __init__(self, trainer: Trainer, root: Path) -> None:
        self.trainer, self.root = trainer, root
        home = root / "home"
        (home / ".cache" / "huggingface").mkdir(parents=True)
        (home / ".netrc").write_text(f"machine h login u password {SECRETS['netrc']}\n")
        (home / ".cache" / "huggingface" / "token").write_text(SECRETS["stored by a login"])
        (home / "server-token").write_text(SECRETS["server"])
        (root / "logs").mkdir()
        self.environment = trainer.environment() | {
            "HOME": str(home),
            "HF_HOME": str(home / ".cache" / "huggingface"),
            "MY_SERVICE_TOKEN": RUN_TOKEN,
            "HTTPS_PROXY": f"http://me:{SECRETS['proxy']}@127.0.0.1:9",
            "LORA_TRAINER_LOG_DIR": str(root / "logs"),
        }

    def train(self, name: str, **changed: Any) -> Ended:
        """Train with --debug to the end."""
        changed = {"health_token_file": str(self.root / "home" / "server-token")} | changed
        changed |= {"hf_token": SECRETS["config"], "run_name": RUN_TOKEN}
        command = self.trainer.command(self.root / name, **changed)
        (self.trainer.root / f"{name}.json").rename(self.root / "home" / f"{name}.json")
        command[-1] = str(self.root / "home" / f"{name}.json")
        command += ["--debug", f"--hf_token={SECRETS['command line']}"]
        return Run(command, self.root / name, self.environment).wait()

    def leaks(self, ended: Ended) -> dict[str, list[str]]:
        """Return the kinds of secrets that were found, with where."""
        home = self.root / "home"
        inputs = {*home.glob("*"), home / ".cache" / "huggingface" / "token"}
        texts = {"stdout": ended.out.encode(), "stderr": ended.err.encode()} | {
            str(path.relative_to(self.root)): path.read_bytes()
            for path in self.root.rglob("*")
            if path.is_file() and path not in inputs
        }
        by_kind: dict[str, list[str]] = {}
        for kind, secret in SECRETS.items():
            for form in (secret, json.dumps(secret)[1:-1], secret.replace("+", "%2B")):
                where = [name for name, text in texts.items() if form.encode() in text]
                where += [name for name in texts if form in Path(name).name]
                if where:
                    by_kind.setdefault(kind, []).extend(where)
        return by_kind


@pytest.fixture
def secretive(trainer: Trainer, tmp_path: Path) -> Secretive:
    return Secretive(trainer, tmp_path)


def test_finished_run_leaves_no_secret(secretive: Secretive) -> None:
    report_to = ["tensorboard"]
    ended = secretive.train("done", max_steps=3, report_to=report_to, eval_generate=True)
    assert ended.code == 0, ended.err
    assert secretive.leaks(ended) == {}
    card = (secretive.root / "done" / RUN_TOKEN / "final_model" / "README.md").read_text()
    assert "# \\*\\*\\*\n" in card
    assert "output folder's name contains a secret" in ended.out
    assert "status: " in (secretive.root / "logs" / "***.log").read_text()


def test_run_that_the_checks_refuse_prints_no_secret(secretive: Secretive) -> None:
    address = f"https://me:{SECRETS['URL']}@host/rows.jsonl?access_token={SECRETS['query']}"
    ended = secretive.train("refused", dataset=[address, f"{address}&token={RUN_TOKEN}"])
    assert ended.code != 0
    assert "***" in ended.block
    assert "Traceback" in ended.err
    assert secretive.leaks(ended) == {}


def test_run_whose_worker_fails_leaves_no_secret(secretive: Secretive, tmp_path: Path) -> None:
    rows = tmp_path / "home" / "rows.jsonl"
    basic = base64.b64encode(f"me:{SECRETS['URL']}".encode()).decode()
    text = f"{RUN_TOKEN} https:/me:{SECRETS['URL']}@host Authorization: Basic {basic}"
    rows.write_text(json.dumps({"messages": text}) + "\n")
    ended = secretive.train("failed", dataset=str(rows))
    assert ended.code not in (0, 78), ended.err
    assert secretive.leaks(ended) == {}
    logs = [path.read_text() for path in secretive.root.rglob("train.log")]
    assert any("Traceback" in log for log in logs)
