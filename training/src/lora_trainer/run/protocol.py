"""The contract between the supervisor and its worker processes."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..config.schema import Config
from ..host.launcher import Launch
from ..redaction import Redaction

# The environment variable with the number of the descriptor that events are written to.
EVENTS_FD = "LORA_TRAINER_EVENTS_FD"
# The worker's handler of this signal writes the stacks of all its threads to its log.
STACKS_SIGNAL = signal.SIGUSR1
# The exit code of a rank that ended only because another rank was gone.
PEER_LOST = 76
# What the supervisor does itself once the run has ended; it may hold a secret.
NOT_FOR_WORKERS = {"monitoring": {"on_end_command", "webhook_url"}}


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """The supervisor's instructions to a worker."""

    config: Config
    output_dir: Path
    run_name: str
    rank: int = 0
    ranks: int = 1
    store: str = ""
    launch: Launch | None = None
    redaction: Redaction = field(default_factory=Redaction)

    @property
    def here(self) -> tuple[int, int] | None:
        """Return this rank's number among those of its host, and how many those are."""
        return (self.launch.local_rank, self.launch.local_count) if self.launch else None

    @property
    def local_ranks(self) -> int:
        """Return how many ranks share this host."""
        return self.launch.local_count if self.launch else self.ranks

    def to_json(self) -> str:
        """Return what `read` reads; the supervisor alone writes it, to a pipe."""
        return json.dumps(
            {
                "config": self.config.model_dump(mode="json", exclude=NOT_FOR_WORKERS),
                "output_dir": str(self.output_dir),
                "run_name": self.run_name,
                "rank": self.rank,
                "ranks": self.ranks,
                "store": self.store,
                "launch": asdict(self.launch) if self.launch else None,
                "secrets": sorted(self.redaction.secrets),
            }
        )

    @staticmethod
    def read(text: str) -> WorkerSpec:
        """Read what `to_json` returned."""
        raw = json.loads(text)
        redaction = Redaction(raw["secrets"])
        return WorkerSpec(
            Config.model_validate(raw["config"]),
            Path(raw["output_dir"]),
            redaction.text(raw["run_name"]),  # it stands in the card and at trackers
            raw["rank"],
            raw["ranks"],
            raw["store"],
            Launch(**raw["launch"]) if raw["launch"] else None,
            redaction,
        )
