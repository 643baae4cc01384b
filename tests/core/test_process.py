"""Oracles: diffusers' own schedulers (alphas_cumprod, add_noise, get_velocity, from_config), configs of the hub."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from halfstep.app.subject import open_subject
from halfstep.core.errors import HalfstepError, ModelError, PlanError, RecipeError
from halfstep.core.process import BETA_SCHEDULERS, OTHER_PROCESSES, Process
from halfstep.core.recipe import Recipe, SampleSpec
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import denoise as denoised
from halfstep.engine.sampling import image_generators, reference_plan, start_noise
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.measure.restore import restore
from halfstep.nets.content import fingerprint
from halfstep.nets.models import load_denoiser
from halfstep.training.train import Diffusion, stamp
from tiny import unet

PROCESSES = {
    "plain": DDPMScheduler(),
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "sigmoid": DDPMScheduler(beta_schedule="sigmoid"),
    "laplace": DDPMScheduler(beta_schedule="laplace"),
    "scaled v": DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", beta_end=0.012),
    "sample": DDPMScheduler(prediction_type="sample", clip_sample_range=0.7),
    "zero terminal SNR": DDPMScheduler(
        prediction_type="v_prediction",
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "thresholding": DDPMScheduler(thresholding=True, clip_sample=False, sample_max_value=2.0),
    "trained betas": DDPMScheduler(num_train_timesteps=50, trained_betas=np.linspace(1e-3, 0.3, 50).tolist()),
    "offset": DDIMScheduler(steps_offset=1, set_alpha_to_one=False, clip_sample=False),
}
each_process = pytest.mark.parametrize("stock", PROCESSES.values(), ids=PROCESSES)


tiny = partial(unet, channels=(8,))


def saved(scheduler) -> dict:
    """A config as its file has it."""
    return json.loads(scheduler.to_json_string())


@each_process
def test_training_draws_the_process_of_the_users_scheduler(stock):
    """The levels, the noisy sample and the target, whatever is predicted."""
    diffusion = Diffusion(Process.of(saved(stock)))
    assert torch.equal(diffusion.scheduler.alphas_cumprod, stock.alphas_cumprod)
    clean = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    noisy, timestep, target = diffusion.draw(clean)
    torch.manual_seed(7)
    noise = torch.randn_like(clean)
    assert torch.equal(noisy, stock.add_noise(clean, noise, timestep))
    wanted = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": DDPMScheduler.from_config(saved(stock)).get_velocity(clean, noise, timestep),
    }
    assert torch.equal(target, wanted[stock.config.prediction_type])


@each_process
@torch.no_grad()
def test_sampling_is_stock_diffusers_ddim_from_the_same_file(stock):
    kind, net = stock.config.prediction_type, tiny()
    bank = Bank({"full": net}, "full", kind)
    plan = reference_plan(bank, saved(stock), SampleSpec(steps=7), {"full": 1})
    config = saved(stock)
    if config["beta_schedule"] in ("sigmoid", "laplace"):  # DDIM's class does not know them, DDPM's does
        config |= {"trained_betas": stock.betas.tolist()}
    theirs = DDIMScheduler.from_config(config)
    theirs.set_timesteps(7)
    x = y = start_noise(bank, image_generators(0, 0, 2))
    for t in theirs.timesteps:
        y = theirs.step(net(y, t).sample, t, y).prev_sample
    assert torch.equal(denoised(bank, plan, x, image_generators(0, 0, 2)), y)


@each_process
def test_a_process_survives_the_recipe_and_the_pipeline_of_every_sampler(stock, tmp_path):
    process = Process.of(saved(stock))
    recipe = replace(Recipe(), noise=process, sample=SampleSpec(steps=5))
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again.noise == process
    if process.trained_betas:  # nothing of another process beside them
        assert (process.beta_start, process.beta_end) == (process.trained_betas[0], process.trained_betas[-1])
    bank = Bank({"full": tiny()}, "full", process.prediction)
    for name in ("ddim", "ddpm", "dpmsolver++", "heun", "euler"):
        if name == "heun" and process.rescale_betas_zero_snr:
            with pytest.raises(PlanError, match="zero terminal SNR"):
                reference_plan(bank, process, SampleSpec(scheduler=name, steps=4), {"full": 1})
            continue
        plan = reference_plan(bank, process, SampleSpec(scheduler=name, steps=4), {"full": 1})
        StepAwarePipeline(bank, plan).save_pretrained(tmp_path / name)
        found = StepAwarePipeline.from_pretrained(tmp_path / name).process
        assert torch.equal(found.scheduler().alphas_cumprod, stock.alphas_cumprod)
        kept = ("prediction", "clip_sample", "clip_sample_range", "thresholding", "sample_max_value", "steps_offset")
        assert all(getattr(found, key) == getattr(process, key) for key in kept)


def test_plans_of_a_plain_process_are_what_they_were():
    """The six keys that were copied before, with each sampler's own choice of everything else."""
    noise = DDPMScheduler().config
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    before = {key: noise[key] for key in (*kept, "clip_sample", "clip_sample_range")}
    samplers = {
        "ddim": DDIMScheduler.from_config(before),
        "ddpm": DDPMScheduler.from_config(before, variance_type="fixed_small"),
        "dpmsolver++": diffusers.DPMSolverMultistepScheduler.from_config(before, algorithm_type="dpmsolver++"),
        "heun": diffusers.HeunDiscreteScheduler.from_config(before),
        "euler": diffusers.EulerDiscreteScheduler.from_config(before),
    }
    bank = Bank({"full": tiny()}, "full", "epsilon")
    for name, scheduler in samplers.items():
        plan = reference_plan(bank, noise, SampleSpec(scheduler=name, steps=6), {"full": 1})
        scheduler.set_timesteps(6)
        assert [row.timestep for row in plan.rows] == [float(t) for t in scheduler.timesteps]
        config = {k: v for k, v in scheduler.config.items() if not k.startswith("_") and v != float("-inf")}
        assert plan.sampler.config == config


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["ddim", "ddpm", "dpmsolver++", "heun", "euler"])
@torch.no_grad()
def test_where_a_process_ends_in_pure_noise_a_wrong_noise_there_does_not_fill_the_picture(kind, prediction):
    """A perfect denoiser of one picture but for 1 % of its prediction: every sampler must end near that picture."""
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction).config
    alphas = DDPMScheduler.from_config(config).alphas_cumprod.double()
    picture = torch.linspace(-0.8, 0.8, 64).reshape(1, 1, 8, 8).double()

    class Nearly(UNet2DModel):
        def forward(self, sample, timestep, *args, **kwargs):
            level = float(np.interp(float(timestep), np.arange(1000), alphas.numpy()))
            noise = (sample - level**0.5 * picture) / (1 - level) ** 0.5
            exact = noise if prediction == "epsilon" else level**0.5 * noise - (1 - level) ** 0.5 * picture
            return (exact + 0.01,)

    bank = Bank({"full": Nearly.from_config(tiny().config).double()}, "full", prediction)
    plan = reference_plan(bank, config, SampleSpec(scheduler=kind, steps=20), {"full": 1})
    found = denoised(bank, plan, start_noise(bank, image_generators(0, 0, 2)), image_generators(0, 0, 2))
    assert (found - picture).abs().max() < 0.25
    last = max(row.timestep for row in plan.rows)
    assert (last == 999) == (prediction == "v_prediction" and kind not in ("ddim", "ddpm"))
    if last < 999 and kind == "euler":
        assert str(plan).startswith("Euler leading")  # the run says what was chosen


def test_more_steps_than_leave_the_last_timesteps_out_are_refused_where_nothing_is_left_there():
    bank = Bank({"full": tiny()}, "full", "epsilon")
    cosine = DDPMScheduler(beta_schedule="squaredcos_cap_v2").config
    with pytest.raises(PlanError, match="at most 500"):
        reference_plan(bank, cosine, SampleSpec(scheduler="euler", steps=600), {"full": 1})
    reference_plan(bank, cosine, SampleSpec(scheduler="ddim", steps=600), {"full": 1})


@torch.no_grad()
def test_restoring_clips_and_thresholds_as_the_process_says():
    """One step is the clean estimate, as stock DDIM's pred_original_sample has it."""
    net, noisy = tiny(), 2 * torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1
    for name in ("plain", "thresholding", "trained betas"):
        config = saved(PROCESSES[name])
        stock = DDIMScheduler.from_config(config)
        stock.set_timesteps(len(stock.alphas_cumprod))
        t = len(stock.alphas_cumprod) // 2
        level = stock.alphas_cumprod[t]
        x = level.sqrt() * noisy
        wanted = stock.step(net(x, t).sample, t, x).pred_original_sample
        sigma = float(((1 - level) / level).sqrt() / 2)
        found = restore(lambda s, t, *_: net(s, t).sample, noisy, sigma, config, steps=1)
        assert torch.allclose(found, wanted, atol=1e-5)


OLD = {
    "no prediction_type": ({"_class_name": "DDPMScheduler", "beta_schedule": "linear"}, {"prediction": "epsilon"}),
    "no class": ({"prediction_type": "v_prediction"}, {"prediction": "v_prediction"}),
    "the hub's first files": (
        {
            "_class_name": "DDIMScheduler",
            "_diffusers_version": "0.0.4",
            "beta_end": 0.0195,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.0015,
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "timestep_values": None,
            "trained_betas": None,
            "tensor_format": "pt",
        },
        {"beta_schedule": "scaled_linear", "beta_end": 0.0195, "clip_sample": False},
    ),
    "predict_epsilon": ({"_class_name": "DDPMScheduler", "predict_epsilon": False}, {"prediction": "sample"}),
    "Stable Diffusion's": (
        {
            "_class_name": "PNDMScheduler",
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "num_train_timesteps": 1000,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "trained_betas": None,
            "clip_sample": False,
        },
        {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
    ),
}


@pytest.mark.parametrize(("config", "said"), OLD.values(), ids=OLD)
def test_configs_of_before_mean_what_they_meant(config, said):
    process = Process.of(config)
    assert {key: getattr(process, key) for key in said} == said


@pytest.mark.parametrize("name", BETA_SCHEDULERS)
def test_every_class_of_a_process_of_betas_is_read_from_its_own_file(name):
    if name == "DPMSolverSDEScheduler":  # needs torchsde to be made
        return
    stock = getattr(diffusers, name)()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        process = Process.of({**saved(stock), "_class_name": name})
    assert process.timestep_spacing == "own"
    assert torch.allclose(process.scheduler().betas, stock.betas)


REFUSED = {
    "a shift by the picture's size": {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
    "levels that rise": {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
    "a key of betas in a flow": {"_class_name": "FlowMatchHeunDiscreteScheduler", "beta_start": 0.1},
    "a shift of nothing": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0.0},
    "flow sigmas": {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
    "a flow prediction": {"prediction_type": "flow_prediction"},
    "EDM": {"_class_name": "EDMEulerScheduler", "sigma_max": 80.0},
    "EDM's timesteps": {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
    "learned variance": {"variance_type": "learned_range"},
    "unknown class": {"_class_name": "MyScheduler"},
    "no class name": {"_class_name": ["DDPMScheduler"]},
    "unknown key": {"snr_shift_scale": 3.0},
    "unknown betas": {"beta_schedule": "quadratic"},
    "betas of NaN": {"beta_end": float("nan")},
    "beta of text": {"beta_start": "0.1"},
    "a billion timesteps": {"num_train_timesteps": 10**9},
    "no timesteps": {"num_train_timesteps": 0},
    "betas of strings": {"trained_betas": ["a", "b"]},
    "betas of another number": {"trained_betas": [0.1, 0.2]},
    "betas above one": {"num_train_timesteps": 2, "trained_betas": [0.1, 1.5]},
    "a mapping of betas": {"trained_betas": {"a": 1}},
    "a ratio above one": {"thresholding": True, "dynamic_thresholding_ratio": 2},
    "a truth of text": {"clip_sample": "yes"},
    "an offset beyond the end": {"steps_offset": 1000},
} | {f"{kind}: {name}": {"_class_name": name} for kind, names in OTHER_PROCESSES.items() for name in names}


@pytest.mark.parametrize("config", REFUSED.values(), ids=REFUSED)
def test_what_is_no_process_of_betas_or_is_not_known_is_refused_in_one_line(config):
    with pytest.raises(HalfstepError) as error:
        Process.of(config, where="model/scheduler")
    assert "\n" not in str(error.value)


def test_betas_that_leave_no_signal_are_refused():
    for process in (Process(beta_end=0.9), Process(timesteps=100_000), Process(timesteps=3, trained_betas=(1.0,) * 3)):
        with pytest.raises(RecipeError, match="no signal"):
            process.scheduler()


def test_latents_are_clipped_only_where_the_config_says_so():
    assert Process.of({"_class_name": "EulerDiscreteScheduler"}).clip_sample
    assert not Process.of({"_class_name": "EulerDiscreteScheduler"}, latent=True).clip_sample
    assert Process.of({"clip_sample": True}, latent=True).clip_sample


def test_a_state_and_a_run_know_their_process_to_the_last_beta():
    """What is printed of a process is short; what a run is known by is not."""
    one, other = (Process(timesteps=2, trained_betas=(0.1, last)) for last in (0.2, 0.3))
    assert str(one) == str(other)
    assert stamp(one) != stamp(other) and fingerprint(one) != fingerprint(other)


def test_recipes_of_before_open_with_the_process_that_they_meant():
    record = Recipe().to_json()
    record["noise"] = {
        "timesteps": 500,
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "prediction": "v_prediction",
    }
    noise = Recipe.from_json(record).noise
    assert noise == Process(timesteps=500, beta_schedule="squaredcos_cap_v2", prediction="v_prediction")


def test_a_scheduler_beside_the_weights_is_read_and_none_is_said(tmp_path):
    scheduler = DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(tiny(), scheduler).save_pretrained(tmp_path / "stock")
    tiny().save_pretrained(tmp_path / "root")
    with pytest.warns(UserWarning, match="no scheduler_config.json"):
        config = load_denoiser(tmp_path / "root")[1]
    assert Process.of(config) == Process()
    scheduler.save_pretrained(tmp_path / "root")  # the hub's layout of 2022
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("root", "stock", "stock/unet"):
            process = Process.of(load_denoiser(tmp_path / name)[1])
            assert (process.prediction, process.beta_schedule) == ("v_prediction", "squaredcos_cap_v2")


def test_a_denoiser_that_predicts_more_than_its_variance_is_refused_at_the_door(tmp_path):
    DDPMPipeline(tiny(out_channels=3), DDPMScheduler()).save_pretrained(tmp_path / "more")
    with pytest.raises(ModelError, match="3 channels out"):
        open_subject(tmp_path / "more", None, Recipe())
    bank = Bank({"full": tiny(out_channels=3)}, "full", "epsilon")
    with pytest.raises(ModelError, match="3 channels out"):
        reference_plan(bank, Process(), SampleSpec(steps=2), {"full": 1})


def test_of_a_learned_variance_the_prediction_alone_is_read(tmp_path):
    """Oracle: the same net without the variance's channels."""
    both, alone = tiny(out_channels=2), tiny(out_channels=1)
    weights = both.state_dict()
    alone.load_state_dict(weights | {key: weights[key][:1] for key in ("conv_out.weight", "conv_out.bias")})
    DDPMPipeline(both, DDPMScheduler()).save_pretrained(tmp_path / "learned")
    nets = open_subject(tmp_path / "learned", None, Recipe()).bank, Bank({"full": alone}, "full", "epsilon")
    pictures = []
    for bank in nets:
        plan = reference_plan(bank, Process(), SampleSpec(steps=3), {"full": 1})
        generators = image_generators(0, 0, 2)
        pictures.append(denoised(bank, plan, start_noise(bank, generators), generators))
    assert torch.allclose(*pictures, atol=1e-6)


def test_infinity_in_diffusers_own_files_is_read(tmp_path):
    """DPM-Solver's config says -Infinity, which is no JSON and no user's fault."""
    DDPMPipeline(tiny(), DDPMScheduler()).save_pretrained(tmp_path / "m")
    diffusers.DPMSolverMultistepScheduler().save_pretrained(tmp_path / "m" / "scheduler")
    assert Process.of(load_denoiser(tmp_path / "m")[1]) == Process()
