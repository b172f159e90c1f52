"""Settings of every test: one torch thread for tiny models, no network, quiet libraries."""

from __future__ import annotations

import os

from hypothesis import settings

# Two processes with two threads each on two cores wait for one another for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# A busy machine is slow, which is no failure of the code.
settings.register_profile("without a clock", deadline=None)
settings.load_profile("without a clock")
