"""Space: what a search may choose, an entry for every stretch of a plan's rows, and random choices in it.

Rows are grouped into genes, stretches of neighbouring rows that share an entry: few genes search better than many.
Source: DDSM (arXiv 2310.03337), whose own vector has a gene for every timestep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from halfstep.core.errors import PlanError
from halfstep.core.plan import Price, StepPlan

Genes = tuple[int, ...]
"""The entry's index of every gene."""


Unit = Literal["macs", "us"]
"""What a search's prices are counted in: MACs, or microseconds."""


@dataclass(frozen=True)
class Space:
    """What a search may choose: `entries`, by the names of their calls (see `core.plan.call_of`), their `prices` per
    row and image (whole numbers: MACs, or nanoseconds), and the number of rows of each gene.

    `sources`: of an entry that reuses what another one left in the trajectory, that entry's index and how many fresh
    rows of it a gene begins with: a choice stands for the phrase (fresh, ..., reused, ...), so that nothing is carried
    from one gene to the next. None for an entry that stands alone.
    """

    entries: tuple[str, ...]
    prices: tuple[int, ...]
    rows: tuple[int, ...]
    reference: int
    sources: tuple[tuple[int, int] | None, ...] = ()

    @classmethod
    def of(
        cls,
        plan: StepPlan,
        entries: Sequence[str],
        genes: int,
        *,
        unit: Unit = "macs",
        sources: Mapping[str, tuple[str, int]] | None = None,
    ) -> Space:
        """Group the plan's rows into at most `genes` stretches of nearly equal length. `sources`: by entry, as
        `Space.sources` has them, by name. Raises PlanError for prices without a time where `unit` is "us"."""
        count = min(genes, len(plan.rows))
        edges = np.linspace(0, len(plan.rows), count + 1).round().astype(int)
        names, known = tuple(entries), sources or {}
        return cls(
            names,
            tuple(counted(plan.price_of(name), unit) for name in names),
            tuple(int(n) for n in np.diff(edges)),
            names.index(plan.reference),
            tuple((names.index(known[name][0]), known[name][1]) if name in known else None for name in names),
        )

    @property
    def gene_prices(self) -> np.ndarray:
        """The price per image of every (gene, entry), int64 [K, E]."""
        rows, prices = np.array(self.rows), np.array(self.prices, dtype=np.int64)
        found = np.outer(rows, prices)
        for e, source in enumerate(self.sources):
            if source is not None:
                fresh = np.minimum(rows, source[1])
                found[:, e] = fresh * prices[source[0]] + (rows - fresh) * prices[e]
        return found

    @property
    def full_price(self) -> int:
        return sum(self.rows) * self.prices[self.reference]

    def cost(self, genes: Sequence[int]) -> int:
        """The price per image of a plan's calls."""
        return int(self.gene_prices[np.arange(len(self.rows)), list(genes)].sum())

    def share(self, genes: Sequence[int]) -> float:
        return self.cost(genes) / self.full_price

    def uniform_within(self, macs: int) -> list[Genes]:
        """The plans of one entry everywhere that cost at most `macs`, the dearest first."""
        plans = [(entry,) * len(self.rows) for entry in self.alone]
        return sorted((genes for genes in plans if self.cost(genes) <= macs), key=self.cost, reverse=True)

    def phrase(self, entry: int, rows: int) -> list[str]:
        """What a gene of so many rows runs where it chooses `entry`."""
        source = self.sources[entry] if self.sources else None
        if source is None:
            return [self.entries[entry]] * rows
        fresh = min(rows, source[1])
        return [self.entries[source[0]]] * fresh + [self.entries[entry]] * (rows - fresh)

    def expand(self, genes: Sequence[int]) -> list[str]:
        """The entry of every row."""
        return [name for g, n in zip(genes, self.rows, strict=True) for name in self.phrase(int(g), n)]

    @property
    def alone(self) -> list[int]:
        """The entries that need no other: those that may stand in every row."""
        return [e for e in range(len(self.entries)) if not self.sources or self.sources[e] is None]

    def require_budget(self, budget: float) -> int:
        """The budget in MACs. Raises PlanError outside of (0, 1] or below the cheapest plan."""
        cheapest = sum(self.rows) * min(self.prices) / self.full_price
        if not 0 < budget <= 1:
            raise PlanError(got=budget, expected="a share of the MACs in (0, 1]", where="budget", do="write e.g. 0.5")
        if budget < cheapest - 1e-9:
            raise PlanError(
                got=budget,
                expected=f"at least {cheapest:.3f}, the cheapest entry everywhere",
                where="budget",
                do="raise the budget, add narrower widths, or take fewer steps",
            )
        return int(budget * self.full_price + 0.5)


def counted(price: Price, unit: Unit) -> int:
    """A price as a whole number: its MACs, or its nanoseconds. Raises PlanError where no time is known."""
    if unit == "macs":
        return price.macs
    if price.us is None:
        raise PlanError(got="a price without a time", expected="a measured one", where="search", do="measure it first")
    return round(1000 * price.us)


def cheapened(space: Space, genes: list[int], budget: int, draw: np.random.Generator) -> list[int]:
    """Genes made cheaper in place, one of them by one notch at a time, until the plan keeps the budget."""
    order = np.argsort(space.prices, kind="stable")
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
        if macs - slack * space.full_price <= space.cost(genes) <= macs and genes not in found:
            found.append(genes)
            misses = 0
    return found
