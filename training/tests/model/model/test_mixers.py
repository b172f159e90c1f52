"""Recurrent mixers run one example at a time, while everything around them stays packed."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lora_trainer.config.schema import Config, LoraSection
from lora_trainer.memory_estimate import Work
from lora_trainer.model import mixers
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.backend import native_attention
from lora_trainer.model.compat import MAJOR, enable_checkpointing
from lora_trainer.model.footprint import Footprint
from lora_trainer.model.forward import CausalLM, MicroBatch
from lora_trainer.model.probe import verify, verify_sharing
from lora_trainer.model.samples import random_examples
from lora_trainer.train.dry_run import _unloaded
from support.architectures.tiny import tiny_model

IS_NEW = pytest.mark.skipif(MAJOR < 5, reason="not in transformers 4.50")


def causal_of(model_type: str) -> CausalLM:
    model, _ = tiny_model(model_type)
    model = add_adapter(model, LoraSection(lora_r=4), seed=3)
    torch.manual_seed(9)
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return CausalLM(model, device="cpu", padding_free=True, chunk=7, precision="float32")


def modules(causal: CausalLM, kind: str) -> list:
    return [module for module in causal.inner.modules() if type(module).__name__ == kind]


def gradients(causal: CausalLM, batches) -> list[torch.Tensor]:
    causal.model.zero_grad(set_to_none=True)
    for batch in batches:
        causal.loss(batch).backward()
    return [p.grad.clone() for p in trainable_parameters(causal.model).values()]


def one_by_one(batch: MicroBatch) -> list[MicroBatch]:
    return [MicroBatch([i], [m]) for i, m in zip(batch.ids, batch.loss_mask, strict=True)]


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_gradients_equal_those_of_one_example_at_a_time(is_checkpointed):
    causal = causal_of("bamba")
    reason = verify(causal)
    assert reason.startswith("one example at a time: BambaMixer: concatenated examples differ by")
    batch = random_examples(causal.inner)
    expected = gradients(causal, one_by_one(batch))
    if is_checkpointed:
        enable_checkpointing(causal.inner)
    causal.model.train()
    for ours, alone in zip(gradients(causal, [batch]), expected, strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4)


def test_all_but_the_mixers_compute_the_tokens_of_all_examples_at_once():
    causal = causal_of("bamba")
    verify(causal)
    seen: dict[str, list[int]] = {"in_proj": [], "feed_forward": []}
    for name, module in causal.inner.named_modules():
        if (last := name.rsplit(".", 1)[-1]) in seen:
            module.register_forward_hook(
                lambda _, inputs, __, last=last: seen[last].append(inputs[0].shape[1])
            )
    batch = random_examples(causal.inner)
    causal.score(batch)
    lengths = [len(ids) for ids in batch.ids]
    assert seen["in_proj"] and seen["in_proj"] == lengths * len(modules(causal, "BambaMixer"))
    assert set(seen["feed_forward"]) == {batch.tokens}


def test_generation_takes_mixers_as_they_are():
    causal = causal_of("bamba")
    rows = torch.arange(3, 17).view(2, 7)
    with causal.generating() as model, torch.no_grad():
        expected = model(input_ids=rows).logits
    verify(causal)
    assert causal.kinds_apart
    causal.score(random_examples(causal.inner))  # whose lengths stay set
    with causal.generating() as model, torch.no_grad():
        torch.testing.assert_close(model(input_ids=rows).logits, expected)


def test_a_wrong_result_gives_way_to_padding_and_every_module_is_its_own_again(monkeypatch):
    joined = mixers._joined
    monkeypatch.setattr(mixers, "_joined", lambda outputs, lengths: joined(outputs, lengths) * 2)
    causal = causal_of("bamba")
    assert verify(causal).startswith("padding is used: concatenated examples differ by")
    assert causal.packed is None and not causal.kinds_apart
    (mixer, *_) = modules(causal, "BambaMixer")
    assert "forward" not in vars(mixer)


@IS_NEW
def test_attention_that_convolves_its_queries_runs_alone_though_its_rotation_is_fused():
    causal = causal_of("zaya")
    assert "ZayaAttention" in verify(causal)
    batch = random_examples(causal.inner)
    alone = sum(causal.score(one)[0] for one in one_by_one(batch))
    assert causal.score(batch)[0] == pytest.approx(alone, rel=1e-5)
    causal.leave_layers_alone()
    assert causal.score(batch)[0] == pytest.approx(alone, rel=1e-5)


@IS_NEW
def test_queries_that_are_scaled_from_a_distant_token_on_are_scaled_in_each_example():
    causal = causal_of("llama4_text")
    assert "Llama4TextAttention" in verify(causal)
    (attention, *_) = modules(causal, "Llama4TextAttention")
    assert attention.floor_scale == 8192
    assert causal.inner.config.attention_chunk_size == 6  # of the tiny model, below the examples


@IS_NEW
@pytest.mark.parametrize("model_type", ["llama4_text", "qwen3_next"])
def test_prefixes_are_not_shared_where_attention_is_not_ours_alone(model_type):
    causal = causal_of(model_type)
    verify(causal)
    assert causal.packed is not None
    assert "examples that share them" in verify_sharing(causal)
    assert not causal.shares_prefixes


def test_memory_of_mixers_is_counted_for_one_example_at_a_time():
    _, base_config = tiny_model("mamba2" if MAJOR >= 5 else "bamba")
    causal = causal_of(base_config.model_type)
    verify(causal)
    assert causal.kinds_apart
    config = Config()
    work = Work((48, 32, 20, 30, 10, 11, 12), 48)
    counted = []
    for kinds in (frozenset(), causal.kinds_apart):
        footprint = Footprint(
            config, base_config, partial(_unloaded, config), device="cpu", precision="float32",
            attention=native_attention(base_config), padding_free=True, kinds_apart=kinds,
        )  # fmt: skip
        counted.append(footprint(work))
        assert not footprint.faults
    # Each example fills up the chunks of a mixer; all at once may take more work in each chunk.
    assert counted[1] != counted[0]


def test_arguments_are_split_where_they_are_about_tokens():
    hidden, positions = torch.arange(10.0).view(1, 5, 2), torch.arange(5)[None]
    mask = torch.arange(25).view(1, 1, 5, 5)
    first, second = mixers._split(((hidden, None), {"at": positions, "mask": mask}), [2, 3])
    assert torch.equal(second[0][0], hidden[:, 2:]) and second[0][1] is None
    assert torch.equal(first[1]["at"], positions[:, :2])
    assert torch.equal(second[1]["mask"], mask[..., 2:, 2:])


def test_a_state_is_that_of_the_last_example():
    outputs = [(torch.ones(1, n, 2), torch.full((1, 8, 8), n)) for n in (2, 3)]
    hidden, state = mixers._joined(outputs, [2, 3])
    assert hidden.shape == (1, 5, 2) and int(state.max()) == 3
