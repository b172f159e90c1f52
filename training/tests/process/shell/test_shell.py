"""run.sh, test.sh and .ci/run: what they install, pass on and refuse, with a fake pip."""

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from support.checkout import BASE_PYTHON, Checkout


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


pytestmark = pytest.mark.any_stack

FIRST_INSTALLATION = ["venv", "cpu.txt", "cpu-torch.txt", "embedded.txt"]


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


def test_check_and_config_are_translated(checkout: Checkout) -> None:
    config = checkout.root / "mine.json"
    config.write_text("{}")
    result = checkout.run("training/run.sh", "--check", "--resume", f"--config={config}")
    assert result.stdout.splitlines()[0] == f"trainer check --config {config} --resume"


@pytest.mark.parametrize(
    ("flags", "seen"),
    [((), "unset"), (("--cpu",), ""), (("--gpus", "0,2"), "0,2"), (("--gpus=all",), "unset")],
)
def test_gpu_flags_decide_what_the_trainer_sees(
    checkout: Checkout, flags: tuple[str, ...], seen: str
) -> None:
    assert checkout.run("training/run.sh", *flags).stdout.splitlines()[1] == f"gpus {seen}"


def test_a_background_run_can_be_followed_and_stopped(checkout: Checkout) -> None:
    for tool in ("setsid", "tr", "ps"):
        if (there := shutil.which(tool)) and not (checkout.bin / tool).exists():
            (checkout.bin / tool).symlink_to(there)
    assert checkout.run("training/run.sh").returncode == 0
    started = checkout.run("training/run.sh", "--background", TRAINER_SECONDS="60")
    assert started.returncode == 0, started.stderr
    assert "The run continues as process" in started.stderr
    assert (checkout.training / ".cache" / "local.log").read_text().startswith("trainer train")
    assert checkout.run("training/run.sh", "--background").returncode == 75
    stopped = checkout.run("training/run.sh", "stop")
    assert "Stopping process" in stopped.stderr
    assert "No run was started" in checkout.run("training/run.sh", "stop").stderr
    assert checkout.run("training/run.sh", "logs").stdout.startswith("trainer train")


@pytest.mark.parametrize(
    "arguments", [("stop", "now"), ("--gpus", "two"), ("--config",), ("--config", "missing.json")]
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


@pytest.mark.parametrize(
    ("stack", "answers"),
    [
        ("cpu", {"python3": 10, "python3.12": 12}),
        ("cpu", {"python3.10": 10}),
        ("cu121", {"python3": 11, "python3.10": 10}),
        ("cu121", {"python3.11": 11}),
    ],
)
def test_python_3_10_is_taken_last_but_for_the_old_stack_first(
    checkout: Checkout, stack: str, answers: dict[str, int]
) -> None:
    (checkout.bin / "python3").unlink()
    for name, minor in answers.items():
        checkout.write_tool(name, f"#!/bin/sh\necho {minor} /chosen/{name}\n")
    result = bash(checkout, f"STACK={stack}; find_python; echo $PYTHON")
    assert result.stdout.strip() == f"/chosen/{list(answers)[-1]}"


def test_the_old_stack_names_the_pythons_it_cannot_use(checkout: Checkout) -> None:
    refusal = "#!/bin/sh\necho version 3.12, needed is 3.10 to 3.$3; exit 1\n"
    checkout.write_tool("python-new", refusal)
    result = checkout.run("training/run.sh", LORA_STACK="cu121", LORA_PYTHON="python-new")
    assert result.returncode == 69
    assert "for the stack cu121" in result.stderr
    assert "needed is 3.10 to 3.11" in result.stderr


def test_the_running_python_is_usable(checkout: Checkout) -> None:
    result = bash(checkout, "find_python; echo $PYTHON", LORA_PYTHON=str(BASE_PYTHON))
    assert Path(result.stdout.strip()).samefile(BASE_PYTHON)


def bash(checkout: Checkout, program: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a program with the functions of environment.sh."""
    source = f"set -Eeuo pipefail; source {checkout.training}/lib/environment.sh; "
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
    (checkout.root / "pip-does").write_text(f"until [ -e {checkout.root}/go ]; do sleep 0.1; done")
    first = checkout.start(TRAINER_SECONDS="20")
    checkout.wait_for_calls(2)
    second = checkout.start()
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    (checkout.root / "go").touch()
    _, errors = second.communicate(timeout=60)
    first.kill()
    first.communicate()
    assert second.returncode == 0, errors
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
    ("message", "code", "advice"),
    [
        ("ERROR: [Errno 28] No space left on device", 74, "the disk is full"),
        ("ERROR: [Errno 13] Permission denied: /x", 77, "Permission denied: /x"),
        ("ERROR: No matching distribution found for cpu==1", 69, "check the network"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", 69, "differs from the lock files"),
    ],
)
def test_what_pip_fails_of_decides_the_exit_code(
    checkout: Checkout, message: str, code: int, advice: str
) -> None:
    (checkout.root / "pip-does").write_text(f"echo '{message}'; exit 1")
    result = checkout.run("training/run.sh")
    assert result.returncode == code
    assert advice in result.stderr
    assert not (checkout.venv / "stamp").exists()


@pytest.mark.parametrize(
    ("out_of_reach", "calls"),
    [
        ('*"--no-compile -r "*/cpu-torch.txt', ["--extra-index-url cpu-torch.txt"]),
        ("*/cpu-torch.txt", ["--extra-index-url cpu-torch.txt", "current-torch.txt"]),
    ],
)
def test_torch_comes_from_the_smallest_source_in_reach(
    checkout: Checkout, out_of_reach: str, calls: list[str]
) -> None:
    (checkout.root / "pip-does").write_text(
        f'case "$*" in {out_of_reach}) echo "ERROR: No matching distribution found"; exit 1; esac'
    )
    result = checkout.run("training/run.sh")
    assert result.returncode == 0, result.stderr
    assert checkout.calls() == ["venv", "cpu.txt", "cpu-torch.txt", *calls, "embedded.txt"]


@pytest.mark.parametrize(
    ("gpu", "stack", "reason"),
    [
        ("580.65.06, 9.0", "current", ""),
        ("580.65.06, 12.0", "current", ""),
        ("580.65.06, 7.0", "cu121", ""),
        ("535.1.2, 9.0", "cu121", ""),
        ("535.1.2, 12.0", "cpu", "7.0 to 9.0"),
        ("470.1.2, 8.6", "cpu", "update the driver"),
    ],
)
def test_a_gpu_gets_the_stack_that_its_driver_and_generation_can(
    checkout: Checkout, gpu: str, stack: str, reason: str
) -> None:
    checkout.write_tool("nvidia-smi", f"#!/bin/sh\necho '{gpu}'\n")
    chosen = bash(checkout, "choose_stack; echo $STACK")
    assert chosen.stdout == f"{stack}\n"
    assert reason in chosen.stderr
    assert ("The GPU is not used" in chosen.stderr) == (stack == "cpu")


def test_a_gpu_of_the_old_stack_is_left_alone_where_no_python_serves_it(
    checkout: Checkout,
) -> None:
    checkout.write_tool("nvidia-smi", "#!/bin/sh\necho '535.1.2, 8.6'\n")
    checkout.write_tool("python3", "#!/bin/sh\necho 'version 3.12'; exit 1\n")
    chosen = bash(checkout, "choose_stack; echo $STACK")
    assert chosen.stdout == "cpu\n"
    assert "needs Python 3.10 or 3.11" in chosen.stderr


@pytest.mark.parametrize(
    ("stack", "folder"), [("cpu", ".venv"), ("current", ".venv"), ("cu121", ".venv-cu121")]
)
def test_a_stack_is_installed_from_its_own_locks(
    checkout: Checkout, stack: str, folder: str
) -> None:
    result = checkout.run("training/run.sh", LORA_STACK=stack)
    assert result.returncode == 0, result.stderr
    assert checkout.calls() == ["venv", f"{stack}.txt", f"{stack}-torch.txt", "embedded.txt"]
    assert (checkout.training / folder / "stamp").exists()


def test_an_unknown_stack_ends_with_78(checkout: Checkout) -> None:
    result = checkout.run("training/run.sh", LORA_STACK="cu118")
    assert result.returncode == 78
    assert "it must be cpu, current or cu121" in result.stderr
    assert checkout.calls() == []


@pytest.mark.parametrize(
    ("first", "second", "renewed"),
    [("current", "cpu", False), ("cpu", "current", True), ("current", "cu121", True)],
)
def test_the_cuda_build_serves_a_cpu_and_nothing_else_is_exchanged(
    checkout: Checkout, first: str, second: str, renewed: bool
) -> None:
    here = str(checkout.root / "venv")
    checkout.run("training/run.sh", LORA_STACK=first, LORA_VENV=here)
    checkout.run("training/run.sh", LORA_STACK=second, LORA_VENV=here)
    assert checkout.calls().count("venv") == 1 + renewed


Two = tuple[Checkout, Checkout, dict[str, str]]


@pytest.fixture
def two(tmp_path: Path) -> Two:
    """Two checkouts and the environment that the first one has made for both."""
    first, second = Checkout(tmp_path / "a"), Checkout(tmp_path / "b")
    shared = {"LORA_VENV": str(tmp_path / "venv")}
    assert first.run("training/run.sh", **shared).returncode == 0
    (second.training / "src" / "lora_trainer" / "__main__.py").write_text("print('second')")
    return first, second, shared


def linked(two: Two) -> str:
    return next(Path(two[2]["LORA_VENV"]).rglob("lora_trainer.pth")).read_text()


def test_a_second_checkout_runs_its_own_sources_and_changes_nothing(two: Two) -> None:
    first, second, shared = two
    result = second.run("training/run.sh", **shared)
    assert result.stdout == "second\n", result.stderr
    assert f"belongs to {first.training}" in result.stderr
    assert second.calls() == []
    assert linked(two) == f"{first.training}/src\n"
    assert first.run("training/run.sh", **shared).stdout.startswith("trainer train")


@pytest.mark.parametrize("script", ["training/run.sh", "training/test.sh"])
def test_a_second_checkout_that_needs_other_packages_is_refused(two: Two, script: str) -> None:
    first, second, shared = two
    if script == "training/run.sh":  # test.sh needs the tests' packages
        (second.training / "requirements" / "cpu.txt").write_text("cpu==2\n")
    result = second.run(script, **shared)
    assert result.returncode == 78
    assert "the environment belongs to another checkout" in result.stderr
    assert second.calls() == []
    assert first.run("training/run.sh", **shared).stderr == ""


def test_the_environment_of_a_checkout_that_is_gone_is_taken_over(two: Two) -> None:
    first, second, shared = two
    shutil.rmtree(first.root)
    result = second.run("training/run.sh", **shared)
    assert result.stdout == "second\n", result.stderr
    assert second.calls() == []
    assert linked(two) == f"{second.training}/src\n"


LINTER = '#!/bin/sh\\necho "${{0##*/}} $1"; [ "${{0##*/}}" != mypy ]\\n'
MAKE_LINTERS = (
    (
        f"case \"$*\" in *-test.txt) for name in ruff mypy shellcheck shfmt; do printf '{LINTER}' "
        '>"${0%/*}/$name"; chmod +x "${0%/*}/$name"; done ;; esac'
    )
    .replace("{{", "{")
    .replace("}}", "}")
)


def test_test_sh_goes_on_after_a_failure_and_names_it_last(checkout: Checkout) -> None:
    (checkout.root / "pip-does").write_text(MAKE_LINTERS)
    result = checkout.run("training/test.sh")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "Failed: mypy"
    for sign in ("ruff format", "ruff check", "shellcheck --external", "shfmt --diff"):
        assert sign in result.stdout
    assert "locks --check" in result.stdout


def test_test_sh_runs_tests_side_by_side_but_the_heavy_ones_alone(checkout: Checkout) -> None:
    (checkout.root / "pip-does").write_text(MAKE_LINTERS)
    quick, tiny, heavy = pytest_calls(checkout.run("training/test.sh"))
    assert "-n logical" in quick
    assert quick.endswith(" tests/quick")
    assert "-n logical" in tiny
    assert tiny.endswith(" tests/process tests/model")
    assert "-n logical" not in heavy
    assert heavy.endswith(" tests/e2e")
    assert all("--durations 20" in call for call in (quick, tiny, heavy))


def test_test_sh_quick_runs_one_tier_and_asks_no_registry(checkout: Checkout) -> None:
    (checkout.root / "pip-does").write_text(MAKE_LINTERS)
    result = checkout.run("training/test.sh", "--quick")
    (call,) = pytest_calls(result)
    assert call.endswith(" tests/quick")
    assert "mypy" in result.stdout
    assert "locks --check" not in result.stdout


def test_test_sh_passes_the_users_choice_on_to_one_pytest(checkout: Checkout) -> None:
    (checkout.root / "pip-does").write_text(MAKE_LINTERS)
    (call,) = pytest_calls(checkout.run("training/test.sh", "tests/model", "-k", "a"))
    assert call.endswith(" tests/model -k a")


def test_test_sh_for_another_stack_leaves_out_what_no_stack_changes(checkout: Checkout) -> None:
    (checkout.root / "pip-does").write_text(MAKE_LINTERS)
    result = checkout.run("training/test.sh", "--stack")
    assert result.returncode == 0, result.stderr
    assert all("-m not any_stack " in call for call in pytest_calls(result))
    assert "docker" not in result.stdout
    assert "ruff" not in result.stdout
    assert "locks" not in result.stdout


def pytest_calls(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stdout.splitlines() if "pytest" in line]


@pytest.mark.parametrize(
    ("status", "last"),
    [(0, "Failed: mypy"), (1, "Failed: mypy, locks"), (69, "Failed: mypy")],
    ids=["true", "drifted", "no registry in reach"],
)
def test_test_sh_fails_for_drifted_locks_but_not_for_a_missing_network(
    checkout: Checkout, status: int, last: str
) -> None:
    (checkout.root / "pip-does").write_text(MAKE_LINTERS)
    checkout.write_lock_sh(status)
    result = checkout.run("training/test.sh")
    assert result.stderr.splitlines()[-1] == last
    assert ("no package registry is in reach" in result.stdout) == (status == 69)


def test_test_sh_adds_its_packages_once(checkout: Checkout) -> None:
    (checkout.root / "pip-does").write_text(MAKE_LINTERS)
    checkout.run("training/run.sh")
    checkout.run("training/test.sh")
    checkout.run("training/test.sh")
    assert checkout.calls() == [
        *FIRST_INSTALLATION,
        "cpu-test.txt",
        "deepspeed.txt",
        "s3fs-test.txt",
    ]


@pytest.fixture
def ci_checkout(checkout: Checkout) -> Checkout:
    """A checkout on a machine with Chromium and an apt-get that says what it is asked for."""
    (checkout.root / "README.md").write_text(
        "Run ./training/test.sh\n```sh\n./training/run.sh\n./training/test.sh --ours\n```\n"
    )
    (checkout.training / "test.sh").write_text('#!/bin/sh\necho "tested $*"\n')
    checkout.write_tool("chromium", "#!/bin/sh\n")
    checkout.write_tool("chromedriver", "#!/bin/sh\n")
    checkout.write_tool("apt-get", '#!/bin/sh\necho "apt-get $*"\n')
    return checkout


def test_ci_calls_the_command_of_the_readme(ci_checkout: Checkout) -> None:
    result = ci_checkout.run(".ci/run")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "tested --ours\ntested --stack\n"


def test_ci_tests_the_second_stack_in_an_environment_that_outlives_the_checkout(
    ci_checkout: Checkout,
) -> None:
    script = ci_checkout.training / "test.sh"
    script.write_text('#!/bin/sh\necho "$* $LORA_STACK $LORA_VENV"; [ "$1" = --stack ]\n')
    results = [ci_checkout.run(".ci/run", XDG_CACHE_HOME=str(ci_checkout.root)) for _ in range(2)]
    for result in results:
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1] == "Failed: ./training/test.sh --ours"
        *_, last = result.stdout.splitlines()
        assert re.fullmatch(rf"--stack cu121 {ci_checkout.root}/lora-trainer/venv-cu121-\w+", last)
    installed = ["venv", "cu121.txt", "cu121-torch.txt", "embedded.txt", "cu121-test.txt"]
    assert ci_checkout.calls() == installed


def test_ci_says_where_no_python_serves_the_second_stack(ci_checkout: Checkout) -> None:
    newer = '#!/bin/sh\ncase "$3" in 14) echo 12 "$0" ;; *) exit 1 ;; esac\n'
    ci_checkout.write_tool("python3", newer)
    result = ci_checkout.run(".ci/run")
    assert result.stdout == "tested --ours\n"
    assert "cu121 is not tested: no Python 3.10 or 3.11" in result.stderr


def test_ci_installs_the_browser_where_it_is_missing(ci_checkout: Checkout) -> None:
    (ci_checkout.bin / "chromedriver").unlink()
    result = ci_checkout.run(".ci/run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "apt-get update",
        "apt-get install --yes --no-install-recommends chromium chromium-driver",
        "tested --ours",
        "tested --stack",
    ]


def test_ci_fails_where_the_browser_cannot_be_installed(ci_checkout: Checkout) -> None:
    (ci_checkout.bin / "chromedriver").unlink()
    ci_checkout.write_tool("apt-get", "#!/bin/sh\nexit 100\n")
    result = ci_checkout.run(".ci/run")
    assert result.returncode == 100
    assert "tested" not in result.stdout


def test_ci_fails_where_the_readme_names_no_test_command(ci_checkout: Checkout) -> None:
    (ci_checkout.root / "README.md").write_text("./training/test.sh outside of a block\n")
    assert ci_checkout.run(".ci/run").returncode == 78
