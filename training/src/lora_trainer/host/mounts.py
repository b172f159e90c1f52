"""What a container's mounts and port are called on the host, for all that a person reads.

Compose sets LORA_HOST_OUTPUTS and its kin (docker-compose.training.yml). Only printed text is
translated: events, the status server and files keep the container's own paths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache

# Inside, /public is another name of the same mounts: a config's ../public/outputs leads there.
MOUNTS = {
    "LORA_HOST_DATASETS": ("/workspace/datasets", "/public/datasets"),
    "LORA_HOST_OUTPUTS": ("/workspace/outputs", "/public/outputs"),
    "LORA_HOST_MODELS": ("/workspace/models",),
    "LORA_HOST_LOGS": ("/workspace/logs",),
    "LORA_HOST_CONFIG": ("/workspace/config.json",),
}
PORT = "LORA_HOST_PORT"
DEFAULT_PORT = "8080"


def on_host(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the text with every path of a mount, and the server's address, as the host has it."""
    names = tuple(
        (inside, host)
        for variable, paths in MOUNTS.items()
        if (host := environ.get(variable, ""))
        for inside in paths
    )
    if names:
        known = dict(names)
        text = _paths(names).sub(lambda match: known[match[0]], text)
    if port := environ.get(PORT, ""):
        inside = environ.get("HEALTH_PORT") or DEFAULT_PORT
        text = re.sub(rf"(?<=://127\.0\.0\.1:){re.escape(inside)}\b", port, text)
    return text


@lru_cache(maxsize=8)
def _paths(names: tuple[tuple[str, str], ...]) -> re.Pattern[str]:
    """Return what matches these paths whole, alone or as the beginning of a longer one."""
    paths = "|".join(re.escape(inside) for inside, _ in names)
    return re.compile(rf"(?<![\w./-])(?:{paths})(?![\w-]|\.\w)")
