"""The README says what is so, and leaves nothing to fill in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_trainer.errors import MEANINGS

ROOT = Path(__file__).resolve().parents[4]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("training/*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_figure_is_left_to_fill_in(page):
    assert not re.search(r"@[A-Z]+@|TODO|TBD", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_project_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_exit_code_is_explained():
    text = (ROOT / "docs" / "reference.md").read_text()
    for code in MEANINGS:
        assert f"| {code} |" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_a_page_names_exists(page):
    tests = {path.name: path.read_text() for path in (ROOT / "training/tests").rglob("test_*.py")}
    file = ""
    for named, function in re.findall(r"(test_\w+\.py)?(?:::(test_\w+))?", page.read_text()):
        file = named or file
        if named:
            assert named in tests, named
        if function:
            assert f"def {function}(" in tests[file], f"{file}::{function}"
