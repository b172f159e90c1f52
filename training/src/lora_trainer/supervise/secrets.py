"""The secrets of a run: what its environment and its configuration hold."""

from __future__ import annotations

import os

from ..config.settings import Settings
from ..redaction import Redaction
from ..serve.server import read_token

KEY_CHARACTERS = 16  # a shorter part of a path, such as webhook, is a word of its own


def redaction_of(settings: Settings) -> Redaction:
    """Return the redaction of all that a run with these settings knows of secrets."""
    monitoring = settings.config.monitoring
    url = monitoring.webhook_url
    token = read_token(monitoring.health_token_file)
    return Redaction.of(os.environ, settings.config.model.hf_token, token, *_secrets_of(url))


def _secrets_of(url: str | None) -> list[str]:
    """Return an address and the parts of its path that are long enough for a key."""
    if url is None:
        return []
    path = url.partition("://")[2].partition("/")[2]
    return [url, *(part for part in (path, *path.split("/")) if len(part) >= KEY_CHARACTERS)]
