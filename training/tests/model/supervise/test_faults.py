"""What errors of the system and of libraries mean: memory, threads, disk, or our own fault."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import torch

from lora_trainer.errors import InternalError, MemoryKilledError, UnavailableError
from lora_trainer.faults import explain
from lora_trainer.supervise.endings import failure_in_log

MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    RuntimeError("std::bad_alloc"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    RuntimeError("could not create a memory object"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
]
THREADS = [
    RuntimeError("can't start new thread"),
    BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda e: f"{type(e).__name__} {str(e)[:20]}")
def test_memory_that_runs_out_is_no_internal_fault(error: BaseException) -> None:
    known = explain(error)
    assert isinstance(known, MemoryKilledError)
    assert known.retry == "memory"
    assert "max_seq_length" in known.problems[0].remedy


@pytest.mark.parametrize("error", THREADS, ids=str)
def test_limit_on_threads_is_no_internal_fault(error: BaseException) -> None:
    known = explain(error)
    assert isinstance(known, UnavailableError)
    assert "ulimit -u" in known.problems[0].remedy


def test_limit_on_the_address_space_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 30, 1 << 30))
    remedy = explain(MemoryError()).problems[0].remedy
    assert remedy.startswith("ulimit -v unlimited")
    assert "1,073,741,824 bytes" in remedy


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("out of memory")])
def test_other_errors_stay_what_they_are(error: BaseException) -> None:
    assert isinstance(explain(error), InternalError)


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        (1, "libgomp: Thread creation failed: Resource temporarily unavailable\n", 69),
        (-6, "terminate called after throwing\n  what():  std::bad_alloc\n", 137),
        (1, "OpenBLAS error: Memory allocation still failed after 10 retries, giving up.\n", 137),
        (-11, "nothing of the kind\n", None),
        (-9, "std::bad_alloc\n", None),
        (0, "std::bad_alloc\n", None),
    ],
)
def test_last_words_of_a_process_that_died_by_itself_are_read(
    tmp_path: Path, code: int, text: str, expected: int | None
) -> None:
    log = tmp_path / "train.log"
    log.write_text(text)
    failure = failure_in_log(code, log, 0)
    assert (failure.exit_code if failure else None) == expected


def test_words_of_an_earlier_worker_are_not_read(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("std::bad_alloc\n")
    assert failure_in_log(1, log, log.stat().st_size) is None
