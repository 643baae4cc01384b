"""Seeds: the noise of every stage of a run, each its own, so that nothing is chosen and judged on the same pictures."""

from __future__ import annotations

from enum import IntEnum


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


def stage_seed(seed: int, stage: Stage) -> int:
    """The seed of a stage's noise: no two pairs of a run's seed (0 or more, below 2**59) and a stage share it."""
    return STAGES * seed + stage
