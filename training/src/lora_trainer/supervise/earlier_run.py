"""Compare a start with the run that is already in its output folder.

Reads only, so that the preflight makes the same decision as the start. The worker compares the rest
(base model, rows) before it resumes from a checkpoint. Imports no torch.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..checkpoint_folder import step_of
from ..config.digest_keys import LENGTH_KEYS, NOT_IN_DIGEST
from ..config.schema import Config
from ..config.sections import sections
from ..config.settings import Settings
from ..config.start_adapter import SHAPE_KEYS
from ..errors import ConfigError
from ..plan import steps_of
from ..run_folder import RunFolder, is_own
from ..train import identity
from ..train.identity import EarlierFormError, Identity, Mark
from ..train.recorded_run import checkpoints, newest_identity, read_json

# Any of these says that a run was here.
TRACES = (
    RunFolder.digest,
    RunFolder.done,
    RunFolder.events,
    RunFolder.resolved,
    RunFolder.final_model,
    RunFolder.checkpoints,
    RunFolder.initial_adapter,
)
# Keys that name content: the base model and an adapter are compared by it, data here by name.
NAMED_DATA = ("dataset", "eval_dataset", "chat_template")
# With another value of these, an adapter cannot be trained further.
NEW_ADAPTER_KEYS = (
    "model_name_or_path",
    "the weights in the model_name_or_path folder",
    *(leaf for _, leaf in SHAPE_KEYS),
)
ASIDE = "--on_finished archive archives the finished run first"
AGAIN = "--resume never starts over (the old run is archived, not removed)"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a start does: begin or go on, move the old run aside first, or nothing at all."""

    does: Literal["go on", "move aside", "nothing"]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Earlier:
    """What an output folder says of the run in it."""

    folder: Path
    has_traces: bool
    is_finished: bool
    mark: Mark | None
    why_no_mark: str
    is_earlier_form: bool
    steps: tuple[int, ...]
    newest: Identity | None
    recorded: dict[str, Any]
    plan: dict[str, Any]

    @staticmethod
    def read(folder: Path) -> Earlier:
        """Read what is there; whatever cannot be read is left out."""
        is_earlier_form, mark, why = False, None, ""
        try:
            mark, why = identity.read_mark(folder)
        except EarlierFormError:
            is_earlier_form = True
        saved = checkpoints(folder)
        return Earlier(
            folder=folder,
            has_traces=has_traces(folder),
            is_finished=RunFolder(folder).done.exists(),
            mark=mark,
            why_no_mark=why,
            is_earlier_form=is_earlier_form,
            steps=tuple(step for path in saved if (step := step_of(path.name)) is not None),
            newest=newest_identity(saved),
            recorded=read_json(RunFolder(folder).resolved),
            plan=read_json(RunFolder(folder).plan),
        )

    @property
    def known(self) -> Mark | None:
        """Return how the run is known: by its mark, else by its newest checkpoint."""
        if self.mark is None and self.newest is not None:
            return Mark(self.newest.config, self.newest.adapter)
        return self.mark

    def planned(self, key: str) -> int | None:
        """Return a number of the run's plan; None if it was not written."""
        value = self.plan.get(key)
        return value if isinstance(value, int) and value >= 0 else None

    def changed(self, config: Config, leaves: Sequence[str]) -> list[str]:
        """Return the keys of these whose value is another one by now, with both values."""
        now = {
            leaf: v for part in config.model_dump(mode="json").values() for leaf, v in part.items()
        }
        before = {
            leaf: cell["value"]
            for part in self.recorded.values()
            if isinstance(part, dict)
            for leaf, cell in part.items()
            if isinstance(cell, dict) and "value" in cell
        }
        return [
            f"{leaf}: {_shown(before[leaf])} -> {_shown(now[leaf])}"
            for leaf in leaves
            if leaf in before and before[leaf] != now[leaf]
        ]


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run was to be by its plan, and how long it is to be now."""

    is_changed: bool
    change: str = ""
    why_not: str = ""

    @staticmethod
    def of(earlier: Earlier, config: Config) -> Length:
        """Compare with the plan, which the worker writes when it takes the run over."""
        before, warmup_before = earlier.planned("total_steps"), earlier.planned("warmup_steps")
        per_epoch = earlier.planned("steps_per_epoch")
        keys = ", ".join(earlier.changed(config, LENGTH_KEYS))
        if before is None or warmup_before is None or not per_epoch:
            return Length(bool(keys), keys, "its plan.json cannot be read")
        total, warmup = steps_of(config.training, per_epoch)
        if (total, warmup) == (before, warmup_before):
            return Length(is_changed=False)
        change = keys or f"{before} -> {total} steps"
        done = earlier.steps[-1] if earlier.steps else before
        kind = config.training.lr_scheduler_type
        if kind != "constant" and total != before:
            why = (
                f"with lr_scheduler_type {kind} learning rates depend on the number of steps: the "
                f"first {done} of {total} steps would differ from those of {before}; only a "
                "constant schedule can be continued"
            )
        elif warmup != warmup_before:
            why = (
                f"the warmup would have {warmup} steps instead of {warmup_before}; "
                f"--warmup_steps {warmup_before} keeps it"
            )
        else:
            why = f"{done} steps are done already" if total < done else ""
        return Length(True, change, why)


def has_traces(folder: Path) -> bool:
    """Return whether a run was in the folder."""
    return any((folder / name).exists() for name in TRACES)


def judge(folder: Path, settings: Settings) -> Verdict:
    """Decide what a start in this folder does.

    Raises:
        ConfigError: a run is there that is neither this one nor to be moved aside.
    """
    verdict = _judge(Earlier.read(folder), settings)
    start = settings.config.lora.adapter_name_or_path
    if verdict.does == "move aside" and start and _is_moved(Path(start), folder):
        raise ConfigError.of(
            "the adapter to start from would be archived with the earlier run",
            where=f"adapter_name_or_path: {start}",
            why=f"it is in {folder}, the output folder of this run",
            remedy="--run_name NEW_NAME trains in a folder beside it",
        )
    return verdict


def _is_moved(start: Path, folder: Path) -> bool:
    """Return whether a path is the run in the folder, or within that run's files."""
    if not start.resolve().is_relative_to(folder.resolve()):
        return False
    inside = start.resolve().relative_to(folder.resolve()).parts
    return not inside or is_own(inside[0])


def _judge(earlier: Earlier, settings: Settings) -> Verdict:
    output = settings.config.output
    # An archiving that was interrupted is completed under the lock, before anything begins.
    if not earlier.has_traces or RunFolder(earlier.folder).archiving.is_dir():
        return Verdict("go on")
    if earlier.is_finished:
        if output.on_finished == "archive":
            return Verdict("move aside")
        return _judge_finished(earlier, settings)
    if output.resume == "never":
        return Verdict("move aside")
    return _judge_unfinished(earlier, settings)


def _judge_unfinished(earlier: Earlier, settings: Settings) -> Verdict:
    config = settings.config
    if earlier.is_earlier_form and earlier.steps:
        raise ConfigError.of(
            "the output folder contains an unfinished run of an earlier version",
            where=str(earlier.folder),
            why=f"its {RunFolder.digest} identifies inputs by path; this version identifies them "
            "by content",
            remedy=f"finish it with the version that started it; {_options(earlier)}",
        )
    notes = [f"{earlier.why_no_mark}; the run is known by its checkpoints"]
    if not earlier.steps:
        if earlier.mark == mark_of(config):
            return Verdict("go on")
        is_known = earlier.mark is not None or earlier.is_earlier_form
        return Verdict("move aside", () if is_known else (earlier.why_no_mark,))
    if earlier.known is not None and earlier.known != mark_of(config):
        changes = _config_changes(earlier, config)
        raise ConfigError.of(
            "the output folder contains an unfinished run with another configuration",
            where=str(earlier.folder),
            why=f"changed since: {', '.join(changes)}",
            remedy=f"undo the change to resume; {_options(earlier, changes)}",
        )
    length = Length.of(earlier, config)
    if length.is_changed and length.why_not and earlier.planned("total_steps"):
        raise ConfigError.of(
            "the unfinished run cannot be resumed with another length",
            where=str(earlier.folder),
            why=f"{length.change}: {length.why_not}",
            remedy=f"undo the change to resume; {_options(earlier)}",
        )
    return Verdict("go on", () if earlier.mark else tuple(notes))


def _judge_finished(earlier: Earlier, settings: Settings) -> Verdict:
    config = settings.config
    changes = _finished_changes(earlier, config)
    if changes:
        raise ConfigError.of(
            "the output folder contains a finished run with another configuration",
            where=str(earlier.folder),
            why=f"changed since: {', '.join(changes)}",
            remedy=_options(earlier, changes),
        )
    length = Length.of(earlier, config)
    if not length.is_changed:
        return Verdict("nothing", (_finished_note(earlier), *_mark_note(earlier)))
    why = length.why_not
    if not why and earlier.is_earlier_form:
        why = "it was trained by an earlier version"
    if not why and config.output.resume == "never":
        why = "resume is never"
    if not why and not earlier.steps:
        why = "it has no checkpoint to continue from"
    if why:
        raise ConfigError.of(
            "the finished run cannot be continued to another length",
            where=str(earlier.folder),
            why=f"{length.change}: {why}",
            remedy=_options(earlier),
        )
    continued = f"the finished run is continued ({length.change})"
    until_then = f"{RunFolder.final_model} contains the shorter run's adapter until then"
    return Verdict("go on", (f"{continued}; {until_then}", *_mark_note(earlier)))


def _finished_changes(earlier: Earlier, config: Config) -> list[str]:
    """Return what makes a finished run another one than is asked for now."""
    changes = earlier.changed(config, NAMED_DATA)
    if earlier.known is None and not earlier.recorded:
        return [f"neither {RunFolder.digest} nor {RunFolder.resolved} can be read"]
    if earlier.known is None:
        changes += earlier.changed(config, digest_leaves())
    elif earlier.known != mark_of(config):
        changes += _config_changes(earlier, config)
    return changes or _base_changes(earlier, config)


def _base_changes(earlier: Earlier, config: Config) -> list[str]:
    """Compare the base model by its content, or by its name where either is not at hand."""
    renamed = earlier.changed(config, ("model_name_or_path", "model_revision"))
    content = identity.base_content(config.model) if earlier.newest else None
    if earlier.newest is None or content is None:
        return renamed
    if content() == earlier.newest.base:
        return []
    return renamed or ["the weights in the model_name_or_path folder"]


def mark_of(config: Config) -> Mark:
    """Return the mark of a run with this configuration."""
    return Mark(config.digest(), identity.adapter_digest(config))


def digest_leaves() -> list[str]:
    """Return the keys that the configuration's digest is made of."""
    return [
        leaf
        for name, kind in sections().items()
        if name not in ("output", "monitoring")
        for leaf in kind.model_fields
        if (name, leaf) not in NOT_IN_DIGEST
    ]


def _config_changes(earlier: Earlier, config: Config) -> list[str]:
    changed = earlier.changed(config, [*digest_leaves(), *LENGTH_KEYS, "adapter_name_or_path"])
    if changed:
        return changed
    is_same_config = earlier.known is not None and earlier.known.config == config.digest()
    return [
        "the weights of the adapter in adapter_name_or_path"
        if is_same_config
        else "a key or default of another version of the trainer"
    ]


def _options(earlier: Earlier, changes: Sequence[str] = ()) -> str:
    """Return what can be done, and how to keep what was trained where the adapter fits still."""
    options = (
        "--run_name NEW_NAME trains in a folder beside it; "
        f"{ASIDE if earlier.is_finished else AGAIN}"
    )
    fits = not any(one.startswith(f"{leaf}:") for one in changes for leaf in NEW_ADAPTER_KEYS)
    if not fits or not (earlier.steps or RunFolder(earlier.folder).final_model.is_dir()):
        return options
    start = (
        RunFolder(earlier.folder).final_model
        if RunFolder(earlier.folder).final_model.is_dir()
        else earlier.folder
    )
    return (
        f"{options}; --adapter_name_or_path {shlex.quote(str(start))} --run_name NEW_NAME "
        "continues from its adapter with the new configuration"
    )


def _finished_note(earlier: Earlier) -> str:
    run = RunFolder(earlier.folder)
    return (
        f"this run is already finished: its adapter is in {run.final_model}, its report is "
        f"{run.report}. To train again: --run_name NEW_NAME trains in a "
        f"folder beside it; {ASIDE}"
    )


def _mark_note(earlier: Earlier) -> tuple[str, ...]:
    return (earlier.why_no_mark,) if earlier.why_no_mark else ()


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
