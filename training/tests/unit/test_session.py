"""What a session is made of."""

from __future__ import annotations

from pathlib import Path

from faults.tiny_model import TEMPLATE, write_model, write_rows
from lora_trainer.session import open_session
from lora_trainer.sources import resolve


def test_exported_tokenizer_asks_as_the_given_template_trained(tmp_path: Path) -> None:
    given = TEMPLATE + "{# given in the config #}"
    settings = resolve(
        None,
        {},
        [
            f"--model_name_or_path={write_model(tmp_path / 'model')}",
            f"--dataset={write_rows(tmp_path / 'rows.jsonl', 0, 4)}",
            f"--dataset_cache_dir={tmp_path / 'cache'}",
            f"--chat_template={given}",
            "--preprocessing_num_workers=1",
        ],
    )
    session = open_session(settings.config, tmp_path / "out", lambda _: None)
    assert session.tokenizer.chat_template == given
