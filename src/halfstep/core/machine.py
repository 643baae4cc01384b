"""What this machine is, for records, and which of several processes this one is."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from halfstep.core.errors import RunError
from halfstep.core.watch import SILENT

if TYPE_CHECKING:
    from accelerate import PartialState

P = ParamSpec("P")
T = TypeVar("T")


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


UNWRAPPED = {
    "ACCELERATE_USE_FSDP": ("false", "FSDP", "train.sharded shards the optimizer's moments"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "DeepSpeed", "train.sharded shards the optimizer's moments"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "Megatron-LM", "train.sharded shards the optimizer's moments"),
    "ACCELERATE_MIXED_PRECISION": ("no", "mixed precision", "say --set train.precision=bf16"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "gradient accumulation", "say --set train.accumulate=N"),
}
"""What `accelerate launch` may be told that works through models it wraps, which a training here is not; the value that
means no, its name, and what stands in its place."""


def require_plain_launch() -> None:
    """Raise RunError where this process was launched with what a training would ignore or do twice."""
    for name, (off, what, do) in UNWRAPPED.items():
        if (said := os.environ.get(name, off).lower()) != off:
            got = f"{what} of accelerate ({name}={said})"
            raise RunError(got=got, expected="a launch without it", where="training", do=f"leave it out: {do}")


def this_process() -> PartialState:
    """This process among those of one training, as accelerate was told in the environment.

    That all run on CPUs (`accelerate launch --cpu`) an `Accelerator` reads there and a bare `PartialState` does not: it
    would take every process for the only one, and the later `Accelerator` would believe it.
    """
    from accelerate import PartialState  # and with it torch
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=bool(parse_flag_from_env("ACCELERATE_USE_CPU")))


_LAUNCHED = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *(f"{mpi}_{what}" for mpi in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD") for what in ("RANK", "SIZE")),
)
"""Where a launcher tells a process which of several it is."""


def launched() -> int:
    """How many processes a launcher says that there are; 1 without one. Nobody is waited for."""
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), 1)


_DONE: list[int] = []
"""The number of this process among several whose common work is done, where it is not the first."""


def is_done() -> bool:
    """Whether this process was one of several, and the first goes on without it."""
    return bool(_DONE)


def go_on_alone() -> bool:
    """Of several processes whose common work is done the first goes on as the only one, True; the others are done."""
    one = this_process()
    if one.num_processes == 1:
        return True
    from accelerate.state import AcceleratorState

    first = one.is_main_process
    _DONE.extend([] if first else [one.process_index])
    one.wait_for_everyone()
    one.destroy_process_group()
    for name in _LAUNCHED:
        os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    return first


def apart() -> None:
    """Let each of several processes that a launcher started go on by itself, on the GPU that is its own."""
    if launched() == 1:
        return
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    for name in _LAUNCHED:
        os.environ.pop(name, None)
    one = this_process()
    if one.device.type == "cuda":
        import torch

        one.device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(one.device)


def alone(verb: Callable[P, T]) -> Callable[P, T]:
    """A verb that one process does: under a launcher of several it raises RunError."""

    @functools.wraps(verb)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        require_alone(verb.__name__)
        return verb(*args, **kwargs)

    return inner


def require_alone(what: str) -> None:
    """Raise RunError where a launcher started several processes for what one does."""
    if launched() > 1:
        raise RunError(
            got=f"a launch of {launched()} processes",
            expected="one process",
            where=what,
            do="run it without a launcher: train, compress and optimize train on several, sample and evaluate draw",
        )


def together(verb: Callable[P, T]) -> Callable[P, T]:
    """A verb that several processes do together: the first one alone tells its watch."""

    @functools.wraps(verb)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        if not this_process().is_main_process:
            kwargs["watch"] = SILENT
        return verb(*args, **kwargs)

    return inner
