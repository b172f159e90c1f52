"""A run whose rows begin with the same system prompt computes it once, and its plan says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_trainer.config.settings import resolve
from lora_trainer.run.events import StepDone
from lora_trainer.train.checkpoint import TrainState
from lora_trainer.train.loop import train
from lora_trainer.train.session import open_session
from support.tiny_model import write_model

PROMPT = "You answer in few words, and never with a question."


def session_of(folder: Path, *options: str, prompt: str = PROMPT):
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "system", "content": prompt},
                        {"role": "user", "content": f"What is {number} and {number}?"},
                        {"role": "assistant", "content": f"{2 * number}"},
                    ]
                }
            )
            + "\n"
            for number in range(8)
        )
    )
    arguments = [
        f"--model_name_or_path={write_model(folder / 'model')}",
        f"--dataset={rows}",
        f"--dataset_cache_dir={folder / 'cache'}",
        "--preprocessing_num_workers=1",
        "--per_device_train_batch_size=4",
        "--bf16=false",
        *(options or ["--lora_dropout=0"]),
    ]
    return open_session(resolve(None, {}, arguments).config, folder / "out", lambda _: None)


def test_the_plan_says_how_many_tokens_repeat_a_prefix(tmp_path):
    session = session_of(tmp_path)
    assert session.causal.shares_prefixes
    assert session.plan.shared_prefix.endswith(
        "of the first 2 steps repeat a prefix, which is computed once"
    )
    saved, tokens = (
        int(text.replace(",", ""))
        for text in session.plan.shared_prefix.split(" tokens")[0].split(" of ")
    )
    assert tokens == sum(session.splits.train.lengths)
    assert 6 * len(PROMPT) < saved < tokens  # a token is a byte; two micro-batches compute it once


def test_losses_are_those_of_a_run_that_shares_nothing(tmp_path):
    losses = []
    for is_shared, value in ((True, "auto"), (False, "false")):
        options = (f"--share_prefix={value}", "--max_steps=3", "--lora_dropout=0")
        (tmp_path / value).mkdir()
        session, events = session_of(tmp_path / value, *options), []
        assert session.causal.shares_prefixes is is_shared
        assert bool(session.plan.shared_prefix) is is_shared
        train(session.context(events.append, lambda: False), session.restore(None) or TrainState())
        losses.append([event.loss for event in events if isinstance(event, StepDone)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 3


def test_dropout_keeps_examples_apart_and_the_plan_says_why(tmp_path):
    session = session_of(tmp_path, "--lora_dropout=0.1")
    assert not session.causal.shares_prefixes
    assert session.plan.shared_prefix.endswith(
        "with dropout, each example drops numbers of its own"
    )
