"""Several processes train what one trains: the same losses, the same adapter, one decision."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
from hypothesis import given
from hypothesis import strategies as st

from lora_trainer.model.ranks import (
    PeerLostError,
    Ranks,
    deal_pieces,
    is_peer_lost,
    own_batches,
    seed_of,
)
from lora_trainer.run.memory_limits import MemoryLimits
from support import ranks_at_work
from support.extras import needs_deepspeed
from support.families import tiny_model
from support.forked import together
from support.quantized import needs_bitsandbytes


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that trains in one process, once for each settings."""
    results: dict[str, Any] = {}

    def train(own: dict[str, Any]) -> Any:
        if (key := str(own)) not in results:
            folder = tmp_path_factory.mktemp("alone") / "run"
            (results[key],) = together(1, folder, ranks_at_work.trained, folder, "none", own)
        return results[key]

    return train


CASES = [
    (2, "ddp", {}),
    (4, "ddp", {}),
    (2, "fsdp", {}),
    (4, "fsdp", {}),
    (2, "fsdp", {"has_checkpointing": True}),
    (2, "fsdp", {"family": "llama-tied"}),
    (2, "fsdp", {"use_dora": True}),
    (2, "fsdp", {"is_gathered": True}),
    (4, "fsdp", {"is_gathered": True, "family": "gemma2"}),
    (2, "fsdp", {"is_gathered": True, "has_checkpointing": True, "dropout": 0.2}),
    pytest.param(2, "fsdp", {"bits": 4}, marks=needs_bitsandbytes),
    pytest.param(2, "fsdp", {"bits": 4, "has_checkpointing": True}, marks=needs_bitsandbytes),
    pytest.param(2, "fsdp", {"bits": 8}, marks=needs_bitsandbytes),
    pytest.param(2, "fsdp", {"bits": 4, "optim": "adamw_8bit"}, marks=needs_bitsandbytes),
    pytest.param(2, "ddp", {"bits": 4}, marks=needs_bitsandbytes),
    (2, "ddp", {"dropout": 0.2}),
    (2, "ddp", {"family": "mixtral"}),
    (3, "ddp", {"max_tokens_per_micro_batch": 25}),
    (4, "fsdp", {"max_tokens_per_micro_batch": 25}),
    (2, "fsdp", {"max_tokens_per_micro_batch": 1000, "is_gathered": True}),
    (2, "fsdp", {"family": "mixtral", "has_checkpointing": True}),
    (2, "fsdp", {"family": "mixtral", "is_gathered": True}),
    pytest.param(2, "deepspeed", {}, marks=needs_deepspeed),
    pytest.param(2, "deepspeed", {"family": "llama-tied"}, marks=needs_deepspeed),
    pytest.param(
        4,
        "deepspeed",
        {"family": "gemma2", "has_checkpointing": True, "dropout": 0.2},
        marks=needs_deepspeed,
    ),
    pytest.param(
        2, "deepspeed", {"dtype": "bfloat16", "has_checkpointing": True}, marks=needs_deepspeed
    ),
    pytest.param(2, "deepspeed", {"dtype": "float16"}, marks=needs_deepspeed),
    pytest.param(1, "deepspeed", {"offload_param_device": "cpu"}, marks=needs_deepspeed),
]


@pytest.mark.parametrize(("count", "parallelism", "own"), CASES, ids=str)
def test_ranks_train_what_one_process_trains(
    alone: Any, tmp_path: Path, count: int, parallelism: str, own: dict[str, Any]
) -> None:
    expected = alone(own)
    results = together(
        count, tmp_path / "run", ranks_at_work.trained, tmp_path / "run", parallelism, own
    )
    # DeepSpeed's projections are not fused, and round what one process adds in place.
    rounding = {"bfloat16": 5e-3, "float16": 1e-3}
    is_rounded = parallelism == "deepspeed" and "dtype" in own
    tolerance = rounding[own["dtype"]] if is_rounded else 1e-4
    assert results[0]["losses"] == pytest.approx(expected["losses"], abs=tolerance)
    assert len(results[0]["losses"]) == 12
    assert results[0]["evals"] == pytest.approx(expected["evals"], abs=tolerance)
    for name, tensor in results[0]["adapter"].items():
        torch.testing.assert_close(
            tensor, expected["adapter"][name], atol=1e-2 if is_rounded else 1e-4, rtol=0
        )
        for other in results[1:]:
            assert torch.equal(tensor, other["adapter"][name])


@pytest.mark.parametrize(
    "parallelism",
    [
        pytest.param(
            "fsdp",
            marks=pytest.mark.skipif(
                not hasattr(torch.distributed.fsdp, "fully_shard"),
                reason="fully_shard came with torch 2.6: model/gather.py shares the layers out",
            ),
        ),
        pytest.param("deepspeed", marks=needs_deepspeed),
    ],
)
def test_sharded_ranks_hold_a_part_of_the_layers_each(
    alone: Any, tmp_path: Path, parallelism: str
) -> None:
    own = {"max_steps": 1}
    folder = tmp_path / "run"
    results = together(2, folder, ranks_at_work.trained, folder, parallelism, own)
    assert [one["held"] for one in results] == [alone(own)["held"] / 2] * 2


def test_gathered_layer_is_whole_while_it_computes_and_in_parts_otherwise(tmp_path: Path) -> None:
    first, other = together(2, tmp_path / "run", ranks_at_work.gathered)
    layers = tiny_model("llama").model.layers
    assert first["kept"] == other["kept"] == sum(p.nbytes for p in layers.parameters()) / 2
    assert set(first["released"]) == {0}
    assert first["seen"] == other["seen"] == [True, True]


def test_every_rank_is_measured_and_the_slowest_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first, other = together(2, folder, ranks_at_work.trained, folder, "ddp", {"max_steps": 3})
    assert [[one["rank"] for one in step] for step in first["ranks"]] == [[0, 1]] * 3
    for step, slowest in zip(first["ranks"], first["slowest"], strict=True):
        assert step[slowest]["seconds"] == max(one["seconds"] for one in step)
        assert all(one["memory_bytes"] > 50 << 20 for one in step)
        assert all(one["tokens_per_second"] > 0 for one in step)
    assert first["ranks"] == other["ranks"]


def test_signal_that_reaches_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first, other = together(2, folder, ranks_at_work.stopped, folder)
    assert first == other
    assert 0 < first < 12
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{first:06d}"]


def test_rank_whose_peer_has_gone_says_so_instead_of_waiting(tmp_path: Path) -> None:
    assert together(2, tmp_path / "run", ranks_at_work.left_alone)[0] == "lost"


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (PeerLostError("gone"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (RuntimeError("NCCL error: remote process exited, ncclRemoteError"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("NCCL error: unhandled cuda error"), False),
        (torch.cuda.OutOfMemoryError("in a gather: Connection closed"), False),
        (ValueError("Connection closed"), False),
    ],
    ids=str,
)
def test_only_a_peer_that_is_gone_is_no_fault_of_this_rank(error: Exception, is_lost: bool) -> None:
    assert is_peer_lost(error) is is_lost


def test_rank_0_goes_first_and_all_take_their_turn(tmp_path: Path) -> None:
    together(3, tmp_path / "run", ranks_at_work.turns, tmp_path)
    assert (tmp_path / "first").read_text()[0] == "0"
    assert (tmp_path / "turn").read_text() == "012"


def test_parameter_without_a_gradient_on_any_rank_keeps_none(tmp_path: Path) -> None:
    assert together(2, tmp_path / "run", ranks_at_work.untouched) == [[True, False]] * 2


@given(st.lists(st.integers(1, 1000), max_size=30), st.integers(1, 9))
def test_every_piece_is_shared_out_once_and_no_rank_has_more_than_its_part(
    sizes: list[int], count: int
) -> None:
    dealt = deal_pieces(sizes, count)
    assert sorted(piece for share in dealt for piece in share) == list(range(len(sizes)))
    assert max(map(len, dealt)) <= -(-len(sizes) // count)
    assert all(share == sorted(share) for share in dealt)


def test_the_largest_pieces_go_to_different_ranks() -> None:
    assert deal_pieces([9, 1, 8, 2], 2) == [[0, 1], [2, 3]]


def test_one_process_takes_all_micro_batches_in_their_order() -> None:
    assert own_batches([3, 1, 2], Ranks(), is_sharded=True) == [(0, 1.0), (1, 1.0), (2, 1.0)]


def test_sharded_rank_without_work_goes_along_with_weight_nought() -> None:
    assert own_batches([5], Ranks(1, 2), is_sharded=True) == [(0, 0.0)]
    assert own_batches([5], Ranks(1, 2), is_sharded=False) == []


def test_dropout_has_another_seed_at_each_place_of_a_run() -> None:
    positions = [(seed, step, index) for seed in (0, 1) for step in range(3) for index in range(3)]
    assert len({seed_of(*position) for position in positions}) == len(positions)


def test_rank_that_runs_out_of_memory_makes_all_ranks_agree_on_less(
    alone: Any, tmp_path: Path
) -> None:
    expected, own = alone({}), {"per_device_eval_batch_size": 3}
    results = together(2, tmp_path / "run", ranks_at_work.short_of_memory, tmp_path / "run", own)
    first, last = results
    assert first["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert first["evals"] == pytest.approx(expected["evals"], abs=1e-5)
    for name, tensor in expected["adapter"].items():
        for one in results:
            torch.testing.assert_close(one["adapter"][name], tensor, atol=1e-5, rtol=0)
    # Once in the first evaluation and once in the first step, on the rank that is short alone.
    assert (first["failed"], last["failed"]) == ([], [3, 2])
    # Rank 0 speaks and keeps, the sizes are the same on both.
    assert first["kept"][-1] == asdict(MemoryLimits(1, 1, False))
    assert first["reduced"] == [2, 1]
    assert (last["kept"], last["reduced"]) == ([], [])
