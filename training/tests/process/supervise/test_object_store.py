"""A run whose output is on S3: killed, its disk lost, resumed from there on an empty one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("moto", reason="the packages of requirements/s3fs-test.txt are not installed")
pytest.importorskip("s3fs", reason="the packages of requirements/s3fs-test.txt are not installed")

from lora_trainer.host.addresses import local_name
from support.s3_server import BUCKET, KEYS, SLOW_DOWN, S3Server, serving
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


def everything_below(folder: Path) -> str:
    return "".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())


@pytest.mark.timeout(900)
def test_run_goes_on_from_the_store_on_an_empty_disk_and_ends_with_the_same_bytes(
    server: S3Server, tmp_path: Path, undisturbed: Path
) -> None:
    trainer = StoreTrainer(tmp_path)
    trainer.server = server
    cache = tmp_path / "first-disk"
    local = cache / local_name(f"{ADDRESS}/mine")
    stored = {"output_dir": ADDRESS, "run_name": "mine"}
    # One request in seven is refused for load.
    server.fault = lambda _method, _path, number: SLOW_DOWN if number % 7 == 0 else None
    run = trainer.start(local, **stored, output_cache_dir=str(cache))
    run.wait_for(at_step(27))
    until_mirrored(server)
    run.kill()
    shutil.rmtree(cache)

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
    import time

    until = time.monotonic() + 120
    while not any(name.endswith("/manifest.json") for name in server.written()):
        assert time.monotonic() < until, server.written()
        time.sleep(0.02)


def assert_whole(server: S3Server) -> None:
    """Check what a reader of the bucket finds, and the order in which it came about."""
    import fsspec

    system = fsspec.filesystem(
        "s3",
        endpoint_url=server.url,
        key=KEYS["AWS_ACCESS_KEY_ID"],
        secret=KEYS["AWS_SECRET_ACCESS_KEY"],
        skip_instance_cache=True,
    )
    server.fault = lambda *_: None
    root = f"{BUCKET}/runs/mine"
    assert json.loads(system.cat_file(f"{root}/results.json"))["exit_code"] == 0
    names = {path.removeprefix(f"{root}/") for path in system.find(root)}
    assert {"DONE", "events.jsonl", "plan.json", "report.html", "final_model/SHA256SUMS"} <= names
    manifests = [name for name in names if name.endswith("/manifest.json")]
    assert 2 <= len(manifests) <= 3  # save_total_limit and the best one
    written = [name.removeprefix("runs/mine/") for name in server.written()]
    assert [name for name in written if name != ".lock"][-1] == "DONE"
