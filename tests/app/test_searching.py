"""What a search is asked for, and what it says before it begins."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from halfstep.app.searching import (
    FREE,
    LADDER,
    Goal,
    cheapest_that_holds,
    named_free,
    needed,
    place_of,
    require_reachable,
    reuse_of,
    with_int8,
    with_reuse,
    work_of,
)
from halfstep.app.subject import open_subject
from halfstep.core.errors import ModelError, PlanError, RecipeError, RunError
from halfstep.core.plan import Price
from halfstep.core.process import Process
from halfstep.core.recipe import Recipe, SampleSpec
from halfstep.core.results import Difference
from halfstep.core.watch import SILENT, Watch
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import reference_plan
from halfstep.engine.subject import Subject
from tiny import ode_unet, unet

BANK = Bank({"full": unet(0, channels=(16, 16)), "w0.50": unet(1)}, "full", "epsilon")
TODAY = reference_plan(BANK, Process(), SampleSpec(scheduler="ddim", steps=10))
TODAY = replace(
    TODAY,
    prices={name: replace(price, us={"full": 8.0, "w0.50": 2.0}[name]) for name, price in TODAY.prices.items()},
    fixed=Price(0, 20.0),
)  # 10 calls of 8 microseconds and 20 beside them: 100 an image


@pytest.mark.parametrize(
    ("budget", "unit", "limit"),
    [
        (0.5, "macs", TODAY.macs // 2),
        ("50%", "macs", TODAY.macs // 2),
        ("0.3t", "us", 30_000),
        ("1.6ms", "us", 25_000),  # a batch of 64
        ("2MMACs", "macs", 2_000_000),
    ],
)
def test_a_budget_is_a_limit_for_one_image_in_its_own_unit(budget, unit, limit):
    question = Goal.of(budget, None).question(TODAY, 64)
    assert question.unit == unit and question.limits == (pytest.approx(limit, abs=1),) and not question.beside
    assert question.price(TODAY) == (TODAY.macs if unit == "macs" else 100_000)


def test_a_tolerated_loss_is_asked_at_parts_of_todays_time():
    question = Goal.of(None, 0.05).question(TODAY, 64)
    assert question.limits == tuple(round(100_000 / part) for part in LADDER) and question.beside
    assert str(Goal.of(None, 0.05)) == "max-loss 0.05" and str(Goal.of("120ms", None)) == "budget 120ms"


@pytest.mark.parametrize(
    "given", [(None, None), (0.5, 0.1), (None, -1.0), ("2t", None), ("3parsecs", None), (0.0, None)]
)
def test_a_goal_is_exactly_one_thing_that_can_be_asked_for(given):
    with pytest.raises(PlanError) as error:
        Goal.of(*given)
    assert "\n" not in str(error.value)


def change(value: float, low: float, high: float) -> Difference:
    return Difference(
        value=value, low=low, high=high, share=value, relative_low=low, relative_high=high, fd_a=1.0, fd_b=1 + value,
        scale=1.0, least=10, n=100, features="f", reference="r", seed=0,
    )  # fmt: skip


def answer(name: str, fresh: float, *interval: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, fresh=fresh, change=change(*interval))


def test_the_cheapest_that_holds_is_taken_then_the_cheapest_that_seems_to_then_the_best():
    lost, open_, held = (
        answer("lost", 3.0, 2.0, 1.5, 2.5),
        answer("open", 1.0, 0.0, -0.3, 0.3),
        answer("held", 0.8, -0.2, -0.3, 0.0),
    )
    assert cheapest_that_holds([lost, open_, held], 0.05).name == "held"
    assert cheapest_that_holds([lost, open_], 0.05).name == "open"
    assert cheapest_that_holds([lost, answer("less", 2.0, 1.0, 0.5, 1.5)], 0.05).name == "less"


def test_what_is_run_today_is_its_own_best_free_where_no_other_is_as_good():
    assert named_free(("reference", TODAY), TODAY, {"plan": TODAY}) == (
        {"reference": TODAY, "plan": TODAY},
        "reference",
    )
    other = reference_plan(BANK, Process(), SampleSpec(scheduler="unipc", steps=5))
    assert list(named_free(("reference", TODAY), other, {"plan": TODAY})[0]) == ["reference", FREE, "plan"]


def test_a_budget_below_two_calls_of_the_cheapest_entry_is_refused_before_anything_is_done():
    least = 2 * TODAY.prices["w0.50"].macs
    require_reachable(Goal.of(f"{least / 1e6 + 0.001}MMACs", None), TODAY, BANK, 4)
    decoding = replace(TODAY, fixed=Price(10**9))  # is no network call: a share of the MACs is of the calls
    require_reachable(Goal.of(0.3, None), decoding, BANK, 4)
    for short, unit in ((f"{least / 2e6}MMACs", "MMACs"), ("0.00001t", "t"), ("0.01ms", "ms")):
        with pytest.raises(PlanError, match=rf"got .*, expected at least [\d.e-]+{unit}, the cheapest"):
            require_reachable(Goal.of(short, None), TODAY, BANK, 4)


def test_a_pipeline_is_stored_without_the_reuse_that_its_plan_does_not_run():
    bank = BANK.with_reuse([0, 1])
    plan = TODAY.with_entries(["full", "full"] * 5)
    assert list(needed(bank, plan)) == ["full", "w0.50"]
    reused = replace(reference_plan(bank, Process(), SampleSpec(scheduler="ddim", steps=2)))
    assert list(needed(bank, reused.with_entries(["full", "full~1"]))) == ["full", "w0.50", "full~1"]


def test_the_cuts_that_are_tried_cost_about_a_third_and_two_thirds():
    cuts = reuse_of(BANK)
    shares = [BANK.with_reuse([place_of(c)]).prices()[f"full~{c}"].macs / BANK.prices()["full"].macs for c in cuts]
    assert cuts == sorted(cuts, key=int) and all(0 < share < 1 for share in shares)
    assert reuse_of(Bank({"full": ode_unet()}, "full", "epsilon")) == ["out"]
    assert place_of("out") == "out" and place_of("2") == 2
    with pytest.raises(RecipeError, match=r"search\.reuse"):
        place_of("second")
    with pytest.raises(ModelError, match="got cut 99, expected 0 to"):
        with_reuse(BANK, ["99"], SILENT)
    assert list(with_reuse(BANK, [], SILENT)) == list(BANK)  # which has another stand-in
    assert "full~out" in with_reuse(Bank({"full": ode_unet()}, "full", "epsilon"), [], SILENT)


def test_the_work_that_is_announced_holds_the_references_and_the_finals():
    recipe = Recipe().edit(["search.images=100", "search.final_images=200", "eval.images=300"])
    work = work_of(Goal.of("0.1t", None).question(TODAY, 64), TODAY, recipe)
    assert sum(one.images for one in work if one.plan == TODAY) == 100 + 300
    asked = work_of(Goal.of(None, 0.05).question(TODAY, 64), TODAY, recipe)
    assert sum(one.images for one in asked if one.plan == TODAY) == 100 + 200 + 300
    without = work_of(Goal.of("0.1t", None).question(TODAY, 64), TODAY, recipe.edit(["eval.free=false"]))
    assert sum(one.images for one in without) < sum(one.images for one in work)


class Listening(Watch):
    def __init__(self):
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def opened(*edits: str) -> Subject:
    return open_subject("digits", None, Recipe().edit(["sample.steps=2", "search.precisions=int8", *edits]))


def test_eight_bits_are_left_out_where_nothing_is_faster_by_them(tmp_path):
    for runtime in ("eager", "compile"):
        subject, watch = opened(f"sample.runtime={runtime}"), Listening()
        assert with_int8(subject, subject.bank, tmp_path, watch) is subject.bank
        [said] = watch.said
        assert said.startswith(f"int8 is left out: sample.runtime={runtime} on cpu") and "\n" not in said
    assert not list(tmp_path.iterdir()), "nothing is calibrated"


def test_ranges_are_calibrated_once_for_a_run(tmp_path):
    pytest.importorskip("onnxruntime")
    subject = opened("sample.runtime=onnx")
    bank = with_int8(subject, subject.bank, tmp_path)
    file = tmp_path / "state" / "int8.json"
    before = file.read_bytes()
    again = with_int8(subject, subject.bank, tmp_path)
    assert file.read_bytes() == before and set(again.entries) == {*subject.bank.entries, "full@int8"}
    assert again.fingerprint("full@int8") == bank.fingerprint("full@int8")
    file.write_text(before.decode().replace("entries", "others"))
    with pytest.raises(RunError, match="delete it to calibrate anew"):
        with_int8(subject, subject.bank, tmp_path)
