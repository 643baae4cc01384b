"""The joint search on nets small enough that every plan of every arm can be measured: brute force is the oracle."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from halfstep.core.errors import PlanError
from halfstep.core.plan import NONE, Price
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec
from halfstep.core.seeds import Stage, stage_seed
from halfstep.core.watch import SILENT
from halfstep.data.images import load_images
from halfstep.engine.bank import Bank
from halfstep.engine.networks import require_fed
from halfstep.engine.samplers import at_calls, families
from halfstep.engine.sampling import reference_plan
from halfstep.measure.fidelity import Converged, converged_plan
from halfstep.measure.judge import Judge
from halfstep.measure.pretrained import load_features
from halfstep.measure.quality import Distances
from halfstep.search.arms import Arm, Stock, Track, Twins, best_free, raced_families
from halfstep.search.joint import (
    Drawn,
    Joint,
    Question,
    choices_of,
    prepared,
    screened,
    search_joint,
    sources_of,
    spearman,
)
from halfstep.search.scores import open_scores, read_scores
from halfstep.search.space import Space
from tiny import recipes, unet

recipe = recipes(
    "search.images=64 search.error_images=8 search.fit=20 search.genes=2 search.final_images=64 search.arms=2 "
    "search.finalists=9 eval.images=64 eval.bootstrap=40 eval.features=digits sample.batch=64 sample.steps=6 "
    "shrink.scales=0.9"
)
PROCESS = Process()
TIMES = {"full": 9.0, "w0.50": 3.0}


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    bank = Bank({"full": unet(0, channels=(16, 16)), "w0.50": unet(1)}, "full", "epsilon")
    return Judge(bank, load_images("digits", size=8, channels=1), load_features("digits"), cache=None, batch=64)


def priced(plan):
    prices = {name: Price(price.macs, TIMES.get(name, 1.0)) for name, price in plan.prices.items()}
    return plan.__class__(**{**plan.__dict__, "prices": prices, "fixed": Price(0, 0.5)})


@pytest.fixture
def stage(judge, tmp_path):
    bank = judge.bank
    track = Track(Converged(bank, converged_plan(bank, PROCESS, 20), judge.extractor, count=24, seed=1, batch=24), 6)
    return track, Stock(bank, PROCESS, priced), open_scores(judge, tmp_path)


def today_of(judge, steps: int = 6):
    return priced(reference_plan(judge.bank, PROCESS, SampleSpec(scheduler="ddim", steps=steps)))


def us(plan) -> int:
    return round(1000 * plan.whole.us)


DPM = SampleSpec(scheduler="dpmsolver++", order=2, steps=4)
FEW = [DPM, SampleSpec(scheduler="unipc", order=2, steps=4)]


@pytest.mark.parametrize("unit", ["us", "macs"])
def test_a_search_that_may_measure_every_plan_finds_the_best_of_all(unit, stage, judge):
    track, stock, book = stage
    today = today_of(judge)
    question = Question(unit, (us(today) // 3 if unit == "us" else today.macs // 3,))
    kept = screened(track, book.on(64, 2 + 16 * 0), stock, FEW, today, question, 2)
    joint = Joint(question, prepared(track, book, kept, question, recipe()), book.on(64, 2 + 16 * 0), recipe())
    joint.begin()
    joint.correct()
    joint.fit(side=2)
    every = [
        (a, genes)
        for a, arm in enumerate(joint.arms)
        for genes in itertools.product(range(2), repeat=len(arm.space.rows))
        if arm.price(genes) <= question.limits[0]
    ]
    scores = {one: joint.scores(joint.plan_of(one), "fit") for one in every}
    assert set(every) <= set(joint.measured), "twenty measurements are enough for all of them"
    best = joint.within(question.limits[0])[0]
    assert scores[best] == min(scores.values())
    [answer] = joint.answers(book, track, today)
    assert question.price(answer.plan) <= question.limits[0]
    assert answer.change.fd_a != answer.change.fd_b and answer.change.n == 64


def test_every_choice_is_priced_as_its_plan_is(stage, judge):
    track, stock, book = stage
    today = today_of(judge)
    for unit in ("us", "macs"):
        question = Question(unit, (10**12,))
        for arm in prepared(track, book, [stock.arm(DPM, 5)], question, recipe()):
            for genes in itertools.product(range(2), repeat=len(arm.space.rows)):
                plan = arm.plan_of(genes)
                assert arm.price(genes) == question.price(plan) == (us(plan) if unit == "us" else plan.macs)
    assert question.price(today) == today.macs


def test_limits_have_an_answer_each_and_more_time_is_no_worse_on_the_noise_of_the_choice(stage, judge):
    track, stock, book = stage
    today = today_of(judge)
    limits = tuple(us(today) * share // 100 for share in (12, 30, 70))
    answers = search_joint(track, book, stock, FEW, today, Question("us", limits), recipe())
    assert [one.limit for one in answers] == sorted(limits)
    assert all(us(one.plan) <= one.limit for one in answers)
    for one in answers:
        assert all(us(plan) <= us(one.plan) for plan in one.controls.values())


def test_a_search_that_was_cut_measures_nothing_twice_and_ends_the_same(stage, judge, monkeypatch):
    track, stock, book = stage
    today, question = today_of(judge), Question("us", (us(today_of(judge)) // 3,))
    [first] = search_joint(track, book, stock, FEW, today, question, recipe())
    count = len(book.known)

    def refuse(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(judge, "ask", refuse)
    monkeypatch.setattr(judge, "features", refuse)
    again = open_scores(judge, book.file.parent)
    [second] = search_joint(track, again, stock, FEW, today, question, recipe())
    assert (second.plan, second.fresh) == (first.plan, first.fresh) and len(again.known) == count


@pytest.mark.slow
def test_a_search_on_a_cluster_is_that_of_here_to_the_last_bit(stage, judge, workers, tmp_path):
    track, stock, _ = stage
    limits = tuple(us(today_of(judge)) * share // 100 for share in (12, 30))

    def searched(executor, folder):
        book = open_scores(judge, folder, executor=executor)
        on = replace(track, executor=executor)
        families = raced_families(on, stock, 6)
        return search_joint(on, book, stock, families, today_of(judge), Question("us", limits), recipe())

    here, there = searched(None, tmp_path / "here"), searched(workers, tmp_path / "there")
    assert [(one.plan, one.score, one.fresh) for one in there] == [(one.plan, one.score, one.fresh) for one in here]
    kept = ["scores.jsonl", *(file.relative_to(tmp_path / "here") for file in (tmp_path / "here").rglob("*.json"))]
    assert all((tmp_path / "here" / one).read_bytes() == (tmp_path / "there" / one).read_bytes() for one in kept)
    assert len(kept) > 2


def test_a_budget_that_no_plan_meets_is_told_with_the_cheapest_there_is(stage, judge):
    track, stock, book = stage
    today = today_of(judge)
    question = Question("us", (10,), lambda price: f"{price} ns")
    with pytest.raises(PlanError) as error:
        search_joint(track, book, stock, FEW, today, question, recipe())
    least = min(us(stock.arm(family, 2).base.uniform("w0.50")) for family in FEW)
    assert "10 ns" in str(error.value) and f"at least {least} ns" in str(error.value)


@pytest.mark.parametrize(
    "spread, errors, prices, chosen",
    [
        (5.0, (9.0, 2.0, 1.0), (1, 2, 3), 1),  # undecided between the first two: the nearer one, not the cheapest
        (5.0, (1.0, 2.0, 0.5), (3, 2, 1), 0),  # the third is shown to be worse, whatever its pictures and its price
        (0.01, (9.0, 2.0, 1.0), (3, 2, 1), 0),  # decided: the best distance
    ],
)
def test_where_distances_part_nothing_fidelity_chooses(stage, judge, spread, errors, prices, chosen):
    """Of known distances 20, 21 and 90, whose paired changes spread by a known much."""
    _, _, book = stage
    plans = [today_of(judge, steps) for steps in (4, 5, 6)]
    n, noise = judge.reference.least, np.random.default_rng(0).normal(size=(3, 400))
    noise -= noise.mean(axis=1, keepdims=True)
    drawn = Drawn(book, n, 0, 400, SILENT)
    for plan, value, wave in zip(plans, (20.0, 21.5, 90.0), spread * noise, strict=True):
        drawn.distances[plan.digest] = Distances(value, value + wave, n, 0)
    assert drawn.choose(plans, prices, errors, 0.05) == chosen


def test_a_cheaper_plan_that_is_shown_to_be_as_good_is_taken(stage, judge):
    _, _, book = stage
    plans = [today_of(judge, steps) for steps in (4, 5)]
    n, wave = judge.reference.least, np.random.default_rng(0).normal(size=400)
    drawn = Drawn(book, n, 0, 400, SILENT)
    for plan, value in zip(plans, (20.0, 20.2), strict=True):
        drawn.distances[plan.digest] = Distances(value, value + wave, n, 0)
    assert drawn.choose(plans, (2, 1), (1.0, 2.0), 0.05) == 1


@pytest.mark.parametrize(
    "values, errors, prices, chosen",
    [
        ((1.0, 20.0, 20.0), (9.0, 2.0, 3.0), (1, 2, 2), 1),  # a distance below today's buys nothing
        ((20.0, 90.0, 20.0), (9.0, 2.0, 3.0), (1, 2, 3), 2),  # one that is shown to be worse is out
        ((90.0, 91.0, 92.0), (9.0, 2.0, 3.0), (1, 2, 3), 1),  # all of them are: then the nearest
        ((20.0, 20.0, 20.0), (9.0, 2.0, 2.05), (1, 3, 2), 2),  # as near within 5 %: the cheaper one
    ],
)
def test_a_guided_models_plan_is_the_nearest_to_its_own_pictures(stage, judge, values, errors, prices, chosen):
    """Of known distances beside today's 20."""
    _, _, book = stage
    today, *plans = [today_of(judge, steps) for steps in (3, 4, 5, 6)]
    n, wave = judge.reference.least, np.random.default_rng(0).normal(size=400)
    drawn = Drawn(book, n, 0, 400, SILENT)
    for plan, value in zip((today, *plans), (20.0, *values), strict=True):
        drawn.distances[plan.digest] = Distances(value, value + 0.01 * wave, n, 0)
    assert drawn.nearest(today, plans, prices, errors, 0.05) == chosen


def test_scores_by_fidelity_are_mean_distances_from_the_converged_twins(stage, judge):
    """Oracle: pictures drawn and held against one another by hand, in the features of the judge."""
    track, _, book = stage
    plan, converged = today_of(judge), converged_plan(judge.bank, PROCESS, 20)
    mine, twins = (judge.features(one, 24, 1)[0] for one in (plan, converged))
    wanted = np.linalg.norm(mine - twins, axis=1).mean()
    scores = Twins(book, track)
    assert scores(plan, "fit") == pytest.approx(wanted, rel=1e-4)
    assert Twins(book, track).many([converged, plan], "fit") == pytest.approx([0, wanted], rel=1e-4, abs=1e-3)
    assert {one.stage for one in read_scores(book.file.parent)} == {"fidelity"}


def test_reused_rows_begin_fresh_in_every_gene(judge):
    bank = judge.bank.with_reuse([0])
    plan = reference_plan(bank, PROCESS, SampleSpec(scheduler="ddim", steps=6))
    space = Space.of(plan, bank.names, 2, sources=sources_of(bank, bank.names))
    cheap = space.entries.index("full~0")
    assert space.expand((cheap, cheap)) == ["full", "full~0", "full~0"] * 2
    assert space.cost((cheap, cheap)) == plan.with_entries(space.expand((cheap, cheap))).macs
    assert cheap not in space.alone
    for genes in itertools.product(range(len(space.entries)), repeat=2):
        assert space.cost(genes) == plan.with_entries(space.expand(genes)).macs


def test_the_best_free_sampler_is_the_cheapest_that_is_no_worse(stage, judge):
    track, stock, book = stage
    today = today_of(judge)
    scores = book.on(64, stage_seed(0, Stage.SEARCH))
    free = best_free(track, stock, FEW, today, scores, lambda score: score * 1.05)
    measured = [(len(plan.rows), score) for plan, score in free.frontier]
    assert [calls for calls, _ in measured] == sorted({calls for calls, _ in measured})
    held = [plan for plan, score in free.frontier if score <= free.today * 1.05]
    assert free.plan == (held[0] if held else today)
    assert all(len(plan.rows) < len(today.rows) for plan, _ in free.frontier)
    never = best_free(track, stock, FEW, today, scores, lambda score: -1.0)
    assert never.plan == today and len(never.frontier) == 4  # 2 to 5 calls


def test_families_are_raced_without_those_that_draw_noise(stage):
    track, stock, _ = stage
    found = raced_families(track, stock, 6)
    assert found and all(family.scheduler != "ddpm" for family in found)
    assert raced_families(track, Stock(stock.bank, PROCESS, priced), 6) == found


@pytest.mark.parametrize("calls", [2, 3, 5, 8, 11])
def test_an_arm_of_so_many_calls_makes_so_many(calls, stage):
    _, stock, _ = stage
    made = stock.at(calls)
    assert {len(arm.base.rows) for _, arm in made} == {calls}
    kinds = {family.scheduler for family, _ in made}
    assert ("heun" in kinds) == (calls % 2 == 1) and ("pndm" in kinds) == (calls > 2)
    assert all(at_calls(family, calls).steps >= 2 for family, _ in made)
    assert {family.scheduler for family in families(PROCESS)} >= {"ddim", "ddpm", "deis", "unipc", "euler"}


def test_corrections_are_kept_where_they_are_better(stage, judge):
    track, stock, book = stage
    today = today_of(judge)
    question = Question("us", (us(today),))
    arms = prepared(track, book, [Arm(stock.arm(DPM, 4).base)], question, recipe())
    joint = Joint(question, arms, book.on(64, 2), recipe("shrink.scales=0.7,0.8,0.9,1.1,1.2"))
    joint.begin()
    best = min(joint.measured, key=joint.measured.__getitem__)
    plain = {one: joint.plan_of(one) for one in joint.measured}[best]
    joint.correct()
    scores = {
        scale: joint.scores(plain.with_corrections([NONE._replace(scale=scale)] * 4), "x")
        for scale in (1.0, joint.arms[0].scale.scale)
    }
    assert scores[joint.arms[0].scale.scale] <= scores[1.0]
    assert np.isfinite(list(joint.measured.values())).all()


def test_ranks_are_those_of_scipy():
    from scipy.stats import spearmanr

    draw = np.random.default_rng(0)
    for _ in range(20):
        a, b = draw.integers(6, size=12), draw.normal(size=12)
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0.0


def test_where_the_reference_is_guided_a_search_may_choose_how_every_row_is(tmp_path):
    """Brute force over every plan of one arm of a net of classes: guided, unguided, by the cheaper net, or half."""
    torch.manual_seed(0)
    nets = {"full": unet(0, channels=(16, 16), num_class_embeds=11), "w0.50": unet(1, num_class_embeds=11)}
    bank = Bank(nets, "full", "epsilon").with_null({"class_labels": torch.tensor([10])}, 3.0).with_reuse([0])
    digits = load_images("digits", size=8, channels=1)
    judge = Judge(bank, digits, load_features("digits"), cache=None, batch=64)
    plan = converged_plan(bank, PROCESS, 20)
    track = Track(Converged(bank, plan, judge.extractor, count=8, seed=1, batch=8, conditions=judge.conditions), 4)
    stock, book = Stock(bank, PROCESS, priced), open_scores(judge, tmp_path)
    today = priced(reference_plan(bank, PROCESS, SampleSpec(scheduler="ddim", steps=4)))
    assert today.price.macs == 2 * 4 * bank.prices()["full"].macs
    choices = choices_of(bank, bank.guidance)
    assert {"full", "full|", "full|w0.50", "full|full*2", "full~0", "full~0|"} <= set(choices)
    sources = sources_of(bank, choices)
    assert sources["full~0"] == ("full", 1) and sources["full~0|"] == ("full|", 1)
    question = Question("macs", (today.macs // 2,))
    small = recipe("search.genes=2", "search.fit=4", "search.images=64", "search.final_images=64")
    [answer] = search_joint(track, book, stock, [DPM], today, question, small)
    assert answer.plan.macs <= today.macs // 2 and answer.plan.guidance == 3.0
    require_fed(bank, answer.plan)
    [arm] = prepared(track, book, [stock.arm(DPM, 4)], question, small)
    for genes in itertools.product(range(len(choices)), repeat=2):
        assert arm.price(genes) == arm.plan_of(genes).macs
