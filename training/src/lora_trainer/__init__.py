"""Turn a base model, a dataset and one config file into a LoRA adapter.

    from lora_trainer import load_config, train

    config = load_config("config.json", learning_rate=1e-4)
    results = train(config)
    print(results.status, results.last_loss)

Importing this package imports nothing else: its names are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import load_config as load_config
    from .api import train as train
    from .config.settings import Settings as Settings
    from .errors import TrainerError as TrainerError
    from .run.results import RunResults as RunResults

__version__ = "0.1.0"
__all__ = ["RunResults", "Settings", "TrainerError", "load_config", "train"]
# `train` is also the folder of the worker's modules: `train/__init__.py` makes it callable.
_HOMES = {
    "RunResults": "run.results",
    "Settings": "config.settings",
    "TrainerError": "errors",
    "load_config": "api",
}


def __getattr__(name: str) -> Any:
    if name == "train":
        return import_module(".train", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
