"""One call of the command line: its exit code, and every fault as one last block."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import traceback

import typer

from . import __version__
from .errors import ConfigError, InternalError, TrainerError
from .host import interrupts, streams

PROGRAM = "lora-trainer"
DEBUG = "LORA_TRAINER_DEBUG"
INTERRUPTED = 130
UNWRITTEN = 74


def print_version(is_asked: bool) -> None:
    """Print this program's version and those of what it stands on, where it is asked for."""
    if is_asked:
        packages = ("torch", "transformers", "peft")
        versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
        python = f"Python {platform.python_version()}"
        typer.echo(f"{PROGRAM} {__version__} ({', '.join((python, *versions))})")
        raise typer.Exit


def invoke(app: typer.Typer, arguments: list[str]) -> int:
    """Run a command; print a fault as one last block; return the exit code."""
    try:
        result = app(args=arguments, prog_name=PROGRAM, standalone_mode=False)
        # Ctrl-C: this exit code from some versions of typer, an Abort from others.
        if result == INTERRUPTED:
            return _interrupted()
        return result if isinstance(result, int) else 0
    except TrainerError as error:
        return _end(error)
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        return UNWRITTEN
    except Exception as error:
        if interrupts.received:  # what was interrupted made another error of it
            return _interrupted()
        if type(error).__name__ == "NoArgsIsHelpError":  # the help is its message
            typer.echo(str(error))
            return 0
        if "click" in type(error).__module__:  # typer carries a click of its own
            return _end(_usage(error))
        from .faults import disk_fault, limit_fault

        if (fault := limit_fault(error) or disk_fault(error)) is not None:
            return _end(fault)
        return _end(
            InternalError.of(
                f"a fault of the program: {type(error).__name__}",
                where=str(traceback.extract_tb(error.__traceback__)[-1]).strip("<>"),
                why=str(error)[:300],
                remedy="run it again with --debug and report the traceback as a bug",
            )
        )


def _interrupted() -> int:
    code, text = interrupts.block()
    streams.complain(f"\n{text}")
    return code


def _usage(error: Exception) -> TrainerError:
    message = getattr(error, "message", None) or str(error) or type(error).__name__
    command = getattr(getattr(error, "ctx", None), "command_path", PROGRAM)
    near = " or ".join(sorted(getattr(error, "possibilities", None) or ()))
    remedy = f"did you mean {near}? See {command} --help" if near else f"{command} --help"
    return ConfigError.of(message, where="command line", remedy=remedy)


def _end(error: TrainerError) -> int:
    if os.environ.get(DEBUG):
        streams.complain(traceback.format_exc())
    streams.complain(f"\n{error.block()}")
    return error.exit_code
