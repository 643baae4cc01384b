"""NSGA-II over plans (pymoo), with DDSM's operators and initial population as options.

Source: DDSM (arXiv 2310.03337) and its released code, whose mutation never acts (see `reset_mutation`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfstep.core.recipe import SearchSpec
from halfstep.search.space import Genes, Space, cheapened

Scoring = Callable[[Sequence[Genes]], Sequence[float]]
"""The scores of several plans, lower is better."""


@dataclass(frozen=True)
class Goal:
    """What the refinement minimises.

    "budget": the score, MACs at most `macs`. "loss": the MACs, score at most `limit`. "scalar": DDSM's weighted sum
    score + trade * share.
    """

    kind: str
    macs: int = 0
    limit: float = 0.0
    trade: float = 0.0


def evolve(
    space: Space, scores: Scoring, goal: Goal, spec: SearchSpec, *, seeds: Sequence[Genes] = (), seed: int = 1
) -> Iterator[tuple[Genes, float]]:
    """NSGA-II over genes (pymoo); yields every measured plan, (genes, score), best known or not.

    `scores` is given the new plans of a generation together. `spec`: population, generations (the initial population is
    the first), crossover and mutation. `seeds` enter the initial population. Plans over the budget are never measured.
    Deterministic for a seed and a deterministic score.
    """
    problem, algorithm = _algorithm(space, goal, spec, _initial(space, goal, spec, seeds, seed))
    algorithm.setup(problem, termination=("n_gen", spec.generations), seed=seed, verbose=False)
    known: dict[Genes, float] = {}
    while algorithm.has_next():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            population = algorithm.ask()
        plans = [tuple(int(g) for g in individual.X) for individual in population]
        able = [genes for genes in plans if goal.kind != "budget" or space.cost(genes) <= goal.macs]
        fresh = [genes for genes in dict.fromkeys(able) if genes not in known]
        known |= dict(zip(fresh, scores(fresh), strict=True))
        yield from ((genes, known[genes]) for genes in fresh)
        values = [known.get(genes, 1e9) for genes in plans]
        both = list(zip(plans, values, strict=True))
        population.set("F", np.array([_objectives(space, goal, *one) for one in both]))
        if goal.kind in ("budget", "loss"):
            population.set("G", np.array([_constraint(space, goal, *one) for one in both])[:, None])
        algorithm.evaluator.n_eval += len(population)
        algorithm.tell(infills=population)


def _objectives(space: Space, goal: Goal, genes: Genes, value: float) -> list[float]:
    match goal.kind:
        case "loss":
            return [space.share(genes)]
        case "scalar":
            return [value + goal.trade * space.share(genes)]
        case _:
            return [value]


def _constraint(space: Space, goal: Goal, genes: Genes, value: float) -> float:
    if goal.kind == "loss":
        return value - goal.limit
    return (space.cost(genes) - goal.macs) / space.full_price if goal.kind == "budget" else 0.0


def _algorithm(space: Space, goal: Goal, spec: SearchSpec, initial: np.ndarray) -> tuple[Any, Any]:
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.pntx import SinglePointCrossover

    problem = Problem(
        n_var=len(space.rows),
        n_obj=1,
        n_ieq_constr=1 if goal.kind in ("budget", "loss") else 0,
        xl=0,
        xu=len(space.entries) - 1,
        vtype=int,
    )
    rate = spec.rate or 1.0 / len(space.rows)
    algorithm = NSGA2(
        pop_size=spec.population,
        sampling=initial,
        crossover=SinglePointCrossover(prob=spec.crossover),
        mutation=reset_mutation(rate, released=spec.mutation == "released"),
        eliminate_duplicates=True,
    )
    return problem, algorithm


def reset_mutation(rate: float, *, released: bool = False) -> Any:
    """Per-gene uniform reset with probability `rate`.

    The released DDSM code keeps its rate in the field `prob`, which pymoo also reads as the probability that the
    mutated copy is kept at all, so that mutation practically never acts; `released=True` does the same.
    """
    from pymoo.core.mutation import Mutation

    class Reset(Mutation):
        def __init__(self) -> None:
            super().__init__(prob=rate if released else 1.0)

        def _do(self, problem: Any, X: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
            draw = random_state or np.random.default_rng()
            hit = draw.random(X.shape) < rate
            fresh = draw.integers(problem.xl, problem.xu + 1, size=X.shape)
            return np.where(hit, fresh, X)

    return Reset()


def _initial(space: Space, goal: Goal, spec: SearchSpec, seeds: Sequence[Genes], seed: int) -> np.ndarray:
    """The first population: the seeds, or uniform plans, then random ones (within the budget where there is one)."""
    draw = np.random.default_rng(seed)
    count, entries = len(space.rows), len(space.entries)
    chosen: list[Genes] = list(dict.fromkeys(seeds))[: spec.population]
    if spec.init == "uniform":
        chosen += [(e,) * count for e in range(entries)]
    budget = goal.macs if goal.kind == "budget" else None
    tries = 0
    while len(chosen) < spec.population and tries < 1000 * spec.population:
        tries += 1
        if spec.init == "frontier" and seeds:  # neighbours of the frontier: two genes changed
            genes = list(seeds[int(draw.integers(len(seeds)))])
            for k in draw.integers(count, size=2):
                genes[k] = int(draw.integers(entries))
        else:
            genes = list(draw.integers(entries, size=count))
            if budget is not None:
                genes = cheapened(space, genes, budget, draw)
        candidate = tuple(int(g) for g in genes)
        if candidate not in chosen and (budget is None or space.cost(candidate) <= budget):
            chosen.append(candidate)
    return np.array(chosen[: spec.population], dtype=int)
