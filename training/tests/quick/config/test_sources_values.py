"""Values that misfit or disagree, all at once, and none of them a secret."""

import json

import pytest

from lora_trainer.errors import ConfigError
from lora_trainer.run_folder import OWN_NAMES
from support.resolving import from_file, problem_in, problems_in, problems_of, write


def test_all_problems_of_all_sources_come_at_once(folder):
    path = write(folder, {"lora_r": 0, "sed": 1, "bf16": "maybe"})
    environ = {"LORA_TRAINER_SEED": "-1", "LORA_TRAINER_SEEED": "1"}
    problems = problems_of(path, environ, ["--max_steps", "0", "--lora-alpha", "x", "--nope"])
    assert {problem.what.split()[0] for problem in problems} == {
        "lora_r", "sed", "bf16", "seed", "LORA_TRAINER_SEEED", "max_steps", "lora_alpha", "--nope",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "what", "remedy"),
    [
        ({"learning_rate": "1e-4"}, "'1e-4' (text)", "without quotes"),
        ({"max_steps": 10.0}, "10.0 (a number)", "write 10"),
        ({"lr_scheduler_type": "cosin"}, "'cosin' (text)", "did you mean cosine?"),
        ({"init_lora_weights": "pisa"}, "'pisa' (text)", "did you mean pissa?"),
        ({"seed": True}, "true (a truth value)", "--seed 42"),
        ({"run_name": "a/b"}, "'a/b' (text)", ""),
        ({"lora_r": [1]}, "a list of 1", ""),
        ({"dataset": 3}, "3 (a whole number)", "--dataset '["),
    ],
)
def test_misfit_value_tells_what_was_found_and_what_to_write(folder, content, what, remedy):
    problem = problem_in(folder, content)
    assert what in problem.what
    assert problem.why.startswith("it takes: ")
    assert remedy in problem.remedy


@pytest.mark.parametrize(
    ("content", "what", "why"),
    [
        ({"lora_r": 5000}, "lora_r cannot be 5000", "it must be at most 4096"),
        ({"lora_r": 0}, "lora_r cannot be 0", "it must be at least 1"),
        ({"seed": 5_000_000_000}, "seed cannot be 5000000000", "it must be less than 4294967296"),
        ({"lora_dropout": 1}, "lora_dropout cannot be 1", "it must be less than 1"),
        ({"learning_rate": -0.1}, "learning_rate cannot be -0.1", "it must be at least 0"),
        ({"nproc": 10**10}, "nproc cannot be 10000000000", "it must be at most 1000000000"),
    ],
)
def test_a_number_out_of_range_names_the_limit_and_no_type(folder, content, what, why):
    problem = problem_in(folder, content)
    assert (problem.what, problem.why) == (what, why)


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ({"lora_r": 8.0}, "write 8"),
        ({"lora_r": 5000.0}, "--lora_r 16 is the default"),
        ({"learning_rate": 20.0}, "--learning_rate 0.0002 is the default"),
    ],
)
def test_a_whole_number_is_the_remedy_only_where_it_is_valid(folder, content, remedy):
    assert problem_in(folder, content).remedy == remedy


def test_misfits_within_a_list_of_datasets_are_placed(folder):
    content = '{"data": {"dataset": ["a",\n {"path": "", "weigth": 2},\n {"weight": 1}]}}'
    problems = problems_in(folder, content)
    assert {(p.what.split()[0], p.where.partition("config.json")[2]) for p in problems} == {
        ("dataset[1].path", ":2 /data/dataset/1/path"),
        ("dataset[1].weigth", ":2 /data/dataset/1/weigth"),
        ("dataset[2]", ":3 /data/dataset/2"),
    }


@pytest.mark.parametrize(
    ("path", "environ", "arguments"),
    [
        ('{"hf_token": ["hf_sesame"]}', {}, []),
        ('{"hf_token": {"hf_sesame": 1}}', {}, []),
        ('{"hf_token": "hf_sesame" "x"}', {}, []),
        ('{"hf_tokne": "hf_sesame"}', {}, []),
        ('{"hf_token": "hf_sesame", "token": "hf_sesame2"}', {}, []),
        ("{}", {"LORA_TRAINER_HF_TOKN": "hf_sesame"}, []),
        ("{}", {}, ["--hf_token", "x", "hf_sesame"]),
        ("{}", {}, ["--hf_tokn", "hf_sesame"]),
        ("{}", {}, ["--hf_tokn=hf_sesame"]),
        ("{}", {}, ["--set", "hf_tokn=hf_sesame"]),
        ("{}", {}, ["hf_token=hf_sesame"]),
    ],
)
def test_no_error_shows_a_secret(folder, path, environ, arguments):
    problems = problems_of(write(folder, path), environ, arguments)
    assert "hf_sesame" not in ConfigError(problems).block()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"use_4bit": True, "use_8bit": True}, "use_8bit are both"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both true"),
        ({"eval_dataset": "a", "eval_fraction": 0.1}, "eval_fraction are both"),
        ({"load_best_model_at_end": True}, "without held-out"),
        ({"load_best_model_at_end": True, "eval_fraction": 0.1}, "eval_steps 0"),
        ({"early_stopping_patience": 2}, "without held-out"),
        ({"early_stopping_patience": 2, "eval_dataset": "a"}, "eval_steps 0"),
        ({"eval_generate": True}, "without held-out"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_ratio are both"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"init_lora_weights": "pissa", "use_4bit": True}, "not quantized"),
        ({"init_lora_weights": "pissa_niter_4", "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "olora", "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "use_dora"),
        ({"init_lora_weights": "olora", "use_dora": True}, "use_dora"),
        ({"init_lora_weights": "olora", "use_8bit": True}, "not quantized"),
        ({"init_lora_weights": "loftq"}, "needs use_4bit"),
        ({"init_lora_weights": "loftq", "use_4bit": True, "use_dora": True}, "use_dora"),
        ({"init_lora_weights": "orthogonal", "lora_r": 7}, "even lora_r"),
        ({"target_parameters": "experts.w", "lora_dropout": 0.1}, "combined with lora_dropout"),
        ({"lora_target_parameters": ["experts.w"], "use_dora": True}, "combined with use_dora"),
        ({"lora_target_parameters": ["experts.w"], "use_4bit": True}, "not quantized"),
        (
            {"lora_target_parameters": ["w"], "init_lora_weights": "olora"},
            "true, false or gaussian",
        ),
        (
            {"lora_target_parameters": ["w"], "parallelism": "deepspeed"},
            "combined with parallelism",
        ),
        ({"use_flash_attention": "flash-attn", "bf16": False}, "flash-attn needs bf16"),
        ({"use_flash_attention": "flash-attn", "padding_free": False}, "needs padding_free"),
        ({"loraplus_lr_ratio": 1e6, "learning_rate": 1}, "over 10"),
        ({"chat_template": "vicuna"}, "chat_template"),
        ({"use_dora": True, "parallelism": "deepspeed"}, "use_dora"),
        ({"offload_param_device": "cpu"}, "offload_param_device without"),
        (
            {"train_batch_size": 30, "gradient_accumulation_steps": 2},
            "train_batch_size is not a multiple",
        ),
    ],
)
def test_conflicting_values_are_refused(folder, content, words):
    problem = problem_in(folder, content)
    assert words in problem.what
    assert all(f"/{key}" in problem.where for key in content if key in problem.what)


@pytest.mark.parametrize(
    "name",
    sorted(name for name in OWN_NAMES | {name.casefold() for name in OWN_NAMES} if name[0] != "."),
)
def test_no_run_is_named_like_a_file_of_the_run_without_a_name(folder, name):
    problem = problem_in(folder, json.dumps({"run_name": name}))
    assert "run_name" in problem.where
    assert problem.remedy == "use another run_name"


def test_conflict_over_two_sources_names_both(folder):
    problem = problems_of(write(folder, {"use_4bit": True}), {}, ["--use_8bit"])[0]
    assert problem.where.endswith("config.json:1 /use_4bit, --use_8bit")


@pytest.mark.parametrize(
    "content",
    [
        {"bnb_4bit_quant_type": "fp4"},
        {"gradient_accumulation_steps": 2, "train_batch_size": 32},
        {"max_bad_rows_share": 0.1},
        {"eval_steps": 10},
        {"early_stopping_threshold": 0.1},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"sample_packing": True},
    ],
)
def test_what_has_no_effect_is_warned_of(folder, content):
    (warning,) = from_file(folder, content).warnings
    assert f"/{next(iter(content))}" in warning
