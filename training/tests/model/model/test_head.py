"""The chunked loss has the value and the gradients of the plain one, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_trainer.model.head import Head, summed_loss, summed_loss_and_hits
from lora_trainer.model.live_bytes import LiveBytes

POSITIONS, WIDTH, VOCABULARY = 11, 5, 13


def make(multiplier=1.0, softcap=None, *, requires_grad=False):
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64).requires_grad_(requires_grad)
    hidden = torch.randn(POSITIONS, WIDTH, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(VOCABULARY, (POSITIONS,))
    return Head(linear, multiplier, softcap), hidden, labels


KINDS = [(1.0, None), (0.25, None), (1.0, 0.7), (3.0, 2.0)]


@pytest.mark.parametrize(("multiplier", "softcap"), KINDS)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_gradient_to_the_hidden_states_passes_gradcheck(multiplier, softcap, chunk):
    head, hidden, labels = make(multiplier, softcap)
    assert torch.autograd.gradcheck(lambda h: summed_loss(head, h, labels, chunk), (hidden,))


@pytest.mark.parametrize(("multiplier", "softcap"), KINDS)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_all_gradients_equal_those_of_float64_autograd(multiplier, softcap, chunk):
    head, hidden, labels = make(multiplier, softcap, requires_grad=True)
    parameters = [hidden, *head.linear.parameters()]
    ours = torch.autograd.grad(summed_loss(head, hidden, labels, chunk) * 0.37, parameters)
    plain = nn.functional.cross_entropy(head(hidden), labels, reduction="sum") * 0.37
    expected = torch.autograd.grad(plain, parameters)
    for gradient, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("multiplier", "softcap"), KINDS)
def test_float32_loss_and_gradient_have_every_bit_of_autograds(multiplier, softcap):
    torch.manual_seed(0)
    head = Head(nn.Linear(16, 1003).requires_grad_(False), multiplier, softcap)
    hidden = torch.randn(40, 16, requires_grad=True)
    labels = torch.randint(1003, (40,))
    ours = summed_loss(head, hidden, labels, 100, factor=0.37)
    plain = nn.functional.cross_entropy(head(hidden), labels, reduction="sum") * 0.37
    assert torch.equal(ours, plain)
    (gradient,) = torch.autograd.grad(ours, hidden)
    (expected,) = torch.autograd.grad(plain, hidden)
    assert torch.equal(gradient, expected)


def test_two_tensors_of_a_chunks_logits_are_in_memory_at_a_time():
    with torch.device("meta"):
        head = Head(nn.Linear(8, 4096, bias=False).requires_grad_(False))
        hidden = torch.zeros(192, 8, requires_grad=True)
        labels = torch.zeros(192, dtype=torch.long)
        with LiveBytes() as live:
            summed_loss(head, hidden, labels, 64)
    logits = 64 * 4096 * 4
    assert 2 * logits <= live.peak < 2.2 * logits


def test_a_frozen_head_gets_no_gradient():
    head, hidden, labels = make()
    summed_loss(head, hidden, labels, 4).backward()
    assert all(parameter.grad is None for parameter in head.linear.parameters())
    assert hidden.grad is not None


def test_scoring_counts_the_labels_that_are_most_likely():
    head, hidden, labels = make()
    loss, hits = summed_loss_and_hits(head, hidden, labels, 3)
    logits = head(hidden).detach()
    assert hits == int((logits.argmax(-1) == labels).sum())
    assert loss == pytest.approx(
        float(nn.functional.cross_entropy(logits, labels, reduction="sum")), rel=1e-6
    )


def test_no_position_at_all_makes_no_loss():
    head, hidden, labels = make()
    loss = summed_loss(head, hidden[:0], labels[:0], 4)
    loss.backward()
    assert float(loss.detach()) == 0
