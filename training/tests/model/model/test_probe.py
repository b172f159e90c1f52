"""Whatever goes wrong on the way of an architecture gives way to a slower one, or is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

from lora_trainer.config.schema import LoraSection
from lora_trainer.errors import ConfigError
from lora_trainer.model import attention
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.forward import CausalLM, MicroBatch
from lora_trainer.model.probe import check_unloaded, verify
from lora_trainer.model.samples import random_examples
from support.families import tiny_model

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def causal_of(model, *, padding_free=True) -> CausalLM:
    return CausalLM(model, device="cpu", padding_free=padding_free, chunk=7, precision="float32")


def bert(**own):
    torch.manual_seed(7)
    model = transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, **own)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the usual 0.02 makes all tokens alike
                parameter.mul_(6)
    return model.requires_grad_(False)


def raising(*_, **__):
    raise TypeError("'NoneType' object is not subscriptable")


def test_an_error_in_a_packed_trial_falls_back_to_padding(monkeypatch):
    monkeypatch.setattr(attention.PackedAttention, "__call__", raising)
    causal = causal_of(tiny_model("llama"))
    assert verify(causal) == (
        "padding is used: concatenated examples fail: "
        "TypeError: 'NoneType' object is not subscriptable"
    )
    assert causal.packed is None
    assert not causal.whole_why


def test_an_error_in_the_backward_pass_falls_back_too(monkeypatch):
    model = add_adapter(tiny_model("llama"), LoraSection(lora_r=4), seed=1)
    loss = CausalLM.loss

    def packed_fails(self, batch):
        if self.packed is not None and self.model.training:
            raise RuntimeError("no derivative")
        return loss(self, batch)

    monkeypatch.setattr(CausalLM, "loss", packed_fails)
    assert "fail in training: RuntimeError: no derivative" in verify(causal_of(model))


def test_the_trial_leaves_no_gradient_and_the_random_numbers_alone():
    model = add_adapter(tiny_model("llama"), LoraSection(lora_r=4, lora_dropout=0.5), seed=1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    verify(causal_of(model))
    assert torch.equal(torch.rand(3), expected)
    assert all(p.grad is None for p in trainable_parameters(model).values())


def test_a_head_of_more_than_one_layer_is_computed_by_the_models_own_forward():
    causal = causal_of(add_adapter(bert(is_decoder=True), LoraSection(lora_r=4), seed=1))
    causal.model.eval()
    assert "logits of every token are computed" in verify(causal)
    batch = random_examples(causal.inner)
    alone = sum(causal.score(MicroBatch([i], [m]))[0] for i, m in zip(*vars_of(batch), strict=True))
    assert causal.score(batch)[0] == pytest.approx(alone, rel=1e-5)
    assert float(causal.loss(batch).detach()) == pytest.approx(alone, rel=1e-5)


def vars_of(batch):
    return batch.ids, batch.loss_mask


def test_a_model_that_sees_later_tokens_is_refused():
    with pytest.raises(ConfigError, match="type bert are not supported") as caught:
        verify(causal_of(bert()))
    (problem,) = caught.value.problems
    assert "later tokens" in problem.why
    assert "docs/architectures.md" in problem.remedy


def test_padding_that_changes_the_result_gives_way_to_one_example_at_a_time(monkeypatch):
    causal = causal_of(tiny_model("llama"), padding_free=False)
    forward = causal.inner.forward

    def sees_padding(*, input_ids, attention_mask, **others):
        # As a layer does that mixes in a figure of the whole row.
        output = forward(input_ids=input_ids, attention_mask=attention_mask, **others)
        share = attention_mask.float().mean(dim=1)[:, None, None]
        return SimpleNamespace(logits=output.logits * share)

    causal.whole_why = "its decoder and head were not found"
    monkeypatch.setattr(causal.inner, "forward", sees_padding)
    assert verify(causal).startswith("examples are computed one at a time: padded examples differ")
    assert causal.is_one_by_one


def test_a_model_that_takes_no_text_alone_is_refused_before_weights_are_read(monkeypatch):
    with torch.device("meta"):
        model = tiny_model("llama")
    check_unloaded(model)

    def wants_an_image(**_):
        raise ValueError("pixel_values cannot be None")

    monkeypatch.setattr(model, "forward", wants_an_image)
    with pytest.raises(ConfigError, match="type llama are not supported") as caught:
        check_unloaded(model)
    assert "pixel_values cannot be None" in caught.value.problems[0].why


def test_what_the_meta_device_cannot_do_refuses_nothing(monkeypatch):
    with torch.device("meta"):
        model = tiny_model("llama")

    def reads_a_number(*, input_ids, **_):
        return int(input_ids.max())

    monkeypatch.setattr(model, "forward", reads_a_number)
    check_unloaded(model)


def test_memory_that_runs_out_is_no_fault_of_the_architecture(monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("out of memory")

    causal = causal_of(tiny_model("llama"))
    monkeypatch.setattr(CausalLM, "score", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        verify(causal)
