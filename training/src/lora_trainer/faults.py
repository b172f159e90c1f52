"""What an error means to the user: our own as they are, others by what they say."""

from __future__ import annotations

import errno
import os
import re
import traceback
from pathlib import Path

from .errors import AccessError, InternalError, MemoryKilledError, StorageError, TrainerError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


def explain(error: BaseException) -> TrainerError:
    """Return the error with its exit code: ours as it is, others by what they mean."""
    if isinstance(error, TrainerError):
        return error
    if (fault := disk_fault(error)) is not None:
        return fault
    kind = type(error).__name__
    is_allocation = kind == "RuntimeError" and "can't allocate memory" in str(error)
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError) or is_allocation:
        return _out_of_memory(error)
    return InternalError.of(
        f"the worker failed: {kind}",
        where=_place_of(error),
        why=str(error).strip().splitlines()[0][:300] if str(error).strip() else kind,
        remedy="see train.log in the output folder for the traceback; start again to resume",
    )


def disk_fault(error: BaseException, place: str = "") -> TrainerError | None:
    """Return what an operating system's refusal to write means; None for any other error.

    `place` is where it was written to, for an error that does not name its file.
    """
    number = error.errno if isinstance(error, OSError) else None
    # The safetensors library tells it in words alone.
    if told := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(told[1])
    place = str(getattr(error, "filename", None) or place or "output_dir")
    if number in FULL:
        return StorageError.of(
            "the disk does not take what is written",
            where=place,
            why=os.strerror(number),
            remedy="df -h; free some room, then start again: the run resumes by itself",
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessError.of(
            "a file may not be read or written",
            where=place,
            why=f"{os.strerror(number)}, as user {os.getuid()}",
            remedy=f"sudo chown -R {os.getuid()}:{os.getgid()} {Path(place).parent}",
        )
    return None


def _out_of_memory(error: BaseException) -> TrainerError:
    return MemoryKilledError.of(
        "memory ran out",
        where="training step",
        why=(str(error).strip().splitlines() or ["no memory was left"])[0][:300],
        remedy="lower per_device_train_batch_size or max_seq_length, set "
        "gradient_checkpointing to true, or use_4bit to true; the run resumes by itself",
    )


def _place_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
