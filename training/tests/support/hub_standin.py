"""A small stand-in for the Hugging Face hub: what its Python clients ask for, on 127.0.0.1.

    with HubStandin() as hub:
        hub.add(Repo("owner/name", folder_bytes(folder)))
        ...  # start clients with `hub.environment`
        assert "config.json" in hub.downloads("owner/name")

It answers repository infos, file trees and files, and refuses as the hub does: 401 for what
an anonymous client may not know of, 404 for what is not there, 401 or 403 `GatedRepo` for
files behind terms. It is the clients' proxy too, one that lets nobody out: `strangers` holds
the hosts that they wanted to reach. Source: https://huggingface.co/docs/hub/api
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

from support.local_server import LocalServer

ACCOUNT = "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"
"""The only token that it knows."""
API = re.compile(
    r"/api/(?P<kind>model|dataset)s/(?P<id>[^/]+(?:/[^/]+)??)"
    r"(?:/(?P<verb>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.*))?)?"
)
FILE = re.compile(
    r"/(?P<kind>datasets/)?(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)


@dataclass(frozen=True)
class Repo:
    """A repository with one commit. A private one is seen by `ACCOUNT` alone, a gated one's
    files by nobody."""

    id: str
    files: dict[str, bytes]
    kind: Literal["model", "dataset"] = "model"
    is_gated: bool = False
    is_private: bool = False

    @property
    def commit(self) -> str:
        """Return the id of its commit, which depends on all it holds."""
        content = repr((self.id, sorted(self.files.items()))).encode()
        return hashlib.sha1(content, usedforsecurity=False).hexdigest()

    def info(self) -> dict[str, object]:
        """Return what the hub tells of a repository."""
        return {
            "id": self.id,
            "modelId": self.id,
            "sha": self.commit,
            "private": self.is_private,
            "gated": "manual" if self.is_gated else False,
            "disabled": False,
            "tags": [],
            "siblings": [{"rfilename": name} for name in self.files],
        }

    def entries(self, under: str = "") -> list[dict[str, object]]:
        """Return the files below a folder, or the one of that name."""
        return [
            {"type": "file", "path": name, "size": len(content), "oid": etag_of(content)}
            for name, content in sorted(self.files.items())
            if not under or name == under or name.startswith(f"{under}/")
        ]


@dataclass(frozen=True)
class Request:
    """One request as it arrived."""

    method: str
    path: str
    token: str


@dataclass
class HubStandin(LocalServer):
    """The running server, its repositories, and the log of what was asked."""

    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that turn clients to this hub, and to nothing else."""
        proxies = dict.fromkeys(("http_proxy", "https_proxy"), self.url)
        return {"HF_ENDPOINT": self.url, "no_proxy": "127.0.0.1"} | proxies

    def add(self, repo: Repo) -> Repo:
        """Publish a repository."""
        self.repos[repo.kind, repo.id] = repo
        return repo

    def downloads(self, id: str) -> list[str]:
        """Return the files of a repository whose content was asked for."""
        matches = (FILE.fullmatch(one.path) for one in self.requests if one.method == "GET")
        return [match["path"] for match in matches if match and match["id"] == id]


class _Handler(BaseHTTPRequestHandler):
    standin: HubStandin
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_CONNECT(self) -> None:
        self.standin.strangers.append(self.path)
        self._send(403, b"")

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._form = parse_qs(self.rfile.read(length).decode())
        path = unquote(urlsplit(self.path).path)
        self._token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.standin.requests.append(Request(self.command, path, self._token))
        # The hub's own viewer, which datasets asks for ready-made parquet files: there are none.
        if not self.path.startswith(("/", self.standin.url.replace("//", "//datasets-server."))):
            self.standin.strangers.append(self.path)
        if self._token not in ("", ACCOUNT):
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif match := API.fullmatch(path):
            self._answer_api(match)
        elif match := FILE.fullmatch(path):
            self._answer_file(match)
        else:
            self._send(404, b"{}")

    def _answer_api(self, match: re.Match[str]) -> None:
        repo = self._visible(match["kind"], match["id"], match["revision"])
        if repo is None:
            return
        if match["verb"] == "tree":
            answer: object = repo.entries(match["path"] or "")
        elif match["verb"] == "paths-info":
            answer = [entry for name in self._form["paths"] for entry in repo.entries(name)]
        else:
            answer = repo.info()
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, match: re.Match[str]) -> None:
        kind = "dataset" if match["kind"] else "model"
        repo = self._visible(kind, match["id"], match["revision"])
        if repo is None:
            return
        commit = {"X-Repo-Commit": repo.commit}
        if repo.is_gated:
            self._refuse(403 if self._token else 401, "GatedRepo", "Access is restricted", commit)
        elif match["path"] not in repo.files:
            self._refuse(404, "EntryNotFound", "Entry not found", commit)
        else:
            content = repo.files[match["path"]]
            sizes = {"ETag": f'"{etag_of(content)}"', "X-Linked-Size": str(len(content))}
            self._send(200, content, commit | sizes)

    def _visible(self, kind: str, id: str, revision: str | None) -> Repo | None:
        """Return the repository, or refuse and return None."""
        repo = self.standin.repos.get((kind, id))
        if repo is None or (repo.is_private and not self._token):
            self._refuse(404 if self._token else 401, "RepoNotFound", "Repository not found")
            return None
        if revision not in (None, "main", repo.commit):
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
            return None
        return repo

    def _refuse(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        why = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, b"{}", why | (headers or {}))

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


HubStandin.handler = _Handler


def etag_of(content: bytes) -> str:
    """Return what the hub names a file's content by."""
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder as a repository holds them."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
