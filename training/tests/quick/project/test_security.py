"""The code has no door to pickled files: no call that opens one stands in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import lora_trainer
from lora_trainer.config.schema import ModelSection

SOURCE = Path(lora_trainer.__file__).parent
ROOT = SOURCE.parents[2]
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Calls that unpickle, by their last two names; numpy's only with allow_pickle.
FORBIDDEN_CALLS = {"torch.load", "torch.jit.load", "yaml.load", "pandas.read_pickle"}
FORBIDDEN_NAMES = {"Trainer", "Seq2SeqTrainer", "load_repo_checkpoint"}


def offences(path: Path) -> list[str]:
    """Return what a file says that could unpickle."""
    uses = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            uses += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            uses += [module] if module.split(".")[0] in FORBIDDEN_MODULES else []
            if module.startswith("transformers"):
                uses += [a.name for a in node.names if a.name in FORBIDDEN_NAMES]
        elif isinstance(node, ast.Call):
            uses += [call] if (call := ast.unparse(node.func)) in FORBIDDEN_CALLS else []
            uses += [k.arg for k in node.keywords if k.arg == "allow_pickle"]
    return uses


def test_one_file_unpickles_and_only_what_our_own_processes_send():
    by_file = {path.name: uses for path in SOURCE.rglob("*.py") if (uses := offences(path))}
    assert by_file == {"tokenizer_pool.py": ["pickle"]}
    loads = re.findall(r"pickle\.load\(.*\)", (SOURCE / "data" / "tokenizer_pool.py").read_text())
    # Pipes to and from its own children, which nobody else can write to.
    assert sorted({re.split(r"[(,)]", load)[1] for load in loads}) == ["cast", "tasks"]


def test_the_search_finds_what_it_looks_for(tmp_path):
    (tmp_path / "a.py").write_text(
        "import pickle\nfrom dill import loads\nfrom transformers import Trainer\n"
        "torch.load(path)\nnp.load(path, allow_pickle=True)\n"
    )
    assert len(offences(tmp_path / "a.py")) == 5


def test_code_of_a_repository_is_off_by_default():
    assert ModelSection().trust_remote_code is False


def test_every_test_that_the_page_names_is_there():
    named = re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "SECURITY.md").read_text())
    assert named
    for path in named:
        assert (ROOT / "training" / path).is_file(), path
