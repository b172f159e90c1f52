"""flash-attn is called as its signature says; required in vain, it fails with the reason.

The packages are stood in for by a module whose function has the real parameters (flash-attn
2.8 and flash-attn 3's `hopper/flash_attn_interface.py`) and computes a plain reference.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from lora_trainer.errors import ConfigError
from lora_trainer.machine import Gpu, Machine
from lora_trainer.model import flash, varlen
from lora_trainer.model.compat import MAJOR
from lora_trainer.model.forward import CausalLM
from lora_trainer.model.probe import verify
from lora_trainer.train.evaluate import take
from support.families import FAMILIES, tiny_model
from support.plain_peft import make_rows

REFERENCE = '''
import torch

CALLS = []


def reference(q, k, v, starts, longest, scale, causal, window, softcap):
    """Attention inside each example, over explicit scores."""
    assert starts.dtype == torch.int32 and starts.ndim == 1
    assert starts[0] == 0 and starts[-1] == len(q)
    assert longest == int((starts[1:] - starts[:-1]).max())
    assert q.ndim == k.ndim == v.ndim == 3 and q.shape[1] % k.shape[1] == 0
    assert all(part.stride(-1) == 1 for part in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    made = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
        query = q[begin:end].transpose(0, 1).float()
        key, value = (
            part[begin:end].repeat_interleave(groups, dim=1).transpose(0, 1).float()
            for part in (k, v)
        )
        scores = query @ key.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        index = torch.arange(end - begin)
        ahead = index[None] - index[:, None]
        left, right = window
        is_seen = torch.ones_like(ahead, dtype=torch.bool)
        if causal:
            is_seen &= ahead <= 0
        if left >= 0:
            is_seen &= ahead >= -left
        if right >= 0:
            is_seen &= ahead <= right
        weights = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
        made.append((weights @ value).transpose(0, 1).to(q.dtype))
    CALLS.append({"causal": causal, "window": window, "softcap": softcap, "dtype": q.dtype})
    return torch.cat(made)
'''
VERSION_2 = """

def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):
    assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    return reference(
        q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size, softcap
    )
"""
VERSION_3 = """

def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):
    assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    return reference(
        q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size, softcap
    ), None
"""
MODULES = {"flash_attn": VERSION_2, "flash_attn_interface": VERSION_3}


def install(folder: Path, monkeypatch, *names: str, version: str = "2.8.3") -> None:
    """Put stand-ins of the packages on the path."""
    for name in names:
        (folder / f"{name}.py").write_text(REFERENCE + MODULES[name])
        if name == "flash_attn":
            about = folder / f"flash_attn-{version}.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: flash_attn\nVersion: {version}\n"
            )
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)


@pytest.fixture(autouse=True)
def forget():
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def machine(*capabilities: tuple[int, int]) -> Machine:
    gpus = tuple(Gpu(i, f"GPU {c[0]}{c[1]}", 24 << 30, c) for i, c in enumerate(capabilities))
    return Machine(cores=8, memory_bytes=64 << 30, gpus=gpus)


# torch 2.1.2 asks whether autocast's type is bfloat16, which here names float32.
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("kernel", [flash.FLASH_2, flash.FLASH_3], ids=lambda k: k.module)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_through_the_kernel_equals_its_own_forward(
    family, kernel, tmp_path, monkeypatch
):
    install(tmp_path, monkeypatch, kernel.module)
    variable = flash.VariableLength(kernel)
    # The stand-in takes float32, so that the comparison is sharp.
    monkeypatch.setattr(torch, "bfloat16", torch.float32)
    causal = CausalLM(
        tiny_model(family), device="cpu", padding_free=True, chunk=16, precision="float32",
        kernel=variable,
    )  # fmt: skip
    if family == "qwen2-window" and MAJOR < 5:
        pytest.skip("transformers 4.50 has its window in every layer: padding is used")
    assert verify(causal) == ""
    assert causal.packed is not None
    calls = sys.modules[kernel.module].CALLS
    assert calls
    assert all(call["causal"] for call in calls)
    if family == "gemma2":
        assert {call["softcap"] for call in calls} == {0.5}
    if "window" in family or family in ("gemma2", "gemma3", "phi3"):
        assert (5, 0) in {call["window"] for call in calls}


def test_the_kernel_computes_in_half_precision_and_trains(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "flash_attn")
    model = tiny_model("llama").requires_grad_(True)
    kernel = flash.VariableLength(flash.FLASH_2)
    causal = CausalLM(
        model, device="cpu", padding_free=True, chunk=16, precision="float32", kernel=kernel
    )
    batch = take(make_rows(4), range(4))
    causal.loss(batch).backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    assert {call["dtype"] for call in sys.modules["flash_attn"].CALLS} == {torch.bfloat16}
    model.zero_grad()
    causal.packed.kernel = None
    causal.loss(batch).backward()
    expected = model.model.layers[0].self_attn.q_proj.weight.grad
    torch.testing.assert_close(gradient, expected, rtol=0.1, atol=float(expected.abs().max()) / 20)


@pytest.mark.parametrize(
    ("capabilities", "installed", "expected"),
    [
        ([(9, 0)], ["flash_attn", "flash_attn_interface"], flash.FLASH_3),
        ([(9, 0)], ["flash_attn"], flash.FLASH_2),
        ([(8, 0)], ["flash_attn", "flash_attn_interface"], flash.FLASH_2),
        ([(9, 0), (8, 6)], ["flash_attn", "flash_attn_interface"], flash.FLASH_2),
        ([(10, 0)], ["flash_attn", "flash_attn_interface"], flash.FLASH_2),
        ([(9, 0)], [], flash.PYTORCH),
        ([(7, 5)], ["flash_attn"], None),
        ([], ["flash_attn"], None),
    ],
)
def test_auto_and_true_take_what_the_gpu_and_the_packages_allow(
    capabilities, installed, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(varlen, "of_pytorch", lambda: varlen.PYTORCH)
    install(tmp_path, monkeypatch, *installed)
    for asked in ("auto", True):
        assert flash.choose(asked, machine(*capabilities), "bfloat16").kernel == expected
        assert flash.choose(asked, machine(*capabilities), "float32").kernel is None
    assert flash.choose(False, machine(*capabilities), "bfloat16").kernel is None


@pytest.mark.parametrize(
    ("capabilities", "installed", "version", "precision", "reason"),
    [
        ([], ["flash_attn"], "2.8.3", "bfloat16", "no GPU is available"),
        ([(7, 5)], ["flash_attn"], "2.8.3", "bfloat16", "GPU 75 has 7.5"),
        ([(8, 0)], [], "2.8.3", "bfloat16", "is not installed"),
        ([(8, 0)], ["flash_attn_interface"], "2.8.3", "bfloat16", "is not installed"),
        ([(8, 0)], ["flash_attn"], "2.5.9", "bfloat16", "2.5.9 is too old"),
        ([(8, 0)], ["flash_attn"], "2.8.3", "float32", "half precision"),
    ],
)
def test_insisting_on_the_package_fails_with_the_reason_and_true_takes_pytorchs_kernel(
    capabilities, installed, version, precision, reason, tmp_path, monkeypatch
):
    install(tmp_path, monkeypatch, *installed, version=version)
    with pytest.raises(ConfigError) as caught:
        flash.choose("flash-attn", machine(*capabilities), precision, where="a.json:3 /model")
    assert reason in caught.value.block()
    assert "a.json:3" in caught.value.block()
    assert "--use_flash_attention true" in caught.value.block()
    assert "pip install" not in caught.value.block()
    choice = flash.choose(True, machine(*capabilities), precision)
    assert reason in choice.why
    assert choice.kernel in (None, flash.PYTORCH, flash.PYTORCH_1)
    assert bool(flash.reason(True, choice)) is (choice.kernel is None)


def test_heads_wider_than_the_kernel_takes_are_left_to_pytorch(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "flash_attn")
    wide = LlamaConfig(hidden_size=1024, num_attention_heads=2)  # heads of 512
    assert flash.choose(True, machine((8, 0)), "bfloat16", model=wide).kernel is None
    chosen = flash.choose(True, machine((8, 0)), "bfloat16", model=LlamaConfig())
    assert chosen.kernel == flash.FLASH_2
    with pytest.raises(ConfigError, match="flash-attn cannot be used here") as caught:
        flash.choose("flash-attn", machine((8, 0)), "bfloat16", model=wide)
    assert "head widths up to 256, this model has 512" in caught.value.block()


def test_the_plan_names_the_kernel():
    assert flash.described(flash.Choice(flash.FLASH_3), "") == "packed flash-attn 3"
    own = flash.pytorch_kernel("cpu", torch.float32, LlamaConfig())
    assert flash.described(flash.Choice(None), own) == "packed sdpa (flash)"


def test_kernel_of_pytorch_is_asked_for_by_the_name_that_pytorch_gives(monkeypatch):
    assert flash.pytorch_kernel("cpu", torch.bfloat16, LlamaConfig()) == "sdpa (flash)"
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: 0)
    assert flash.pytorch_kernel("cpu", torch.float32, LlamaConfig()) == "sdpa (math)"
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert flash.pytorch_kernel("cpu", torch.float32, object()) == "sdpa"
