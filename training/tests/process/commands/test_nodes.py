"""`train --nnodes`: the agent here is a shell script; `test_torchrun.py` has PyTorch's."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from lora_trainer.commands.node_options import with_processes
from lora_trainer.commands.nodes import Node, run_node, run_process
from lora_trainer.config.settings import resolve
from lora_trainer.errors import ConfigError, StoppedError, UnavailableError
from lora_trainer.host.environment import EXIT_CODES

pytestmark = pytest.mark.any_stack  # torch 2.1 is refused

# Starts a process that ends with a code; starts another as long as it is allowed to.
AGENT = """#!/bin/sh
echo "$@" > {folder}/arguments
echo started >> {folder}/starts
trap 'exit 1' TERM
for attempt in 0 1 2; do
  sh -c '{process}' &
  wait $!
  code=$?
  [ $code = 0 ] && exit 0
  echo started >> {folder}/starts
  for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep 0.1; done
done
exit 1
"""
LEAVES = "echo {code} > $LORA_TRAINER_EXIT_CODES/0; exit {code}"


def run_with(folder: Path, monkeypatch: pytest.MonkeyPatch, process: str) -> int:
    agent = folder / "agent"
    agent.write_text(AGENT.format(folder=folder, process=process))
    agent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(agent))
    settings = resolve(None, {}, ["--output_dir", str(folder / "out")])
    return run_node(Node("2", "4", 1, "host0:29500"), settings, None, ["--seed", "7"])


def test_the_agent_gets_torchruns_options_and_the_processes_those_of_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_with(tmp_path, monkeypatch, "exit 0") == 0
    arguments = (tmp_path / "arguments").read_text().split()
    agent, own = arguments[: arguments.index("lora_trainer")], arguments[-3:]
    assert agent[:2] == ["-m", "torch.distributed.run"]
    options = dict(zip(agent[2:-1:2], agent[3:-1:2], strict=True))
    del options["--log-dir"]
    assert options == {
        "--nnodes": "2",
        "--nproc-per-node": "4",
        "--node-rank": "1",
        "--master-addr": "host0",
        "--master-port": "29500",
        "--max-restarts": "3",
        "--monitor-interval": "1",
    }
    assert own == ["train", "--seed", "7"]


def test_nodes_without_numbers_meet_by_c10d() -> None:
    assert Node("2", "2", None, "host0:29500").options() == [
        *("--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "host0:29500", "--rdzv-id", "lora"),
    ]


@pytest.mark.parametrize("endpoint", ["", "host0", "host0:", ":29500", "host0:port"])
def test_an_endpoint_is_a_host_and_a_port(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="address to meet at"):
        Node("2", "1", 0, endpoint).options()


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (Node("two", "1", 0, "host0:29500"), "number of hosts"),
        (Node("1:4", "1", None, "host0:29500"), "torchrun --nnodes 1:4"),
        (Node("2", "some", 0, "host0:29500"), "number of processes"),
        (Node("2", "1", 2, "host0:29500"), "no such host"),
    ],
)
def test_numbers_that_make_no_sense_are_config_errors(node: Node, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        node.options()
    assert message in refused.value.block()


def test_several_nodes_are_refused_where_torch_lets_processes_wait_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.1.2+cu121")
    with pytest.raises(UnavailableError) as refused:
        run_with(tmp_path, monkeypatch, "exit 0")
    assert "leave out --nnodes" in refused.value.block()
    assert not (tmp_path / "starts").exists()


def test_only_a_single_node_takes_its_processes_as_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert with_processes(["--seed", "7"], "1", "4") == ["--nproc", "4", "--seed", "7"]
    assert with_processes(["--nproc=2"], "1", "4") == ["--nproc=2"]
    assert with_processes([], "2", "4") == []
    monkeypatch.setenv("RANK", "0")
    assert with_processes([], "1", "4") == []


@pytest.mark.parametrize("code", [65, 78])
def test_an_error_that_a_restart_would_repeat_ends_the_node_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    assert run_with(tmp_path, monkeypatch, LEAVES.format(code=code)) == code
    assert (tmp_path / "starts").read_text().count("started") == 2  # the agent, and one process


def test_a_stop_goes_to_the_processes_and_the_node_ends_with_143(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = f"touch {tmp_path}/saved; {LEAVES.format(code=143)}"
    process = f'trap "{saving}" TERM; touch {tmp_path}/ready; while :; do sleep 0.02; done'

    def stop() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=stop)
    thread.start()
    assert run_with(tmp_path, monkeypatch, process) == 143
    thread.join()
    assert (tmp_path / "saved").exists()


def test_the_processes_of_a_killed_agent_are_waited_for_and_give_their_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = f"sleep 0.6; kill -KILL $PPID; sleep 0.6; {LEAVES.format(code=143)}"
    assert run_with(tmp_path, monkeypatch, process) == 143


def test_a_process_whose_command_was_killed_ends_with_its_own_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EXIT_CODES, str(tmp_path / "removed"))
    assert run_process(lambda: 143) == 143


def test_a_stop_before_there_is_a_process_ends_the_node_with_143(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("lora_trainer.commands.nodes._processes", lambda _: [])
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(StoppedError):
        run_with(tmp_path, monkeypatch, f"touch {tmp_path}/started; sleep 1; exit 1")
    thread.join()


def test_a_process_that_was_stopped_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EXIT_CODES, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    assert run_process(lambda: 70) == 70  # which another start may avoid
    assert run_process(lambda: 143) == 143
    assert run_process(lambda: pytest.fail("it began")) == 143
