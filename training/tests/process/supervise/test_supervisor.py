"""The supervisor against a worker that is a shell script: restarts, signals, lock, archive."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_trainer.errors import (
    AccessError,
    BusyError,
    ConfigError,
    DataError,
    InternalError,
    MemoryKilledError,
    StoppedError,
    TrainerError,
    UnavailableError,
)
from lora_trainer.host.disk import write_text
from lora_trainer.run import lock as claim
from lora_trainer.run import silence
from lora_trainer.run.events import (
    Event,
    Failed,
    MemoryReduced,
    PhaseChanged,
    Planned,
    Warned,
    parse_line,
)
from lora_trainer.run.folder import archive, make_folder
from lora_trainer.run.recording import EventFile
from lora_trainer.run.status import RunStatus, fold
from lora_trainer.run_folder import RunFolder
from lora_trainer.supervise import endings, supervisor
from lora_trainer.supervise.earlier_run import mark_of
from lora_trainer.supervise.stop_signals import STOPS
from lora_trainer.supervise.supervisor import Supervisor
from lora_trainer.supervise.workers import cause_of
from support.shell_worker import says, step_line, supervisor_of

Supervise = Callable[..., Supervisor]


@pytest.fixture
def supervise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervise:
    """Return a function that makes a supervisor of a worker that a shell script plays."""
    monkeypatch.setattr(endings, "write_report", lambda _: None)
    return lambda *arguments: supervisor_of(tmp_path, monkeypatch, *arguments)


def workers(tmp_path: Path) -> int:
    return int((tmp_path / "count").read_text())


def events_of(folder: Path) -> list[Event]:
    lines = RunFolder(folder).events.read_text().splitlines()
    return [event for line in lines if (event := parse_line(line)) is not None]


def kinds(folder: Path) -> list[str]:
    return [event.kind for event in events_of(folder)]


def test_finished_worker_finishes_the_run(supervise: Supervise) -> None:
    run = supervise(says(step_line(1)))
    assert run.run() == 0
    assert kinds(run.output_dir) == ["run_started", "step", "ended"]
    assert RunFolder(run.output_dir).done.exists()


def test_secret_reaches_the_worker_and_no_file(
    supervise: Supervise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = supervise("", "--hf_token", "hf_verysecret")
    run.run()
    assert "hf_verysecret" in (tmp_path / "order").read_text()
    left = [path for path in run.output_dir.rglob("*") if path.is_file()]
    assert left
    assert [path.name for path in left if b"hf_verysecret" in path.read_bytes()] == []


def test_crashed_worker_is_started_again(supervise: Supervise) -> None:
    run = supervise(f"if [ $N = 0 ]; then {says(step_line(1))} kill -SEGV $$; fi")
    assert run.run() == 0
    assert kinds(run.output_dir) == [
        "run_started", "step", "restart", "run_started", "ended",
    ]  # fmt: skip


def test_worker_that_dies_twice_at_one_step_is_not_started_a_third_time(
    supervise: Supervise, tmp_path: Path
) -> None:
    with pytest.raises(MemoryKilledError, match="SIGKILL"):
        supervise(f"{says(step_line(4))} kill -KILL $$").run()
    assert workers(tmp_path) == 2


def test_worker_that_gets_little_further_each_time_uses_up_its_restarts(
    supervise: Supervise, tmp_path: Path
) -> None:
    with pytest.raises(MemoryKilledError):
        supervise(
            says(step_line(7)).replace('"step": 7', "\"step\": '$N'") + "kill -KILL $$",
            "--max_restarts",
            "2",
        ).run()
    assert workers(tmp_path) == 3


def test_worker_that_ends_every_forty_steps_is_started_again_each_time(
    supervise: Supervise, tmp_path: Path
) -> None:
    killed = says(step_line(7)).replace('"step": 7', "\"step\": '$((40 * N + 40))'")
    run = supervise(f"if [ $N -lt 6 ]; then {killed} kill -KILL $$; fi", "--max_restarts", "2")
    assert run.run() == 0
    assert workers(tmp_path) == 7
    assert [one.attempt for one in run.status.restarts] == [1, 2, 3, 4, 5, 6]


def test_worker_whose_clock_is_set_forward_is_not_stalled(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "WATCH_SECONDS", 0.05)
    run = supervise(says(step_line(3)) + "sleep 0.4", "--stall_timeout_seconds", "60")
    real, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])
    run.live._clock = time.time

    def set_clock() -> None:
        shift[0] = 7200.0
        assert run.live.health().status == "healthy"

    thread = when(lambda: run.status.step == 3, set_clock)
    assert run.run() == 0
    thread.join()
    assert run.status.restarts == ()


@pytest.mark.parametrize(
    ("code", "error"), [(65, DataError), (77, AccessError), (70, InternalError)]
)
def test_fault_that_the_worker_explains_is_final(
    supervise: Supervise, tmp_path: Path, code: int, error: type[TrainerError]
) -> None:
    failed = Failed(
        exit_code=code, problems=[{"what": "no", "where": "w", "why": "y", "remedy": "r"}]
    )
    # The interpreter ends with 120 where it cannot flush to a full disk.
    run = supervise(f"{says(failed.to_line())} exit 120")
    with pytest.raises(error, match="no"):
        run.run()
    assert workers(tmp_path) == 1
    assert kinds(run.output_dir) == ["run_started", "failed", "ended"]
    assert not RunFolder(run.output_dir).done.exists()


def test_worker_that_ends_without_a_word_is_told_of_with_its_exit_code(
    supervise: Supervise,
) -> None:
    run = supervise("exit 3")
    with pytest.raises(InternalError, match="ended with exit code 3") as caught:
        run.run()
    assert "train.log" in caught.value.problems[0].remedy


def test_what_is_no_event_is_passed_over(supervise: Supervise) -> None:
    run = supervise("echo 'not an event' >/dev/fd/$LORA_TRAINER_EVENTS_FD\n" + says(step_line(1)))
    assert run.run() == 0
    assert kinds(run.output_dir) == ["run_started", "step", "ended"]


def test_recorded_line_of_wrong_types_is_skipped_and_counted(supervise: Supervise) -> None:
    run = supervise(says(step_line(1)))
    run.output_dir.mkdir()
    mark_of(run.config).write(run.output_dir)
    odd = step_line(1).replace('"loss": 1.0', '"loss": "1.0"')
    RunFolder(run.output_dir).events.write_text(odd + "[1, 2]\n" + step_line(2)[:30] + "\n")
    assert run.run() == 0
    warned = [event.message for event in events_of(run.output_dir) if isinstance(event, Warned)]
    assert any("2 lines of events.jsonl skipped" in message for message in warned)


def when(is_it: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Do something in the background as soon as something holds."""

    def watch() -> None:
        until = time.monotonic() + 120
        while not is_it() and time.monotonic() < until:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


WAITS = "trap 'exit 143' TERM INT; while :; do sleep 0.02; done"


@pytest.fixture
def hangup() -> Iterator[None]:
    """Let SIGHUP end this process, as it does unless nohup has started it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.usefixtures("hangup")
def test_signal_is_passed_on_and_ends_as_stopped(supervise: Supervise, number: int) -> None:
    run = supervise(says(step_line(9)) + WAITS)
    thread = when(lambda: run.status.step == 9, lambda: os.kill(os.getpid(), number))
    with pytest.raises(StoppedError, match="stopped at step 9"):
        run.run()
    thread.join()
    assert kinds(run.output_dir)[-2:] == ["stopped", "ended"]


def test_signal_before_there_is_a_worker_is_not_lost(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = supervise(WAITS)
    popen = subprocess.Popen

    def start_late(*arguments: object, **named: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return popen(*arguments, **named)

    monkeypatch.setattr(subprocess, "Popen", start_late)
    with pytest.raises(StoppedError, match="stopped"):
        run.run()


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        ([], "steps 1 to 9 are not saved and will be repeated: there is no checkpoint"),
        (
            [4, 6],
            "steps 7 to 9 are not saved and will be repeated: the latest checkpoint is of step 6",
        ),
        ([8], "step 9 is not saved"),
        ([9], "progress is saved in the checkpoint of step 9"),
    ],
    ids=["none", "several", "one", "all"],
)
def test_worker_that_dies_of_a_signal_is_not_reported_as_saved(
    supervise: Supervise, saved: list[int], reason: str
) -> None:
    run = supervise(says(step_line(9)) + "trap 'kill -KILL $$' TERM; while :; do sleep 0.02; done")
    for step in saved:
        (run.output_dir / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (run.output_dir / "checkpoints" / "step-99-mine").mkdir(parents=True)
    thread = when(lambda: run.status.step == 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError, match="stopped at step 9") as caught:
        run.run()
    thread.join()
    assert reason in caught.value.problems[0].why
    assert "saved" not in caught.value.meaning
    assert run.status.stopped is not None
    assert run.status.stopped.step == max(saved, default=0)


def test_third_signal_ends_a_worker_that_does_not_listen(supervise: Supervise) -> None:
    run = supervise(says(step_line(1)) + "trap '' TERM INT; while :; do sleep 0.02; done")

    def insist() -> None:
        for count in range(1, 4):
            os.kill(os.getpid(), signal.SIGTERM)
            while run._signals.count < count:  # two at once would be one
                time.sleep(0.01)

    thread = when(lambda: run.status.step == 1, insist)
    with pytest.raises(StoppedError):
        run.run()
    thread.join()


def test_hangup_that_nohup_ignores_stays_ignored(supervise: Supervise) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = supervise(says(step_line(1)) + "sleep 0.2")
        thread = when(lambda: run.status.step == 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert run.run() == 0
        thread.join()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_handlers_are_put_back(supervise: Supervise) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    supervise("").run()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_second_run_names_who_holds_the_folder(supervise: Supervise) -> None:
    run = supervise("")
    run.output_dir.mkdir()
    with RunFolder(run.output_dir).lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        with pytest.raises(BusyError) as caught:
            run.run()
    assert f"pid {os.getpid()} on {socket.gethostname()}" in caught.value.problems[0].why


def test_lock_file_of_a_dead_process_is_taken_over(supervise: Supervise) -> None:
    run = supervise("")
    run.output_dir.mkdir()
    RunFolder(run.output_dir).lock.write_text(f"pid 4194999 on {socket.gethostname()}\n")
    assert run.run() == 0
    assert RunFolder(run.output_dir).lock.read_text().split()[1] == str(os.getpid())


def test_start_waits_for_the_worker_that_a_dead_supervisor_left(
    supervise: Supervise,
) -> None:
    run = supervise("")
    run.output_dir.mkdir()
    lock = RunFolder(run.output_dir).lock.open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.write(f"pid 4194999 on {socket.gethostname()}\n")
    lock.flush()
    began = time.monotonic()
    thread = when(lambda: time.monotonic() > began + 0.3, lock.close)
    assert run.run() == 0
    thread.join()
    assert time.monotonic() > began + 0.3


def test_start_does_not_wait_for_ever(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "ORPHAN_SECONDS", 0.2)
    run = supervise("")
    run.output_dir.mkdir()
    with RunFolder(run.output_dir).lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"pid 4194999 on {socket.gethostname()}\n")
        lock.flush()
        with pytest.raises(BusyError):
            run.run()


def unfinished(supervise: Supervise) -> Path:
    """Leave a run that was stopped behind its first checkpoint; return its folder."""
    run = supervise("exit 143")
    with pytest.raises(StoppedError):
        run.run()
    (run.output_dir / "checkpoints" / "step-000001").mkdir(parents=True)
    return run.output_dir


def test_other_configuration_is_refused_with_old_and_new_value(
    supervise: Supervise,
) -> None:
    unfinished(supervise)
    with pytest.raises(ConfigError) as caught:
        supervise("", "--lora_r", "4").run()
    assert "lora_r: 16 -> 4" in caught.value.problems[0].why


def test_what_does_not_decide_the_weights_may_change(supervise: Supervise) -> None:
    unfinished(supervise)
    assert supervise("", "--save_steps", "7").run() == 0


def test_other_configuration_before_the_first_checkpoint_starts_anew(
    supervise: Supervise,
) -> None:
    folder = unfinished(supervise)
    (folder / "checkpoints" / "step-000001").rmdir()
    assert supervise("", "--lora_r", "4").run() == 0
    assert folder.with_name("out.1").is_dir()


def test_resume_never_moves_the_run_aside_and_says_where(supervise: Supervise) -> None:
    folder = unfinished(supervise)
    assert supervise("", "--resume", "never").run() == 0
    assert (folder.with_name("out.1") / "checkpoints" / "step-000001").is_dir()
    assert not (folder / "checkpoints").exists()
    warned = [event.message for event in events_of(folder) if isinstance(event, Warned)]
    assert any(str(folder.with_name("out.1")) in message for message in warned)


def test_finished_run_is_archived_each_time_under_the_next_number(
    supervise: Supervise,
) -> None:
    for _ in range(3):
        run = supervise("", "--on_finished", "archive")
        assert run.run() == 0
    names = sorted(path.name for path in run.output_dir.parent.glob("out*"))
    assert names == ["out", "out.1", "out.2"]
    assert (run.output_dir.with_name("out.1") / RunFolder.done).exists()


def test_finished_run_is_left_alone_and_reported(supervise: Supervise, tmp_path: Path) -> None:
    supervise("").run()
    run = supervise("exit 70")
    lines: list[str] = []
    run.print_line = lines.append
    assert run.run() == 0
    assert workers(tmp_path) == 1
    assert any("this run is already finished" in line for line in lines)


def test_damaged_digest_is_reported_and_written_again(supervise: Supervise) -> None:
    folder = unfinished(supervise)
    sound = RunFolder(folder).digest.read_text()
    RunFolder(folder).digest.write_text("damaged")
    assert supervise("").run() == 0
    assert any("is damaged" in e.message for e in events_of(folder) if isinstance(e, Warned))
    assert RunFolder(folder).digest.read_text() == sound


def test_resume_never_does_not_resume_where_the_digest_is_gone(
    supervise: Supervise,
) -> None:
    folder = unfinished(supervise)
    RunFolder(folder).digest.unlink()
    assert supervise("", "--resume", "never").run() == 0
    assert (folder.with_name("out.1") / "checkpoints" / "step-000001").is_dir()
    assert not (folder / "checkpoints").exists()


def test_crashed_worker_of_a_run_that_never_resumes_keeps_its_own_checkpoints(
    supervise: Supervise,
) -> None:
    folder = unfinished(supervise)
    (folder.parent / "count").unlink()
    script = f"if [ $N = 0 ]; then mkdir -p {folder}/checkpoints/step-000007; kill -SEGV $$; fi"
    assert supervise(script, "--resume", "never").run() == 0
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000007"]


def test_run_on_a_mount_point_is_archived_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    for number in (1, 2):
        RunFolder(tmp_path).done.write_text("x")
        assert archive(tmp_path) == tmp_path / f"run.{number}"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["run.1", "run.2"]


class Killed(BaseException):
    """Stands for a kill: no handler of the code under test may do anything after it."""


def kill_at(number: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> bool:
    """Do something, dead from its n-th call that touches the disk; return whether it got so far."""
    calls = 0

    def mortal(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls >= number:
                raise Killed
            return call(*arguments, **named)

        return wrapped

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "mkdir"), (Path, "replace"), (os, "fsync")):
            patch.setattr(owner, name, mortal(getattr(owner, name)))
        try:
            act()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("others", [[], ["named-run", "notes.txt"]], ids=["alone", "shared"])
def test_killed_archiving_is_completed_in_one_folder_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: list[str]
) -> None:
    own = ["DONE", ".DONE.writing", "config.digest", "events.jsonl", "report.html", "train.log"]
    deaths = 0
    for number in range(1, 50):
        folder = tmp_path / str(number) / "out"
        folder.mkdir(parents=True)
        for name in [*own, *others]:
            (folder / name).write_text(name)
        was_killed = kill_at(number, monkeypatch, lambda folder=folder: archive(folder))  # type: ignore[misc]
        with claim.hold(folder):
            if (folder / "DONE").exists():  # killed before it began
                archive(folder)
        aside = folder / "run.1" if others else folder.with_name("out.1")
        assert sorted(path.name for path in aside.iterdir()) == sorted(own)
        left = {".lock", *others, "run.1"} if others else {".lock"}
        assert {path.name for path in folder.iterdir()} == left
        assert sorted(path.name for path in folder.parent.iterdir()) == (
            ["out"] if others else ["out", "out.1"]
        )
        if not was_killed:
            break
        deaths += 1
    assert deaths == len(own) + 5


def test_kill_before_the_report_is_complete_leaves_it_to_the_next_start(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(folder: Path) -> None:
        assert not RunFolder(folder).done.exists()
        raise Killed

    run = supervise(says(step_line(1)))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(endings, "write_report", die)
        run.run()
    assert not RunFolder(run.output_dir).done.exists()
    reported: list[Path] = []
    monkeypatch.setattr(endings, "write_report", reported.append)
    assert supervise(says(step_line(1))).run() == 0
    assert reported == [run.output_dir]
    assert RunFolder(run.output_dir).done.exists()
    assert not run.output_dir.with_name("out.1").exists()


def test_done_is_written_after_everything_else(supervise: Supervise) -> None:
    run = supervise(says(step_line(1)))
    run.run()
    times = {p.name: p.stat().st_mtime_ns for p in run.output_dir.iterdir() if p.is_file()}
    assert max(times, key=lambda name: times[name]) == RunFolder.done


def test_events_after_a_torn_line_stand_on_lines_of_their_own(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).events
    path.write_text(step_line(1) + step_line(2)[:20])
    with EventFile(path) as file:
        file.append(PhaseChanged(phase="training"))
        file.append(PhaseChanged(phase="saving"))
    assert kinds(tmp_path) == ["step", "phase", "phase"]


def test_disk_that_takes_no_events_does_not_stop_the_run(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = supervise(says(step_line(1)))
    full = EventFile(Path("/dev/full"))
    monkeypatch.setattr(supervisor, "EventFile", lambda _: full)
    assert run.run() == 0
    assert run.status.step == 1


def test_half_written_file_does_not_replace_the_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.digest"
    write_text(path, "whole")

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "half")
    assert path.read_text() == "whole"


def test_file_in_place_of_the_output_folder_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for folder in (tmp_path / "out", tmp_path / "out" / "run"):
        with pytest.raises(ConfigError, match="is a file"):
            make_folder(folder)


@pytest.mark.parametrize(
    ("code", "words"),
    [(-9, "SIGKILL"), (-11, "SIGSEGV"), (-signal.SIGRTMIN, "signal 34"), (3, "exit code 3")],
)
def test_cause_says_how_the_worker_ended(code: int, words: str) -> None:
    assert words in cause_of(code).replace("SIGRTMIN", "signal 34")


def test_report_that_fails_is_told_and_fails_nothing(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise ValueError("no plot")

    run = supervise("")
    monkeypatch.setattr(endings, "write_report", refuse)
    assert run.run() == 0
    warned = [event.message for event in events_of(run.output_dir) if isinstance(event, Warned)]
    assert any("no plot" in message for message in warned)


def test_status_is_what_the_recorded_events_fold_to(supervise: Supervise) -> None:
    run = supervise(says(step_line(1), step_line(2)))
    run.run()
    replayed = RunStatus()
    for event in events_of(run.output_dir):
        replayed = fold(replayed, event)
    assert json.loads(json.dumps(replayed, default=str)) == json.loads(
        json.dumps(run.status, default=str)
    )


def test_archiving_leaves_what_is_not_the_runs_own(tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    (folder / "named-run").mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    (folder / "events.jsonl").write_text("{}\n")
    aside = archive(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["mine.txt", "named-run", "run.1"]
    assert [path.name for path in aside.iterdir()] == ["events.jsonl"]


def test_default_run_is_archived_inside_and_leaves_named_runs_alone(tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    for run in (folder, folder / "named", folder / "run.1"):
        (run / "final_model").mkdir(parents=True)
        RunFolder(run).done.write_text(run.name)
    assert archive(folder) == folder / "run.2"
    assert sorted(path.name for path in folder.iterdir()) == ["named", "run.1", "run.2"]
    assert (folder / "named" / RunFolder.done).read_text() == "named"
    assert (folder / "run.1" / RunFolder.done).read_text() == "run.1"
    assert (folder / "run.2" / RunFolder.done).read_text() == "outputs"
    assert not folder.with_name("outputs.1").exists()


SHOWS_STACKS = "trap 'echo the stacks >&2' USR1; while :; do sleep 0.02; done"


def test_stalled_worker_is_shown_ended_and_told_of(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "WATCH_SECONDS", 0.05)
    run = supervise(
        says(step_line(3)) + SHOWS_STACKS, "--stall_timeout_seconds", "0.3", "--max_restarts", "0"
    )
    with pytest.raises(InternalError, match=r"made no progress for .* in phase training") as caught:
        run.run()
    assert caught.value.exit_code == 70
    assert "the stacks" in RunFolder(run.output_dir).log.read_text()
    assert "train.log" in caught.value.problems[0].remedy


def test_stalled_worker_is_started_again_within_the_budget(
    supervise: Supervise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "WATCH_SECONDS", 0.05)
    script = f"{says(step_line(3))}if [ $N = 0 ]; then {SHOWS_STACKS}; fi"
    run = supervise(script, "--stall_timeout_seconds", "0.3")
    assert run.run() == 0
    assert workers(tmp_path) == 2
    (restart,) = run.status.restarts
    assert "no progress" in restart.cause
    assert restart.exit_code == 70


def test_worker_is_not_stalled_by_a_gap_in_which_the_supervisor_was_stopped(
    supervise: Supervise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(silence, "LONGEST_GAP_SECONDS", 0.5)
    gaps = iter([2.0])

    def warnings(*_: object) -> list[str]:
        time.sleep(next(gaps, 0.0) if run.status.step == 3 else 0.0)
        return []

    monkeypatch.setattr(supervisor.Watchdog, "warnings", warnings)
    run = supervise(says(step_line(3)) + "sleep 2.2", "--stall_timeout_seconds", "1.5")
    assert run.run() == 0
    assert workers(tmp_path) == 1
    assert next(gaps, None) is None


def test_worker_that_the_kernel_kills_for_memory_is_told_of_as_that(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor.Watchdog, "was_out_of_memory", lambda _: True)
    with pytest.raises(MemoryKilledError, match="killed by the kernel for memory"):
        supervise(f"{says(step_line(1))} kill -KILL $$").run()


def not_finite(step: int) -> str:
    problem = {"what": f"not finite at step {step}", "where": "w", "why": "y", "remedy": "r"}
    return Failed(exit_code=70, problems=[problem], retry="not_finite", step=step).to_line()


def test_numbers_that_are_not_finite_are_tried_once_more(
    supervise: Supervise, tmp_path: Path
) -> None:
    script = f"{says(step_line(3))}if [ $N = 0 ]; then {says(not_finite(4))} exit 70; fi"
    run = supervise(script, "--max_restarts", "0")
    assert run.run() == 0
    assert workers(tmp_path) == 2
    assert kinds(run.output_dir) == [
        "run_started", "step", "restart", "run_started", "step", "ended",
    ]  # fmt: skip
    (restart,) = run.status.restarts
    assert "not finite at step 4; retrying once" in restart.cause


def test_numbers_that_are_not_finite_twice_at_one_step_are_final(
    supervise: Supervise, tmp_path: Path
) -> None:
    run = supervise(f"{says(step_line(3), not_finite(4))} exit 70")
    with pytest.raises(InternalError, match="not finite at step 4") as caught:
        run.run()
    assert caught.value.exit_code == 70
    assert workers(tmp_path) == 2
    assert kinds(run.output_dir)[-2:] == ["failed", "ended"]
    assert kinds(run.output_dir).count("failed") == 1


def test_numbers_that_are_not_finite_further_on_are_tried_once_more_too(
    supervise: Supervise, tmp_path: Path
) -> None:
    later = says(not_finite(4)).replace('"step": 4', "\"step\": '$((N + 4))'")
    run = supervise(f"if [ $N -lt 3 ]; then {later} exit 70; fi")
    assert run.run() == 0
    assert workers(tmp_path) == 4


def test_retry_leaves_the_budget_of_crashes_alone(supervise: Supervise, tmp_path: Path) -> None:
    script = (
        f"{says(step_line(3))}case $N in 0) {says(not_finite(4))} exit 70;; 1) kill -SEGV $$;; esac"
    )
    assert supervise(script, "--max_restarts", "1").run() == 0
    assert workers(tmp_path) == 3


PLAN = Planned(
    plan={
        "micro_batch_examples": 4,
        "eval_batch_examples": 8,
        "gradient_checkpointing": False,
        "step_examples": 4,
        "processes": 1,
        "least_memory_bytes": 3_000_000_000,
        "memory_limit_bytes": 2_000_000_000,
        "smaller_plans": ["--max_seq_length 64 needs about 1.5 GB"],
    }
).to_line()


def planned_from_file(folder: Path) -> str:
    """Return shell commands that say a plan with the sizes that the folder's run keeps to."""
    value = f"sed -n 's/.*\"NAME\": \\([^,]*\\).*/\\1/p' {folder}/memory.json"
    reads = [
        f"M=$({value.replace('NAME', 'micro_batch_examples')})",
        f"G=$({value.replace('NAME', 'gradient_checkpointing')})",
    ]
    line = PLAN.strip().replace('examples": 4', "examples\": '${M:-4}'", 1)
    line = line.replace('checkpointing": false', "checkpointing\": '${G:-false}'")
    return "\n".join([*reads, f"echo '{line}' >/dev/fd/$LORA_TRAINER_EVENTS_FD\n"])


def test_worker_that_is_killed_for_memory_goes_on_with_smaller_batches_until_none_is_left(
    supervise: Supervise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor.Watchdog, "was_out_of_memory", lambda _: True)
    training = PhaseChanged(phase="training").to_line()
    script = f"{planned_from_file(tmp_path / 'out')}{says(training, step_line(3))} kill -KILL $$"
    # They are no crashes: no restart is allowed for those.
    run = supervise(script, "--max_restarts", "0")
    with pytest.raises(MemoryKilledError, match="killed by the kernel for memory") as caught:
        run.run()
    assert caught.value.exit_code == 137
    reduced = [event for event in events_of(run.output_dir) if isinstance(event, MemoryReduced)]
    assert [(one.micro_batch_examples, one.gradient_checkpointing) for one in reduced] == [
        (2, False), (1, False), (1, True),
    ]  # fmt: skip
    assert workers(tmp_path) == 4
    assert json.loads((run.output_dir / "memory.json").read_text()) == {
        "micro_batch_examples": 1, "eval_batch_examples": 8, "gradient_checkpointing": True,
        "micro_batch_tokens": 0,
    }  # fmt: skip
    (problem,) = caught.value.problems
    assert "needs about 3.0 GB, and 2.0 GB are available" in problem.why
    assert problem.remedy.startswith("--max_seq_length 64 needs about 1.5 GB; with it")
    assert run.status.plan["micro_batch_examples"] == 1


def test_smaller_batches_are_in_the_plan_and_the_warnings_of_the_status(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor.Watchdog, "was_out_of_memory", lambda _: True)
    training = PhaseChanged(phase="training").to_line()
    script = f"if [ $N = 0 ]; then {says(PLAN, training, step_line(3))} kill -KILL $$; fi"
    run = supervise(script)
    assert run.run() == 0
    assert (run.status.plan["micro_batch_examples"], run.status.plan["micro_batches"]) == (2, 2)
    assert any("out of memory at step 4" in one.message for one in run.status.warnings)


def test_kill_for_memory_while_evaluating_makes_the_evaluation_smaller(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor.Watchdog, "was_out_of_memory", lambda _: True)
    evaluating = PhaseChanged(phase="evaluating").to_line()
    run = supervise(f"if [ $N = 0 ]; then {says(PLAN, evaluating)} kill -KILL $$; fi")
    assert run.run() == 0
    (reduced,) = [event for event in events_of(run.output_dir) if isinstance(event, MemoryReduced)]
    assert (reduced.micro_batch_examples, reduced.eval_batch_examples) == (4, 4)


def test_memory_that_runs_out_while_loading_has_no_smaller_batch_to_try(
    supervise: Supervise, tmp_path: Path
) -> None:
    problem = {"what": "memory ran out", "where": "w", "why": "y", "remedy": "use_4bit"}
    failed = Failed(exit_code=137, problems=[problem], retry="memory").to_line()
    loading = PhaseChanged(phase="loading").to_line()
    with pytest.raises(MemoryKilledError) as caught:
        supervise(f"{says(loading, failed)} exit 137").run()
    assert workers(tmp_path) == 1
    assert caught.value.problems[0].remedy == "use_4bit"


def test_rank_that_reports_memory_makes_all_go_on_with_less(
    supervise: Supervise, tmp_path: Path
) -> None:
    problem = {"what": "memory ran out", "where": "w", "why": "y", "remedy": "r"}
    failed = Failed(exit_code=137, problems=[problem], retry="memory").to_line()
    training = PhaseChanged(phase="training").to_line()
    run = supervise(f"if [ $N = 0 ]; then {says(PLAN, training, failed)} exit 137; fi")
    assert run.run() == 0
    assert workers(tmp_path) == 2
    assert "failed" not in kinds(run.output_dir)
    (restart,) = run.status.restarts
    assert restart.cause == "memory ran out; continuing with micro-batches of 2 examples"


def test_library_that_ends_the_process_for_want_of_a_thread_is_explained(
    supervise: Supervise, tmp_path: Path
) -> None:
    run = supervise(
        "echo 'libgomp: Thread creation failed: Resource temporarily unavailable' >&2; exit 1"
    )
    with pytest.raises(UnavailableError, match="refuses to create another thread"):
        run.run()
    assert workers(tmp_path) == 1
    assert kinds(run.output_dir) == ["run_started", "failed", "ended"]
