"""One autograd function for the adapted projections that read the same input.

    y_i = x W_i' + bias_i + (s_i x A_i') B_i'

PEFT computes each projection by itself: it casts the input up and down again, scales and adds in
passes of their own, and keeps an input for each. Here the input is cast and kept once, or computed
again (`recompute.py`), the A_i are one matrix, and products are added where they belong. PEFT's
modules and the names of their parameters stay as they are; only what `forward` computes is
exchanged. What is not covered (DoRA, 8 bits, experts, a switched-off or merged adapter) is left to
PEFT.

Legend: T tokens, W input width, O output width, R rank, S the ranks of all projections; ' is the
transpose.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the field's usual name
from torch import Tensor, nn

from .packed_linear import PackedLinear
from .recompute import Source, source_of

# Siblings that read the same input in every decoder layer that has them. Whether they do is seen
# when they are called: each output is handed out for the input that it was computed from alone.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# PEFT's own forward of a layer whose computation is exchanged, kept under this name.
OWN_FORWARD = "_lora_trainer_own_forward"
GROUP = "_lora_trainer_group"


@dataclass(frozen=True, slots=True)
class Weights:
    """The adapters of a group as the products take them, in the compute precision.

    Shapes: `a` (S, W), scaled; each of `b` (O, R).
    """

    a: Tensor
    b: tuple[Tensor, ...]


@dataclass(eq=False)
class Group:
    """Projections that read the same input: computed together when the first of them is called."""

    layers: list[Any]
    dtype: torch.dtype
    is_on: bool = True
    is_split: bool = False  # computed by autograd, operation by operation
    _weights: Weights | None = None
    _versions: tuple[Any, ...] = ()
    _input: Tensor | None = None
    _outputs: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def adapter(self) -> str:
        """Return the name of the only adapter."""
        name: str = next(iter(self.layers[0].lora_A))
        return name

    @property
    def dropout(self) -> float:
        """Return the probability that an adapter's input is dropped; 0 outside of training."""
        dropout = self.layers[0].lora_dropout[self.adapter]
        return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    @property
    def scaling(self) -> float:
        """Return the factor of the adapters' outputs."""
        return float(self.layers[0].scaling[self.adapter])

    def parameters(self) -> list[Tensor]:
        """Return A and B of each projection."""
        name = self.adapter
        return [m.weight for one in self.layers for m in (one.lora_A[name], one.lora_B[name])]

    def weights(self) -> Weights:
        """Return the adapters in the compute precision, cast once for all uses of a step."""
        parameters = self.parameters()
        versions = tuple((p.data_ptr(), p._version, p.device) for p in parameters)
        if self._weights is None or versions != self._versions:
            with torch.no_grad():
                scaled = [torch.mul(a, self.scaling).to(self.dtype) for a in parameters[::2]]
                self._weights = Weights(
                    torch.cat(scaled) if len(scaled) > 1 else scaled[0],
                    tuple(b.detach().to(self.dtype) for b in parameters[1::2]),
                )
            self._versions = versions
        return self._weights

    def call(self, layer: Any, x: Tensor) -> Tensor:
        """Return what a projection makes of `x`; its siblings' outputs wait for their call."""
        if self.is_split:
            return self._split(layer, x)
        if self._input is not x or layer not in self._outputs:
            self.forget()
            source = source_of(x, self.dtype)
            outputs = _FusedLora.apply(self, source, *source.inputs, *self.parameters())
            self._outputs = dict(zip(self.layers, outputs, strict=True))
            self._input = x
        output = self._outputs.pop(layer)
        if not self._outputs:
            self._input = None
        return output

    def _split(self, layer: Any, x: Tensor) -> Tensor:
        """Return the same, rounded otherwise, by operations that autograd knows."""
        dropout, kept = self.dropout, x.to(self.dtype)
        if dropout:
            seed = int(torch.randint(1 << 62, ()))
            kept = kept * _mask(kept.detach(), dropout, seed) / (1 - dropout)
        a, b = (part[self.adapter].weight.to(self.dtype) for part in (layer.lora_A, layer.lora_B))
        output: Tensor = layer.base_layer(x) + F.linear(F.linear(kept, a), b) * self.scaling
        return output

    def forget(self) -> None:
        """Let go of outputs that nobody asked for."""
        self._input, self._outputs = None, {}


class _FusedLora(torch.autograd.Function):
    """The projections, and their gradients to what `source` is computed from and each A and B.

    W and bias are frozen.
    """

    @staticmethod
    def forward(ctx: Any, group: Group, source: Source, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, dropout, x = group.weights(), group.dropout, source.value
        x_TW = x.reshape(-1, x.shape[-1]).to(group.dtype)
        seed = int(torch.randint(1 << 62, ())) if dropout else 0
        kept_TW = x_TW * _mask(x_TW, dropout, seed) if dropout else x_TW
        low_TS = _product(kept_TW, weights.a.t(), 1 / (1 - dropout))
        outputs, start = [], 0
        for layer, b_OR in zip(group.layers, weights.b, strict=True):
            # Whole, no view: models may change what a projection returns in place.
            y = _base_output(layer.base_layer, x_TW.view(x.shape))
            low_TR = low_TS[:, start : start + b_OR.shape[1]]
            y.view(-1, y.shape[-1]).addmm_(low_TR, b_OR.t())
            outputs.append(y)
            start += b_OR.shape[1]
        kept = source.tensors if source.formula else (x_TW,)
        ctx.save_for_backward(low_TS, weights.a, *weights.b, *kept)
        ctx.group, ctx.dropout, ctx.seed = group, dropout, seed
        ctx.formula, ctx.inputs = source.formula, len(source.inputs)
        ctx.dtype, ctx.shape = x.dtype, x.shape
        ctx.scaling, ctx.dtypes = group.scaling, [t.dtype for t in tensors[ctx.inputs :]]
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        low_TS, a_SW, *others = ctx.saved_tensors
        bs, kept = others[: len(gradients)], others[len(gradients) :]
        flat = a_SW.new_empty(sum(one.numel() for one in (a_SW, *bs)))
        a_gradient, *b_gradients = _apart(flat, a_SW, bs)
        low_gradient_TS, x_gradient = _through_b(ctx, gradients, low_TS, bs, b_gradients)
        x, work = (kept[0], None) if ctx.formula is None else ctx.formula.again(*kept)
        x_TW = x.view(-1, x.shape[-1])
        mask_TW = _mask(x_TW, ctx.dropout, ctx.seed) if ctx.dropout else None
        kept_TW = x_TW if mask_TW is None else x_TW * mask_TW
        _product(low_gradient_TS.t(), kept_TW, ctx.scaling, a_gradient)
        inputs: tuple[Tensor | None, ...] = (None,) * ctx.inputs
        if x_gradient is not None:
            if mask_TW is None:
                x_gradient.addmm_(low_gradient_TS, a_SW)
            else:
                x_gradient.addcmul_(low_gradient_TS @ a_SW, mask_TW)
            inputs = (x_gradient.to(ctx.dtype).view(ctx.shape),)
            if ctx.formula is not None:
                inputs = ctx.formula.gradients(*inputs, work, *kept)
        # One cast for all of them.
        a_gradient, *b_gradients = _apart(flat.to(ctx.dtypes[0]), a_SW, bs)
        a_gradients = a_gradient.split([b.shape[1] for b in bs])
        adapters: list[Tensor | None] = []
        for gradient, pair in zip(
            gradients, zip(a_gradients, b_gradients, strict=True), strict=True
        ):
            adapters += pair if gradient is not None else (None, None)
        return None, None, *inputs, *adapters


def _through_b(
    ctx: Any,
    gradients: Sequence[Tensor | None],
    low_TS: Tensor,
    bs: Sequence[Tensor],
    b_gradients: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x A' and, through the frozen weights, of x; fill those of each B."""
    low_gradient_TS, x_gradient = torch.empty_like(low_TS), None
    start = 0
    for layer, gradient, b_OR, b_gradient in zip(
        ctx.group.layers, gradients, bs, b_gradients, strict=True
    ):
        ranks = slice(start, start + b_OR.shape[1])
        start = ranks.stop
        if gradient is None:  # its output was not used
            low_gradient_TS[:, ranks] = 0
            continue
        gradient_TO = gradient.reshape(-1, gradient.shape[-1]).to(low_TS.dtype)
        _product(gradient_TO, b_OR, 1 / (1 - ctx.dropout), low_gradient_TS[:, ranks])
        torch.mm(gradient_TO.t(), low_TS[:, ranks], out=b_gradient)
        if any(ctx.needs_input_grad[2 : 2 + ctx.inputs]):
            weight_OW = _dense(layer.base_layer, low_TS.dtype)
            if x_gradient is None:
                x_gradient = gradient_TO @ weight_OW
            else:
                x_gradient.addmm_(gradient_TO, weight_OW)
    return low_gradient_TS, x_gradient


def _apart(flat: Tensor, a_SW: Tensor, bs: Sequence[Tensor]) -> list[Tensor]:
    """Return the pieces of a flat tensor that have the shapes of A and each B."""
    whole = (a_SW, *bs)
    pieces = flat.split([one.numel() for one in whole])
    return [piece.view(one.shape) for piece, one in zip(pieces, whole, strict=True)]


def _product(one: Tensor, other: Tensor, factor: float, out: Tensor | None = None) -> Tensor:
    """Return `factor` times a matrix product, by one operation; in `out` where it is given."""
    if factor == 1:
        return torch.mm(one, other, out=out) if out is not None else one @ other
    if out is None:
        out = one.new_empty(one.shape[0], other.shape[1])
    return torch.addmm(out, one, other, beta=0, alpha=factor, out=out)


def _mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Return which numbers dropout keeps, 1 or 0: drawn again from the seed instead of stored."""
    if x.device.type == "meta":
        return torch.empty_like(x)
    generator = torch.Generator(x.device)
    generator.manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - dropout, generator=generator)


def _base_output(base: Any, x: Tensor) -> Tensor:
    """Return what the frozen projection computes, as a tensor that may be changed in place."""
    if getattr(base.weight, "quant_state", None) is not None:
        output: Tensor = base(x)  # bitsandbytes has kernels of its own for few tokens
        return output
    weight_OW = _dense(base, x.dtype)
    out = x.new_empty((*x.shape[:-1], len(weight_OW)))
    x_TW, out_TO = x.view(-1, x.shape[-1]), out.view(-1, len(weight_OW))
    if base.bias is None:
        torch.mm(x_TW, weight_OW.t(), out=out_TO)
    else:
        torch.addmm(base.bias, x_TW, weight_OW.t(), out=out_TO)
    return out


def _dense(base: Any, dtype: torch.dtype) -> Tensor:
    """Return a frozen projection's weight (O, W); a quantized one is widened for this use."""
    if isinstance(base, PackedLinear):
        return torch.empty_like(base.weight, dtype=dtype)
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        weight: Tensor = base.weight
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, state).to(dtype)


def install(model: nn.Module, dtype: torch.dtype) -> int:
    """Exchange what every covered projection computes; return how many there are.

    `dtype` is the precision that the products are computed in.
    """
    exchanged = 0
    for parent in model.modules():
        children = {
            name: child for name, child in parent.named_children() if is_covered(child, dtype)
        }
        for layers in _groups(children):
            group = Group(layers, dtype)
            for layer in layers:
                if not hasattr(layer, OWN_FORWARD):
                    setattr(layer, OWN_FORWARD, layer.forward)
                    layer.forward = _forward_of(layer, group)
                    object.__setattr__(layer, GROUP, group)
                    exchanged += 1
    return exchanged


def _groups(children: dict[str, Any]) -> Iterator[list[Any]]:
    """Return which of a module's projections are computed together."""
    left = dict(children)
    for names in SIBLINGS:
        siblings = [left[name] for name in names if name in left]
        kinds = {_kind(layer) for layer in siblings}
        if len(siblings) > 1 and len(kinds) == 1 and not next(iter(kinds))[-1]:
            yield siblings
            left = {name: layer for name, layer in left.items() if layer not in siblings}
    for layer in left.values():
        yield [layer]


def _kind(layer: Any) -> tuple[Any, ...]:
    """Return what projections of a group have in common; the last says whether there is dropout.

    Each projection drops numbers of its own.
    """
    (name,) = layer.lora_A
    has_dropout = isinstance(layer.lora_dropout[name], nn.Dropout)
    return name, layer.in_features, layer.scaling[name], layer.base_layer.weight.device, has_dropout


def split(model: nn.Module) -> None:
    """Have every projection call its base layer, whose weight is elsewhere until then.

    Dropout keeps the same numbers as otherwise, so that a run can go on either way.
    """
    for module in model.modules():
        if (group := getattr(module, GROUP, None)) is not None:
            group.is_split = True


def count(model: nn.Module) -> int:
    """Return how many projections are computed by one function with their siblings."""
    groups = (getattr(module, GROUP, None) for module in model.modules())
    return sum(1 for group in groups if group is not None and not group.is_split)


def remove(model: nn.Module) -> None:
    """Give every projection PEFT's own forward back."""
    for module in model.modules():
        if hasattr(module, OWN_FORWARD):
            del module.forward
            delattr(module, OWN_FORWARD)
            delattr(module, GROUP)


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Let PEFT compute every projection for a while, for a comparison."""
    groups = [group for m in model.modules() if (group := getattr(m, GROUP, None)) is not None]
    try:
        for group in groups:
            group.is_on = False
            group.forget()
        yield
    finally:
        for group in groups:
            group.is_on = True


def is_covered(module: Any, dtype: torch.dtype) -> bool:
    """Tell whether a module is a plain LoRA projection: one adapter, no DoRA, not in 8 bits."""
    from peft.tuners.lora.layer import Linear, LoraLayer

    base = getattr(module, "base_layer", None)
    if not isinstance(module, LoraLayer) or base is None or not hasattr(module, "lora_A"):
        return False
    is_packed = isinstance(base, PackedLinear) and base.bits == 4
    is_4bit = type(module).__name__ == "Linear4bit" and type(base).__name__ == "Linear4bit"
    is_plain = type(module) is Linear and type(base) is nn.Linear and base.weight.dtype == dtype
    if not (is_packed or is_4bit or is_plain) or len(module.lora_A) != 1:
        return False
    (name,) = module.lora_A
    return (
        not getattr(module, "lora_variant", {})
        and not module.use_dora.get(name, False)
        and not getattr(module, "fan_in_fan_out", False)
        and type(module.lora_dropout[name]) in (nn.Identity, nn.Dropout)
        and type(module.lora_A[name]) is nn.Linear
        and module.lora_B[name].bias is None
        and not base.weight.requires_grad
    )


def _forward_of(layer: Any, group: Group) -> Callable[..., Tensor]:
    """Return what a covered projection computes, PEFT's own forward where its state asks for it."""
    own: Callable[..., Tensor] = getattr(layer, OWN_FORWARD)
    names: Sequence[str] = [group.adapter]

    def forward(x: Tensor, *others: Any, **named: Any) -> Tensor:
        is_plain = not (layer.disable_adapters or layer.merged or others or named)
        if not (is_plain and group.is_on) or layer.active_adapters != names:
            return own(x, *others, **named)
        return group.call(layer, x)

    return forward
