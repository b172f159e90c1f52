"""Modules that carry information from token to token beside our attention, one example at a time.

Recurrent and convolutional mixers (Mamba, gated delta-net, short convolutions) would go on from
one concatenated example to the next. They are called for each example, and their outputs are
concatenated; projections, experts and attention outside of them compute all tokens at once.
`find` names no class: it compares what a layer's modules compute for an example with and without
others before it. `probe.verify` proves the result.

Legend: T tokens of all examples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention import NAME, PackedAttention


def find(
    decoder: nn.Module, packed: PackedAttention, run: Callable[[], object], tolerance: float
) -> frozenset[str]:
    """Return the classes of a layer's modules that compute an example otherwise after others.

    `run` takes a micro-batch through the decoder, without gradients. `tolerance` is the largest
    difference, relative to the largest number, that rounding explains.
    """
    kinds: set[str] = set()

    def compared(module: nn.Module) -> Callable[..., Any]:
        own = module.forward

        def forward(*arguments: Any, **named: Any) -> Any:
            lengths = list(packed.lengths)
            output = own(*arguments, **named)
            arguments, named = _split((arguments, named), lengths)[-1]
            with packed.alone(lengths[-1]):
                alone = _first(own(*arguments, **named))
            after_others = _first(_split(output, lengths)[-1])
            if alone is not None and after_others is not None:
                difference = (after_others - alone).abs().max()
                if difference > tolerance * alone.abs().max():
                    kinds.add(type(module).__name__)
            return output

        return forward

    with contextlib.ExitStack() as replaced:
        for module in _modules_of_layers(decoder):
            _replace(replaced, module, compared(module))
        run()
    return frozenset(kinds)


def run_apart(
    model: Any, decoder: nn.Module, packed: PackedAttention, kinds: frozenset[str]
) -> contextlib.ExitStack:
    """Call a layer's modules of these classes for one example at a time; closing it ends that.

    Where a model is not on our attention, as it is in generation, they compute what they are given.
    """

    def apart(own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*arguments: Any, **named: Any) -> Any:
            lengths = list(packed.lengths)
            if len(lengths) < 2 or model.config._attn_implementation != NAME:
                return own(*arguments, **named)
            outputs = []
            inputs = _split((arguments, named), lengths)
            for length, (these, named_these) in zip(lengths, inputs, strict=True):
                with packed.alone(length):
                    outputs.append(own(*these, **named_these))
            return _joined(outputs, lengths)

        return forward

    replaced = contextlib.ExitStack()
    for module in _modules_of_layers(decoder):
        if type(module).__name__ in kinds:
            _replace(replaced, module, apart(module.forward))
    return replaced


def _modules_of_layers(decoder: nn.Module) -> list[nn.Module]:
    """Return the children of each layer, each once: layers may share them."""
    children = (
        child for stack in _stacks(decoder) for layer in stack for child in layer.children()
    )
    return list(dict.fromkeys(children))


def _stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _stacks(child)


def _replace(stack: contextlib.ExitStack, module: Any, forward: Callable[..., Any]) -> None:
    """Exchange what a module computes until the stack is closed."""
    if "forward" in vars(module):
        stack.callback(setattr, module, "forward", module.forward)
    else:
        stack.callback(delattr, module, "forward")
    module.forward = forward


def _split(value: Any, lengths: Sequence[int]) -> list[Any]:
    """Return each example's part of an argument; what is not about tokens is given to all."""
    total = sum(lengths)
    if isinstance(value, Tensor):
        if value.ndim == 4 and value.shape[2:] == (total, total):  # a mask
            rows = value.split(list(lengths), dim=2)
            return [row.split(list(lengths), dim=3)[number] for number, row in enumerate(rows)]
        if value.ndim > 1 and value.shape[1] == total:
            return list(value.split(list(lengths), dim=1))
        if value.ndim in (1, 2) and value.shape[0] == total:
            return list(value.split(list(lengths)))
    elif type(value) in (tuple, list) and value:
        return [type(value)(row) for row in zip(*(_split(v, lengths) for v in value), strict=True)]
    elif type(value) is dict and value:
        columns = [_split(each, lengths) for each in value.values()]
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return [value] * len(lengths)


def _joined(outputs: Sequence[Any], lengths: Sequence[int]) -> Any:
    """Return the examples' outputs as one; of what is not about tokens, a state, the last."""
    last = outputs[-1]
    if isinstance(last, Tensor):
        for dim in (1, 0):
            if [one.shape[dim] if one.ndim > dim else 0 for one in outputs] == list(lengths):
                return torch.cat(list(outputs), dim=dim)
    elif type(last) in (tuple, list):
        return type(last)(_joined(column, lengths) for column in zip(*outputs, strict=True))
    return last


def _first(output: Any) -> Tensor | None:
    """Return the first tensor of a module's output."""
    while type(output) in (tuple, list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.is_floating_point() else None
