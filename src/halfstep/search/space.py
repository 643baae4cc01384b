"""Space: what a search may choose, an entry for every stretch of a plan's rows, and random choices in it.

Rows are grouped into genes, stretches of neighbouring rows that share an entry: few genes search better than many.
Source: DDSM (arXiv 2310.03337), whose own vector has a gene for every timestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfstep.core.errors import PlanError
from halfstep.core.plan import StepPlan

Genes = tuple[int, ...]
"""The entry's index of every gene."""


@dataclass(frozen=True)
class Space:
    """What a search may choose: `entries` by name, their `macs` per call, and the number of rows of each gene."""

    entries: tuple[str, ...]
    macs: tuple[int, ...]
    rows: tuple[int, ...]
    reference: int

    @classmethod
    def of(cls, plan: StepPlan, entries: Sequence[str], genes: int) -> Space:
        """Group the plan's rows into at most `genes` stretches of nearly equal length."""
        count = min(genes, len(plan.rows))
        edges = np.linspace(0, len(plan.rows), count + 1).round().astype(int)
        names = tuple(entries)
        macs = tuple(plan.prices[name].macs for name in names)
        return cls(names, macs, tuple(int(n) for n in np.diff(edges)), names.index(plan.reference))

    @property
    def gene_macs(self) -> np.ndarray:
        """MACs per image of every (gene, entry), int64 [K, E]."""
        return np.outer(self.rows, self.macs).astype(np.int64)

    @property
    def full_macs(self) -> int:
        return sum(self.rows) * self.macs[self.reference]

    def cost(self, genes: Sequence[int]) -> int:
        """MACs per image of a plan."""
        return int(self.gene_macs[np.arange(len(self.rows)), list(genes)].sum())

    def share(self, genes: Sequence[int]) -> float:
        return self.cost(genes) / self.full_macs

    def uniform_within(self, macs: int) -> list[Genes]:
        """The plans of one entry everywhere that cost at most `macs`, the dearest first."""
        plans = [(entry,) * len(self.rows) for entry in range(len(self.entries))]
        return sorted((genes for genes in plans if self.cost(genes) <= macs), key=self.cost, reverse=True)

    def expand(self, genes: Sequence[int]) -> list[str]:
        """The entry of every row."""
        return [self.entries[g] for g, n in zip(genes, self.rows, strict=True) for _ in range(n)]

    def require_budget(self, budget: float) -> int:
        """The budget in MACs. Raises PlanError outside of (0, 1] or below the cheapest plan."""
        cheapest = sum(self.rows) * min(self.macs) / self.full_macs
        if not 0 < budget <= 1:
            raise PlanError(got=budget, expected="a share of the MACs in (0, 1]", where="budget", do="write e.g. 0.5")
        if budget < cheapest - 1e-9:
            raise PlanError(
                got=budget,
                expected=f"at least {cheapest:.3f}, the cheapest entry everywhere",
                where="budget",
                do="raise the budget, add narrower widths, or let fewer steps compete: --set search.step_counts=N",
            )
        return int(budget * self.full_macs + 0.5)


def cheapened(space: Space, genes: list[int], budget: int, draw: np.random.Generator) -> list[int]:
    """Genes made cheaper in place, one of them by one notch at a time, until the plan keeps the budget."""
    order = np.argsort(space.macs, kind="stable")
    rank = {int(e): i for i, e in enumerate(order)}
    while space.cost(genes) > budget:
        able = [k for k, g in enumerate(genes) if rank[int(g)] > 0]
        if not able:
            break
        k = able[int(draw.integers(len(able)))]
        genes[k] = int(order[rank[int(genes[k])] - 1])
    return genes


def random_plans(space: Space, macs: int, count: int, seed: int, slack: float = 0.02) -> list[Genes]:
    """Different random plans of between `macs` minus a slack (share of the full MACs) and `macs`; fewer
    than `count` where there are no more."""
    draw = np.random.default_rng(seed)
    found: list[Genes] = []
    misses = 0
    while len(found) < count and misses < 2000:
        misses += 1
        genes = tuple(
            int(g) for g in cheapened(space, list(draw.integers(len(space.entries), size=len(space.rows))), macs, draw)
        )
        if macs - slack * space.full_macs <= space.cost(genes) <= macs and genes not in found:
            found.append(genes)
            misses = 0
    return found
