"""The fixtures that these tests share with other tiers."""

from support.push import hub  # noqa: F401
