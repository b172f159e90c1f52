"""Detect NaN and infinite numbers before they are saved or exported, and find the cause.

A non-finite loss has one of three causes: diverged weights, rows that overflow the model, or a
transient fault. Scoring rows alone distinguishes the first two, and rows are named as `file:line`;
if neither explains it, the supervisor retries once from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config.schema import TrainingSection
from ..data.batches import Rows, Sampler
from ..errors import NotFiniteError
from ..model.forward import CausalLM
from ..model.ranks import Ranks
from ..plan import Plan
from ..run.events import Event, Warned
from . import evaluate
from .checkpoint_store import CheckpointStore, OtherRunError
from .optim import B_NAMES

LISTED_ROWS = 5  # named one by one; the others are counted
SCORED_ROWS = 64  # of those that may be the cause, the most that are scored alone
CONTROL_ROWS = 4  # rows of other steps, scored to tell odd rows from diverged weights
# PEFT keeps the base's own module beside each one that is trained in full.
MODULE_TO_SAVE = (".modules_to_save.default.", ".original_module.")
START_AGAIN = "--resume never (this run is moved aside, not removed)"


class _Context(Protocol):
    """What of `loop.TrainingContext` is looked at here."""

    @property
    def causal(self) -> CausalLM: ...
    @property
    def parameters(self) -> Mapping[str, torch.nn.Parameter]: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    @property
    def sampler(self) -> Sampler: ...
    @property
    def rows(self) -> Rows: ...
    @property
    def eval_rows(self) -> Rows: ...
    @property
    def store(self) -> CheckpointStore: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def training(self) -> TrainingSection: ...
    @property
    def emit(self) -> Callable[[Event], None]: ...
    @property
    def ranks(self) -> Ranks: ...
    @property
    def name_rows(self) -> Callable[[Sequence[int], bool], list[str]]: ...


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no tensor holds a NaN or an infinity, with one synchronisation a device.

    The largest magnitude of a tensor keeps a NaN, and cannot overflow as a sum can.
    """
    groups: dict[torch.device, dict[torch.dtype, list[Tensor]]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            of_device = groups.setdefault(tensor.device, {})
            of_device.setdefault(tensor.dtype, []).append(tensor.detach())
    largest = [
        torch.cat([torch.stack(torch._foreach_norm(one, math.inf)).float() for one in of_device])
        for of_device in (list(group.values()) for group in groups.values())
    ]
    return all(bool(values.isfinite().all()) for values in largest)


def training_tensors(
    parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer
) -> Iterator[Tensor]:
    """Yield what a checkpoint keeps of the training: the parameters and their moments."""
    yield from parameters
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def check_before_save(context: _Context, step: int) -> None:
    """Refuse to save parameters or moments that are not finite; every rank must ask.

    Raises:
        NotFiniteError: some are not.
    """
    tensors = training_tensors(context.parameters.values(), context.optimizer)
    if not context.ranks.is_any(not is_finite(tensors)):
        return
    bad = [name for name, p in context.parameters.items() if not is_finite([p])]
    raise _diverged(
        context,
        f"the weights are not finite after step {step}",
        where=f"step {step}: {bad[0]}{_more(len(bad) - 1)}" if bad else f"step {step}: moments",
        why="the weights" if bad else "the optimizer's moments",
        step=step,
    )


def check_before_export(parameters: Iterable[Tensor], where: str) -> None:
    """Refuse to write an adapter that is not finite.

    Raises:
        NotFiniteError: it is not.
    """
    if not is_finite(parameters):
        raise NotFiniteError.of(
            "the adapter is not finite and was not exported",
            where=where,
            why="it contains NaN or infinite weights, and such an adapter generates no text",
            remedy=f"train with a lower --learning_rate and {START_AGAIN}",
        )


def step_error(
    context: _Context, step: int, loss: float, norm: float, rate: float
) -> NotFiniteError:
    """Return why optimizer step `step` (1 is the first), which was not taken, is not finite."""
    context.optimizer.zero_grad(set_to_none=True)
    indices = [int(index) for index in context.sampler.step_rows(step - 1)]
    figures = f"step {step}: loss {loss}, gradient norm {norm}, learning rate {rate:.3g}"
    bad = culprits(context.causal, context.rows, indices, has_gradients=math.isfinite(loss))
    if not bad:
        if math.isfinite(loss) and context.plan.precision == "float16":
            return _scale_collapsed(step, figures)
        return _diverged(
            context,
            f"the loss is not finite at step {step}",
            where=figures,
            why="the weights",
            step=step,
        )
    return _of_rows(
        f"the loss is not finite at step {step}: {_counted(len(bad), len(indices))}",
        named=context.name_rows(bad[:LISTED_ROWS], False),
        count=len(bad),
        step=step,
        remedy=f"remove or change {_them(bad)}{_in_float32(context)}, then start with "
        f"{START_AGAIN}",
    )


def evaluation_error(context: _Context, step: int, score: evaluate.Score) -> NotFiniteError:
    """Return why an evaluation is not finite."""
    what = f"the evaluation at step {step} is not finite"
    bad = culprits(context.causal, context.eval_rows, score.suspects)
    if not bad:
        return _diverged(
            context,
            what,
            where=f"step {step}: eval_loss {score.loss}",
            why="the weights",
            step=step,
        )
    return _of_rows(
        f"{what}: {_counted(len(bad), len(context.eval_rows))}",
        named=context.name_rows(bad[:LISTED_ROWS], True),
        count=len(bad),
        step=step,
        remedy="continue without that evaluation: add --on_nan warn; or remove or change "
        f"{_them(bad)}{_in_float32(context)} and start with {START_AGAIN}",
    )


def judge_evaluation(context: _Context, step: int, score: evaluate.Score) -> None:
    """End the run, or warn, where an evaluation is not finite, as `on_nan` says.

    Raises:
        NotFiniteError: `on_nan` is error.
    """
    if math.isfinite(score.loss):
        return
    error = evaluation_error(context, step, score)
    if context.training.on_nan == "error":
        raise error
    problem = error.problems[0]
    context.emit(Warned(message=f"{problem.what} ({problem.where}): {problem.why}"))


def culprits(
    causal: CausalLM,
    rows: Rows,
    suspects: Sequence[int],
    *,
    has_gradients: bool = False,
) -> list[int]:
    """Return the suspects whose loss alone is not finite; none where the weights explain it.

    A row is the cause if it overflows the base model too: weights that diverge overflow some
    rows before others. With `has_gradients` a gradient that is not finite counts. Every rank
    scores the same rows, so ranks that share a model may ask together.
    """
    if not is_finite(p for p in causal.model.parameters() if p.requires_grad):
        return []

    def odd_among(indices: Iterable[int]) -> list[int]:
        return [i for i in indices if not _is_row_finite(causal, rows, i, has_gradients)]

    # A row without a target has a loss of zero, whatever the weights are.
    asked = [index for index in suspects if _has_targets(rows, index)][:SCORED_ROWS]
    bad = odd_among(asked)
    if not bad:
        return []
    with _as_base(causal.model):
        bad = odd_among(bad)
        if len(bad) < len(asked):
            return bad
        others = (i for i in range(len(rows)) if i not in asked and _has_targets(rows, i))
        controls = list(itertools.islice(others, CONTROL_ROWS))
        return bad if len(odd_among(controls)) < len(controls) else []


@contextlib.contextmanager
def _as_base(model: Any) -> Iterator[None]:
    """Let the adapted model compute as its base does, with gradients for its adapter."""
    everything = dict(model.named_parameters())
    trainable = {name: p for name, p in everything.items() if p.requires_grad}
    kept = {name: p.detach().clone() for name, p in trainable.items()}
    with torch.no_grad():
        for name, p in trainable.items():
            original = everything.get(name.replace(*MODULE_TO_SAVE))
            if any(part in name for part in B_NAMES):
                p.zero_()
            elif original is not None and original is not p and original.shape == p.shape:
                p.copy_(original)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in trainable.items():
                p.copy_(kept[name])


def _has_targets(rows: Rows, index: int) -> bool:
    return evaluate.take(rows, [index]).targets > 0


def _is_row_finite(causal: CausalLM, rows: Rows, index: int, has_gradients: bool) -> bool:
    micro = evaluate.take(rows, [index])
    was_training = causal.model.training
    causal.model.eval()
    try:
        if not math.isfinite(causal.score(micro)[0]):
            return False
        if not has_gradients:
            return True
        causal.model.train(was_training)
        causal.loss(micro, 1 / micro.targets).backward()
        gradients = [p.grad for p in causal.model.parameters() if p.grad is not None]
        return is_finite(gradients)
    finally:
        causal.model.train(was_training)
        causal.model.zero_grad(set_to_none=True)


def _scale_collapsed(step: int, figures: str) -> NotFiniteError:
    error = NotFiniteError.of(
        f"the gradients overflow float16 at step {step} at every loss scale",
        where=figures,
        why="the loss scale was reduced to 1, but some are still over 65,504; no single row is "
        "the cause",
        remedy=f"train in float32: add --fp16 false --bf16 false and {START_AGAIN}, or lower "
        "--learning_rate",
    )
    assert isinstance(error, NotFiniteError)
    error.step = step
    return error


def _diverged(context: _Context, what: str, *, where: str, why: str, step: int) -> NotFiniteError:
    training, store = context.training, context.store
    rate = f"--learning_rate {training.learning_rate / 10:.3g}"
    clipped = "" if 0 < training.max_grad_norm <= 1 else " --max_grad_norm 1"
    error = NotFiniteError.of(
        what,
        where=where,
        why=f"{why} have diverged, and they were not saved; {last_sound(store)}",
        remedy=f"lower learning_rate: add {rate}{clipped} and {START_AGAIN}, or {rate}{clipped} "
        f"and another --run_name{_in_float32(context)}",
    )
    assert isinstance(error, NotFiniteError)
    error.step, error.retry = step, NotFiniteError.KIND
    return error


def _of_rows(
    what: str, *, named: Sequence[str], count: int, step: int, remedy: str
) -> NotFiniteError:
    error = NotFiniteError.of(
        what,
        where=", ".join(named) + _more(count - len(named)),
        why="scored alone, its loss is NaN or infinite, but that of other rows is finite: the row "
        "is the cause, not the learning rate",
        remedy=remedy,
    )
    assert isinstance(error, NotFiniteError)
    error.step = step
    return error


def last_sound(store: CheckpointStore) -> str:
    """Return a clause on the newest checkpoint, which is read for it."""
    try:
        snapshot, _ = store.newest()
    except OtherRunError:
        snapshot = None
    if snapshot is None:
        return "there is no checkpoint yet"
    step = snapshot.state.step
    if is_finite([*snapshot.adapter.values(), *snapshot.optimizer.values()]):
        return f"the checkpoint of step {step} is valid and finite"
    return f"the checkpoint of step {step} is not finite either"


def _counted(bad: int, of: int) -> str:
    return f"{bad:,} of {of:,} rows {'is' if bad == 1 else 'are'} the cause"


def _them(bad: Sequence[int]) -> str:
    return "that row" if len(bad) == 1 else "those rows"


def _more(count: int) -> str:
    return f" and {count:,} more" if count > 0 else ""


def _in_float32(context: _Context) -> str:
    key = {"bfloat16": "bf16", "float16": "fp16"}.get(context.plan.precision)
    return f", or set --{key} false" if key else ""
