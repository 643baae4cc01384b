"""The additive toy of the DDSM spec: an error model whose best plan is known."""

from __future__ import annotations

import numpy as np

from halfstep.search.space import Space

WIDTH_MMACS = (6070, 3420, 1520, 382.5)
DAMAGE = np.array([0.0, 0.25, 1.0, 3.0])


def toy(steps: int) -> tuple[Space, np.ndarray]:
    """The additive damage model of the spec's section 5: costs [T, 4] that sum to FID - 10."""
    importance = np.exp(-4 * np.arange(steps) / steps)
    importance *= 6 / importance.sum()
    space = Space(("1", "0.75", "0.5", "0.25"), tuple(int(m * 2) for m in WIDTH_MMACS), (1,) * steps, 0)
    return space, np.outer(importance, DAMAGE)


def toy_score(costs: np.ndarray, genes) -> float:
    return 10 + float(costs[np.arange(len(costs)), list(genes)].sum())


def toy_scores(costs: np.ndarray):
    return lambda plans: [toy_score(costs, genes) for genes in plans]


def toy_f(costs: np.ndarray, genes) -> float:
    """DDSM's objective with w_M = 0.001 per MMAC."""
    return toy_score(costs, genes) + 0.001 * float(np.mean([WIDTH_MMACS[g] for g in genes]))


TRADE = 0.001 * WIDTH_MMACS[0]
