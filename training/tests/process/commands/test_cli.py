"""The command line: commands, their exit codes, and one block for every fault."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_trainer import cli, invocation
from lora_trainer.config.sections import leaf_sections
from lora_trainer.errors import BusyError
from lora_trainer.run import lock


def test_schema_is_valid_json_that_knows_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert leaf_sections().keys() <= schema["properties"].keys()


def test_keys_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys"]) == 0
    printed = capsys.readouterr().out
    assert [key for key in leaf_sections() if key not in printed] == []


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["check", "--help"]])
def test_help_is_no_fault(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["trian"], ["schema", "--wrong"], ["check", "--rows", "many"]], ids=" ".join
)
def test_wrong_command_line_is_a_configuration_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 78
    last = capsys.readouterr().err.splitlines()
    assert "  where:  command line" in last
    assert last[-1] == "exit code 78 (configuration)"


def test_config_errors_come_all_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"learnin_rate": 1, "lora_r": 0}')
    assert cli.main(["train", "--config", str(config)]) == 78
    printed = capsys.readouterr().err
    assert "learnin_rate" in printed
    assert "lora_r" in printed


def raising(error: BaseException):
    def resolve(*_: object) -> None:
        raise error

    return resolve


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BusyError.of("held", "here", "by another", "wait"), 75, "by another"),
        (OSError(28, "No space left on device", "/out/events.jsonl"), 74, "/out/events.jsonl"),
        (PermissionError(13, "Permission denied", "/out/.lock"), 77, "/out"),
        (KeyboardInterrupt(), 130, "nothing was changed"),
        (ZeroDivisionError("division by zero"), 70, "ZeroDivisionError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_fault_has_its_exit_code_and_no_traceback(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv(invocation.DEBUG, raising=False)
    monkeypatch.setattr("lora_trainer.config.settings.resolve", raising(error))
    assert cli.main(["train"]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(invocation.DEBUG, "")  # so that it is put back afterwards
    monkeypatch.setattr("lora_trainer.config.settings.resolve", raising(BusyError.of("held")))
    assert cli.main(["train", "--debug"]) == 75
    assert "Traceback" in capsys.readouterr().err


def test_a_quick_check_is_refused_while_a_run_holds_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A container's preflight ends with 75: Docker would restart the second run three times."""
    monkeypatch.setattr("lora_trainer.commands.check.preflight", lambda _: None)
    arguments = ["check", "--quick", "--output_dir", str(tmp_path)]
    assert cli.main(arguments) == 0
    with lock.hold(tmp_path):
        assert cli.main(arguments) == 75
    assert f"pid {os.getpid()}" in capsys.readouterr().err
    assert cli.main(arguments) == 0


@pytest.mark.parametrize("option", ["--max-new-tokens", "--max_new_tokens"])
def test_options_are_taken_with_hyphens_and_underscores(
    capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert cli.main(["chat", "/nowhere", option, "4"]) == 69
    assert "there is no such folder" in capsys.readouterr().err


def test_a_misspelled_option_is_answered_with_the_option_and_the_help_of_its_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["chat", "/nowhere", "--max-new-tokns", "4"]) == 78
    remedy = "  remedy: did you mean --max-new-tokens? See lora-trainer chat --help"
    assert remedy in capsys.readouterr().err.splitlines()


def test_a_quick_check_prints_the_warnings_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    config = tmp_path / "c.yaml"
    config.write_text("dataset: x.jsonl\noutput_dir: out\ndeepspeed: ds_z3.json\n")
    assert cli.main(["check", "--quick", "--config", str(config)]) == 0
    warning, last = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning  ")
    assert "deepspeed has no effect: parallelism: auto" in warning
    assert last == "the quick checks found no problems"


@pytest.mark.parametrize("options", [[], ["--quiet"]], ids=["loud", "quiet"])
def test_own_data_alone_passes_and_says_that_a_share_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    data = tmp_path / "my.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    config = Path(__file__).parents[3] / "config.json"
    arguments = ["check", "--quick", "--config", str(config), "--dataset", str(data)]
    code = cli.main([*arguments, "--output_dir", str(tmp_path / "out"), *options])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert ("a tenth of your rows is held out" in printed.out) is (not options)


def test_a_check_makes_no_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_trainer.commands.check._check_model", lambda _: None)
    data = tmp_path / "x.jsonl"
    data.write_text('{"text": "a"}\n')
    folder = tmp_path / "results" / "run"
    arguments = ["check", "--quick", "--dataset", str(data), "--eval_dataset", str(data)]
    arguments += ["--output_dir", str(folder)]
    assert cli.main(arguments) == 0
    assert not folder.parent.exists()
    folder.parent.write_text("a file")
    assert cli.main(arguments) == 78


def test_version_names_the_program_and_its_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(
        r"lora-trainer \d+\.\d+\.\d+ \(Python [\d.]+, torch \S+, transformers \S+, peft \S+\)\n",
        capsys.readouterr().out,
    )


def test_help_names_the_program_as_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--help"]) == 0
    assert "Usage: lora-trainer check" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "is_shown"), [((), False), (("-W", "default"), True)])
def test_warnings_of_libraries_are_shown_only_on_request(
    options: tuple[str, ...], is_shown: bool
) -> None:
    warns = (
        "import warnings, lora_trainer.cli as cli\n"
        "cli.main = lambda _: warnings.warn('moved', FutureWarning) or 0\n"
        "from lora_trainer.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, *options, "-c", warns], capture_output=True, text=True, check=True
    )
    assert ("moved" in done.stderr) == is_shown
