"""Latent diffusion; oracles: the VAE itself, stock diffusers' LDMPipeline, the round trip of every verb."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LDMPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from halfstep.app import inspection, verbs
from halfstep.core.errors import HalfstepError
from halfstep.core.plan import Price
from halfstep.core.sums import write_sums
from halfstep.data.images import load_images
from halfstep.data.latents import decode, encode_images, factor
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import (
    denoise,
    image_generators,
    reference_plan,
    sample_images,
    start_noise,
)
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.measure.judge import Judge
from halfstep.measure.pretrained import load_features
from halfstep.nets.fresh import new_model
from halfstep.nets.models import load_denoiser, load_vae
from halfstep.search.damage import error_table
from halfstep.search.space import Space
from painted import pictures, png
from tiny import recipes, tiny_vae

tiny = recipes("""
model.channels=8,16 model.groups=4 model.head_dim=4 data.size=8 data.channels=1 train.steps=8 train.batch=16
train.save_every=4 train.log_every=4 train.sample_every=8 slim.widths=1,0.5 sample.steps=4 sample.batch=64
search.images=32 search.final_images=32 search.error_images=32 search.fit=2 search.population=2
search.generations=1 search.genes=2 eval.images=64 eval.bootstrap=20 eval.free=false
eval.feature_steps=20 spectral.reduction=2
""")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALFSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(vae_folder, tmp_path_factory) -> Path:
    recipe = tiny(f"model.vae={vae_folder}")
    return verbs.train("digits", tmp_path_factory.mktemp("runs") / "dense", recipe)


def test_batches_are_draws_from_the_vaes_posterior_scaled_as_its_config_says():
    vae, images = tiny_vae(), load_images("digits")
    latents = encode_images(vae, images)
    assert (len(latents), latents.channels, latents.size) == (len(images), 2, 4)
    index = torch.tensor([5, 900])
    with torch.no_grad():
        law = vae.encode(images.batch(index)).latent_dist
    draws = torch.stack([latents.batch(index) for _ in range(2000)])
    wanted = (law.mean - 0.2) * 0.7
    assert (draws.mean(0) - wanted).abs().max() < 5 * 0.7 * law.std.max() / 2000**0.5
    assert torch.allclose(draws.std(0), 0.7 * law.std, rtol=0.1)
    assert torch.equal(latents.batch_labels(index), images.batch_labels(index))
    assert encode_images(vae, images).fingerprint == latents.fingerprint
    assert encode_images(tiny_vae(scaling_factor=0.5), images).scaling == 0.5


def test_an_encoding_that_was_killed_goes_on_and_is_the_same_also_of_pictures_that_are_streamed(tmp_path, monkeypatch):
    source, vae, done = f"folder:{tmp_path / 'in'}", tiny_vae(), []
    (tmp_path / "in").mkdir()
    for k, picture in enumerate(pictures(20, 8, 8)):
        (tmp_path / "in" / f"{k:02d}.png").write_bytes(png(picture))
    images, streamed = load_images(source), load_images(source, stream=8, workers=1)
    wanted, encode = encode_images(vae, streamed, batch=4), vae.encode

    def interrupted(pixels):
        done.append(len(pixels))
        if len(done) == 4:
            raise KeyboardInterrupt
        return encode(pixels)

    monkeypatch.setattr("halfstep.data.arrays.NOTED_BYTES", 1)
    monkeypatch.setattr(vae, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_images(vae, images, batch=4)
    found = encode_images(vae, images, batch=4)
    assert len(done) == 4 + 2 and np.array_equal(found.moments, wanted.moments)


def test_decoding_undoes_the_scaling():
    vae, z = tiny_vae(), torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        assert torch.equal(decode(vae, (z - 0.2) * 0.7), vae.decode((z - 0.2) * 0.7 / 0.7 + 0.2).sample)
    assert factor(vae) == 2


def test_a_latent_denoiser_is_a_stock_ldm_pipeline_and_samples_as_one(vae_folder, tmp_path):
    vae = tiny_vae(shift_factor=None)  # diffusers' LDMPipeline knows no shift
    dense = new_model(tiny().model, encode_images(vae, load_images("digits")), 1000).eval()
    scheduler = DDIMScheduler(clip_sample=False)
    LDMPipeline(vae, dense, scheduler).save_pretrained(tmp_path / "ldm")
    stock = LDMPipeline.from_pretrained(tmp_path / "ldm")
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    wanted = stock(batch_size=2, generator=generator, num_inference_steps=4, eta=0.0, output_type="np").images
    net, noise = load_denoiser(tmp_path / "ldm")
    bank = Bank({"full": net}, "full", "epsilon", vae=load_vae(tmp_path / "ldm"))
    plan = reference_plan(bank, noise, tiny().sample)
    pipe = StepAwarePipeline(bank, plan)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(batch_size=2, generator=torch.Generator().manual_seed(3), output_type="np").images
    assert np.abs(found - wanted).max() < 1e-5


@torch.no_grad()
def test_a_latent_plan_tells_what_decoding_costs_and_a_pixel_plan_costs_nothing_beside_its_calls(tmp_path):
    """Oracle: torch's own counter over a real decoding, its attention run as plain products."""
    vae, spec = tiny_vae(), tiny()
    dense = new_model(spec.model, encode_images(vae, load_images("digits")), 1000).eval()
    noise = DDIMScheduler(clip_sample=False).config
    bank, pixels = Bank({"full": dense}, "full", "epsilon", vae=vae), Bank({"full": dense}, "full", "epsilon")
    plan, plain = reference_plan(bank, noise, spec.sample), reference_plan(pixels, noise, spec.sample)
    side = dense.config.sample_size
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decode(vae, torch.zeros(1, dense.config.in_channels, side, side))
    assert plan.fixed == Price(counter.get_total_flops() // 2) and plan.fixed.macs > 0
    assert plain.fixed == Price(0) and replace(plan, fixed=Price(0)) == plain  # the calls cost the same
    assert "beside the calls" in str(plan) and "beside the calls" not in str(plain)
    StepAwarePipeline(bank, plan).save_pretrained(tmp_path / "p")
    assert StepAwarePipeline.from_pretrained(tmp_path / "p").plan == plan
    for fixed, warned in ({"macs": 5}, True), ({"macs": 0}, False):  # a plan of before tells none
        plan_file = tmp_path / "p" / "plan.json"
        plan_file.write_text(json.dumps(plan.to_json() | {"fixed": fixed}))
        write_sums(tmp_path / "p")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert StepAwarePipeline.from_pretrained(tmp_path / "p").plan == plan
        assert any("the fixed part 5 (" in str(one.message) for one in told) == warned


def test_training_writes_a_pipeline_that_diffusers_loads(dense):
    stock = LDMPipeline.from_pretrained(dense)
    assert stock.unet.config.in_channels == 2 and stock.unet.config.sample_size == 4
    assert stock.vqvae.config.scaling_factor == 0.7
    assert not stock.scheduler.config.clip_sample


def test_the_error_table_of_latents_is_that_of_their_decoded_images():
    """Oracle: plain sampling of every swapped plan; latents of a VAE leave [-1, 1] by far."""
    vae, nets = tiny_vae(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(new_model(tiny().model, encode_images(vae, load_images("digits")), 1000).eval())
    bank = Bank(dict(zip(("full", "other"), nets, strict=True)), "full", "epsilon", vae=vae)
    noise = DDIMScheduler(clip_sample=False).config
    plan = reference_plan(bank, noise, tiny().sample, {"full": 2, "other": 1})
    space = Space.of(plan, bank.names, 2)
    judge = Judge(bank, load_images("digits"), load_features("digits"), cache=None, batch=3)
    *_, (_, _, table) = error_table(bank, plan, space, judge.drawer.moved, images=5, seed=4, batch=3)
    drawn = lambda one: torch.cat(list(sample_images(bank, one, 5, seed=4)))  # noqa: E731
    base = drawn(plan)
    generators = image_generators(4, 0, 5)
    assert denoise(bank, plan, start_noise(bank, generators), generators).abs().max() > 1.2, "an oracle that could tell"
    for k, genes in enumerate([(1, 0), (0, 1)]):
        wanted = judge.drawer.moved(base, drawn(plan.with_entries(space.expand(genes))))
        assert table.damage[k, 1] == pytest.approx(wanted, rel=1e-4) and wanted > 0


def test_optimize_goes_all_the_way_on_latents_and_its_pipeline_decodes(dense, tmp_path):
    verbs.optimize(str(dense), "digits", tmp_path / "half", tiny(), budget=0.6)
    pipe = StepAwarePipeline.from_pretrained(tmp_path / "half" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    generators = image_generators(0, 0, 2)
    latents = denoise(pipe.bank, pipe.plan, start_noise(pipe.bank, generators), generators)
    assert torch.allclose(images, (decode(pipe.bank.vae, latents).clamp(-1, 1) + 1) / 2, atol=1e-6)


@pytest.mark.parametrize("method", [pytest.param("sparse", marks=pytest.mark.slow), "spectral"])
def test_every_method_works_on_latents(dense, tmp_path, method):
    edits = ["sparse.least=1"] if method == "sparse" else []
    bank = verbs.make(method, str(dense), "digits", tmp_path / "o", tiny(*edits)).bank
    assert bank.vae is not None and bank.config["in_channels"] == 2


def test_spectra_see_the_same_latents_of_the_same_images_for_every_model(dense, tmp_path):
    """Oracle: a copy of a model has the model's lines, whatever was drawn before; only new lines are kept."""
    shutil.copytree(dense, tmp_path / "copy")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    page = inspection.spectrum(
        [str(dense), str(tmp_path / "copy")], "digits", tmp_path / "s", timesteps=[100], images=64
    )
    assert page.is_file() and torch.equal(torch.get_rng_state(), before)
    lines = json.loads((tmp_path / "s" / "spectrum.json").read_text())["timesteps"]["100"]
    assert list(lines) == [str(dense)]
    torch.manual_seed(6)
    inspection.spectrum([str(dense)], "digits", tmp_path / "t", timesteps=[100], images=64)
    assert json.loads((tmp_path / "t" / "spectrum.json").read_text())["timesteps"]["100"] == lines


@pytest.mark.parametrize(
    "change, told",
    [
        ({"latent_channels": 3}, "3 latent channels"),
        ({"in_channels": 3, "out_channels": 3}, "expected 3 channels|expected 3 at"),
    ],
)
def test_a_vae_that_does_not_fit_is_refused_before_a_file_is_written(dense, tmp_path, change, told):
    foreign = LDMPipeline.from_pretrained(dense)
    foreign.register_modules(vqvae=tiny_vae(**change))
    foreign.save_pretrained(tmp_path / "foreign")
    with pytest.raises(HalfstepError, match=told):
        verbs.make("slimmable", str(tmp_path / "foreign"), "digits", tmp_path / "o", tiny())
    assert not (tmp_path / "o").exists() or not (tmp_path / "o" / "pipeline").exists()


def test_a_vq_model_and_flips_are_refused(dense, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(HalfstepError, match="VQModel"):
        load_vae(tmp_path)
    with pytest.raises(HalfstepError, match="flips"):
        verbs.train("digits", tmp_path / "o", tiny("data.flip=true"), model=str(dense))
