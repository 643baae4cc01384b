"""Explorations: the ends of the frontier, prices by StepPlan's own sums, pictures by `halfstep sample`, saved pipelines
read back; nonsense is refused."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from banks import slim_bank
from halfstep.app import verbs
from halfstep.app.exploring import (
    MOST_FRAMES,
    MOST_PICTURES,
    Asked,
    Exploration,
    difference,
    explore,
    ms_of,
    progress,
)
from halfstep.core.disk import append_record, write_json
from halfstep.core.errors import HalfstepError, PlanError, RunError
from halfstep.core.plan import Correction
from halfstep.core.process import Process
from halfstep.core.recipe import Recipe, RunRecord, SampleSpec
from halfstep.data.pictures import read_picture
from halfstep.engine.sampling import reference_plan
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.search.scores import Scored, Stretch, digest_in

RECIPE = Recipe().edit(["sample.steps=8"])


def line_of(bank, plan, score, stage="fit", images=16, seed=2) -> Scored:
    """A line of scores.jsonl, as a search writes it."""
    kinds = itertools.groupby(plan.rows, key=lambda row: (row.entry, row.correction, row.guide))
    return Scored(
        stage=stage, digest=digest_in(bank, plan), macs=plan.macs, share=plan.share, score=score, images=images,
        seed=seed, steps=plan.sampler.steps, corrected=plan.corrected,
        plan=tuple(Stretch(len(list(rows)), *kind) for kind, rows in kinds),
    )  # fmt: skip


def write_run(folder, pipeline=True, strange=False):
    """A run of a search, with what it measured: three plans worth having, one that is none, one on other noise, and a
    `strange` one of other weights."""
    bank = slim_bank()
    today = reference_plan(bank, Process(), SampleSpec(steps=8))  # each twice as many calls as the one before
    few = reference_plan(bank, Process(), SampleSpec(scheduler="dpmsolver++", steps=4))
    fewest = reference_plan(bank, Process(), SampleSpec(scheduler="dpmsolver++", steps=2))
    mixed = few.with_entries(["w0.25", "full", "full", "full"]).with_corrections([Correction(1.1, 0.0)] * 4)
    StepAwarePipeline(bank, mixed).save_pretrained(folder / ("pipeline" if pipeline else "model/pipeline"))
    model = str(folder / "model" / "pipeline")
    record = RunRecord(inputs={"verb": "search", "model": model, "data": "digits"}, recipe=RECIPE)
    write_json(folder / "recipe.json", record.to_json())
    lines = [
        line_of(bank, today, 1.0, "reference"),
        line_of(bank, fewest, 9.0),
        line_of(bank, mixed, 4.0),
        line_of(bank, today.uniform("w1.00"), 20.0),
        *([replace(line_of(bank, few, 0.5), digest="0" * 16)] if strange else []),
        line_of(bank, few, 0.1, "final", images=64, seed=3),
    ]
    for one in lines:
        append_record(folder / "scores.jsonl", one.to_json())
    return {"today": today, "cheapest": fewest, "mixed": mixed}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    plans = write_run(folder, strange=True)
    return folder, plans, explore(str(folder), RECIPE)


def test_the_frontier_is_of_measured_plans_alone_by_price_here(run):
    _, plans, explored = run
    assert [one.score for one in explored.plans] == [9.0, 4.0, 1.0]
    assert [one.plan.digest for one in explored.plans] == [plans[n].digest for n in ("cheapest", "mixed", "today")]
    assert sorted(one.ms for one in explored.plans) == [one.ms for one in explored.plans]
    assert explored.unknown == 1


def test_the_ends_of_the_slider_are_the_cheapest_and_the_dearest(run):
    _, _, explored = run
    least, middle, most = explored.plans
    assert explored.at(0) == explored.at(least.ms) == least and explored.at(1e9) == explored.at(most.ms) == most
    assert explored.at(middle.ms) == explored.at((middle.ms + most.ms) / 2) == middle


def test_an_edit_is_priced_as_the_sum_of_its_calls_and_the_fixed_part(run):
    _, _, explored = run
    before = explored.at(1e9).plan
    after = explored.edited(before, 2, "w0.50")
    assert after.entries == ("full", "full", "w0.50", *["full"] * 5)
    us = {name: price.us for name, price in after.prices.items()}
    assert math.isclose(ms_of(after), (7 * us["full"] + us["w0.50"] + after.fixed.us) / 1e3, rel_tol=1e-9)
    assert after.macs == before.macs - before.prices["full"].macs + before.prices["w0.50"].macs
    assert explored.edited(after, 2, "full").digest == before.digest
    assert explored.call_at(after, 2) == "w0.50"
    mixed = explored.plans[1].plan
    assert [row.corrected for row in explored.edited(mixed, 1, "w0.50").rows] == [True, False, True, True]


def test_pictures_are_those_of_halfstep_sample(run, tmp_path):
    folder, _, explored = run
    verbs.sample(str(folder), tmp_path / "out", replace(RECIPE, seed=5), count=5)
    wanted = np.stack([read_picture(tmp_path / "out" / f"{k:06d}.png") for k in range(5)])
    found = explored.drawn(explored.plans[1].plan, Asked(count=5, seed=5))
    assert found.dtype == np.uint8 and np.array_equal(found, wanted)
    assert np.array_equal(explored.drawn(explored.plans[1].plan, Asked(count=5, seed=5)), wanted)
    assert not np.array_equal(explored.drawn(explored.reference, Asked(count=5, seed=5)), wanted)


def test_a_film_begins_with_noise_and_ends_with_the_pictures(run):
    _, _, explored = run
    plan = explored.plans[2].plan
    frames = explored.film(plan, Asked(count=4, seed=7))
    assert [frame.row for frame in frames] == [None, *range(8)]
    assert np.array_equal(frames[-1].pictures, explored.drawn(plan, Asked(count=4, seed=7)))
    assert "row 8 of 8" in frames[-1].told and "full" in frames[-1].told


def test_a_long_film_is_thinned_and_has_its_end(run):
    _, _, explored = run
    plan = reference_plan(explored.bank, Process(), SampleSpec(steps=130))
    frames = explored.film(explored.priced(plan), Asked(count=1))
    assert len(frames) <= MOST_FRAMES + 2 and frames[-1].row == 129


def test_what_is_saved_loads_and_draws_the_same(run):
    folder, _, explored = run
    plan = explored.edited(explored.plans[0].plan, 1, "full")
    place = explored.save(plan, "kept-1")
    assert place == folder / "studio" / "kept-1" and "kept-1" in explored.saved()
    pipe = StepAwarePipeline.from_pretrained(place)
    pictures = pipe(batch_size=3, seed=1, output_type="pt").images * 2 - 1
    wanted = explored.drawn(plan, Asked(count=3, seed=1))
    assert np.array_equal(((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy(), wanted)
    assert explored.opened("kept-1").digest == plan.digest
    alone = explored.subject  # a pipeline of which nothing was measured
    ladder = Exploration(alone, explored.bank, [], None, place).plans
    assert all(one.score is None for one in ladder) and alone.plan.digest in [one.plan.digest for one in ladder]
    with pytest.raises(RunError, match="taken"):
        explored.save(plan, "kept-1")


@pytest.mark.parametrize(
    "name", ["", "..", "../out", "/tmp/x", "a/b", "a\\b", ".hidden", "a" * 41, "a\n", None, 3, ["a"]]
)
def test_names_that_lead_elsewhere_are_refused(run, name):
    _, _, explored = run
    for act in (lambda: explored.save(explored.reference, name), lambda: explored.opened(name)):
        with pytest.raises(RunError, match="name"):
            act()


def test_a_link_out_of_the_run_is_not_followed(run, tmp_path):
    folder, _, explored = run
    (folder / "studio").mkdir(exist_ok=True)
    (folder / "studio" / "led").symlink_to(tmp_path)
    with pytest.raises(RunError, match="elsewhere"):
        explored.save(explored.reference, "led")
    with pytest.raises(RunError, match="elsewhere"):
        explored.opened("led")
    (folder / "studio" / "led").unlink()
    assert list(tmp_path.iterdir()) == []


NONSENSE = [None, "3", "x" * 10_000, [], {}, True, math.nan, math.inf, -1, 1e18, 10**400, 1.5]


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: str(value)[:8])
def test_nonsense_is_refused_by_name(run, value):
    _, _, explored = run
    plan = explored.reference
    refused = [
        lambda: explored.edited(plan, value, "full"),
        lambda: explored.edited(plan, 0, value),
        lambda: explored.drawn(plan, Asked(count=value)),
        lambda: explored.drawn(plan, Asked(seed=-1 if value == 10**18 else value)),
        lambda: explored.film(plan, Asked(count=value)),
        lambda: explored.drawn(plan, Asked(prompt=[] if value == "3" else value)),
        lambda: explored.film(plan, Asked(label={1: 1} if value in (None, "3", [], {}) else value)),
    ]
    for act in refused:
        with pytest.raises(HalfstepError) as error:
            act()
        assert len(str(error.value)) < 1000
    if value not in (1.5, 1e18):
        with pytest.raises(PlanError, match="milliseconds"):
            explored.at(value)


def test_bounds_and_classes_that_there_are_not_are_refused(run):
    _, _, explored = run
    for asked in (Asked(count=MOST_PICTURES + 1), Asked(count=0), Asked(seed=2**63)):
        with pytest.raises(PlanError):
            explored.drawn(explored.reference, asked)
    with pytest.raises(PlanError, match="row 1"):
        explored.edited(explored.reference, 0, "full|nonsense*2")


def test_a_run_that_is_still_being_written_is_read_as_far_as_it_is(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, pipeline=False)
    append_record(folder / "log.jsonl", {"step": 40, "loss": 0.125})
    with (folder / "scores.jsonl").open("a") as file:
        file.write('{"stage": "fit", "dig')  # a line that is being written
    explored = explore(str(folder), RECIPE)
    assert [one.score for one in explored.plans] == [9.0, 4.0, 1.0] and explored.folder == folder
    found = progress(folder)
    assert not found.done and found.stages == (("reference", 16, 1, 1.0), ("fit", 16, 3, 4.0), ("final", 64, 1, 0.1))
    assert "not finished; 5 plans measured; trained to step 40, loss 0.125; last record" in found.told
    listing = {path.name for path in folder.iterdir()}
    assert listing == {"model", "recipe.json", "log.jsonl", "scores.jsonl"}  # looking leaves nothing


def test_what_is_measured_meanwhile_is_taken_in(run):
    _, _, explored = run
    before = explored.plans
    better = explored.plans[0].plan.with_entries(["w0.25", "w0.50"])
    explored.take([line_of(explored.bank, better, 0.01), line_of(explored.bank, explored.reference, 0.5)])
    assert [one.plan.digest for one in explored.plans] == [better.digest]
    explored.plans = before


def test_a_run_of_no_model_is_refused(tmp_path):
    record = RunRecord(inputs={"verb": "train", "model": "", "data": "digits"}, recipe=RECIPE)
    write_json(tmp_path / "recipe.json", record.to_json())
    with pytest.raises(HalfstepError, match="without a model"):
        explore(str(tmp_path), RECIPE)


def test_damaged_scores_are_one_line(tmp_path):
    write_run(tmp_path)
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    (tmp_path / "scores.jsonl").write_text("\n".join([json.dumps([1]), *lines]) + "\n")
    with pytest.raises(RunError):
        explore(str(tmp_path), RECIPE)


def test_the_difference_is_absolute_and_symmetric():
    one, other = np.array([[0, 255, 9]], np.uint8), np.array([[255, 0, 10]], np.uint8)
    assert difference(one, other).tolist() == difference(other, one).tolist() == [[255, 255, 1]]


def test_an_exploration_keeps_a_bounded_number_of_grids(run):
    _, _, explored = run
    for seed in range(40):
        explored.drawn(explored.plans[0].plan, Asked(count=1, seed=seed))
    assert isinstance(explored, Exploration) and len(explored._drawn) <= 24


def test_the_bundled_scores_are_of_the_bundled_bank():
    explored = explore("fashion", Recipe())
    assert explored.unknown == 0 and explored.plans[-1].score is not None and explored.folder is None
