"""A section's results: each row is in the section's JSON file as soon as it is known."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .criteria import Verdict

Figures = dict[str, float | int | str]
LONGEST_WHY = 300


@dataclass(frozen=True, slots=True)
class Row:
    """One check: what was measured, the criterion if there is one, and the outcome."""

    name: str
    outcome: Literal["pass", "fail", "measured", "not run"]
    figures: Figures
    criterion: str = ""
    why: str = ""


class Record:
    """The rows of one section, kept in `path`; a kill loses nothing that was measured."""

    def __init__(self, path: Path, section: str) -> None:
        self.path = path
        self.section = section
        self.rows: list[Row] = []
        self._write()

    def measure(self, name: str, figures: Figures) -> None:
        """Record figures without a criterion."""
        self._add(Row(name, "measured", figures))

    def judge(self, name: str, figures: Figures, verdict: Verdict) -> None:
        """Record figures with their verdict."""
        outcome: Literal["pass", "fail"] = "pass" if verdict.is_met else "fail"
        self._add(Row(name, outcome, figures, verdict.criterion))

    def skip(self, name: str, why: str) -> None:
        """Record why a check did not run."""
        self._add(Row(name, "not run", {}, why=why))

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Turn an exception into a failed row, so that the next check of the section runs."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            why = f"{type(error).__name__}: {lines[0]}"[:LONGEST_WHY]
            self._add(Row(name, "fail", {}, "runs", why))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        content = {"section": self.section, "rows": [asdict(row) for row in self.rows]}
        write_json(self.path, content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
