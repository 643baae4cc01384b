"""NSGA-II, checks 14 to 21 of the DDSM spec. Oracles: its additive toy, pymoo's own counts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from halfstep.core.recipe import SearchSpec
from halfstep.search.evolve import Goal, evolve, reset_mutation
from halfstep.search.frontier import best_within, frontier
from halfstep.search.space import random_plans
from toy import TRADE, toy, toy_f, toy_score, toy_scores

PAPER = SearchSpec(population=50, generations=10, objective="scalar", init="uniform")


def run_toy(steps: int, spec: SearchSpec, seed: int = 1):
    space, costs = toy(steps)
    goal = Goal("scalar", trade=TRADE)
    return costs, list(evolve(space, toy_scores(costs), goal, spec, seed=seed))


def test_genes_stay_in_range_and_a_seed_gives_the_same_search():
    _, first = run_toy(50, PAPER)
    _, again = run_toy(50, PAPER)
    assert first == again
    assert all(0 <= g <= 3 for genes, _ in first for g in genes)
    assert len(first) <= 500


def test_search_beats_every_uniform_plan_and_comes_near_the_optimum():
    costs, found = run_toy(50, PAPER)
    best_genes = min((g for g, _ in found), key=lambda g: toy_f(costs, g))
    best = toy_f(costs, best_genes)
    uniform = min(toy_f(costs, (e,) * 50) for e in range(4))
    assert uniform == pytest.approx(14.92, abs=0.005)
    space, _ = toy(50)
    optimum = min(10 + p.error + 0.001 * p.price / 2 / 50 for p in frontier(costs, space.gene_prices))
    assert best < uniform
    assert best - optimum <= 0.45
    draw = np.random.default_rng(0)
    reorderings = [toy_f(costs, draw.permutation(best_genes)) for _ in range(500)]
    assert best < min(reorderings)


def test_uniform_plans_are_in_the_first_population():
    _, found = run_toy(50, PAPER)
    first = [genes for genes, _ in found[:50]]
    for e in range(4):
        assert (e,) * 50 in first


def test_random_initialisation_alone_is_worse_than_the_best_uniform_plan_at_a_thousand_genes():
    costs, found = run_toy(1000, dataclasses.replace(PAPER, init="random"))
    assert min(toy_f(costs, g) for g, _ in found) > min(toy_f(costs, (e,) * 1000) for e in range(4))


@pytest.mark.parametrize(("released", "least", "most"), [(False, 0.85, 1.15), (True, 0.0, 0.1)])
def test_mutation_changes_one_gene_per_child_as_intended_and_none_as_released(released, least, most):
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem

    genes, count, rate = 400, 2000, 1 / 400
    problem = Problem(n_var=genes, n_obj=1, xl=0, xu=3, vtype=int)
    before = np.random.default_rng(0).integers(0, 4, (count, genes))
    operator = reset_mutation(rate, released=released)
    after = operator(problem, Population.new("X", before.copy()), random_state=np.random.default_rng(1)).get("X")
    # a reset draws the old value again in a quarter of the cases
    assert least * 0.75 <= (before != after).sum(axis=1).mean() <= most * 0.75 + 0.02


def test_extreme_prices_give_the_full_net_and_the_narrowest():
    space, costs = toy(10)
    for trade, entry in ((1e-6, 0), (1e6, 3)):
        steps = evolve(space, toy_scores(costs), Goal("scalar", trade=trade), PAPER)
        best = min(steps, key=lambda r: r[1] + trade * space.share(r[0]))[0]
        assert best == (entry,) * 10


def test_budget_search_never_measures_a_plan_over_the_budget_and_starts_from_the_seeds():
    space, costs = toy(20)
    macs = int(0.5 * space.full_price)
    seeds = [best_within(frontier(costs, space.gene_prices), macs).genes]
    spec = SearchSpec(population=8, generations=5)
    found = list(evolve(space, toy_scores(costs), Goal("budget", macs=macs), spec, seeds=seeds))
    assert found[0][0] == seeds[0]
    assert all(space.cost(g) <= macs for g, _ in found)
    assert min(s for _, s in found) <= toy_score(costs, seeds[0])


def test_the_goal_of_a_loss_finds_cheap_plans():
    space, costs = toy(10)
    limit = toy_score(costs, (0,) * 10) + 0.5
    spec = SearchSpec(population=20, generations=15, init="uniform")
    found = list(evolve(space, toy_scores(costs), Goal("loss", limit=limit), spec))
    assert min(space.share(g) for g, s in found if s <= limit) < 0.9


def test_random_plans_keep_the_budget_and_differ():
    space, _ = toy(12)
    macs = int(0.45 * space.full_price)
    plans = random_plans(space, macs, 10, seed=0)
    assert len(set(plans)) == 10
    for genes in plans:
        assert macs - 0.02 * space.full_price <= space.cost(genes) <= macs


def test_released_ddsm_statistics_are_reproduced():
    counts = {6070: 274, 3420: 181, 1520: 534, 382.5: 11}
    mean = sum(m * n for m, n in counts.items()) / 1000
    assert mean == pytest.approx(3098.0875)
    assert 1 - mean / 6070 == pytest.approx(0.4896, abs=5e-5)
    for full, slim, saving in ((12.14, 6.20, 0.489), (49.88, 19.58, 0.607), (82.06, 19.40, 0.764)):
        assert 1 - slim / full == pytest.approx(saving, abs=6e-4)


def test_the_new_plans_of_a_generation_are_measured_together():
    space, costs = toy(10)
    spec, asked = SearchSpec(population=12, generations=4, init="uniform"), []

    def scores(plans):
        asked.append(list(plans))
        return toy_scores(costs)(plans)

    found = list(evolve(space, scores, Goal("scalar", trade=TRADE), spec))
    assert len(asked) == 4 and len(asked[0]) == 12
    assert [genes for genes, _ in found] == [genes for plans in asked for genes in plans]
    assert len({genes for genes, _ in found}) == len(found)
