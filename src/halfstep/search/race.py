"""Race: candidates measured on more and more images of common noise; who has lost stops.

Sources: successive halving (Jamieson and Talwalkar, arXiv 1502.07943); a loser is told by a paired interval, as in
Hoeffding races (Maron and Moore, 1994).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Losses = Callable[[Sequence[int], int, int], Sequence[np.ndarray]]
"""The losses [last - first] of images first … last - 1 for each of some candidates, lower is better; image k of every
candidate comes from one noise."""


def race(candidates: Sequence[int], losses: Losses, rounds: Sequence[int], keep: Sequence[int]) -> list[int]:
    """The candidates that are left after all rounds, the best first.

    rounds: images of each candidate after each round, rising; those of earlier rounds are not drawn again.  keep: how
    many go on after each round at most. Besides, whoever's paired 95 % interval against the leader lies above zero
    stops. Raises ValueError for rounds that do not rise or are not as many as `keep`.
    """
    if len(rounds) != len(keep) or list(rounds) != sorted(set(rounds)):
        raise ValueError(f"rounds {rounds} with {keep} to keep")
    alive, done = list(candidates), 0
    known: dict[int, list[np.ndarray]] = {one: [] for one in alive}
    for images, most in zip(rounds, keep, strict=True):
        for one, found in zip(alive, losses(alive, done, images), strict=True):
            known[one].append(np.asarray(found, dtype=np.float64))
        done = images
        every = {one: np.concatenate(known[one]) for one in alive}
        alive.sort(key=lambda one: float(every[one].mean()))
        leader = every[alive[0]]
        alive = [one for one in alive if not parted(every[one] - leader)][:most]
    return alive


def parted(more: np.ndarray) -> bool:
    """Whether paired differences [n] are above zero by their 95 % interval; of one image nothing is told."""
    if len(more) < 2:
        return False
    return float(more.mean()) > 1.96 * float(more.std(ddof=1)) / math.sqrt(len(more))
