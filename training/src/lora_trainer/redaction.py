"""Redacts secrets from everything that is written, shown or served.

A secret is the value of any environment variable with a telling name, of `hf auth login` and
.netrc, and of secret configuration keys; in plain text, JSON or a URL. Tokens of a known shape and
passwords in URLs go too, wherever they come from.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus

STRUCK = "***"
LEAST_CHARACTERS = 6  # a shorter value occurs in too much text that is not secret
MOST_BYTES = 64 * 1024
# TOKENIZERS_PARALLELISM=false is not a secret, nor is the path in a variable ending in _FILE.
NAMES = re.compile(
    r"TOKEN(?!IZER)|SECRET|KEY|PASSW|CREDENTIAL|WEBHOOK|CONNECTION_STRING|_(PWD|PASS|AUTH|SAS)$",
    re.IGNORECASE,
)
OPTION = re.compile(
    r"--?(?:[\w.-]*[_.-])?(?:token|secret|key|password|credentials?|webhook[_-]url)",
    re.IGNORECASE,
)
PLACES = re.compile(r"_(FILE|PATH|DIR|SOCK)$", re.IGNORECASE)
SHAPES = (
    r"\bhf_[A-Za-z0-9]{20,}",
    r"\b(?:gh[opsu]_|github_pat_|glpat-|sk-)[A-Za-z0-9_-]{20,}",
    r"\bAKIA[A-Z0-9]{16}\b",
    r"(?i:(?<=bearer )[A-Za-z0-9._~+/=-]{16,})",
    r"(?i:(?<=basic )[A-Za-z0-9+/=]{16,})",
    # Name and password in a URL; with one slash where a path has folded two into it.
    r"(?:(?<=[A-Za-z]:/)|(?<=[A-Za-z]://))[^\s/@\"']*:[^\s/\"']+(?=@)",
    r"(?<=[A-Za-z]://)[^\s/@:\"']{12,}(?=@)",
)
PASSWORD = re.compile(r"://[^\s/:@]*:([^\s/]+)@")
# In a URL's query or fragment, the value of a parameter with a secret name.
PARAMETER = re.compile(
    r"((?:[?&;#]|%3F|%26)"
    r"(?:[\w.-]*[_.-]|access|api|auth|client|id|private|refresh)?"
    r"(?:token|secret|key|passw(?:or)?d|pwd|credentials?|signature|sig|auth)"
    r"(?:=|%3D))"
    r"[^&;#\s\"'<>%]+(?:%(?!26)[0-9A-F]{2}[^&;#\s\"'<>%]*)*",
    re.IGNORECASE,
)
# Fixed vocabulary: readers depend on these exact words.
KEPT_FIELDS = frozenset({"phase", "when"})


Record = TypeVar("Record")


class Redaction:
    """Knows the secrets; replaces them by three asterisks."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self.secrets = frozenset(secrets)
        written = {form for secret in self.secrets for form in _forms(secret)}
        known = [re.escape(form) for form in sorted(written, key=len, reverse=True)]
        self._pattern = re.compile("|".join([*known, *SHAPES]))

    @staticmethod
    def of(environ: Mapping[str, str], *more: str | None) -> Redaction:
        """Return the redaction of every secret known to this process, and of `more`."""
        named = [
            value
            for name, value in environ.items()
            if NAMES.search(name) and not PLACES.search(name) and not Path(value).is_absolute()
        ]
        urls = [one for value in environ.values() for one in PASSWORD.findall(value)]
        return Redaction([*named, *urls, *_kept_secrets(environ), *(one for one in more if one)])

    @property
    def longest_bytes(self) -> int:
        """Return the size of the longest secret."""
        return max((len(secret.encode()) for secret in self.secrets), default=0)

    def text(self, text: str) -> str:
        """Return the text without secrets."""
        struck = self._pattern.sub(STRUCK, text)
        return PARAMETER.sub(rf"\1{STRUCK}", struck) if "=" in text or "%3" in text else struck

    def data(self, data: bytes) -> bytes:
        """Return text bytes without secrets; bytes that are not UTF-8 are unchanged."""
        return self.text(data.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")

    def value(self, value: object) -> Any:
        """Return plain data without secrets."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.value(part) for part in value)
        return value

    def event(self, event: Record) -> Record:
        """Return an event or another dataclass without secrets; the same one if it has none."""
        struck = {
            field.name: clean
            for field in fields(event)  # type: ignore[arg-type]  # a dataclass
            if field.name not in KEPT_FIELDS
            and (clean := self.value(value := getattr(event, field.name))) != value
        }
        return replace(event, **struck) if struck else event  # type: ignore[type-var]


def given_secrets(arguments: Sequence[str]) -> list[str]:
    """Return the values of options with secret names."""
    secrets = []
    for option, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, is_joined, value = option.partition("=")
        if OPTION.fullmatch(name):
            secrets.append(value if is_joined else following)
    return secrets


def _forms(secret: str) -> set[str]:
    """Return the ways to write a secret; each line of a multi-line one, such as a key, counts."""
    lines = [line.strip() for line in secret.splitlines()]
    forms = set()
    for part in [secret.strip(), *lines]:
        in_json = json.dumps(part)[1:-1]
        in_urls = {quote(part), quote(part, safe=""), quote_plus(part)}
        forms |= {part, in_json, repr(part)[1:-1]} | in_urls
    return {form for form in forms if len(form) >= LEAST_CHARACTERS}


def _kept_secrets(environ: Mapping[str, str]) -> list[str]:
    """Return the secrets that other tools have stored for this user."""
    home = Path(environ.get("HOME") or "~").expanduser()
    hub = Path(environ.get("HF_HOME") or home / ".cache" / "huggingface")
    files = [Path(environ.get("HF_TOKEN_PATH") or hub / "token")]
    files += [
        Path(value)
        for name, value in environ.items()
        if name.endswith("_FILE") and NAMES.search(name)
    ]
    kept = []
    for path in files:
        with contextlib.suppress(OSError, ValueError):
            if path.is_file() and path.stat().st_size <= MOST_BYTES:
                kept.append(path.read_text(encoding="utf-8"))
    kept += _netrc_passwords(Path(environ.get("NETRC") or home / ".netrc"))
    named = environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws" / "credentials"
    return kept + _values_of_keys(Path(named)) + _google_keys(environ)


def _values_of_keys(path: Path) -> list[str]:
    """Return the secrets in an AWS credentials file: a value a line, under a telling name."""
    with contextlib.suppress(OSError, ValueError):
        if path.is_file() and path.stat().st_size <= MOST_BYTES:
            pairs = (line.partition("=") for line in path.read_text(encoding="utf-8").splitlines())
            return [value.strip() for name, _, value in pairs if NAMES.search(name)]
    return []


def _google_keys(environ: Mapping[str, str]) -> list[str]:
    path = Path(environ.get("GOOGLE_APPLICATION_CREDENTIALS") or "/nonexistent")
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if path.is_file() and path.stat().st_size <= MOST_BYTES:
            content = json.loads(path.read_text(encoding="utf-8"))
            return [v for name, v in content.items() if NAMES.search(name) and isinstance(v, str)]
    return []


def _netrc_passwords(path: Path) -> list[str]:
    if not os.access(path, os.R_OK):
        return []
    import netrc

    try:
        known = netrc.netrc(str(path))
    except (netrc.NetrcParseError, OSError, ValueError):
        return []
    return [password for _, _, password in known.hosts.values() if password]
