"""`bench/gpu.py` runs on the CPU, so that a GPU owner's run is not its first."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_trainer.run.events import StepDone

BENCH = Path(__file__).resolve().parents[3] / "bench"
# Not for good: there, the tests' own folder `gpu` would be found as this script.
PATH = list(sys.path)
sys.path.insert(0, str(BENCH))

from gpu_check import criteria, large, sections, synchronizations  # noqa: E402
from gpu_check import versions as any_section  # noqa: E402
from gpu_check.loading import HostMemory  # noqa: E402
from gpu_check.page import outcomes, page, read_results  # noqa: E402
from gpu_check.record import Record  # noqa: E402
from gpu_check.scale import FULL, QUICK  # noqa: E402

spec = importlib.util.spec_from_file_location("gpu_command", BENCH / "gpu.py")
assert spec is not None
assert spec.loader is not None
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)
sys.path[:] = PATH

pytestmark = pytest.mark.any_stack
ON_A_GPU_ALONE = {
    "attention": "4 segments, varlen",
    "synchronizations": "bfloat16",
    "lora_8b": "LoRA, 64 tokens, peak memory",
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu-check")
    done = subprocess.run(
        [sys.executable, BENCH / "gpu.py", "--quick", "--out", folder],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return done, {one["section"]: one for one in read_results(folder, list(sections.SECTIONS))}


def test_every_section_runs_on_a_cpu_and_meets_its_criteria(quick):
    done, results = quick
    failed = [row for one in results.values() for row in one["rows"] if row["outcome"] == "fail"]
    assert failed == []
    assert {name: one["ended"] for name, one in results.items()} == dict.fromkeys(
        sections.SECTIONS, "finished"
    )
    assert all(one["rows"] for one in results.values())
    assert done.returncode == 0, done.stderr
    assert all(f"| {name} | " in done.stdout for name in sections.SECTIONS)


@pytest.mark.parametrize(("section", "name"), ON_A_GPU_ALONE.items())
def test_a_check_that_needs_a_gpu_says_so_on_a_cpu(quick, section, name):
    rows = {row["name"]: row for row in quick[1][section]["rows"]}
    assert rows[name]["outcome"] == "not run"
    assert "GPU" in rows[name]["why"]


def test_the_limits_of_all_sections_fit_into_eight_minutes():
    assert sum(section.limit for section in sections.SECTIONS.values()) < 480


def hang(record, scale):
    record.measure("before", {"figure": 1})
    time.sleep(60)


def crash(record, scale):
    record.measure("before", {"figure": 1})
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("fault", "ended"), [(hang, "limit of 1 s"), (crash, "ended with -9")])
def test_a_section_that_hangs_or_crashes_keeps_its_rows(tmp_path, monkeypatch, fault, ended):
    section = sections.Section(1, "versions", "fault")
    monkeypatch.setattr(sections, "SECTIONS", {"faulty": section})
    monkeypatch.setattr(any_section, "fault", fault, raising=False)
    start = time.monotonic()
    sections.run_section("faulty", tmp_path, replace(QUICK, patience=1))
    assert time.monotonic() - start < 20
    [result] = read_results(tmp_path, ["faulty"])
    assert ended in result["ended"]
    assert [row["name"] for row in result["rows"]] == ["before"]
    assert outcomes([result])["fail"] == 1
    assert ended in page([result], command="", seconds=1)


def test_a_check_that_is_stopped_prints_what_it_has(tmp_path, monkeypatch, capsys):
    def run_section(name, folder, scale):
        if name == "precision":
            assert "| figure 1 |" in (tmp_path / "page.md").read_text()
            raise SystemExit(gpu.STOPPED)
        Record(folder / f"{name}.json", name).measure("early", {"figure": 1})
        return "finished"

    arguments = ["gpu.py", "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(gpu, "preload", lambda: None)
    monkeypatch.setattr(gpu, "run_section", run_section)
    for name in gpu.ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    with pytest.raises(SystemExit):
        gpu.main()
    assert "| versions | early | figure 1 |" in capsys.readouterr().out


def test_an_exception_fails_one_check_and_the_next_one_runs(tmp_path):
    record = Record(tmp_path / "one.json", "one")
    with record.attempt("first"):
        raise RuntimeError("CUDA out of memory")
    record.measure("second", {})
    rows = json.loads((tmp_path / "one.json").read_text())["rows"]
    assert [(row["name"], row["outcome"]) for row in rows] == [
        ("first", "fail"),
        ("second", "measured"),
    ]
    assert rows[0]["why"] == "RuntimeError: CUDA out of memory"


def test_synchronizations_are_counted_over_whole_steps(tmp_path, monkeypatch):
    mode = "default"

    def switch(to):
        nonlocal mode
        mode = to

    def train(emit, _state):
        for step in range(1, synchronizations.STEPS + 1):
            if mode == "warn":
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            zeros = {one.name: 0 for one in fields(StepDone) if one.name not in ("step", "time")}
            emit(StepDone(step=step, **zeros))

    session = SimpleNamespace(context=lambda emit, _should_stop: emit)
    monkeypatch.setattr(synchronizations, "open_small", lambda *_, **__: session)
    monkeypatch.setattr(synchronizations, "train", train)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", switch)
    places = synchronizations.count_places(tmp_path, "any", FULL)
    assert sum(places.values()) == 2 * synchronizations.COUNTED
    assert mode == "default"


def test_peak_memory_includes_what_cuda_takes_outside_of_pytorch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20e9, 80e9))
    for name, figure in {
        "memory_reserved": 58e9,
        "max_memory_reserved": 60e9,
        "max_memory_allocated": 55e9,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda figure=figure: figure)
    record = Record(tmp_path / "one.json", "one")
    large.judge_peak(record, FULL, "peak", 62_000_000_000)
    assert record.rows[0].figures["peak GB"] == 62
    assert record.rows[0].outcome == "pass"


def test_host_memory_that_was_given_back_is_seen():
    with HostMemory() as memory:
        held = bytearray(64 << 20)
        time.sleep(0.05)
        del held
    assert 60 << 20 < memory.growth < 100 << 20


@pytest.mark.parametrize(
    ("verdict", "is_met"),
    [
        (criteria.works(True, 8, 8), True),
        (criteria.works(True, 7, 8), False),
        (criteria.works(False, 8, 8), False),
        (criteria.same_bytes(["a", "a"]), True),
        (criteria.same_bytes(["a", "b"]), False),
        (criteria.few_synchronizations(2.0), True),
        (criteria.few_synchronizations(2.25), False),
        (criteria.peak_as_planned(85, 100), True),
        (criteria.peak_as_planned(84, 100), False),
        (criteria.peak_as_planned(110, 100), True),
        (criteria.peak_as_planned(111, 100), False),
        (criteria.as_segments(0.0039, 0.001), True),
        (criteria.as_segments(0.0040, 0.001), False),
        (criteria.as_segments(0.0059, 0.004), True),
        (criteria.as_segments(0.0061, 0.004), False),
        (criteria.within_one_shard(300 << 20, 256 << 20), True),
        (criteria.within_one_shard(330 << 20, 256 << 20), False),
    ],
)
def test_the_criteria_are_those_decided_beforehand(verdict, is_met):
    assert verdict.is_met == is_met
