"""The fixtures that these tests share with other tiers."""

from support.quantized import folder  # noqa: F401
