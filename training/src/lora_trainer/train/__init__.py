"""The training process: `worker.py` runs it, `session.py` creates its `TrainingSetup`, and
`loop.py` trains with `optim.py`.

`lora_trainer.train` is this folder and the function of that name: calling the module calls
`lora_trainer.api.train`: see there.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **values: Any) -> Any:
        from ..api import train

        return train(*arguments, **values)


sys.modules[__name__].__class__ = _Callable
