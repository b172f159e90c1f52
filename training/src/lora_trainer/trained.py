"""A trained adapter: found by the folder that a user names, and put on its base model.

`find` needs no torch: what is wrong with the folder is told at once. `open_model` then
loads base model, tokenizer and adapter as training had them.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoint_folder import has_any
