"""compress continuous and compress regularized, end to end on digits; oracles: the files, the shared weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from halfstep.app import inspection, verbs
from halfstep.core.errors import HalfstepError
from halfstep.data.images import load_images
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.methods.continuous import continuous_net
from halfstep.nets.continuous import ContinuousUNet2DModel
from halfstep.nets.models import load_denoiser
from tiny import recipes

tiny = recipes("""
model.channels=8,16 model.groups=4 model.head_dim=4 data.size=8 data.channels=1 train.steps=8 train.batch=16
train.save_every=4 train.log_every=4 train.sample_every=8 sample.steps=3 sample.batch=64 shrink.images=32
shrink.final_images=32 shrink.scales=0.9 shrink.thresholds=0.1 regular.grid=0.1 continuous.base=4
continuous.head_dim=4 continuous.steps=1,2 eval.images=64 eval.bootstrap=20 eval.free=false eval.features=digits
""")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return verbs.train("digits", tmp_path_factory.mktemp("runs") / "dense", tiny())


@pytest.fixture(scope="module")
def ode(dense, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "ode"
    verbs.compress("continuous", str(dense), "digits", out, tiny())
    return out


def test_one_set_of_weights_is_an_entry_for_every_number_of_solver_steps(ode):
    bank = StepAwarePipeline.from_pretrained(ode / "pipeline").bank
    assert list(bank) == ["full", "continuous@1", "continuous@2"] and bank.reference == "full"
    once, twice = bank["continuous@1"], bank["continuous@2"]
    assert (once.config.solver_steps, twice.config.solver_steps) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
    assert not list((ode / "pipeline" / "bank" / "continuous@2").glob("*.safetensors"))
    with torch.no_grad():
        x = torch.randn(2, 1, 8, 8)
        assert torch.equal(twice(x, 5).sample, once(x, 5, solver_steps=2).sample)
    assert 1.8 < bank.prices()["continuous@2"].macs / bank.prices()["continuous@1"].macs < 2.1
    record = json.loads((ode / "quality.json").read_text())["plans"]
    assert list(record) == ["reference", "plan", "continuous@2"] and (ode / "report.html").is_file()


def test_a_continuous_bank_is_searched_like_any_other(ode, tmp_path):
    edits = ["search.images=32", "search.final_images=32", "search.error_images=32", "search.fit=2"]
    more = ["search.population=2", "search.generations=1", "search.genes=3"]
    found = verbs.search(str(ode), "digits", tmp_path / "o", tiny(*edits, *more), max_loss=1000.0)
    assert set(found.entries) <= {"full", "continuous@1", "continuous@2"}


def test_without_a_teacher_the_most_solver_steps_are_the_reference(tmp_path):
    recipe = tiny("continuous.order=2", "train.steps=2")
    bank = verbs.make("continuous", None, "digits", tmp_path / "o", recipe).bank
    assert list(bank) == ["continuous@1", "continuous@2"] and bank.reference == "continuous@2"
    assert isinstance(bank["continuous@1"], ContinuousUNet2DModel) and bank["continuous@1"].config.order == 2


@pytest.mark.slow
def test_a_training_with_checkpoints_ends_with_the_same_weights(tmp_path):
    found = []
    for checkpoint in ("false", "true"):
        recipe = tiny("train.steps=4", "train.precision=no", f"continuous.checkpoint={checkpoint}")
        pipe = verbs.make("continuous", None, "digits", tmp_path / checkpoint, recipe)
        found.append(pipe.bank["continuous@1"].state_dict())
    plain, again = found
    assert all(torch.allclose(plain[name], again[name], atol=1e-5) for name in plain)


@pytest.mark.parametrize("edit", ["continuous.base=3", "continuous.levels=4", "data.size=9"])
def test_sizes_that_do_not_fit_are_refused_before_a_file_is_written(edit, tmp_path):
    with pytest.raises(HalfstepError):
        verbs.make("continuous", None, "digits", tmp_path / "o", tiny(edit))
    assert not (tmp_path / "o").exists()


def test_beside_a_teacher_the_continuous_net_has_at_most_a_quarter_of_its_parameters():
    teacher, images = load_denoiser("digits")[0], load_images("digits")
    recipe = tiny("continuous.base=0")
    net = continuous_net(recipe, images, teacher)
    base = net.config.base_channels
    next_one = continuous_net(tiny(f"continuous.base={base + 2}"), images, teacher)
    assert 4 * net.num_parameters() <= teacher.num_parameters() < 4 * next_one.num_parameters()
    assert continuous_net(recipe, images).config.base_channels == 16


@pytest.mark.slow
def test_the_grid_keeps_the_best_weight_and_always_shows_the_training_free_controls(tmp_path):
    page = verbs.compress("regularized", None, "digits", tmp_path / "reg", tiny("sample.scheduler=ddpm"))
    grid = json.loads((tmp_path / "reg" / "grid.json").read_text())["scores"]
    assert list(grid) == ["r=0", "r=0.1"]
    best = min(grid, key=grid.get)
    pipe = StepAwarePipeline.from_pretrained(tmp_path / "reg" / "pipeline")
    assert pipe.bank.reference == "r=0" and set(pipe.plan.entries) == {best}
    record = json.loads((tmp_path / "reg" / "quality.json").read_text())["plans"]
    assert {"reference", "plan", "r=0, one scale", "r=0, one threshold"} <= set(record)
    assert "The choice of r" in page.read_text()


def test_the_weight_zero_is_the_plain_training_to_the_last_bit(tmp_path):
    pipe = verbs.make("regularized", None, "digits", tmp_path / "r", tiny("regular.r=0"))
    plain = pipe.bank["r=0"].state_dict()
    other = verbs.train("digits", tmp_path / "dense", tiny("regular.r=0"))
    trained = load_denoiser(other)[0].state_dict()
    assert all(torch.equal(plain[name], trained[name]) for name in plain)


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    from sklearn.datasets import load_sample_image

    file = tmp_path_factory.mktemp("photos") / "china.png"
    Image.fromarray(load_sample_image("china.jpg")[200:240, 300:352]).save(file)
    return file


def test_every_entry_denoises_a_photo_beside_the_classical_methods(ode, photo, tmp_path):
    found = inspection.denoise([str(ode)], [photo], tmp_path / "o", inspection.Noise(level=0.1), steps=(1, 2))
    names = [record.name for record in found]
    assert names[:3] == ["full, 1 step", "full, 2 steps", "continuous@1, 1 step"] and "wavelet" in names
    assert [record.steps for record in found[:2]] == [1, 2]
    written = {file.stem for file in (tmp_path / "o" / "china").glob("*.png")}
    assert {"noisy", "wavelet", "continuous@2-1-step"} <= written
    page = (tmp_path / "o" / "report.html").read_text()
    assert "china: noisy" in page and "china: continuous@2, 1 step" in page and "PSNR" in page
    with Image.open(tmp_path / "o" / "china" / "wavelet.png") as image:
        assert image.size == (52, 40) and image.mode == "RGB"


def test_a_picture_that_is_noisy_already_is_only_restored(dense, photo, tmp_path):
    assert inspection.denoise([str(dense)], [photo], tmp_path / "o", inspection.Noise(level=0.1, there=True)) == []
    assert [file.name for file in (tmp_path / "o" / "china").iterdir()] == ["full-1-step.png"]
    assert "china: full, 1 step" in (tmp_path / "o" / "report.html").read_text()


@pytest.mark.parametrize("noise, name", [(0.0, "china.png"), (5000.0, "china.png"), (0.1, "absent.png")])
def test_impossible_noise_and_unreadable_pictures_are_refused(noise, name, dense, photo, tmp_path):
    with pytest.raises(HalfstepError):
        inspection.denoise([str(dense)], [photo.parent / name], tmp_path / "o", inspection.Noise(level=noise))
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(HalfstepError, match="two pictures 'china'"):
        inspection.denoise([str(dense)], [photo, photo], tmp_path / "o", inspection.Noise(level=0.1))
    with pytest.raises(HalfstepError, match="cannot be read"):
        inspection.denoise([str(dense)], [tmp_path / "no.png"], tmp_path / "o", inspection.Noise(level=0.1))


def test_denoising_helps_with_the_bundled_model_on_its_own_kind_of_picture(tmp_path):
    from sklearn.datasets import load_digits

    picture = np.concatenate(list(load_digits().images[:6] * (255 / 16)), axis=1).astype(np.uint8)
    Image.fromarray(np.tile(picture, (2, 1))).save(tmp_path / "digits.png")  # at least 11 pixels high, for SSIM
    found = inspection.denoise(["digits"], [tmp_path / "digits.png"], tmp_path / "o", inspection.Noise(level=0.2))
    assert found[0].psnr_db > found[0].noisy_psnr_db + 2  # tiles overlap, so that most see two halves of digits


@pytest.mark.slow
def test_a_changed_measurement_of_the_widths_is_made_again_without_training(dense, tmp_path):
    recipe = tiny("slim.widths=1,0.5", "train.steps=2", "eval.features=pixels", "eval.images=24")
    page = verbs.compress("slimmable", str(dense), "digits", tmp_path / "o", recipe)
    log = (tmp_path / "o" / "log.jsonl").read_bytes()
    assert verbs.compress("slimmable", str(dense), "digits", tmp_path / "o", recipe.edit(["eval.images=30"])) == page
    record = json.loads((tmp_path / "o" / "quality.json").read_text())
    assert record["about"]["n"] == 30 and list(record["plans"]) == ["reference", "plan", "w1.00"]
    assert (tmp_path / "o" / "log.jsonl").read_bytes() == log
