"""run.sh, test.sh and .ci/run: what they install, pass on and refuse, with a fake pip."""

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import BASE_PYTHON, TRAINING, Checkout


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def public_checkout() -> Iterator[Checkout]:
    """A checkout in a place that every user may read."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Checkout(Path(folder))


ROOMY_DISK = "#!/bin/sh\necho title; echo disk 9 9 99000000 9 /\n"
FIRST_INSTALLATION = ["venv", "cpu.txt", "torch-cpu.txt", "embedded.txt"]


def test_help_is_the_header_and_installs_nothing(checkout: Checkout) -> None:
    result = checkout.run("training/run.sh", "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Fine-tune a model")
    assert "--config FILE" in result.stdout
    assert "LORA_VENV" in result.stdout
    assert checkout.calls() == []


def test_first_start_installs_and_the_second_installs_nothing(checkout: Checkout) -> None:
    first = checkout.run("training/run.sh")
    assert first.returncode == 0, first.stderr
    assert checkout.calls() == FIRST_INSTALLATION
    second = checkout.run("training/run.sh")
    assert second.stdout == first.stdout
    assert second.stderr == ""
    assert checkout.calls() == FIRST_INSTALLATION


def test_the_installed_command_starts_the_trainer(checkout: Checkout) -> None:
    checkout.run("training/run.sh")
    command = checkout.venv / "bin" / "lora-trainer"
    printed = subprocess.run([command, "schema"], capture_output=True, text=True, check=True)
    assert printed.stdout.startswith("trainer schema\n")


def test_trainer_gets_the_default_config_and_every_unknown_flag(checkout: Checkout) -> None:
    result = checkout.run("training/run.sh", "--learning_rate", "1e-4", "--", "--gpus", "a b")
    config = checkout.training / "config.json"
    assert result.stdout.splitlines()[0] == (
        f"trainer train --config {config} --learning_rate 1e-4 --gpus a b"
    )


def test_check_and_resume_and_config_are_translated(checkout: Checkout) -> None:
    config = checkout.root / "mine.json"
    config.write_text("{}")
    result = checkout.run("training/run.sh", "--check", "--resume", f"--config={config}")
    assert result.stdout.splitlines()[0] == f"trainer check --config {config} --resume auto"


@pytest.mark.parametrize(
    ("flags", "seen"),
    [((), "unset"), (("--cpu",), ""), (("--gpus", "0,2"), "0,2"), (("--gpus=all",), "unset")],
)
def test_gpu_flags_decide_what_the_trainer_sees(
    checkout: Checkout, flags: tuple[str, ...], seen: str
) -> None:
    assert checkout.run("training/run.sh", *flags).stdout.splitlines()[1] == f"gpus {seen}"


@pytest.mark.parametrize(
    "arguments", [("--docker",), ("--gpus", "two"), ("--config",), ("--config", "missing.json")]
)
def test_wrong_usage_ends_with_78_before_anything_is_installed(
    checkout: Checkout, arguments: tuple[str, ...]
) -> None:
    result = checkout.run("training/run.sh", *arguments)
    assert result.returncode == 78
    assert result.stderr.splitlines()[-1] == "exit code 78 (configuration)"
    assert [line.split()[0] for line in result.stderr.splitlines()[1:4]] == [
        "where:",
        "why:",
        "remedy:",
    ]
    assert checkout.calls() == []


def test_no_python_ends_with_69(checkout: Checkout) -> None:
    (checkout.bin / "python3").unlink()
    result = checkout.run("training/run.sh")
    assert result.returncode == 69
    assert "no command python3 is on the PATH" in result.stderr


def test_unusable_pythons_are_named_with_their_reasons(checkout: Checkout) -> None:
    checkout.write_tool("python3", "#!/bin/sh\necho 'version 3.9, needed is more'; exit 1\n")
    checkout.write_tool("python3.12", "#!/bin/sh\necho 'it lacks ensurepip'; exit 1\n")
    result = checkout.run("training/run.sh")
    assert result.returncode == 69
    assert "python3: version 3.9, needed is more; python3.12: it lacks ensurepip" in result.stderr


@pytest.mark.parametrize("answers", [{"python3": 10, "python3.12": 12}, {"python3.10": 10}])
def test_python_3_10_is_only_taken_where_nothing_newer_is(
    checkout: Checkout, answers: dict[str, int]
) -> None:
    (checkout.bin / "python3").unlink()
    for name, minor in answers.items():
        checkout.write_tool(name, f"#!/bin/sh\necho {minor} /chosen/{name}\n")
    found = bash(checkout, "find_python; echo $PYTHON")
    assert found.stdout.strip() == f"/chosen/{list(answers)[-1]}"


def test_the_running_python_is_usable(checkout: Checkout) -> None:
    found = bash(checkout, "find_python; echo $PYTHON", LORA_PYTHON=str(BASE_PYTHON))
    assert Path(found.stdout.strip()).samefile(BASE_PYTHON)


def bash(checkout: Checkout, program: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a program with the functions of environment.sh."""
    source = f"set -Eeuo pipefail; source {checkout.training}/environment.sh; "
    return subprocess.run(
        [checkout.bin / "bash", "-c", source + program],
        env=checkout.environment(**extra),
        capture_output=True,
        text=True,
        check=True,
    )


def test_a_stopped_installation_is_done_over(checkout: Checkout) -> None:
    (checkout.root / "pip-does").write_text("exec sleep 30")
    process = checkout.start()
    checkout.wait_for_calls(2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 143
    assert "start again" in errors
    (checkout.root / "pip-does").unlink()
    (checkout.root / "calls").unlink()
    result = checkout.run("training/run.sh")
    assert "Found an unfinished" in result.stderr
    assert checkout.calls() == FIRST_INSTALLATION


def test_a_changed_lock_file_renews_the_environment(checkout: Checkout) -> None:
    checkout.run("training/run.sh")
    (checkout.training / "requirements" / "cpu.txt").write_text("cpu==2\n")
    assert checkout.run("training/run.sh").returncode == 0
    assert checkout.calls() == FIRST_INSTALLATION * 2


def test_two_starts_at_once_install_once(checkout: Checkout) -> None:
    (checkout.root / "pip-does").write_text("sleep 0.3")
    first = checkout.start(TRAINER_SECONDS="20")
    checkout.wait_for_calls(2)
    second = checkout.run("training/run.sh")
    first.kill()
    first.communicate()
    assert second.returncode == 0, second.stderr
    assert "waiting for it" in second.stderr
    assert checkout.calls() == FIRST_INSTALLATION


def test_packages_are_not_renewed_under_a_run(checkout: Checkout) -> None:
    checkout.run("training/run.sh")
    training = checkout.start(TRAINER_SECONDS="20")
    assert training.stdout is not None
    training.stdout.readline()
    (checkout.training / "requirements" / "cpu.txt").write_text("cpu==2\n")
    result = checkout.run("training/run.sh")
    training.kill()
    training.communicate()
    assert result.returncode == 75
    assert "a run is using it" in result.stderr
    assert checkout.calls() == FIRST_INSTALLATION


@pytest.mark.parametrize(
    ("message", "code", "told"),
    [
        ("ERROR: [Errno 28] No space left on device", 74, "the disk is full"),
        ("ERROR: [Errno 13] Permission denied: /x", 77, "Permission denied: /x"),
        ("ERROR: No matching distribution found for cpu==1", 69, "check the network"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", 69, "differs from the lock files"),
    ],
)
def test_what_pip_fails_of_decides_the_exit_code(
    checkout: Checkout, message: str, code: int, told: str
) -> None:
    (checkout.root / "pip-does").write_text(f"echo '{message}'; exit 1")
    result = checkout.run("training/run.sh")
    assert result.returncode == code
    assert told in result.stderr
    assert not (checkout.venv / "stamp").exists()


def test_a_full_disk_is_seen_before_the_download(checkout: Checkout) -> None:
    checkout.write_tool("df", "#!/bin/sh\necho title; echo disk 9 9 1000000 9 /\n")
    result = checkout.run("training/run.sh")
    assert result.returncode == 74
    assert "1024 MB are free, 3000 MB are needed" in result.stderr
    assert checkout.calls() == []


def test_a_folder_without_write_permission_ends_with_77(public_checkout: Checkout) -> None:
    public_checkout.training.chmod(0o555)
    is_root = os.geteuid() == 0
    result = subprocess.run(
        [public_checkout.training / "run.sh"],
        env=public_checkout.environment(),
        capture_output=True,
        text=True,
        check=False,
        **({"user": 65534, "group": 65534, "extra_groups": []} if is_root else {}),
    )
    public_checkout.training.chmod(0o755)
    assert result.returncode == 77
    assert "why:    Permission denied" in result.stderr


@pytest.mark.parametrize(
    ("out_of_reach", "calls"),
    [
        ('*"--no-compile -r "*/torch-cpu.txt', ["--extra-index-url torch-cpu.txt"]),
        ("*/torch-cpu.txt", ["--extra-index-url torch-cpu.txt", "torch.txt"]),
    ],
)
def test_torch_comes_from_the_smallest_source_in_reach(
    checkout: Checkout, out_of_reach: str, calls: list[str]
) -> None:
    (checkout.root / "pip-does").write_text(
        f'case "$*" in {out_of_reach}) echo "ERROR: No matching distribution found"; exit 1; esac'
    )
    checkout.write_tool("df", ROOMY_DISK)
    result = checkout.run("training/run.sh")
    assert result.returncode == 0, result.stderr
    assert checkout.calls() == ["venv", "cpu.txt", "torch-cpu.txt", *calls, "embedded.txt"]


@pytest.mark.parametrize(
    ("driver", "lock_file"), [("580.65.06, 9.0", "torch.txt"), ("535.1.2, 9.0", "torch-cpu.txt")]
)
def test_a_gpu_gets_the_cuda_build_if_its_driver_can(
    checkout: Checkout, driver: str, lock_file: str
) -> None:
    checkout.write_tool("nvidia-smi", f"#!/bin/sh\necho '{driver}'\n")
    checkout.write_tool("df", ROOMY_DISK)
    result = checkout.run("training/run.sh")
    assert checkout.calls() == ["venv", "cpu.txt", lock_file, "embedded.txt"]
    assert ("The GPU is not used" in result.stderr) == (lock_file == "torch-cpu.txt")


LINTER = '#!/bin/sh\\necho "${{0##*/}} $1"; [ "${{0##*/}}" != mypy ]\\n'
MAKE_LINTERS = (
    (
        f"case \"$*\" in *test.txt) for name in ruff mypy shellcheck shfmt; do printf '{LINTER}' "
        '>"${0%/*}/$name"; chmod +x "${0%/*}/$name"; done ;; esac'
    )
    .replace("{{", "{")
    .replace("}}", "}")
)


def test_test_sh_goes_on_after_a_failure_and_names_it_last(checkout: Checkout) -> None:
    (checkout.root / "pip-does").write_text(MAKE_LINTERS)
    result = checkout.run("training/test.sh", "--fast", "tests/unit")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "Failed: mypy"
    for sign in ("ruff format", "ruff check", "shellcheck --external", "shfmt --diff"):
        assert sign in result.stdout
    assert "-m pytest -m not gpu and not slow tests/unit" in result.stdout


def test_test_sh_adds_its_packages_once(checkout: Checkout) -> None:
    (checkout.root / "pip-does").write_text(MAKE_LINTERS)
    checkout.run("training/run.sh")
    checkout.run("training/test.sh")
    checkout.run("training/test.sh")
    assert checkout.calls() == [*FIRST_INSTALLATION, "test.txt"]


def test_ci_calls_the_command_of_the_readme(checkout: Checkout) -> None:
    (checkout.root / "README.md").write_text(
        "Run ./training/test.sh\n```sh\n./training/run.sh\n./training/test.sh --ours\n```\n"
    )
    (checkout.training / "test.sh").write_text('#!/bin/sh\necho "tested $*"\n')
    result = checkout.run(".ci/run")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "tested --ours\n"


def test_ci_fails_where_the_readme_names_no_test_command(checkout: Checkout) -> None:
    (checkout.root / "README.md").write_text("./training/test.sh outside of a block\n")
    assert checkout.run(".ci/run").returncode == 78


@pytest.mark.parametrize("name", ["cpu", "torch", "embedded", "test"])
def test_every_locked_package_has_a_hash_and_no_place_is_named(name: str) -> None:
    text = (TRAINING / "requirements" / f"{name}.txt").read_text()
    entries = re.split(r"\n(?=\S)", text.partition("\n")[2].strip())
    assert all(re.match(r"[\w.-]+==\S+.*\\\n +--hash=sha256:", entry) for entry in entries)
    assert not re.search(r"://|--index|--find-links", text)
