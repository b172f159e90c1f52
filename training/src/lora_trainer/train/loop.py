"""The training loop: forward, backward, clip, step; evaluate and save at step boundaries.

One optimizer step gets its rows from the sampler, normalises its loss by all supervised tokens of
the step, and is the unit of everything else: events, evaluations, checkpoints, stops. The loop's
whole state is a `TrainState`; continuing from a checkpoint is the same code as never having
stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from ..config.schema import TrainingSection
from ..data.batches import Rows, Sampler
from ..machine import peak_memory_bytes
from ..model.forward import CausalLM
from ..model.ranks import ALONE, Ranks, own_batches, sum_step
from ..plan import Plan, learning_rate
from ..run.events import (
    Evaluated,
    Event,
    PhaseChanged,
    Progress,
    RankFigures,
    RanksMeasured,
    StepDone,
    progress_of,
)
from ..run.memory_limits import MemoryLimits
from . import evaluate, finite
from .checkpoint import TrainState
from .checkpoint_store import CheckpointStore
from .fitting import Fitting
from .loss_scale import LossScale
from .optim import raise_versions, set_learning_rate
from .saver import Saver

# Interval of progress events for steps that are not logged, for the watchdog.
BEAT_SECONDS = 5.0


@dataclass(frozen=True)
class TrainingContext:
    """What the loop drives, put together by the worker."""

    causal: CausalLM
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    rows: Rows
    eval_rows: Rows
    store: CheckpointStore
    plan: Plan
    training: TrainingSection
    logging_steps: int
    emit: Callable[[Event], None]
    should_stop: Callable[[], bool]
    ranks: Ranks = ALONE
    # The figures that a checkpoint carries, because the recording may lack them.
    unrecorded: Callable[[], Callable[[], Sequence[str]]] = lambda: tuple
    # Names rows by file and line, given their indices and whether they are held out.
    name_rows: Callable[[Sequence[int], bool], list[str]] = lambda indices, _: [
        f"row {index}" for index in indices
    ]
    # Keeps what the run was cut down to when memory ran out, for later starts.
    keep_limits: Callable[[MemoryLimits], None] = lambda _: None


def train(context: TrainingContext, state: TrainState) -> TrainState:
    """Train from `state` to the plan's end, an early stop, or a stop request; saved on return."""
    with Saver(context.store, context.emit) as saver:
        return _train(context, state, saver)


def _train(context: TrainingContext, state: TrainState, saver: Saver) -> TrainState:
    saved_step = state.step if state.step else -1
    fitting = Fitting(
        context.plan, context.causal, context.ranks, context.emit, context.keep_limits
    )
    context.causal.model.train()
    beat = progress_of(context.emit, "steps", context.plan.total_steps, BEAT_SECONDS)
    while True:
        saver.check()
        if saved_step != state.step and _ends_between_evaluations(context, state):
            # Its evaluation is the end's alone: a longer run, which may continue from this
            # checkpoint, does not have it, and must not take this step for its best.
            saved_step = _save_at(context, state, saver, is_last=True)
        if _is_evaluation_due(context, state):
            state = _evaluate(context, state, fitting)
        is_done = state.step >= context.plan.total_steps or _is_out_of_patience(context, state)
        must_end = is_done or context.should_stop()
        if saved_step != state.step and (must_end or _is_save_due(context, state)):
            saved_step = _save_at(context, state, saver, is_last=must_end)
        if must_end:
            return state
        state = _step(context, state, fitting)
        if not _is_logged(context, state.step):
            beat(state.step)


def _save_at(context: TrainingContext, state: TrainState, saver: Saver, *, is_last: bool) -> int:
    """Save on rank 0, but not before the first step; return the step."""
    if state.step:
        finite.check_before_save(context, state.step)
    if state.step and context.ranks.is_first:
        figures = context.unrecorded()
        saver.save(state, context.parameters, context.optimizer, figures, is_last=is_last)
    return state.step


def _ends_between_evaluations(context: TrainingContext, state: TrainState) -> bool:
    every = context.plan.eval_every_steps
    return state.step >= context.plan.total_steps and (not every or state.step % every != 0)


def _step(context: TrainingContext, state: TrainState, fitting: Fitting) -> TrainState:
    """Run one optimizer step; in float16 repeat it at half the loss scale on overflow."""
    start = time.monotonic()
    training, plan = context.training, context.plan
    rate = learning_rate(
        state.step,
        peak=plan.peak_learning_rate,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        kind=training.lr_scheduler_type,
        least=training.min_lr_rate,
    )
    set_learning_rate(context.optimizer, rate)
    scale = (state.loss_scale or LossScale()) if plan.precision == "float16" else None
    while True:
        taken = _gradients(context, state, fitting, scale)
        if math.isfinite(taken.loss) and math.isfinite(taken.norm):
            break
        if scale is None or scale.is_least or not math.isfinite(taken.loss):
            raise finite.step_error(context, state.step + 1, taken.loss, taken.norm, rate)
        context.optimizer.zero_grad(set_to_none=True)
        scale = scale.after_overflow()
        context.emit(Progress(done=state.step, total=plan.total_steps, unit="steps"))
    context.optimizer.step()
    raise_versions(context.optimizer)
    context.optimizer.zero_grad(set_to_none=True)
    after = state.after_step(
        taken.tokens,
        taken.targets,
        time.monotonic() - start,
        None if scale is None else scale.after_step(),
    )
    if _is_logged(context, after.step):
        context.emit(_step_event(context, state, after, rate=rate, taken=taken))
        if len(taken.measured) > 1:
            context.emit(ranks_event(after.step, taken.measured))
    return after


@dataclass(frozen=True, slots=True)
class _Gradients:
    """A step's mean loss, the norm of its gradients before clipping, and what it took."""

    loss: float
    norm: float
    tokens: int
    targets: int
    measured: Sequence[RankFigures]


def _gradients(
    context: TrainingContext, state: TrainState, fitting: Fitting, scale: LossScale | None
) -> _Gradients:
    """Compute a step's gradients and clip them: of its micro-batches those that are this rank's."""
    start = time.monotonic()
    ranks, parameters = context.ranks, list(context.parameters.values())
    pieces = fitting.cut(context.rows, context.sampler.step_rows(state.step))
    batches = [evaluate.take(context.rows, rows) for rows in pieces]
    targets = sum(batch.targets for batch in batches)
    own = own_batches([batch.tokens for batch in batches], ranks, context.causal.is_sharded)
    multiple = 1.0 if scale is None else scale.value
    summed = fitting.accumulate(
        context.rows,
        [(pieces[index], index, weight) for index, weight in own],
        multiple / max(1, targets),
        context.optimizer,
        seed=context.training.seed,
        step=state.step,
    )
    if ranks.count > 1:
        _wait_for_kernels()
    figures = RankFigures(
        rank=ranks.rank,
        seconds=time.monotonic() - start,
        tokens=sum(batches[index].tokens for index, weight in own if weight),
        memory_bytes=peak_memory_bytes(),
        gpu_memory_bytes=_gpu_memory_bytes(),
        **fitting.measured(),
    )
    summed, measured = sum_step(ranks, parameters, summed, figures)
    fitting.agree(measured, state.step)
    if scale is not None:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / multiple)
    # An infinite bound measures the norm and scales nothing.
    bound = context.training.max_grad_norm or math.inf
    clipped = torch.nn.utils.clip_grad_norm_(parameters, bound)
    # Read together: the host waits for the device once a step.
    loss, norm = torch.stack([summed, clipped.to(summed.device)]).tolist()
    tokens = sum(batch.tokens for batch in batches)
    return _Gradients(loss / multiple, norm, tokens, targets, measured)


def _wait_for_kernels() -> None:
    """Wait until this rank's kernels, which are only launched so far, have run.

    They are part of its time. The sum over ranks that follows waits for them anyway, and for
    those of the other ranks; copies on other streams are not waited for.
    """
    if torch.cuda.is_initialized():
        done = torch.cuda.Event()
        done.record()
        done.synchronize()


def _is_logged(context: TrainingContext, step: int) -> bool:
    return step % context.logging_steps == 0 or step in (1, context.plan.total_steps)


def _step_event(
    context: TrainingContext,
    before: TrainState,
    after: TrainState,
    *,
    rate: float,
    taken: _Gradients,
) -> StepDone:
    scale = after.loss_scale
    return StepDone(
        step=after.step,
        epoch=context.sampler.epoch_at(after.step),
        loss=taken.loss,
        learning_rate=rate,
        grad_norm=taken.norm,
        step_seconds=after.train_seconds - before.train_seconds,
        tokens=after.tokens_seen - before.tokens_seen,
        trained_tokens=after.trained_tokens_seen - before.trained_tokens_seen,
        tokens_seen=after.tokens_seen,
        memory_bytes=peak_memory_bytes(),
        gpu_memory_bytes=_gpu_memory_bytes(),
        loss_scale=0.0 if scale is None else scale.value,
        skipped_steps=0 if scale is None else scale.skipped_steps,
    )


def ranks_event(step: int, measured: Sequence[RankFigures]) -> RanksMeasured:
    """Return what each rank did in a step, and which one the others waited for."""
    slowest = max(measured, key=lambda one: one.seconds)
    return RanksMeasured(
        step=step,
        slowest=slowest.rank,
        ranks=[asdict(one) | {"tokens_per_second": one.tokens_per_second} for one in measured],
    )


def _gpu_memory_bytes() -> int:
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_initialized() else 0


def _is_evaluation_due(context: TrainingContext, state: TrainState) -> bool:
    if not len(context.eval_rows) or state.evaluated_step == state.step:
        return False
    every = context.plan.eval_every_steps
    is_interval = every > 0 and state.step > 0 and state.step % every == 0
    # At step 0 for the table's "before", at the end for its "after".
    return is_interval or state.step in (0, context.plan.total_steps)


def _evaluate(context: TrainingContext, state: TrainState, fitting: Fitting) -> TrainState:
    """Evaluate; a stop request in between leaves it to the resumed run."""
    context.emit(PhaseChanged(phase="evaluating", detail=f"step {state.step}"))
    score = evaluate.score(
        context.causal,
        context.eval_rows,
        batch_examples=fitting.sizes.eval_batch_examples,
        is_by_tokens=context.plan.micro_batch_tokens > 0,
        should_stop=context.should_stop,
        progress=progress_of(context.emit, "rows", len(context.eval_rows)),
        ranks=context.ranks,
    )
    if score is None:
        return state
    fitting.agree_on_evaluation(score.batch_examples, state.step)
    after = state.after_evaluation(score.loss, context.training.early_stopping_threshold)
    context.emit(
        Evaluated(
            step=state.step,
            eval_loss=score.loss,
            eval_perplexity=score.perplexity,
            eval_token_accuracy=score.token_accuracy,
            eval_tokens=score.targets,
            eval_seconds=score.seconds,
            is_best=after.best_step == state.step,
        )
    )
    finite.judge_evaluation(context, state.step, score)
    context.emit(PhaseChanged(phase="training"))
    return after


def _is_out_of_patience(context: TrainingContext, state: TrainState) -> bool:
    patience = context.training.early_stopping_patience
    return patience > 0 and state.evaluations_without_better >= patience


def _is_save_due(context: TrainingContext, state: TrainState) -> bool:
    every = context.plan.save_every_steps
    is_new_best = state.best_step == state.step
    return state.step > 0 and (is_new_best or (every > 0 and state.step % every == 0))
