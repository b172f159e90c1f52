"""Training instructions inside rows, and instructions that are not supported.

A turn may state whether it is supervised:

    weight           0 or 1       OpenAI, Azure, Mistral, Together
    train, training  true, false  Axolotl's message_field_training
    trainable        true, false  verl
    loss             true, false  ms-swift, XTuner
    loss_mask        0 or 1       verl; for a whole row, one for each message: LLaMA-Factory
    step_loss_mask   0 or 1       slime
    masked           true, false  torchtune: true is not supervised

Only whole assistant turns can be supervised or not: weights between 0 and 1, parts of a turn, and
turns of other roles are errors. So is any other field that looks like an instruction: ignoring it
would train on text that the row excludes.
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
"""Fields of a turn, and whether a true value of each means supervised."""

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_INSTRUCTING = re.compile(
    r"(un)?train(s|ed|ing|able)?|weights?|loss(es)?|(un)?mask(s|ed|ing)?|supervised?|"
    r"supervision|learn(ed|able)?|ignored?|skip(ped)?|exclude[ds]?|gradients?|grad"
)
_TURNS_CAN = f"turns state it with {', '.join(SWITCHES)}"
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_DESIRED = ("label", "is_desirable", "desirable", "kto_tag")
_TOKEN_MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")


class RowError(ValueError):
    """A row does not fit its format; `reason` quotes nothing from the row."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_supervised(turn: Mapping[Any, Any], field: str, *, is_assistant: bool) -> bool | None:
    """Return whether a turn is marked as supervised, or None if it is not marked.

    Raises:
        RowError: its instruction is not supported.
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
                    f"field '{field}' has {shown_name(key)}, which looks like a training "
                    "instruction but is not supported: remove it, or use weight 0 or 1"
                )
            continue
        one = _switched(value, f"{field}.{name}") == SWITCHES[name]
        if wanted is not None and one != wanted:
            raise RowError(
                f"field '{field}' is supervised according to its {by}, but not according to its "
                f"{name}"
            )
        wanted, by = one, name
    if wanted and not is_assistant:
        raise RowError(
            f"field '{field}.{by}' supervises a turn that is not the assistant's: remove it, or "
            "set train_on: all"
        )
    return wanted


def is_instruction(key: object) -> bool:
    """Return whether a turn's field is an instruction for the trainer, not for the template."""
    return isinstance(key, str) and key.lower() in SWITCHES


def masked_turns(row: Mapping[str, Any], count: int) -> frozenset[int]:
    """Return the turns excluded by a row's loss_mask, which has one entry per turn.

    Raises:
        RowError: the row has an instruction that is not supported.
    """
    mask = row.get("loss_mask")
    if mask is None:
        return frozenset()
    if not isinstance(mask, list) or len(mask) != count:
        raise RowError(f"field 'loss_mask' is not a list with one entry for each of {count} turns")
    entries = [_switched(value, f"loss_mask[{n}]") for n, value in enumerate(mask)]
    return frozenset(n for n, is_on in enumerate(entries) if not is_on)


def refuse_unsupported(row: Mapping[str, Any], has_turns: bool) -> None:
    """Reject a row that would be trained incorrectly.

    Raises:
        RowError: it has images, is marked as a bad answer, or has token masks.
    """
    for name in _MEDIA:
        if row.get(name):
            raise RowError(f"field '{name}' contains media; only text is supported")
    for name in _DESIRED:
        if row.get(name) is False:
            raise RowError(
                f"field '{name}' is false, which marks a bad answer: remove such rows, or the "
                "field if it means something else"
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


def _switched(value: object, field: str) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, float | int):
        raise RowError(
            f"field '{field}' is neither 0 nor 1: a turn is supervised completely or not at all"
        )
    raise RowError(f"field '{field}' is {type(value).__name__}, expected 0, 1, true or false")


def _can_instruct(value: Any) -> bool:
    """Return whether a value is a switch, a weight or a list of spans, not descriptive text."""
    return isinstance(value, bool | int | float | list | dict)


@lru_cache(maxsize=4096)
def _reads_like_instruction(key: str) -> bool:
    return any(_INSTRUCTING.fullmatch(word.lower()) for word in _WORDS.findall(key))
