"""The JSON Schema of a config file, for editors."""

from __future__ import annotations

from typing import Any

from .aliases import ALIASES, COMMA_LISTS, CONVERTED_ALIASES
from .schema import Config
from .sections import sections


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a config file, flat and sectioned keys both accepted."""
    schema = Config.model_json_schema()
    leaves: dict[str, Any] = {}
    for name, kind in sections().items():
        properties = schema["$defs"][kind.__name__]["properties"]
        for leaf in COMMA_LISTS & properties.keys():
            kept = {"description": properties[leaf].pop("description")}
            properties[leaf] = kept | {"anyOf": [properties[leaf], {"type": "string"}]}
        leaves |= {leaf: dict(spec) for leaf, spec in properties.items()}
        schema["properties"][name].pop("default", None)
    for alias, leaf in ALIASES.items():
        own_spec = {} if alias in CONVERTED_ALIASES else leaves[leaf]
        leaves[alias] = own_spec | {"description": f"Alias of {leaf}"}
    # A word that names a section and an alias (model) may hold either.
    for name, spec in leaves.items():
        own = schema["properties"].get(name)
        schema["properties"][name] = {"anyOf": [own, spec]} if own else spec
    schema["properties"]["$schema"] = {"type": "string"}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "lora-trainer configuration"
    return schema
