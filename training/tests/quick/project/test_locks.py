"""The locks of the three stacks: hashed, true to the .in files, complete, and without surplus."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TRAINING = Path(__file__).resolve().parents[3]
LOCKS = TRAINING / "requirements"
HASHED = sorted(path.name for path in LOCKS.glob("*.txt") if path.name != "cpu-torch.txt")
PYTHONS = {"cpu": range(10, 15), "current": range(10, 15), "cu121": range(10, 12)}
TORCH = importlib.metadata.version("torch")
HERE = "cu121" if TORCH.startswith("2.1.") else "cpu" if TORCH.endswith("+cpu") else "current"


def lines(path: Path) -> Iterator[str]:
    """Yield a file's lines, continued ones joined and comments left out, included files too."""
    text = re.sub(r"\\\n", " ", path.read_text())
    for line in re.sub(r"(^|\s)#.*", "", text, flags=re.M).splitlines():
        if line.startswith("-r "):
            yield from lines(path.parent / line[3:].strip())
        elif line.strip():
            yield line


def requirements(path: Path) -> list[Requirement]:
    return [Requirement(re.split(r"\s--hash", line)[0]) for line in lines(path)]


def locked(*names: str, environment: dict[str, str] | None = None) -> dict[str, str]:
    """Return name -> version of what pip would install from these locks."""
    entries = [entry for name in names for entry in requirements(LOCKS / name)]
    chosen = [
        (canonicalize_name(entry.name), str(entry.specifier).removeprefix("=="))
        for entry in entries
        if entry.marker is None or entry.marker.evaluate(environment)
    ]
    assert len(set(chosen)) == len(dict(chosen)), "a package is locked at two versions"
    return dict(chosen)


def asked(stack: str) -> list[Requirement]:
    pins = "cu121" if stack == "cu121" else "current"
    names = ["requirements.txt", f"requirements/{pins}.in", "requirements/test.in"]
    if stack != "cu121":
        names.append("requirements/deepspeed.in")
    return [entry for name in names for entry in requirements(TRAINING / name)]


def files(stack: str) -> list[str]:
    extra = [] if stack == "cu121" else ["deepspeed.txt"]
    return [f"{stack}.txt", f"{stack}-torch.txt", f"{stack}-test.txt", *extra]


def python(minor: int) -> dict[str, str]:
    return {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.4"}


@pytest.mark.parametrize("name", HASHED)
def test_every_locked_package_has_a_hash_and_no_place_is_named(name: str) -> None:
    text = (LOCKS / name).read_text()
    assert not re.search(r"://|--index|--find-links", text)
    for line in lines(LOCKS / name):
        assert re.match(r"[\w.-]+==\S+.*\s--hash=sha256:[0-9a-f]{64}", line), line


@pytest.mark.parametrize("stack", ["cpu", "current", "cu121"])
@pytest.mark.parametrize("part", ["", "-torch", "-test"])
def test_every_stack_is_installed_from_files_of_the_same_names(stack: str, part: str) -> None:
    assert locked(f"{stack}{part}.txt")


@pytest.mark.parametrize(
    ("stack", "minor"), [(stack, minor) for stack in PYTHONS for minor in PYTHONS[stack]]
)
def test_locks_satisfy_what_the_in_files_ask_for(stack: str, minor: int) -> None:
    versions = locked(*files(stack), environment=python(minor))
    for entry in asked(stack):
        if entry.marker is None or entry.marker.evaluate(python(minor)):
            assert entry.specifier.contains(versions[canonicalize_name(entry.name)]), entry


def test_both_builds_of_torch_have_one_version() -> None:
    assert locked("cpu-torch.txt")["torch"] == locked("current-torch.txt")["torch"] + "+cpu"


@pytest.mark.parametrize("stack", ["cpu", "current", "cu121"])
def test_every_stack_has_bitsandbytes_with_its_hash_and_the_tests_add_none(stack: str) -> None:
    assert "bitsandbytes" in locked(f"{stack}.txt")
    assert "bitsandbytes" not in locked(f"{stack}-torch.txt") | locked(f"{stack}-test.txt")


def needed(entries: list[Requirement]) -> Iterator[Requirement]:
    """Yield the requirements, and what the installed distributions require in their turn."""
    seen = set()
    while entries:
        entry = entries.pop()
        extras = ["", *sorted(entry.extras)]
        if entry.marker and not entry.marker.evaluate({"extra": ""}):
            continue
        yield entry
        name = canonicalize_name(entry.name)
        for extra in extras:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in importlib.metadata.requires(name) or []:
                child = Requirement(text)
                if child.marker and child.marker.evaluate({"extra": extra}):
                    child.marker = None
                entries.append(child)


def test_locks_hold_everything_that_is_needed_here_and_nothing_else() -> None:
    versions = locked(*files(HERE))
    reached = set()
    for entry in needed(asked(HERE)):
        name = canonicalize_name(entry.name)
        assert entry.specifier.contains(versions[name]), f"{entry}, locked {versions[name]}"
        reached.add(name)
    assert versions.keys() - reached == set()


@pytest.fixture
def lock_py(tmp_path: Path) -> ModuleType:
    """Return requirements/lock.py, over a folder with one lock of two packages."""
    spec = importlib.util.spec_from_file_location("lock_py", LOCKS / "lock.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.LOCKS = tmp_path
    (tmp_path / "cpu.txt").write_text(
        "# made\na==1 \\\n    --hash=sha256:1\nb==2 \\\n    --hash=sha256:2\n"
    )
    (tmp_path / "new").mkdir()
    return module


def test_a_lock_entry_is_selected_with_its_hashes(lock_py: ModuleType, tmp_path: Path) -> None:
    assert lock_py._select(tmp_path / "cpu.txt", {"b==2 \\"}) == "b==2 \\\n    --hash=sha256:2\n"


@pytest.mark.parametrize(
    ("change", "drifted", "printed"),
    [(("", ""), [], ""), (("b==2", "b==3"), ["cpu.txt"], "< b==2 \\\n> b==3 \\\n"),
     (("sha256:2", "sha256:3"), ["cpu.txt"], "")],
)  # fmt: skip
def test_drifted_locks_are_named_with_the_entries_that_differ(
    lock_py: ModuleType,
    tmp_path: Path,
    change: tuple[str, str],
    drifted: list[str],
    printed: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (tmp_path / "cpu.txt").read_text()
    (tmp_path / "new" / "cpu.txt").write_text(text.replace(*change))
    assert lock_py._drifted(tmp_path / "new") == drifted
    assert capsys.readouterr().err == printed
