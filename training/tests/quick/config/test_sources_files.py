"""Whole files of other trainers mean here what they mean there.

`foreign/` holds files as people write them; `foreign/expected.json` what their own trainers make of
them for 1,000 rows on one device (`resolve_elsewhere.py` wrote it).
"""

import contextlib
import copy
import json
import math
import random
from pathlib import Path

import pytest

from lora_trainer.config.schema import EMBEDDED_MODEL
from lora_trainer.config.settings import resolve
from lora_trainer.config.text import read_yaml
from lora_trainer.errors import ConfigError
from lora_trainer.plan import learning_rate, steps_of
from support.resolving import from_arguments, values_of

FOLDER = Path(__file__).parents[2] / "support" / "foreign"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
ROWS = 1000
# Files that ask for something else than LoRA, and a word of the reason.
REFUSED = {
    "axolotl-12-full.yml": "full fine-tuning",
    "axolotl-13-dpo.yml": "preference",
    "factory-09-full.yaml": "always LoRA",
    "torchtune-03-full.yaml": "full fine-tuning",
    "trainer-03-run-clm.json": "full fine-tuning",
    "trl-06-full.yaml": "full fine-tuning",
}
TAKEN = sorted(EXPECTED.keys() - REFUSED.keys())
# torchtune leaves out an epoch's last, incomplete step; Axolotl rounds a share of warmup down.
STEPS_DIFFER = {"torchtune-01-lora-8b.yaml": 63, "torchtune-02-qlora-chat.yaml": 375}
RATES_DIFFER = {"torchtune-01-lora-8b.yaml", *(
    name for name, one in EXPECTED.items() if name.startswith("axolotl") and one
    and "warmup_ratio" in (FOLDER / name).read_text()
)}  # fmt: skip


@pytest.fixture(scope="module")
def resolved():
    return {name: values_of(resolve(FOLDER / name, {}, [])) for name in TAKEN}


def test_the_files_are_those_that_their_trainers_resolved():
    names = {path.name for path in FOLDER.glob("*-*.*")}
    assert names == EXPECTED.keys()
    assert (len(names), len(TAKEN)) == (36, 30)
    assert {name for name, one in EXPECTED.items() if not one} == REFUSED.keys()


@pytest.mark.parametrize("name", TAKEN)
def test_a_file_trains_as_in_its_own_trainer(resolved, name):
    values, expected = resolved[name], EXPECTED[name]
    batch = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    assert batch == expected["batch"]
    ours = {
        "r": values["lora_r"],
        "alpha": values["lora_alpha"],
        "dropout": values["lora_dropout"],
        "too_long": values["too_long"],
        "train_on": values["train_on"],
        "length": values["max_seq_length"] if values["max_seq_length"] < 1_048_576 else None,
        "eval_batch": values["per_device_eval_batch_size"],
        "weight_decay": values["weight_decay"],
        "max_grad_norm": values["max_grad_norm"],
        "betas": [values["adam_beta1"], values["adam_beta2"]],
        "seed": values["seed"],
    }
    assert ours == ours | {key: one for key, one in expected.items() if key in ours}


@pytest.mark.parametrize("name", TAKEN)
def test_a_file_has_the_steps_and_learning_rates_of_its_own_trainer(name):
    training = resolve(FOLDER / name, {}, []).config.training
    expected = EXPECTED[name]
    per_epoch = math.ceil(ROWS / expected["batch"])
    total, warmup = steps_of(training, per_epoch)
    assert total == STEPS_DIFFER.get(name, expected["steps"])
    at = (1, total // 2, total - 1)
    rates = [
        learning_rate(
            step,
            peak=training.learning_rate,
            total_steps=total,
            warmup_steps=warmup,
            kind=training.lr_scheduler_type,
        )
        for step in at
    ]
    if name in RATES_DIFFER:
        assert abs(warmup - expected.get("warmup", warmup)) <= 1
    else:
        assert rates == pytest.approx(expected["rates"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_file_that_asks_for_something_else_is_refused_for_that_reason(name):
    with pytest.raises(ConfigError) as caught:
        resolve(FOLDER / name, {}, [])
    problems = [f"{problem.what} {problem.why}" for problem in caught.value.problems]
    assert any(REFUSED[name] in text for text in problems)
    assert not any("names no" in text for text in problems)
    assert all(problem.remedy for problem in caught.value.problems)


@pytest.mark.parametrize("name", TAKEN)
def test_neither_the_embedded_model_nor_the_demo_dataset_stands_in(resolved, name):
    values = resolved[name]
    assert values["model_name_or_path"] != EMBEDDED_MODEL
    assert values["dataset"] != values_of(from_arguments())["dataset"]


def test_names_of_llama_factory_are_looked_up_in_dataset_info(resolved):
    first, second = resolved["factory-01-llama3-lora.yaml"]["dataset"]
    assert first.path == str(FOLDER / "data" / "identity.json")
    assert (first.format, first.max_samples, second.max_samples) == ("alpaca", None, 500)
    (talks,) = resolved["factory-03-qwen3-eval.yaml"]["dataset"]
    assert talks.columns == {"messages": "dialogue"}


def test_axolotls_entries_name_formats_columns_and_subsets(resolved):
    assert resolved["axolotl-02-mistral-qlora-alpaca.yml"]["dataset"][0].format == "alpaca_text"
    assert resolved["axolotl-06-completion.yml"]["dataset"][0].format == "text"
    second = resolved["axolotl-08-two-datasets.yml"]["dataset"][1]
    assert (second.subset, second.split) == ("default", "train_sft")


def test_torchtunes_components_name_targets_optimizer_and_prompt(resolved):
    first = resolved["torchtune-01-lora-8b.yaml"]
    mlp = ["gate_proj", "up_proj", "down_proj"]
    assert first["lora_target_modules"] == ["q_proj", "v_proj", "o_proj", *mlp]
    assert (first["dataset"][0].format, first["dataset"][0].path.split("/")[-1]) == (
        "alpaca_chat",
        "rows.json",
    )
    second = resolved["torchtune-02-qlora-chat.yaml"]
    assert (second["use_4bit"], second["optim"]) == (True, "paged_adamw_8bit")
    assert second["report_to"] == ["tensorboard"]


def test_saves_and_evaluations_are_as_often_as_in_the_file(resolved):
    keys = ("save_steps", "saves_per_epoch", "eval_steps", "evals_per_epoch")
    often = {name: tuple(values[key] for key in keys) for name, values in resolved.items()}
    assert often["axolotl-01-llama3-lora.yml"][1::2] == (1, 4)
    assert often["axolotl-09-defaults-only.yml"][1] == 1
    assert often["factory-07-strategy-epoch.yaml"][1::2] == (1, 1)
    assert often["factory-08-bare.yaml"][:2] == (500, 0)
    assert often["trainer-01-notebook-dump.json"][::2] == (25, 25)
    assert often["trainer-02-recent-dump.json"][1:3] == (1, 0)


def test_pissa_has_as_many_iterations_as_in_llama_factory(resolved):
    assert resolved["factory-05-pissa.yaml"]["init_lora_weights"] == "pissa_niter_16"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("identiy", "did you mean identity?"),
        ("pairs", "preferences"),
        ("pictures", "media"),
    ],
)
def test_a_dataset_that_dataset_info_does_not_allow_is_refused(tmp_path, names, reason):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text(
        (FOLDER / "data/dataset_info.json").read_text()
    )
    file = tmp_path / "c.yaml"
    file.write_text(f"model_name_or_path: org/m\nfinetuning_type: lora\ndataset: {names}\n")
    with pytest.raises(ConfigError) as caught:
        resolve(file, {}, [])
    (problem,) = caught.value.problems
    assert reason in f"{problem.what} {problem.why} {problem.remedy}"


def test_a_dataset_name_without_dataset_info_is_no_hub_id(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model_name_or_path: org/m\nfinetuning_type: lora\ndataset: identity\n")
    with pytest.raises(ConfigError) as caught:
        resolve(file, {}, [])
    assert "dataset_info.json" in caught.value.problems[0].why


STRANGE = (None, [], {}, "x", -1, 1e9, True, ["a"], [None], {"a": 1}, {"_component_": 3})


def paths_in(value, at=()):
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in inner:
        yield (*at, key)
        if isinstance(one, dict | list):
            yield from paths_in(one, (*at, key))


def test_strange_values_in_such_files_are_problems_and_no_crashes(tmp_path):
    chance = random.Random(12)
    files = [read_yaml((FOLDER / name).read_text(), name).value for name in EXPECTED]
    for number in range(60):
        content = copy.deepcopy(chance.choice(files))
        *outer, last = chance.choice(list(paths_in(content)))
        part = content
        for key in outer:
            part = part[key]
        part[last] = chance.choice(STRANGE)
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(content))
        with contextlib.suppress(ConfigError):
            resolve(file, {}, [])
