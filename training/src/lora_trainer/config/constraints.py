"""What values each key accepts, as text, for error messages and the table of keys."""

from __future__ import annotations

from functools import cache
from typing import Any

from .sections import leaf_sections, sections
from .text import Pointer

Spec = dict[str, Any]
WORDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": "object",
}
# pydantic's name of an error -> the limit in a JSON Schema.
_LIMITS = {
    "less_than_equal": ("maximum", "at most"),
    "less_than": ("exclusiveMaximum", "less than"),
    "greater_than_equal": ("minimum", "at least"),
    "greater_than": ("exclusiveMinimum", "more than"),
}


@cache
def section_schema(name: str) -> Spec:
    """Return the JSON Schema of a section."""
    return sections()[name].model_json_schema()


def spec_at(leaf: str, inner: Pointer = ()) -> Spec:
    """Return the JSON Schema of a key or of part of its value; {} if unknown."""
    schema = section_schema(leaf_sections()[leaf])
    spec: Spec = schema["properties"][leaf]
    for part in inner:
        choices = [_followed(choice, schema) for choice in (spec, *spec.get("anyOf", []))]
        if isinstance(part, int):
            spec = next((choice["items"] for choice in choices if "items" in choice), {})
        else:
            owners = [c for c in choices if part in c.get("properties", {})]
            texts = [c for c in choices if isinstance(c.get("additionalProperties"), dict)]
            spec = next(
                iter([c["properties"][part] for c in owners]),
                texts[0]["additionalProperties"] if texts else {},
            )
    return spec | {"$defs": schema.get("$defs", {})}


def keys_at(leaf: str, inner: Pointer) -> list[str]:
    """Return the allowed keys of an object within a value."""
    spec = spec_at(leaf, inner)
    choices = [_followed(choice, spec) for choice in (spec, *spec.get("anyOf", []))]
    return [key for choice in choices for key in choice.get("properties", {})]


def _followed(spec: Spec, schema: Spec) -> Spec:
    reference = spec.get("$ref")
    return schema["$defs"][reference.rpartition("/")[2]] if reference else spec


def words_of(spec: Spec, root: Spec | None = None) -> str:
    """Return the type of a spec as text: `true or false, or auto`."""
    root = root or spec
    if "$ref" in spec:
        return "{" + ", ".join(_followed(spec, root)["properties"]) + "}"
    if "anyOf" in spec:
        return ", or ".join(words_of(c, root) for c in spec["anyOf"] if c.get("type") != "null")
    if "enum" in spec:
        return ", ".join(spec["enum"])
    if "const" in spec:
        return str(spec["const"])
    if spec.get("type") == "array":
        return f"list of {words_of(spec['items'], root)}"
    if "examples" in spec:
        return ", ".join(spec["examples"])
    return WORDS.get(spec.get("type", ""), "value")


def limits_of(spec: Spec) -> str:
    """Return the range or pattern of a spec; empty if it has none."""
    for choice in spec.get("anyOf", []):
        if limits := limits_of(choice):
            return limits
    bounds = [
        f"{word} {int(spec[key]) if spec[key] == int(spec[key]) else spec[key]}"
        for key, word in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "over"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "under"),
        )
        if key in spec and spec[key] < 1e9
    ]
    if "pattern" in spec and "examples" not in spec:
        bounds.append(f"matching {spec['pattern']}")
    if spec.get("minLength", 0) > 0 or spec.get("minItems", 0) > 0:
        bounds.append("not empty")
    return ", ".join(bounds)


def exceeded_limit(spec: Spec, kinds: set[str]) -> str:
    """Return the limit that a number exceeds, `at most 65535`; empty if it exceeds none.

    `kinds` are pydantic's names for what is wrong with the number.
    """
    for kind, (key, words) in _LIMITS.items():
        limits = [choice[key] for choice in (spec, *spec.get("anyOf", [])) if key in choice]
        if kind in kinds and limits:
            return f"{words} {int(limits[0]) if limits[0] == int(limits[0]) else limits[0]}"
    return ""


def choices_of(spec: Spec) -> list[str]:
    """Return the enumerated values of a spec."""
    inner = [word for choice in spec.get("anyOf", []) for word in choices_of(choice)]
    constant = [spec["const"]] if isinstance(spec.get("const"), str) else []
    return [*spec.get("enum", []), *constant, *spec.get("examples", []), *inner]


def expectation(leaf: str, inner: Pointer = ()) -> str:
    """Return the values that a key or part of it accepts: `a number, at least 0, at most 10`."""
    spec = spec_at(leaf, inner)
    limits = limits_of(spec)
    return f"it takes: {words_of(spec)}{f' ({limits})' if limits else ''}"
