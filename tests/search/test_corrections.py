"""Training-free corrections on digits; oracles: the measured files, direct scores, stock settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.app import verbs
from halfstep.core.errors import HalfstepError
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import Recipe
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.search.corrections import climb
from halfstep.search.scores import read_scores
from tiny import recipes

tiny = recipes("""
sample.steps=4 sample.scheduler=ddpm sample.batch=128 shrink.images=96 shrink.final_images=128 shrink.parts=2
shrink.scales=0.8,0.9,1.1 shrink.thresholds=0.1 eval.images=128 eval.bootstrap=20 eval.features=digits
""")


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "shrunk"
    verbs.shrink("digits", "digits", out, tiny())
    return out


def measured(folder: Path, stage: str) -> dict[tuple, float]:
    """The scores of a stage by the (scale, threshold) of every row."""
    found = [one for one in read_scores(folder) if one.stage == stage]
    return {tuple(part.correction for part in one.plan for _ in range(part.rows)): one.score for one in found}


def test_the_chosen_correction_is_the_best_on_fresh_seeds_and_ends_in_the_pipeline(shrunk):
    finals = measured(shrunk, "final corrections")
    best = min(finals, key=finals.__getitem__)
    pipe = StepAwarePipeline.from_pretrained(shrunk / "pipeline")
    assert pipe.plan.corrections == best
    assert pipe.plan == StepPlan.load(shrunk / "plan.json") and pipe.plan.share == 1
    assert ((1.0, 0.0),) * 4 in finals
    page = (shrunk / "report.html").read_text()
    assert "Scale at each call" in page and "What runs at each step" not in page  # one net runs at all of them


def test_each_walk_ends_where_both_neighbours_were_measured_and_are_no_better(shrunk):
    tried = measured(shrunk, "corrections")
    for kind, grid in ((0, (0.8, 0.9, 1.0, 1.1)), (1, (0.0, 0.1))):
        found = {value: tried.get(((value, 0.0) if kind == 0 else (1.0, value),) * 4) for value in grid}
        seen = [value for value in grid if found[value] is not None]
        best = grid.index(min(seen, key=lambda value: found[value]))
        assert set(grid[max(0, best - 1) : best + 2]) <= set(seen)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12), st.integers(0, 11), st.integers(0, 11))
def test_a_walk_finds_the_lowest_of_scores_that_fall_and_then_rise(steps, valley, start):
    """Oracle: all of the grid."""
    n, asked = len(steps), []
    valley, start = valley % n, start % n
    heights = [sum(1 + abs(s) for s in steps[min(i, valley) : max(i, valley)]) for i in range(n)]

    def score(value: int) -> float:
        asked.append(value)
        return heights[value]

    assert climb(range(n), start, score) == valley == min(range(n), key=heights.__getitem__)
    assert len(set(asked)) <= abs(valley - start) + 3  # the way, one further, and one to the other side


def test_shrinking_helps_five_ancestral_steps_as_the_paper_s_controls_do(shrunk):
    """Spec of regularised score matching, section 7: coarse ancestral sampling wants a smaller noise prediction."""
    plans = json.loads((shrunk / "quality.json").read_text())["plans"]
    assert plans["plan"]["quality"]["fd"]["value"] < plans["reference"]["quality"]["fd"]["value"]
    assert plans["plan"]["macs"] == plans["reference"]["macs"] and plans["40 steps, no correction"]["calls"] == 40


def test_a_finished_run_measures_nothing_again(shrunk):
    before = (shrunk / "scores.jsonl").read_bytes()
    verbs.shrink("digits", "digits", shrunk, tiny())
    assert (shrunk / "scores.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_step_aware_pipeline_keeps_its_own_plan_and_only_its_rows_are_corrected(shrunk, tmp_path):
    page = verbs.shrink(str(shrunk), "digits", tmp_path / "o", tiny("sample.steps=9", "eval.free=false"))
    assert page.is_file() and len(StepPlan.load(tmp_path / "o" / "plan.json").rows) == 4
    verbs.shrink(str(shrunk), "digits", tmp_path / "p", tiny("shrink.rounds=0", "eval.free=false"), steps=2)
    assert len(StepPlan.load(tmp_path / "p" / "plan.json").rows) == 2


@pytest.mark.slow
def test_a_model_that_predicts_the_clean_sample_is_corrected_too(tmp_path):
    edits = ["model.channels=8,16", "model.groups=4", "model.head_dim=4", "train.steps=2", "sample.steps=2"]
    more = ["data.size=8", "data.channels=1", "noise.prediction=sample", "train.batch=8"]
    dense = verbs.train("digits", tmp_path / "dense", Recipe().edit([*edits, *more]))
    verbs.shrink(str(dense), "digits", tmp_path / "o", tiny())
    pipe = StepAwarePipeline.from_pretrained(tmp_path / "o" / "pipeline")
    assert pipe.bank.prediction_type == "sample"
    assert len(measured(tmp_path / "o", "corrections")) > 3


def test_impossible_grids_are_refused():
    for edit in ("shrink.scales=0", "shrink.thresholds=-1", "shrink.parts=0"):
        with pytest.raises(HalfstepError):
            Recipe().edit([edit])
