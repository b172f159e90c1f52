"""Data flows one way, and what must answer at once imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_trainer

SOURCE = Path(lora_trainer.__file__).parent
# Each module may import the layers above its own, and its own layer only where said.
LAYERS = [
    {"quoting"},
    {"errors", "aliases", "compat", "gate", "connections", "disk"},
    {"config", "machine", "events", "faults", "silence"},
