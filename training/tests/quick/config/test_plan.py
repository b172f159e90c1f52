"""The plan resolves every number, and the machine's facts respect its limits."""

from __future__ import annotations

import pytest

from lora_trainer.batch import NOT_BEGUN, RunBatch
from lora_trainer.config.schema import Config, TrainingSection
from lora_trainer.errors import ConfigError
from lora_trainer.machine import (
    UNLIMITED_BYTES,
    Gpu,
    Machine,
    cgroup_memory_limit_bytes,
    free_disk_bytes,
    peak_memory_bytes,
    read_machine,
)
from lora_trainer.memory_estimate import DataProfile, ModelSize, loss_chunk
from lora_trainer.plan import choose_parallelism, make_plan, process_count

SHAPE = ModelSize("llama", 30, 576, 49152, 134_515_008, 4_884_480, 8192)
MACHINE = Machine(cores=2, memory_bytes=24 << 30, gpus=())


def plan_of(machine=MACHINE, data=None, **sections):
    return make_plan(
        Config.model_validate(sections),
        machine,
        SHAPE,
        data or DataProfile(101, 5000, 1000, 50, eval_rows=8),
        precision="float32",
        attention="packed",
        padding_free=True,
        count=lambda work: sum(work.lengths) * 1_000_000,
    )


def test_steps_follow_from_rows_batches_and_epochs():
    training = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2.5,
        "warmup_ratio": 0.1,
    }
    plan = plan_of(training=training)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (13, 33, 4)


def test_max_steps_overrides_epochs_and_warmup_steps_the_ratio():
    plan = plan_of(training={"max_steps": 7, "warmup_steps": 100})
    assert (plan.total_steps, plan.warmup_steps) == (7, 7)


def test_evaluation_needs_held_out_rows():
    data = DataProfile(101, 5000, 1000, 50, eval_rows=0)
    assert plan_of(data=data, training={"eval_steps": 5}).eval_every_steps == 0


def test_what_happens_so_often_per_epoch_happens_at_its_end_too():
    training = {"per_device_train_batch_size": 4, "evals_per_epoch": 4}
    plan = plan_of(training=training, output={"saves_per_epoch": 1})
    assert plan.steps_per_epoch == 26
    assert (plan.eval_every_steps, plan.save_every_steps) == (7, 26)


def test_checkpointing_goes_on_by_itself_when_memory_is_short():
    data = DataProfile(101, 500_000, 1000, 8192)
    short = Machine(cores=2, memory_bytes=8 << 30, gpus=())
    plan = plan_of(machine=short, data=data)
    assert plan.gradient_checkpointing
    assert "gradient checkpointing is on" in plan.reasons[0]
    assert not plan_of(machine=MACHINE).gradient_checkpointing


@pytest.mark.parametrize(
    ("vocabulary", "device", "positions"),
    [
        (4096, "cpu", 1024),
        (49_152, "cpu", 320),
        (131_072, "cpu", 128),
        (262_144, "cpu", 128),
        (128_256, "cuda", 1024),
        (262_144, "cuda", 512),
    ],
)
def test_logits_of_a_chunk_take_no_more_memory_with_a_larger_vocabulary(
    vocabulary, device, positions
):
    assert loss_chunk(TrainingSection(), vocabulary, device) == positions


def test_the_plan_says_how_many_positions_go_through_the_head_at_a_time():
    assert plan_of().loss_chunk_tokens == 320
    assert plan_of(training={"loss_chunk_tokens": 7}).loss_chunk_tokens == 7


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        plan_of(data=DataProfile(0, 0, 0, 0))


def test_a_gpu_decides_device_and_memory():
    gpu = Gpu(0, "H200", 139 << 30, (9, 0))
    plan = plan_of(machine=Machine(cores=16, memory_bytes=1 << 37, gpus=(gpu,)))
    assert (plan.device, plan.memory_limit_bytes) == ("cuda", 139 << 30)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("memory.max", "max", UNLIMITED_BYTES),
        ("memory.max", "1073741824", 1 << 30),
        ("memory/memory.limit_in_bytes", "9223372036854771712", UNLIMITED_BYTES),
        ("memory/memory.limit_in_bytes", "2147483648", 2 << 30),
    ],
)
def test_the_cgroups_memory_limit_is_read_in_both_versions(tmp_path, name, text, expected):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n")
    assert cgroup_memory_limit_bytes(tmp_path) == expected


def test_this_machine_is_read():
    machine = read_machine()
    assert machine.cores >= 1
    assert machine.memory_bytes > 1 << 28
    assert peak_memory_bytes() > 1 << 20


def test_free_disk_is_told_for_a_folder_that_is_not_there_yet(tmp_path):
    assert free_disk_bytes(tmp_path / "a" / "b") > 0


GPUS = tuple(Gpu(index, "A100", 40 << 30, (8, 0)) for index in range(4))
FOUR = Machine(cores=16, memory_bytes=1 << 38, gpus=GPUS)
SEVEN_BILLION = ModelSize("llama", 32, 4096, 32000, 6_738_415_616, 40_000_000, 4096)
SEVENTY_BILLION = ModelSize("llama", 80, 8192, 32000, 68_976_648_192, 80_000_000, 4096)


def parallelism_of(shape, machine=FOUR, processes=4, **sections):
    config = Config.model_validate(sections)
    return choose_parallelism(config, machine, shape, "bfloat16", processes)


def test_each_visible_gpu_has_a_process_and_a_cpu_one():
    assert process_count(Config(), FOUR) == 4
    assert process_count(Config(), MACHINE) == 1
    assert process_count(Config.model_validate({"training": {"nproc": 3}}), MACHINE) == 3


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(ConfigError, match="nproc 5 is more than the visible GPUs"):
        process_count(Config.model_validate({"training": {"nproc": 5}}), FOUR)


def test_base_that_fits_on_one_device_is_whole_on_each():
    assert parallelism_of(SEVEN_BILLION) == ("ddp", "")
    assert parallelism_of(SEVEN_BILLION, processes=1) == ("none", "")


def test_base_that_does_not_fit_on_one_device_is_shared_out():
    parallelism, why = parallelism_of(SEVENTY_BILLION)
    assert parallelism == "fsdp"
    assert "the base model needs 138.5 GB per process, and each has 42.9 GB" in why


def test_processes_without_a_gpu_share_the_memory_of_the_machine():
    small = Machine(cores=4, memory_bytes=32 << 30, gpus=())
    assert parallelism_of(SEVEN_BILLION, small, 2)[0] == "ddp"
    assert parallelism_of(SEVEN_BILLION, small, 4)[0] == "fsdp"


def test_base_that_fits_in_4_bits_is_whole_on_each_and_otherwise_shared_out():
    small = Machine(8, 1 << 38, (Gpu(0, "small", 24 << 30, (8, 9)),) * 4)
    assert parallelism_of(SEVENTY_BILLION, model={"use_4bit": True})[0] == "ddp"
    parallelism, why = parallelism_of(SEVENTY_BILLION, small, model={"use_4bit": True})
    assert parallelism == "fsdp"
    assert "each has 25.8 GB" in why


def test_parallelism_that_was_asked_for_is_taken():
    asked = {"training": {"parallelism": "fsdp"}}
    assert parallelism_of(SEVEN_BILLION, **asked) == ("fsdp", "")


def test_offloading_is_for_one_process_too():
    asked = {"training": {"parallelism": "deepspeed", "offload_param_device": "cpu"}}
    assert parallelism_of(SEVEN_BILLION, processes=1, **asked) == ("deepspeed", "")
    assert parallelism_of(SEVEN_BILLION, **asked) == ("deepspeed", "")
    _, why = parallelism_of(SEVENTY_BILLION, **asked)
    assert "553.9 GB are needed, and the machine has 274.9 GB" in why
    del asked["training"]["offload_param_device"]
    parallelism, why = parallelism_of(SEVEN_BILLION, processes=1, **asked)
    assert parallelism == "none"
    assert why.startswith("deepspeed is not used")


def test_float16_takes_the_memory_of_bfloat16():
    data = DataProfile(101, 5000, 1000, 50)
    needed = [
        make_plan(
            Config(), MACHINE, SHAPE, data, precision=one, attention="sdpa", padding_free=True
        ).estimated_memory_bytes
        for one in ("float16", "bfloat16", "float32")
    ]
    assert needed[0] == needed[1] < needed[2]


def shared(processes, parallelism="ddp", begun=NOT_BEGUN, **training):
    return make_plan(
        Config.model_validate({"training": training}),
        FOUR,
        SEVEN_BILLION,
        DataProfile(101, 5000, 1000, 50, eval_rows=8),
        precision="bfloat16",
        attention="packed",
        padding_free=True,
        processes=processes,
        parallelism=parallelism,
        begun=begun,
    )


BY_EXAMPLES = {"max_tokens_per_micro_batch": 0}


def batch_of(plan):
    return plan.micro_batch_examples, plan.micro_batches, plan.processes, plan.step_examples


def test_step_of_a_new_run_grows_with_the_number_of_processes():
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, **BY_EXAMPLES}
    assert batch_of(shared(1, "none", **training)) == (2, 4, 1, 8)
    plan = shared(4, **training)
    assert batch_of(plan) == (2, 4, 4, 32)
    assert plan.to_dict()["batch"] == "2 per device x 4 accumulated x 4 processes = 32 examples"


def test_run_with_the_default_config_uses_every_gpu():
    assert batch_of(shared(8)) == (4, 1, 8, 32)
    assert not shared(8).reasons


def tokens_of(plan):
    return plan.micro_batch_tokens, plan.step_micro_batches


def test_micro_batch_holds_no_more_tokens_than_so_many_of_the_longest_rows():
    data = DataProfile(100, 20_000, 1000, 800)
    training = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    plan = plan_of(data=data, training=training)
    assert tokens_of(plan) == (1024, 4)  # 16 examples of 200 tokens on average
    training["per_device_train_batch_size"] = 1
    assert tokens_of(plan_of(data=data, training=training)) == (800, 1)
    gpu = Machine(16, 1 << 37, (Gpu(0, "H200", 139 << 30, (9, 0)),))
    training["per_device_train_batch_size"] = 64
    assert tokens_of(plan_of(gpu, data, training=training)) == (8192, 4)


def test_budget_may_be_given_or_left_to_the_examples():
    data = DataProfile(100, 20_000, 1000, 800)
    plan = plan_of(data=data, training={"max_tokens_per_micro_batch": 400})
    assert tokens_of(plan) == (400, 2)
    assert plan.to_dict()["batch"] == (
        "4 per device x 1 accumulated x 1 process = 4 examples, in about 2 micro-batches of up to "
        "400 tokens"
    )
    plan = plan_of(data=data, training={"max_tokens_per_micro_batch": 10**9})
    assert tokens_of(plan) == (1 << 24, 1)
    plan = plan_of(data=data, training={"max_tokens_per_micro_batch": 0})
    assert tokens_of(plan) == (0, 1)
    assert "tokens" not in plan.to_dict()["batch"]


def test_short_memory_makes_micro_batches_smaller_before_layers_are_checkpointed():
    data = DataProfile(100, 20_000, 1000, 300)
    training = {"per_device_train_batch_size": 8}

    def on(gigabytes):
        machine = Machine(cores=2, memory_bytes=gigabytes * 10**9, gpus=())
        return make_plan(
            Config.model_validate({"training": training}), machine, SHAPE, data,
            precision="float32", attention="packed", padding_free=True,
            count=lambda work: sum(work.lengths) * 5_000_000 // (1 + work.gradient_checkpointing),
        )  # fmt: skip

    assert (on(12).micro_batch_tokens, on(12).gradient_checkpointing) == (1024, False)
    assert (on(5).micro_batch_tokens, on(5).gradient_checkpointing) == (512, False)
    assert "at most 512 instead of 1,024 tokens" in on(5).reasons[0]
    assert (on(3).micro_batch_tokens, on(3).gradient_checkpointing) == (1024, True)


def test_continued_run_keeps_its_micro_batches_on_another_machine():
    begun = shared(4, per_device_train_batch_size=2)
    assert begun.run_batch == "8.4.100"
    plan = shared(1, "none", begun=RunBatch.parse(begun.run_batch))
    assert (plan.step_examples, plan.micro_batch_tokens, plan.micro_batch_multiple) == (8, 100, 4)
    assert plan.run_batch == begun.run_batch
    assert RunBatch.parse("8.4") == RunBatch.parse("") == NOT_BEGUN


def test_run_that_began_before_budgets_goes_on_by_examples():
    plan = shared(1, "none", begun=RunBatch.parse("8"))
    assert (plan.step_examples, plan.micro_batch_tokens, plan.run_batch) == (8, 0, "8")


def test_run_that_has_begun_keeps_its_budget_where_memory_is_short():
    data = DataProfile(100, 20_000, 1000, 300)

    def on(gigabytes, begun):
        machine = Machine(cores=2, memory_bytes=gigabytes * 10**9, gpus=())
        return make_plan(
            Config(), machine, SHAPE, data, begun=begun,
            precision="float32", attention="packed", padding_free=True,
            count=lambda work: sum(work.lengths) * 5_000_000 // (1 + work.gradient_checkpointing),
        )  # fmt: skip

    plan = on(5, RunBatch(8, 1, 1024))
    assert (plan.micro_batch_tokens, plan.gradient_checkpointing) == (1024, True)


def test_largest_batch_of_a_budget_has_no_more_examples_than_a_step():
    data = DataProfile(100, 20_000, 1000, 300, longest_rows=(300, 200, 100))
    assert data.fill(560, 8, is_padded=False) == (300, 200, 60)
    assert data.fill(100, 8, is_padded=False) == (300,)
    assert data.fill(10_000, 2, is_padded=False) == (300, 200)
    assert data.fill(1000, 8, is_padded=True) == (250,) * 4
    assert data.fill(10_000, 2, is_padded=True) == (300, 300)


def test_continued_run_keeps_its_step_and_changes_the_accumulation():
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    plan = shared(2, begun=RunBatch(32, 4, 0), **training)
    assert batch_of(plan) == (2, 8, 2, 32)
    assert plan.reasons[-1] == (
        "a step keeps the 32 examples that this run began with; a new run with 2 processes "
        "would have 16"
    )


def test_train_batch_size_is_the_step_whatever_the_number_of_processes():
    plans = [shared(count, train_batch_size=24, **BY_EXAMPLES) for count in (1, 3, 4)]
    assert [batch_of(plan) for plan in plans] == [(4, 6, 1, 24), (4, 2, 3, 24), (4, 2, 4, 24)]
    assert plans[2].to_dict()["batch"] == (
        "24 examples, at most 4 per device x 2 accumulated x 4 processes"
    )


def test_micro_batch_is_cut_where_a_step_has_too_few_for_the_processes():
    plan = shared(4, per_device_train_batch_size=6, train_batch_size=6, **BY_EXAMPLES)
    assert batch_of(plan) == (2, 1, 4, 6)
    assert "micro-batches have 2 instead of 6 examples" in plan.reasons[-1]


def test_processes_without_an_example_are_told_of():
    plan = shared(4, train_batch_size=3)
    assert plan.reasons[-1].startswith("1 of 4 processes have nothing to do")


def test_sharing_a_base_out_takes_less_memory_a_process():
    whole, part = shared(4), shared(4, "fsdp")
    assert part.estimated_memory_bytes < whole.estimated_memory_bytes - (8 << 30)


def test_layers_in_the_hosts_memory_take_none_of_the_gpu():
    kept, gone = (shared(1, "deepspeed", offload_param_device=device) for device in ("none", "cpu"))
    assert gone.estimated_memory_bytes < 5 << 30 < 12 << 30 < kept.estimated_memory_bytes
