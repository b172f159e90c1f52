"""Renew the table of keys in a README: `python -m lora_trainer.config README.md`."""

import sys
from pathlib import Path

from .reference import replace_block

if __name__ == "__main__":
    for name in sys.argv[1:]:
        readme = Path(name)
        readme.write_text(replace_block(readme.read_text("utf-8")), "utf-8")
