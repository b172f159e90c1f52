"""The entry of every command: `lora-trainer`, `python -m lora_trainer`, `train_lora.py`."""

from __future__ import annotations

import os
import sys
import warnings

from .host import interrupts
from .host.environment import EXIT_CODES


def main(*before: str) -> int:
    """Run the command line with `arguments` placed first; return the exit code.

    Stop signals are handled before anything large is imported.
    """
    interrupts.install()
    if not sys.warnoptions:  # those of libraries: a worker's are in train.log
        warnings.simplefilter("ignore")
    try:
        from .cli import main as run
        from .host import streams

        given = [*before, *sys.argv[1:]]
        if EXIT_CODES in os.environ:
            from .commands.nodes import run_process

            code = run_process(lambda: run(given))
        else:
            code = run(given)
        interrupts.finish(code)
        streams.let_go()
    except KeyboardInterrupt:
        code, text = interrupts.block()
        sys.stderr.write(f"\n{text}\n")
    interrupts.finish(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
