"""Classify the errors of object stores' libraries: what to tell the user, whether to retry."""

from __future__ import annotations

import errno
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from ..errors import (
    AccessError,
    ConfigError,
    StorageError,
    TrainerError,
    UnavailableError,
    causes,
)
from ..faults import disk_fault

Kind = Literal["refused", "full", "missing", "transient"]
# By name: the libraries of the stores are optional. Those of AWS, Google and Azure.
REFUSALS = frozenset(
    {
        "ClientAuthenticationError", "CredentialRetrievalError", "DefaultCredentialsError",
        "NoCredentialsError", "PartialCredentialsError", "PermissionError", "ProfileNotFound",
        "RefreshError", "SSOTokenLoadError", "TokenRetrievalError", "UnauthorizedSSOTokenError",
    }
)  # fmt: skip
REFUSING_CODES = frozenset({"AuthorizationHeaderMalformed", "ExpiredToken", "InvalidToken"})
FULL_CODES = frozenset({"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage"})
STATUS_NAMES = ("code", "status", "status_code")  # of gcsfs, aiohttp and Azure
FULL_NUMBERS = frozenset({errno.ENOSPC, errno.EDQUOT})
RENEW = {
    "s3": "renew them (aws sts get-caller-identity shows whose they are)",
    "gs": "renew them (gcloud auth application-default login)",
}


def kind_of(error: BaseException) -> Kind:
    """Return what kind of fault an error is; unknown ones count as transient."""
    chain = causes(error)
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    codes = {code_of(link) for link in chain}
    numbers = {link.errno for link in chain if isinstance(link, OSError)}
    statuses = {vars(link).get(name) for link in chain for name in STATUS_NAMES}
    if numbers & FULL_NUMBERS or codes & FULL_CODES or 507 in statuses:
        return "full"
    if names & REFUSALS or codes & REFUSING_CODES or statuses & {401, 403}:
        return "refused"
    return "missing" if "FileNotFoundError" in names else "transient"


def code_of(error: BaseException) -> str:
    """Return the code in an S3 response; empty for any other error."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict) or not isinstance(response.get("Error"), dict):
        return ""
    return str(response["Error"].get("Code", ""))


def is_wordless(error: BaseException) -> bool:
    """Return whether S3 gave no reason: it answers HEAD requests with a number alone."""
    return any(code_of(link).isdigit() for link in causes(error))


def reason(error: BaseException) -> str:
    """Return the first line of an error's text, short enough for a warning."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def explained(error: BaseException, address: str, *, lost: str = "") -> TrainerError:
    """Return the error with its exit code; `lost` says what is not affected by it."""
    if isinstance(error, TrainerError):
        return error
    local = getattr(error, "filename", None)
    if local and Path(str(local)).is_absolute() and (fault := disk_fault(error)) is not None:
        return fault
    kind, why = kind_of(error), "; ".join(filter(None, (reason(error), lost)))
    again = "then run the same command again"
    if kind == "refused":
        protocol = address.partition("://")[0]
        renew = RENEW.get(protocol, "renew the store's credentials")
        return AccessError.of(
            "the object store refuses access",
            where=address,
            why=why,
            remedy=f"check the credentials and their rights (read, write, list, delete): {renew}, "
            f"{again}",
        )
    if kind == "full":
        return StorageError.of(
            "the object store is full",
            where=address,
            why=why,
            remedy=f"free space there or raise its quota, {again}",
        )
    if kind == "missing":
        return UnavailableError.of(
            "the object store has no such place",
            where=address,
            why=why,
            remedy="create the bucket or container, or correct the address",
        )
    return UnavailableError.of(
        "the object store cannot be reached",
        where=address,
        why=why,
        remedy=f"check the network, the address and the endpoint (for S3: AWS_ENDPOINT_URL), "
        f"{again}",
    )


def unsupported(address: str, package: str) -> TrainerError:
    """Return the error of a protocol whose package is not installed, with the command for it."""
    return ConfigError.of(
        f"{package} is not installed",
        where=address,
        why=f"{address.partition('://')[0]}:// addresses need it",
        remedy=_install(package),
    )


def _install(package: str) -> str:
    if not os.access(sys.prefix, os.W_OK):  # an image is read-only
        return (
            "rebuild the image with it: ./training/build.sh --extra s3fs"
            if package == "s3fs"
            else f"build an image on top of this one that installs {package}"
        )
    lock = Path(__file__).parents[3] / "requirements" / "s3fs.txt"
    if package == "s3fs" and lock.is_file():
        return f"{sys.executable} -m pip install --no-deps --require-hashes -r {lock}"
    # The packages of fsspec's own project share its version numbers.
    pin = f"=={version('fsspec')}" if package in ("s3fs", "gcsfs") else ""
    return f"{sys.executable} -m pip install {package}{pin} fsspec=={version('fsspec')}"
