"""Check this package on your GPU in eight minutes: one command, one page.

    python bench/gpu.py [--quick] [--out DIR] [--only NAME]

It needs torch 2.11 or later, transformers, PEFT and what the package imports; bitsandbytes and
flash-attn are used if installed. It downloads nothing: the models, shaped like
SmolLM2-135M and Llama 3.1 8B, have random weights. An 80 GB GPU runs every check; nothing else
should run on it at the same time. Each result is written to DIR at once, and DIR/page.md exists
even if the check is killed. The criteria are in gpu_check/criteria.py.

Exit codes: 0 every criterion is met, 1 one is not, 69 no GPU can be used, 143 stopped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType

TRAINING = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TRAINING / "src"), str(TRAINING / "bench")]

from gpu_check.page import PAGE, outcomes, page, read_results  # noqa: E402
from gpu_check.scale import FULL, QUICK  # noqa: E402
from gpu_check.sections import SECTIONS, preload, run_section  # noqa: E402

from lora_trainer.host.environment import CUDA_ENVIRONMENT, QUIET  # noqa: E402
from lora_trainer.machine import read_machine  # noqa: E402

UNAVAILABLE, STOPPED = 69, 143
OLDEST_TORCH = (2, 11)
ENVIRONMENT = QUIET | CUDA_ENVIRONMENT | {"HF_HUB_OFFLINE": "1"}


def main() -> int:
    """Run the sections; return the exit code."""
    given = _arguments()
    scale = QUICK if given.quick else FULL
    if scale.has_gpu and not read_machine().has_gpu:
        print("NVML lists no GPU. --quick runs the check on the CPU.", file=sys.stderr)
        return UNAVAILABLE
    torch = importlib.metadata.version("torch")
    if tuple(int(part) for part in torch.split(".")[:2]) < OLDEST_TORCH:
        print(f"torch 2.11 or later is required, {torch} is installed.", file=sys.stderr)
        return UNAVAILABLE
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not scale.has_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    names = given.only or list(SECTIONS)
    folder: Path = given.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.json").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, _stop)
    start = time.monotonic()
    try:
        if not scale.has_gpu:
            preload()
        for name in names:
            print(f"{name} (at most {SECTIONS[name].limit} s) ...", end=" ", flush=True)
            print(run_section(name, folder, scale), flush=True)
            _write_page(folder, names, start)
    finally:
        print("\n" + _write_page(folder, names, start))
    return 1 if outcomes(read_results(folder, names))["fail"] else 0


def _write_page(folder: Path, names: list[str], start: float) -> str:
    command = shlex.join(["python", "bench/gpu.py", *sys.argv[1:]])
    text = page(read_results(folder, names), command=command, seconds=time.monotonic() - start)
    (folder / PAGE).write_text(text)
    return text


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(STOPPED)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the results")
    parser.add_argument(
        "--only", action="append", choices=list(SECTIONS), help="one section; may be repeated"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
