"""Budgets: text there and back, arithmetic by hand, and a table of what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.core.budget import Budget
from halfstep.core.errors import PlanError
from halfstep.core.plan import Price

positive = st.floats(0, 1e300, exclude_min=True)
shares = st.floats(0, 1, exclude_min=True)
budgets = st.builds(Budget, shares, st.sampled_from(["share", "time"])) | st.builds(
    Budget, positive, st.sampled_from(["ms", "macs"])
)


@given(budgets)
def test_a_budget_is_read_as_it_is_written(budget):
    assert Budget.parse(str(budget)) == budget == Budget.of(budget) == Budget.of(str(budget))


READ = {
    "0.5": (0.5, "share"),
    "50%": (0.5, "share"),
    "1": (1.0, "share"),
    "0.3t": (0.3, "time"),
    "120ms": (120.0, "ms"),
    "1.5s": (1500.0, "ms"),
    " 2 s ": (2000.0, "ms"),
    "300MMACs": (3e8, "macs"),
    "1.2GMACs": (1.2e9, "macs"),
    "5TMACs": (5e12, "macs"),
    "77kMACs": (77e3, "macs"),
    "1e6MACs": (1e6, "macs"),
}


@pytest.mark.parametrize("text", READ)
def test_every_way_to_write_one_is_a_value_and_a_unit(text):
    assert Budget.parse(text) == Budget(*READ[text])


def test_a_number_alone_is_a_share_as_it_was_before_units():
    assert str(Budget.of(0.5)) == "0.5" and str(Budget.of(1)) == "1.0" and Budget.of(0.25) == Budget.parse("25%")


@pytest.mark.parametrize(
    "text, limit",
    {"0.5": 500.0, "0.25t": 10.0, "128ms": 2000.0, "1.28s": 20000.0, "2kMACs": 2000.0}.items(),
)
def test_the_limit_of_an_image_is_counted_by_hand(text, limit):
    """Of a reference of 1,000 MACs and 40 us an image, in batches of 64."""
    budget = Budget.parse(text)
    assert math.isclose(budget.limit(Price(1000, 40), 64), limit)
    assert budget.priced_in == ("us" if text[-1] in "ts" and not text.endswith("MACs") else "macs")


@given(budgets, st.integers(1, 10**15), st.integers(1, 10**12), st.integers(1, 1024))
def test_what_is_told_as_a_cost_is_enough_when_it_is_asked_for_and_no_more_than_a_hundredth_over(
    budget, macs, us, batch
):
    reference, price = Price(10**15, 10**12), Price(macs, us)
    told = budget.told(price, reference, batch)
    enough = Budget.parse(told).limit(reference, batch)
    cost = price.macs if budget.priced_in == "macs" else us
    assert cost * (1 - 1e-9) <= enough <= 1.011 * cost


REFUSED = {
    "0": "above 0",
    "-1": "above 0",
    "0ms": "above 0",
    "1e999ms": "above 0",
    "1.5": "share of the MACs",
    "150%": "share of the MACs",
    "2t": "share of the time",
    "nan": "a number and a unit",
    "inf": "a number and a unit",
    "": "a number and a unit",
    "half": "a number and a unit",
    "1..2": "a number and a unit",
    "12 mss": "did you mean ms?",
    "1.2G": "did you mean GMACs?",
    "5gmacs": "did you mean GMACs?",
    "3 sec": "did you mean s?",
    "3GFLOPs": "2 FLOPs",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_budget_is_refused_by_name(text):
    with pytest.raises(PlanError) as error:
        Budget.parse(text)
    assert REFUSED[text] in str(error.value) and "--budget" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0, -2, True, None, 1.01])
def test_values_from_python_are_refused_alike(value):
    with pytest.raises(PlanError, match="--budget"):
        Budget(value)


def test_a_unit_that_is_none_and_a_time_that_nobody_measured_are_refused():
    with pytest.raises(PlanError, match="unit 'hours'"):
        Budget(1.0, "hours")
    for use in (Budget(0.5, "time").limit, lambda price, batch: Budget(5, "ms").told(price, price, batch)):
        with pytest.raises(PlanError, match="a price without a time"):
            use(Price(5), 1)
