"""Recipes against Python's own values and JSON, the dataclasses' declared types, and a table of refused input."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from halfstep.core.errors import RecipeError
from halfstep.core.process import Process
from halfstep.core.recipe import (
    RENAMED,
    REVALUED,
    Recipe,
    RunRecord,
    SamplerName,
    SlimSpec,
    Spacing,
    TrainSpec,
    field_names,
    renewed,
    settings,
)
from halfstep.core.typed import Bounds, leaves


def text(value: Any) -> str:
    """A value as a user types it after `--set name=`."""
    return ",".join(map(text, value)) if isinstance(value, tuple) else str(value)


positive = st.integers(1, 10**9)
fractions = st.floats(0, 1, exclude_min=True)
VALUES: dict[str, st.SearchStrategy] = {
    "name": st.text().map(lambda t: t.replace("\0", "").strip()),
    "seed": st.integers(0, 2**59 - 1),
    "model.dropout": st.floats(0, 1),
    "data.size": st.none() | positive,
    "data.flip": st.booleans(),
    "train.steps": positive,
    "train.lr": st.floats(1e-12, 10),
    "train.clip_norm": st.floats(0, 1e6),
    "noise.prediction": st.sampled_from(["epsilon", "v_prediction", "sample"]),
    "sample.scheduler": st.sampled_from(get_args(SamplerName)),
    "sample.spacing": st.sampled_from(get_args(Spacing)),
    "slim.widths": st.lists(fractions.filter(lambda w: w < 1), unique=True, max_size=5).map(lambda w: (1.0, *w)),
    "slim.shared_noise": st.booleans(),
    "search.rate": st.floats(0, 1),
    "model.attention": st.tuples(st.booleans(), st.booleans()),
    "model.channels": st.tuples(positive, positive),
}
changes = st.fixed_dictionaries({}, optional=VALUES)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def leaf_of(recipe: Recipe, name: str) -> Any:
    value: Any = recipe
    for part in name.split("."):
        value = getattr(value, part)
    return value


# ---- what fits -----------------------------------------------------------------------------------------------------


@given(changes)
def test_edits_arrive_as_typed_values_change_nothing_else_and_survive_json(wanted: dict[str, Any]):
    plain = Recipe()
    edited = plain.edit(f"{name}={text(value)}" for name, value in wanted.items())
    for name in field_names():
        expected = wanted.get(name, leaf_of(plain, name))
        assert leaf_of(edited, name) == expected and type(leaf_of(edited, name)) is type(expected)
    back = Recipe.from_json(json.loads(json.dumps(edited.to_json())))
    assert back == edited and back.differences(edited) == []
    assert set(plain.differences(edited)) == {name for name, value in wanted.items() if value != leaf_of(plain, name)}
    assert plain == Recipe()


@pytest.mark.parametrize(
    ("edit", "value"),
    [
        ("train.steps=1_000", 1000),
        ("train.lr=3e-4", 3e-4),
        ("train.lr=1", 1.0),
        ("data.flip=YES", True),
        ("data.flip=0", False),
        ("data.size=None", None),
        ("data.size=32", 32),
        (" train.steps = 7 ", 7),
        ("slim.widths=1, 0.5,", (1.0, 0.5)),
        ("model.attention=true,no", (True, False)),
        ("noise.prediction=v_prediction", "v_prediction"),
        ("eval.features=file:/a=b", "file:/a=b"),
        ("train.tracker=", ""),
    ],
)
def test_a_text_becomes_the_value_it_means(edit: str, value: Any):
    found = leaf_of(Recipe().edit([edit]), edit.partition("=")[0].strip())
    assert found == value and type(found) is type(value)


def test_edits_that_only_fit_together_are_taken_together_and_the_last_of_two_wins():
    edited = Recipe().edit(["model.channels=8,16,32", "model.attention=false,false,true", "seed=1", "seed=2"])
    assert (edited.model.channels, edited.model.attention, edited.seed) == ((8, 16, 32), (False, False, True), 2)


def test_a_whole_number_in_json_is_a_float_where_one_is_expected():
    recipe = Recipe.from_json({"train": {"lr": 1}, "slim": {"widths": [1, 0.5]}})
    assert recipe.train.lr == 1.0 and type(recipe.train.lr) is float
    assert recipe.slim.widths == (1.0, 0.5) and type(recipe.slim.widths[0]) is float


def test_fields_left_out_of_json_keep_their_defaults():
    assert Recipe.from_json({}) == Recipe() and Recipe.from_json({"train": {"steps": 5}}).train.batch == 128


def test_field_names_are_the_leaves_of_the_record():
    def leaves(record: dict, prefix: str = "") -> list[str]:
        return [
            name
            for key, value in record.items()
            for name in (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"])
        ]

    assert field_names() == leaves(Recipe().to_json()) and "train.steps" in field_names()


def test_recipes_and_their_sections_are_frozen():
    for value, name in ((Recipe(), "seed"), (Recipe().train, "steps"), (Recipe().slim, "widths")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 3)
    assert len({Recipe(), Recipe(), Recipe(seed=1)}) == 2


def test_differences_name_the_fields():
    other = dataclasses.replace(Recipe(seed=4), train=TrainSpec(steps=9), slim=SlimSpec(widths=(1.0,)))
    assert Recipe().differences(other) == other.differences(Recipe()) == ["seed", "train.steps", "slim.widths"]


# ---- what does not fit ---------------------------------------------------------------------------------------------


def refused(call: Any, *parts: str) -> None:
    with pytest.raises(RecipeError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        ("train.step=3", ["'train.step'", "did you mean train.steps?"]),
        ("train.stpes=3", ["did you mean train.steps?"]),
        ("slim.width=1", ["did you mean slim.widths?"]),
        ("predicton=epsilon", ["noise.prediction"]),
        ("train=3", ["'train'", "did you mean"]),
        ("train.steps.more=3", ["did you mean train.steps?"]),
        ("=3", ["''"]),
        ("train.steps", ["expected name=value", "train.steps=2000"]),
        ("", ["expected name=value"]),
        ("train.steps=ten", ["--set train.steps", "'ten'", "a whole number"]),
        ("train.steps=1.5", ["'1.5'", "a whole number"]),
        ("train.steps=", ["''", "a whole number"]),
        ("train.lr=fast", ["'fast'", "a number"]),
        ("data.flip=perhaps", ["'perhaps'", "true or false"]),
        ("data.size=big", ["'big'", "a whole number"]),
        ("slim.widths=1,half", ["'half'", "a number"]),
        ("model.attention=true,maybe", ["'maybe'", "true or false"]),
        ("noise.prediction=noise", ["'noise'", "'epsilon', 'v_prediction', 'sample'"]),
        ("sample.steps=1001", ["sample.steps", "at most 1000"]),
        ("train.steps=0", ["train.steps", "got 0", "a whole number, 1 to 1,000,000,000"]),
        ("train.lr=-1e-3", ["train.lr", "above 0"]),
        ("train.lr=nan", ["train.lr", "a finite number"]),
        ("train.lr=inf", ["train.lr", "a finite number"]),
        ("train.clip_norm=-1", ["train.clip_norm", "0 or more"]),
        ("train.warmup=-1", ["train.warmup", "a whole number, 0 to"]),
        ("seed=-1", ["seed", "a whole number, 0 to"]),
        ("train.ema_decay=1.1", ["train.ema_decay", "a number, 0 to 1"]),
        ("model.dropout=-0.1", ["model.dropout", "a number, 0 to 1"]),
        ("eval.images=1", ["eval.images", "a whole number, 2 to"]),
        ("slim.sandwich=1", ["slim.sandwich", "a whole number, 2 to"]),
        ("slim.widths=0.5,0.5", ["slim.widths", "different widths"]),
        ("slim.widths=1,1", ["slim.widths", "different widths"]),
        ("slim.widths=1,0", ["slim.widths", "a number, above 0, at most 1"]),
        ("slim.widths=1,-0.5", ["slim.widths", "a number, above 0, at most 1"]),
        ("slim.widths=1,2", ["slim.widths", "a number, above 0, at most 1"]),
        ("slim.widths=1,nan", ["slim.widths", "a finite number"]),
        ("slim.widths=", ["slim.widths", "1 to 64 long"]),
        ("regular.grid=", ["regular.grid", "numbers, each above 0, separated by commas, 1 to 64 long"]),
        ("regular.grid=0.1,0", ["regular.grid", "got 0.0", "above 0"]),
        ("continuous.steps=0,1", ["continuous.steps", "got 0", "a whole number, 1 to"]),
        ("shrink.scales=0.9,0", ["shrink.scales", "above 0"]),
        ("shrink.thresholds=-0.1", ["shrink.thresholds", "0 or more"]),
        ("train.batch=65537", ["train.batch", "1 to 65,536"]),
        ("train.steps=1000000001", ["train.steps", "1 to 1,000,000,000"]),
        ("shrink.thresholds=" + "0.1," * 65, ["shrink.thresholds", "0 to 64 long"]),
        ("name=" + "x" * 4097, ["name", "a text, 0 to 4,096 long"]),
        ("eval.features=file:a\0b", ["eval.features", "without NUL"]),
        ("slim.patterns=dense,a\0b", ["slim.patterns", "without NUL"]),
        ("search.objective=pareto", ["search.objective", "'budget', 'scalar'"]),
        ("model.channels=8", ["model.attention", "each of the 1 levels"]),
        ("model.channels=8,0", ["model.channels", "a whole number, 1 to"]),
    ],
)
def test_an_edit_that_does_not_fit_is_refused_in_one_line_that_says_why(edit: str, parts: list[str]):
    refused(lambda: Recipe().edit([edit]), *parts)


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ({"sede": 1}, ["'sede'", "did you mean seed?"]),
        ({"train": {"step": 1}}, ["'train.step'", "did you mean train.steps?"]),
        ({"train": {"steps": 1.0}}, ["train.steps", "1.0", "a whole number"]),
        ({"train": {"steps": True}}, ["train.steps", "a whole number"]),
        ({"train": {"steps": "5"}}, ["train.steps", "'5'"]),
        ({"train": {"steps": None}}, ["train.steps", "None"]),
        ({"train": {"lr": False}}, ["train.lr", "a number"]),
        ({"train": {"schedule": ["cosine"]}}, ["train.schedule", "'cosine', 'constant'"]),
        ({"train": 5}, ["a section of fields", "train."]),
        ({"data": {"flip": 1}}, ["data.flip", "true or false"]),
        ({"data": {"size": "8"}}, ["data.size"]),
        ({"slim": {"widths": 1.0}}, ["slim.widths", "separated by commas"]),
        ({"slim": {"widths": [1, "half"]}}, ["slim.widths", "'half'"]),
        ({"slim": {"widths": [0.5, 0]}}, ["slim.widths", "above 0, at most 1"]),
        ({"seed": 2**59}, ["seed", "0 to 576,460,752,303,423,487"]),
        ({"name": 3}, ["name", "a text"]),
        ([], ["a section of fields"]),
        (None, ["a section of fields"]),
    ],
)
def test_json_that_does_not_fit_is_refused_in_one_line_that_names_field_and_file(record: Any, parts: list[str]):
    refused(lambda: Recipe.from_json(record, where="run/recipe.json"), *parts)
    if "did you mean" in parts[-1] or record in ([], None):
        refused(lambda: Recipe.from_json(record, where="run/recipe.json"), "run/recipe.json")


def test_sections_put_together_by_hand_are_checked_too():
    refused(lambda: dataclasses.replace(Recipe(), train=TrainSpec(batch=0)), "train.batch")
    refused(lambda: dataclasses.replace(Recipe(), train=TrainSpec(lr=math.inf)), "train.lr", "a finite number")


def test_a_process_may_bring_a_beta_for_each_of_its_timesteps():
    process = Process(timesteps=200, trained_betas=(0.01,) * 200)
    assert Recipe.from_json(json.loads(json.dumps(Recipe(noise=process).to_json()))).noise == process


# ---- what is said about the fields ----------------------------------------------------------------------------------


def test_every_field_has_a_meaning_of_one_line_and_stands_in_exactly_one_section():
    found = [leaf for _, fields in settings(Recipe()).values() for leaf in fields]
    assert [leaf.name for leaf in found] == field_names() and len(set(field_names())) == len(field_names())
    for leaf in found:
        assert leaf.meaning and "\n" not in leaf.meaning and len(leaf.meaning) <= 110, leaf.name
        assert leaf.allowed
    assert all(about and len(about) < 240 for about, _ in settings(Recipe()).values())


def test_the_bounds_of_whole_numbers_are_where_the_recipe_turns():
    for name, hint in [(leaf.name, leaf.hint) for leaf in leaves(Recipe())]:
        for bounds in [note for note in typing.get_args(hint) if isinstance(note, Bounds) and hint.__origin__ is int]:
            refused(lambda n=name, b=bounds: Recipe().edit([f"{n}={b.low - 1}"]), name)
            refused(lambda n=name, b=bounds: Recipe().edit([f"{n}={b.high + 1}"]), name)
            if name not in ("sample.steps", "noise.timesteps", "noise.steps_offset"):  # these hang on each other
                assert leaf_of(Recipe().edit([f"{name}={bounds.low}"]), name) == bounds.low
                assert leaf_of(Recipe().edit([f"{name}={bounds.high}"]), name) == bounds.high


# ---- records of before ----------------------------------------------------------------------------------------------


def test_a_record_of_before_is_read_by_the_present_names(tmp_path):
    old = Recipe().edit(["search.fit=3"]).to_json()
    old["search"] |= {"weights": "uniform", "objective": "pareto"}
    del old["search"]["table"]
    text = json.dumps({"inputs": {"verb": "search"}, "recipe": old, "format": 1})
    (tmp_path / "recipe.json").write_text(text)
    assert RunRecord.load(tmp_path).recipe == Recipe().edit(["search.fit=3", "search.table=local"])
    assert (tmp_path / "recipe.json").read_text() == text  # reading writes nothing
    (tmp_path / "recipe.json").write_text(json.dumps({"inputs": {"verb": "sample"}, "format": 1}))
    assert RunRecord.load(tmp_path).recipe is None


@given(anything | st.fixed_dictionaries({"recipe": st.fixed_dictionaries({"search": anything})}))
def test_any_record_is_renewed_or_left_as_it_is(record: Any):
    found = renewed(record)
    assert found == record or set(found) == set(record)


def test_what_records_are_renewed_to_exists():
    assert set(RENAMED.values()) | set(REVALUED) <= set(field_names()) and not set(RENAMED) & set(field_names())
    for name, values in REVALUED.items():
        for value in values.values():
            Recipe().edit([f"{name}={value}"])


sections = st.sampled_from([f.name for f in dataclasses.fields(Recipe)])
fields = st.sampled_from([name.split(".")[-1] for name in field_names()])


@given(st.dictionaries(sections, anything | st.dictionaries(fields, anything, max_size=2), max_size=3))
@example({"train": {"lr": 10**400}})
def test_any_json_gives_a_recipe_or_one_line(record: dict):
    try:
        recipe = Recipe.from_json(record)
    except RecipeError as error:
        assert "\n" not in str(error)
    else:
        assert all(math.isfinite(v) for n in field_names() if isinstance(v := leaf_of(recipe, n), float))


@given(st.sampled_from(field_names()), st.text(max_size=12) | st.from_regex(r"[-+]?[0-9_.]{1,6}(e[0-9]{1,3})?"))
def test_any_text_gives_a_recipe_or_one_line(name: str, value: str):
    try:
        Recipe().edit([f"{name}={value}"])
    except RecipeError as error:
        assert "\n" not in str(error)
