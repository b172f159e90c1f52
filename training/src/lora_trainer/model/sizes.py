"""The sizes of a language model, by whatever names its configuration gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers")
WIDTHS = ("hidden_size", "d_model", "n_embd", "embedding_dim")


def text_config(config: PretrainedConfig) -> Any:
    """Return the part of a configuration that is about text: the whole, for a text model."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):  # a class without it, or with several such parts
        return config


def layers(config: PretrainedConfig) -> int:
    """Return how many layers the language model has; 0 where its configuration does not say."""
    return _size(config, DEPTHS)


def width(config: PretrainedConfig) -> int:
    """Return how many numbers a hidden state has; 0 where the configuration does not say."""
    return _size(config, WIDTHS)


def positions(config: PretrainedConfig) -> int:
    """Return how many positions the language model knows; 0 where there is no limit."""
    return _size(config, ("max_position_embeddings",))


def vocabulary(config: PretrainedConfig) -> int:
    """Return how many tokens the language model knows."""
    return _size(config, ("vocab_size",))


def _size(config: PretrainedConfig, names: tuple[str, ...]) -> int:
    for each in (text_config(config), config):
        for name in names:
            value = getattr(each, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0
