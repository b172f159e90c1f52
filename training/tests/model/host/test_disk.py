"""Every file of a result has the mode that the umask gives, whichever library wrote it."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_trainer import cli
from lora_trainer.data import fingerprint
from lora_trainer.host.disk import follow_umask
from support.run_folders import make_run


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[tuple[bool, int]]:
    paths = [folder, *folder.rglob("*")]
    return {(one.is_dir(), stat.S_IMODE(one.stat().st_mode)) for one in paths}


def test_modes_of_others_become_those_of_the_umask(umask: int, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    (folder / "inner").mkdir(parents=True, mode=0o700)
    (folder / "inner" / "weights").touch(mode=0o600)
    (folder / "outside").symlink_to(tmp_path / "outside")
    (tmp_path / "outside").touch(mode=0o600)
    follow_umask(folder)
    (folder / "outside").unlink()
    assert modes(folder) == {(True, 0o777 & ~umask), (False, 0o666 & ~umask)}
    assert stat.S_IMODE((tmp_path / "outside").stat().st_mode) == 0o600


def test_adapter_merged_model_and_caches_follow_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "SETTLED_SECONDS", -1.0)  # hashes of new files are kept too
    before = os.umask(0o022)
    try:
        run = make_run(tmp_path)
        shutil.rmtree(run / "final_model")
        assert cli.main(["export", str(run), str(tmp_path / "adapter")]) == 0
        run = Path(shutil.move(tmp_path / "adapter", run / "final_model"))
        assert cli.main(["merge", str(run), str(tmp_path / "merged")]) == 0
        rows = f"--dataset={tmp_path / 'held-out.jsonl'}"
        model = f"--model_name_or_path={tmp_path / 'model'}"
        cache = f"--dataset_cache_dir={tmp_path / 'rows'}"
        config = tmp_path / "config.json"
        config.write_text("{}")
        assert (
            cli.main(
                [
                    "check",
                    f"--config={config}",
                    model,
                    rows,
                    cache,
                    f"--output_dir={tmp_path / 'out'}",
                ]
            )
            == 0
        )
    finally:
        os.umask(before)
    for folder in (run, tmp_path / "merged", tmp_path / "rows"):
        assert modes(folder) <= {(True, 0o755), (False, 0o644)}, folder
