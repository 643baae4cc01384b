"""What this machine is, for records, and which of several processes this one is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState


def machine() -> dict[str, object]:
    """What this machine is, for records: versions, processor, usable cores, torch threads, the CUDA device that is run
    on or None: to ask a GPU for its name wakes it."""
    import torch

    on_gpu = this_process().device.type == "cuda"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": importlib.metadata.version("diffusers"),
        "cpu": cpu_name(),
        "cores": usable,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if on_gpu else None,
        "platform": platform.platform(),
    }


def cpu_name() -> str:
    """The processor as its maker calls it."""
    return _cpu_line("model name") or platform.processor() or platform.machine()


def cpu_has(*features: str) -> bool:
    """Whether the processor has any of these instructions, as Linux calls them; False where that is not told."""
    return not {*features}.isdisjoint((_cpu_line("flags") or _cpu_line("Features")).split())


def _cpu_line(key: str) -> str:
    """What Linux says of the first processor under a key; "" where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    told = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in told if name.strip() == key), "")


def this_process() -> PartialState:
    """This process among those of one training, as accelerate was told in the environment.

    That all run on CPUs (`accelerate launch --cpu`) an `Accelerator` reads there and a bare `PartialState` does not: it
    would take every process for the only one, and the later `Accelerator` would believe it.
    """
    from accelerate import PartialState  # and with it torch
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=bool(parse_flag_from_env("ACCELERATE_USE_CPU")))
