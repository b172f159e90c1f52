"""A prefix that examples share is computed once, with the loss and gradients of all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lora_trainer.config.schema import LoraSection
from lora_trainer.data import prefixes
from lora_trainer.model import tree_attention
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.compat import MAJOR, enable_checkpointing
from lora_trainer.model.forward import CausalLM, MicroBatch
from lora_trainer.model.probe import verify, verify_sharing
from support.families import FAMILIES, VOCABULARY, tiny_model

# transformers 4.50 has this model's window in every layer, so that it is padded.
PACKED = [name for name in FAMILIES if MAJOR >= 5 or name != "qwen2-window"]


def micro_batch(seed=1) -> MicroBatch:
    """Return a system prompt, few-shot examples after it, an example that is a prefix of others."""
    random = np.random.Generator(np.random.PCG64(seed))
    system, shots = random.integers(3, VOCABULARY, 18), random.integers(3, VOCABULARY, 17)
    pieces = [(system, shots, 5), (9,), (system, 7), (system, shots, 0), (system, shots, 11)]
    ids = [
        np.concatenate([p if isinstance(p, np.ndarray) else random.integers(3, VOCABULARY, p)
                        for p in one])
        for one in pieces
    ]  # fmt: skip
    return MicroBatch(ids, [random.random(len(one)) < 0.6 for one in ids])


def causal_of(family="llama", *, dtype=torch.float64, has_checkpointing=False, **lora) -> CausalLM:
    model = add_adapter(tiny_model(family), LoraSection(lora_r=4, **lora), seed=1).to(dtype)
    torch.manual_seed(3)
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)  # B begins at 0, and A without a gradient
    if has_checkpointing:
        enable_checkpointing(model.get_base_model())
    causal = CausalLM(model, device="cpu", padding_free=True, chunk=16, precision="float32")
    if dtype == torch.float64:
        causal.leave_layers_alone()
    model.train()
    return causal


def loss_of(causal, batch):
    """Return the loss in the model's precision, which the head's kernels narrow to float32."""
    hidden, labels = causal._hidden(batch)
    return F.cross_entropy(causal.head(hidden), labels, reduction="sum")


def gradients(causal, loss):
    parameters = list(trainable_parameters(causal.model).values())
    return torch.autograd.grad(loss, parameters)


def results(causal, batches, is_shared):
    causal.shares_prefixes = is_shared
    loss = sum(loss_of(causal, batch) for batch in batches)
    return loss, gradients(causal, loss)


def assert_equal(ours, expected, tolerance=1e-6):
    """Compare in float64, but for norms, which these models compute in float32."""
    torch.testing.assert_close(ours[0], expected[0], rtol=tolerance, atol=0)
    for one, other in zip(ours[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("family", PACKED)
def test_loss_and_gradients_of_every_family_equal_those_of_examples_apart(family):
    causal, batch = causal_of(family), micro_batch()
    assert_equal(results(causal, [batch], True), results(causal, [batch], False))


def test_loss_and_gradients_equal_those_of_plain_transformers():
    causal, batch = causal_of(), micro_batch()
    ours = results(causal, [batch], True)
    causal.pad()
    # eager attention is not as exact: it computes softmax in float32.
    causal.inner.config._attn_implementation = "sdpa"
    expected = torch.zeros((), dtype=torch.float64)
    for ids, marks in zip(batch.ids, batch.loss_mask, strict=True):
        labels = torch.from_numpy(np.where(marks, ids, -100))[1:]
        logits = causal.model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1]
        expected = expected + F.cross_entropy(logits.double(), labels, reduction="sum")
    assert_equal(ours, (expected, gradients(causal, expected)))


def test_checkpointing_and_accumulation_change_nothing():
    batches = [micro_batch(), micro_batch(seed=2)]
    ours = results(causal_of(has_checkpointing=True), batches, True)
    assert_equal(ours, results(causal_of(), batches, False))


def test_fused_layers_compute_the_same():
    causal = causal_of(dtype=torch.float32)
    assert causal.has_fused_layers
    ours = results(causal, [micro_batch()], True)
    assert_equal(ours, results(causal, [micro_batch()], False), tolerance=1e-4)


def test_training_and_scoring_agree_with_examples_apart():
    causal, batch = causal_of(dtype=torch.float32), micro_batch()
    apart = causal.score(batch), float(causal.loss(batch).detach())
    causal.shares_prefixes = True
    assert causal.score(batch) == pytest.approx(apart[0], rel=1e-5)
    assert float(causal.loss(batch).detach()) == pytest.approx(apart[1], rel=1e-5)


def test_layers_see_each_prefix_once(monkeypatch):
    causal, batch = causal_of(), micro_batch()
    tokens = []
    causal.decoder.layers[0].register_forward_pre_hook(lambda _, x: tokens.append(x[0].shape[1]))
    results(causal, [batch], False)
    results(causal, [batch], True)
    assert tokens == [batch.tokens, batch.tokens - prefixes.saved_tokens(batch.ids)]
    assert tokens[1] == 18 + 17 + 5 + 9 + 7 + 11


def test_attention_runs_in_pytorchs_kernel_without_a_matrix_of_scores(monkeypatch):
    calls = []
    own = tree_attention._forward
    monkeypatch.setattr(
        tree_attention, "_forward", lambda *given: calls.append(given) or own(*given)
    )
    results(causal_of("llama"), [micro_batch()], True)
    layers, segments, continued = 2, 6, 2  # own tokens, and those before them
    assert len(calls) == layers * (segments + continued)


@pytest.mark.parametrize("family", PACKED)
def test_sharing_is_proven_on_every_family(family):
    causal = causal_of(family, dtype=torch.float32)
    assert verify(causal) == ""
    assert verify_sharing(causal) == ""
    assert causal.shares_prefixes
    assert causal.model.training


def test_sharing_that_differs_is_switched_off_and_says_so(monkeypatch):
    causal = causal_of(dtype=torch.float32)
    share = prefixes.share

    def forgets_the_prefix(examples):
        row = share(examples)
        apart = tuple(prefixes.Segment(s.start, s.stop, s.stop) for s in row.segments)
        return prefixes.SharedRow(apart, row.source, row.positions, row.row)

    monkeypatch.setattr(prefixes, "share", forgets_the_prefix)
    assert verify_sharing(causal).startswith("examples that share them differ by")
    assert not causal.shares_prefixes


def test_a_repeated_step_gives_the_same_bytes():
    causal = causal_of(dtype=torch.float32)
    torch.set_num_threads(2)
    try:
        one, other = (results(causal, [micro_batch()], True) for _ in range(2))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
