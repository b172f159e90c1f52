"""The dashboard's files: whole, served by name, and never a way to make markup of a text."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import lora_trainer
from lora_trainer.run.events import KINDS
from lora_trainer.serve import app

FOLDER = Path(lora_trainer.__file__).parent / "serve" / "dashboard"
SCRIPTS = sorted(FOLDER.glob("*.js"))


def test_all_that_the_page_names_is_served():
    page = (FOLDER / "index.html").read_text()
    named = set(re.findall(r'(?:src|href)="/static/([^"]+)"', page))
    assert {"app.js", "style.css", "bokeh.min.js"} <= named
    assert named <= app.static_files().keys()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_all_that_a_script_imports_is_there(script):
    for name in re.findall(r'from "\./([^"]+)"', script.read_text()):
        assert (FOLDER / name).is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_script_can_make_markup_or_code_of_a_text(script):
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc"
    assert re.findall(ways, script.read_text()) == []


def test_the_page_listens_to_every_kind_of_event():
    listed = (FOLDER / "stream.js").read_text().split("const KINDS = [")[1].split("]")[0]
    assert set(re.findall(r'"(\w+)"', listed)) == {*KINDS, "tick", "log", "reset"}


def test_the_page_has_no_script_or_style_of_its_own_and_asks_nobody_else():
    page = (FOLDER / "index.html").read_text()
    assert re.findall(r"<script(?![^>]* src=)|<style| style=| on[a-z]+=", page) == []
    everything = "".join(path.read_text() for path in FOLDER.iterdir())
    hosts = set(re.findall(r"https?://([^/\"' ]+)", everything))
    assert hosts <= {"www.w3.org"}, "the name space of SVG is no address"


def test_the_chart_library_is_found_without_being_imported():
    names = [path.name for path in app.library_files()]
    assert names == ["bokeh.min.js", "bokeh-api.min.js"]
    assert "bokeh" not in sys.modules


def test_without_the_chart_library_the_page_is_served_all_the_same(monkeypatch):
    monkeypatch.setattr(app, "LIBRARY", "a_package_that_is_not_there")
    assert app.library_files() == []
    assert "app.js" in app.static_files()
