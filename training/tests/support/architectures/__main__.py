"""Try architectures: all of them, and write table and page; or those that are named, and print."""

from __future__ import annotations

import sys

from support.architectures.sweep import causal_language_models, sweep, warm_up
from support.architectures.table import PAGE, page, path_of, write
from support.architectures.trial import Outcome


def main(names: list[str]) -> None:
    def report(name: str, outcome: Outcome) -> None:
        print(f"{name:28} {outcome.result:10} {outcome.reason}", flush=True)

    warm_up()
    outcomes = sweep(names or causal_language_models(), report=report)
    if not names:
        write(path_of(), outcomes)
        PAGE.write_text(page())


if __name__ == "__main__":
    main(sys.argv[1:])
