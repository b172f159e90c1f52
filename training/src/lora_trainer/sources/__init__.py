"""Where the configuration comes from: defaults < config file < environment < command line.

`resolve` reads all sources, keeps each value's origin and raises all problems at
once. A key may stand in its section or at the top level of the file; see `file`,
`environment` and `arguments` for each source, `precedence` for which of them wins,
`foreign` for other trainers' spellings, `paths` for where relative paths start. Nothing
here imports torch.
`python -m lora_trainer.sources README.md` renews the README's table of keys.
"""

from .default import find_config
from .given import Origin
from .settings import Settings, resolve
from .table import help_text, key_table

__all__ = ["Origin", "Settings", "find_config", "help_text", "key_table", "resolve"]
