"""What test_push.py shares with other tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import requests

from support.upload_standin import UploadStandin

TOKEN = "hf_" + "w" * 34


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadStandin]:
    """Return a hub that huggingface_hub, already imported or not, talks to."""
    with UploadStandin(TOKEN) as standin:
        import huggingface_hub.constants
        import huggingface_hub.hf_api

        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", standin.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN_FILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with online_sessions():
            yield standin


@contextlib.contextmanager
def online_sessions() -> Iterator[None]:
    """Let huggingface_hub connect, and close its connections.

    Version 0.x keeps one for each thread, and decides only once whether it is offline.
    """
    import huggingface_hub
    from huggingface_hub.utils import _http

    if not hasattr(huggingface_hub, "configure_http_backend"):
        yield
        _http.close_session()
        return
    with contextlib.ExitStack() as sessions:
        # Whoever drops a session's last reference leaves its sockets open.
        huggingface_hub.configure_http_backend(lambda: sessions.enter_context(requests.Session()))
        yield
    huggingface_hub.configure_http_backend()
