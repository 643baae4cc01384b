"""The search under one sampler, as DDSM poses it: error table, frontier, fitted error model, NSGA-II; resumable.

Sampler, steps and spacing are searched too in `joint.py`, which the verbs run; this is its control, and the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from halfstep.core import disk
from halfstep.core.errors import PlanError, RunError
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import Recipe, SearchSpec
from halfstep.core.seeds import Stage, stage_seed
from halfstep.core.watch import SILENT, Watch
from halfstep.measure.judge import Judge
from halfstep.search.damage import ErrorTable, error_table
from halfstep.search.evolve import Goal, evolve
from halfstep.search.frontier import Point, best_within, frontier
from halfstep.search.scores import ScoreBook, Scores, Seen, counted, unseen
from halfstep.search.space import Genes, Space, random_plans
from halfstep.search.surrogate import fit_costs, promising


@dataclass(frozen=True)
class Found:
    """What a search returns: the plan, and every measured one with its score, in the order in which they were asked
    for. `base`: the reference in every row of the plan's sampler."""

    plan: StepPlan
    base: StepPlan
    space: Space
    measured: Mapping[Genes, float]
    reference_score: float


def search_plan(
    book: ScoreBook,
    plan: StepPlan,
    recipe: Recipe,
    out: Path,
    *,
    budget: float | None = None,
    max_loss: float | None = None,
    watch: Watch = SILENT,
) -> Found:
    """Find a plan for a budget (share of the reference's MACs) or for a tolerated loss (share of its score).

    Every measured plan is kept in `book`, and known when resumed; errors.json and plan.json are written into `out`. The
    plan is told as the replacement of `plan`, or of what `plan` is told to replace.
    """
    search, judge, spec = Search.of(book, plan, recipe, watch), book.judge, recipe.search
    space = search.space
    macs = space.require_budget(budget) if budget is not None else space.full_price
    costs = measured_table(judge, plan, space, recipe, out, watch).costs(spec.table, space.rows)
    reference = search.score("reference", search.reference)
    points = frontier(costs, space.gene_prices)
    if spec.fit and spec.method != "nsga2":
        least = max(points[0].price, macs - space.full_price // 4) if budget is not None else points[0].price
        points = search.fit(costs, points, (least, macs), recipe.seed)
    tolerated = None if max_loss is None else partial(judge.tolerated, max_loss)
    limit = tolerated(reference, spec.images) if tolerated else math.inf
    if budget is None:
        macs = search.cheapest_that_holds(points, limit)
    if spec.method != "nsga2":
        search.score("frontier", best_within(points, macs).genes)
    goal = Goal("budget", macs=macs) if max_loss is None else Goal("loss", limit=limit)
    if max_loss is None and spec.objective != "budget":
        goal = Goal(spec.objective, trade=spec.trade)
    if spec.method != "frontier":
        search.evolve(goal, search.starts(points, macs) if spec.method == "both" else [])
    best = search.best(goal, macs)
    if spec.finalists and goal.kind in ("budget", "loss"):
        best = search.final_round(macs, tolerated)
    chosen = search.plan_of(best)
    chosen = chosen if plan.baseline else chosen.replacing(plan)
    chosen.save(out / "plan.json")
    return Found(chosen, plan, space, search.measured, reference)


def measured_table(
    judge: Judge, plan: StepPlan, space: Space, recipe: Recipe, out: Path, watch: Watch = SILENT
) -> ErrorTable:
    """The error table of out/errors.json, measured where it is missing or of a measure of before.

    Raises RunError for one of another plan.
    """
    file = out / "errors.json"
    if file.is_file():
        known = ErrorTable.load(file)
        if (known.entries, known.shape) != (space.entries, (len(plan.rows), len(space.rows))):
            raise RunError(
                got=f"an error table of {known.shape} rows and genes of {', '.join(known.entries)}",
                expected=f"{(len(plan.rows), len(space.rows))} of {', '.join(space.entries)}, as this plan",
                where=file,
                do="delete it to measure again",
            )
        if known.measure == ErrorTable.measure:
            return known
        watch.say(f"the error table of before holds another measure ({known.measure}): measured again")
    steps = error_table(
        judge.bank,
        plan,
        space,
        judge.drawer.moved,
        images=recipe.search.error_images,
        seed=stage_seed(recipe.seed, Stage.TABLE),
        batch=judge.batch,
        conditions=judge.conditions,
    )
    found = None
    with watch.stage("error table", 1) as told:
        for done, total, found in steps:  # noqa: B007 (the last one holds the table)
            told(done / total if total else 1, f"{done} of {total} swaps")
    assert found is not None
    table: ErrorTable = found
    disk.write_json(file, table.to_json())
    return table


@dataclass(frozen=True)
class Search:
    """One search: its space and plan, the scores on the noise of the search and on that of the final round, and what
    was measured so far, in order."""

    spec: SearchSpec
    space: Space
    base: StepPlan
    scores: Scores
    fresh: Scores
    watch: Watch = SILENT
    measured: dict[Genes, float] = field(default_factory=dict)

    @classmethod
    def of(cls, book: ScoreBook, plan: StepPlan, recipe: Recipe, watch: Watch = SILENT) -> Search:
        spec = recipe.search
        scores = book.on(spec.images, stage_seed(recipe.seed, Stage.SEARCH))
        fresh = book.on(spec.final_images, stage_seed(recipe.seed, Stage.FINALS))
        return cls(spec, Space.of(plan, book.judge.bank.names, spec.genes), plan, scores, fresh, watch)

    @property
    def reference(self) -> Genes:
        """The reference in every gene."""
        return (self.space.reference,) * len(self.space.rows)

    def plan_of(self, genes: Genes) -> StepPlan:
        return self.base.with_entries(self.space.expand(genes))

    def score(self, stage: str, genes: Genes) -> float:
        return self.score_all(stage, [genes])[0]

    def score_all(self, stage: str, every: Sequence[Genes], seen: Seen = unseen) -> list[float]:
        """The scores of several plans, measured together; `seen` is told of each as it comes in."""
        found = self.scores.many([self.plan_of(genes) for genes in every], stage, seen=seen)
        for genes, score in zip(every, found, strict=True):
            self.measured.setdefault(genes, score)
        return found

    def within(self, macs: int) -> list[Genes]:
        """The measured plans of at most so many MACs, the best first."""
        return sorted((g for g in self.measured if self.space.cost(g) <= macs), key=self.measured.__getitem__)

    def fit(self, costs: np.ndarray, points: list[Point], between: tuple[int, int], seed: int) -> list[Point]:
        """The frontier after the error model was fitted to `spec.fit` measured plans of MACs between two bounds.

        The first half is spread over the table's frontier and random plans. Each later one is the best plan of an error
        model that is plausible for the plans before it, so that plans are spent where the best one may be.
        """
        (least, most), count, space = between, self.spec.fit, self.space
        draw = np.random.default_rng(seed)
        spread = np.linspace(least, most, max(1, count // 4) + 1)[1:]
        plans = [best_within(points, int(m)).genes for m in spread]
        slack = max(0.1, (most - least) / space.full_price - 0.15)
        plans += random_plans(space, most, max(0, (count + 1) // 2 - len(plans)), seed, slack=slack)
        plans = list(dict.fromkeys(plans))[:count]
        with self.watch.stage("fit error model", count) as told:
            scores = self.score_all("fit", plans, counted(told))
            while len(scores) < count:
                goal = most if draw.random() < 0.75 else int(draw.integers(least, most + 1))
                plans.append(promising(space, costs, plans, scores, goal, draw))
                scores += self.score_all("fit", plans[-1:])
                told(len(scores), f"score {scores[-1]:.3g} at {space.share(plans[-1]):.0%}")
        return frontier(fit_costs(costs, plans, scores), space.gene_prices)

    def cheapest_that_holds(self, points: Sequence[Point], limit: float) -> int:
        """The least MACs at which the frontier's plan keeps the score within `limit`, by bisection on measured plans;
        all of the reference's where none does."""
        low, high = 0, len(points) - 1
        with self.watch.stage("bisect frontier", max(1, high.bit_length())) as told:
            for i in range(max(1, high.bit_length())):
                middle = (low + high) // 2
                if self.score("bisect", points[middle].genes) <= limit:
                    high = middle
                else:
                    low = min(middle + 1, high)
                told(i + 1, f"{self.space.share(points[high].genes):.0%} of the MACs")
                if low == high:
                    break
            if self.score("bisect", points[high].genes) > limit:  # a fitted model's dearest need not be the reference
                return self.space.full_price
        return points[high].price

    def starts(self, points: Sequence[Point], macs: int) -> list[Genes]:
        """What the refinement starts from: the frontier's best plans within the budget and the best measured ones."""
        fitting = [p.genes for p in points if p.price <= macs][-4:][::-1]
        return list(dict.fromkeys([*fitting, *self.within(macs)[:4]]))

    def evolve(self, goal: Goal, starts: Sequence[Genes]) -> None:
        """Measure the plans that NSGA-II proposes, a generation at a time."""
        total = self.spec.population * self.spec.generations
        with self.watch.stage("NSGA-II", total) as told:
            measure = partial(self.score_all, "nsga2", seen=counted(told))
            for _ in evolve(self.space, measure, goal, self.spec, seeds=starts):
                pass
            told(total, "")  # plans seen before are not measured again

    def best(self, goal: Goal, macs: int) -> Genes:
        """The best measured plan of the whole search for the goal."""
        scores, share = self.measured, self.space.share
        if goal.kind == "loss":
            held = [genes for genes in scores if scores[genes] <= goal.limit]
            return min(held, key=lambda genes: (share(genes), scores[genes])) if held else self.reference
        if goal.kind == "scalar":
            return min(scores, key=lambda genes: scores[genes] + goal.trade * share(genes))
        if fitting := self.within(macs):
            return fitting[0]
        raise PlanError(got="no measured plan", expected="one within the budget", where="search", do="raise the budget")

    def final_round(self, macs: int, tolerated: Callable[[float, int], float] | None) -> Genes:
        """The choice among the best measured plans, on fresh seeds: the best of many scores on the same few images is
        partly luck. A budget's candidates are the `finalists` best plans and the dearest uniform one; for a tolerated
        loss (`tolerated`: the reference's score, images -> the highest that holds), the cheapest plan is taken that
        holds it again, or the best where none does."""
        if tolerated is None:
            best = [*self.within(macs)[: self.spec.finalists], *self.space.uniform_within(macs)[:1]]
            candidates = list(dict.fromkeys(best))
            with self.watch.stage("final round", len(candidates)) as told:
                plans = [self.plan_of(genes) for genes in candidates]
                scores = self.fresh.many(plans, "final", seen=counted(told))
            return candidates[int(np.argmin(scores))]
        limit = tolerated(self.score("reference", self.reference), self.scores.images)
        cheapest = sorted(self.measured, key=self.space.share)
        candidates = [genes for genes in cheapest if self.measured[genes] <= limit]
        return self._first_that_holds(candidates, tolerated)

    def _first_that_holds(self, candidates: Sequence[Genes], tolerated: Callable[[float, int], float]) -> Genes:
        limit = tolerated(self.fresh(self.plan_of(self.reference), "final"), self.fresh.images)
        scores: list[float] = []
        with self.watch.stage("final round", len(candidates)) as told:
            for genes in candidates:
                scores.append(self.fresh(self.plan_of(genes), "final"))
                told(len(scores), f"score {scores[-1]:.3g} at {self.space.share(genes):.0%}")
                if scores[-1] <= limit:
                    return genes
            told(len(candidates), "")
        return candidates[int(np.argmin(scores))]
