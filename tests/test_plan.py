"""Oracles: plain sums over the rows, plans by hand, JSON round trips, Python's contract of equality and hash."""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.errors import PlanError, RunError
from halfstep.plan import Row, StepPlan

MACS = {"full": 100, "w0.50": 25, "w0.25": 7}
unhurried = settings(deadline=None)


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


@st.composite
def any_plan(draw):
    """Any names, timesteps, costs and (JSON-shaped) scheduler config."""
    macs = draw(st.dictionaries(st.text(min_size=1, max_size=8), st.integers(1, 10**13), min_size=1, max_size=5))
    names = st.sampled_from(sorted(macs))
    row = st.builds(Row, st.floats(0, 1e4, allow_nan=False), names, st.floats(0.1, 2), st.floats(0, 1))
    value = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5)
    )
    return StepPlan(
        rows=tuple(draw(st.lists(row, min_size=1, max_size=25))),
        scheduler=draw(st.text(min_size=1, max_size=8)),
        scheduler_config=draw(
            st.dictionaries(st.text(max_size=5), value | st.lists(value, max_size=3) | st.none(), max_size=4)
        ),
        steps=draw(st.integers(1, 1000)),
        reference=draw(names),
        entry_macs=macs,
    )


PLANS = st.lists(st.sampled_from(list(MACS)), min_size=1, max_size=40).map(plan_of) | any_plan()


@unhurried
@given(PLANS)
def test_price_is_the_sum_of_the_steps_and_json_round_trips(plan):
    total = 0
    for row in plan.rows:
        total += plan.entry_macs[row.entry]
    assert plan.macs == total
    assert plan.mean_macs == total / len(plan.rows)
    assert plan.share == pytest.approx(total / plan.uniform().macs)
    again = StepPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and hash(again) == hash(plan)


@unhurried
@given(PLANS)
def test_runs_cover_every_row_in_order(plan):
    runs = plan.runs()
    expanded = [entry for entry, _, _, count in runs for _ in range(count)]
    assert tuple(expanded) == plan.entries
    assert all(a[0] != b[0] for a, b in itertools.pairwise(runs))  # as long as can be
    start = 0
    for _, first, last, count in runs:
        assert (first, last) == (plan.rows[start].timestep, plan.rows[start + count - 1].timestep)
        start += count


@unhurried
@given(PLANS)
def test_printing_explains_cost_and_stretches(plan):
    text = str(plan)
    assert "MMACs per image" in text and all(entry in text for entry in set(plan.entries))
    assert f"{plan.macs / 1e6:,.1f} MMACs" in text and f"{plan.steps} steps" in text
    assert f"{len(plan.rows)} network calls" in text
    saving = 1 - plan.share
    assert f"{abs(saving):.0%} {'less' if saving >= 0 else 'more'} than {plan.reference!r} everywhere" in text


def test_a_known_plan_prints_its_totals():
    plan = replace(
        plan_of(["full", "full", "w0.50", "full"]), entry_macs={"full": 2_000_000_000, "w0.50": 500_000_000, "w0.25": 1}
    )
    first, *stretches = str(plan).splitlines()
    assert first == "DDIMScheduler, 4 steps, 4 network calls: 6,500.0 MMACs per image, 19% less than 'full' everywhere"
    assert [line.split()[4:7] for line in stretches] == [
        ["full", "2", "calls"],
        ["w0.50", "1", "calls"],
        ["full", "1", "calls"],
    ]


@unhurried
@given(PLANS, st.randoms(use_true_random=False))
def test_other_entries_change_the_entries_and_nothing_else(plan, random):
    entries = [random.choice(sorted(plan.entry_macs)) for _ in plan.rows]
    other = plan.with_entries(entries)
    assert other.entries == tuple(entries) and isinstance(other.rows, tuple)
    assert [row.timestep for row in other.rows] == [row.timestep for row in plan.rows]
    assert other.with_entries(plan.entries).with_corrections(plan.corrections) == plan
    assert replace(other, rows=plan.rows) == plan
    assert set(plan.uniform().entries) == {plan.reference} and plan.uniform().share == 1
    assert set(plan.uniform(entries[0]).entries) == {entries[0]}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(StepPlan)])
def test_a_plan_is_immutable(field):
    plan = plan_of(["full"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(plan, field, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.rows[0].entry = "w0.50"
    assert isinstance(plan.rows, tuple) and isinstance(StepPlan.from_json(plan.to_json()).rows, tuple)


def test_equal_plans_have_one_hash_whatever_the_order_of_their_settings():
    plan = replace(plan_of(["full", "w0.50"]), scheduler_config={"beta_start": 1e-4, "beta_end": 0.02})
    same = replace(plan, scheduler_config={"beta_end": 0.02, "beta_start": 1e-4})
    assert plan == same and hash(plan) == hash(same)
    other = plan.with_entries(["w0.50", "full"])
    assert len({plan, same, other}) == 2


def test_a_correction_belongs_to_its_entry_and_is_told():
    plan = plan_of(["full", "w0.50"])
    corrected = plan.with_corrections([(0.9, 0.0), (0.95, 0.05)])
    assert corrected.corrected and corrected.entries == plan.entries and corrected.macs == plan.macs
    assert "scaled by 0.9 to 0.95" in str(corrected) and "scaled" not in str(plan)
    assert corrected.with_entries(plan.entries) == plan and corrected.with_corrections([(1.0, 0.0)] * 2) == plan
    with pytest.raises(PlanError):
        plan.with_corrections([(1.0, 0.0)])


@pytest.mark.parametrize("entries", [[], ["full"], ["full", "nobody"], ["full", "full", "full"]])
def test_wrong_entries_are_refused(entries):
    with pytest.raises(PlanError) as error:
        plan_of(["full", "w0.50"]).with_entries(entries)
    assert "\n" not in str(error.value)
    if "nobody" in entries:
        assert "'nobody'" in str(error.value) and all(name in str(error.value) for name in MACS)


def test_no_rows_and_unknown_names_are_refused():
    with pytest.raises(PlanError):
        plan_of([])
    with pytest.raises(PlanError):
        plan_of(["full"], reference="nobody")
    with pytest.raises(PlanError):
        plan_of(["nobody"])
    with pytest.raises(PlanError):
        plan_of(["full"]).uniform("nobody")


@pytest.mark.parametrize("field", ["rows", "scheduler", "scheduler_config", "steps", "reference", "entry_macs"])
def test_a_file_without_a_field_or_with_a_wrong_one_is_refused(field, tmp_path):
    record = plan_of(["full", "w0.25"]).to_json()
    for broken in ({k: v for k, v in record.items() if k != field}, {**record, field: None}):
        (tmp_path / "plan.json").write_text(json.dumps(broken))
        if broken.get(field, 0) is None and field in ("scheduler", "reference"):
            continue
        with pytest.raises(PlanError) as error:
            StepPlan.load(tmp_path / "plan.json")
        assert "\n" not in str(error.value) and str(tmp_path / "plan.json") in str(error.value)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(RunError):
        StepPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "edit",
    [
        {"rows": [[999.0]]},
        {"rows": [["late", "full"]]},
        {"rows": [[999.0, "full", 0.0, 0.0]]},
        {"rows": [[999.0, "full", 1.0, -0.1]]},
        {"rows": [[999.0, "full", float("nan"), 0.0]]},
        {"rows": [[999.0, "full", 1.0, 0.0, 3.0]]},
        {"rows": "full"},
        {"rows": 3},
        {"steps": "many"},
        {"steps": float("inf")},
        {"entry_macs": ["full"]},
        {"entry_macs": {"full": "heavy"}},
        {"entry_macs": {"full": float("nan")}},
        {"entry_macs": {"full": float("inf")}},
        {"scheduler_config": 5},
        {"reference": "nobody"},
        {"rows": []},
    ],
    ids=str,
)
def test_a_plan_of_another_shape_is_refused_in_one_line(edit, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({**plan_of(["full", "w0.25"]).to_json(), **edit}))
    with pytest.raises((PlanError, RunError)) as error:  # what is no JSON is no file that can be read
        StepPlan.load(tmp_path / "plan.json")
    assert "\n" not in str(error.value)


def test_a_missing_plan_file_is_refused_by_name(tmp_path):
    with pytest.raises(RunError) as error:
        StepPlan.load(tmp_path / "nowhere.json")
    assert "nowhere.json" in str(error.value) and "\n" not in str(error.value)


@settings(deadline=None, max_examples=15)
@given(any_plan())
def test_save_and_load(tmp_path_factory, plan):
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(file)
    assert StepPlan.load(file) == plan


def test_a_plan_is_told_against_what_it_replaced_and_files_of_before_load(tmp_path):
    ten, fifty = (plan_of(["full"] * n) for n in (10, 50))
    chosen = ten.replacing(fifty)
    assert "80% less than 50 DDIM calls of 'full'" in str(chosen).splitlines()[0]
    assert "0% less than 'full' everywhere" in str(ten)
    assert StepPlan.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen
    assert "baseline" not in ten.to_json() and StepPlan.from_json(ten.to_json()).baseline is None
    for wrong in ("50 calls", {"what": 3, "macs": 1}, {"what": "x", "macs": -1}, {"what": "x", "macs": True}):
        with pytest.raises(PlanError, match=r"section|whole number|text"):
            StepPlan.from_json(ten.to_json() | {"baseline": wrong})


def nested(depth):
    return [] if not depth else [nested(depth - 1)]


HARMED = {
    "rows that are a number": {"rows": 3},
    "no rows": {"rows": []},
    "a row without an entry": {"rows": [[9.0]]},
    "a row of a number for a name": {"rows": [[9.0, 3]]},
    "a row of a text for a timestep": {"rows": [["9", "full"]]},
    "a row of one correction": {"rows": [[9.0, "full", 1.0]]},
    "a row of five": {"rows": [[9.0, "full", 1.0, 0.0, 2.0]]},
    "true for a timestep": {"rows": [[True, "full"]]},
    "a huge number of rows": {"rows": [[9.0, "full"]] * 100_001},
    "a scheduler that is a list": {"scheduler": ["DDIMScheduler"]},
    "a scheduler config that is a list": {"scheduler_config": [1]},
    "half a step": {"steps": 2.5},
    "no step": {"steps": 0},
    "steps by the billion": {"steps": 10**9},
    "a number for the reference": {"reference": 1},
    "a name of thousands of letters": {"reference": "x" * 5000},
    "MACs of no whole number": {"entry_macs": {"full": 1.5, "w0.50": 1}},
    "MACs of nothing": {"entry_macs": {"full": 0, "w0.50": 1}},
    "MACs below nothing": {"entry_macs": {"full": -5, "w0.50": 1}},
    "MACs beyond all": {"entry_macs": {"full": 10**40, "w0.50": 1}},
    "MACs of names nested": {"entry_macs": nested(30)},
    "a foreign field": {"script": "import os"},
    "a format of later": {"format": 2},
}


@pytest.mark.parametrize("how", HARMED)
def test_a_harmed_plan_is_refused_in_one_line_that_names_its_file(how, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan_of(["full", "w0.50"]).to_json() | HARMED[how]))
    with pytest.raises(PlanError) as error:
        StepPlan.load(file)
    assert str(file) in str(error.value) and len(str(error.value)) < 500 and "\n" not in str(error.value)
