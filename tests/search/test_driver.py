"""The search with a judge whose score is known: additive over genes, so that brute force over plans is the oracle."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import DDIMScheduler

from halfstep.core.errors import PlanError
from halfstep.core.plan import Price, Row, Sampler, StepPlan
from halfstep.core.recipe import Recipe, SearchSpec
from halfstep.core.seeds import Stage, stage_seed
from halfstep.search.damage import ErrorTable
from halfstep.search.driver import Search, search_plan
from halfstep.search.frontier import frontier
from halfstep.search.scores import open_scores, read_scores
from halfstep.search.space import Space

ENTRIES = {"full": 100, "w0.75": 60, "w0.50": 27, "w0.25": 8}
GENES = 5
BASE = 10.0
FINALS = stage_seed(0, Stage.FINALS)


def plan_of(steps: int = 2 * GENES) -> StepPlan:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    rows = tuple(Row(float(t), "full") for t in scheduler.timesteps)
    config = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    sampler, prices = Sampler("DDIMScheduler", config, steps), {name: Price(macs) for name, macs in ENTRIES.items()}
    return StepPlan(rows=rows, sampler=sampler, reference="full", prices=prices)


PLAN = plan_of()
SPACE = Space.of(PLAN, tuple(ENTRIES), GENES)
EVERY = list(itertools.product(range(len(ENTRIES)), repeat=GENES))


class Additive:
    """A judge of plans whose score is BASE + the costs of their genes, plus `luck` that hangs on plan and seed."""

    def __init__(self, costs: np.ndarray, luck: float = 0.0):
        self.costs, self.luck, self.asked = costs, luck, []
        self.bank, self.batch = SimpleNamespace(names=tuple(ENTRIES), fingerprint=str), 8

    def true(self, genes) -> float:
        return BASE + float(self.costs[np.arange(GENES), list(genes)].sum())

    def ask(self, plan, count, seed, executor):
        return lambda: self.score(plan, count, seed)

    def score(self, plan: StepPlan, count: int, seed: int) -> float:
        genes = tuple(list(ENTRIES).index(name) for name in plan.entries[::2])
        self.asked.append(genes)
        return self.true(genes) + self.luck * np.random.default_rng([seed, *genes]).normal()

    def too_few(self, count: int, what: str) -> None:
        return None

    def tolerated(self, share: float, score: float, count: int) -> float:
        return score + share * score


def true_costs(seed: int = 0) -> np.ndarray:
    """[GENES, entries]: zero for the reference, more for cheaper entries, the steps of unlike weight."""
    draw = np.random.default_rng(seed)
    steps = np.sort(draw.random((GENES, len(ENTRIES) - 1)), axis=1) * draw.uniform(0.2, 4, (GENES, 1))
    return np.concatenate([np.zeros((GENES, 1)), steps], axis=1)


def write_table(out, costs: np.ndarray) -> None:
    """The error table that a search finds in its folder."""
    steps = tuple(row.timestep for row in PLAN.rows)
    local = np.repeat(costs, 2, axis=0)
    record = ErrorTable(steps, tuple(ENTRIES), local, costs, 64).to_json()
    (out / "errors.json").write_text(json.dumps(record))


def recipe(**changes) -> Recipe:
    return Recipe(search=replace(SearchSpec(method="frontier", fit=0, genes=GENES, images=64, finalists=0), **changes))


def search_of(judge: Additive, tmp_path, seed: int = 0, **changes) -> Search:
    return Search.of(open_scores(judge, tmp_path), PLAN, replace(recipe(final_images=64, **changes), seed=seed))


def genes_of(line: dict) -> tuple[int, ...]:
    """Of a line of scores.jsonl: every gene is two rows."""
    every = [list(ENTRIES).index(one["entry"]) for one in line["plan"] for _ in range(one["rows"])]
    return tuple(every[::2])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.6, 5.0])
def test_bisection_finds_the_cheapest_plan_that_holds(seed, share, tmp_path):
    judge = Additive(true_costs(seed))
    points, limit = frontier(judge.costs, SPACE.gene_prices), BASE * (1 + share)
    found = search_of(judge, tmp_path).cheapest_that_holds(points, limit)
    assert found == min(SPACE.cost(g) for g in EVERY if judge.true(g) <= limit)
    assert len(judge.asked) <= len(points).bit_length() + 1


def test_where_no_plan_of_a_fitted_frontier_holds_the_reference_is_what_holds(tmp_path):
    """A fit may find a narrow net better than the reference, whose plan is then on no frontier."""
    judge, wrong = Additive(true_costs()), true_costs()
    wrong[:, 1] = -1.0
    points = frontier(wrong, SPACE.gene_prices)
    assert points[-1].genes != (0,) * GENES, "an oracle that could tell"
    assert search_of(judge, tmp_path).cheapest_that_holds(points, BASE) == SPACE.full_price


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5, 0.9, 1.0])
def test_a_true_table_gives_the_best_of_all_plans_for_a_budget(budget, tmp_path):
    judge = Additive(true_costs())
    write_table(tmp_path, judge.costs)
    found = search_plan(open_scores(judge, tmp_path), PLAN, recipe(), tmp_path, budget=budget)
    assert judge.true([list(ENTRIES).index(name) for name in found.plan.entries[::2]]) == pytest.approx(
        min(judge.true(g) for g in EVERY if SPACE.share(g) <= budget + 1e-9)
    )
    assert found.plan.share <= budget + 1e-9 and found.reference_score == BASE
    assert found.plan.baseline.price == PLAN.price and StepPlan.load(tmp_path / "plan.json") == found.plan


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5])
def test_a_true_table_gives_the_cheapest_of_all_plans_for_a_tolerated_loss(share, tmp_path):
    judge = Additive(true_costs(1))
    write_table(tmp_path, judge.costs)
    found = search_plan(open_scores(judge, tmp_path), PLAN, recipe(finalists=3), tmp_path, max_loss=share)
    assert found.plan.macs == min(SPACE.cost(g) for g in EVERY if judge.true(g) <= BASE * (1 + share) + 1e-9)


@pytest.mark.parametrize("method", ["frontier", "both", "nsga2"])
def test_measured_plans_make_up_for_a_table_that_is_wrong(method, tmp_path):
    """The table weighs the genes the wrong way round; fitted to measured plans, the search comes near the best."""
    judge = Additive(true_costs(2))
    write_table(tmp_path, judge.costs[::-1])
    spec = recipe(method=method, fit=24, population=8, generations=8, finalists=2, final_images=64)
    found = search_plan(open_scores(judge, tmp_path), PLAN, spec, tmp_path, budget=0.4)
    fitting = [judge.true(g) for g in EVERY if SPACE.share(g) <= 0.4]
    chosen = judge.true([list(ENTRIES).index(name) for name in found.plan.entries[::2]])
    assert np.mean(np.array(fitting) < chosen) <= (0.08 if method == "nsga2" else 0.01)
    assert found.plan.share <= 0.4
    assert found.measured == {genes: pytest.approx(judge.true(genes)) for genes in found.measured}


def test_a_search_that_was_cut_ends_the_same_and_measures_nothing_twice(tmp_path):
    ends, lines = [], None
    for name in ("whole", "cut"):
        judge, out = Additive(true_costs(3), luck=0.1), tmp_path / name
        out.mkdir()
        write_table(out, true_costs(2))
        if lines:
            (out / "scores.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:20])
        spec = recipe(method="both", fit=10, population=6, generations=2, finalists=2, final_images=64)
        ends.append(search_plan(open_scores(judge, out), PLAN, spec, out, budget=0.5))
        lines = lines or (out / "scores.jsonl").read_bytes().splitlines(keepends=True)
    assert ends[0] == ends[1] and list(ends[0].measured) == list(ends[1].measured)
    assert (tmp_path / "cut" / "scores.jsonl").read_bytes() == b"".join(lines)
    assert [genes_of(json.loads(line)) for line in lines[9:]] == judge.asked


def test_the_final_round_of_a_budget_takes_the_best_on_fresh_seeds_not_the_luckiest(tmp_path):
    judge = Additive(true_costs(4), luck=0.5)
    search, macs = search_of(judge, tmp_path, finalists=3), SPACE.full_price // 2
    search.score_all("fit", EVERY[:: len(EVERY) // 40])
    chosen = search.final_round(macs, None)
    fitting = sorted((g for g in search.measured if SPACE.cost(g) <= macs), key=search.measured.get)[:3]
    candidates = {*fitting, SPACE.uniform_within(macs)[0]}
    finals = [one for one in read_scores(tmp_path) if one.stage == "final"]
    assert {genes_of(one.to_json()) for one in finals} == candidates and {one.seed for one in finals} == {FINALS}
    assert chosen == min(candidates, key=lambda g: judge.score(PLAN.with_entries(SPACE.expand(g)), 64, FINALS))


def test_the_final_round_of_a_loss_takes_the_cheapest_that_holds_again(tmp_path):
    judge = Additive(true_costs(5), luck=1.0)
    search, reference = search_of(judge, tmp_path, seed=1), (0,) * GENES
    search.score_all("fit", [reference, *EVERY[:: len(EVERY) // 60]])
    limit = lambda score, count: 1.1 * score  # noqa: E731
    chosen = search.final_round(0, limit)
    again = lambda genes: judge.score(PLAN.with_entries(SPACE.expand(genes)), 64, stage_seed(1, Stage.FINALS))  # noqa: E731
    held = [genes for genes, score in search.measured.items() if score <= 1.1 * search.measured[reference]]
    assert chosen == min((g for g in held if again(g) <= 1.1 * again(reference)), key=SPACE.cost)
    assert any(SPACE.cost(g) < SPACE.cost(chosen) for g in held), "some held by luck alone"


def test_refinement_starts_from_the_dearest_fitting_frontier_and_the_best_measured(tmp_path):
    judge, macs = Additive(true_costs(6)), SPACE.full_price // 2
    search = search_of(judge, tmp_path)
    search.score_all("fit", EVERY[::100])
    points = frontier(judge.costs, SPACE.gene_prices)
    seeds = search.starts(points, macs)
    assert len(set(seeds)) == len(seeds) and all(SPACE.cost(g) <= macs for g in seeds)
    assert seeds[0] == min((g for g in EVERY if SPACE.cost(g) <= macs), key=judge.true)
    best = sorted((g for g in EVERY[::100] if SPACE.cost(g) <= macs), key=judge.true)[:4]
    assert set(best) <= set(seeds)


def test_a_budget_below_the_cheapest_plan_is_refused(tmp_path):
    with pytest.raises(PlanError, match="cheapest"):
        search_plan(open_scores(Additive(true_costs()), tmp_path), PLAN, recipe(), tmp_path, budget=0.01)


def test_a_table_of_the_measure_of_before_is_measured_again_and_a_cut_search_keeps_its_own(tmp_path, monkeypatch):
    from halfstep.search import driver

    judge, told = Additive(true_costs()), []
    write_table(tmp_path, judge.costs)
    record = json.loads((tmp_path / "errors.json").read_text())
    old = {key: value for key, value in record.items() if key != "measure"}
    assert ErrorTable.from_json(old).measure == "change of distance"  # still told by `halfstep report`

    def measure(*args, **kwargs):
        told.append(1)
        yield 1, 1, ErrorTable.from_json(record)

    monkeypatch.setattr(driver, "error_table", measure)
    judge.drawer, judge.conditions = SimpleNamespace(moved=None), None
    search_plan(open_scores(judge, tmp_path), PLAN, recipe(), tmp_path, budget=0.5)
    assert not told
    (tmp_path / "errors.json").write_text(json.dumps(old))
    search_plan(open_scores(judge, tmp_path), PLAN, recipe(), tmp_path, budget=0.5)
    assert told == [1] and json.loads((tmp_path / "errors.json").read_text())["measure"] == "moved features"
