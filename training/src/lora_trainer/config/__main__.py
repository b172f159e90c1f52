"""Update the table of keys in a page: `python -m lora_trainer.config docs/reference.md`."""

import sys
from pathlib import Path

from .reference import replace_block

if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(replace_block(page.read_text("utf-8")), "utf-8")
