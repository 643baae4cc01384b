"""The frontier. Oracles: brute force over all plans, a convex hull."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.core.errors import PlanError
from halfstep.search.frontier import best_within, frontier, hull
from toy import toy


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 10_000))
def test_frontier_equals_brute_force(genes, entries, seed):
    draw = np.random.default_rng(seed)
    costs, macs = draw.normal(size=(genes, entries)), draw.integers(1, 30, (genes, entries))
    best: dict[int, float] = {}
    for choice in itertools.product(range(entries), repeat=genes):
        m = int(sum(macs[k, e] for k, e in enumerate(choice)))
        best[m] = min(best.get(m, np.inf), float(sum(costs[k, e] for k, e in enumerate(choice))))
    exact, least = [], np.inf
    for m in sorted(best):
        if best[m] < least - 1e-12:
            least = best[m]
            exact.append((m, least))
    found = frontier(costs, macs)
    assert [p.price for p in found] == [m for m, _ in exact]
    assert np.allclose([p.error for p in found], [e for _, e in exact])
    for p in found:
        assert p.price == sum(macs[k, e] for k, e in enumerate(p.genes))


def test_hull_of_a_thousand_genes_is_the_lower_convex_hull_of_the_frontier():
    space, costs = toy(40)
    exact, convex = frontier(costs, space.gene_prices), hull(costs, space.gene_prices)
    at = {p.price: p.error for p in exact}
    for p in convex:
        assert space.cost(p.genes) == p.price
        assert p.error == pytest.approx(at[p.price])
    xs, ys = [p.price for p in convex], [p.error for p in convex]
    for p in exact:  # no plan lies below the hull
        assert p.error >= np.interp(p.price, xs, ys) - 1e-9
    space, costs = toy(1000)
    points = frontier(costs, space.gene_prices, most=5000)
    assert len(points) == len(hull(costs, space.gene_prices)) > 1000


def test_best_within_is_the_largest_that_fits():
    space, costs = toy(6)
    points = frontier(costs, space.gene_prices)
    for budget in range(points[0].price, space.full_price, 997):
        best = best_within(points, budget)
        assert best.price <= budget
        assert best.error == min(p.error for p in points if p.price <= budget)
    with pytest.raises(PlanError):
        best_within(points, points[0].price - 1)


def test_frontier_refuses_a_broken_table():
    for costs in (np.zeros((0, 4)), np.full((2, 2), np.nan), np.zeros((2, 3))):
        with pytest.raises(PlanError):
            frontier(costs, np.ones((2, 2), dtype=int))
