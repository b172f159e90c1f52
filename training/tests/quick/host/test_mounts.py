"""Paths and addresses that a container prints are the host's."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from lora_trainer.cli import main
from lora_trainer.host.mounts import MOUNTS, on_host
from lora_trainer.report.console import Display

HOST = {
    "LORA_HOST_OUTPUTS": "../public/outputs",
    "LORA_HOST_DATASETS": "/data/sets",
    "LORA_HOST_CONFIG": "/home/me/run.json",
    "LORA_HOST_PORT": "8099",
}


@pytest.mark.parametrize(
    ("printed", "read"),
    [
        ("adapter: /workspace/outputs/final_model", "adapter: ../public/outputs/final_model"),
        ("/public/outputs/run, then", "../public/outputs/run, then"),
        ("in /workspace/outputs.", "in ../public/outputs."),
        ("/workspace/config.json:3: /a/b", "/home/me/run.json:3: /a/b"),
        ("du -sh /workspace/datasets/*", "du -sh /data/sets/*"),
        ("status: http://127.0.0.1:8080", "status: http://127.0.0.1:8099"),
        ("http://127.0.0.1:80801", "http://127.0.0.1:80801"),
        ("/workspace/outputs-2 /workspace/outputs.old /x/workspace/outputs", None),
        ("/workspace/models/x", None),  # not given
    ],
)
def test_paths_of_mounts_and_the_port_are_the_hosts(printed: str, read: str | None) -> None:
    assert on_host(printed, HOST) == (printed if read is None else read)
    assert on_host(printed, {}) == printed


def test_the_display_prints_the_hosts_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in HOST.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    with Display(stream) as display:
        display.print_line("status: http://127.0.0.1:8080, results: /workspace/outputs/run")
    assert "status: http://127.0.0.1:8099, results: ../public/outputs/run" in stream.getvalue()


def test_an_error_names_the_hosts_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"learning_rat": 1}))
    monkeypatch.setitem(MOUNTS, "LORA_HOST_CONFIG", (os.fspath(config),))
    monkeypatch.setenv("LORA_HOST_CONFIG", "/home/me/run.json")
    assert main(["check", "--config", os.fspath(config)]) == 78
    printed = capsys.readouterr().err
    assert "/home/me/run.json" in printed
    assert os.fspath(tmp_path) not in printed
