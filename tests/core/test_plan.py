"""Oracles: plain sums over the rows, plans and files by hand, JSON round trips, Python's contract of equality."""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.core.errors import PlanError, RunError
from halfstep.core.plan import NONE, WORDS, Baseline, Correction, Guide, Price, Row, Sampler, StepPlan

MACS = {"full": 100, "w0.50": 25, "w0.25": 7}
unhurried = settings(deadline=None)


def plan_of(entries, reference="full"):
    rows = tuple(Row(float(1000 - 10 * i), e) for i, e in enumerate(entries))
    sampler, prices = Sampler("DDIMScheduler", {"beta_end": 0.02}, len(rows)), {n: Price(m) for n, m in MACS.items()}
    return StepPlan(rows=rows, sampler=sampler, reference=reference, prices=prices)


PRICES = st.builds(Price, st.integers(1, 10**13), st.none() | st.integers(0, 10**9))
CORRECTIONS = st.builds(Correction, st.floats(0.1, 2), st.floats(0, 1))
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)


@st.composite
def any_plan(draw):
    """Any names (but for what joins calls), timesteps, corrections, guides, costs and (JSON-shaped) config."""
    name = st.text(st.characters(codec="utf-8", exclude_characters="|*"), min_size=1, max_size=8)
    prices = draw(st.dictionaries(name, PRICES, min_size=1, max_size=5))
    names = st.sampled_from(sorted(prices))
    guides = st.none() | st.builds(Guide, names, st.floats(-5, 5))
    row = st.builds(Row, st.floats(0, 1e4, allow_nan=False), names, CORRECTIONS | st.just(NONE), guides)
    key = st.text(max_size=5).filter(lambda key: key not in WORDS)  # those have types of their own
    config = st.dictionaries(key, VALUES | st.lists(VALUES, max_size=3), max_size=4)
    return StepPlan(
        rows=tuple(draw(st.lists(row, min_size=1, max_size=25))),
        sampler=draw(st.builds(Sampler, st.text(min_size=1, max_size=8), config, st.integers(1, 1000))),
        reference=draw(names),
        prices=prices,
        fixed=draw(st.just(Price(0)) | PRICES),
        baseline=draw(st.none() | st.builds(Baseline, st.text(max_size=8), PRICES)),
    )


PLANS = st.lists(st.sampled_from(list(MACS)), min_size=1, max_size=40).map(plan_of) | any_plan()


@unhurried
@given(PLANS)
def test_price_is_the_sum_of_the_steps_and_json_round_trips(plan):
    total, times = 0, []
    for row in plan.rows:
        for name in [row.entry] if row.guide is None else [row.entry, row.guide.entry]:
            total += plan.prices[name].macs
            times.append(plan.prices[name].us)
    assert plan.macs == plan.price.macs == total and plan.whole.macs == total + plan.fixed.macs
    assert plan.price.us == (None if None in times else sum(times))
    assert plan.whole.us == (None if None in (*times, plan.fixed.us) else sum(times) + plan.fixed.us)
    assert plan.share == pytest.approx(total / plan.uniform().macs)
    again = StepPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and hash(again) == hash(plan) and again.digest == plan.digest
    assert again.to_json()["macs"] == total


@pytest.mark.parametrize("name", ["|", "full|", "full|slim*2", "a*b"])
def test_a_name_that_joins_calls_is_no_entry(name):
    with pytest.raises(PlanError, match=r"got entry .* expected a name without \| and \*"):
        StepPlan(
            rows=(Row(0.0, name),), sampler=Sampler("DDIMScheduler", {}, 1), reference=name, prices={name: Price(1)}
        )


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
    assert f"{plan.price} per image" in text and all(entry in text for entry in set(plan.entries))
    assert f"{plan.macs / 1e6:,.1f} MMACs" in text and text.startswith(plan.sampler.told)
    assert f"{len(plan.rows) + sum(guide is not None for guide in plan.guides)} network calls" in text
    saving = 1 - (plan.macs / plan.baseline.price.macs if plan.baseline else plan.share)
    what = plan.baseline.what if plan.baseline else f"{plan.reference!r} everywhere"
    assert f"{abs(saving):.0%} {'less' if saving >= 0 else 'more'} than {what}" in text
    assert ("beside the calls" in text) == (plan.fixed != Price(0)) and ("guided by" in text) == any(plan.guides)


def test_a_known_plan_prints_its_totals():
    prices = {"full": Price(2_000_000_000), "w0.50": Price(500_000_000), "w0.25": Price(1)}
    plan = replace(plan_of(["full", "full", "w0.50", "full"]), prices=prices)
    first, *stretches = str(plan).splitlines()
    assert first == "DDIM, 4 steps, 4 network calls: 6,500.0 MMACs per image, 19% less than 'full' everywhere"
    assert [line.split()[4:7] for line in stretches] == [
        ["full", "2", "calls"],
        ["w0.50", "1", "calls"],
        ["full", "1", "calls"],
    ]


@unhurried
@given(PLANS, st.randoms(use_true_random=False))
def test_other_entries_change_the_entries_and_nothing_else(plan, random):
    entries = [random.choice(sorted(plan.prices)) for _ in plan.rows]
    other = plan.with_entries(entries)
    assert other.entries == tuple(entries) and isinstance(other.rows, tuple)
    assert [row.timestep for row in other.rows] == [row.timestep for row in plan.rows]
    assert other.corrections == (NONE,) * len(plan.rows) and not any(other.guides)
    assert other.with_entries(plan.entries).with_corrections(plan.corrections).with_guides(plan.guides) == plan
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


def test_equal_plans_have_one_hash_and_one_digest_whatever_the_order_of_their_settings():
    settings = {"beta_start": 1e-4, "beta_end": 0.02, "trained_betas": [0.1, {"deep": 1}]}
    plan = replace(plan_of(["full", "w0.50"]), sampler=Sampler("DDIMScheduler", settings, 2))
    same = replace(plan, sampler=Sampler("DDIMScheduler", dict(reversed(settings.items())), 2))
    assert plan == same and hash(plan) == hash(same) and plan.digest == same.digest
    alike = replace(plan, sampler=Sampler("DDIMScheduler", settings | {"beta_start": 1, "beta_end": True}, 2))
    assert alike == replace(plan, sampler=Sampler("DDIMScheduler", settings | {"beta_start": 1.0, "beta_end": 1}, 2))
    assert len({alike.sampler, Sampler("DDIMScheduler", settings | {"beta_start": 1.0, "beta_end": 1}, 2)}) == 1
    other = plan.with_entries(["w0.50", "full"])
    assert len({plan, same, other}) == 2 and repr(plan.sampler) == "Sampler(name='DDIMScheduler', steps=2)"
    settings["beta_end"] = 0.5
    assert plan == same  # a sampler holds its own settings


def test_a_digest_hangs_on_what_decides_the_pictures_and_on_nothing_else():
    plan = plan_of(["full", "w0.50"])
    told = plan.replacing(plan_of(["full"] * 9))
    dearer = replace(told, prices={**plan.prices, "more": Price(9, 9)}, fixed=Price(3), reference="w0.50")
    assert len(plan.digest) == 16 and set(plan.digest) <= set("0123456789abcdef")
    assert plan.digest == told.digest == dearer.digest
    changed = [
        plan.with_entries(["w0.50", "full"]),
        plan.with_corrections([NONE, Correction(0.9)]),
        plan.with_guides([None, Guide("w0.25", 2.0)]),
        plan.with_guides([None, Guide("w0.25", 3.0)]),
        replace(plan, rows=(replace(plan.rows[0], timestep=1.0), plan.rows[1])),
        replace(plan, sampler=replace(plan.sampler, config={"beta_end": 0.03})),
        replace(plan, sampler=replace(plan.sampler, steps=3)),
        replace(plan, sampler=replace(plan.sampler, name="DDPMScheduler")),
    ]
    assert len({one.digest for one in (plan, *changed)}) == len({plan, *changed}) == 1 + len(changed)


@given(PRICES, PRICES, st.integers(0, 50))
def test_prices_add_and_multiply_as_their_numbers_do(a, b, count):
    assert (a + b).macs == a.macs + b.macs and (a * count).macs == a.macs * count
    assert (a + b).us == (None if a.us is None or b.us is None else a.us + b.us)
    assert a * count == sum([a] * count, Price(0, None if a.us is None else 0))
    assert a + b == b + a and str(a).count("ms") == (a.us is not None)


def test_a_price_is_told_in_millions_of_macs_and_in_milliseconds():
    assert str(Price(6_500_000_000)) == "6,500.0 MMACs" and str(Price(1_000_000, 12_340)) == "1.0 MMACs, 12.34 ms"


def test_a_correction_belongs_to_its_entry_and_is_told():
    plan = plan_of(["full", "w0.50"])
    corrected = plan.with_corrections([Correction(0.9), Correction(0.95, 0.05)])
    assert corrected.corrected and corrected.entries == plan.entries and corrected.macs == plan.macs
    assert "scaled by 0.9 to 0.95" in str(corrected) and "scaled" not in str(plan)
    assert corrected.with_entries(plan.entries) == plan and corrected.with_corrections([NONE] * 2) == plan
    with pytest.raises(PlanError):
        plan.with_corrections([NONE])


def test_guides_are_priced_told_and_belong_to_their_entry():
    plan = plan_of(["full", "full", "w0.50", "full"])
    weak, other = Guide("w0.25", 2.0), Guide("w0.50", 1.5)
    guided = plan.with_guides([weak, weak, None, other])
    assert guided.entries == plan.entries and guided.nets == ("full", "w0.25", "w0.50") and len(guided.called) == 7
    assert guided.macs == plan.macs + 2 * MACS["w0.25"] + MACS["w0.50"]
    first, *lines = str(guided).splitlines()
    assert ", 7 network calls: " in first
    assert lines[-2:] == [
        "  t   1000 …    990  guided by w0.25, weight 2: 2 more calls at   7% of the reference",
        "  t    970 …    970  guided by w0.50, weight 1.5: 1 more calls at  25% of the reference",
    ]
    assert guided.with_corrections([Correction(0.9)] * 4).guides == guided.guides
    assert guided.with_entries(plan.entries) == plan and guided.uniform() == plan.uniform()
    for wrong in (
        [weak],
        [Guide("nobody", 2.0)] * 4,
        [Guide("full", float("inf"))] * 4,
        [Guide("full", float("nan"))] * 4,
    ):
        with pytest.raises(PlanError):
            plan.with_guides(wrong)


def test_what_a_trajectory_costs_beside_its_calls_is_told_and_is_no_part_of_shares():
    plan = plan_of(["full", "w0.50"])
    latent = replace(plan, fixed=Price(3_000_000))
    assert (latent.macs, latent.share, latent.whole) == (plan.macs, plan.share, Price(3_000_125))
    *same, last = str(latent).splitlines()
    assert same == str(plan).splitlines() and last == "  beside the calls 3.0 MMACs per image, 3.0 MMACs in all"


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


@pytest.mark.parametrize("field", ["rows", "sampler", "reference", "prices", "format"])
def test_a_file_without_a_field_or_with_a_wrong_one_is_refused(field, tmp_path):
    record = plan_of(["full", "w0.25"]).to_json()
    for broken in ({k: v for k, v in record.items() if k != field}, {**record, field: None}):
        (tmp_path / "plan.json").write_text(json.dumps(broken))
        with pytest.raises(PlanError) as error:
            StepPlan.load(tmp_path / "plan.json")
        assert "\n" not in str(error.value) and str(tmp_path / "plan.json") in str(error.value)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(RunError):
        StepPlan.load(tmp_path / "plan.json")


ROW = {"timestep": 999.0, "entry": "full"}


@pytest.mark.parametrize(
    "edit",
    [
        {"rows": [{"timestep": 999.0}]},
        {"rows": [{"timestep": "late", "entry": "full"}]},
        {"rows": [[999.0, "full"]]},
        {"rows": [ROW | {"correction": {"scale": 0.0, "threshold": 0.0}}]},
        {"rows": [ROW | {"correction": {"scale": 1.0, "threshold": -0.1}}]},
        {"rows": [ROW | {"correction": {"scale": float("nan"), "threshold": 0.0}}]},
        {"rows": [ROW | {"correction": {"scale": 1.0, "threshold": 0.0, "more": 3.0}}]},
        {"rows": [ROW | {"correction": [1.0, 0.0]}]},
        {"rows": [ROW | {"guide": {"entry": "full"}}]},
        {"rows": [ROW | {"guide": {"entry": "nobody", "weight": 2.0}}]},
        {"rows": [ROW | {"guide": {"entry": "full", "weight": "much"}}]},
        {"rows": [ROW | {"guide": "full"}]},
        {"rows": "full"},
        {"rows": 3},
        {"sampler": "DDIMScheduler"},
        {"sampler": {"name": "DDIMScheduler", "config": {}, "steps": "many"}},
        {"sampler": {"name": "DDIMScheduler", "config": {}, "steps": float("inf")}},
        {"sampler": {"name": "DDIMScheduler", "config": 5, "steps": 3}},
        {"sampler": {"name": "DDIMScheduler", "config": {}}},
        {"prices": ["full"]},
        {"prices": {"full": 100}},
        {"prices": {"full": {"macs": "heavy"}}},
        {"prices": {"full": {"macs": float("nan")}}},
        {"prices": {"full": {"macs": 100, "us": -1}}},
        {"prices": {"full": {"macs": 100, "us": 0.5}}},
        {"fixed": {"macs": -1}},
        {"fixed": 3},
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


def test_a_plan_is_told_against_what_it_replaced():
    ten, fifty = (plan_of(["full"] * n) for n in (10, 50))
    chosen = ten.replacing(fifty)
    assert chosen.baseline == Baseline("50 DDIM calls of 'full'", fifty.price)
    assert "80% less than 50 DDIM calls of 'full'" in str(chosen).splitlines()[0]
    assert "0% less than 'full' everywhere" in str(ten)
    assert StepPlan.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen
    assert "baseline" not in ten.to_json() and StepPlan.from_json(ten.to_json()).baseline is None
    wrong = ("50 calls", {"what": 3, "price": {"macs": 1}}, {"what": "x", "price": {"macs": -1}})
    for one in (*wrong, {"what": "x", "price": {"macs": True}}, {"what": "x", "macs": 1}, {"what": "x"}):
        with pytest.raises(PlanError, match=r"section|whole number|text|price|a known field"):
            StepPlan.from_json(ten.to_json() | {"baseline": one})
    with pytest.raises(PlanError, match="0 MACs"):
        StepPlan.from_json(ten.to_json() | {"baseline": {"what": "x", "price": {"macs": 0}}})


FORMAT_1 = {  # as halfstep wrote it up to 2026-11-26
    "plain": """{"format": 1, "scheduler": "DDIMScheduler", "scheduler_config":
        {"beta_end": 0.02, "trained_betas": null}, "steps": 2,
        "reference": "full", "entry_macs": {"full": 100, "w0.50": 25}, "macs": 125,
        "rows": [[500.0, "full"], [0.0, "w0.50"]]}""",
    "corrected": """{"format": 1, "scheduler": "HeunDiscreteScheduler", "scheduler_config": {}, "steps": 2,
        "reference": "full", "entry_macs": {"full": 100, "w0.50": 25}, "macs": 300,
        "rows": [[999.0, "full", 0.98, 0.0], [0, "full"], [0.0, "full", 1.0, 0.01]]}""",
    "told against a baseline": """{"format": 1, "scheduler": "DDPMScheduler", "scheduler_config": {}, "steps": 1,
        "reference": "full", "entry_macs": {"full": 100}, "macs": 100, "rows": [[0.0, "full"]],
        "baseline": {"what": "50 DDPM calls of 'full'", "macs": 5000}}""",
    "without a format": """{"scheduler": "DDPMScheduler", "scheduler_config": {}, "steps": 1, "reference": "full",
        "entry_macs": {"full": 100}, "rows": [[0.0, "full"]]}""",
}
CHEAP = {"full": Price(100), "w0.50": Price(25)}
LOADED = {
    "plain": StepPlan(
        rows=(Row(500.0, "full"), Row(0.0, "w0.50")),
        sampler=Sampler("DDIMScheduler", {"beta_end": 0.02, "trained_betas": None}, 2),
        reference="full",
        prices=CHEAP,
    ),
    "corrected": StepPlan(
        rows=(
            Row(999.0, "full", Correction(scale=0.98)),
            Row(0.0, "full"),
            Row(0.0, "full", Correction(threshold=0.01)),
        ),
        sampler=Sampler("HeunDiscreteScheduler", {}, 2),
        reference="full",
        prices=CHEAP,
    ),
    "told against a baseline": StepPlan(
        rows=(Row(0.0, "full"),),
        sampler=Sampler("DDPMScheduler", {}, 1),
        reference="full",
        prices={"full": Price(100)},
        baseline=Baseline("50 DDPM calls of 'full'", Price(5000)),
    ),
    "without a format": StepPlan(
        rows=(Row(0.0, "full"),), sampler=Sampler("DDPMScheduler", {}, 1), reference="full", prices={"full": Price(100)}
    ),
}


@pytest.mark.parametrize("how", FORMAT_1)
def test_a_file_of_before_loads_as_it_was(how, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(FORMAT_1[how])
    plan = StepPlan.load(file)
    assert plan == LOADED[how]
    plan.save(file)
    assert json.loads(file.read_text())["format"] == 2 and StepPlan.load(file) == plan
    if how != "without a format":
        assert plan.to_content() == json.loads(FORMAT_1[how])  # a run begun with it resumes
    guided = plan.with_guides([Guide("full", 2.0)] * len(plan.rows))
    assert guided.to_content() == guided.to_json()


@pytest.mark.parametrize(
    "edit",
    [
        {"rows": [[999.0]]},
        {"rows": [[999.0, "full", 0.9]]},
        {"rows": [[999.0, "full", 0.0, 0.0]]},
        {"rows": [[999.0, "full", 1.0, 0.0, 2.0]]},
        {"rows": [{"timestep": 999.0, "entry": "full"}]},
        {"entry_macs": {"full": 0}},
        {"entry_macs": {"full": 10**40}},
        {"scheduler": ["DDIMScheduler"]},
        {"baseline": {"what": "x", "macs": 0}},
        {"prices": {"full": {"macs": 1}}},
        {"sampler": {"name": "DDIMScheduler", "config": {}, "steps": 1}},
        {"format": 1.5},
        {"format": True},
    ],
    ids=str,
)
def test_a_harmed_file_of_before_is_refused_in_one_line_that_names_it(edit, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(json.loads(FORMAT_1["told against a baseline"]) | edit))
    with pytest.raises(PlanError) as error:
        StepPlan.load(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def nested(depth):
    return [] if not depth else [nested(depth - 1)]


def sampled(**changes):
    return {"sampler": {"name": "DDIMScheduler", "config": {}, "steps": 2} | changes}


HARMED = {
    "rows that are a number": {"rows": 3},
    "no rows": {"rows": []},
    "a row without an entry": {"rows": [{"timestep": 9.0}]},
    "a row of a number for a name": {"rows": [{"timestep": 9.0, "entry": 3}]},
    "a row of a text for a timestep": {"rows": [{"timestep": "9", "entry": "full"}]},
    "a row of an entry that is not there": {"rows": [{"timestep": 9.0, "entry": "nobody"}]},
    "a row of a foreign field": {"rows": [{"timestep": 9.0, "entry": "full", "cache": 2}]},
    "a row by position": {"rows": [[9.0, "full"]]},
    "true for a timestep": {"rows": [{"timestep": True, "entry": "full"}]},
    "a huge number of rows": {"rows": [{"timestep": 9.0, "entry": "full"}] * 100_001},
    "a scheduler that is a list": sampled(name=["DDIMScheduler"]),
    "a scheduler config that is a list": sampled(config=[1]),
    "a number for a spacing": sampled(config={"timestep_spacing": 1}),
    "a list for an algorithm": sampled(config={"algorithm_type": ["dpmsolver"]}),
    "a text for an order": sampled(config={"solver_order": "two"}),
    "half a step": sampled(steps=2.5),
    "no step": sampled(steps=0),
    "steps by the billion": sampled(steps=10**9),
    "a number for the reference": {"reference": 1},
    "a name of thousands of letters": {"reference": "x" * 5000},
    "MACs of no whole number": {"prices": {"full": {"macs": 1.5}, "w0.50": {"macs": 1}}},
    "MACs of nothing": {"prices": {"full": {"macs": 0}, "w0.50": {"macs": 1}}},
    "MACs below nothing": {"prices": {"full": {"macs": -5}, "w0.50": {"macs": 1}}},
    "MACs beyond all": {"prices": {"full": {"macs": 10**40}, "w0.50": {"macs": 1}}},
    "MACs of names nested": {"prices": nested(30)},
    "a foreign field": {"script": "import os"},
    "a field of before": {"steps": 2},
    "a format of later": {"format": 3},
}


@pytest.mark.parametrize("how", HARMED)
def test_a_harmed_plan_is_refused_in_one_line_that_names_its_file(how, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan_of(["full", "w0.50"]).to_json() | HARMED[how]))
    with pytest.raises(PlanError) as error:
        StepPlan.load(file)
    assert str(file) in str(error.value) and len(str(error.value)) < 500 and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------- guidance

CALLS = {
    "full": ("full", Guide("full", 3.0)),
    "full|": ("full", None),
    "full|w0.25": ("full", Guide("w0.25", 3.0)),
    "full|w0.25*2": ("full", Guide("w0.25", 2.0)),
    "w0.25|w0.25*1": ("w0.25", None),
    "w0.25": ("w0.25", Guide("w0.25", 3.0)),
}


def test_the_name_of_a_call_says_what_guides_a_row():
    plan = plan_of(["full"] * len(CALLS)).with_guidance(3.0)
    found = plan.with_entries(list(CALLS))
    assert [(row.entry, row.guide) for row in found.rows] == list(CALLS.values())
    prices = [plan.price_of(name) for name in CALLS]
    assert sum(price.macs for price in prices) == found.macs
    assert plan.price_of("full").macs == 2 * MACS["full"] and plan.share == 1
    assert plan.uniform("full|").share == 0.5 and plan.with_entries(plan.entries) == plan


def test_a_guided_plan_is_stored_with_its_guidance(tmp_path):
    plan = plan_of(["full", "w0.25"]).with_guidance(2.5)
    plan.save(tmp_path / "plan.json")
    found = StepPlan.load(tmp_path / "plan.json")
    assert found == plan and found.guidance == 2.5 and found.uniform() == plan.uniform()
    assert "guidance" not in plan_of(["full"]).to_json()


@pytest.mark.parametrize("name", ["full|w0.25*much", "nobody", "full|nobody"])
def test_calls_that_are_none_are_refused(name):
    with pytest.raises(PlanError):
        plan_of(["full", "full"]).with_guidance(2.0).with_entries([name, "full"])
