"""Launchers say by environment variables which process this is, and where all of them meet."""

from __future__ import annotations

import socket

import psutil
import pytest

from lora_trainer.commands import train
from lora_trainer.errors import UnavailableError
from lora_trainer.host import launcher
from lora_trainer.host.launcher import Launch, first_host, is_silent, network_of, read_launch

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "run",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2,1(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
}


def test_no_launcher_leaves_a_start_as_it_is():
    assert read_launch({}) is None
    assert read_launch({"RANK": "0"}) is None
    assert read_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}) is None


def test_torchrun_names_rank_host_and_store():
    expected = Launch(3, 4, 1, 2, "10.0.0.1", 29500, "torchrun", has_agent_store=True)
    assert read_launch(TORCHRUN) == expected
    assert expected.spans_hosts


def test_an_operator_that_sets_no_local_rank_starts_one_process_per_host():
    own = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    launch = read_launch(own)
    assert launch is not None
    assert (launch.local_rank, launch.local_count, launch.has_agent_store) == (0, 1, False)


def test_srun_names_rank_and_the_first_host():
    launch = read_launch(SRUN)
    assert launch == Launch(3, 4, 0, 1, "gpu07", launcher.FIRST_PORT + 9872, "srun")


def test_torchrun_under_srun_wins():
    assert read_launch(SRUN | TORCHRUN) == read_launch(TORCHRUN)


def test_a_master_of_the_users_choice_wins_over_slurms():
    launch = read_launch(SRUN | {"MASTER_ADDR": "login", "MASTER_PORT": "7"})
    assert launch is not None
    assert (launch.address, launch.port) == ("login", 7)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[3,5-7]", "n3"), ("n[03-07]-ib,m", "n03-ib"), ("", "")],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"RANK": "four"}, "RANK"),
        ({"RANK": "4"}, "WORLD_SIZE"),
        ({"LOCAL_RANK": "2"}, "LOCAL_WORLD_SIZE"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"MASTER_PORT": "99999"}, "99999"),
    ],
)
def test_variables_that_make_no_sense_are_named(changed, named):
    with pytest.raises(ValueError, match=named):
        read_launch(TORCHRUN | changed)


def test_one_process_per_host_speaks():
    assert is_silent(TORCHRUN)
    assert not is_silent(TORCHRUN | {"LOCAL_RANK": "0"})
    assert not is_silent(TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"})
    assert not is_silent({})
    assert not is_silent({"RANK": "x", "WORLD_SIZE": "2"})


def test_processes_of_one_host_stay_on_loopback():
    launch = Launch(0, 2, 0, 2, socket.gethostname(), 29500)
    assert network_of(launch) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def test_processes_of_several_hosts_use_the_interface_of_the_rendezvous():
    outside = {
        name: one.address
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if one.family == socket.AF_INET and name != "lo"
    }
    if not outside:
        pytest.skip("this machine has no network interface")
    name, address = next(iter(outside.items()))
    expected = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    assert network_of(Launch(0, 2, 0, 1, address, 29500)) == expected


def test_nodes_that_meet_on_loopback_stay_there():
    assert network_of(Launch(0, 2, 0, 1, "127.0.0.1", 29500)) == launcher.LOOPBACK


def test_a_host_that_knows_its_name_by_loopback_alone_leaves_the_choice_to_gloo(monkeypatch):
    answer = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.1.1", 1))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    assert network_of(Launch(0, 2, 0, 1, "host0", 29500)) == {}


def test_a_launcher_is_refused_where_torch_lets_processes_wait_forever() -> None:
    train.refuse_old_torch("2.13.0+cpu")
    with pytest.raises(UnavailableError, match="cannot be started by a launcher"):
        train.refuse_old_torch("2.1.2+cu121")
