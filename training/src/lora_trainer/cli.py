"""The command line: `lora-trainer --help` lists its commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import invocation
from .commands import node_options, runs
from .host import environment, interrupts, launcher, streams
from .redaction import Redaction, given_secrets

if TYPE_CHECKING:
    from .commands.finetuned import FinetunedModel

EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}

DESCRIPTION = "Turn a base model, a dataset and one config file into a LoRA adapter."

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Keys are written with underscores and options with hyphens: take either for both.
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
    rich_markup_mode=None,  # importing rich takes longer than the whole answer
)


@app.callback(help=DESCRIPTION)
def program(
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=invocation.print_version,
            is_eager=True,
            help="Print versions and exit.",
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="Config file, JSON or YAML; default: config.json here, else beside train_lora.py.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@app.command(context_settings=EXTRA)
def train(
    context: typer.Context,
    config: ConfigFile = None,
    nnodes: node_options.Nodes = "1",
    node_rank: node_options.NodeRank = None,
    rdzv_endpoint: node_options.Endpoint = "",
    nproc_per_node: node_options.ProcessesPerNode = "",
    debug: Debug = False,
) -> None:
    """Train. Every key of the config is an option too: --learning_rate 1e-4."""
    if debug:
        os.environ[invocation.DEBUG] = "1"
    from .commands import given_settings

    arguments = node_options.with_processes(context.args, nnodes, nproc_per_node)
    settings = given_settings.resolved(arguments, config)
    from .commands.nodes import Node, run_node
    from .commands.train import run_shown

    interrupts.unwind()
    if node_options.is_node(nnodes):
        node = Node(nnodes, nproc_per_node, node_rank, rdzv_endpoint)
        raise typer.Exit(run_node(node, settings, config, arguments))
    run_shown(settings)


@app.command(context_settings=EXTRA)
def check(
    context: typer.Context,
    config: ConfigFile = None,
    show_sample: Annotated[
        bool, typer.Option("--show-sample", help="Print rows with the trained tokens marked.")
    ] = False,
    rows: Annotated[int, typer.Option(help="Number of rows that --show-sample prints.")] = 3,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Run only the checks that need no torch, in under a second."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Run every check that needs no training; list all problems at once."""
    if debug:
        os.environ[invocation.DEBUG] = "1"
    from .commands import given_settings
    from .commands.check import check_all, preflight
    from .run import lock
    from .run.folder import output_folder

    settings = given_settings.resolved(context.args, config)
    interrupts.unwind()
    if quick:
        preflight(settings)
        lock.check_free(output_folder(settings))
        for warning in settings.warnings:
            streams.complain(f"warning  {warning}")
        streams.complain("the quick checks found no problems")
        return
    check_all(settings, sample_rows=rows if show_sample else 0)


Target = Annotated[Path, typer.Argument(help="Folder to create.")]
Source = Annotated[str, typer.Argument(help="Folder of a run or an adapter, or a base model.")]
Split = Annotated[str | None, typer.Option(help="Split of a folder or hub dataset.")]
Columns = Annotated[
    str | None,
    typer.Option(
        "--dataset_columns",
        help="Columns of the rows, as JSON: standard field -> column; default: the run's.",
    ),
]
Base = Annotated[str | None, typer.Option("--model", help="Base model, if it has moved.")]


@app.command()
def chat(
    source: Source,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Answer this prompt and exit; - reads standard input."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Use the base model without the adapter.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum length of an answer, in tokens.")
    ] = 512,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens up to this probability.")
    ] = 1.0,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Answer prompts of these rows, beside their answers.")
    ] = None,
    split: Split = None,
    dataset_columns: Columns = None,
    rows: Annotated[
        int, typer.Option(min=0, help="With --dataset: so many rows, spread evenly; 0: all.")
    ] = 5,
    model: Base = None,
    debug: Debug = False,
) -> None:
    """Chat with a trained model, or answer one prompt, or the prompts of a dataset."""
    from .commands.chat import Asking, answer_rows, talk
    from .commands.given_rows import GivenRows

    asking = Asking(system, base, max_new_tokens, temperature, top_p)
    finetuned = _finetuned(source, model, debug)
    if dataset:
        answer_rows(finetuned, asking, GivenRows(tuple(dataset), split, dataset_columns), rows)
    else:
        talk(finetuned, asking, None if prompt == "-" else prompt)


@app.command()
def evaluate(
    source: Source,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Rows to evaluate on; default: the run's held-out rows."),
    ] = None,
    split: Split = None,
    dataset_columns: Columns = None,
    rows: Annotated[int, typer.Option(min=0, help="Use only this many rows; 0: all.")] = 0,
    answers: Annotated[
        bool,
        typer.Option("--answers/--no-answers", help="Generate answers and report exact match."),
    ] = True,
    answer_rows: Annotated[
        int,
        typer.Option(min=0, help="Generate answers for this many rows, spread evenly; 0: all."),
    ] = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum length of an answer; default: the run's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write JSON to this file.")] = None,
    model: Base = None,
    debug: Debug = False,
) -> None:
    """Compare base model and adapter on held-out rows."""
    from .commands.evaluate import Wanted, compare
    from .commands.given_rows import GivenRows

    given = GivenRows(tuple(dataset or ()), split, dataset_columns)
    wanted = Wanted(given, rows, answers, answer_rows, max_new_tokens)
    compare(_finetuned(source, model, debug), wanted, is_json=as_json, output=output)


@app.command()
def merge(source: Source, target: Target, model: Base = None, debug: Debug = False) -> None:
    """Merge an adapter into its base model and verify the result."""
    from .commands.merge import merge

    merge(_finetuned(source, model, debug), target)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a checkpoint or a run.")],
    target: Target,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Also copy the base model, for use without a hub.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint's adapter in PEFT's format, also from an unfinished run."""
    from .commands.export import export_adapter

    if debug:
        os.environ[invocation.DEBUG] = "1"
    interrupts.unwind()
    export_adapter(checkpoint, target, has_base=with_base)


@app.command()
def fetch(
    address: Annotated[str, typer.Argument(help="Run on an object store: s3://bucket/run.")],
    target: Target,
    debug: Debug = False,
) -> None:
    """Copy a run from an object store, verified: its records, adapter or newest checkpoint."""
    from .commands.fetch import fetch_run

    if debug:
        os.environ[invocation.DEBUG] = "1"
    interrupts.unwind()
    fetch_run(address, target)


@app.command()
def push(
    source: Annotated[str, typer.Argument(help="Folder of a run, an adapter or a merged model.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the hub: ACCOUNT/NAME.")],
    public: Annotated[bool, typer.Option("--public", help="Let everyone read it.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload with lora-trainer",
    debug: Debug = False,
) -> None:
    """Upload an adapter or a merged model to the Hugging Face hub, privately by default."""
    from .commands.push import push
    from .config.settings import resolve

    if debug:
        os.environ[invocation.DEBUG] = "1"
    interrupts.unwind()
    token = resolve(None, os.environ, []).config.model.hf_token
    push(source, repo_id, token=token, is_public=public, message=message)


def _finetuned(source: str, model: str | None, debug: bool) -> FinetunedModel:
    """Find a trained adapter; token and cache folders come from this machine."""
    from .commands.finetuned import find
    from .config.settings import resolve

    if debug:
        os.environ[invocation.DEBUG] = "1"
    interrupts.unwind()
    own = resolve(None, os.environ, []).config.model
    return find(
        source, model_name_or_path=model, hf_token=own.hf_token, model_cache_dir=own.model_cache_dir
    )


app.command("runs")(runs.list_runs)
app.command("compare")(runs.compare_runs)
app.command("rm")(runs.remove)
app.command("dashboard")(runs.dashboard)


@app.command()
def health(
    seconds: Annotated[
        int, typer.Argument(min=1, help="Seconds between two checks with --watch.")
    ] = 5,
    url: Annotated[
        str, typer.Option(help="Server to ask; default: that of the newest run here.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Check repeatedly until Ctrl-C.")] = False,
    outputs: Annotated[
        Path | None, typer.Option(envvar="LORA_OUTPUTS", help="Folder that contains the runs.")
    ] = None,
    docker: Annotated[bool, typer.Option("--docker", hidden=True)] = False,
) -> None:
    """Show whether a run is well, and if not, why; exit 0 if it is, 1 if not."""
    from .commands.health import report_health

    code = report_health(
        runs.outputs_folder(outputs),
        url=url.rstrip("/"),
        is_json=as_json,
        watch_seconds=seconds if watch else None,
        is_docker=docker,
    )
    raise typer.Exit(code)


@app.command(context_settings=EXTRA)
def clean(
    context: typer.Context,
    config: ConfigFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be removed; remove nothing.")
    ] = False,
) -> None:
    """Remove caches and temporary folders of dead processes; results and checkpoints stay."""
    from .commands.clean import clean
    from .config.settings import resolve

    clean(resolve(config, os.environ, context.args), is_dry_run=dry_run)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a config file."""
    import json

    from .config.json_schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def keys() -> None:
    """Print every key with its default, limits and aliases."""
    from .config.reference import help_text

    typer.echo(help_text())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, print any error as the last block, and return the exit code."""
    environment.set_defaults(os.environ)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["train"] and launcher.is_silent(os.environ):
        streams.silence()  # another process of this host says the same
    with streams.redacted(Redaction.of(os.environ, *given_secrets(given))) as out:
        code = invocation.invoke(app, given)
        out.flush()
    # For most commands the printed text is the result.
    is_lost = out.error is not None and code == 0 and given[:1] != ["train"]
    return invocation.UNWRITTEN if is_lost else code


if __name__ == "__main__":
    sys.exit(main())
