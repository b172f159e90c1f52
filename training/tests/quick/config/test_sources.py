"""Precedence, origins, the environment, the command line, and relative paths."""

import json

import pytest

from lora_trainer.config.schema import EMBEDDED_MODEL
from lora_trainer.config.sections import leaf_sections
from lora_trainer.config.settings import resolve
from lora_trainer.errors import ConfigError
from support.resolving import from_arguments, from_file, problems_of, values_of, write

# Precedence and origins


def test_later_sources_win_and_each_value_keeps_its_origin(folder):
    resolved = from_file(
        folder,
        '{"lora_r": 1,\n "training": {\n  "max_steps": 1, "learning_rate": 0.1, "seed": 1}}',
        environ={"LORA_TRAINER_LEARNING_RATE": "0.2", "LORA_TRAINER_SEED": "2"},
        arguments=["--seed", "3"],
    )
    training = resolved.config.training
    assert (training.max_steps, training.learning_rate, training.seed) == (1, 0.2, 3)
    path = folder / "config.json"
    assert {leaf: str(origin) for leaf, origin in resolved.origins.items() if origin.location} == {
        "lora_r": f"{path}:1 /lora_r",
        "max_steps": f"{path}:3 /training/max_steps",
        "learning_rate": "environment LORA_TRAINER_LEARNING_RATE",
        "seed": "command line --seed",
    }


def test_every_leaf_has_an_origin(folder):
    resolved = resolve(None, {}, [])
    assert set(resolved.origins) == set(leaf_sections())
    assert {origin.kind for origin in resolved.origins.values()} == {"default"}


def test_redacted_shows_values_with_origins_and_no_secret(folder):
    resolved = resolve(None, {"HF_TOKEN": "hf_sesame\n"}, ["--lora_r=4"])
    assert resolved.config.model.hf_token == "hf_sesame"
    shown = resolved.redacted()
    assert shown["model"]["hf_token"] == {"value": "***", "origin": "environment HF_TOKEN"}
    assert shown["lora"]["lora_r"] == {"value": 4, "origin": "command line --lora_r"}
    assert shown["lora"]["lora_alpha"] == {"value": 32.0, "origin": "default"}
    assert "hf_sesame" not in repr(resolved) + json.dumps(shown)


def test_unset_secret_is_shown_as_null(folder):
    assert resolve(None, {}, []).redacted()["model"]["hf_token"]["value"] is None


# The environment


def test_environment_reads_values_as_yaml_or_as_text(folder):
    environ = {
        "LORA_TRAINER_USE_4BIT": "true",
        "LORA_TRAINER_LEARNING_RATE": "1e-3",
        "LORA_TRAINER_LORA_TARGET_MODULES": '["q_proj"]',
        "LORA_TRAINER_RUN_NAME": "2024",
        "LORA_TRAINER_REPORT_TO": "tensorboard,wandb",
        "LORA_TRAINER_DATASET_COLUMNS": '{"prompt": "q"}',
        "LORA_TRAINER_INIT_LORA_WEIGHTS": "false",
        "LORA_TRAINER_SEED": "",
    }
    values = values_of(resolve(None, environ, []))
    assert (values["use_4bit"], values["learning_rate"], values["run_name"]) == (True, 1e-3, "2024")
    assert values["lora_target_modules"] == ["q_proj"]
    assert values["report_to"] == ["tensorboard", "wandb"]
    assert values["dataset_columns"] == {"prompt": "q"}
    assert (values["init_lora_weights"], values["seed"]) == (False, 42)


def test_environment_of_other_programs_is_left_alone(folder):
    environ = {"PATH": "/bin", "LORA_TRAINER_DEBUG": "1", "LORA_TRAINER_CONFIG": "x", "LR": "x"}
    assert resolve(None, environ, []).config == resolve(None, {}, []).config


def test_unknown_setting_in_the_environment_is_told_its_likely_name(folder):
    problem = problems_of(None, {"LORA_TRAINER_LEARNING_RAT": "1"}, [])[0]
    assert problem.remedy == "did you mean LORA_TRAINER_LEARNING_RATE?"
    problem = problems_of(None, {"LORA_TRAINER_LR": "1"}, [])[0]
    assert problem.remedy == "did you mean LORA_TRAINER_LEARNING_RATE?"


def test_well_known_variables_are_read_unless_our_own_are_set(folder):
    environ = {
        "HF_TOKEN": "a", "HUGGING_FACE_HUB_TOKEN": "b", "DATASETS_DIR": "/d", "OUTPUT_DIR": "/o",
        "HEALTH_PORT": "81", "LORA_TRAINER_OUTPUT_DIR": "/own",
    }  # fmt: skip
    values = values_of(resolve(None, environ, []))
    assert (values["hf_token"], values["datasets_dir"]) == ("a", "/d")
    assert (values["output_dir"], values["health_port"]) == ("/own", 81)


@pytest.mark.parametrize("name", ["HF_TOKEN_FILE", "LORA_TRAINER_HF_TOKEN_FILE"])
def test_secret_is_read_from_a_file(folder, name):
    (folder / "token").write_text("hf_12345\n")
    resolved = resolve(None, {name: str(folder / "token")}, [])
    assert resolved.config.model.hf_token == "hf_12345"
    assert resolved.origins["hf_token"].location == name


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"x" * 70_000])
def test_secret_file_that_holds_no_secret_is_a_problem(folder, content):
    if content is not None:
        (folder / "token").write_bytes(content)
    problem = problems_of(None, {"HF_TOKEN_FILE": str(folder / "token")}, [])[0]
    assert problem.where == "HF_TOKEN_FILE"


# The command line


@pytest.mark.parametrize(
    ("arguments", "leaf", "value"),
    [
        (["--resume"], "resume", "auto"),
        (["--resume", "--seed", "1"], "resume", "auto"),
        (["--resume", "never"], "resume", "never"),
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning-rate=1e-4"], "learning_rate", 1e-4),
        (["--lr", "1e-4"], "learning_rate", 1e-4),
        (["--set", "data.max_seq_length=64"], "max_seq_length", 64),
        (["--set=max_seq_length=64"], "max_seq_length", 64),
        (["--use_4bit"], "use_4bit", True),
        (["--use_4bit", "--seed", "1"], "use_4bit", True),
        (["--use_4bit", "false"], "use_4bit", False),
        (["--no-bnb_4bit_use_double_quant"], "bnb_4bit_use_double_quant", False),
        (["--no-bf16"], "bf16", False),
        (["--bf16", "auto"], "bf16", "auto"),
        (["--lora_target_modules", "q_proj,v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--lora_target_modules", '["q_proj"]'], "lora_target_modules", ["q_proj"]),
        (["--lora_target_linear"], "lora_target_modules", "all-linear"),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--run_name", "1e5"], "run_name", "1e5"),
        (["--model", "a/b"], "model_name_or_path", "a/b"),
        (["--modules_to_save", "lm_head"], "modules_to_save", ["lm_head"]),
        (["--chat_template", "{{ messages }} # x"], "chat_template", "{{ messages }} # x"),
        (["--lr_scheduler", "constant_with_warmup"], "lr_scheduler_type", "constant"),
    ],
)
def test_arguments_set_values(folder, arguments, leaf, value):
    assert values_of(from_arguments(*arguments))[leaf] == value


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ('{"path": "org/a", "weight": 2}', [2]),
        ('[{"path": "org/a"}, {"path": "org/b", "weight": 3}]', [1, 3]),
    ],
)
def test_datasets_on_the_command_line_may_be_json(folder, text, weights):
    entries = values_of(from_arguments("--dataset", text))["dataset"]
    assert [entry.weight for entry in entries] == weights


@pytest.mark.parametrize("text", ['{"path": "a"', '{"pat": "a"}', '["a", 3]', '[{"path": "a"]'])
def test_datasets_in_wrong_json_are_a_problem_of_the_config(folder, text):
    assert all("dataset" in p.what and p.remedy for p in problems_of(None, {}, ["--dataset", text]))


def test_null_on_the_command_line_takes_back_what_the_file_says(folder):
    path = write(folder, {"warmup_steps": 5})
    assert resolve(path, {}, ["--warmup_steps", "null"]).config.training.warmup_steps is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--learning_rat", "1"], "did you mean --learning_rate?"),
        (["--learning_rate"], "needs a value"),
        (["--learning_rate", "--seed", "1"], "needs a value"),
        (["--seed", "1", "--seed=2"], "given twice"),
        (["--seed", "1", "--set", "training.seed=2"], "--seed sets the same key"),
        (["--set", "seed"], "needs a value"),
        (["--set"], "unknown flag"),
        (["--set", "training={}"], "is a section"),
        (["--set", "lora.seed=1"], "does not belong in lora"),
        (["--set", "lara.seed=1"], "did you mean lora?"),
        (["--no-seed"], "not a true/false option"),
        (["--no-use_4bit=true"], "take no value"),
        (["stray"], "does not follow a flag"),
        (["-s", "1"], "does not follow a flag"),
        (["--"], "does not follow a flag"),
    ],
)
def test_wrong_arguments_are_explained(folder, arguments, words):
    problems = problems_of(None, {}, arguments)
    assert words in ConfigError(problems).block()


# Paths


@pytest.fixture
def tree(folder):
    for name in ("configs/near.jsonl", "configs/tok.jinja", "data/far.jsonl", "data/set/x", "m/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


def test_paths_in_a_file_start_at_its_folder(tree):
    content = {
        "dataset": ["near.jsonl", {"path": "far.jsonl"}, "set", "hub/id", "lost.jsonl", "./lost"],
        "eval_dataset": "hf://x/lost.jsonl",
        "datasets_dir": "../data",
        "output_dir": "out",
        "chat_template": "tok.jinja",
        "model_name_or_path": "../m",
    }
    values = values_of(from_file(tree / "configs", content))
    assert [getattr(entry, "path", entry) for entry in values["dataset"]] == [
        f"{tree}/configs/near.jsonl", f"{tree}/data/far.jsonl", f"{tree}/data/set", "hub/id",
        f"{tree}/configs/lost.jsonl", f"{tree}/configs/lost",
    ]  # fmt: skip
    assert values["eval_dataset"] == "hf://x/lost.jsonl"
    assert values["output_dir"] == f"{tree}/configs/out"
    assert values["chat_template"] == f"{tree}/configs/tok.jinja"
    assert values["model_name_or_path"] == f"{tree}/m"


def test_paths_elsewhere_start_at_the_current_folder(tree):
    path = write(tree / "configs", {"dataset": "near.jsonl"})
    resolved = resolve(path, {"OUTPUT_DIR": "out"}, ["--model", "m", "--dataset", "data/far.jsonl"])
    values = values_of(resolved)
    assert values["output_dir"] == f"{tree}/out"
    assert values["model_name_or_path"] == f"{tree}/m"
    assert values["dataset"] == f"{tree}/data/far.jsonl"


def test_hub_ids_and_the_embedded_model_are_left_alone(folder):
    (folder / EMBEDDED_MODEL).mkdir(parents=True)
    values = values_of(from_arguments("--dataset", "tatsu-lab/alpaca"))
    assert values["model_name_or_path"] == EMBEDDED_MODEL
    assert values["dataset"] == "tatsu-lab/alpaca"
    assert values["datasets_dir"] is None


def test_default_dataset_is_found_in_the_datasets_folder(folder):
    (folder / "sets/demo").mkdir(parents=True)
    (folder / "sets/demo/train.jsonl").write_text("")
    values = values_of(resolve(None, {"DATASETS_DIR": "sets"}, []))
    assert values["dataset"] == f"{folder}/sets/demo/train.jsonl"
