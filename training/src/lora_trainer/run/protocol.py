"""The contract between the supervisor and its worker processes."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..redaction import Redaction

# The environment variable with the number of the descriptor that events are written to.
EVENTS_FD = "LORA_TRAINER_EVENTS_FD"
# The worker's handler of this signal writes the stacks of all its threads to its log.
STACKS_SIGNAL = signal.SIGUSR1
# The exit code of a rank that ended only because another rank was gone.
PEER_LOST = 76


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """The supervisor's instructions to a worker."""

    config: Config
    output_dir: Path
    run_name: str
    redacted: dict[str, Any]
    rank: int = 0
    ranks: int = 1
    store: str = ""
    redaction: Redaction = field(default_factory=Redaction)

    @staticmethod
    def read(text: str) -> WorkerSpec:
        """Read an order from JSON."""
        raw = json.loads(text)
        redaction = Redaction(raw["secrets"])
        return WorkerSpec(
            Config.model_validate(raw["config"]),
            Path(raw["output_dir"]),
            redaction.text(raw["run_name"]),  # it stands in the card and at trackers
            raw["redacted"],
            raw["rank"],
            raw["ranks"],
            raw["store"],
            redaction,
        )
