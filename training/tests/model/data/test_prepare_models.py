"""What of test_prepare.py imports torch."""

from __future__ import annotations

import pytest

from lora_trainer.data.encoder import TokenizerFactory
from lora_trainer.errors import (
    UnavailableError,
)


def test_a_tokenizer_that_is_not_there_is_explained(tmp_path):
    with pytest.raises(UnavailableError, match="tokenizer cannot be loaded"):
        TokenizerFactory(tmp_path / "nothing")()
