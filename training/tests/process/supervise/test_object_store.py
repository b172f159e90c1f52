"""A run whose output is on S3: killed, its disk lost, resumed from there on an empty one."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("moto", reason="the packages of requirements/s3fs-test.txt are not installed")
pytest.importorskip("s3fs", reason="the packages of requirements/s3fs-test.txt are not installed")

from lora_trainer.host.addresses import local_name
from support.s3_server import BUCKET, KEYS, SLOW_DOWN, Answer, S3Server, serving
from support.same_bytes import assert_same_as
from support.trainer import Trainer, at_step, of_kind

pytestmark = pytest.mark.any_stack
ADDRESS = f"s3://{BUCKET}/runs"


class StoreTrainer(Trainer):
    """Runs the command line with the variables of a server."""

    server: S3Server

    def environment(self) -> dict[str, str]:
        return super().environment() | self.server.environment


@pytest.fixture
def server() -> Iterator[S3Server]:
    with serving() as server:
        yield server


def one_in_twenty(_method: str, _path: str, number: int) -> Answer | None:
    """Refuse one request in twenty for load."""
    return SLOW_DOWN if number % 20 == 0 else None


def everything_below(folder: Path) -> str:
    return "".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())


@pytest.mark.timeout(900)
def test_run_goes_on_from_the_store_on_an_empty_disk_and_ends_with_the_same_bytes(
    server: S3Server, tmp_path: Path
) -> None:
    trainer = StoreTrainer(tmp_path)
    trainer.server = server
    trainer.settings["max_steps"] = 20
    undisturbed = tmp_path / "undisturbed"
    assert trainer.train(undisturbed).code == 0
    cache = tmp_path / "first-disk"
    local = cache / local_name(f"{ADDRESS}/mine")
    stored = {"output_dir": ADDRESS, "run_name": "mine"}
    server.fault = one_in_twenty
    run = trainer.start(local, **stored, output_cache_dir=str(cache))
    run.wait_for(at_step(12))
    until_mirrored(server)
    run.kill()
    shutil.rmtree(cache)
    # The lock of a killed run is taken over after 90 s (test_lease.py).
    store_of(server).rm_file(f"{BUCKET}/runs/mine/.lock")
    server.fault = one_in_twenty

    other = tmp_path / "second-disk"
    local = other / local_name(f"{ADDRESS}/mine")
    ended = trainer.train(local, **stored, output_cache_dir=str(other))
    assert ended.code == 0, ended.err
    (resumed,) = of_kind(local, "resumed")
    assert resumed["step"] >= 5
    assert_same_as(undisturbed, local)
    assert_whole(server)
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in everything_below(other) + ended.out + ended.err


def until_mirrored(server: S3Server) -> None:
    until = time.monotonic() + 120
    while not any(name.endswith("/manifest.json") for name in server.written()):
        assert time.monotonic() < until, server.written()
        time.sleep(0.02)


def store_of(server: S3Server) -> Any:
    """Return the file system of the server, which answers without faults from now on."""
    import fsspec

    server.fault = lambda *_: None
    return fsspec.filesystem(
        "s3",
        endpoint_url=server.url,
        key=KEYS["AWS_ACCESS_KEY_ID"],
        secret=KEYS["AWS_SECRET_ACCESS_KEY"],
        skip_instance_cache=True,
    )


def assert_whole(server: S3Server) -> None:
    """Check what a reader of the bucket finds, and the order in which it came about."""
    system, root = store_of(server), f"{BUCKET}/runs/mine"
    assert json.loads(system.cat_file(f"{root}/results.json"))["exit_code"] == 0
    names = {path.removeprefix(f"{root}/") for path in system.find(root)}
    assert {"DONE", "events.jsonl", "plan.json", "report.html", "final_model/SHA256SUMS"} <= names
    manifests = [name for name in names if name.endswith("/manifest.json")]
    assert 2 <= len(manifests) <= 3  # save_total_limit and the best one
    written = [name.removeprefix("runs/mine/") for name in server.written()]
    assert [name for name in written if name != ".lock"][-1] == "DONE"
