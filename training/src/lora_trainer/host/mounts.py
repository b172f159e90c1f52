"""Translate a container's paths and port to those of the host, in printed text.

Compose sets LORA_HOST_OUTPUTS and related variables (docker-compose.training.yml). Events, the
status server and files keep the container's paths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache

# Inside, /public is an alias of the same mounts: ../public/outputs in a config resolves to it.
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
    """Return the text with mount paths and the server's address as seen on the host."""
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
    """Return a pattern that matches these paths, alone or as the start of a longer path."""
    paths = "|".join(re.escape(inside) for inside, _ in names)
    return re.compile(rf"(?<![\w./-])(?:{paths})(?![\w-]|\.\w)")
