"""The adapter is exported before the closing answers: no fault while reporting costs it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from lora_trainer.run.protocol import WorkerSpec
from lora_trainer.run_folder import RunFolder
from lora_trainer.train import evaluate, worker
from support.trained_run import CHAT, CHATML, settings_of


def run_worker(root: Path, *keys: str) -> list:
    held_out = root / "held-out.jsonl"
    held_out.write_text(json.dumps(CHAT).replace("ping", "pang"))
    keys = (
        f"--chat_template={CHATML}",
        f"--eval_dataset={held_out}",
        "--eval_generate=true",
        *keys,
    )
    settings = settings_of(root, CHAT, *keys, steps=3)
    order = WorkerSpec(settings.config, root / "run", "run")
    stop = SimpleNamespace(is_set=lambda: False, signal="", step=0, is_deferred=False)
    events: list = []
    assert worker.run(order, events.append, stop) == 0
    return events


def test_a_fault_in_the_closing_answers_leaves_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("expected m1 and m2 to have the same dtype")

    monkeypatch.setattr(evaluate, "answer", broken)
    with pytest.raises(RuntimeError, match="dtype"):
        run_worker(tmp_path)
    assert load_file(tmp_path / "run" / RunFolder.final_model / "adapter_model.safetensors")


def test_the_card_states_the_answers_that_came_after_the_export(tmp_path: Path) -> None:
    events = run_worker(tmp_path)
    kinds = [event.phase for event in events if event.kind == "phase"]
    assert kinds.index("exporting") < len(kinds) - 1 - kinds[::-1].index("evaluating")
    card = (tmp_path / "run" / RunFolder.final_model / "README.md").read_text()
    before, after = (event.exact_match for event in events if event.kind == "generated")
    assert f"| exact match | {100 * before:.1f} % | {100 * after:.1f} % |" in card
    assert "eos_token_id=[2, 0]" in card


@pytest.mark.parametrize("init", ["true", "pissa"])
def test_exporting_changes_nothing_of_the_model_that_answers(
    init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict] = []
    from lora_trainer.train.setup import TrainingSetup

    plain = TrainingSetup.export

    def watched(self: TrainingSetup, order: object, state: object) -> Path:
        before = {k: v.clone() for k, v in self.causal.model.state_dict().items()}
        path = plain(self, order, state)
        after = self.causal.model.state_dict()
        seen.append({k: bool((before[k] == after[k]).all()) for k in before})
        assert before.keys() == after.keys()
        assert self.causal.model.active_adapters == ["default"]
        return path

    monkeypatch.setattr(TrainingSetup, "export", watched)
    run_worker(tmp_path, f"--init_lora_weights={init}")
    assert seen
    assert all(seen[0].values())
