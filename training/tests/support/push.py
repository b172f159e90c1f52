"""What test_push.py shares with other tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
        _forget_sessions()
        yield standin
    _forget_sessions()


def _forget_sessions() -> None:
    """Close kept connections: huggingface_hub 0.x decides only once whether one is offline."""
    from huggingface_hub.utils import _http

    forget = getattr(_http, "reset_sessions", None) or _http.close_session
    forget()
