"""What test_prepare.py shares with other tests."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from lora_trainer.data.examples import Chat, Completion, Encoded
from lora_trainer.data.instructions import RowError
from lora_trainer.data.prepare import PrepareSettings, prepare
from lora_trainer.data.resolve import SourceSpec
from lora_trainer.errors import (
    ConfigError,
)

SECRET = "moonsecret"
END = 1


class WordEncoder:
    """Makes a token of each word: its length; trains the answers and an end token."""

    def encode(self, example):
        if isinstance(example, Chat):
            texts = [(turn["content"], turn["role"] == "assistant") for turn in example.messages]
        elif isinstance(example, Completion):
            texts = [(example.prompt, False), (example.completion, True)]
        else:
            texts = [(example.text, True)]
        words = [(word, trained) for text, trained in texts for word in text.split()]
        if "refused" in dict(words):
            raise RowError("the template rejects the conversation")
        if "config" in dict(words):
            raise ConfigError.of("no chat template")
        if "crash" in dict(words):
            raise KeyError(SECRET)
        if "killed" in dict(words):
            os.kill(os.getpid(), 9)
        for once in (word for word, _ in words if word.startswith("once=")):
            if not Path(once[5:]).exists():
                Path(once[5:]).touch()
                os.kill(os.getpid(), 9)
        trained = [t and word != "mute" for word, t in words]
        return Encoded([len(word) for word, _ in words] + [END], [*trained, any(trained)])

    def flaws(self, example, encoded):
        return () if any(encoded.loss_mask) else ("no token is supervised",)


@dataclass(frozen=True)
class WordFactory:
    digest: str = "words"

    def __call__(self):
        return WordEncoder()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceSpec(str(path))


def texts(*values):
    return [{"text": value} for value in values]


def pairs(count):
    return [{"prompt": f"row {n}", "completion": "yes " * (n % 7 + 1)} for n in range(count)]


def run(specs, cache_dir, *, workers=1, encoder=None, progress=None, **changes):
    options = {
        "max_seq_length": 100,
        "too_long": "truncate",
        "on_bad_rows": "error",
        "max_bad_rows_share": 0.5,
        **changes,
    }
    return prepare(
        specs if isinstance(specs, list) else [specs],
        encoder=encoder or WordFactory(),
        settings=PrepareSettings(**options),
        vocab_size=50_000,
        cache_dir=cache_dir / "cache",
        num_workers=workers,
        progress=progress,
    )


def save_tokenizer(folder):
    words = {word: number for number, word in enumerate(["<s>", "</s>", "?", "hi", "user", "x"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant {% endif %}"
    )
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder
