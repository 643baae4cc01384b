"""A model card made from a run's files, and what is pushed. Oracles: the hub's own reader of cards, the pipeline."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard, constants

from halfstep.app.card import card_of, push
from halfstep.app.export import export
from halfstep.core import disk
from halfstep.core.errors import RunError
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import Recipe, RunRecord
from halfstep.core.results import About, Comparison, Difference, PlanRow, Quality
from halfstep.core.sums import compare
from halfstep.engine.stepaware import StepAwarePipeline

NAMES = ("fd", "kid", "precision", "recall")
SCORES = {
    name: Quality(
        metric=name, value=0.12, low=0.1, high=0.2, n=64, n_reference=9, features="net", reference="abc", seed=3
    )
    for name in NAMES
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of few files, as if it had been measured."""
    folder = tmp_path_factory.mktemp("card") / "run"
    base = folder.parent / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\nA net.")
    export("digits", "diffusers", folder / "pipeline", Recipe().edit(["sample.steps=4"]))
    change = Difference(value=0.05, low=-0.1, high=0.2, share=None, relative_low=None, relative_high=None,
                        fd_a=0.1, fd_b=0.15, n=64, features="net", reference="abc", seed=3)  # fmt: skip
    row = PlanRow(macs=8, share=0.4, calls=4, wall_ms=1.0, wall_share=0.5, wall_share_low=0.5, wall_share_high=0.5,
                  quality=SCORES, difference=change, held=False,
                  verdict="not decided")  # fmt: skip
    about = About(reference="reference", batch=8, repeats=5, seed=3, n=64, tolerance=0.05, floor=None, scale=None,
                  data="abc", machine={}, device="cpu", dtype="float32", layout="contiguous")  # fmt: skip
    disk.write_json(folder / "quality.json", Comparison(about=about, plans={"reference": row, "plan": row}).to_json())
    StepPlan.load(folder / "pipeline" / "plan.json").save(folder / "plan.json")
    said = {"verb": "optimize", "model": str(base), "data": "digits"}
    (folder / "recipe.json").write_text(json.dumps(RunRecord(inputs=said, recipe=Recipe()).to_json()))
    return folder


def test_the_card_has_the_numbers_the_licence_of_the_base_and_how_to_load(run):
    card = ModelCard(card_of(run))
    assert card.data.license == "mit" and card.data.library_name == "diffusers" and "halfstep" in card.data.tags
    assert "saves 60% of the MACs" in card.text and "| plan" in card.text and "DDIM, 4 steps" in card.text
    assert "StepAwarePipeline.from_pretrained" in card.text


def test_what_would_be_pushed_loads_and_is_whole(run, tmp_path):
    where = push(run, "me/half", folder=tmp_path / "out")
    assert StepAwarePipeline.from_pretrained(where)(batch_size=1).images
    assert "me/half" in (tmp_path / "out" / "README.md").read_text()
    odd = [one.file for one in compare(tmp_path / "out") if one.state != "whole"]
    assert odd == ["README.md"]
    with pytest.raises(RunError, match="a folder that is there"):
        push(run, "me/half", folder=tmp_path / "out")


def test_pushing_offline_and_what_was_not_measured_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match=r"me/half: got HF_HUB_OFFLINE is set.*--folder"):
        push(run, "me/half")
    with pytest.raises(RunError, match=r"quality\.json"):
        push(tmp_path, "me/half")
