"""Seeds: the noise of every stage of a run, each its own, so that nothing is chosen and judged on the same pictures."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Stage(IntEnum):
    """What pictures are drawn for. The numbers are part of every result: they never change."""

    TABLE = 1
    """The error table's trajectories."""
    SEARCH = 2
    """Candidates: of a search, of corrections, of a grid of penalties."""
    REPORT = 3
    """The final measurement, with intervals."""
    FINALS = 5
    """The candidates that were best so far, once more."""
    STEPS = 6
    """The best plans of every number of steps against each other."""


STAGES = 16
"""Stages that there is room for: a number between two seeds for each."""
MAX_SEED = 2**63 // STAGES - 1
"""The largest seed of a run: torch's generators know 63 bits, and above it two runs would share a stage's noise."""


def stage_seed(seed: int, stage: Stage) -> int:
    """The seed of a stage's noise: no two pairs of a run's seed (0 to `MAX_SEED`) and a stage share it."""
    return STAGES * seed + stage


@contextlib.contextmanager
def seeded(seed: int | None = None) -> Iterator[None]:
    """torch's global random numbers, from a seed or as they are; at the end the caller's are as they were."""
    import torch  # here: seeds are values, and reading one needs no torch

    used = torch.cuda.is_initialized()  # to ask a sleeping GPU for its state would wake it
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if used else ()):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def own_random(verb: Callable[P, T]) -> Callable[P, T]:
    """A verb that may seed torch's global random numbers: its caller's are as they were when it ends or fails."""

    @functools.wraps(verb)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        with seeded():
            return verb(*args, **kwargs)

    return inner
