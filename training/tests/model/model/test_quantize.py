"""A base model in 4 and 8 bits: what it computes, what it holds, and what is refused."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.utils import is_bitsandbytes_available

from lora_trainer.config.schema import Config, LoraSection, ModelSection, TrainingSection
from lora_trainer.errors import ConfigError
from lora_trainer.memory_estimate import DataProfile, ModelSize, estimate_memory_bytes
from lora_trainer.model import load, loftq, quantize, stacks
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.forward import CausalLM, MicroBatch
from lora_trainer.model.probe import verify
from lora_trainer.train.checkpoint import TrainState, restore_optimizer, take_snapshot
from lora_trainer.train.optim import make_optimizer
from support.quantized import load_base, make_batch, needs_bitsandbytes

KINDS = {
    "nf4": {"use_4bit": True, "bnb_4bit_use_double_quant": False},
    "nf4-double": {"use_4bit": True},
    "fp4": {"use_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "fp4-double": {"use_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8bit": {"use_8bit": True},
}

# transformers keeps its first answer, which must not be that of a test that hides the package.
is_bitsandbytes_available()


def causal_of(model) -> CausalLM:
    return CausalLM(model, device="cpu", padding_free=True, chunk=5, precision="float32")


def train(causal: CausalLM, optimizer, batch: MicroBatch, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = causal.loss(batch) / batch.targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def forget_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start as if it was never imported; the test's end restores what is there now."""
    monkeypatch.setitem(sys.modules, quantize.PACKAGE, None)
    del sys.modules[quantize.PACKAGE]


@pytest.mark.parametrize(
    ("settings", "own_config", "is_hidden"),
    [
        ({}, {}, True),
        ({"use_4bit": True}, {}, False),
        ({"optim": "adamw_8bit"}, {}, False),
        ({}, {"quantization_config": {"load_in_4bit": True}}, False),
        ({}, None, False),
    ],
    ids=["not needed", "4 bits", "8-bit optimizer", "base held in 4 bits", "base on the hub"],
)
def test_package_that_nothing_needs_is_not_imported(
    tmp_path, monkeypatch, settings, own_config, is_hidden
):
    forget_bitsandbytes(monkeypatch)
    if own_config is not None:
        (tmp_path / "config.json").write_text(json.dumps(own_config))
    training = TrainingSection(**{k: v for k, v in settings.items() if k == "optim"})
    section = ModelSection(
        model_name_or_path=str(tmp_path) if own_config is not None else "someone/model",
        **{k: v for k, v in settings.items() if k != "optim"},
    )
    quantize.skip_bitsandbytes_import(Config(model=section, training=training))
    assert (quantize.PACKAGE in sys.modules) == is_hidden
    assert not is_hidden or importlib.util.find_spec(quantize.PACKAGE) is None


@pytest.mark.parametrize(
    ("own_config", "is_hidden"), [({}, True), ({"quantization_config": {}}, False)]
)
def test_config_of_a_fetched_model_says_whether_it_needs_the_package(
    tmp_path, monkeypatch, own_config, is_hidden
):
    forget_bitsandbytes(monkeypatch)
    commit = tmp_path / "models--someone--model" / "snapshots" / ("a" * 40)
    commit.mkdir(parents=True)
    (commit / "config.json").write_text(json.dumps(own_config))
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("a" * 40)
    section = ModelSection(model_name_or_path="someone/model", model_cache_dir=str(tmp_path))
    quantize.skip_bitsandbytes_import(Config(model=section))
    assert (quantize.PACKAGE in sys.modules) == is_hidden


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_base_learns_packed_and_in_chunks(folder, kind):
    model = add_adapter(load_base(folder, **KINDS[kind]), LoraSection(lora_r=4), seed=1)
    causal = causal_of(model)
    assert verify(causal) == ""
    assert causal.packed is not None
    model.train()
    batch = make_batch()
    parameters = trainable_parameters(model)
    assert all(p.dtype == torch.float32 for p in parameters.values())
    optimizer = make_optimizer(parameters, TrainingSection(learning_rate=0.01))
    before = causal.score(batch)[0] / batch.targets
    losses = train(causal, optimizer, batch, 8)
    # An evaluation computes what a training step does.
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert losses[-1] < losses[0] - 0.3


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4-double", "8bit"])
def test_chunked_loss_and_gradients_are_those_of_the_whole_logits(folder, kind):
    batch, results = make_batch(), []
    for is_ours in (True, False):
        model = add_adapter(load_base(folder, **KINDS[kind]), LoraSection(lora_r=4), seed=1)
        model.train()
        if is_ours:
            loss = causal_of(model).loss(batch)
        else:
            loss = torch.zeros(())
            for ids, marks in zip(batch.ids, batch.loss_mask, strict=True):
                labels = torch.where(torch.as_tensor(marks), torch.as_tensor(ids), -100)[None]
                own = model(input_ids=torch.as_tensor(ids)[None], labels=labels).loss
                loss = loss + own * int(marks[1:].sum())
        loss.backward()
        gradients = {n: p.grad for n, p in trainable_parameters(model).items()}
        results.append((float(loss.detach()), gradients))
    (loss, gradients), (expected, expected_gradients) = results
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_plan_knows_what_a_quantized_base_holds(folder, kind):
    model = load_base(folder, **KINDS[kind])
    plain = load_base(folder)
    assert quantize.count_parameters(model) == quantize.count_parameters(plain)
    parameters, kept = quantize.count_parameters(plain)
    assert quantize.held_bytes(plain) == 4 * parameters
    data = DataProfile(1, 1, 1, 1)

    def estimated(**keys) -> int:
        shape = ModelSize("llama", 2, 32, 1, parameters, 0, 256, kept)
        config = Config(model=ModelSection(**keys), training=TrainingSection(loss_chunk_tokens=1))
        return estimate_memory_bytes(config, shape, data, "float32", has_checkpointing=False)

    saved = quantize.held_bytes(plain) - quantize.held_bytes(model)
    assert estimated() - estimated(**KINDS[kind]) == pytest.approx(saved, rel=0.05)


@needs_bitsandbytes
def test_only_norms_are_widened(folder):
    model = load_base(folder, dtype=torch.bfloat16, use_4bit=True)
    types = {name: p.dtype for name, p in model.named_parameters()}
    assert types["model.norm.weight"] == torch.float32
    assert types["model.layers.0.input_layernorm.weight"] == torch.float32
    assert types["model.embed_tokens.weight"] == types["lm_head.weight"] == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())


@needs_bitsandbytes
def test_evaluation_repacks_no_weights_that_training_needs(folder, monkeypatch):
    model = load_base(folder, use_4bit=True)
    layers = [m for m in model.modules() if quantize.is_quantized_linear(m)]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    model.eval()
    causal_of(model).score(make_batch())
    assert not quantize.is_prepacked(model)


@needs_bitsandbytes
def test_rows_of_eight_bit_products_stand_alone_while_they_are_compared(folder):
    model = load_base(folder, use_8bit=True)
    layers = [m for m in model.modules() if quantize.is_quantized_linear(m)]
    with quantize.rows_apart(model):
        assert {layer.state.threshold for layer in layers} == {0.0}
    assert {layer.state.threshold for layer in layers} == {6.0}


@needs_bitsandbytes
@pytest.mark.parametrize("alpha", [4, 16])
def test_loftq_begins_nearer_to_the_full_weights(folder, alpha):
    full = load_file(folder / "model.safetensors")
    section = LoraSection(lora_r=4, lora_alpha=alpha, init_lora_weights="loftq")
    model = add_adapter(load_base(folder, use_4bit=True), section, seed=1)
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    loftq.begin_from_residuals(model, folder)
    for name, layer in layers.items():
        residual = full[f"{name}.weight"] - loftq._widened(layer.get_base_layer().weight)
        left = residual - layer.get_delta_weight("default").detach()
        kept = torch.linalg.svdvals(residual)[4:]
        # Eckart and Young: what is left are the singular values beyond the rank.
        assert float(left.norm()) == pytest.approx(float(kept.norm()), rel=1e-3)


@needs_bitsandbytes
def test_loftq_refuses_weights_under_other_names(folder, tmp_path):
    section = LoraSection(lora_r=4, init_lora_weights="loftq")
    model = add_adapter(load_base(folder, use_4bit=True), section, seed=1)
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="loftq"):
        loftq.begin_from_residuals(model, tmp_path)


def test_a_low_rank_beyond_the_matrix_is_filled_with_zeros():
    residual = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    a, b = loftq.low_rank(residual, 4)
    assert (a.shape, b.shape) == ((4, 5), (3, 4))
    torch.testing.assert_close(b @ a, residual)


@needs_bitsandbytes
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_optimizer_state_survives_a_checkpoint_to_the_byte(optim):
    def begin():
        torch.manual_seed(1)
        # One of the two is large enough to be held in 8 bits.
        shapes = {"large": (64, 128), "small": (8, 4)}
        parameters = {n: torch.nn.Parameter(torch.randn(s)) for n, s in shapes.items()}
        return parameters, make_optimizer(parameters, TrainingSection(optim=optim))

    def step(parameters, optimizer, number):
        draw = torch.Generator().manual_seed(number)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()

    parameters, optimizer = begin()
    for number in range(3):
        step(parameters, optimizer, number)
    taken = take_snapshot(TrainState(step=3), {}, optimizer, parameters, "x")
    resumed, other = begin()
    for name, parameter in resumed.items():
        parameter.data.copy_(parameters[name].data)
    restore_optimizer(taken, other, resumed)
    for number in range(3, 6):
        step(parameters, optimizer, number)
        step(resumed, other, number)
    for name, parameter in resumed.items():
        assert torch.equal(parameter, parameters[name])
    if optim == "adamw_8bit":
        assert taken.optimizer["large.state1"].dtype == torch.uint8
        assert taken.optimizer["small.state1"].dtype == torch.float32
        assert not any("qmap" in key for key in taken.optimizer)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "8bit"])
def test_base_that_is_stored_in_fewer_bits_is_taken_as_it_is(folder, kind, tmp_path):
    base = load_base(folder, **KINDS[kind])
    base.save_pretrained(tmp_path)
    section, source = ModelSection(), load.ModelSource(str(tmp_path), "stored")
    config, _ = quantize.apply_stored_quantization(
        Config(), load.load_config(source, section), has_gpu=False
    )
    assert (config.model.use_4bit, config.model.use_8bit) == (kind == "nf4", kind == "8bit")
    if kind == "nf4":
        assert config.model.bnb_4bit_use_double_quant is False  # as stored; true by default
    stored = load.load_model(source, section, dtype=torch.float32, device="cpu", attention="sdpa")
    assert quantize.held_bytes(stored) == quantize.held_bytes(base)
    batch = make_batch()
    assert causal_of(stored).score(batch) == pytest.approx(causal_of(base).score(batch), rel=1e-5)
    model = add_adapter(stored, LoraSection(lora_r=4), seed=1)
    model.train()
    optimizer = make_optimizer(trainable_parameters(model), TrainingSection(learning_rate=0.01))
    losses = train(causal_of(model), optimizer, batch, 8)
    assert losses[-1] < losses[0] - 0.3


def test_base_that_something_else_packed_is_refused_by_its_name():
    shape = LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match="quantized by gptq"):
        quantize.apply_stored_quantization(Config(), shape, has_gpu=True)
    assert quantize.apply_stored_quantization(Config(), LlamaConfig(), has_gpu=False) == (
        Config(),
        "",
    )


@pytest.mark.parametrize(("version", "is_refused"), [("0.45.5", True), ("0.50.2", False)])
def test_packed_base_is_shared_out_only_if_it_can_be_packed_beside_the_gpu(
    monkeypatch, version, is_refused
):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    config = Config.model_validate({"model": {"use_4bit": True}})
    if is_refused:
        with pytest.raises(ConfigError, match="fsdp with a base in 4 or 8 bits"):
            quantize.check_sharding(config)
    else:
        quantize.check_sharding(config)
    quantize.check_sharding(Config())


def pretend(monkeypatch, version: str) -> None:
    """Let bitsandbytes be installed in a version; "": not at all."""
    real = importlib.metadata.version

    def answer(name: str) -> str:
        if name == quantize.PACKAGE and not version:
            raise importlib.metadata.PackageNotFoundError
        return version if name == quantize.PACKAGE else real(name)

    monkeypatch.setattr(importlib.metadata, "version", answer)


def refusal(monkeypatch, version: str, *, has_gpu: bool = False, **sections) -> str:
    pretend(monkeypatch, version)
    config = Config.model_validate(sections)
    try:
        quantize.check_bitsandbytes(config, has_gpu=has_gpu)
    except ConfigError as error:
        return error.block()
    return ""


def test_quantization_without_the_package_is_refused_with_the_lock_that_holds_it(monkeypatch):
    sections = {"model": {"use_4bit": True}, "training": {"optim": "adamw_8bit"}}
    reasons = refusal(monkeypatch, "", has_gpu=True, **sections)
    assert reasons.count("is not installed") == 2
    assert "--use_4bit false or " in reasons
    assert re.search(r"-r \S+/requirements/(cpu|cu121)\.txt", reasons)
    monkeypatch.setattr(stacks, "LOCKS", Path("/no/requirements"))
    assert "pip" not in refusal(monkeypatch, "", has_gpu=True, **sections)


@pytest.mark.parametrize(
    ("version", "has_gpu", "is_refused"),
    [("0.45.5", False, True), ("0.45.5", True, False), ("0.50.2", False, False)],
)
def test_only_newer_versions_compute_in_eight_bits_on_a_cpu(
    monkeypatch, version, has_gpu, is_refused
):
    reasons = refusal(monkeypatch, version, has_gpu=has_gpu, training={"optim": "adamw_8bit"})
    assert ("0.45.5 does not train on a CPU" in reasons) is is_refused


@pytest.mark.parametrize("key", ["use_4bit", "use_8bit"])
@pytest.mark.parametrize(
    ("version", "lacks"), [("0.45.5", "only quantizes on GPUs"), ("", "not installed")]
)
def test_base_in_fewer_bits_is_whole_where_nothing_can_quantize_it(
    monkeypatch, key, version, lacks
):
    pretend(monkeypatch, version)
    config = Config.model_validate({"model": {key: True}})
    whole, why = quantize.apply_stored_quantization(config, LlamaConfig(), has_gpu=False)
    assert not quantize.is_quantized(whole.model)
    assert f"{key}: the base model is loaded UNQUANTIZED" in why
    assert lacks in why
    assert whole.digest() != config.digest()  # a checkpoint of the one does not continue the other
    if version:
        assert quantize.apply_stored_quantization(config, LlamaConfig(), has_gpu=True) == (
            config,
            "",
        )


def test_loftq_on_a_base_that_cannot_be_quantized_is_refused(monkeypatch):
    pretend(monkeypatch, "0.45.5")
    sections = {"model": {"use_4bit": True}, "lora": {"init_lora_weights": "loftq"}}
    with pytest.raises(ConfigError, match="use_4bit: true needs a GPU"):
        quantize.apply_stored_quantization(
            Config.model_validate(sections), LlamaConfig(), has_gpu=False
        )


@pytest.mark.parametrize("has_gpu", [True, False])
def test_paged_optimizers_need_a_gpu(monkeypatch, has_gpu):
    reasons = refusal(
        monkeypatch, "0.50.2", has_gpu=has_gpu, training={"optim": "paged_adamw_8bit"}
    )
    assert ("--optim adamw_8bit" in reasons) is not has_gpu


def test_nothing_is_asked_of_bitsandbytes_by_the_defaults(monkeypatch):
    assert refusal(monkeypatch, "") == ""
    assert json.loads(Config().model_dump_json())["training"]["optim"] == "adamw"
