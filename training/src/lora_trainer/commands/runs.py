"""The commands for several runs: `runs`, `compare`, `rm` and `dashboard`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config.paths import PUBLIC
from ..errors import ConfigError
from ..host.addresses import is_address, unfolded
from ..host.quoting import shell_word

if TYPE_CHECKING:
    from ..report.comparison import ComparedRun
    from ..run.summary import RunSummary

MOST_COMPARED = 6  # as many colours can be told apart
HEAD = ("name", "state", "steps", "loss", "eval loss", "exact match", "started", "time", "size")

Outputs = Annotated[
    Path | None, typer.Option(envvar="LORA_OUTPUTS", help="Folder that contains the runs.")
]
Run = Annotated[str, typer.Argument(help="Name of a run, or its folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def list_runs(
    folder: Annotated[
        Path | None,
        typer.Argument(envvar="LORA_OUTPUTS", help="Folder that contains the runs."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder: state, steps, losses, evaluation, duration, size."""
    from ..report.comparison import table
    from ..report.tensorboard import tensorboard_command
    from ..run.summary import summaries

    if folder is not None:
        refuse_address(str(folder), "/RUN")
    parent = outputs_folder(folder)
    if not parent.is_dir():
        raise ConfigError.of(
            "there is no such folder",
            where=str(parent),
            why="runs are listed from the folder that contains them",
            remedy=f"lora-trainer runs {outputs_folder(None)}",
        )
    runs = summaries(parent)
    if as_json:
        typer.echo(json.dumps([run.to_json() for run in runs], indent=2))
        return
    if not runs:
        typer.echo(f"no runs in {parent}")
        return
    for line in table(HEAD, [_row(run) for run in runs]):
        typer.echo(line)
    live = [f"{run.name} runs at {run.url}" for run in runs if run.url]
    for line in (*live, *tensorboard_command(parent)):
        typer.echo(line)


def compare_runs(
    runs: Annotated[list[str], typer.Argument(help="Two to six runs: names or folders.")],
    outputs: Outputs = None,
    output: Annotated[
        Path | None, typer.Option(help="Also draw the curves into this HTML file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: final figures, keys that differ, losses on one scale."""
    from ..host.disk import write_text
    from ..report import comparison

    if not 2 <= len(runs) <= MOST_COMPARED:
        raise ConfigError.of(
            f"2 to {MOST_COMPARED} runs can be compared",
            where="command line",
            why=f"{len(runs)} given",
            remedy="lora-trainer compare RUN_A RUN_B",
        )
    compared = list(_compared(runs, outputs_folder(outputs)))
    if output is not None:
        _check_html(output)
        write_text(output, comparison.comparison_html(compared))
    if as_json:
        typer.echo(json.dumps(comparison.to_json(compared), indent=2))
        return
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    for line in comparison.comparison_lines(compared, is_unicode=is_unicode):
        typer.echo(line)
    if output is not None:
        typer.echo(f"\ncurves: {output}")


def remove(
    run: Run,
    outputs: Outputs = None,
    is_sure: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a run's files; asks first, and refuses while the run is going on."""
    from ..run.summary import find_run
    from .remove import remove_run

    refuse_address(run)
    remove_run(find_run(run, outputs_folder(outputs)), is_sure=is_sure)


def dashboard(
    output_dir: Annotated[
        Path | None, typer.Argument(help="A run's output folder, or one that contains runs.")
    ] = None,
    host: Annotated[
        str, typer.Option(envvar="LORA_TRAINER_HEALTH_HOST", help="Address to bind.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; default: 8080, or any free one.")
    ] = None,
    token_file: Annotated[
        str | None,
        typer.Option(
            envvar="LORA_TRAINER_HEALTH_TOKEN_FILE",
            help="File with a token that clients must send.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Additional host name to accept.")
    ] = None,
) -> None:
    """Show one run in the browser, or all runs in a folder."""
    from ..serve.replay import view

    view(
        outputs_folder(output_dir).absolute(),
        host=host,
        port=port,
        token_file=token_file,
        allowed_hosts=allowed_host or (),
        say=typer.echo,
    )


def outputs_folder(given: Path | None) -> Path:
    """Return the folder that contains the runs: as given, else the checkout's or the current's."""
    public = PUBLIC / "outputs"
    if given is not None:
        refuse_address(str(given))
    return given or (public if public.is_dir() else Path("outputs"))


def refuse_address(named: str, run: str = "") -> None:
    """Refuse a run on an object store, with the command that copies it here.

    `run` is what the address of one run has in addition.

    Raises:
        ConfigError: it is one.
    """
    if is_address(address := unfolded(named)):
        raise ConfigError.of(
            "runs on an object store are not read in place",
            where=address,
            why="this command reads local folders",
            remedy=f"lora-trainer fetch {shell_word(address)}{run} FOLDER, then use FOLDER",
        )


def _row(run: RunSummary) -> tuple[str, list[str]]:
    from ..report.comparison import state, steps
    from ..report.html import moment
    from ..units import duration, number, percent, size

    return run.name, [
        state(run),
        steps(run),
        _change(run.first_loss, run.last_loss, number),
        _change(run.eval_loss_before, run.eval_loss, number),
        _change(run.exact_match_before, run.exact_match, percent),
        moment(run.started_time) or "-",
        duration(run.seconds),
        size(run.bytes),
    ]


def _change(before: float | None, after: float | None, shown: Callable[[float], str]) -> str:
    figures = [shown(value) for value in (before, after) if value is not None]
    return " -> ".join(figures) or "-"


def _compared(runs: Sequence[str], outputs: Path) -> Iterator[ComparedRun]:
    from ..report.comparison import read_compared
    from ..run.summary import find_run

    for run in runs:
        refuse_address(run)
    folders = [find_run(run, outputs) for run in runs]
    names = [folder.name for folder in folders]
    for folder in folders:
        is_alone = names.count(folder.name) == 1
        yield read_compared(folder.name if is_alone else str(folder), folder)


def _check_html(output: Path) -> None:
    if output.suffix != ".html" or not output.absolute().parent.is_dir():
        raise ConfigError.of(
            "the comparison cannot be written there",
            where=f"--output {output}",
            why="its name must end in .html, and its folder must exist",
            remedy="--output comparison.html",
        )
