"""Upload an adapter or a merged model to the Hugging Face hub: `lora-trainer push`.

Nothing else here uploads to the hub. A new repository is private unless `--public` says otherwise,
and one that is public already is refused without it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from ..errors import AccessError, ConfigError, TrainerError, UnavailableError
from ..host.disk import CHECKSUMS, is_changed
from ..model import hub
from ..remote.copies import copy_of_run
from ..run_folder import RunFolder
from ..units import size
from .finetuned import ADAPTER_CONFIG

SUFFIXES = (".safetensors", ".json", ".md", ".txt", ".model", ".jinja")
FORBIDDEN = (401, 403)
REMEDY = "make one at https://huggingface.co/settings/tokens and export HF_TOKEN=hf_..."


def push(named: str, repo_id: str, *, token: str | None, is_public: bool, message: str) -> None:
    """Upload a run's final adapter, or the files of the folder that is named.

    Raises:
        ConfigError: it is no model's folder, or the repository is public.
        UnavailableError: a file is not the one that was exported, or the hub is out of reach.
        AccessError: the hub takes no token, or not this one.
    """
    from huggingface_hub import HfApi, get_token

    folder = _folder(named)
    names = [file.name for file in _files(folder)]
    _warn_of_paths(folder)
    if not (token or get_token()):
        raise AccessError.of(
            "there is no token for the hub",
            where=repo_id,
            why="uploading needs a token with write access to this account or organization",
            remedy=REMEDY,
        )
    api = HfApi(token=token)
    try:
        _prepare(api, repo_id, is_public=is_public)
        total = size(sum((folder / name).stat().st_size for name in names))
        where = f"{api.endpoint}/{repo_id}"
        visibility = "public" if is_public else "private"
        typer.echo(f"uploading {len(names)} files ({total}) to {where} ({visibility}) ...")
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message=message
        )
    except TrainerError:
        raise
    except Exception as error:
        raise _explained(error, repo_id, api.endpoint) from error
    typer.echo(f"uploaded: {where}")


def _folder(named: str) -> Path:
    path = Path(copy_of_run(named)).expanduser().absolute()
    folder = RunFolder(path).final_model if (RunFolder(path).final_model).is_dir() else path
    if (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        return folder
    raise ConfigError.of(
        "there is nothing to upload",
        where=named,
        why=f"it has neither a {RunFolder.final_model} nor an {ADAPTER_CONFIG} nor a model's "
        "config.json",
        remedy=f"name a finished run, or lora-trainer export {named} TARGET and push TARGET",
    )


def _files(folder: Path) -> list[Path]:
    """Return the files that go to the hub: nothing from folders inside, nothing hidden."""
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and (path.suffix in SUFFIXES or path.name == CHECKSUMS)
    ]
    changed = [path.name for path in files if is_changed(path)]
    if changed:
        raise UnavailableError.of(
            "a file has changed since it was exported",
            where=str(folder),
            why=f"{', '.join(changed)}: the hash is not the one in {CHECKSUMS}",
            remedy="export it again; if you changed it yourself: "
            f"rm {folder / CHECKSUMS}, then push again",
        )
    return files


def _warn_of_paths(folder: Path) -> None:
    """Warn where an adapter names its base model by a path that only this machine has."""
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if str(base).startswith(("/", ".", "~")):
        typer.echo(
            f"warning: {ADAPTER_CONFIG} names the base model by a path of this machine ({base}); "
            "others cannot load it by that name",
            err=True,
        )


def _prepare(api: Any, repo_id: str, *, is_public: bool) -> None:
    """Make the repository where it is not there; refuse one that is more public than wanted."""
    api.create_repo(repo_id, private=not is_public, exist_ok=True)
    if not is_public and not api.model_info(repo_id).private:
        raise ConfigError.of(
            "the repository is public",
            where=repo_id,
            why="what is uploaded there can be read by everyone",
            remedy="add --public if that is meant, or name another repository",
        )


def _explained(error: Exception, repo_id: str, endpoint: str) -> TrainerError:
    status = hub.status_of(error)
    if status in FORBIDDEN or type(error).__name__ == "LocalTokenNotFoundError":
        return AccessError.of(
            "the hub does not allow the upload",
            where=repo_id,
            why=f"the hub answered {status or 'nothing: there is no token'}; a token needs write "
            "access to this account or organization",
            remedy=REMEDY,
        )
    if hub.is_offline(error):
        return UnavailableError.of(
            "uploading is switched off",
            where=repo_id,
            why="HF_HUB_OFFLINE is set",
            remedy=f"HF_HUB_OFFLINE=0 lora-trainer push ... {repo_id}",
        )
    if hub.is_unreachable(error):
        return UnavailableError.of(
            "the hub cannot be reached",
            where=endpoint,
            why=f"the hub answered {status}" if status else type(error).__name__,
            remedy="check the network or proxy; set HF_ENDPOINT to a mirror",
        )
    kind = ConfigError if type(error).__name__ == "HFValidationError" else UnavailableError
    return kind.of(
        "the upload failed",
        where=repo_id,
        why=str(error).strip().splitlines()[0][:300] if str(error).strip() else "",
        remedy="name the repository as ACCOUNT/NAME, and push again: what is there is kept",
    )
