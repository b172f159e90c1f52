"""What test_redaction.py shares with other tests."""

from __future__ import annotations

CANARY = "canary+/secret=0123"
