"""Oracles: plain sums, JSON round trips."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.errors import PlanError, RunError
from halfstep.plan import Row, StepPlan

MACS = {"full": 100, "w0.50": 25, "w0.25": 7}


def plan_of(entries, reference="full"):
    rows = tuple(Row(float(1000 - 10 * i), e) for i, e in enumerate(entries))
    return StepPlan(
        rows=rows,
        scheduler="DDIMScheduler",
        scheduler_config={"beta_end": 0.02},
        steps=len(rows),
        reference=reference,
        entry_macs=MACS,
    )


PLANS = st.lists(st.sampled_from(list(MACS)), min_size=1, max_size=40).map(plan_of)


@given(PLANS)
def test_price_is_the_sum_of_the_steps_and_json_round_trips(plan):
    assert plan.macs == sum(MACS[row.entry] for row in plan.rows)
    assert plan.mean_macs == plan.macs / len(plan.rows)
    assert plan.share == pytest.approx(plan.macs / plan.uniform().macs)
    again = StepPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and hash(again) == hash(plan)


@given(PLANS)
def test_runs_cover_every_row_in_order(plan):
    expanded = [entry for entry, _, _, count in plan.runs() for _ in range(count)]
    assert tuple(expanded) == plan.entries


@given(PLANS)
def test_printing_explains_cost_and_stretches(plan):
    text = str(plan)
    assert "MMACs per image" in text and all(entry in text for entry in set(plan.entries))


def test_a_plan_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_of(["full"]).steps = 3


@pytest.mark.parametrize("entries", [["full"], ["full", "nobody"], ["full", "full", "full"]])
def test_wrong_entries_are_refused(entries):
    with pytest.raises(PlanError) as error:
        plan_of(["full", "w0.50"]).with_entries(entries)
    assert "\n" not in str(error.value)


def test_no_rows_and_unknown_reference_are_refused():
    with pytest.raises(PlanError):
        plan_of([])
    with pytest.raises(PlanError):
        plan_of(["full"], reference="nobody")


@pytest.mark.parametrize("field", ["rows", "scheduler", "scheduler_config", "steps", "reference", "entry_macs"])
def test_a_file_without_a_field_or_with_a_wrong_one_is_refused(field, tmp_path):
    record = plan_of(["full", "w0.25"]).to_json()
    for broken in ({k: v for k, v in record.items() if k != field}, {**record, field: None}):
        (tmp_path / "plan.json").write_text(json.dumps(broken))
        if broken.get(field, 0) is None and field in ("scheduler", "reference"):
            continue
        with pytest.raises(PlanError) as error:
            StepPlan.load(tmp_path / "plan.json")
        assert "\n" not in str(error.value)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(RunError):
        StepPlan.load(tmp_path / "plan.json")


def test_save_and_load(tmp_path):
    plan = plan_of(["w0.50", "full"])
    plan.save(tmp_path / "plan.json")
    assert StepPlan.load(tmp_path / "plan.json") == plan
