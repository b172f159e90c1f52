"""Held-out figures and answers."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pytest
import torch

from lora_trainer.model.forward import CausalLM
from lora_trainer.train import evaluate
from support.byte_tokenizer import make_tokenizer
from support.families import tiny_model
from support.plain_peft import ListRows, make_rows


def tiny_causal():
    return CausalLM(
        tiny_model("llama"), device="cpu", padding_free=True, chunk=16, precision="float32"
    )


def test_the_score_is_the_mean_over_all_targets_whatever_the_batch():
    causal, rows = tiny_causal(), make_rows(9)
    scores = [evaluate.score(causal, rows, batch_examples=size) for size in (1, 4, 100)]
    assert [s.loss for s in scores] == pytest.approx([scores[0].loss] * 3, rel=1e-6)
    assert len({s.token_accuracy for s in scores}) == 1
    total = 0.0
    for ids, marks in rows:
        with causal.generating() as model:
            logits = model(input_ids=torch.as_tensor(ids)[None]).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits, torch.as_tensor(ids[1:]), reduction="none"
        )
        total += float(losses[torch.as_tensor(marks[1:])].sum())
    assert scores[0].loss == pytest.approx(total / scores[0].targets, rel=1e-5)


def test_scoring_leaves_the_random_generator_and_the_mode_alone():
    causal = tiny_causal()
    causal.model.train()
    before = torch.get_rng_state()
    evaluate.score(causal, make_rows(4), batch_examples=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert causal.model.training


def test_scoring_stops_when_asked():
    assert (
        evaluate.score(tiny_causal(), make_rows(4), batch_examples=1, should_stop=lambda: True)
        is None
    )


def test_a_perplexity_beyond_numbers_is_infinite():
    assert math.isinf(evaluate.Score(1000.0, 0, 1, 1).perplexity)


def test_questions_are_cut_before_the_last_answer():
    rows = ListRows(
        [
            (np.array([5, 6, 7, 8, 9, 4]), np.array([0, 1, 0, 1, 1, 0], dtype=bool)),
            (np.array([5, 6]), np.array([1, 1], dtype=bool)),
            (np.array([5, 6]), np.array([0, 0], dtype=bool)),
        ]
    )
    (question,) = evaluate.questions(rows)
    assert (question.index, question.prompt, question.expected) == (0, [5, 6, 7], [8, 9])


class Letters:
    """A tokenizer whose tokens are numbers; 2 ends an answer."""

    pad_token_id = 0
    eos_token_id = 2
    all_special_ids = (0, 1, 2)
    added_tokens_decoder: ClassVar[dict] = {}

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(i) for i in ids if i > 2 or not skip_special_tokens)


def test_answers_do_not_depend_on_the_batch_they_are_made_in():
    causal = tiny_causal()
    asked = [
        evaluate.Question(i, [int(t) for t in ids], [7, 2])
        for i, (ids, _) in enumerate(make_rows(6))
    ]
    one, many = (
        evaluate.answer(causal, Letters(), asked, ends=[2], batch_examples=size, max_new_tokens=5)
        for size in (1, 6)
    )
    assert one == many
    assert causal.packed is not None
    assert causal.inner.config._attn_implementation == "lora_trainer_packed"


def test_progress_is_heard_of_while_a_batch_is_answered(monkeypatch):
    monkeypatch.setattr(evaluate, "LISTEN_SECONDS", 0.0)
    causal, asked = tiny_causal(), evaluate.questions(make_rows(6))
    done, shares = [], []
    options = {"ends": [], "batch_examples": 4, "max_new_tokens": 5}
    answers = evaluate.answer(
        causal, Letters(), asked, progress=done.append, advance=shares.append, **options
    )
    assert answers == evaluate.answer(causal, Letters(), asked, **options)
    assert done[-1] == len(asked)
    assert done == sorted(done)
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(4 / 5 / len(asked))
    assert len(shares) == 10


def test_answers_that_have_ended_count_before_their_batch_is_done(monkeypatch):
    monkeypatch.setattr(evaluate, "LISTEN_SECONDS", 0.0)
    heard = []
    listener = evaluate._Listener(2, [7], lambda *figures: heard.append(figures))
    assert not listener(torch.tensor([[7, 7, 1], [7, 7, 7]]), None).any()
    assert not listener(torch.tensor([[7, 7, 1, 7], [7, 7, 7, 0]]), None).any()
    assert heard == [(1, 1), (2, 2)]


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere\nto?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_start|>user<|im_end|>\n\nWhere\nto?<|im_start|>assistant<|im_end|>\n\n",
        "<|im_start|> Where\nto? <|im_end|>",
        "Where\nto?",
    ],
)
def test_an_answer_names_the_turn_that_it_answers(prompt):
    tokenizer = make_tokenizer()
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    question = evaluate.Question(0, ids, ids[-1:])
    assert evaluate._decode(tokenizer, question, []).prompt == "Where\nto?"
