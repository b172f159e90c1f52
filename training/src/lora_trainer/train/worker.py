"""The training process.

The supervisor starts it with a `WorkerSpec` (config, folders) as JSON on standard input. It reports
events, one JSON object per line, on the file descriptor in LORA_TRAINER_EVENTS_FD. It knows nothing
of HTTP or terminals. Its exit code becomes the run's unless the supervisor
restarts or ends it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Literal

from ..errors import ConfigError
from ..faults import explain
from ..host.disk import sync, write_json
from ..run.events import (
    Event,
    Failed,
    Finished,
    Generated,
    PhaseChanged,
    Planned,
    Resumed,
    Sample,
    Stopped,
    Warned,
    progress_of,
)
from ..run.protocol import EVENTS_FD, PEER_LOST, STACKS_SIGNAL, WorkerSpec
from ..run.unrecorded import Unrecorded, recall
from ..run_folder import RunFolder
from .channel import EventPipe, StopFlag, StopRequested
from .peers import Peers

if TYPE_CHECKING:
    from .checkpoint import Snapshot, TrainState
    from .setup import TrainingSetup


def main() -> int:
    """Read the spec and train; return the exit code."""
    # The supervisor asks for them when the run is stalled.
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    pipe = EventPipe(int(os.environ[EVENTS_FD]))
    stop = StopFlag()
    emit: Callable[[Event], None] = pipe.emit
    peers = Peers(pipe, stop)
    try:
        spec = WorkerSpec.read(sys.stdin.read())
        if spec.launch is not None:
            emit = peers.beside(emit)
        if spec.rank > 0:
            emit = _only_failures(emit)
        emit(PhaseChanged(phase="starting"))
        code = run(spec, emit, stop, peers)
        return code if peers.have_finished() else PEER_LOST
    except StopRequested:
        if peers.have_orphan():
            return PEER_LOST
        emit(Stopped(step=stop.step, signal=stop.signal or "SIGTERM"))
        return 143
    except BaseException as error:
        is_lost = is_peer_lost(error)
        if not (is_lost and peers.is_followed):
            with contextlib.suppress(OSError):  # the log may be on the disk that is full
                traceback.print_exc()
        if is_lost:
            stop.is_deferred = True
            peers.explain()
            return PEER_LOST
        known = explain(error)
        problems = [asdict(problem) for problem in known.problems]
        failed = Failed(exit_code=known.exit_code, problems=problems)
        failed = replace(failed, retry=known.retry, step=known.step)
        peers.report(failed)
        pipe.emit(failed)
        return known.exit_code
    finally:
        peers.leave()
        pipe.close()


def _only_failures(emit: Callable[[Event], None]) -> Callable[[Event], None]:
    """Let a rank other than the first report its failure only."""
    return lambda event: emit(event) if isinstance(event, Failed) else None


def is_peer_lost(error: BaseException) -> bool:
    """Return whether an error only says that another rank is gone, which that one explains."""
    if "torch" not in sys.modules:
        return False
    from ..model import ranks

    return ranks.is_peer_lost(error)


def run(
    spec: WorkerSpec, emit: Callable[[Event], None], stop: StopFlag, peers: Peers | None = None
) -> int:
    """Load, prepare, train, evaluate, export.

    Raises:
        StopRequested: on any rank.
    """
    from ..model import quantize

    quantize.skip_bitsandbytes_import(spec.config)
    from ..machine import read_machine
    from ..model.backend import usable_machine

    # A fault of this process's GPU reaches rank 0 through the store.
    meeting = peers.begin(spec.launch) if peers and spec.launch else None
    # Before ranks meet, and before transformers and peft are imported, which takes seconds.
    machine = usable_machine(read_machine(), spec.local_ranks)
    from ..model.ranks import join, over_hosts
    from .loop import train
    from .session import open_session

    emit(PhaseChanged(phase="loading", detail=spec.config.model.model_name_or_path))
    ranks = join(
        spec.rank,
        spec.ranks,
        meeting.store if meeting else spec.store,
        machine.device,
        spec.here,
        visible_gpus=len(machine.gpus),
    )
    machine = over_hosts(machine, ranks)
    setup = open_session(spec.config, spec.output_dir, emit, ranks, machine)
    must_stop = ranks.agreed(stop.is_set)
    snapshot, skipped = _newest(spec, setup)
    for reason in skipped:
        emit(Warned(message=f"checkpoint skipped: {reason}"))
    unrecorded = Unrecorded(RunFolder(spec.output_dir).events)
    emit = unrecorded.beside(emit)
    emit(Planned(plan=setup.plan.to_dict()))
    if ranks.is_first:
        # From here on the folder's run is this one; a finished one may be continued.
        RunFolder(spec.output_dir).done.unlink(missing_ok=True)
        sync(spec.output_dir)
        _write_facts(spec, setup)
    state = setup.restore(snapshot, emit)
    stop.step = state.step
    if snapshot is not None and state.step:
        _recall(spec, setup, snapshot, emit)
        path = setup.store.path_of(state.step).name
        emit(Resumed(step=state.step, path=f"checkpoints/{path}", skipped=skipped))
    elif setup.initial is not None:
        # This init changes the base: later, no switched-off adapter gives it back.
        _answer(spec, setup, emit, must_stop, when="before", step=0)
    first_step = state.step + 1 if state.step else 0
    with _tracked(spec, setup, emit, first_step) as record, _deferring(stop):
        emit(PhaseChanged(phase="training"))
        state = train(setup.context(record, must_stop, unrecorded.up_to_now), state)
    stop.step = state.step
    if must_stop():
        raise StopRequested
    _finish(spec, setup, emit, must_stop, state)
    return 0


def _finish(
    spec: WorkerSpec,
    setup: TrainingSetup,
    emit: Callable[[Event], None],
    must_stop: Callable[[], bool],
    state: TrainState,
) -> None:
    """Export, answer the held-out prompts, and write the model card."""
    from ..machine import peak_memory_bytes

    adapter_step = setup.take_best(state)
    if setup.ranks.is_first:
        # Before the answers: no fault while they are made may cost the adapter.
        emit(PhaseChanged(phase="exporting"))
        setup.export(spec, state)
    if setup.initial is None:
        with setup.untrained():
            _answer(spec, setup, emit, must_stop, when="before", step=0)
    _answer(spec, setup, emit, must_stop, when="after", step=state.step)
    if not setup.ranks.is_first:
        return
    setup.write_card(spec, state)
    emit(
        Finished(
            step=state.step,
            train_seconds=state.train_seconds,
            tokens_seen=state.tokens_seen,
            peak_memory_bytes=peak_memory_bytes(),
            results=[
                RunFolder.final_model,
                RunFolder.report,
                RunFolder.loss_chart,
                RunFolder.results,
            ],
            adapter_step=adapter_step,
        )
    )


def _newest(spec: WorkerSpec, setup: TrainingSetup) -> tuple[Snapshot | None, list[str]]:
    from .checkpoint_store import OtherRunError
    from .identity import other_run
    from .peers import check_shared_folder

    try:
        snapshot, skipped = setup.store.newest(setup.refuse)
    except OtherRunError as error:
        folder = RunFolder(spec.output_dir).checkpoints / str(error)
        raise other_run(folder, error.digest, setup.store.digest) from None
    check_shared_folder(setup.ranks, snapshot.state.step if snapshot else 0, spec.output_dir)
    if snapshot is not None and snapshot.state.step > setup.plan.total_steps:
        raise ConfigError.of(
            "the run has already trained more steps than are configured now",
            where=str(setup.store.path_of(snapshot.state.step)),
            why=f"the plan has {setup.plan.total_steps} steps",
            remedy="undo the change to resume, use another --run_name, or start over with "
            "--resume never (the old run is archived, not removed)",
        )
    return snapshot, skipped


@contextlib.contextmanager
def _tracked(
    spec: WorkerSpec, setup: TrainingSetup, emit: Callable[[Event], None], first_step: int
) -> Iterator[Callable[[Event], None]]:
    """Yield an `emit` whose figures go to the trackers and the model card, too."""
    from .trackers import open_trackers

    shown = spec.redaction.value(spec.config.masked())
    tracker = open_trackers(
        spec.config.monitoring.report_to if spec.rank == 0 else [],
        RunFolder(spec.output_dir).tracker_logs,
        spec.run_name,
        {leaf: value for leaves in shown.values() for leaf, value in leaves.items()},
        first_step=first_step,
        on_warning=lambda message: emit(Warned(message=message)),
    )

    def record(event: Event) -> None:
        emit(event)
        if figures := figures_of(event):
            tracker.log(figures, int(event.step))  # type: ignore[attr-defined]
            setup.keep_figures(figures)

    try:
        yield record
    finally:
        tracker.close()


@contextlib.contextmanager
def _deferring(stop: StopFlag) -> Iterator[None]:
    """Let a signal wait for the next step boundary."""
    stop.is_deferred = True
    try:
        yield
    finally:
        stop.is_deferred = False


def figures_of(event: Event) -> dict[str, float]:
    """Return the figures of an event that trackers keep."""
    wanted = {
        "step": ("loss", "learning_rate", "grad_norm", "epoch"),
        "eval": ("eval_loss", "eval_perplexity", "eval_token_accuracy"),
    }
    return {name: float(getattr(event, name)) for name in wanted.get(event.kind, ())}


def _recall(
    spec: WorkerSpec,
    setup: TrainingSetup,
    snapshot: Snapshot,
    emit: Callable[[Event], None],
) -> None:
    """Take the figures of earlier attempts, as far as they stand, for the model card.

    Those that the recording lacks are repeated for it.
    """
    recording = RunFolder(spec.output_dir).events
    figures, missing = recall(recording, snapshot.figures, snapshot.state.step)
    for event in missing:
        emit(replace(event, time=time.time()))
    for figure in figures:
        if isinstance(figure, Generated):
            setup.keep_figures({f"exact_match_{figure.when}": figure.exact_match})
        else:
            setup.keep_figures(figures_of(figure))


def _answer(
    spec: WorkerSpec,
    setup: TrainingSetup,
    emit: Callable[[Event], None],
    must_stop: Callable[[], bool],
    *,
    when: Literal["before", "after"],
    step: int,
) -> None:
    """Answer the held-out prompts, if asked for, and tell how many answers are exact.

    "Before" is the base model; it is asked after the training, by switching the adapter
    off, so that nothing stands between a start and its first step.
    """
    from . import evaluate

    if not spec.config.training.eval_generate or not len(setup.eval_rows):
        return
    emit(PhaseChanged(phase="evaluating", detail=f"answers {when} training"))
    start = time.monotonic()
    asked = evaluate.questions(setup.eval_rows)
    answers = evaluate.answer(
        setup.causal,
        setup.tokenizer,
        asked,
        ends=setup.stops,
        batch_examples=setup.plan.eval_batch_examples,
        max_new_tokens=spec.config.training.eval_max_new_tokens,
        should_stop=must_stop,
        progress=progress_of(emit, "answers", len(asked)),
        ranks=setup.ranks,
    )
    if not answers:
        return
    exact = sum(one.is_exact for one in answers) / len(answers)
    setup.keep_figures({f"exact_match_{when}": exact})
    seconds = time.monotonic() - start
    emit(Generated(step=step, when=when, exact_match=exact, rows=len(answers), seconds=seconds))
    for one in answers[: spec.config.monitoring.sample_count]:
        emit(
            Sample(
                step=step,
                when=when,
                index=one.index,
                prompt=one.prompt,
                expected=one.expected,
                answer=one.answer,
            )
        )


def _write_facts(spec: WorkerSpec, setup: TrainingSetup) -> None:
    """Write plan.json, data.json and environment.json."""
    run = RunFolder(spec.output_dir)
    contents = {
        run.plan: setup.plan.to_dict(),
        run.data: setup.data_facts,
        run.environment: setup.versions | {"python": platform.python_version()},
    }
    for path, content in contents.items():
        write_json(path, spec.redaction.value(content))


if __name__ == "__main__":
    sys.exit(main())
