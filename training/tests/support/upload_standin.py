"""A stand-in for the part of the Hugging Face hub that takes uploads, on 127.0.0.1.

It asks for every file within the commit itself, which the hub does for small ones. Source:
https://huggingface.co/docs/hub/api
"""

from __future__ import annotations

import base64
import json
from http.server import BaseHTTPRequestHandler
from typing import Any

from support.local_server import LocalServer


class UploadStandin(LocalServer):
    """The running server, the repositories that were made, and their files."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.private: dict[str, bool] = {}  # by repository
        self.files: dict[str, dict[str, bytes]] = {}


class _Handler(BaseHTTPRequestHandler):
    standin: UploadStandin
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {self.standin.token}":
            self._send(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in asked
            ]
            self._send(200, {"files": modes})
        elif path.endswith("/commit/main"):
            self._commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        elif path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/").removesuffix("/revision/main")
            facts = {"id": repo, "private": self.standin.private[repo], "siblings": []}
            self._send(200, facts | {"sha": "0" * 40, "downloads": 0, "likes": 0, "tags": []})
        else:
            self._send(200, {})

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        status = 409 if repo in self.standin.private else 200
        is_private = wanted.get("private", wanted.get("visibility") == "private")
        self.standin.private.setdefault(repo, bool(is_private))
        self._send(status, {"url": f"{self.standin.url}/{repo}"})

    def _commit(self, repo: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.standin.files.setdefault(repo, {})[entry["value"]["path"]] = content
        url = f"{self.standin.url}/{repo}/commit/{'0' * 40}"
        self._send(200, {"success": True, "commitUrl": url, "commitOid": "0" * 40})

    def _send(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


UploadStandin.handler = _Handler
