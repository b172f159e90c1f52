"""Tokenize on all cores: a pool of processes with one pipe each, results in task order.

Not `multiprocessing`: its children import the main module, including torch, and outlive a killed
parent. These import only this module, without torch, and exit when their standard input closes.
Started by `EncodingPool`, never by hand.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, BinaryIO, cast

from ..errors import ERRORS_BY_CODE, InternalError, MemoryKilledError, TrainerError
from .bad_rows import BadRow, Row
from .encoder import ChunkSettings, EncodedChunk, EncoderFactory, encode_chunk

Task = tuple[Sequence[Row | BadRow], ChunkSettings, bool]
CHILD_PROGRAM = "from lora_trainer.data.tokenizer_pool import serve; serve()"
CHUNKS_AHEAD = 2
"""Tasks queued per process: enough to keep it busy, few enough to bound memory."""


class EncodingPool:
    """Processes that tokenize chunks of rows.

    A process that dies within a chunk is replaced, and the chunk is repeated once.

    Raises:
        MemoryKilledError: a second process was killed within a chunk, usually by the kernel.
        InternalError: a second process exited by itself within a chunk.
    """

    def __init__(self, factory: EncoderFactory, processes: int) -> None:
        self._factory = factory
        self.size = processes
        self.restarts = 0
        self._local = threading.local()
        self._lock = threading.Lock()
        self._is_closing = False
        self._children: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="tokenize")

    def __enter__(self) -> EncodingPool:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_closing = True
            for child in self._children:
                child.kill()
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.wait()
            for stream in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):  # the reader of the pipe is gone
                    cast(BinaryIO, stream).close()

    def encode(self, tasks: Iterable[Task]) -> Iterator[EncodedChunk]:
        """Yield each task's result in order, starting new tasks only as results are consumed."""
        waiting: deque[Future[EncodedChunk]] = deque()
        for task in tasks:
            waiting.append(self._threads.submit(self._ask, task))
            if len(waiting) > self.size * CHUNKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _ask(self, task: Task) -> EncodedChunk:
        """Send a task to this thread's process, or to a replacement, and wait for the result."""
        try:
            answer = self._answer(task)
        except (OSError, EOFError, pickle.UnpicklingError):
            self._local.child = None
            with self._lock:
                self.restarts += not self._is_closing
            try:
                answer = self._answer(task)
            except (OSError, EOFError, pickle.UnpicklingError) as error:
                if self._local.child is None:  # it could not be started
                    raise
                raise _ended(self._local.child.wait(), task) from error
        if isinstance(answer, EncodedChunk):
            return answer
        code, problems = answer
        raise ERRORS_BY_CODE[code](problems)

    def _answer(self, task: Task) -> Any:
        child = getattr(self._local, "child", None) or self._start()
        _send(cast(BinaryIO, child.stdin), task)
        return pickle.load(cast(BinaryIO, child.stdout))  # noqa: S301 - our own child's

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),
            "TOKENIZERS_PARALLELISM": "false",  # one process per core
            "TRANSFORMERS_VERBOSITY": "error",
        }
        with self._lock:
            if self._is_closing:  # the pool is being closed: do not start another process
                raise CancelledError
            child = subprocess.Popen(
                [sys.executable, "-c", CHILD_PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            self._children.append(child)
        self._local.child = child
        _send(cast(BinaryIO, child.stdin), self._factory)
        return child


def serve() -> None:
    """Answer tasks from standard input until it ends; runs in a child."""
    # The parent decides when to stop: Ctrl-C in a terminal reaches the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.modules["torch"] = cast(Any, None)  # transformers works without torch then
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # library output must not mix with the results
    tasks = cast(io.BufferedReader, sys.stdin.buffer)
    encoder = None
    factory: EncoderFactory = pickle.load(tasks)  # noqa: S301 - from our own parent
    while True:
        try:
            rows, settings, is_check = pickle.load(tasks)  # noqa: S301 - from our own parent
        except (EOFError, pickle.UnpicklingError):  # the parent closed it or died
            return
        try:
            encoder = encoder or factory()
            answer: Any = encode_chunk(rows, encoder, settings, is_check)
        except TrainerError as error:
            answer = (error.exit_code, error.problems)
        try:
            _send(answers, answer)
        except BrokenPipeError:
            return


def _send(stream: BinaryIO, value: object) -> None:
    pickle.dump(value, stream, protocol=pickle.HIGHEST_PROTOCOL)
    stream.flush()


def _ended(exit_code: int, task: Task) -> TrainerError:
    """Return the error for a second process that died within the same chunk of rows."""
    rows = task[0]
    where = rows[0].where if len(rows) == 1 else f"{rows[0].where} to {rows[-1].where}"
    if exit_code == -signal.SIGKILL:
        return MemoryKilledError.of(
            "a tokenizing process was killed twice on the same rows",
            where=where,
            why="usually by the kernel, when memory runs out",
            remedy="lower preprocessing_num_workers, or check these rows",
        )
    return InternalError.of(
        "a tokenizing process exited by itself twice on the same rows",
        where=where,
        why=f"exit status {exit_code}",
        remedy="set preprocessing_num_workers: 1 to see its error, or check these rows",
    )
