"""Every script of examples/ runs, small, and does what it says."""

from __future__ import annotations

import io
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from drills import SMALL
from halfstep.app import verbs
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import Recipe
from halfstep.engine import cluster
from halfstep.engine.stepaware import StepAwarePipeline
from pipelines import stable_diffusion

HERE = Path(__file__).parents[2] / "examples"
EDITS = [*SMALL.split(), "search.reuse="]
"""After a script's own, which they take back."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> str:
    """A small net of digits."""
    out = tmp_path_factory.mktemp("examples") / "dense"
    return str(verbs.train("digits", out, Recipe().edit(SMALL.split())))


def run(name: str) -> dict[str, Any]:
    return runpy.run_path(str(HERE / f"{name}.py"), run_name="example")


def test_every_script_is_tested_and_short():
    tested = {name.removeprefix("test_") for name in globals()}
    for file in HERE.glob("*.py"):
        assert file.stem in tested and len(file.read_text().splitlines()) <= 60, file.name


@pytest.mark.slow
def test_bring_your_model(dense, tmp_path):
    run("bring_your_model")["main"](dense, "digits", str(tmp_path / "o"), *EDITS)
    assert Image.open(tmp_path / "o" / "first.png").size == (8, 8)


@pytest.mark.slow
def test_tune_without_training(dense, tmp_path, capsys):
    run("tune_without_training")["main"](dense, "digits", str(tmp_path / "o"), *EDITS)
    assert "plan" in capsys.readouterr().out


@pytest.mark.slow
def test_photos_from_nothing(tmp_path):
    run("photos_from_nothing")["main"]("digits", str(tmp_path / "o"), *EDITS)
    assert len(list((tmp_path / "o" / "pictures").glob("0*.png"))) == 16


@pytest.mark.slow
def test_time_budget(dense, tmp_path, capsys):
    run("time_budget")["main"]("0.9t", dense, "digits", str(tmp_path / "o"), *EDITS)
    assert "asked: 0.9t, predicted:" in capsys.readouterr().out


@pytest.mark.slow
def test_attach_to_stable_diffusion(tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "sd")
    run("attach_to_stable_diffusion")["main"](str(tmp_path / "sd"), "a red shoe", str(tmp_path / "shoe"), "10")
    assert (tmp_path / "shoe-stock.png").is_file() and (tmp_path / "shoe-plan.png").is_file()


@pytest.mark.slow
def test_new_method(dense, tmp_path):
    try:
        run("new_method")["main"](dense, "digits", str(tmp_path / "o"), *EDITS)
    finally:
        verbs.METHODS.pop("half", None)
    bank = StepAwarePipeline.from_pretrained(tmp_path / "o" / "pipeline").bank
    assert bank.prices()["half"].macs < 0.4 * bank.prices()["full"].macs


@pytest.mark.slow
def test_search_on_ray(dense, tmp_path):
    ray = pytest.importorskip("ray")
    try:
        run("search_on_ray")["main"]("local", dense, "digits", str(tmp_path / "o"), *EDITS)
    finally:
        cluster._CHOSEN.clear()
        ray.shutdown()
    plan = StepPlan.load(tmp_path / "o" / "plan.json")
    assert plan.macs <= 0.5 * plan.baseline.price.macs


def test_serve_with_fastapi():
    pytest.importorskip("httpx")
    testing = pytest.importorskip("fastapi.testclient")
    from halfstep.core.bundled import model_of

    client = testing.TestClient(run("serve_with_fastapi")["app_of"](str(model_of("fashion"))))
    drawn = client.get("/pictures?seed=3&count=2")
    assert Image.open(io.BytesIO(drawn.content)).size == (32, 16) and drawn.content[:4] == b"\x89PNG"
    assert client.get("/pictures?count=2000").status_code == 422
    assert client.get("/plan").json() == json.loads(json.dumps(client.get("/plan").json()))
