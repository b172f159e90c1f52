"""The backend of a run: device, precision and attention, resolved once.

`usable_machine` compares the GPUs that NVML lists with those that torch can use; `resolve`
then chooses precision and attention for a base model. All other code takes them from here, or from
the plan.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..config.schema import ModelSection
from ..machine import Device, Machine, is_hidden
from ..memory_estimate import Precision
from . import flash, stacks
from .precision import choose_precision, dtype_of
from .ranks import ALONE, Ranks, device_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# From the one that every device computes in to the most wanted.
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "bfloat16")
# What rounds least, on a machine without GPUs.
EXACT = ModelSection(bf16=False, use_flash_attention=False)


@dataclass(frozen=True, slots=True)
class Backend:
    """Device, precision and attention. `machine` only has the GPUs that are used.

    `attention` is transformers' own, for padded batches and generation; `packed` names the one
    over concatenated examples, `choice` its kernel for variable lengths, `own` PyTorch's where
    it has none. `reasons` say why, where something else is used than was asked for.
    """

    machine: Machine
    precision: Precision
    attention: str
    packed: str
    own: str
    choice: flash.Choice
    index: int = 0
    reasons: tuple[str, ...] = ()

    @property
    def device(self) -> Device:
        """Return the kind of device."""
        return self.machine.device

    @property
    def device_name(self) -> str:
        """Return this process's device, as torch names it: cpu, or cuda with its number."""
        return f"cuda:{self.index}" if self.machine.has_gpu else "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Return torch's type of the precision."""
        return dtype_of(self.precision)

    @property
    def kernel(self) -> flash.VariableLength | None:
        """Return the kernel for variable lengths, where there is one."""
        kernel = self.choice.kernel
        return flash.VariableLength(kernel) if kernel is not None else None

    def without_kernel(self) -> Backend:
        """Return what is left where the kernel failed the loaded model's proof."""
        choice = replace(self.choice, kernel=None)
        return replace(self, choice=choice, packed=flash.described(choice, self.own))


def usable_machine(machine: Machine, processes: int = 1) -> Machine:
    """Return the machine with the GPUs that the processes use, one each; none: on the CPU.

    Raises:
        UnavailableError: NVML and torch disagree on the GPUs.
    """
    if is_hidden():
        return without_gpus(machine)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if machine.has_gpu and usable < min(processes, len(machine.gpus)):
        why = str(warned[-1].message).splitlines()[0] if warned else ""
        raise stacks.unusable(machine, usable, why)
    if usable and not machine.has_gpu:
        raise stacks.unlisted(torch.cuda.get_device_name(0))
    return replace(machine, gpus=machine.gpus[:processes])


def without_gpus(machine: Machine) -> Machine:
    """Return the machine for what is computed on its CPU."""
    return replace(machine, gpus=())


def resolve(
    section: ModelSection, machine: Machine, base_config: PretrainedConfig, ranks: Ranks = ALONE
) -> Backend:
    """Choose precision and attention for a base model, alike on all ranks; each must ask.

    `machine` is the usable one.

    Raises:
        ConfigError: flash-attn is required, and cannot be used.
    """
    precision, why = choose_precision(section, machine)
    # A clock may have spoken for another one elsewhere.
    precision = PRECISIONS[ranks.least(PRECISIONS.index(precision))]
    asked = section.use_flash_attention
    choice = flash.choose(asked, machine, precision, model=base_config)
    varying = flash.varying(choice, machine, precision)
    own = "eager"
    if not flash.caps_scores(base_config):
        own = flash.pytorch_kernel(machine.device, dtype_of(precision), base_config)
    return Backend(
        machine,
        precision,
        attention=native_attention(base_config),
        packed=flash.described(choice, own),
        own=own,
        choice=choice,
        index=device_of(ranks, len(machine.gpus)),
        reasons=tuple(filter(None, (why, flash.reason(asked, choice), varying))),
    )


def native_attention(base_config: PretrainedConfig) -> str:
    """Return transformers' own attention to load a model of this configuration with.

    Not every architecture has sdpa; eager is everywhere.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if flash.caps_scores(base_config):
        return "eager"
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base_config), None)  # none: its repository's own
    return "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"
