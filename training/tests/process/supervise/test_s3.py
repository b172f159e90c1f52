"""A server that speaks S3, and its faults, through fsspec and s3fs as they are installed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("moto", reason="the packages of requirements/s3fs-test.txt are not installed")
pytest.importorskip("s3fs", reason="the packages of requirements/s3fs-test.txt are not installed")

from aiohttp import ClientResponseError

from lora_trainer.checkpoint_folder import verify
from lora_trainer.data.read import iter_rows
from lora_trainer.data.resolve import SourceSpec
from lora_trainer.errors import AccessError, TrainerError, UnavailableError
from lora_trainer.remote import folder as remote_folder
from lora_trainer.remote import lease, mirror, restore
from lora_trainer.remote.faults import kind_of
from lora_trainer.remote.folder import RemoteFolder, check
from support import stores
from support.s3_server import BUCKET, EXPIRED, SLOW_DOWN, S3Server, serving

pytestmark = pytest.mark.any_stack
ADDRESS = f"s3://{BUCKET}/run"


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with serving() as server:
        yield server


@pytest.fixture
def server(
    running: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[S3Server]:
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(mirror, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(remote_folder, "FIRST_PAUSE_SECONDS", 0.01)
    running.fault = lambda *_: None
    folder = RemoteFolder(ADDRESS)
    for name in folder.listed():
        folder.remove(name)
    running.clear()
    yield running


def test_folder_that_works_is_checked_and_left_empty(server: S3Server) -> None:
    check(ADDRESS)
    assert RemoteFolder(ADDRESS).listed() == {}


def test_one_503_is_no_reason_to_refuse_a_start(server: S3Server) -> None:
    server.fault = lambda _method, _path, number: SLOW_DOWN if number < 3 else None
    check(ADDRESS)


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "refused"), (403, "refused"), (507, "full"), (503, "transient")]
)
def test_status_of_an_answer_says_whether_another_attempt_may_succeed(
    status: int, kind: str
) -> None:
    request: Any = None
    assert kind_of(ClientResponseError(request, (), status=status)) == kind


def test_expired_credentials_are_refused_with_77(server: S3Server) -> None:
    server.fault = lambda *_: EXPIRED
    with pytest.raises(AccessError) as caught:
        check(ADDRESS)
    assert "The provided token has expired" in caught.value.block()
    assert "aws sts get-caller-identity" in caught.value.block()


@pytest.mark.parametrize(
    ("address", "expected"),
    [("s3://no-such-bucket/run", "no such place"), (ADDRESS, "cannot be reached")],
)
def test_missing_bucket_and_unreachable_server_are_refused_with_69(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, address: str, expected: str
) -> None:
    seconds = 60.0
    if address == ADDRESS:
        seconds = 2.0
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setattr(remote_folder, "ANSWER_SECONDS", 1.0)
    with pytest.raises(UnavailableError, match=expected):
        remote_folder.answered(
            RemoteFolder(address), lambda: RemoteFolder(address).write("x", b""), seconds
        )


def test_lock_is_created_by_one_of_two(server: S3Server) -> None:
    assert RemoteFolder(ADDRESS).create(".lock", b"a")
    assert not RemoteFolder(ADDRESS).create(".lock", b"b")
    assert RemoteFolder(ADDRESS).read(".lock") == b"a"


def test_run_is_mirrored_through_faults_and_comes_back_whole(
    server: S3Server, tmp_path: Path
) -> None:
    # Cut-off uploads: the server answers that the body is not as long as was expected.
    cut_off = (
        "400 Bad Request",
        b"<Error><Code>IncompleteBody</Code><Message>cut</Message></Error>",
    )
    faults = {3: SLOW_DOWN, 4: SLOW_DOWN, 9: cut_off, 14: SLOW_DOWN, 15: cut_off, 21: SLOW_DOWN}
    server.fault = lambda _method, _path, number: faults.get(number)
    local = stores.new_run(tmp_path / "local")
    stores.add_checkpoint(local, 5)
    stores.finish(local)
    run = stores.Mirrored(ADDRESS, local)
    run.mirror.flush(60)
    run.end()
    written = [name.removeprefix("run/") for name in server.written()]
    assert [name for name in written if name != ".lock"][-1] == "DONE"
    other = tmp_path / "other"
    other.mkdir()
    assert restore.bring(RemoteFolder(ADDRESS), other) == []
    verify(other / "checkpoints" / "step-000005")
    assert (other / "DONE").exists()


def test_expired_credentials_lose_nothing_and_new_ones_go_on(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "LONGEST_PAUSE_SECONDS", 0.1)
    run = stores.Mirrored(ADDRESS, tmp_path / "local")
    run.mirror.flush(30)
    server.fault = lambda *_: EXPIRED
    stores.add_checkpoint(run.local, 5)
    until = time.monotonic() + 30
    while not (warning := run.mirror.warning()) and time.monotonic() < until:
        run.mirror.wake()
        time.sleep(0.01)
    assert "The provided token has expired" in warning
    with pytest.raises(TrainerError) as caught:
        run.mirror.flush(30)
    assert caught.value.exit_code == 77
    server.fault = lambda *_: None
    until = time.monotonic() + 30
    while run.folder.read("checkpoints/step-000005/manifest.json") is None:
        assert time.monotonic() < until
        time.sleep(0.05)
    run.end()


def test_dataset_on_s3_is_read(server: S3Server) -> None:
    RemoteFolder(f"s3://{BUCKET}/data").write(
        "train.jsonl", b'{"prompt": "a", "completion": "b"}\n' * 3
    )
    assert len(list(iter_rows(SourceSpec(f"s3://{BUCKET}/data")))) == 3
    assert len(list(iter_rows(SourceSpec(f"s3://{BUCKET}/data/train.jsonl")))) == 3
