"""Which keys each section has. Imports no torch."""

from __future__ import annotations

from .schema import Config, Section


def section_names() -> tuple[str, ...]:
    """Return the names of the sections, in schema order."""
    return tuple(Config.model_fields)


def sections() -> dict[str, type[Section]]:
    """Return each section's class by its name."""
    kinds: dict[str, type[Section]] = {}
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, Section)
        kinds[name] = field.annotation
    return kinds


def leaf_sections() -> dict[str, str]:
    """Return leaf key -> its section; a test ensures that leaf names are unique."""
    return {leaf: name for name, kind in sections().items() for leaf in kind.model_fields}
