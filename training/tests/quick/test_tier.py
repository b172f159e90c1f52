"""The tier is quick: collecting it imports no torch."""

from __future__ import annotations

import importlib.metadata

import pytest

MAJOR = int(importlib.metadata.version("transformers").split(".")[0])


@pytest.mark.skipif(MAJOR < 5, reason="transformers 4 imports torch with its chat templates")
def test_collecting_this_tier_imports_no_torch(is_alone: bool, is_torch_collected: bool) -> None:
    if not is_alone:
        pytest.skip("other tiers are collected as well")
    assert not is_torch_collected
