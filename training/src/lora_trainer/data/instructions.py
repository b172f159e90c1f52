"""Instructions that a row gives on its own training, and those that are not understood.

A turn may say whether it is trained:

    weight           0 or 1       OpenAI, Azure, Mistral, Together
    train, training  true, false  Axolotl's message_field_training
    trainable        true, false  verl
    loss             true, false  ms-swift, XTuner
    loss_mask        0 or 1       verl; for a whole row, one for each message: LLaMA-Factory
    step_loss_mask   0 or 1       slime
    masked           true, false  torchtune: true is not trained

Only whole turns of the assistant can be trained or not: weights between 0 and 1, parts of a
turn, and turns of others are refused. So is any other field that reads like an instruction:
to ignore it would train what the row says is not to be trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from .bad_rows import shown_name

SWITCHES = {
    "weight": True,
    "train": True,
    "training": True,
    "trainable": True,
    "loss": True,
    "loss_mask": True,
    "step_loss_mask": True,
    "masked": False,
}
"""Fields of a turn, and what a true value of each says of its training."""

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_INSTRUCTING = re.compile(
    r"(un)?train(s|ed|ing|able)?|weights?|loss(es)?|(un)?mask(s|ed|ing)?|supervised?|"
    r"supervision|learn(ed|able)?|ignored?|skip(ped)?|exclude[ds]?|gradients?|grad"
)
_TURNS_CAN = f"a turn says so by {', '.join(SWITCHES)}"
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_DESIRED = ("label", "is_desirable", "desirable", "kto_tag")
_TOKEN_MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")


class RowError(ValueError):
    """A row that does not fit its format; `reason` quotes nothing of the row."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_supervised(turn: Mapping[Any, Any], field: str, *, is_assistant: bool) -> bool | None:
    """Return what a turn says of its own training, or None where it says nothing.

    Raises:
        RowError: it says so in a way that cannot be followed.
    """
    wanted: bool | None = None
    by = ""
    for key, value in turn.items():
        if value is None or not isinstance(key, str):
            continue
        name = key.lower()
        if name not in SWITCHES:
            if _reads_like_instruction(key) and _can_instruct(value):
                raise RowError(
                    f"field '{field}' has {shown_name(key)}, which reads like an instruction on "
                    f"training and is not understood: remove it, or write it as weight 0 or 1"
                )
            continue
        one = _switched(value, f"{field}.{name}") == SWITCHES[name]
        if wanted is not None and one != wanted:
            raise RowError(f"field '{field}' is to be trained by its {by}, not by its {name}")
        wanted, by = one, name
    if wanted and not is_assistant:
        raise RowError(
            f"field '{field}.{by}' asks to train a turn that is not the assistant's: "
            "remove it, or set train_on to all"
        )
    return wanted


def is_instruction(key: object) -> bool:
    """Return whether a turn's field is an instruction to the trainer, not for the template."""
    return isinstance(key, str) and key.lower() in SWITCHES


def masked_turns(row: Mapping[str, Any], count: int) -> frozenset[int]:
    """Return the turns that a row's own loss_mask, one entry for each turn, leaves out.

    Raises:
        RowError: the row gives an instruction that cannot be followed.
    """
    mask = row.get("loss_mask")
    if mask is None:
        return frozenset()
    if not isinstance(mask, list) or len(mask) != count:
        raise RowError(f"field 'loss_mask' is no list with one entry for each of {count} turns")
    entries = [_switched(value, f"loss_mask[{n}]") for n, value in enumerate(mask)]
    return frozenset(n for n, is_on in enumerate(entries) if not is_on)


def refuse_unsupported(row: Mapping[str, Any], has_turns: bool) -> None:
    """Refuse a row that would be trained as what it is not.

    Raises:
        RowError: it has images, is marked as a bad answer, or carries masks of tokens.
    """
    for name in _MEDIA:
        if row.get(name):
            raise RowError(f"field '{name}' holds media; only text is trained on")
    for name in _DESIRED:
        if row.get(name) is False:
            raise RowError(
                f"field '{name}' is false: the answer is marked as a bad one; "
                "remove such rows, or the field where it means something else"
            )
    if row.get("chat_template_kwargs"):
        raise RowError(
            "field 'chat_template_kwargs' is not supported: write its values into chat_template"
        )
    for name in _TOKEN_MASKS:
        if row.get(name) is not None and not (has_turns and name == "loss_mask"):
            raise RowError(
                f"field '{name}' masks tokens, which is not supported: remove it; {_TURNS_CAN}"
            )


def _switched(value: Any, field: str) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, float | int):
        raise RowError(f"field '{field}' is neither 0 nor 1: a turn is trained in full or not")
    raise RowError(f"field '{field}' is {type(value).__name__}, expected 0, 1, true or false")


def _can_instruct(value: Any) -> bool:
    """Tell a switch, a weight or a list of spans from text that merely describes."""
    return isinstance(value, bool | int | float | list | dict)


@lru_cache(maxsize=4096)
def _reads_like_instruction(key: str) -> bool:
    return any(_INSTRUCTING.fullmatch(word.lower()) for word in _WORDS.findall(key))
