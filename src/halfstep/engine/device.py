"""Where to run: the device of accelerate's choice, or one by name."""

from __future__ import annotations

import torch

from halfstep.core.errors import ModelError
from halfstep.core.machine import this_process


def default_device() -> torch.device:
    """The device that accelerate takes here: a GPU where there is one."""
    return this_process().device


def device_named(name: str) -> torch.device:
    """The device of this machine that torch calls so, e.g. "cuda:1". Raises ModelError."""
    try:
        found = torch.zeros(1, device=name)
        found.item()  # of "meta", which holds no numbers, there is none
        return found.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            got=f"{name!r}",
            expected="a device of this machine, such as cpu",
            where="--device",
            do=f"leave it out to run on {default_device()}",
        ) from error


def use_device(name: str) -> None:
    """Run everything from here on where torch names it, e.g. "cuda:1". Raises ModelError (see `device_named`)."""
    place, here = device_named(name), this_process()
    if here.num_processes > 1:
        raise ModelError(
            got=f"{name!r} for {here.num_processes} processes",
            expected="a device for each",
            where="--device",
            do="leave it out: the launcher places them",
        )
    here.device = place
    if place.type == "cuda":
        torch.cuda.set_device(place)
