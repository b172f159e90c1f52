"""One architecture's trial: our loss and gradients beside those of plain transformers + PEFT."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import AutoModelForCausalLM

from lora_trainer.config.schema import ALL_LINEAR, LoraSection
from lora_trainer.errors import TrainerError
from lora_trainer.model import quantize, reach
from lora_trainer.model.adapter import add_adapter, trainable_parameters
from lora_trainer.model.forward import CausalLM, MicroBatch
from lora_trainer.model.probe import check_unloaded, verify
from lora_trainer.model.reach import shortest
from lora_trainer.model.targets import fused_names, left_alone, targeted
from lora_trainer.train.dry_run import model_size_of
from support.architectures.tiny import VOCABULARY, tiny_model

# The last one crosses the tiny models' sliding windows.
LENGTHS = (9, 24, 5, 13)
EXPERTS = 4
LORA = LoraSection(lora_r=4, lora_alpha=8)


@dataclass(frozen=True)
class Outcome:
    """What an architecture gets, and why not the best.

    `result` is packed, padded, unbatched, refused or not built; differs and fails are faults.
    `left` are the endings of the names that all-linear leaves alone.
    """

    result: str
    reason: str = ""
    left: tuple[str, ...] = ()


def attempt(model_type: str) -> Outcome:
    """Train one step of the architecture both ways and compare."""
    try:
        model, config = tiny_model(model_type)
    except Exception as error:
        return Outcome("not built", _said(error))
    try:
        if fault := _unloaded_fault(config):
            return Outcome("refused", fault)
        alone = left_alone(model)
        left = tuple(shortest(alone, [n for n in targeted(model, ALL_LINEAR) if n not in alone]))
        peft_model = add_adapter(model, _keys(model), seed=11)
    except TrainerError as error:
        return Outcome("refused", _refusal(error))
    torch.manual_seed(3)
    _spread(peft_model)
    peft_model.train()
    if adapted := _adapted_routers(peft_model):
        return Outcome("differs", f"all-linear adapts routers: {adapted}")
    outcome = _trained(peft_model)
    return replace(outcome, left=left)


def _trained(peft_model: Any) -> Outcome:
    batch = _batch()
    broken, expected = "", None
    try:
        expected = _plain(peft_model, batch)
    except Exception as error:
        broken = _said(error)
    causal = CausalLM(peft_model, device="cpu", padding_free=True, chunk=7, precision="float32")
    try:
        reason = verify(causal)
    except TrainerError as error:
        return Outcome("refused", _refusal(error))
    result = "packed" if causal.packed is not None else "padded"
    if causal.is_one_by_one:
        result, expected = "unbatched", _plain_one_by_one(peft_model, batch)
    if expected is None:
        return Outcome("differs", f"plain transformers and PEFT fail: {broken}")
    if difference := _difference(_ours(causal, batch), expected):
        return Outcome("differs", f"{result}: {difference}")
    return Outcome(result, _without_figures(reason))


def _unloaded_fault(config: Any) -> str:
    """Say what `check` would refuse before any weight is read."""
    with torch.device("meta"):
        unloaded = AutoModelForCausalLM.from_config(config).eval()
        parameters = quantize.count_parameters(unloaded)
        try:
            check_unloaded(unloaded)
        except TrainerError as error:
            return _refusal(error)
        adapted = add_adapter(unloaded.requires_grad_(False), _keys(unloaded), seed=11)
    sized = model_size_of(unloaded, parameters, trainable_parameters(adapted))
    assert sized.layers and sized.vocab_size, sized
    reach.notes(adapted, sized.parameters, LORA)
    return ""


def _keys(model: Any) -> LoraSection:
    """Return keys that adapt all linear layers, and experts that are held in one tensor."""
    return LORA.model_copy(update={"lora_target_parameters": fused_names(model)})


def _adapted_routers(model: Any) -> str:
    """Name adapted layers that give one number an expert, by the tiny models' number."""
    return ", ".join(
        name
        for name, module in model.named_modules()
        if reach.expert_counts(model.get_base_model())
        and hasattr(module, "lora_A")
        and module.out_features == EXPERTS
        and re.search("gate|router|wg", name)
    )


def _batch() -> MicroBatch:
    order = np.random.Generator(np.random.PCG64(3))
    ids = [order.integers(3, VOCABULARY, length) for length in LENGTHS]
    return MicroBatch(ids, [np.arange(len(one)) >= order.integers(1, len(one)) for one in ids])


def _spread(model: Any) -> None:
    """Give both LoRA matrices weights, so that both have gradients."""
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.copy_(torch.randn_like(parameter) * 0.2)


Step = tuple[float, dict[str, torch.Tensor]]


def _plain(model: Any, batch: MicroBatch) -> Step:
    """Padded rows through the whole model: the mean loss of the trained tokens, and gradients."""
    longest = max(len(ids) for ids in batch.ids)
    ids_BL = torch.zeros(len(batch.ids), longest, dtype=torch.long)
    mask_BL, labels_BL = torch.zeros_like(ids_BL), torch.full_like(ids_BL, -100)
    for row, (ids, marks) in enumerate(zip(batch.ids, batch.loss_mask, strict=True)):
        ids_BL[row, : len(ids)] = torch.as_tensor(ids)
        mask_BL[row, : len(ids)] = 1
        labels_BL[row, : len(ids)] = torch.where(torch.as_tensor(marks), torch.as_tensor(ids), -100)
    logits = model(input_ids=ids_BL, attention_mask=mask_BL).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels_BL[:, 1:].flatten())
    return _step(model, loss)


def _plain_one_by_one(model: Any, batch: MicroBatch) -> Step:
    """Do the same without padding: the loss is the sum over examples of their own."""
    loss = torch.zeros(())
    for ids, marks in zip(batch.ids, batch.loss_mask, strict=True):
        ids_1T = torch.as_tensor(ids)[None]
        labels_T = torch.where(torch.as_tensor(marks), torch.as_tensor(ids), -100)[1:]
        mask_1T = torch.ones_like(ids_1T)
        logits_TV = model(input_ids=ids_1T, attention_mask=mask_1T).logits[0, :-1].float()
        loss = loss + F.cross_entropy(logits_TV, labels_T, reduction="sum")
    return _step(model, loss / batch.targets)


def _ours(causal: CausalLM, batch: MicroBatch) -> Step:
    return _step(causal.model, causal.loss(batch) / batch.targets)


def _step(model: Any, loss: torch.Tensor) -> Step:
    loss.backward()
    gradients = {}
    for name, parameter in trainable_parameters(model).items():
        gradients[name] = (
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        )
        parameter.grad = None
    return float(loss.detach()), gradients


def _difference(ours: Step, plain: Step) -> str:
    """Say what is not equal; empty where all is, to the tolerances of test_equivalence.py."""
    if not np.isfinite(plain[0]):
        return "the tiny model's loss is not finite"
    if not abs(ours[0] - plain[0]) <= 1e-5 * abs(plain[0]):
        return f"loss {ours[0]:.6f}, plain {plain[0]:.6f}"
    for name, gradient in plain[1].items():
        if not torch.allclose(ours[1][name], gradient, rtol=1e-4, atol=1e-4):
            apart = float((ours[1][name] - gradient).abs().max())
            return f"gradient of {name}: {apart:.1e} of {float(gradient.abs().max()):.1e} apart"
    if not any(gradient.abs().max() > 1e-3 for gradient in plain[1].values()):
        return "no gradient to compare"
    return ""


def _said(error: BaseException) -> str:
    text = str(error).strip().split("\n")
    return _without_figures(f"{type(error).__name__}: {text[-1].strip() or text[0]}"[:160])


def _refusal(error: TrainerError) -> str:
    (problem,) = error.problems
    return _without_figures(f"{problem.what}: {problem.why}")


def _without_figures(text: str) -> str:
    """Leave out figures that differ between machines."""
    return re.sub(r"-?\d\.\d+(e[+-]\d+)?|\bnan\b", "*", text)
