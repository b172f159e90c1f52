"""The base model beside an exported adapter: `lora-trainer export --with-base`.

For machines that reach no hub and do not have the embedded model. Files are copied as they are;
pickled ones never.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.schema import ModelSection

if TYPE_CHECKING:
    from ..model.load import ModelSource

FOLDER = "base_model"
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
MANIFEST = "manifest.json"  # of the cache of prepared models: it seals that folder alone
LOADING = re.compile(r"AutoModelForCausalLM\.from_pretrained\(.*\)")


def base_files(source: ModelSource, section: ModelSection) -> list[Path]:
    """Return the files of a base model that its users need; one of the hub is fetched.

    Raises:
        UnavailableError, AccessError: the hub does not give them.
    """
    folder = Path(source.path) if source.is_local else _fetched(source, section)
    suffixes = (*SUFFIXES, ".py") if section.trust_remote_code else SUFFIXES
    return sorted(
        {
            *(one for one in folder.iterdir() if one.suffix in suffixes and one.name != MANIFEST),
            *_licenses(folder),
        }
    )


def copy_base(files: list[Path], target: Path) -> None:
    """Copy a base model into an exported adapter's folder, and name it in the card there."""
    folder = target / FOLDER
    folder.mkdir()
    for file in files:
        shutil.copyfile(file, folder / file.name)
    card = target / "README.md"
    if card.is_file():
        loading = f'AutoModelForCausalLM.from_pretrained("{FOLDER}")  # a folder beside this card'
        text = LOADING.sub(lambda _: loading, card.read_text(encoding="utf-8"), count=1)
        card.write_text(text, encoding="utf-8")


def _fetched(source: ModelSource, section: ModelSection) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*(f"*{suffix}" for suffix in SUFFIXES), *LICENSES]
    if section.trust_remote_code:
        patterns.append("*.py")
    try:
        return Path(
            snapshot_download(
                source.path,
                revision=source.revision,
                cache_dir=section.model_cache_dir,
                token=section.hf_token,
                allow_patterns=patterns,
                local_files_only=source.is_cached,
            )
        )
    except Exception as error:
        raise source.refusal(error) from error


def _licenses(folder: Path) -> Iterator[Path]:
    for pattern in LICENSES:
        yield from (one for one in folder.glob(pattern) if one.is_file())
