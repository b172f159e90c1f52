"""Create a Markdown page from the sections' JSON files, whatever their outcome."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = "page.md"
HEAD = (
    "| section | check | measured | criterion | outcome |",
    "|---|---|---|---|---|",
)


def read_results(folder: Path, sections: Sequence[str]) -> list[dict[str, Any]]:
    """Return what each section has left, in order; a section without a file has no rows."""
    results = []
    for name in sections:
        try:
            results.append(json.loads((folder / f"{name}.json").read_text()))
        except (OSError, ValueError):
            results.append({"section": name, "rows": [], "ended": "not started"})
    return results


def outcomes(results: Sequence[dict[str, Any]]) -> Counter[str]:
    """Count the rows by outcome; a section that did not end by itself is one failure."""
    counted = Counter(row["outcome"] for result in results for row in result["rows"])
    counted["fail"] += sum(_is_cut_off(result) for result in results)
    return counted


def page(results: Sequence[dict[str, Any]], *, command: str, seconds: float) -> str:
    """Return the page."""
    lines = [f"# GPU check\n\n`{command}`: {seconds:.0f} s\n", *HEAD]
    for result in results:
        lines += [_line(result["section"], row) for row in result["rows"]]
        if _is_cut_off(result):
            how = result.get("ended", "running when the check ended")
            lines.append(f"| {result['section']} | the section | | ends by itself | FAIL: {how} |")
    counted = outcomes(results)
    took = ", ".join(
        f"{result['section']} {result['seconds']:.0f} s"
        for result in results
        if "seconds" in result
    )
    lines += [
        "",
        f"{counted['pass']} passed, {counted['fail']} failed, {counted['not run']} not run, "
        f"{counted['measured']} measured without a criterion.",
        f"Time: {took or 'none'}.",
    ]
    return "\n".join(lines) + "\n"


def _is_cut_off(result: dict[str, Any]) -> bool:
    return result.get("ended") != "finished"


def _line(section: str, row: dict[str, Any]) -> str:
    figures = ", ".join(f"{name} {_shown(value)}" for name, value in row["figures"].items())
    outcome = row["outcome"].upper() if row["outcome"] == "fail" else row["outcome"]
    why = f": {row['why']}" if row["why"] else ""
    cells = (section, row["name"], figures, row["criterion"], outcome + why)
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _shown(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
