"""Explain why a base model does not load, and how to fix it."""

from __future__ import annotations

from ..errors import AccessError, ConfigError, StorageError, TrainerError, UnavailableError, causes
from ..faults import disk_fault

# How the hub's libraries, on requests or on httpx, say that no answer came.
UNREACHABLE = frozenset(
    {
        "ConnectError",
        "ConnectionError",
        "LocalEntryNotFoundError",
        "NetworkError",
        "ProxyError",
        "Timeout",
        "TimeoutError",
        "TimeoutException",
    }
)


def explained(
    error: BaseException, name: str, revision: str | None, *, is_local: bool
) -> TrainerError:
    """Return what an error of transformers or of the hub means, and what to do about it."""
    where = f"model_name_or_path: {name}"
    if (full := _disk_fault(error)) is not None:
        return full
    kinds, status = _kinds(error), status_of(error)
    if "GatedRepoError" in kinds:
        return AccessError.of(
            "the base model is gated",
            where,
            "access is granted per account; no token is set, or its account has no access",
            f"open https://huggingface.co/{name}, accept the licence, then export HF_TOKEN=hf_...",
        )
    if "RepositoryNotFoundError" in kinds:
        return UnavailableError.of(
            "the hub has no such model, or it is private",
            where,
            f"the hub answered {status or '404 or 401'}",
            "check the spelling; for a private model export HF_TOKEN=hf_...",
        )
    if "RevisionNotFoundError" in kinds:
        return UnavailableError.of(
            "the base model has no such revision",
            f"model_revision: {revision}",
            f"{name} has no branch, tag or commit of that name",
            f"use one listed on https://huggingface.co/{name}/tree/main, or leave it out",
        )
    if status in (401, 403):
        return AccessError.of(
            "the hub rejected the token",
            where,
            f"the hub answered {status}",
            "create a new one at https://huggingface.co/settings/tokens and export "
            "HF_TOKEN=hf_..., "
            "or unset it for a public model",
        )
    if isinstance(error, PermissionError):
        return AccessError.of("the base model cannot be read", where, str(error), f"ls -l {name}")
    if "trust_remote_code=True" in str(error):
        return ConfigError.of(
            "the base model needs custom Python code",
            "trust_remote_code: false",
            f"the config.json of {name} refers to Python code (auto_map), which was not run",
            "use a model supported by transformers; or review that code, then --trust_remote_code",
        )
    if is_offline(error):
        return UnavailableError.of(
            "the base model is not in the hub's local cache",
            where,
            "HF_HUB_OFFLINE forbids downloading it",
            f"HF_HUB_OFFLINE=0 hf download {name}",
        )
    if is_unreachable(error) and not is_local:
        return UnavailableError.of(
            "the hub cannot be reached",
            where,
            f"the hub answered {status}" if status else _root(error),
            "check the network or proxy; set HF_ENDPOINT to a mirror; or use a local folder",
        )
    why = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    remedy = f"ls -l {name}" if is_local else f"hf download {name}"
    return UnavailableError.of("the base model cannot be loaded", where, why, remedy)


def _disk_fault(error: BaseException) -> TrainerError | None:
    """Return that the cache's disk is full, where that is what began it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for link in causes(error):
        fault = disk_fault(link, HF_HUB_CACHE)
        if isinstance(fault, StorageError):
            (problem,) = fault.problems
            return StorageError.of(
                "the disk of the hub's cache is too small for the base model",
                where=problem.where,
                why=problem.why,
                remedy=f"free disk space there (df -h {HF_HUB_CACHE}), or set HF_HOME to a folder "
                "on a larger disk",
            )
    return None


def is_offline(error: BaseException) -> bool:
    """Tell whether HF_HUB_OFFLINE forbade to ask."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    kinds = _kinds(error)
    return "OfflineModeIsEnabled" in kinds or (
        HF_HUB_OFFLINE and "LocalEntryNotFoundError" in kinds
    )


def is_unreachable(error: BaseException) -> bool:
    """Tell whether no answer came, or one that says that the hub is out of order."""
    return bool(_kinds(error) & UNREACHABLE) or status_of(error) >= 500


def _root(error: BaseException) -> str:
    """Return what began it: "Connection refused", or the kind of error."""
    first = causes(error)[-1]
    return getattr(first, "strerror", None) or type(first).__name__


def _kinds(error: BaseException) -> set[str]:
    """Return the names of what an error and its causes are."""
    return {kind.__name__ for link in causes(error) for kind in type(link).__mro__}


def status_of(error: BaseException) -> int:
    """Return what the hub answered, 0 where no answer came."""
    codes = (
        getattr(getattr(link, "response", None), "status_code", None) for link in causes(error)
    )
    return next((code for code in codes if code), 0)
