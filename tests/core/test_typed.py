"""The typed reader against Python's own isinstance and json: what fits comes back equal, what does not is one line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.core.errors import PlanError, RecipeError, RunError
from halfstep.core.typed import Bounds, build, shown, typed


@dataclass(frozen=True, kw_only=True)
class Inner:
    name: Annotated[str, Bounds(1, 4)]
    share: Annotated[float, Bounds(0, 1)] = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    steps: Annotated[int, Bounds(1, None)]
    pairs: Annotated[tuple[tuple[float, str], ...], Bounds(0, 3)] = ()
    rows: list[Inner] = field(default_factory=list)
    macs: dict[str, int] = field(default_factory=dict)
    kind: Literal["a", 2] = "a"
    either: int | str | None = None
    anything: Any = None


finite = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(Inner, name=st.text(min_size=1, max_size=4), share=st.floats(0, 1))
outers = st.builds(
    Outer,
    inner=inners,
    steps=st.integers(1, 10**9),
    pairs=st.lists(st.tuples(finite, st.text(max_size=3)), max_size=3).map(tuple),
    rows=st.lists(inners, max_size=2),
    macs=st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    kind=st.sampled_from(["a", 2]),
    either=st.none() | st.integers() | st.text(max_size=3),
)


@given(outers)
def test_a_dataclass_comes_back_from_its_json(value: Outer):
    assert build(Outer, json.loads(json.dumps(asdict(value))), "", "here") == value


class Pair(NamedTuple):
    left: Annotated[int, Bounds(0, 9)]
    right: Inner | None = None


@dataclass(frozen=True)
class Pairs:
    first: Pair
    more: tuple[Pair, ...] = ()


def test_a_named_tuple_is_read_as_a_section_of_its_fields():
    record = {"first": {"left": 1}, "more": [{"left": 2, "right": {"name": "x"}}]}
    assert build(Pairs, record, "", "here") == Pairs(Pair(1), (Pair(2, Inner(name="x")),))


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({}, "here: got no first.left, expected a whole number, 0 to 9"),
        ({"left": 10}, "here: first.left: got 10, expected a whole number, 0 to 9"),
        ({"left": 1, "up": 2}, "here: got 'first.up', expected a known field"),
        ([1, None], "here: got [1, None], expected a section of fields"),
    ],
)
def test_a_named_tuple_that_is_none_is_refused(first, message):
    with pytest.raises(PlanError) as error:
        build(Pairs, {"first": first}, "", "here", error=PlanError)
    assert str(error.value).startswith(message)


GOOD: dict[str, Any] = {"inner": {"name": "x"}, "steps": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": True}, "here: steps: got True, expected a whole number"),
        ({"steps": 0}, "steps: got 0, expected a whole number, 1 or more"),
        ({"steps": 3.0}, "steps: got 3.0"),
        ({"steps": "3"}, "steps: got '3'"),
        ({"inner": {"name": "x", "share": 10**5000}}, "got a number of thousands of digits"),
        ({"step": 3}, "got 'step', expected a known field; did you mean steps?"),
        ({"inner": {"nam": "x"}}, "got 'inner.nam', expected a known field; did you mean inner.name?"),
        ({"inner": {}}, "here: got no inner.name, expected a text, 1 to 4 long"),
        ({"inner": {"name": ""}}, "inner.name: got '', expected a text, 1 to 4 long"),
        ({"inner": {"name": "x", "share": float("nan")}}, "inner.share: got nan, expected a finite number"),
        ({"inner": {"name": "x", "share": 1.5}}, "inner.share: got 1.5, expected a number, 0 to 1"),
        ({"inner": {"name": "x", "share": 10**400}}, "inner.share: got 1000"),
        ({"inner": 3}, "here: got 3, expected a section of fields"),
        ({"pairs": [[1, "a", 2]]}, "pairs: got [1, 'a', 2], expected a list of a number, a text"),
        ({"pairs": [[1, "a"]] * 4}, "expected a list of a number, a texts separated by commas, 0 to 3 long"),
        ({"pairs": {"a": 1}}, "pairs: got {'a': 1}"),
        ({"rows": [{"name": 1}]}, "here: rows.name: got 1, expected a text"),
        ({"macs": {"a": "1"}}, "macs.a: got '1', expected a whole number"),
        ({"macs": [1]}, "expected names, each with a whole number"),
        ({"kind": "b"}, "expected one of 'a', 2"),
        ({"kind": 2.0}, "kind: got 2.0"),
        ({"either": 1.5}, "expected a whole number or a text or none"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change: dict[str, Any], message: str):
    with pytest.raises(PlanError) as caught:
        build(Outer, GOOD | change, "", "here", error=PlanError, do="write it again")
    assert message in str(caught.value) and "write it again" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("record", [None, 3, "text", [], [["steps", 3]], {}, {"steps": 3}])
def test_what_is_no_record_or_lacks_a_field_is_refused(record: object):
    with pytest.raises(RunError, match=r"expected a section of fields|got no inner"):
        build(Outer, record, "", "here", error=RunError)


def test_true_is_no_one_of_a_literal():
    with pytest.raises(RecipeError, match="got True"):
        typed(True, Literal[1, 2], "order", "here")


@pytest.mark.parametrize(
    "value", ["x" * 10**6, [["x" * 99] * 9] * 10**5, {str(i): "y" * 99 for i in range(99)}, b"z" * 999]
)
def test_a_value_is_shown_in_a_bounded_line(value: object):
    assert len(shown(value)) <= 120


def test_an_integer_that_python_does_not_write_is_shown_too():
    assert shown(10**5000) == "a number of thousands of digits"


def test_the_length_of_a_collection_is_known_before_a_look_at_its_items():
    class Counted(list):
        looked = 0

        def __iter__(self):
            Counted.looked += 1
            return super().__iter__()

    hint = Annotated[tuple[float, ...], Bounds(0, 10)]
    with pytest.raises(RecipeError, match="0 to 10 long"):
        typed(Counted([1.0] * 11), hint, "betas", "a file")
    assert Counted.looked == 0
