"""Settings of every test: one torch thread, no network, quiet libraries, signals, a time limit."""

from __future__ import annotations

import contextlib
import os
import signal

# Two processes with two threads each on two cores wait for one another for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# Seconds for a test and its fixtures; longer ones are marked `timeout(SECONDS)`. Past the limit the
# test fails and the stacks of all threads are printed. A busy machine may set it higher.
os.environ.setdefault("PYTEST_TIMEOUT", "600")

# In the background of a script SIGINT is ignored, and every process that a test starts inherits
# that. (nohup's SIGHUP stays ignored, or the tests would end with the terminal.)
signal.signal(signal.SIGINT, signal.default_int_handler)

# tests/gpu runs without hypothesis too. A busy machine is slow, which is no failure of the code.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("without a clock", deadline=None)
    settings.load_profile("without a clock")
