"""Find before training what would fail during it; all problems at once.

Two passes. `preflight` needs no torch and takes well under a second: paths, rights,
disk, model files, packages. `check_all` then loads tokenizer and data for the masks,
and the model's config for the plan.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import typer

from ..batch import NOT_BEGUN, RunBatch
from ..config.schema import EMBEDDED_MODEL
from ..config.settings import Settings
from ..errors import ConfigError, DataError, Problem, StorageError, TrainerError
from ..machine import free_disk_bytes, read_machine
from ..model import precision, stacks
from ..plan import process_count
from ..run.folder import check_folder, output_address, output_folder
from ..supervise import earlier_run
from ..train.recorded_run import begun_batch
from ..train.trackers import missing_trackers
from ..units import size

# Events, report, plots and logs of a run; checkpoints are added by the plan.
LEAST_DISK_BYTES = 200 << 20


def preflight(settings: Settings) -> None:
    """Check what can be checked without torch.

    Raises:
        TrainerError: of the first problem's kind, holding all problems.
    """
    raise_all(preflight_faults(settings))


def preflight_faults(settings: Settings) -> list[TrainerError]:
    """Return what `preflight` finds."""
    checks = (
        _check_gpus,
        _check_output,
        _check_disk,
        _check_model,
        _check_data,
        _check_packages,
        _check_processes,
    )
    return [fault for one in checks for fault in _faults_of(one, settings)]


def raise_all(faults: list[TrainerError]) -> None:
    """Raise all faults as one, with the first one's exit code."""
    if faults:
        raise type(faults[0])([problem for fault in faults for problem in fault.problems])


def _faults_of(one: Callable[[Settings], None], settings: Settings) -> list[TrainerError]:
    try:
        one(settings)
    except TrainerError as error:
        return [error]
    return []


def _check_gpus(_: Settings) -> None:
    stacks.check_gpus(read_machine(), stacks.installed())


def _check_output(settings: Settings) -> None:
    check_folder(output_folder(settings))
    if address := output_address(settings):
        from ..remote import folder

        folder.check(address)
        return  # the earlier run is there, and compared once it was brought from there
    earlier_run.judge(output_folder(settings), settings)


def _check_disk(settings: Settings) -> None:
    folder = output_folder(settings)
    free = free_disk_bytes(folder)
    if free < LEAST_DISK_BYTES:
        raise StorageError.of(
            "the disk is nearly full",
            where=f"output_dir: {folder}",
            why=f"{size(free)} are free, a run needs at least {size(LEAST_DISK_BYTES)}",
            remedy=f"free disk space; what takes it: du -sh {folder.parent}/*",
        )


def _check_model(settings: Settings) -> None:
    from ..model import embedded, load

    name = settings.config.model.model_name_or_path
    if name == EMBEDDED_MODEL:
        embedded.check_room(load.cache_of(settings.config.model))
    elif Path(name).is_dir():
        raise_all(load.local_problems(Path(name)))
    elif load.looks_like_path(name):
        load.locate(settings.config.model)


def _check_data(settings: Settings) -> None:
    from ..data.resolve import SourceSpec, locate

    data = settings.config.data
    faults: list[TrainerError] = []
    for named in (data.dataset, data.eval_dataset):
        entries = [] if named is None else [named] if isinstance(named, str) else list(named)
        for entry in entries:
            path = entry if isinstance(entry, str) else entry.path
            try:
                locate(SourceSpec(path_or_id=path, datasets_dir=data.datasets_dir))
            except TrainerError as error:
                faults.append(error)
    raise_all(faults)


def _check_packages(settings: Settings) -> None:
    from ..model import quantize, zero

    faults: list[TrainerError] = []
    has_gpu = read_machine().has_gpu
    config, _ = quantize.as_possible(settings.config, has_gpu=has_gpu)
    if problems := missing_trackers(settings.config.monitoring.report_to):
        faults.append(ConfigError(problems))
    faults += _faults_of(lambda _: quantize.check_bitsandbytes(config, has_gpu=has_gpu), settings)
    if settings.config.training.parallelism == "fsdp":
        faults += _faults_of(lambda _: quantize.check_sharding(config), settings)
    if settings.config.training.parallelism == "deepspeed":
        faults += _faults_of(lambda _: zero.check(config), settings)
    faults += _faults_of(_check_flash_attention, settings)
    raise_all(faults)


def _check_processes(settings: Settings) -> None:
    process_count(settings.config, read_machine())


def _check_flash_attention(settings: Settings) -> None:
    """Refuse flash attention that is required where it cannot be used, by the reason's name."""
    from ..model import flash

    model, machine = settings.config.model, read_machine()
    # On a CPU, where the clock would have to say, there is no flash-attn whatever it says.
    used = precision.choose_precision(model, machine)[0] if machine.has_gpu else "float32"
    where = settings.origins["use_flash_attention"].location
    flash.choose(model.use_flash_attention, machine, used, where=where)


def check_all(settings: Settings, *, sample_rows: int = 0) -> None:
    """Run both passes and print what was found; raise when anything is wrong."""
    faults = preflight_faults(settings)
    if not any(isinstance(fault, DataError) for fault in faults):
        faults += _faults_of(lambda s: _check_rows(s, sample_rows), settings)
    raise_all(_unique(faults))
    typer.echo("no problems found")


def _unique(faults: list[TrainerError]) -> list[TrainerError]:
    """Drop what both passes found."""
    seen: set[Problem] = set()
    kept = []
    for fault in faults:
        if not seen.issuperset(fault.problems):
            kept.append(fault)
        seen.update(fault.problems)
    return kept


def _check_rows(settings: Settings, sample_rows: int) -> None:
    """Tokenize all rows, audit their masks, say what they come to."""
    from ..data.changes import facts_of
    from ..data.fidelity import default_system_prompt
    from ..data.template import ChatTemplate
    from ..model import load
    from ..train.datasets import data_warnings, end_warning, format_of_splits, open_data
    from ..train.dry_run import preview

    config = settings.config
    source = load.locate(config.model)
    tokenizer = load.load_tokenizer(source, config.model)
    splits = open_data(config, source, tokenizer)
    plan = preview(config, source, splits, begun=_begun_batch(settings))
    report = splits.train_report
    typer.echo(f"base model   {source.name}")
    typer.echo(
        f"data         {len(splits.train_rows)} rows to train, {len(splits.eval_rows)} held out; "
        f"{report.tokens} tokens, {report.trained_tokens} trained"
    )
    typer.echo(
        f"lengths      {report.p50_tokens} median, {report.p99_tokens} in 99%, "
        f"{report.longest_tokens} longest; {report.rows_truncated} truncated, "
        f"{sum(report.rows_dropped.values())} dropped, {sum(report.rows_skipped.values())} skipped"
    )
    if report.unused_fields:
        typer.echo(f"not used     {', '.join(report.unused_fields)} (fields of the rows)")
    load.use_template(tokenizer, config.data.chat_template)
    has_template = bool(tokenizer.chat_template) and bool(report.rows_changed)
    own = default_system_prompt(ChatTemplate.of(tokenizer)) if has_template else ""
    for fact in facts_of(report.rows_changed, own):
        typer.echo(f"template     {fact}")
    typer.echo(
        f"plan         {plan.total_steps} steps of {plan.to_dict()['batch']}, "
        f"{plan.trainable_parameters:,} trainable parameters on a base of {plan.parameters:,}, "
        f"about {size(plan.estimated_memory_bytes)} of {size(plan.memory_limit_bytes)} memory"
    )
    prompt_format = format_of_splits(splits, tokenizer)
    ends = ", ".join(tokenizer.convert_ids_to_tokens(list(prompt_format.end_token_ids)))
    typer.echo(f"answers      end with {ends or 'no special token'} ({prompt_format.kind} rows)")
    base = load.load_generation_config(source, config.model)
    warnings = (*data_warnings(config, splits), *end_warning(prompt_format, tokenizer, base))
    for warning in (*settings.warnings, *warnings, *plan.reasons):
        typer.echo(f"warning      {warning}")
    if sample_rows:
        shown = "green" if sys.stdout.isatty() else "in [[ ]]"
        typer.echo(f"\nTrained tokens are {shown}; the rest is the prompt that the model sees.")
    for row in splits.train_rows[:sample_rows]:
        ids, mask = splits.train[int(row)]
        typer.echo(f"\nrow {int(row) + 1}:")
        typer.echo(shown_row(tokenizer, [int(i) for i in ids], [bool(m) for m in mask]))


def _begun_batch(settings: Settings) -> RunBatch:
    """Return the batch of the run that a start would continue."""
    folder = output_folder(settings)
    if earlier_run.judge(folder, settings).does != "go on":
        return NOT_BEGUN
    return begun_batch(folder)


def shown_row(tokenizer: object, ids: list[int], mask: list[bool]) -> str:
    """Return a row's text, trained tokens apart: green on a terminal, in [[ ]] elsewhere."""
    opened, closed = ("\x1b[1;32m", "\x1b[0m") if sys.stdout.isatty() else ("[[", "]]")
    pieces: list[str] = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            text = str(tokenizer.decode(ids[start:end]))  # type: ignore[attr-defined]
            pieces.append(f"{opened}{text}{closed}" if mask[start] else text)
            start = end
    return "".join(pieces)
