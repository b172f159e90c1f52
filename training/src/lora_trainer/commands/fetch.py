"""Copy a run from an object store to a local folder: `lora-trainer fetch`."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import ConfigError
from ..host.addresses import is_address
from ..remote.copies import fetch
from .new_folder import refuse_existing


def fetch_run(address: str, target: Path) -> None:
    """Copy a run: its records, and its adapter or, without one, its newest checkpoint.

    Raises:
        ConfigError: no address, or the target already exists. UnavailableError: no run is there.
    """
    if not is_address(address):
        raise ConfigError.of(
            "this is no address of an object store",
            where=address,
            why="an address begins with its protocol, such as s3:// or gs://",
            remedy="lora-trainer fetch s3://BUCKET/RUN FOLDER",
        )
    refuse_existing(target)
    fetch(address.rstrip("/"), target)
    typer.echo(f"{address} was copied to {target}")
