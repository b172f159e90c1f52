"""List the arguments of other trainers, with their defaults, from their installed source.

    pip install --no-deps --target FOLDER axolotl llamafactory trl transformers
    python list_arguments.py FOLDER > arguments.json

Nothing is imported, so none of their requirements is needed. A default that is computed is null.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

FILES = {
    "transformers": ["transformers/training_args.py"],
    "trl": [
        "trl/trainer/base_config.py", "trl/trainer/sft_config.py", "trl/trainer/model_config.py",
        "trl/scripts/utils.py",
    ],
    "llamafactory": [f"llamafactory/hparams/{name}_args.py" for name in
                     ("data", "finetuning", "generating", "model", "training")],
    "axolotl": [f"axolotl/utils/schemas/{name}.py" for name in
                ("config", "deprecated", "integrations", "model", "multimodal", "peft", "training")]
    + ["axolotl/integrations/liger/args.py", "axolotl/integrations/cut_cross_entropy/args.py"],
}  # fmt: skip
# Classes of values within an argument.
NESTED = {
    "EBFTConfig", "AxolotlConfigWCapabilities", "SpecialTokensConfig", "RoleBoundarySpec",
    "LoftQConfig", "PeftConfig", "LrGroup", "SelectiveCheckpointingConfig", "DatasetConfig",
}  # fmt: skip


def default_of(value: ast.expr | None) -> Any:
    """Return a field's default; None where it is computed or there is none."""
    if isinstance(value, ast.Call):
        values = [k.value for k in value.keywords if k.arg == "default"] or value.args[:1]
        return default_of(values[0]) if values else None
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None


def is_argument(field: ast.stmt) -> bool:
    """Tell a field that is an argument from one that is computed or belongs to the class."""
    return (
        isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and not field.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(field.annotation)
        and "init=False" not in (ast.unparse(field.value) if field.value else "")
    )


def arguments_of(path: Path) -> dict[str, Any]:
    """Return the fields of the classes in a file."""
    classes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)]
    return {
        field.target.id: default_of(field.value)
        for one in classes
        if one.name not in NESTED
        for field in one.body
        if is_argument(field)
    }


def main(folder: Path) -> None:
    """Print the table."""
    table = {}
    for name, files in FILES.items():
        version = next(folder.glob(f"{name}-*.dist-info")).name.split("-")[1].removesuffix(".dist")
        arguments = {k: v for file in files for k, v in arguments_of(folder / file).items()}
        if name in ("trl", "llamafactory"):  # both extend those of transformers
            own = next(iter(table.values()))
            arguments = {k: v for k, v in arguments.items() if k not in own or own[k] != v}
        table[f"{name} {version}"] = dict(sorted(arguments.items()))
    print("{")
    for number, (name, arguments) in enumerate(table.items()):
        lines = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in arguments.items())
        print(f"  {json.dumps(name)}: {{\n{lines}\n  }}{',' if number < len(table) - 1 else ''}")
    print("}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
