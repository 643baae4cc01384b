"""Find a plan with a judge: error table, frontier, surrogate fitted to measured plans, NSGA-II; resumable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from halfstep import disk
from halfstep import evolve as evolving
from halfstep import search as searching
from halfstep.errors import PlanError, RunError
from halfstep.judge import Judge
from halfstep.plan import StepPlan
from halfstep.recipe import Recipe, SearchSpec
from halfstep.results import Final, read_finals
from halfstep.sampling import fewer_steps
from halfstep.seeds import Stage, stage_seed
from halfstep.shrink import shrink_plan
from halfstep.watch import SILENT, Watch


@dataclass(frozen=True)
class Found:
    """What a search returns: the plan, the error table and every measured plan. `base`: the reference in every row of
    the plan's sampler."""

    plan: StepPlan
    base: StepPlan
    table: searching.ErrorTable
    records: tuple[evolving.SearchRecord, ...]
    reference_score: float
    space: searching.Space


def search_plan(
    judge: Judge,
    plan: StepPlan,
    recipe: Recipe,
    out: Path,
    *,
    budget: float | None = None,
    max_loss: float | None = None,
    watch: Watch = SILENT,
) -> Found:
    """Find a plan for a budget (share of the reference's MACs) or for a tolerated loss (share of its score).

    Writes errors.json, search.jsonl (every measured plan; read again when resumed) and plan.json into `out`; the plan
    is told as the replacement of `plan`, or of what `plan` is told to replace.
    """
    spec, bank = recipe.search, judge.bank
    space = searching.Space.of(plan, bank.names, spec.genes)
    macs = space.require_budget(budget) if budget is not None else space.full_macs
    table = _table(judge, plan, space, recipe, out, watch)
    costs = table.costs(spec.table, space.rows)
    log = _Measured(judge, plan, space, out / "search.jsonl", spec.images, stage_seed(recipe.seed, Stage.SEARCH))
    reference = log("reference", (space.reference,) * len(space.rows))
    points = searching.frontier(costs, space.gene_macs)
    if spec.fit and spec.method != "nsga2":
        least = max(points[0].macs, macs - space.full_macs // 4) if budget is not None else points[0].macs
        points = _fitted(log, space, costs, points, spec.fit, (least, macs), recipe.seed, watch)
    tolerated = None if max_loss is None else partial(judge.tolerated, max_loss)
    limit = tolerated(reference, spec.images) if tolerated else math.inf
    if budget is None:
        macs = _cheapest_that_holds(log, space, points, limit, watch)
    if spec.method != "nsga2":
        log("frontier", searching.best_within(points, macs).genes)
    goal = evolving.Goal("budget", macs=macs) if max_loss is None else evolving.Goal("loss", limit=limit)
    if max_loss is None and spec.objective != "budget":
        goal = evolving.Goal(spec.objective, trade=spec.trade)
    if spec.method != "frontier":
        _evolve(log, space, goal, spec, _seeds(space, points, macs, log) if spec.method == "both" else [], watch)
    best = _best_measured(log, space, goal, macs)
    if spec.finalists and goal.kind in ("budget", "loss"):
        fresh = _Measured(
            judge, plan, space, out / "finals.jsonl", spec.final_images, stage_seed(recipe.seed, Stage.FINALS)
        )
        best = _final_round(log, fresh, space, spec.finalists, macs, tolerated, watch)
    chosen = plan.with_entries(space.expand(best))
    chosen = chosen if plan.baseline else chosen.replacing(plan)
    chosen.save(out / "plan.json")
    return Found(chosen, plan, table, tuple(log.records), reference, space)


def require_goal(
    plan: StepPlan, entries: Sequence[str], recipe: Recipe, *, budget: float | None, max_loss: float | None
) -> None:
    """Raise PlanError, before anything is trained, for a budget below the cheapest plan, numbers of steps that the
    sampler does not have, and a tolerated loss together with other numbers of steps or corrections."""
    spec = recipe.search
    if budget is not None:
        searching.Space.of(plan, entries, spec.genes).require_budget(budget)
    elif spec.step_counts or spec.shrink:
        raise PlanError(
            got="--max-loss with search.step_counts or search.shrink",
            expected="--budget",
            where="search",
            do="give a budget, or correct the plan that was found with halfstep shrink",
        )
    for steps in spec.step_counts:
        fewer_steps(plan, steps)


def search_steps(
    judge: Judge,
    plan: StepPlan,
    recipe: Recipe,
    out: Path,
    *,
    budget: float | None = None,
    max_loss: float | None = None,
    watch: Watch = SILENT,
) -> Found:
    """`search_plan` for every number of steps that the recipe names, and with corrections where it wants them.

    Every number of steps is searched for the same budget (a share of `plan`'s MACs) in a folder of its own; the best
    plan of each, as it is and corrected, is measured on fresh seeds, and the best of all is chosen.
    Raises PlanError for a tolerated loss together with either: it is searched for one sampler at a time.
    """
    spec = recipe.search
    counts = {"search.images": spec.images} | ({"search.final_images": spec.final_images} if spec.finalists else {})
    for warning in filter(None, (judge.too_few(count, what) for what, count in counts.items())):
        watch.say(f"warning: {warning}")
    if not spec.step_counts and not spec.shrink:
        return search_plan(judge, plan, recipe, out, budget=budget, max_loss=max_loss, watch=watch)
    require_goal(plan, judge.bank.names, recipe, budget=budget, max_loss=max_loss)
    assert budget is not None, "require_goal asked for one"
    found: dict[StepPlan, Found] = {}
    full = plan.uniform().macs
    bases = {steps: fewer_steps(plan, steps) for steps in (plan.steps, *spec.step_counts)}  # refused before the search
    for steps, base in bases.items():
        folder = out / f"steps-{steps}"
        share = min(1.0, budget * full / base.macs)
        cheapest = min(base.entry_macs[name] for name in judge.bank) / base.entry_macs[base.reference]
        if share < cheapest and steps != plan.steps:  # the plan's own number is refused by the search, with a reason
            watch.say(f"{steps} steps are too dear even with the cheapest entry")
            continue
        watch.say(f"{steps} steps")
        folder.mkdir(exist_ok=True)
        one = search_plan(judge, base.replacing(plan), recipe, folder, budget=share, watch=watch)
        found[one.plan] = one
        if spec.shrink:
            shrunk = shrink_plan(judge, one.plan, recipe.shrink, folder, seed=recipe.seed, watch=watch)
            found[shrunk.plan] = replace(one, plan=shrunk.plan)
    best = _best_on_fresh_seeds(
        judge, found, out / "finals.json", spec.final_images, stage_seed(recipe.seed, Stage.STEPS), watch
    )
    found[best].plan.save(out / "plan.json")
    return found[best]


def _best_on_fresh_seeds(
    judge: Judge, plans: Iterable[StepPlan], file: Path, count: int, seed: int, watch: Watch
) -> StepPlan:
    plans = list(plans)
    known = read_finals(file) if file.exists() else {}
    with watch.stage("numbers of steps", len(plans)) as told:
        for i, plan in enumerate(plans):
            name = f"{plan.steps} steps, {'corrected' if plan.corrected else 'plain'}"
            if name not in known:
                known[name] = Final(score=judge.score(plan, count, seed), macs=plan.macs)
                disk.write_json(file, {name: vars(one) for name, one in known.items()})
            told(i + 1, f"{name}: {known[name].score:.3g}")
    for name, one in sorted(known.items(), key=lambda item: item[1].score):
        watch.say(f"{name}: distance {one.score:.3g}, {one.macs / 1e6:,.0f} MMACs")
    scores = [known[f"{p.steps} steps, {'corrected' if p.corrected else 'plain'}"].score for p in plans]
    return plans[int(np.argmin(scores))]


def _table(
    judge: Judge, plan: StepPlan, space: searching.Space, recipe: Recipe, out: Path, watch: Watch
) -> searching.ErrorTable:
    file = out / "errors.json"
    if file.is_file():
        known = searching.ErrorTable.load(file)
        if (known.entries, known.shape) != (space.entries, (len(plan.rows), len(space.rows))):
            raise RunError(
                got=f"an error table of {known.shape} rows and genes of {', '.join(known.entries)}",
                expected=f"{(len(plan.rows), len(space.rows))} of {', '.join(space.entries)}, as this plan",
                where=file,
                do="delete it to measure again",
            )
        if known.measure == searching.ErrorTable.measure:
            return known
        watch.say(f"the error table of before holds another measure ({known.measure}): measured again")
    steps = searching.error_table(
        judge.bank,
        plan,
        space,
        judge.moved,
        images=recipe.search.error_images,
        seed=stage_seed(recipe.seed, Stage.TABLE),
        batch=judge.batch,
        labels=judge.class_of,
    )
    found = None
    with watch.stage("error table", 1) as told:
        for done, total, found in steps:  # noqa: B007 (the last one holds the table)
            told(done / total, f"{done} of {total} swaps")
    assert found is not None
    table: searching.ErrorTable = found
    disk.write_json(file, table.to_json())
    return table


class _Measured:
    """Scores plans, logs each, and knows those of an earlier, interrupted search."""

    def __init__(self, judge: Judge, plan: StepPlan, space: searching.Space, file: Path, count: int, seed: int):
        self.judge, self.plan, self.space, self.file = judge, plan, space, file
        self.count, self.seed = count, seed
        self.known = {one.genes: one.score for one in disk.read_records(file, evolving.SearchRecord)}
        self.records: list[evolving.SearchRecord] = []

    def __call__(self, stage: str, genes: searching.Genes) -> float:
        fresh = genes not in self.known
        if fresh:
            self.known[genes] = self.judge.score(
                self.plan.with_entries(self.space.expand(genes)), self.count, self.seed
            )
        if all(r.genes != genes for r in self.records):
            images = (len(self.records) + 1) * self.count
            record = evolving.SearchRecord(stage, genes, self.space.share(genes), self.known[genes], images)
            self.records.append(record)
            if fresh:
                disk.append_record(self.file, record.to_json())
        return self.known[genes]


def _fitted(
    log: _Measured,
    space: searching.Space,
    costs: np.ndarray,
    points: list[searching.Point],
    count: int,
    between: tuple[int, int],
    seed: int,
    watch: Watch,
) -> list[searching.Point]:
    """The frontier after the error model was fitted to `count` measured plans of MACs between two bounds.

    The first half is spread over the table's frontier and random plans. Each later one is the best plan of an error
    model that is plausible for the plans before it, so that plans are spent where the best one may be.
    """
    least, most = between
    draw = np.random.default_rng(seed)
    spread = np.linspace(least, most, max(1, count // 4) + 1)[1:]
    plans = [searching.best_within(points, int(m)).genes for m in spread]
    slack = max(0.1, (most - least) / space.full_macs - 0.15)
    plans += evolving.random_plans(space, most, max(0, (count + 1) // 2 - len(plans)), seed, slack=slack)
    plans = list(dict.fromkeys(plans))
    scores: list[float] = []
    with watch.stage("fit error model", count) as told:
        while len(scores) < count:
            if len(scores) == len(plans):
                goal = most if draw.random() < 0.75 else int(draw.integers(least, most + 1))
                plans.append(searching.promising(space, costs, plans, scores, goal, draw))
            scores.append(log("fit", plans[len(scores)]))
            told(len(scores), f"score {scores[-1]:.3g} at {space.share(plans[len(scores) - 1]):.0%}")
    return searching.frontier(searching.fit_costs(costs, plans, scores), space.gene_macs)


def _cheapest_that_holds(
    log: _Measured, space: searching.Space, points: Sequence[searching.Point], limit: float, watch: Watch
) -> int:
    """The least MACs at which the frontier's plan keeps the score within `limit`, by bisection on measured plans; all
    of the reference's where none does."""
    low, high = 0, len(points) - 1
    with watch.stage("bisect frontier", max(1, high.bit_length())) as told:
        for i in range(max(1, high.bit_length())):
            middle = (low + high) // 2
            if log("bisect", points[middle].genes) <= limit:
                high = middle
            else:
                low = min(middle + 1, high)
            told(i + 1, f"{space.share(points[high].genes):.0%} of the MACs")
            if low == high:
                break
        if log("bisect", points[high].genes) > limit:  # the dearest of a fitted model need not be the reference
            return space.full_macs
    return points[high].macs


def _seeds(
    space: searching.Space, points: Sequence[searching.Point], macs: int, log: _Measured
) -> list[searching.Genes]:
    """What the refinement starts from: the frontier's best plans within the budget and the best measured ones."""
    fitting = [p.genes for p in points if p.macs <= macs][-4:][::-1]
    measured = sorted((r for r in log.records if space.cost(r.genes) <= macs), key=lambda r: r.score)
    return list(dict.fromkeys([*fitting, *(r.genes for r in measured[:4])]))


def _evolve(
    log: _Measured,
    space: searching.Space,
    goal: evolving.Goal,
    spec: SearchSpec,
    seeds: Sequence[searching.Genes],
    watch: Watch,
) -> None:
    """Measure the plans that NSGA-II proposes."""
    total = spec.population * spec.generations
    steps = evolving.evolve(space, lambda genes: log("nsga2", genes), goal, spec, seeds=seeds)
    with watch.stage("NSGA-II", total) as told:
        for i, (genes, score) in enumerate(steps):
            told(i + 1, f"score {score:.3g} at {space.share(genes):.0%}")
        told(total, "")  # plans seen before are not measured again


def _best_measured(log: _Measured, space: searching.Space, goal: evolving.Goal, macs: int) -> searching.Genes:
    """The best measured plan of the whole search for the goal."""
    if goal.kind == "loss":
        held = [r for r in log.records if r.score <= goal.limit]
        return min(held, key=lambda r: (r.share, r.score)).genes if held else (space.reference,) * len(space.rows)
    if goal.kind == "scalar":
        return min(log.records, key=lambda r: r.score + goal.trade * r.share).genes
    fitting = [r for r in log.records if space.cost(r.genes) <= macs]
    if not fitting:
        raise PlanError(got="no measured plan", expected="one within the budget", where="search", do="raise the budget")
    return min(fitting, key=lambda r: r.score).genes


def _final_round(
    log: _Measured,
    fresh: _Measured,
    space: searching.Space,
    count: int,
    macs: int,
    tolerated: Callable[[float, int], float] | None,
    watch: Watch,
) -> searching.Genes:
    """The choice among the best measured plans, on fresh seeds: the best of many scores on the same few images is
    partly luck. A budget's candidates are the `count` best plans and the dearest uniform one; for a tolerated loss
    (`tolerated`: the reference's score, images -> the highest that holds), the cheapest plan is taken that holds it
    again."""
    if tolerated is None:
        fitting = sorted((r for r in log.records if space.cost(r.genes) <= macs), key=lambda r: r.score)[:count]
        candidates = [r.genes for r in fitting] + space.uniform_within(macs)[:1]
        limit = -math.inf  # the best of all, not the first that holds
    else:
        reference = (space.reference,) * len(space.rows)
        limit = tolerated(log("reference", reference), log.count)
        candidates = [r.genes for r in sorted(log.records, key=lambda r: r.share) if r.score <= limit]
        limit = tolerated(fresh("final", reference), fresh.count)
    candidates = list(dict.fromkeys(candidates))
    scores: list[float] = []
    with watch.stage("final round", len(candidates)) as told:
        for genes in candidates:
            scores.append(fresh("final", genes))
            told(len(scores), f"score {scores[-1]:.3g} at {space.share(genes):.0%}")
            if scores[-1] <= limit:
                return genes
        told(len(candidates), "")
    return candidates[int(np.argmin(scores))]


def baselines(plan: StepPlan, found: Found) -> dict[str, StepPlan]:
    """The controls at equal MACs: one width everywhere, a random plan, and fewer steps of the reference `plan`. One
    that is the reference or the found plan itself is left out: it would stand beside itself."""
    space, macs, base, known = found.space, found.plan.macs, found.base, (plan.rows, found.plan.rows)
    plans = {f"uniform {space.entries[genes[0]]}": genes for genes in space.uniform_within(macs)[:1]}
    controls = {name: base.with_entries(space.expand(genes)) for name, genes in plans.items()}
    for genes in evolving.random_plans(space, macs, 2, seed=11, slack=0.05):
        one = base.with_entries(space.expand(genes))
        if one.rows not in known:
            controls.setdefault("random plan", one)
    steps = max(1, round(plan.steps * macs / plan.macs))
    controls[f"{steps} steps of the reference"] = fewer_steps(plan, steps)
    return {name: one for name, one in controls.items() if one.rows not in known}
