"""The exact frontier: every plan that is best for some budget, when errors and MACs add up over genes.

Source: the multiple-choice knapsack by dynamic programming over undominated states (Kellerer, Pferschy and Pisinger,
Knapsack Problems, 2004, chapter 11), and its Lagrangian hull where there are too many of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfstep.core.errors import PlanError
from halfstep.search.space import Genes


@dataclass(frozen=True)
class Point:
    """A plan on the frontier: its price per image, its modelled error, its genes."""

    price: int
    error: float
    genes: Genes


def frontier(costs: np.ndarray, macs: np.ndarray, most: int = 100_000) -> list[Point]:
    """Every plan that is best for some budget when errors add up, cheapest first.

    costs, macs: [K, E], the error and the MACs of entry e in gene k. Dynamic programming over undominated partial
    plans: exact, equal to trying all E^K plans. Where more than `most` of them stay undominated (hundreds of genes),
    the Lagrangian hull is returned instead: its points are exact, between them lies at most one gene's upgrade.
    Raises PlanError for an empty or mismatched table.
    """
    costs, macs = np.asarray(costs, dtype=np.float64), np.asarray(macs, dtype=np.int64)
    if costs.shape != macs.shape or costs.ndim != 2 or 0 in costs.shape or not np.isfinite(costs).all():
        raise PlanError(
            got=f"tables of shape {costs.shape} and {macs.shape}",
            expected="finite [genes, entries]",
            where="frontier",
            do="measure the error table again",
        )
    total_macs, total_error = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []  # per gene: (parent state, chosen entry) of every kept state
    entries = costs.shape[1]
    for k in range(len(costs)):
        new_macs = (total_macs[:, None] + macs[k]).ravel()
        new_error = (total_error[:, None] + costs[k]).ravel()
        kept = _undominated(new_macs, new_error)
        if len(kept) > most:
            return hull(costs, macs)
        total_macs, total_error = new_macs[kept], new_error[kept]
        trail.append((kept // entries, kept % entries))
    return [Point(int(total_macs[i]), float(total_error[i]), _walk_back(trail, i)) for i in range(len(total_macs))]


def hull(costs: np.ndarray, macs: np.ndarray) -> list[Point]:
    """The frontier's lower convex hull: start from the cheapest plan, apply upgrades by error saved per MAC."""
    genes, upgrades = [], []
    for k in range(len(costs)):
        kept = _undominated(macs[k], costs[k])
        corners = [int(kept[0])]
        for e in map(int, kept[1:]):
            while len(corners) > 1 and _saving(costs, macs, k, corners[-2], e) >= _saving(
                costs, macs, k, corners[-2], corners[-1]
            ):
                corners.pop()
            corners.append(e)
        genes.append(corners[0])
        upgrades += [(_saving(costs, macs, k, a, b), k, a, b) for a, b in itertools.pairwise(corners)]
    rows = np.arange(len(costs))
    total_macs, total_error = int(macs[rows, genes].sum()), float(costs[rows, genes].sum())
    points = [Point(total_macs, total_error, tuple(genes))]
    for _, k, a, b in sorted(upgrades, key=lambda u: -u[0]):
        genes[k] = b
        total_macs, total_error = (
            total_macs + int(macs[k, b] - macs[k, a]),
            total_error + float(costs[k, b] - costs[k, a]),
        )
        points.append(Point(total_macs, total_error, tuple(genes)))
    return points


def _saving(costs: np.ndarray, macs: np.ndarray, k: int, a: int, b: int) -> float:
    """Error saved per MAC when gene k goes from entry a to entry b."""
    return float((costs[k, a] - costs[k, b]) / (macs[k, b] - macs[k, a]))


def _undominated(macs: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Indices of the points that no cheaper or equal one beats, by rising MACs."""
    order = np.lexsort((error, macs))
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(error[order])[:-1]])
    return order[error[order] < best_before]


def _walk_back(trail: list[tuple[np.ndarray, np.ndarray]], state: int) -> Genes:
    genes = []
    for parents, entries in reversed(trail):
        genes.append(int(entries[state]))
        state = int(parents[state])
    return tuple(reversed(genes))


def best_within(points: Sequence[Point], price: int) -> Point:
    """The frontier's plan with the least error among those of at most `price`. Raises PlanError when there is none."""
    fitting = [p for p in points if p.price <= price]
    if not fitting:
        raise PlanError(
            got=f"a price of {price}", expected=f"at least {points[0].price}", where="budget", do="raise the budget"
        )
    return fitting[-1]
