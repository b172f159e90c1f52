"""Models and datasets of the hub, from a stand-in for it: fetched, cached, refused in words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.hub_standin import ACCOUNT, HubStandin, Repo, folder_bytes
from support.tiny_model import write_model, write_rows

pytestmark = [pytest.mark.timeout(1200)]
SOURCE = Path(__file__).resolve().parents[2] / "src"
SECONDS = 240
SETTINGS: dict[str, Any] = {
    "dataset": "studio/rows",
    "preprocessing_num_workers": 1,
    "max_seq_length": 128,
    "lora_r": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "bf16": False,
    "report_to": [],
    "health_port": 0,
}
# One process answers all cases: importing torch and transformers takes 5 s each time.
ANSWER_CASES = """
import contextlib, io, json, os, sys
from lora_trainer.cli import main

ended = {}
for name, (arguments, variables) in json.load(sys.stdin).items():
    os.environ.update(variables)
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = main(arguments)
    ended[name] = (code, told.getvalue())
    for variable in variables:
        del os.environ[variable]
print(json.dumps(ended))
"""
OWN_CODE = b"import pathlib\npathlib.Path.home().joinpath('ran').touch()\n"


@dataclass(frozen=True)
class Ended:
    code: int
    text: str


class Studio:
    """A user's machine: a home, the hub's cache in it, and configs that name hub ids."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hub_variables: dict[str, str] = {}

    def config(self, name: str, **keys: Any) -> list[str]:
        path = self.root / f"{name}.json"
        path.write_text(json.dumps(SETTINGS | {"output_dir": str(self.root / name)} | keys))
        return ["--config", str(path)]

    def train(self, name: str, variables: dict[str, str], **keys: Any) -> Ended:
        command = ["-m", "lora_trainer", "train", *self.config(name, **keys)]
        done = self._python(command, variables)
        return Ended(done.returncode, done.stdout + done.stderr)

    def check(
        self, cases: dict[str, dict[str, Any]], variables: dict[str, str] | None = None
    ) -> dict[str, Ended]:
        """Run the check command on cases: config keys, and as TOKEN the token to have."""
        orders = {}
        for name, keys in cases.items():
            token = {"HF_TOKEN": keys.pop("TOKEN")} if "TOKEN" in keys else {}
            orders[name] = (["check", *self.config(name, **keys)], token)
        done = self._python(["-c", ANSWER_CASES], variables or {}, json.dumps(orders))
        assert done.returncode == 0, done.stderr
        return {name: Ended(*ended) for name, ended in json.loads(done.stdout).items()}

    def _python(
        self, arguments: list[str], variables: dict[str, str], typed: str = ""
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root),
            "HF_HOME": str(self.root / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(SOURCE),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment | self.hub_variables | variables,
            input=typed,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )

    def final(self, name: str, file: str) -> str:
        return (self.root / name / "final_model" / file).read_text()


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Studio:
    return Studio(tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="module")
def hub(studio) -> Iterator[HubStandin]:
    model = folder_bytes(write_model(studio.root / "model"))
    rows = {"train.jsonl": write_rows(studio.root / "rows.jsonl", 0, 16).read_bytes()}
    settings = json.loads(model["config.json"]) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    coded = model | {"config.json": json.dumps(settings).encode(), "own.py": OWN_CODE}
    pickled = {name: content for name, content in model.items() if name != "model.safetensors"}
    with HubStandin() as hub:
        hub.add(Repo("studio/tiny", model | {"README.md": b"---\nlicense: mit\n---\n"}))
        hub.add(Repo("studio/private", model, is_private=True))
        hub.add(Repo("studio/gated", model, is_gated=True))
        hub.add(Repo("studio/pickled", pickled | {"pytorch_model.bin": b"never read"}))
        hub.add(Repo("studio/coded", coded))
        hub.add(Repo("studio/rows", rows, "dataset"))
        hub.add(Repo("studio/private-rows", rows, "dataset", is_private=True))
        hub.add(Repo("studio/gated-rows", rows, "dataset", is_gated=True))
        studio.hub_variables = hub.environment
        yield hub


@pytest.fixture(scope="module")
def gone() -> dict[str, str]:
    """Return the variables that turn clients to a hub that does not answer."""
    with HubStandin() as closed:
        return closed.environment


@pytest.fixture(scope="module")
def trained(studio, hub) -> Ended:
    ended = studio.train("trained", {}, model_name_or_path="studio/tiny")
    assert ended.code == 0, ended.text
    return ended


@pytest.fixture(scope="module")
def trained_privately(studio, hub) -> Ended:
    token = {"HF_TOKEN": ACCOUNT}
    return studio.train("privately", token, model_name_or_path="studio/private")


@pytest.fixture(scope="module")
def refused(studio, hub) -> dict[str, Ended]:
    cases: dict[str, dict[str, Any]] = {
        "unknown": {"model_name_or_path": "studio/nothing"},
        "private": {"model_name_or_path": "studio/private"},
        "revision": {"model_name_or_path": "studio/tiny", "model_revision": "v9"},
        "pickled": {"model_name_or_path": "studio/pickled", "TOKEN": ACCOUNT},
        "coded": {"model_name_or_path": "studio/coded"},
        "expired": {"model_name_or_path": "studio/tiny", "TOKEN": "hf_expired"},
        "no rows": {"model_name_or_path": "studio/tiny", "dataset": "studio/no-gated-rows"},
        "gated rows": {"model_name_or_path": "studio/tiny", "dataset": "studio/gated-rows"},
    }
    return studio.check(cases)


def test_a_model_and_a_dataset_of_the_hub_are_fetched_and_trained_on(trained, hub):
    assert "2 steps" in trained.text
    assert "model.safetensors" in hub.downloads("studio/tiny")
    assert hub.downloads("studio/rows") == ["train.jsonl"]


@pytest.mark.usefixtures("trained")
def test_the_results_name_the_model_by_its_hub_id(studio):
    card = studio.final("trained", "README.md")
    assert "\nbase_model: studio/tiny\n" in card
    assert "\nlicense: mit\n" in card
    adapter = json.loads(studio.final("trained", "adapter_config.json"))
    assert adapter["base_model_name_or_path"] == "studio/tiny"


@pytest.mark.usefixtures("trained")
def test_the_card_names_the_dataset_by_its_hub_id(studio):
    assert "\ndatasets:\n- studio/rows\n" in studio.final("trained", "README.md")


@pytest.mark.usefixtures("trained")
def test_a_second_start_trains_offline_from_the_cache_to_the_same_losses(studio, gone, trained):
    ended = studio.train(
        "offline", gone | {"HF_HUB_OFFLINE": "1"}, model_name_or_path="studio/tiny"
    )
    assert ended.code == 0, ended.text
    losses = [re.findall(r"step \d/2, loss ([\d.]+)", one.text) for one in (trained, ended)]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]
    assert "base_model: studio/tiny" in studio.final("offline", "README.md")


def test_a_gated_model_ends_training_with_77_and_tells_to_accept_the_licence(studio, hub):
    ended = studio.train("gated", {"HF_TOKEN": ACCOUNT}, model_name_or_path="studio/gated")
    assert ended.code == 77
    assert "the base model is gated" in ended.text
    assert "open https://huggingface.co/studio/gated, accept the licence" in ended.text
    assert hub.downloads("studio/gated") == []


def test_a_private_model_is_trained_with_a_token_that_stands_nowhere_afterwards(
    studio, hub, trained_privately
):
    assert trained_privately.code == 0, trained_privately.text
    assert "model.safetensors" in hub.downloads("studio/private")
    assert ACCOUNT not in trained_privately.text
    files = [path for path in studio.root.rglob("*") if path.is_file()]
    assert {"train.log", "events.jsonl", "config.resolved.json"} <= {path.name for path in files}
    assert [path for path in files if ACCOUNT.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("case", "code", "words"),
    [
        ("unknown", 69, ["the hub has no such model", "check the spelling"]),
        ("private", 69, ["or it is private", "export HF_TOKEN"]),
        ("revision", 69, ["no such revision", "model_revision: v9"]),
        ("expired", 77, ["the hub rejected the token", "settings/tokens"]),
        ("pickled", 69, ["its weights are pickled (pytorch_model.bin)"]),
        ("coded", 78, ["custom Python code", "--trust_remote_code"]),
        ("no rows", 69, ["the hub has no such dataset", "check the id"]),
        ("gated rows", 77, ["the dataset is gated", "accept the terms"]),
    ],
)
def test_what_the_hub_does_not_give_is_refused_in_words(refused, case, code, words):
    ended = refused[case]
    assert ended.code == code, ended.text
    assert [word for word in words if word not in ended.text] == []


@pytest.mark.usefixtures("refused")
def test_pickled_weights_are_never_downloaded_nor_asked_to_be_converted(hub):
    asked = [one.path for one in hub.requests if "studio/pickled" in one.path]
    assert asked == ["/api/models/studio/pickled"]


@pytest.mark.usefixtures("refused")
def test_code_of_a_repository_is_neither_downloaded_nor_run(hub, studio):
    assert "config.json" in hub.downloads("studio/coded")
    assert "own.py" not in hub.downloads("studio/coded")
    assert not (studio.root / "ran").exists()


def test_a_private_dataset_opens_with_a_token_from_a_file(studio, hub):
    secret = studio.root.parent / "token"
    secret.write_text(f"{ACCOUNT}\n")
    keys = {"model_name_or_path": "studio/private", "dataset": "studio/private-rows"}
    ended = studio.check({"private rows": keys}, {"HF_TOKEN_FILE": str(secret)})["private rows"]
    assert ended.code == 0, ended.text
    assert ACCOUNT not in ended.text


@pytest.mark.usefixtures("trained", "trained_privately", "refused")
def test_nothing_but_the_hub_is_asked(hub):
    assert hub.strangers == []


@pytest.mark.usefixtures("trained")
def test_a_hub_that_does_not_answer_is_told_at_once_or_done_without(studio, gone):
    local = {"dataset": str(studio.root / "rows.jsonl")}
    begun = time.monotonic()
    ended = studio.check(
        {
            "never fetched": {"model_name_or_path": "studio/never"} | local,
            "fetched": {"model_name_or_path": "studio/tiny"} | local,
        },
        gone,
    )
    assert time.monotonic() - begun < 120  # not the minutes of a client that tries again
    assert ended["never fetched"].code == 69
    assert "the hub cannot be reached" in ended["never fetched"].text
    assert "why:    Connection refused" in ended["never fetched"].text
    assert "check the network or proxy" in ended["never fetched"].text
    assert ended["fetched"].code == 0, ended["fetched"].text


@pytest.mark.usefixtures("trained")
def test_offline_what_was_never_fetched_is_told_so(studio, gone):
    cases = {
        "model": {"model_name_or_path": "studio/never"},
        "rows": {"model_name_or_path": "studio/tiny", "dataset": "studio/never"},
    }
    ended = studio.check(cases, gone | {"HF_HUB_OFFLINE": "1"})
    assert [one.code for one in ended.values()] == [69, 69]
    assert "the base model is not in the hub's local cache" in ended["model"].text
    assert "the dataset is not in the hub's local cache" in ended["rows"].text
