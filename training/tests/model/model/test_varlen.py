"""PyTorch's kernel for variable lengths: one call a layer, equal to an example at a time."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, MistralConfig

from lora_trainer.config.schema import LoraSection, ModelSection
from lora_trainer.machine import Gpu, Machine
from lora_trainer.model import attention, flash, transfer, varlen
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.backend import resolve
from lora_trainer.model.compat import MAJOR, enable_checkpointing
from lora_trainer.model.forward import CausalLM
from lora_trainer.model.probe import verify
from lora_trainer.train.evaluate import take
from support.families import FAMILIES, tiny_model
from support.flash_operator import IS_FIRST, on_the_cpu
from support.plain_peft import make_rows

KERNEL = flash.PYTORCH_1 if IS_FIRST else flash.PYTORCH
HAS_CUDNN = hasattr(torch.backends.cuda, "enable_cudnn_sdp")
LENGTHS = [5, 1, 9]


@pytest.fixture
def calls():
    with on_the_cpu() as recorded:
        yield recorded


def forwards(calls):
    return [call for call in calls if "backward" not in call]


def qkv(device="cpu"):
    torch.manual_seed(2)
    shapes = [(1, 4, 15, 8), (1, 2, 15, 8), (1, 2, 15, 8)]
    return [torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes]


def attended(kernel, window=None, scaling=0.3):
    packed = attention.PackedAttention(kernel)
    packed.lengths = LENGTHS
    inputs = qkv()
    output, _ = packed(None, *inputs, None, scaling=scaling, sliding_window=window)
    torch.manual_seed(3)
    above = torch.randn(output.shape, dtype=output.dtype)
    return output, torch.autograd.grad(output, inputs, above)


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("window", [None, 9, 1, 3])
def test_the_kernel_equals_an_example_at_a_time_forward_and_backward(window, scaling, calls):
    output, gradients = attended(flash.VariableLength(KERNEL), window, scaling)
    expected, expected_gradients = attended(None, window, scaling)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    is_crossed = window in (1, 3)
    assert len(forwards(calls)) == (0 if is_crossed and IS_FIRST else 1)
    if is_crossed and not IS_FIRST:
        assert forwards(calls)[0]["window"] == (window - 1, 0)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append((function, args))
        return function(*args, **(kwargs or {}))

    def named(self, text):
        return [args for function, args in self.seen if text in str(function)]


def test_the_kernel_is_all_that_attention_computes():
    with on_the_cpu(), Operations() as operations, torch.no_grad():
        attended_by = attention.PackedAttention(flash.VariableLength(KERNEL))
        attended_by.lengths = LENGTHS
        query = torch.randn(1, 15, 4, 8).bfloat16().transpose(1, 2)
        begun = len(operations.seen)
        attended_by(None, query, query, query, None)
    kinds = {str(f) for f, _ in operations.seen[begun:]}
    assert not any(name in kind for kind in kinds for name in ("cat", "index_select", "clone"))


# torch 2.1.2 asks whether autocast's type is bfloat16, which here names float32.
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_through_the_kernel_equals_its_own_forward(family, calls, monkeypatch):
    if family == "qwen2-window" and MAJOR < 5:
        pytest.skip("transformers 4.50 has its window in every layer: padding is used")
    # The stand-in takes float32, so that the comparison is sharp.
    monkeypatch.setattr(torch, "bfloat16", torch.float32)
    causal = CausalLM(
        tiny_model(family), device="cpu", padding_free=True, chunk=16, precision="float32",
        kernel=flash.VariableLength(KERNEL),
    )  # fmt: skip
    assert verify(causal) == ""
    assert causal.packed is not None
    has_own = family == "gemma2" or (IS_FIRST and "window" in str(FAMILIES[family]))
    assert bool(calls) is not has_own


def test_layers_and_the_second_forward_of_checkpointing_share_one_copy_of_the_lengths(
    calls, monkeypatch
):
    sent = []
    send = transfer.send
    monkeypatch.setattr(transfer, "send", lambda *given: sent.append(given) or send(*given))
    model = add_adapter(tiny_model("llama"), LoraSection(lora_r=4), seed=1)
    enable_checkpointing(model)
    model.train()
    causal = CausalLM(
        model, device="cpu", padding_free=True, chunk=16, precision="float32",
        kernel=flash.VariableLength(KERNEL),
    )  # fmt: skip
    for first in (0, 3):
        causal.loss(take(make_rows(7), range(first, first + 3))).backward()
    assert len(sent) == 2
    assert len(forwards(calls)) == 2 * 2 * 2  # micro-batches, layers, forward passes
    assert len(calls) - len(forwards(calls)) == 2 * 2
    assert len({call["starts"].data_ptr() for call in forwards(calls)}) == 2
    assert all(p.grad is not None for p in trainable_parameters(model).values())


@pytest.mark.skipif(IS_FIRST, reason="PyTorch 2.1 has no shapes for its operator")
def test_on_meta_tensors_each_layer_calls_the_operator_once_each_way():
    model = tiny_model("mistral-window").to("meta").to(torch.bfloat16).requires_grad_(True)
    causal = CausalLM(
        model, device="meta", padding_free=True, chunk=16, precision="float32",
        kernel=flash.VariableLength(KERNEL),
    )  # fmt: skip
    with Operations() as operations:
        hidden, _ = causal._hidden(take(make_rows(3), range(3)))
        hidden.sum().backward()
    lengths = [len(ids) for ids, _ in make_rows(3)]
    forward = operations.named("_varlen_attn.default")
    assert len(forward) == len(operations.named("_varlen_attn_backward.default")) == 2
    for query, key, _, starts, _, longest, *_, scale, window, has_groups in (
        a[:11] for a in forward
    ):
        assert (query.shape, key.shape) == ((sum(lengths), 4, 8), (sum(lengths), 2, 8))
        assert (len(starts), longest) == (4, max(lengths))
        assert (scale, window, has_groups) == (8**-0.5, [5, 0], True)
    weight = model.model.layers[0].self_attn.k_proj.weight
    assert weight.grad.shape == weight.shape


def machine(*capabilities):
    gpus = tuple(Gpu(i, f"GPU {c[0]}{c[1]}", 24 << 30, c) for i, c in enumerate(capabilities))
    return Machine(cores=8, memory_bytes=64 << 30, gpus=gpus)


def llama(width):
    return LlamaConfig(hidden_size=2 * width, num_attention_heads=2)


@pytest.mark.parametrize(
    ("module", "capabilities", "precision", "width", "why"),
    [
        (varlen.PYTORCH, [(8, 0)], "bfloat16", 128, ""),
        (varlen.PYTORCH, [(9, 0), (12, 0)], "float16", 256, ""),
        (varlen.PYTORCH, [(9, 0), (7, 5)], "float16", 64, "needs compute capability 8.0"),
        (varlen.PYTORCH, [(9, 0)], "bfloat16", 68, "a multiple of 8 and at most 256"),
        (varlen.PYTORCH, [(8, 9)], "bfloat16", 208, "does not train heads of 208"),
        (varlen.PYTORCH_1, [(8, 0), (9, 0)], "bfloat16", 128, ""),
        (varlen.PYTORCH_1, [(7, 5)], "float16", 64, ""),
        (varlen.PYTORCH_1, [(7, 5)], "bfloat16", 64, "needs compute capability 8.0"),
        (varlen.PYTORCH_1, [(7, 0)], "float16", 64, "needs compute capability 7.5"),
        (varlen.PYTORCH_1, [(8, 6)], "bfloat16", 128, "a multiple of 8 and at most 64"),
        (varlen.PYTORCH_1, [(10, 0)], "bfloat16", 64, "up to 9.0"),
        ("", [(9, 0)], "bfloat16", 64, "no known variable-length kernel"),
    ],
)
def test_the_kernel_is_chosen_by_gpu_precision_and_heads_or_the_plan_says_why_not(
    module, capabilities, precision, width, why, monkeypatch
):
    monkeypatch.setattr(varlen, "of_pytorch", lambda: module)
    choice = flash.choose("auto", machine(*capabilities), precision, model=llama(width))
    assert (choice.kernel.module if choice.kernel else "") == ("" if why else module)
    assert why in flash.reason("auto", choice)
    assert bool(flash.reason("auto", choice)) is bool(why)
    assert flash.choose(False, machine(*capabilities), precision, model=llama(width)).kernel is None


def test_capped_scores_float32_and_machines_without_gpu_are_left_to_an_example_at_a_time():
    capped = tiny_model("gemma2").config
    choice = flash.choose("auto", machine((9, 0)), "bfloat16", model=capped)
    assert choice.kernel is None and "do not support capped attention scores" in choice.why
    assert flash.choose("auto", machine((9, 0)), "float32", model=llama(64)).kernel is None
    choice = flash.choose("auto", machine(), "float32", model=llama(64))
    assert choice.kernel is None and flash.reason("auto", choice) == ""


def test_a_window_or_dropout_that_the_kernel_cannot_do_is_in_the_plan(monkeypatch):
    monkeypatch.setattr(varlen, "of_pytorch", lambda: varlen.PYTORCH_1)
    windowed = MistralConfig(hidden_size=128, num_attention_heads=2, sliding_window=4096)
    choice = flash.choose("auto", machine((8, 0)), "bfloat16", model=windowed)
    assert choice.kernel == flash.PYTORCH_1
    assert "longer than 4096" in flash.reason("auto", choice)
    dropping = LlamaConfig(hidden_size=128, num_attention_heads=2, attention_dropout=0.1)
    choice = flash.choose("auto", machine((8, 0)), "bfloat16", model=dropping)
    assert choice.kernel is None and "attention_dropout is 0.1" in flash.reason("auto", choice)


def test_the_plan_shows_that_cudnn_is_off(monkeypatch):
    zeros = torch.zeros

    def on_the_cpu_instead(*sizes, device, **options):
        assert device == "cuda"
        return zeros(*sizes, **options)

    monkeypatch.setattr(torch, "zeros", on_the_cpu_instead)
    own = flash.pytorch_kernel("cuda", torch.float32, llama(64))
    assert own == ("sdpa (flash, cuDNN off)" if HAS_CUDNN else "sdpa (flash)")
    shown = flash.described(flash.Choice(flash.PYTORCH), own)
    assert shown == "packed PyTorch varlen_attn" + (" (cuDNN off)" if HAS_CUDNN else "")


def test_this_pytorch_has_a_kernel():
    assert varlen.of_pytorch() == KERNEL.module


def test_a_kernel_that_fails_gives_way_to_an_example_at_a_time_not_to_padding(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(varlen, "attend", fails)
    causal = CausalLM(
        tiny_model("llama"), device="cpu", padding_free=True, chunk=16, precision="float32",
        kernel=flash.VariableLength(KERNEL),
    )  # fmt: skip
    reason = verify(causal)
    assert reason == (
        f"{KERNEL.name} is not used: concatenated examples fail: "
        "RuntimeError: no kernel image is available"
    )
    assert causal.packed is not None and causal.packed.kernel is None


@pytest.mark.skipif(not HAS_CUDNN, reason="PyTorch 2.1 has no attention of cuDNN's")
def test_cudnn_attends_neither_in_training_nor_while_text_is_generated(monkeypatch):
    allowed = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*arguments, **named):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*arguments, **named)

    torch.backends.cuda.enable_cudnn_sdp(True)
    causal = CausalLM(
        tiny_model("llama", attention="sdpa"),
        device="cpu", padding_free=True, chunk=16, precision="float32",
    )  # fmt: skip
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    causal.score(take(make_rows(2), range(2)))
    in_segments = len(allowed)
    with causal.generating() as model, torch.no_grad():
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)
    assert in_segments and len(allowed) > in_segments
    assert not any(allowed)
    torch.backends.cuda.enable_cudnn_sdp(True)
    flash.pytorch_kernel("cpu", torch.float32, llama(64))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.skipif(not attention.HAS_GROUPS, reason="PyTorch 2.1 does not share key heads")
def test_key_heads_are_shared_by_pytorch_where_its_flash_kernel_runs(monkeypatch):
    expected = attended(None)
    monkeypatch.setattr(attention, "_shares_heads", lambda *_: True)
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", None)
    torch.testing.assert_close(attended(None), expected)


@pytest.mark.skipif(not attention.HAS_GROUPS, reason="PyTorch 2.1 does not share key heads")
@pytest.mark.parametrize(("number", "expected"), [(1, True), (2, False), (0, False)])
def test_key_heads_are_repeated_for_every_other_kernel(number, expected, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: number)
    with FakeTensorMode():
        on_gpu, on_cpu = torch.empty(1, 4, 9, 8, device="cuda"), torch.empty(1, 4, 9, 8)
    on_meta = torch.empty(1, 4, 9, 8, device="meta")
    assert attention._shares_heads(on_gpu, on_gpu, 0.0) is expected
    assert attention._shares_heads(on_cpu, on_cpu, 0.0) is expected
    assert attention._shares_heads(on_meta, on_meta, 0.0) is False


@pytest.mark.skipif(not attention.HAS_GROUPS, reason="PyTorch 2.1 does not share key heads")
def test_flash_attention_on_a_cpu_shares_key_heads():
    query, key = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    assert attention._shares_heads(query, key, 0.0)
    assert not attention._shares_heads(query, key, 0.1)


def test_what_goes_to_a_gpu_is_pinned_so_that_the_host_goes_on():
    done = []

    class Host:
        def pin_memory(self):
            done.append("pinned")
            return self

        def to(self, device, **how):
            done.append((device, how))
            return self

    transfer.send(Host(), "cuda:1")
    assert done == ["pinned", ("cuda:1", {"non_blocking": True})]


def test_where_the_kernel_failed_the_plan_names_what_is_left(monkeypatch):
    monkeypatch.setattr(flash, "pytorch_kernel", lambda *_: "sdpa (flash)")
    backend = resolve(ModelSection(), machine((9, 0)), llama(64))
    assert backend.packed == f"packed {KERNEL.name}"
    left = backend.without_kernel()
    assert (left.packed, left.kernel) == ("packed sdpa (flash)", None)


@pytest.mark.parametrize(
    ("module", "capability", "section", "is_in_plan"),
    [
        (varlen.PYTORCH_1, (8, 0), ModelSection(), True),
        (varlen.PYTORCH_1, (8, 0), ModelSection(use_flash_attention=False), True),
        (varlen.PYTORCH_1, (8, 0), ModelSection(bf16=False, fp16=False), False),
        (varlen.PYTORCH, (8, 0), ModelSection(), False),
    ],
)
def test_the_plan_warns_of_flash_attention_that_has_no_deterministic_form(
    module, capability, section, is_in_plan, monkeypatch
):
    monkeypatch.setattr(varlen, "of_pytorch", lambda: module)
    monkeypatch.setattr(flash, "pytorch_kernel", lambda *_: "sdpa (flash)")
    backend = resolve(section, machine(capability), llama(64))
    assert ("may differ in its last digits" in " ".join(backend.reasons)) is is_in_plan
