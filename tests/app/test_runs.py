"""Run folders as verbs meet them: somebody else's, repeated, with other things behind the names. Oracle: the files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from folders import home_in, listing, tiny
from halfstep.app import inspection, verbs
from halfstep.app.inspection import Noise
from halfstep.app.measurement import features
from halfstep.core.errors import HalfstepError, RunError
from halfstep.core.recipe import Recipe, RunRecord, SampleSpec
from halfstep.core.sums import write_sums
from halfstep.data.sources import names_below
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import reference_plan
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.nets.models import load_denoiser


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return home_in(tmp_path)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A step-aware pipeline of one entry, two steps."""
    folder = tmp_path_factory.mktemp("pipeline")
    net, noise = load_denoiser("digits")
    bank = Bank({"full": net}, "full", noise["prediction_type"])
    plan = reference_plan(bank, noise, SampleSpec(steps=2), {"full": 1})
    StepAwarePipeline(bank, plan).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(6):
        pixels = np.random.default_rng(k).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


def calls(pipeline: Path, out: Path) -> dict:
    return {
        "train": lambda: verbs.train("digits", out, tiny()),
        "features": lambda: features("digits", out, tiny()),
        "sample": lambda: verbs.sample(str(pipeline), out, Recipe(), count=1),
        "spectrum": lambda: inspection.spectrum(["digits"], "digits", out, timesteps=(20,), images=4),
        "denoise": lambda: inspection.denoise(["digits"], [out / "a.png"], out, Noise(level=0.1, there=True)),
    }


@pytest.mark.parametrize("verb", ["train", "features", "sample", "spectrum", "denoise"])
def test_a_folder_of_somebody_else_is_refused_untouched(pipeline: Path, mine: Path, verb: str):
    Image.new("L", (8, 8)).save(mine / "a.png")
    before, times = listing(mine), mine.stat().st_mtime_ns
    with pytest.raises(HalfstepError, match="a folder with other files"):
        calls(pipeline, mine)[verb]()
    assert (listing(mine), mine.stat().st_mtime_ns) == (before, times)


def test_images_are_drawn_again_for_the_same_request_and_refused_for_another(pipeline: Path, tmp_path: Path):
    grid = verbs.sample(str(pipeline), tmp_path / "a", Recipe(), count=2)
    first = (tmp_path / "a" / "000001.png").read_bytes()
    grid.unlink()
    assert verbs.sample(str(pipeline), tmp_path / "a", Recipe().edit(["sample.batch=1"]), count=2).is_file()
    with pytest.raises(RunError, match="seed differ"):
        verbs.sample(str(pipeline), tmp_path / "a", Recipe().edit(["seed=1"]), count=2)
    assert (tmp_path / "a" / "000001.png").read_bytes() == first


def test_replaced_pictures_and_retrained_models_are_noticed_by_every_verb(pictures: Path, tmp_path: Path):
    data = f"folder:{pictures}"
    dense = verbs.train(data, tmp_path / "dense", tiny())
    features(data, tmp_path / "features", tiny())
    inspection.spectrum([str(dense)], data, tmp_path / "spectrum", timesteps=(20,), images=4)
    net = dense / "unet" / "diffusion_pytorch_model.safetensors"
    kept = net.read_bytes()
    verbs.train(data, tmp_path / "other", tiny().edit(["seed=1"]))
    shutil.copy(tmp_path / "other" / "pipeline" / "unet" / net.name, net)
    write_sums(dense)
    with pytest.raises(RunError, match="another model behind"):
        inspection.spectrum([str(dense)], data, tmp_path / "spectrum", timesteps=(20,), images=4)
    net.write_bytes(kept)
    write_sums(dense)
    Image.new("L", (8, 8)).save(pictures / "0.png")
    for again in (
        lambda: verbs.train(data, tmp_path / "dense", tiny()),
        lambda: features(data, tmp_path / "features", tiny()),
        lambda: inspection.spectrum([str(dense)], data, tmp_path / "spectrum", timesteps=(20,), images=4),
    ):
        with pytest.raises(RunError, match="another data behind"):
            again()


def test_a_run_inside_of_its_own_pictures_is_no_data_and_can_be_repeated(pictures: Path):
    data, out = f"folder:{pictures}", pictures / "run"
    first = verbs.train(data, out, tiny())
    before = RunRecord.load(out)
    assert verbs.train(data, out, tiny()) == first and RunRecord.load(out) == before
    (pictures / "pizza").mkdir()
    (pictures / "pizza" / "recipe.json").write_text('{"oven": 200}')  # somebody's own
    Image.new("L", (8, 8)).save(pictures / "pizza" / "a.png")
    assert any("pizza" in str(name) for name in names_below(pictures)) and not any(
        "run" in str(n) for n in names_below(pictures)
    )


def test_a_feature_network_of_before_is_used_for_its_own_data_alone(pictures: Path, tmp_path: Path):
    out = features(f"folder:{pictures}", tmp_path / "f", tiny())
    (out / "recipe.json").unlink()
    assert features(f"folder:{pictures}", out, tiny()) == out
    with pytest.raises(RunError, match="the feature network of other data"):
        features("digits", out, tiny())


def test_a_picture_too_small_to_be_measured_is_refused_before_a_folder_is_made(tmp_path: Path):
    file = tmp_path / "small.png"
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(file)
    with pytest.raises(HalfstepError, match=r"at least 11 pixels.*--noisy"):
        inspection.denoise(["digits"], [file], tmp_path / "out", Noise(level=0.1))
    assert not (tmp_path / "out").exists()
    assert inspection.denoise(["digits"], [file], tmp_path / "out", Noise(level=0.1, there=True)) == []
    assert (tmp_path / "out" / "report.html").is_file()
