"""Training starts from an existing adapter, and says where that does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_trainer.errors import ConfigError
from lora_trainer.run.events import Event, Resumed, StepDone
from lora_trainer.supervise.earlier_run import judge
from lora_trainer.train.session import open_session
from support.continued import Runs

STEPS = 5
# Whatever the adapter decides is left out, and nothing is drawn at random.
OPEN = ("lora_r", None, "lora_dropout", "0")
PLAIN = (*OPEN, "max_steps", str(STEPS), "warmup_steps", "0", "max_grad_norm", "0.5")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return a place with three finished runs of four steps: `plain`, `dora` and `pissa`."""
    folders = Runs(tmp_path_factory.mktemp("runs"))
    folders.start("plain", "lora_alpha", "8", "lora_target_modules", "q_proj,down_proj")
    folders.start("dora", "use_dora", "true", "use_rslora", "true")
    folders.start("pissa", "init_lora_weights", "pissa")
    return folders


def refusal(runs: Runs, name: str, *arguments: str | None) -> str:
    with pytest.raises(ConfigError) as caught:
        runs.start(name, *arguments)
    return caught.value.block()


def losses(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


def plain_losses(runs: Runs, adapter: Path, *arguments: str | None) -> list[float]:
    """Train with plain transformers and PEFT: one row at a time, no code of the trainer's."""
    settings = runs.settings("unused", "adapter_name_or_path", str(adapter), *arguments)
    session = open_session(settings.config, runs.root / "unused", lambda _: None)
    base = AutoModelForCausalLM.from_pretrained(runs.model, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    step_losses = []
    for step in range(STEPS):
        summed, targets = torch.zeros(()), 0
        for row in session.sampler.step_rows(step):
            ids, marks = session.splits.train[int(row)]
            tokens = torch.as_tensor(ids.astype("int64"))[None]
            wanted = torch.as_tensor(marks.astype(bool))[1:]
            logits = model(input_ids=tokens).logits[0, :-1][wanted]
            summed = summed + torch.nn.functional.cross_entropy(
                logits, tokens[0, 1:][wanted], reduction="sum"
            )
            targets += int(wanted.sum())
        loss = summed / targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        step_losses.append(loss.item())
    return step_losses


@pytest.mark.parametrize("name", ["plain", "dora", "pissa"])
def test_losses_equal_plain_peft_from_that_adapter(runs: Runs, name: str) -> None:
    adapter = runs.root / name / "final_model"
    events = runs.start(f"from-{name}", "adapter_name_or_path", str(adapter), *PLAIN)
    expected = plain_losses(runs, adapter, *PLAIN)
    assert losses(events) == pytest.approx(expected, rel=2e-6)
    fresh = runs.start(f"not-from-{name}", *PLAIN)
    assert abs(losses(fresh)[0] - expected[0]) > 1e-2


def test_run_checkpoint_and_copied_adapter_start_alike(runs: Runs, tmp_path: Path) -> None:
    copied = shutil.copytree(runs.root / "plain" / "final_model", tmp_path / "copied")
    # The best of the run is not its last step: the checkpoint that was exported.
    final = load_file(copied / "adapter_model.safetensors")
    best = next(
        path
        for path in sorted((runs.root / "plain" / "checkpoints").iterdir())
        if all(
            torch.equal(value, final[name.replace(".default", "")])
            for name, value in load_file(path / "adapter.safetensors").items()
        )
    )
    results = []
    for adapter in (runs.root / "plain", copied, best):
        name = f"alike-{len(results)}"
        events = runs.start(name, "adapter_name_or_path", str(adapter), *PLAIN)
        results.append((losses(events), runs.adapter(name)))
    assert results[0] == results[1] == results[2]


def test_keys_that_are_not_given_are_the_adapters(runs: Runs) -> None:
    adapter = str(runs.root / "plain")
    settings = runs.settings("x", "adapter_name_or_path", adapter, *OPEN)
    assert settings.config.lora.lora_r == 4
    assert settings.config.lora.lora_alpha == 8
    assert settings.config.lora.lora_target_modules == ["down_proj", "q_proj"]
    assert settings.redacted()["lora"]["lora_r"]["origin"] == f"adapter {adapter}"
    without_base = runs.settings(
        "x", "adapter_name_or_path", adapter, "model_name_or_path", None, *OPEN
    )
    assert without_base.config.model.model_name_or_path == str(runs.model)


@pytest.mark.parametrize(
    ("key", "value", "both"),
    [
        ("lora_r", "8", "lora_r 8 differs from the adapter's 4"),
        ("lora_alpha", "16", "lora_alpha 16.0 differs from the adapter's 8.0"),
        ("use_dora", "true", "use_dora True differs from the adapter's False"),
        ("use_rslora", "true", "use_rslora True differs from the adapter's False"),
        ("lora_target_modules", '["q_proj"]', "['q_proj'] differs from the adapter's"),
        ("modules_to_save", '["lm_head"]', "['lm_head'] differs from the adapter's []"),
        ("init_lora_weights", "gaussian", "adapter_name_or_path and init_lora_weights"),
        ("model_name_or_path", "owner/other", "model_name_or_path owner/other differs"),
    ],
)
def test_given_key_that_disagrees_is_refused_with_both_values(
    runs: Runs, tmp_path: Path, key: str, value: str, both: str
) -> None:
    adapter = Path(shutil.copytree(runs.root / "plain" / "final_model", tmp_path / "adapter"))
    if key == "model_name_or_path":
        path = adapter / "adapter_config.json"
        facts = json.loads(path.read_text()) | {"base_model_name_or_path": "owner/one"}
        path.write_text(json.dumps(facts))
    assert both in refusal(runs, "x", "adapter_name_or_path", str(adapter), *OPEN, key, value)


def test_targets_given_otherwise_are_compared_on_the_model(runs: Runs) -> None:
    adapter = ("adapter_name_or_path", str(runs.root / "plain"), *PLAIN)
    same = runs.start("same-targets", *adapter, "lora_target_modules", r".*\.(q|down)_proj")
    assert losses(same) == losses(runs.start("taken-targets", *adapter))
    block = refusal(runs, "other-targets", *adapter, "lora_target_modules", "all-linear")
    assert "does not fit" in block
    assert "of the adapter: down_proj, q_proj" in block


def test_killed_run_resumes_to_the_same_bytes(runs: Runs) -> None:
    adapter = ("adapter_name_or_path", str(runs.root / "plain"), "lora_r", None)
    runs.start("whole", *adapter)
    runs.start("killed", *adapter, die_at=lambda e: isinstance(e, StepDone) and e.step == 3)
    events = runs.start("killed", *adapter)
    assert any(isinstance(event, Resumed) for event in events)
    assert runs.adapter("killed") == runs.adapter("whole")


def test_other_weights_under_the_adapters_path_are_another_run(runs: Runs, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(runs.root / "plain" / "final_model", tmp_path / "adapter"))
    elsewhere = shutil.copytree(adapter, tmp_path / "elsewhere")
    arguments = ("adapter_name_or_path", str(adapter), "lora_r", None)
    runs.start("content", *arguments)
    moved = runs.settings("content", "adapter_name_or_path", str(elsewhere), "lora_r", None)
    assert judge(runs.root / "content", moved).does == "nothing"
    (adapter / "SHA256SUMS").unlink()  # replaced on purpose
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 2 * w for name, w in weights.items()}, adapter / "adapter_model.safetensors")
    assert "the weights of the adapter" in refusal(runs, "content", *arguments)
    assert "adapter_name_or_path: " in refusal(runs, "content")


def test_adapter_of_another_base_model_is_refused(runs: Runs, tmp_path: Path) -> None:
    other = Path(shutil.copytree(runs.model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    copied = shutil.copytree(runs.root / "plain" / "final_model", tmp_path / "copied")
    for adapter in (runs.root / "plain", copied):
        arguments = ("adapter_name_or_path", str(adapter), "model_name_or_path", str(other), *OPEN)
        block = refusal(runs, "other-base", *arguments)
        assert "another base model" in block
        assert str(runs.model) in block


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _flip(folder: Path) -> None:
    path = folder / "checkpoints" / "step-000004" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def _cut(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()  # as in a folder of another tool
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _poison(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()
    weights = load_file(folder / "adapter_model.safetensors")
    weights[min(weights)][0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")


def _set(**facts: Any) -> Any:
    def write(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    return write


@pytest.mark.parametrize(
    ("source", "below", "damage", "why"),
    [
        ("plain/final_model", "", _pickle, "adapter_model.bin is pickled"),
        ("plain", "checkpoints/step-000004", _flip, "damaged or not complete"),
        ("pissa", "checkpoints/step-000004", lambda _: None, "lora-trainer export"),
        ("plain/final_model", "", _cut, "adapter_model.safetensors: "),
        ("plain/final_model", "", _poison, "holds NaN or infinite values"),
        ("plain/final_model", "", _set(peft_type="IA3"), "not a LoRA adapter (IA3)"),
        ("plain/final_model", "", _set(use_qalora=True), "use_qalora"),
        ("plain/final_model", "", _set(init_lora_weights="lora_ga"), "changed the base model"),
        ("plain/final_model", "", _set(rank_pattern={"q_proj": 2}), "rank_pattern"),
        ("plain/final_model", "", _set(init_lora_weights="olora"), "changed the base model"),
        ("plain/final_model", "", _set(r="many"), "cannot be read"),
        ("plain/final_model", "nowhere", lambda _: None, "there is no such folder"),
        ("plain/checkpoints", "", lambda _: None, "there is no adapter in it"),
    ],
)
def test_adapter_that_cannot_be_used_is_refused_by_the_reason(
    runs: Runs, tmp_path: Path, source: str, below: str, damage: Any, why: str
) -> None:
    folder = Path(shutil.copytree(runs.root / source, tmp_path / "adapter"))
    damage(folder)
    named = str(folder / below if below else folder)
    block = refusal(runs, tmp_path.name, "adapter_name_or_path", named, *OPEN)
    assert why in block
    assert "exit code 78" in block


def test_adapter_that_would_be_moved_aside_is_refused(runs: Runs) -> None:
    runs.start("own")
    own = ("adapter_name_or_path", str(runs.root / "own"), "lora_r", None)
    assert "would be archived" in refusal(runs, "own", *own, "on_finished", "archive")


def test_refusal_of_another_learning_rate_offers_to_train_the_adapter_further(runs: Runs) -> None:
    runs.start("first")
    block = refusal(runs, "first", "learning_rate", "0.001")
    final = runs.root / "first" / "final_model"
    assert f"--adapter_name_or_path {final} --run_name NEW_NAME" in block
    assert "--adapter_name_or_path" not in refusal(runs, "first", "lora_r", "8")
    offered = ("adapter_name_or_path", str(final), "learning_rate", "0.001")
    assert losses(runs.start("second", *offered))
