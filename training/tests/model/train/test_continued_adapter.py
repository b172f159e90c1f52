"""A run that starts from an adapter computes what that adapter computed, whatever its kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lora_trainer.config.start_adapter import IGNORED, SHAPE_KEYS, UNTRAINED
from lora_trainer.report.html import write_report
from lora_trainer.run.events import Evaluated, Event, Sample
from lora_trainer.train.session import open_session
from support.continued import Runs
from support.quantized import needs_bitsandbytes

ANSWERING = ("eval_generate", "true", "eval_max_new_tokens", "8")
STILL = ("lora_r", None, "learning_rate", "0", "max_steps", "2")
PACKED = {"nf4": ("use_4bit", "true"), "8bit": ("use_8bit", "true")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return a place for runs of the tiny model."""
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def dora(runs: Runs) -> tuple[list[Event], list[Event]]:
    """Train `dora`, and `still` from its adapter with learning rate 0; both answer."""
    kind = ("use_dora", "true", "use_rslora", "true")
    trained = runs.start("dora", *kind, *ANSWERING, "learning_rate", "0.05")
    adapter = ("adapter_name_or_path", str(runs.root / "dora"))
    return trained, runs.start("still", *adapter, *STILL, *ANSWERING)


def evaluations(events: Sequence[Event]) -> list[float]:
    return [event.eval_loss for event in events if isinstance(event, Evaluated)]


def answers(events: Sequence[Event], when: str) -> list[str]:
    return [e.answer for e in events if isinstance(e, Sample) and e.when == when]


def test_learning_rate_0_gives_the_loss_and_the_bytes_of_the_finished_run(
    runs: Runs, dora: tuple[list[Event], list[Event]]
) -> None:
    trained, still = map(evaluations, dora)
    assert still == [min(trained)] * len(still)
    assert runs.adapter("still") == runs.adapter("dora")


def test_saved_modules_start_as_they_were(runs: Runs) -> None:
    trained = evaluations(runs.start("saved", "modules_to_save", '["lm_head"]'))
    adapter = ("adapter_name_or_path", str(runs.root / "saved"))
    assert evaluations(runs.start("still-saved", *adapter, *STILL))[0] == min(trained)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", PACKED)
def test_adapter_of_a_quantized_base_starts_on_it_as_it_was(runs: Runs, kind: str) -> None:
    trained = evaluations(runs.start(kind, *PACKED[kind]))
    adapter = ("adapter_name_or_path", str(runs.root / kind))
    assert evaluations(runs.start(f"still-{kind}", *adapter, *STILL, *PACKED[kind]))[0] == min(
        trained
    )


def write_plain_adapter(runs: Runs, folder: Path, dtype: torch.dtype) -> None:
    """Write an adapter with PEFT alone."""
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(runs.model)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules=["v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).mul(0.1).to(dtype)
    model.save_pretrained(folder)


@torch.no_grad()
def plain_loss(runs: Runs, adapter: Path) -> float:
    """Return the loss of an adapter in plain PEFT on the held-out rows, one row at a time."""
    base = AutoModelForCausalLM.from_pretrained(runs.model, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True).eval()
    rows = open_session(runs.settings("rows").config, runs.root / "rows", lambda _: None).eval_rows
    summed, targets = 0.0, 0
    for ids, marks in (rows[index] for index in range(len(rows))):
        tokens = torch.as_tensor(ids.astype("int64"))[None]
        wanted = torch.as_tensor(marks.astype(bool))[1:]
        logits = model(input_ids=tokens).logits[0, :-1][wanted]
        expected = tokens[0, 1:][wanted]
        summed += torch.nn.functional.cross_entropy(logits, expected, reduction="sum").item()
        targets += int(wanted.sum())
    return summed / targets


def test_adapter_of_plain_peft_in_16_bits_starts_with_the_loss_that_it_has_there(
    runs: Runs, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    write_plain_adapter(runs, theirs, torch.bfloat16)
    losses = evaluations(runs.start("on-theirs", "adapter_name_or_path", str(theirs), *STILL))
    assert losses[0] == pytest.approx(plain_loss(runs, theirs), rel=2e-6)


def test_first_answers_are_those_of_the_starting_adapter(
    dora: tuple[list[Event], list[Event]],
) -> None:
    trained, still = dora
    assert answers(still, "before") == answers(trained, "after") != answers(trained, "before")
    assert answers(still, "after") == answers(still, "before")


@pytest.mark.usefixtures("dora")
def test_card_says_where_training_started(runs: Runs) -> None:
    card = (runs.root / "still" / "final_model" / "README.md").read_text()
    started = "an existing adapter of the run dora; the sha256 of its weights begins "
    assert started + runs.adapter("dora")[:16] in card
    assert "| metric | starting adapter | with this adapter |" in card
    assert str(runs.root / "dora") not in card


def test_report_says_where_training_started(
    runs: Runs, dora: tuple[list[Event], list[Event]]
) -> None:
    folder = runs.root / "still"
    (folder / "events.jsonl").write_text("".join(event.to_line() for event in dora[1]))
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert f"started from the adapter {runs.root / 'dora'}" in page
    assert "starting adapter</th>" in page


def test_every_key_of_peft_is_compared_refused_or_ignored() -> None:
    known = {peft for peft, _ in SHAPE_KEYS} | UNTRAINED.keys() | IGNORED
    assert {one.name for one in dataclasses.fields(LoraConfig)} <= known
