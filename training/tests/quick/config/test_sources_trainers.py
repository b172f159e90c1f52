"""Another trainer's file means here what it means to that trainer."""

import pytest

from support.resolving import (
    from_arguments,
    from_file,
    problem_in,
    problems_in,
    problems_of,
    values_of,
)

AXOLOTL = """
base_model: org/model
datasets: [{path: rows.jsonl, type: chat_template}]
adapter: lora
lora_r: 32
lora_alpha: 16
micro_batch_size: 2
learning_rate: 2e-4
"""
FACTORY = """
model_name_or_path: org/model
finetuning_type: lora
dataset: rows.jsonl
lora_rank: 8
"""
TRL = """
model_name_or_path: org/model
dataset_name: org/rows
use_peft: true
"""


def test_lora_rank_alone_is_scaled_as_in_llama_factory(folder):
    values = values_of(from_file(folder, FACTORY, "factory.yaml"))
    assert (values["lora_r"], values["lora_alpha"]) == (8, 16)
    batch = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    assert (batch, values["num_train_epochs"], values["learning_rate"]) == ((8, 1), 3.0, 5e-5)
    schedule = values["lr_scheduler_type"], values["warmup_ratio"], values["warmup_steps"]
    assert schedule == ("linear", 0.0, None)


@pytest.mark.parametrize("text", [FACTORY, TRL])
def test_steps_of_warmup_win_over_a_share_as_in_transformers(folder, text):
    both = text + "warmup_steps: 50\nwarmup_ratio: 0.1\n"
    values = values_of(from_file(folder, both, "other.yaml"))
    assert values["warmup_steps"] == 50


def test_axolotl_drops_long_rows_and_evaluates_in_its_micro_batches(folder):
    values = values_of(from_file(folder, AXOLOTL, "axolotl.yml"))
    assert (values["too_long"], values["max_seq_length"]) == ("drop", 512)
    assert values["per_device_eval_batch_size"] == values["per_device_train_batch_size"] == 2
    assert (values["lora_r"], values["lora_alpha"], values["lora_dropout"]) == (32, 16, 0.0)


def test_trl_trains_all_tokens_of_two_projections(folder):
    values = values_of(from_file(folder, TRL, "trl.yaml"))
    assert values["lora_target_modules"] == ["q_proj", "v_proj"]
    assert (values["train_on"], values["max_seq_length"]) == ("completion", 1024)
    assert (values["learning_rate"], values["lora_dropout"]) == (2e-5, 0.05)


@pytest.mark.parametrize("text", [AXOLOTL, FACTORY, TRL])
def test_what_a_file_or_the_command_line_says_wins_over_those_defaults(folder, text):
    resolved = from_file(
        folder, text + "num_train_epochs: 7\n", "c.yaml", arguments=["--max_seq_length", "99"]
    )
    values = values_of(resolved)
    assert (values["num_train_epochs"], values["max_seq_length"]) == (7, 99)
    origins = resolved.redacted()["training"]
    assert origins["gradient_accumulation_steps"]["origin"].endswith("'s default")
    assert sum("read as a file of" in warning for warning in resolved.warnings) == 1


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        (AXOLOTL.replace("adapter: lora", "adapter:"), "adapter: lora"),
        (TRL.replace("true", "false"), "use_peft: true"),
        (TRL.replace("use_peft: true", "dataset_train_split: train"), "use_peft: true"),
        (FACTORY.replace("lora\ndataset", "full\ndataset"), "finetuning_type: lora"),
    ],
)
def test_full_fine_tuning_is_refused_and_not_taken_for_lora(folder, text, remedy):
    assert remedy in problem_in(folder, text, "c.yaml").remedy


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        (AXOLOTL.replace("base_model: org/model", "base_model:"), "base model"),
        (FACTORY.replace("dataset: rows.jsonl", "dataset:"), "dataset"),
        (TRL.replace("dataset_name", "dataset_list"), "dataset"),
    ],
)
def test_the_default_job_never_stands_in_for_what_a_file_leaves_out(folder, text, missing):
    problems = problems_in(folder, text, "c.yaml")
    assert any(problem.what.endswith(f"does not name a {missing}") for problem in problems)


@pytest.mark.parametrize("value", ["dpo", "kto", "rm"])
@pytest.mark.parametrize("key", ["stage", "rl"])
def test_preference_training_is_named_as_what_is_not_there(folder, key, value):
    problem = problem_in(folder, f"{key}: {value}\n", "c.yaml")
    assert "no preference training" in problem.why
    assert "TRL" in problem.remedy


@pytest.mark.parametrize(
    ("content", "leaf", "value"),
    [
        ({"bf16": True, "torch_dtype": "bfloat16"}, "bf16", True),
        ({"lora_target_linear": True, "lora_target_modules": ["q_proj"]},
         "lora_target_modules", "all-linear"),
        ({"warmup_steps": 0, "warmup_ratio": 0.1}, "warmup_ratio", 0.1),
        ({"warmup_steps": 500, "warmup_ratio": 0.0}, "warmup_steps", 500),
        ({"save_strategy": "no"}, "save_steps", 0),
        ({"max_steps": "20_000"}, "max_steps", 20_000),
        ({"run_name": "20_000"}, "run_name", "20_000"),
        ({"hub_token": "<HUB_TOKEN>"}, "hf_token", None),
        ({"log_every_n_steps": 5}, "logging_steps", 5),
        ({"enable_activation_checkpointing": True}, "gradient_checkpointing", True),
    ],
)  # fmt: skip
def test_harmless_spellings_are_taken(folder, content, leaf, value):
    assert values_of(from_file(folder, content))[leaf] == value


@pytest.mark.parametrize(
    ("text", "bf16", "fp16"),
    [
        ("torch_dtype: auto\nbf16: true\n", True, "auto"),
        ("torch_dtype: float32\nbf16: true\n", True, "auto"),
        ("dtype: bfloat16\nbf16: false\nfp16: false\n", True, "auto"),
        ("dtype: float16\nfp16: true\n", "auto", True),
    ],
)
def test_the_precision_of_the_computation_wins_over_that_of_the_weights(folder, text, bf16, fp16):
    values = values_of(from_file(folder, TRL + text, "trl.yaml"))
    assert (values["bf16"], values["fp16"]) == (bf16, fp16)


def sources_of(entries):
    return [(source.path.rpartition("/")[2], source.subset, source.split) for source in entries]


@pytest.mark.parametrize(
    ("text", "trained", "held_out"),
    [
        ("dataset_mixer: {org/a: 1.0}\ndataset_splits: [train_sft, test_sft]\n",
         [("a", None, "train_sft")], [("a", None, "test_sft")]),
        ("dataset_mixture:\n  datasets:\n  - {id: org/a, config: en, split: train, weight: 1.0}\n"
         "  - {path: org/b, columns: [messages]}\n", [("a", "en", "train"), ("b", None, None)], []),
        ("dataset_name: org/a\ndataset_config: en\n", [("a", "en", None)], []),
    ],
)  # fmt: skip
def test_mixtures_of_trl_and_the_alignment_handbook_are_lists(folder, text, trained, held_out):
    mixed = TRL.replace("dataset_name: org/rows\n", text)
    values = values_of(from_file(folder, mixed, "trl.yaml"))
    assert sources_of(values["dataset"]) == trained
    assert sources_of(values["eval_dataset"] or []) == held_out


def test_a_mixture_keeps_its_held_out_share(folder):
    mixture = "dataset_mixture: {datasets: [{path: org/a}], test_split_size: 0.1}\n"
    mixed = TRL.replace("dataset_name: org/rows\n", mixture)
    assert values_of(from_file(folder, mixed, "trl.yaml"))["eval_fraction"] == 0.1


@pytest.mark.parametrize(
    "mixture",
    ["dataset_mixer: {org/a: 0.5}", "dataset_mixture: {datasets: [{id: org/a, weight: 0.5}]}"],
)
def test_a_mixture_of_fractions_is_refused_with_the_key_for_it(folder, mixture):
    problem = problem_in(folder, TRL.replace("dataset_name: org/rows", mixture), "trl.yaml")
    assert "max_samples" in problem.why


def test_a_mixture_gives_way_to_the_dataset_of_the_command_line(folder):
    mixed = TRL.replace("dataset_name: org/rows", "dataset_mixer: {org/a: 0.5}")
    values = values_of(from_file(folder, mixed, "trl.yaml", arguments=["--dataset", "org/b"]))
    assert values["dataset"] == "org/b"


def test_two_spellings_that_differ_are_still_given_twice(folder):
    problem = problem_in(folder, {"bf16": True, "torch_dtype": "float32"})
    assert "given twice" in problem.what


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("save_strategy", "best", "save_steps"),
        ("eval_strategy", "best", "evals_per_epoch"),
        ("eval_steps", 0.05, "evals_per_epoch (here 20 times in all epochs together)"),
        ("create_new_adapter", True, "lora-trainer merge"),
        ("datasets", [{"path": "a", "type": {"format": "{input}"}}], "remove type"),
    ],
)
def test_a_refused_key_comes_with_what_to_write(folder, key, value, remedy):
    assert remedy in problem_in(folder, {key: value}).remedy


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("tokenizr_path", "org/model", ""),
        ("tokens_path", "org/model", ""),
        ("lora_rnk", 8, "did you mean lora_r"),
        ("lora_rnk", "none", ""),
        ("hf_tokn", "x", "did you mean hf_token"),
        ("adaptr", "lora", "did you mean adapter"),
    ],
)
def test_a_guess_takes_the_same_kind_of_value(folder, key, value, remedy):
    given = problem_in(folder, {key: value}).remedy
    assert given.startswith(remedy) if remedy else "token" not in given and "lora_r" not in given


@pytest.mark.parametrize(("key", "value"), [("new_system_prompt", "Be brief."), ("filter_fn", "f")])
def test_what_torchtune_would_change_in_the_rows_is_refused(folder, key, value):
    text = f"""
model: {{_component_: torchtune.models.llama3.lora_llama3_8b, lora_attn_modules: [q_proj]}}
checkpointer: {{_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: model}}
dataset: {{_component_: torchtune.datasets.chat_dataset, source: org/rows, {key}: {value}}}
"""
    assert problem_in(folder, text, "torchtune.yaml").what == f"dataset.{key} is set"


def test_torchtunes_validation_is_an_evaluation(folder):
    text = """
model: {_component_: torchtune.models.llama3.lora_llama3_8b, lora_attn_modules: [q_proj]}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: model}
dataset: {_component_: torchtune.datasets.chat_dataset, source: org/rows}
dataset_val: {_component_: torchtune.datasets.chat_dataset, source: org/rows, split: test}
run_val_every_n_steps: 50
batch_size_val: 4
optimizer_in_bwd: false
"""
    values = values_of(from_file(folder, text, "torchtune.yaml"))
    assert sources_of(values["eval_dataset"]) == [("rows", None, "test")]
    assert (values["eval_steps"], values["per_device_eval_batch_size"]) == (50, 4)


@pytest.mark.parametrize("text", [AXOLOTL, FACTORY, TRL])
def test_every_file_is_told_that_packing_does_not_change_the_batch(folder, text):
    warnings = from_file(folder, text, "other.yaml").warnings
    assert any("the batch sizes count rows" in warning for warning in warnings)


def test_lists_on_the_command_line_may_be_words(folder):
    words = ("--lora_target_modules", "q_proj", "v_proj", "--report_to", "wandb", "tensorboard")
    values = values_of(from_arguments(*words))
    assert values["lora_target_modules"] == ["q_proj", "v_proj"]
    assert values["report_to"] == ["wandb", "tensorboard"]


@pytest.mark.parametrize("flag", [["--config_format", "trl"], ["--config-format=trl"]])
def test_config_format_says_whose_file_it_is(folder, flag):
    text = "model_name_or_path: org/model\ndataset: rows.jsonl\nlora_r: 4\nuse_peft: true\n"
    named = values_of(from_file(folder, text, "c.yaml", arguments=flag))
    assert (named["lora_dropout"], named["num_train_epochs"]) == (0.05, 3.0)
    own = values_of(from_file(folder, text, "c.yaml", arguments=["--config_format", "own"]))
    assert (own["lora_dropout"], own["num_train_epochs"]) == (0.0, 1.0)


def test_an_unknown_config_format_lists_the_known_ones(folder):
    problems = problems_of(None, {}, ["--config_format", "megatron"])
    assert "axolotl|llamafactory" in problems[0].remedy


def test_an_adapter_of_another_kind_is_refused(folder):
    problem = problem_in(folder, AXOLOTL.replace("adapter: lora", "adapter: ia3"), "c.yml")
    assert problem.what.startswith("adapter cannot be ")
