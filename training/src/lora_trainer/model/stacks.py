"""The installed stack (requirements/): supported GPUs, and how to install packages.

Imports no torch: its build is known by its version. What a stack serves is in `stacks.csv`, which
`lib/stack.sh` reads too: it chooses a stack before there is any Python.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import TrainerError, UnavailableError
from ..machine import Gpu, Machine

LOCKS = Path(__file__).parents[3] / "requirements"  # an image does not have them
ON_CPU = "./training/run.sh --cpu (or CUDA_VISIBLE_DEVICES= ) trains on the CPU"


@dataclass(frozen=True, slots=True)
class Stack:
    """What a build of torch needs: the first driver, and compute capabilities it has code for."""

    name: str
    driver: int
    least: tuple[int, int]
    most: tuple[int, int] | None = None

    def serves(self, gpu: Gpu) -> bool:
        """Return whether torch has code for a GPU."""
        return gpu.capability >= self.least and (self.most is None or gpu.capability <= self.most)


def _read(line: str) -> Stack:
    name, driver, least, most = line.split(",")
    return Stack(name, int(driver), _capability(least), _capability(most) if most else None)


def _capability(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


_TABLE = (Path(__file__).parent / "stacks.csv").read_text().splitlines()
CURRENT, CU121 = (_read(line) for line in _TABLE if not line.startswith("#"))


def installed() -> str:
    """Return the name of the stack whose torch is installed."""
    version = importlib.metadata.version("torch")
    if version.endswith("+cpu"):
        return "cpu"
    return CU121.name if version.startswith("2.1.") else CURRENT.name


def check_gpus(machine: Machine, stack: str) -> None:
    """Refuse to train on the CPU beside a GPU that the installed stack does not serve.

    Raises:
        UnavailableError: a visible GPU or its driver is not one of the stack's.
    """
    if not machine.has_gpu:
        return
    names = ", ".join(sorted({gpu.name for gpu in machine.gpus}))
    if stack == "cpu":
        raise _unserved(
            machine,
            f"{names}, and the installed stack is cpu",
            "its torch has no CUDA",
        )
    known = CU121 if stack == CU121.name else CURRENT
    major = machine.driver.partition(".")[0]
    if major.isdigit() and int(major) < known.driver:
        why = f"the driver is {machine.driver}, but the stack {stack} needs {known.driver} or newer"
        raise _unserved(machine, names, why)
    for gpu in machine.gpus:
        if not known.serves(gpu):
            limit = f" to {_dotted(known.most)}" if known.most else " and newer"
            why = (
                f"its compute capability is {_dotted(gpu.capability)}, but the stack {stack} "
                "supports "
                f"{_dotted(known.least)}{limit}"
            )
            raise _unserved(machine, f"GPU {gpu.index}: {gpu.name}", why)


def unusable(machine: Machine, usable: int, why: str) -> TrainerError:
    """Return the error of GPUs that the driver lists, of which torch can use fewer."""
    finds = f"{usable} of {len(machine.gpus)}" if usable else "no CUDA device"
    fewer = f"; or --nproc {usable}" if usable else ""
    return UnavailableError.of(
        "the GPU cannot be used",
        where=", ".join(gpu.name for gpu in machine.gpus),
        why=f"the driver {machine.driver} lists it, but torch finds {finds}"
        + (f": {why}" if why else ""),
        remedy=f"nvidia-smi, then restart the machine or the container; {ON_CPU}{fewer}",
    )


def unlisted(name: str) -> TrainerError:
    """Return the error of a GPU that torch can use and the driver's library does not list."""
    return UnavailableError.of(
        "NVML does not list the GPU",
        where=name,
        why="torch can use it, but NVML, which reports its memory and capability, lists no GPU",
        remedy="nvidia-smi must list it; in a container: NVIDIA_DRIVER_CAPABILITIES="
        f"compute,utility; {ON_CPU}",
    )


def _unserved(machine: Machine, where: str, why: str) -> TrainerError:
    served = next(
        (
            stack
            for stack in (CURRENT, CU121)
            if _driver_of(machine) >= stack.driver and all(map(stack.serves, machine.gpus))
        ),
        None,
    )
    others = f"LORA_STACK={served.name} ./training/run.sh uses it" if served else ""
    driver = f"update the driver to {CURRENT.driver} or newer" if not served else ""
    return UnavailableError.of(
        "the installed packages do not support this machine's GPU",
        where=where,
        why=why,
        remedy="; ".join(part for part in (others or driver, ON_CPU) if part),
    )


def _driver_of(machine: Machine) -> int:
    major = machine.driver.partition(".")[0]
    return int(major) if major.isdigit() else 0


def _dotted(capability: tuple[int, int] | None) -> str:
    return ".".join(str(part) for part in capability or ())


def install_remedy(package: str, lock: str = "") -> str:
    """Return the command that installs a package here; empty where nothing can be installed.

    `lock` names the file in requirements/ that pins it. An image is read-only.
    """
    if not LOCKS.is_dir() or not os.access(sys.prefix, os.W_OK):
        return ""
    pip = f"{sys.executable} -m pip install"
    return f"{pip} --no-deps --require-hashes -r {LOCKS / lock}" if lock else f"{pip} {package}"
