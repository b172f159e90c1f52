"""Open datasets on the Hugging Face hub, and explain why one does not open.

Code in a dataset repository is never run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ..errors import AccessError, DataError, StorageError, TrainerError, UnavailableError, causes
from .resolve import SourceSpec, hub_id, near_local_path

ROWS_AT_ONCE = 256
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def open_hub_dataset(spec: SourceSpec) -> Any:
    """Download a dataset or use the hub's local cache; return a `datasets.Dataset`.

    Raises:
        UnavailableError: no such dataset, no network.
        AccessError: gated, and no token with access.
        DataError: the subset or split does not exist, or its files cannot be parsed.
        StorageError: the disk is full.
    """
    # The library reads these at import: no progress bars in container logs, and no telemetry about
    # dataset names, which may be private.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    import datasets

    try:
        return datasets.load_dataset(
            hub_id(spec), name=spec.subset, split=spec.split, revision=spec.revision
        )
    except Exception as error:
        raise _explained(error, spec) from error


def hub_fingerprint(dataset: Any) -> str:
    """Return the fingerprint of a hub dataset, which changes with its content."""
    return str(dataset._fingerprint)


def hub_batches(dataset: Any) -> Iterator[Any]:
    """Yield the rows as Arrow tables, which decodes no images and copies little."""
    yield from dataset.with_format("arrow").iter(batch_size=ROWS_AT_ONCE)


def _explained(error: Exception, spec: SourceSpec) -> TrainerError:
    """Translate an error of the hub's libraries, whose own text may quote rows."""
    chain = causes(error)
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    where = f"{spec.path_or_id} on the hub"
    # The library hides the hub's error; a dataset's name may contain the word "gated".
    if "GatedRepoError" in names or any("is a gated dataset" in str(link) for link in chain):
        return AccessError.of(
            "the dataset is gated",
            where=where,
            why="its owner grants access per account",
            remedy=f"accept the terms on https://huggingface.co/datasets/{hub_id(spec)}, "
            "then set HF_TOKEN to a token of that account",
        )
    if any(isinstance(link, OSError) and link.errno == 28 for link in chain):
        return StorageError.of(
            "the disk is full while downloading the dataset",
            where=where,
            remedy="free disk space (df -h), or set HF_HOME to a folder on a larger disk",
        )
    if any(
        os.environ.get(switch, "0").lower() in ("1", "true", "yes", "on")
        for switch in OFFLINE_SWITCHES
    ):
        return UnavailableError.of(
            "the dataset is not in the hub's local cache",
            where=where,
            why=f"{' or '.join(OFFLINE_SWITCHES)} forbids downloading it",
            remedy=f"unset {OFFLINE_SWITCHES[0]}, or {_local_remedy(spec)}",
        )
    if names & {"DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"}:
        revision = f" at revision {spec.revision!r}" if spec.revision else ""
        return UnavailableError.of(
            f"the hub has no such dataset{revision}, or it is private",
            where=where,
            remedy=f"check the id; set HF_TOKEN if it is private; or {_local_remedy(spec)}",
        )
    if names & {
        "ConnectionError",
        "TimeoutError",
        "OfflineModeIsEnabled",
        "HfHubHTTPError",
        "ConnectError",
        "TimeoutException",
        "LocalEntryNotFoundError",
    }:
        return UnavailableError.of(
            "the hub cannot be reached",
            where=where,
            why=type(error).__name__,
            remedy=f"check the network or proxy; set HF_ENDPOINT to a mirror; "
            f"or {_local_remedy(spec)}",
        )
    if isinstance(error, ValueError | KeyError):
        return DataError.of(
            "the dataset has no such split or subset, or cannot be converted",
            where=where,
            why=f"{type(error).__name__} for split {spec.split!r}, subset {spec.subset!r}",
            remedy=f"the page lists them: https://huggingface.co/datasets/{hub_id(spec)}",
        )
    return DataError.of(
        "the dataset cannot be loaded",
        where=where,
        why=f"{type(error).__name__}; datasets that need code of their own are not run",
        remedy="download its data files and use the local path",
    )


def _local_remedy(spec: SourceSpec) -> str:
    near = near_local_path(spec)
    return f"did you mean the local path {near} ?" if near else "use a local file instead"
