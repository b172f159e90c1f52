"""The identity of a run: the content of its inputs, never their paths.

An identity has six parts: the configuration's values, the adapter that training starts
from, the base model's weights, the tokenized rows, the learning-rate schedule, and the number of
examples per step, which a run keeps whatever the number of processes. Every checkpoint carries
it. The first two are known before anything is loaded; they are in the output folder's
`config.digest` too, by which a start knows the run in the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..config.schema import EMBEDDED_MODEL, Config, ModelSection
from ..config.start_adapter import StartAdapter, find_adapter
from ..data.fingerprint import FileHashes, stamp_of
from ..errors import ConfigError, Problem, UnavailableError
from ..host.addresses import default_cache
from ..host.disk import write_text
from ..model import embedded, load
from ..plan import Plan
from ..run_folder import RunFolder

# The form of identities; runs of other forms cannot be compared with.
FORM = "2"
NO_ADAPTER = "0"
IN_WORDS = {
    "config": "the configuration",
    "adapter": "the adapter that training starts from",
    "base": "the base model's weights",
    "data": "the tokenized rows (data, tokenizer or chat template)",
    "schedule": "the learning-rate schedule",
    "batch": "the batch (examples per step, tokens per micro-batch)",
}
MARK = re.compile(rf"{FORM} (?P<config>[0-9a-f]{{16}}) (?P<adapter>[0-9a-f]+) (?P<check>[0-9a-f]+)")
EARLIER_MARK = re.compile(r"[0-9a-f]{16}")
# Two threads read and hash faster than most disks deliver; more would take cores from the steps.
THREADS = 2
# A file's name in the hub's cache is its sha256, where it is one of those that git does not hold.
HUB_BLOB = re.compile(r"[0-9a-f]{64}")
# What libraries write into a config.json that changes no number.
IRRELEVANT = ("_name_or_path", "transformers_version")


@dataclass(frozen=True, slots=True)
class Identity:
    """The hashes of what decides the trained weights."""

    config: str
    adapter: str
    base: str
    data: str
    schedule: str
    batch: str

    def __str__(self) -> str:
        return "-".join([FORM, *(getattr(self, field.name) for field in fields(self))])

    @staticmethod
    def parse(text: str) -> Identity | None:
        """Read an identity back; None for one of another form."""
        form, *digests = text.split("-")
        return (
            Identity(*digests) if form == FORM and len(digests) == len(fields(Identity)) else None
        )

    def differences(self, other: Identity) -> list[str]:
        """Return, in words, the parts that differ."""
        names = [field.name for field in fields(self)]
        return [IN_WORDS[n] for n in names if getattr(self, n) != getattr(other, n)]


def other_run(checkpoint: Path, theirs: str, ours: str) -> ConfigError:
    """Return the refusal of a checkpoint that another run made, by what is different."""
    before, now = Identity.parse(theirs), Identity.parse(ours)
    remedy = (
        "undo the change to resume, use another --run_name, or start over with --resume never "
        "(the old run is archived, not removed)"
    )
    if before is None or now is None:
        what = "the output folder contains a run of an earlier version"
        why = "its checkpoints identify their inputs in another way than this version's"
        remedy = remedy.replace("undo the change to resume", "finish it with that version")
    else:
        changed = now.differences(before)
        what = f"the output folder contains a run with different inputs: {', '.join(changed)}"
        why = f"changed since this checkpoint: {', '.join(changed)}"
    return ConfigError(Problem(what, str(checkpoint), why, remedy))


def schedule_part(config: Config, warmup_steps: int, total_steps: int) -> str:
    """Return what the steps' learning rates follow from; the kind is in the configuration's part.

    A constant rate does not depend on the last step, so a longer run is the same run.
    """
    is_constant = config.training.lr_scheduler_type == "constant"
    return f"{warmup_steps}" if is_constant else f"{warmup_steps}.{total_steps}"


@dataclass(frozen=True, slots=True)
class Mark:
    """What `config.digest` says of the run in its folder."""

    config: str
    adapter: str = NO_ADAPTER

    @property
    def text(self) -> str:
        """Return the file's content: a damaged one does not read as another run."""
        content = f"{FORM} {self.config} {self.adapter}"
        return f"{content} {hashlib.sha256(content.encode()).hexdigest()[:8]}\n"

    def write(self, folder: Path) -> None:
        """Write the file."""
        write_text(RunFolder(folder).digest, self.text)


class EarlierFormError(Exception):
    """A run was made by a version that identified runs by paths."""


def read_mark(folder: Path) -> tuple[Mark | None, str]:
    """Return the mark of the folder's run, or None and why there is none.

    Raises:
        EarlierFormError: it is of a form that is no longer read.
    """
    try:
        text = RunFolder(folder).digest.read_text(encoding="ascii")
    except FileNotFoundError:
        return None, f"{RunFolder.digest} is missing"
    except (OSError, ValueError) as error:
        return None, f"{RunFolder.digest} cannot be read ({type(error).__name__})"
    if EARLIER_MARK.fullmatch(text.strip()):
        raise EarlierFormError
    match = MARK.fullmatch(text.strip())
    mark = Mark(match["config"], match["adapter"]) if match else None
    return (mark, "") if mark and mark.text == text else (None, f"{RunFolder.digest} is damaged")


def adapter_digest(config: Config) -> str:
    """Return the hash of the weights that training starts from; NO_ADAPTER where it has none."""
    if config.lora.adapter_name_or_path is None:
        return NO_ADAPTER
    hashes = FileHashes(hash_cache(config.model))
    digest = hashes.sha256(find_adapter(config.lora.adapter_name_or_path).weights)[:16]
    hashes.save()
    return digest


def adapter_note(config: Config) -> str:
    """Return what a model card says of the adapter that training started from: no path."""
    if config.lora.adapter_name_or_path is None:
        return ""
    adapter, digest = find_adapter(config.lora.adapter_name_or_path), adapter_digest(config)
    run = f" of the run {adapter.run.name}" if adapter.run else ""
    step = f", {adapter.folder.name}" if adapter.is_checkpoint else ""
    return f"an existing adapter{run}{step}; the sha256 of its weights begins {digest}"


def check_adapter_base(config: Config, base_hash: BaseHash) -> str:
    """Compare the base that the first adapter was trained on, by its content where it is known.

    Returns a warning where only names and shapes could be compared.

    Raises:
        ConfigError: it was another one.
    """
    if config.lora.adapter_name_or_path is None:
        return ""
    adapter = find_adapter(config.lora.adapter_name_or_path)
    theirs = _base_of(adapter, config)
    if theirs is not None and theirs != base_hash.result():
        raise ConfigError(
            Problem(
                "the adapter was trained on another base model",
                f"adapter_name_or_path: {adapter.folder}",
                f"it was trained on {adapter.base}, whose content differs from that of "
                f"{config.model.model_name_or_path}",
                f"--model_name_or_path {adapter.base}, or name an adapter of this base model",
            )
        )
    if theirs is not None or adapter.base in (config.model.model_name_or_path, EMBEDDED_MODEL):
        return ""
    return (
        f"the adapter to start from was trained on {adapter.base}: only shapes could be compared "
        f"with {config.model.model_name_or_path}"
    )


def _base_of(adapter: StartAdapter, config: Config) -> str | None:
    """Return the hash of an adapter's base: as its run recorded it, or of the folder it names."""
    for state in sorted((adapter.run or adapter.folder).glob("checkpoints/step-*/state.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            recorded = Identity.parse(json.loads(state.read_text())["digest"])
            if recorded is not None:
                return recorded.base
    other = Path(adapter.base)
    is_elsewhere = other.is_dir() and adapter.base != config.model.model_name_or_path
    return BaseHash(other, config.model).result() if is_elsewhere else None


class BaseHash:
    """Hashes a base model's content while it loads and trains.

    Hashing 14 GB takes 10 to 40 s, and only a checkpoint needs the result: `result` waits
    for it. A file that changes before it is hashed is noticed.
    """

    def __init__(self, folder: Path, section: ModelSection) -> None:
        self.folder = folder
        self._hashes = FileHashes(hash_cache(section))
        files = base_files(folder, has_code=section.trust_remote_code)
        self._stamps = {path: stamp_of(path.stat()) for path in files}
        # The largest first, so that both threads end at about the same time.
        self._waiting = sorted(files, key=lambda path: self._stamps[path][0])
        self._found: dict[str, str] = {}
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._work, name="base-hash", daemon=True)
            for _ in range(min(THREADS, len(files)))
        ]
        for thread in self._threads:
            thread.start()

    def result(self) -> str:
        """Return the hash, 16 hex digits.

        Raises:
            UnavailableError: a file has changed since it was loaded.
            OSError: a file cannot be read.
        """
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        for path, stamp in self._stamps.items():
            if stamp_of(path.stat()) != stamp:
                raise UnavailableError.of(
                    "the base model changed while it was being loaded",
                    where=str(path),
                    why="its size, times or inode have changed since the start",
                    remedy="start again when nothing writes to the folder",
                )
        self._hashes.save()
        lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(self._found.items()))
        return hashlib.sha256(lines.encode()).hexdigest()[:16]

    def _work(self) -> None:
        try:
            while self._waiting:
                path = self._waiting.pop()
                name = path.relative_to(self.folder).as_posix()
                self._found[name] = _content_hash(path, self._hashes)
        except IndexError:  # the other thread took the last one
            return
        except BaseException as error:
            self._errors.append(error)


def digest_of(
    config: Config, config_digest: str, base: BaseHash, data: str, plan: Plan
) -> Callable[[], str]:
    """Return a function that waits for the base model's hash and gives the run's identity.

    `config_digest` is of the configuration as given, before the base model completed it.
    """
    adapter = adapter_digest(config)
    schedule = schedule_part(config, plan.warmup_steps, plan.total_steps)
    batch = plan.run_batch
    return lambda: str(Identity(config_digest, adapter, base.result(), data, schedule, batch))


def base_files(folder: Path, *, has_code: bool) -> list[Path]:
    """Return the files of a model folder that decide its numbers.

    The tokenizer's are not among them: it decides the tokenized rows, which have a part of
    their own in the identity.
    """
    single, index = load.WEIGHTS
    names = {"config.json", single}
    if not (folder / single).exists():
        names |= set(json.loads((folder / index).read_text())["weight_map"].values())
    files = [folder / name for name in names]
    if has_code:
        files += folder.rglob("*.py")
    return sorted(path for path in files if path.is_file())


def hash_cache(section: ModelSection) -> Path:
    """Return the folder in which hashes of base models are remembered."""
    return Path(section.model_cache_dir) if section.model_cache_dir else default_cache()


def base_folder(section: ModelSection) -> Path | None:
    """Return the folder of the base model's files, where they are on this machine already."""
    name = section.model_name_or_path
    if name == EMBEDDED_MODEL:
        folder = embedded.prepared_folder(hash_cache(section))
        return folder if folder.is_dir() else None
    if load.looks_like_path(name) or Path(name).is_dir():
        return Path(name) if Path(name).is_dir() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(
        name, "config.json", cache_dir=section.model_cache_dir, revision=section.model_revision
    )
    return Path(cached).parent if isinstance(cached, str) else None


def base_content(section: ModelSection) -> Callable[[], str] | None:
    """Begin to hash the base model, where it is on this machine; the result is a call away."""
    folder = base_folder(section)
    if folder is None:
        return None
    try:
        return BaseHash(folder, section).result
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _content_hash(path: Path, hashes: FileHashes) -> str:
    if path.name == "config.json":
        return _config_hash(path)
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs" and HUB_BLOB.fullmatch(target.name):
        return target.name
    return hashes.sha256(path)


def _config_hash(path: Path) -> str:
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key not in IRRELEVANT}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
