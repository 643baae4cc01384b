"""Where to run: the device of accelerate's choice, or one by name."""

from __future__ import annotations

import torch
from accelerate import PartialState

from halfstep.errors import ModelError


def default_device() -> torch.device:
    """The device that accelerate takes here: a GPU where there is one."""
    return PartialState().device


def device_named(name: str) -> torch.device:
    """The device of this machine that torch calls so, e.g. "cuda:1". Raises ModelError."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            got=f"{name!r}",
            expected="a device of this machine, such as cpu",
            where="--device",
            do=f"leave it out to run on {default_device()}",
        ) from error
