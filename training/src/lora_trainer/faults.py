"""Translate any exception into an error with an exit code and a remedy."""

from __future__ import annotations

import errno
import os
import re
import resource
import traceback
from collections.abc import Sequence
from pathlib import Path

from .errors import (
    AccessError,
    InternalError,
    MemoryKilledError,
    StorageError,
    TrainerError,
    UnavailableError,
)

# Messages of allocators and libraries when they get no memory, or no thread.
MEMORY_WORDS = (
    "can't allocate memory",
    "annot allocate memory",
    "std::bad_alloc",
    "out of memory",
    "ALLOC_FAILED",
    "could not create a memory",
    "failed to map segment from shared object",
    "Memory allocation still failed",
)
THREAD_WORDS = (
    "can't start new thread",
    "Thread creation failed",
    "pthread_create failed",
    "ThreadPoolBuildError",
    "Resource temporarily unavailable",
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


def explain(error: BaseException) -> TrainerError:
    """Return our own errors unchanged and other exceptions as the error that they amount to."""
    if isinstance(error, TrainerError):
        return error
    if (fault := limit_fault(error) or disk_fault(error)) is not None:
        return fault
    kind = type(error).__name__
    return InternalError.of(
        f"the worker failed: {kind}",
        where=_location_of(error),
        why=str(error).strip().splitlines()[0][:300] if str(error).strip() else kind,
        remedy="see train.log in the output folder for the traceback; start again to resume",
    )


def limit_fault(error: BaseException) -> TrainerError | None:
    """Return the error for a failed memory or thread allocation; None for any other exception."""
    if is_out_of_memory(error):
        return out_of_memory(_location_of(error), str(error))
    if is_out_of_threads(error):
        return out_of_threads(_location_of(error), str(error))
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory allocation failed: on a GPU, in the process, or when mapping a file.

    Libraries raise many types of exception for this; torch raises RuntimeError.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    is_of_library = isinstance(error, (RuntimeError, OSError, ImportError))
    return (is_of_library or _is_rust(error)) and has_words(str(error), MEMORY_WORDS)


def is_out_of_threads(error: BaseException) -> bool:
    """Return whether the system refused to create another thread or process."""
    if isinstance(error, OSError) and error.errno == errno.EAGAIN:
        return True
    is_of_library = isinstance(error, (RuntimeError, OSError))
    return (is_of_library or _is_rust(error)) and has_words(str(error), THREAD_WORDS)


def has_words(text: str, words: Sequence[str]) -> bool:
    """Return whether a text contains one of these phrases."""
    return any(word in text for word in words)


def limit_in_log(text: str) -> TrainerError | None:
    """Return the error behind the last output of a process that died without a report, if known."""
    lines = text.splitlines()
    for line in reversed(lines):
        if has_words(line, MEMORY_WORDS):
            return out_of_memory("train.log", line)
        if has_words(line, THREAD_WORDS):
            return out_of_threads("train.log", line)
    return None


def out_of_memory(where: str, text: str) -> TrainerError:
    """Return the out-of-memory error; retrying with smaller batches may help."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    remedy = (
        "lower per_device_train_batch_size or max_seq_length, set gradient_checkpointing to true, "
        "or use_4bit to true"
    )
    if limit != resource.RLIM_INFINITY:
        remedy = (
            f"ulimit -v unlimited (the address space is limited to {limit:,} bytes), or {remedy}"
        )
    error = MemoryKilledError.of(
        "memory ran out", where=where, why=_first_line(text, "no memory was left"), remedy=remedy
    )
    error.retry = MemoryKilledError.KIND
    return error


def out_of_threads(where: str, text: str) -> TrainerError:
    """Return the error for a thread or process that the system refused to create."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    of_user = "" if limit == resource.RLIM_INFINITY else f" (the limit of this user is {limit:,})"
    return UnavailableError.of(
        "the system refuses to create another thread or process",
        where=where,
        why=f"{_first_line(text, 'no reason given')}{of_user}",
        remedy="raise the limit: ulimit -u unlimited, or a larger LORA_PIDS in a container; or "
        "use fewer threads: OMP_NUM_THREADS=1 and --preprocessing_num_workers 1",
    )


def _first_line(text: str, otherwise: str) -> str:
    return (text.strip().splitlines() or [otherwise])[0][:300]


def _is_rust(error: BaseException) -> bool:
    """Return whether the exception is a panic of the tokenizers or safetensors library."""
    return type(error).__name__ in ("PanicException", "SafetensorError")


def disk_fault(error: BaseException, path: str = "") -> TrainerError | None:
    """Return the error for a failed read or write of the operating system; None for any other.

    `path` is where it was written to, for an error that does not name its file.
    """
    number = error.errno if isinstance(error, OSError) else None
    # The safetensors library reports it only as text.
    if number_text := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(number_text[1])
    path = str(getattr(error, "filename", None) or path or "output_dir")
    if number in FULL:
        return StorageError.of(
            "writing to the disk failed",
            where=path,
            why=os.strerror(number),
            remedy="free disk space (df -h), then start again: the run resumes by itself",
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessError.of(
            "no permission to read or write a file",
            where=path,
            why=f"{os.strerror(number)}, as user {os.getuid()}",
            remedy=f"sudo chown -R {os.getuid()}:{os.getgid()} {Path(path).parent}",
        )
    return None


def _location_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
