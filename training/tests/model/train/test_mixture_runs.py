"""Runs on a mixture of experts: killed and resumed, continued, merged, evaluated, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_trainer import cli
from lora_trainer.commands.finetuned import find, open_model
from lora_trainer.errors import ConfigError
from lora_trainer.model.compat import MAJOR, dtype_argument
from lora_trainer.run.events import Event, Resumed, StepDone
from support.continued import Runs
from support.families import COMMON, MIXTURES
from support.run_folders import logits_of

EXPERTS = "experts.gate_up_proj,experts.down_proj"
TARGETS = ("lora_dropout", "0") + (("lora_target_parameters", EXPERTS) if MAJOR >= 5 else ())


def write_mixture(folder: Path, family: str) -> None:
    """Put a mixture of experts in the place of the tiny model; its tokenizer stays."""
    name, own = MIXTURES[family]
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(
        **(COMMON | own | tokens | {"vocab_size": vocabulary, "max_position_embeddings": 256})
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return a folder of runs on a tiny Mixtral, among them `whole`, which finished."""
    folders = Runs(tmp_path_factory.mktemp("runs"))
    write_mixture(folders.model, "mixtral")
    folders.start("whole", *TARGETS)
    return folders


def losses(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


def of_disk(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, **dtype_argument(torch.float32))


def with_adapter(runs: Runs, folder: Path):
    return PeftModel.from_pretrained(of_disk(runs.model), str(folder))


def test_killed_run_resumes_to_the_same_bytes(runs: Runs) -> None:
    runs.start("killed", *TARGETS, die_at=lambda e: isinstance(e, StepDone) and e.step == 3)
    events = runs.start("killed", *TARGETS)
    assert any(isinstance(event, Resumed) for event in events)
    assert runs.adapter("killed") == runs.adapter("whole")


def test_exported_adapter_holds_experts_and_no_router(runs: Runs) -> None:
    folder = runs.root / "whole" / "final_model"
    names = set(load_file(folder / "adapter_model.safetensors"))
    assert {name for name in names if ".experts." in name}
    assert not {name for name in names if ".gate." in name}
    asked = json.loads((folder / "adapter_config.json").read_text())["target_parameters"] or []
    assert sorted(asked) == (sorted(EXPERTS.split(",")) if MAJOR >= 5 else [])
    assert ("merge the adapter" in (folder / "README.md").read_text()) is (MAJOR >= 5)
    assert not torch.allclose(logits_of(with_adapter(runs, folder)), logits_of(of_disk(runs.model)))


def test_training_goes_on_from_adapter_and_checkpoint_alike(runs: Runs) -> None:
    keys = ("lora_dropout", "0", "lora_r", None)
    final = runs.root / "whole" / "final_model"
    weights = load_file(final / "adapter_model.safetensors")
    exported = next(
        path
        for path in sorted((runs.root / "whole" / "checkpoints").iterdir())
        if all(
            torch.equal(value, weights[name.replace(".default", "")])
            for name, value in load_file(path / "adapter.safetensors").items()
        )
    )
    first = runs.start("from-final", "adapter_name_or_path", str(final), *keys)
    second = runs.start("from-checkpoint", "adapter_name_or_path", str(exported), *keys)
    assert losses(first) == losses(second)
    assert runs.adapter("from-final") == runs.adapter("from-checkpoint")
    fresh = losses(runs.start("fresh", *TARGETS))
    assert abs(losses(first)[0] - fresh[0]) > 1e-3


@pytest.mark.skipif(MAJOR < 5, reason="transformers 4.50 holds experts as linear layers")
def test_adapter_of_other_parameters_is_refused_with_both(runs: Runs) -> None:
    adapter = ("adapter_name_or_path", str(runs.root / "whole"), "lora_dropout", "0")
    with pytest.raises(ConfigError) as caught:
        runs.settings("x", *adapter, "lora_target_parameters", "experts.down_proj")
    assert "experts.gate_up_proj" in caught.value.block()


@pytest.mark.skipif(MAJOR < 5, reason="transformers 4.50 holds experts as linear layers")
def test_check_names_experts_that_would_not_be_quantized_and_what_is_reached(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs.root / "config.json").write_text("{}")  # without the shipped one's held-out rows
    given = (("model_name_or_path", runs.model), ("dataset", runs.rows), ("output_dir", runs.root))
    check = [
        "check",
        f"--config={runs.root / 'config.json'}",
        *(f"--{key}={value}" for key, value in given),
    ]
    assert cli.main([*check, "--use_4bit=true"]) == 78
    assert "use_4bit cannot quantize the experts of mixtral" in capsys.readouterr().err
    assert cli.main([*check, f"--lora_target_parameters={EXPERTS}"]) == 0
    assert "experts are adapted as parameters" in capsys.readouterr().out


def test_merged_experts_answer_as_plain_peft_merges_them(runs: Runs, tmp_path: Path) -> None:
    run = runs.root / "whole"
    assert cli.main(["merge", str(run), str(tmp_path / "out")]) == 0
    expected = with_adapter(runs, run / "final_model").merge_and_unload()
    merged = of_disk(tmp_path / "out")
    torch.testing.assert_close(logits_of(merged), logits_of(expected), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(merged), logits_of(of_disk(runs.model)), atol=1e-3)


def test_evaluation_and_chat_open_the_adapter_that_was_trained(runs: Runs) -> None:
    run = runs.root / "whole"
    opened = open_model(find(str(run)), is_exact=True)
    expected = logits_of(with_adapter(runs, run / "final_model"))
    torch.testing.assert_close(logits_of(opened.causal.model), expected, rtol=1e-4, atol=1e-4)
    with opened.causal.model.disable_adapter():
        base = logits_of(opened.causal.model)
    torch.testing.assert_close(base, logits_of(of_disk(runs.model)), rtol=1e-4, atol=1e-4)


def test_export_of_a_checkpoint_gives_the_experts_that_it_holds(runs: Runs, tmp_path: Path) -> None:
    checkpoint = sorted((runs.root / "whole" / "checkpoints").iterdir())[-1]
    assert cli.main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    kept = load_file(checkpoint / "adapter.safetensors")
    assert written.keys() == {name.replace(".default", "") for name in kept}
    assert all(torch.equal(written[n.replace(".default", "")], value) for n, value in kept.items())
    with_adapter(runs, tmp_path / "out")


def test_plan_of_a_run_says_what_it_reaches(runs: Runs) -> None:
    (note,) = [
        reason
        for reason in json.loads((runs.root / "whole" / "plan.json").read_text())["reasons"]
        if "of the parameters" in reason
    ]
    assert "leaves out routers" in note
    assert "experts fused" not in note
