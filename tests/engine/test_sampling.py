"""Oracles: diffusers' own DDIM and DDPM pipelines, straight loops over its schedulers, static narrow networks."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from halfstep.core.errors import HalfstepError, ModelError, PlanError
from halfstep.core.plan import Correction, Guide, Price, Row
from halfstep.core.process import BETA_SCHEDULERS
from halfstep.core.recipe import SampleSpec
from halfstep.core.sums import write_sums
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions
from halfstep.engine.samplers import REFUSED, SCHEDULERS
from halfstep.engine.sampling import (
    build_scheduler,
    fewer_steps,
    image_generators,
    last,
    plan_for,
    reference_plan,
    sample_images,
    start_noise,
    trajectory,
)
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.nets.denoiser import corrected
from tiny import unet


def net(seed: int, width: int, **changes) -> UNet2DModel:
    return unet(seed, (width, width), **changes)


def bank_of(prediction="epsilon", **changes) -> Bank:
    return Bank({"full": net(0, 16, **changes), "slim": net(1, 8, **changes)}, "full", prediction)


def plan_of(bank, scheduler="ddim", steps=5):
    return reference_plan(
        bank, DDPMScheduler().config, SampleSpec(scheduler=scheduler, steps=steps), {"full": 4, "slim": 1}
    )


def pipeline(bank, plan):
    pipe = StepAwarePipeline(bank, plan)
    pipe.set_progress_bar_config(disable=True)
    return pipe


STOCK = {"ddim": (DDIMPipeline, DDIMScheduler), "ddpm": (DDPMPipeline, DDPMScheduler)}


@pytest.mark.parametrize("generators", ["one per image", "one for all"])
@pytest.mark.parametrize("options", [{}, {"prediction_type": "v_prediction", "clip_sample_range": 0.5}], ids=str)
@pytest.mark.parametrize("kind", STOCK)
def test_the_reference_everywhere_equals_the_stock_pipeline(kind, options, generators):
    def fresh():
        return image_generators(4, 0, 3) if generators == "one per image" else torch.Generator().manual_seed(4)

    bank = bank_of(options.get("prediction_type", "epsilon"))
    noise = DDPMScheduler(**options).config
    plan = reference_plan(bank, noise, SampleSpec(scheduler=kind, steps=7), {"full": 4, "slim": 1})
    mine = pipeline(bank, plan)(batch_size=3, generator=fresh(), output_type="np").images
    cls, scheduler = STOCK[kind]
    stock = cls(bank["full"], scheduler(**options))
    stock.set_progress_bar_config(disable=True)
    theirs = stock(3, generator=fresh(), num_inference_steps=7, output_type="np").images
    assert np.array_equal(mine, theirs)


def straight_loop(model, scheduler, steps, generators):
    """What a diffusers user writes: [B,C,H,W] in [0, 1]."""
    scheduler.set_timesteps(steps)
    options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators]) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        prediction = model(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(prediction, t, x, **options).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("kind", SCHEDULERS)
@torch.no_grad()
def test_any_sampler_of_a_recipe_equals_a_straight_loop_over_its_scheduler(kind):
    bank = bank_of()
    plan = plan_of(bank, kind, 6)
    mine = pipeline(bank, plan)(batch_size=2, generator=image_generators(1, 0, 2), output_type="pt").images
    scheduler = getattr(diffusers, plan.sampler.name).from_config(dict(plan.sampler.config))
    assert torch.equal(mine, straight_loop(bank["full"], scheduler, 6, image_generators(1, 0, 2)))


MULTISTEP, SINGLESTEP = diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler
ANY = {
    "DDPM": DDPMScheduler(),
    "DDPM, large variance": DDPMScheduler(variance_type="fixed_large"),
    "DDPM in parallel": diffusers.DDPMParallelScheduler(),
    "DDIM, trailing": DDIMScheduler(timestep_spacing="trailing", rescale_betas_zero_snr=True),
    "DDIM in parallel": diffusers.DDIMParallelScheduler(),
    "PNDM": diffusers.PNDMScheduler(),
    "PNDM without Runge-Kutta": diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    "DEIS": diffusers.DEISMultistepScheduler(),
    "UniPC": diffusers.UniPCMultistepScheduler(),
    "UniPC 3": diffusers.UniPCMultistepScheduler(solver_order=3),
    "DPM-Solver++ 1": MULTISTEP(solver_order=1),
    "DPM-Solver++ 2, Karras": MULTISTEP(use_karras_sigmas=True),
    "DPM-Solver++ 3": MULTISTEP(solver_order=3),
    "DPM-Solver++ 2, thresholding": MULTISTEP(thresholding=True),
    "DPM-Solver++ SDE": MULTISTEP(algorithm_type="sde-dpmsolver++"),
    "DPM-Solver++ singlestep 1": SINGLESTEP(solver_order=1),
    "DPM-Solver++ singlestep 2": SINGLESTEP(solver_order=2),
    "DPM-Solver++ singlestep 3": SINGLESTEP(solver_order=3),
    "DPM-Solver++ singlestep SDE": SINGLESTEP(algorithm_type="sde-dpmsolver++"),
    "SA-Solver": diffusers.SASolverScheduler(),
    "Heun": diffusers.HeunDiscreteScheduler(),
    "Heun, exponential": diffusers.HeunDiscreteScheduler(use_exponential_sigmas=True),
    "Euler": diffusers.EulerDiscreteScheduler(),
    "Euler, beta sigmas": diffusers.EulerDiscreteScheduler(use_beta_sigmas=True),
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler(),
    "LMS": diffusers.LMSDiscreteScheduler(),
    "KDPM2": diffusers.KDPM2DiscreteScheduler(),
    "KDPM2 ancestral": diffusers.KDPM2AncestralDiscreteScheduler(),
    "LCM": diffusers.LCMScheduler(),
    "TCD": diffusers.TCDScheduler(),
}


@pytest.mark.parametrize("scheduler", ANY.values(), ids=ANY)
@torch.no_grad()
def test_a_scheduler_of_the_users_own_equals_a_straight_loop_over_it(scheduler):
    """With the noise of every image from its own generator; and no image hangs on the batch it is drawn in."""
    bank = bank_of()
    plan = plan_for(bank, scheduler, 5, {"full": 4})
    mine = pipeline(bank, plan)(batch_size=2, generator=image_generators(1, 0, 2), output_type="pt").images
    own = type(scheduler).from_config(scheduler.config)
    assert torch.equal(mine, straight_loop(bank["full"], own, 5, image_generators(1, 0, 2)))
    double = bank.double()
    both, second = (
        pipeline(double, plan)(batch_size=n, generator=image_generators(1, 2 - n, n), output_type="pt").images
        for n in (2, 1)
    )
    assert torch.allclose(both[1:], second, atol=1e-5)


def test_every_scheduler_of_a_process_of_betas_is_in_the_test_above_or_refused():
    tested = {type(scheduler).__name__ for scheduler in ANY.values()}
    assert tested | set(REFUSED) == set(BETA_SCHEDULERS)


OTHERS = {
    "flow matching": diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow matching by Heun": diffusers.FlowMatchHeunDiscreteScheduler(),
    "flow matching by UniPC": diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    ),
    "EDM": diffusers.EDMEulerScheduler(),
    "EDM by DPM-Solver++": diffusers.EDMDPMSolverMultistepScheduler(),
    "EDM's timesteps": diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
    "consistency": diffusers.CMStochasticIterativeScheduler(),
    "variance exploding": diffusers.ScoreSdeVeScheduler(),
    "tokens": diffusers.VQDiffusionScheduler(num_vec_classes=8),
    "inverse": diffusers.DDIMInverseScheduler(),
    "IPNDM": diffusers.IPNDMScheduler(),
    "RePaint": diffusers.RePaintScheduler(),
    "UnCLIP": diffusers.UnCLIPScheduler(),
    "learned variance": DDPMScheduler(variance_type="learned_range"),
    "another prediction": DDIMScheduler(prediction_type="v_prediction"),
    "UniPC's other kernel, infinite at the last step": diffusers.UniPCMultistepScheduler(solver_type="bh1"),
    "a prediction that it does not take": diffusers.KDPM2DiscreteScheduler(prediction_type="sample"),
    "more steps than its own training had": diffusers.LCMScheduler(original_inference_steps=4),
}


@pytest.mark.parametrize("scheduler", OTHERS.values(), ids=OTHERS)
def test_schedulers_that_no_plan_can_carry_are_refused_by_name(scheduler):
    bank = bank_of("sample" if getattr(scheduler.config, "prediction_type", "") == "sample" else "epsilon")
    with pytest.raises(PlanError) as error:
        plan_for(bank, scheduler, 5, {"full": 1, "slim": 1})
    assert type(scheduler).__name__ in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_narrow_plan_equals_the_static_narrow_net(kind):
    bank = bank_of()
    plan = plan_of(bank, kind)
    mixed = pipeline(bank, plan.uniform("slim"))(batch_size=2, seed=3, output_type="pt").images
    alone = Bank({"slim": bank["slim"]}, "slim", "epsilon")
    static = reference_plan(alone, DDPMScheduler().config, SampleSpec(scheduler=kind, steps=5), {"slim": 1})
    assert torch.equal(mixed, pipeline(alone, static)(batch_size=2, seed=3, output_type="pt").images)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_an_image_depends_on_its_seed_and_number_alone(kind):
    bank = bank_of().double()  # untrained networks amplify the last bit of float32
    plan = plan_of(bank, kind)
    plan = plan.with_entries([("full", "slim")[row % 2] for row in range(len(plan.rows) - 1)] + ["slim"])
    whole = torch.cat(list(sample_images(bank, plan, 8, seed=9, batch=8)))
    for batch in (1, 3):
        parts = torch.cat(list(sample_images(bank, plan, 8, seed=9, batch=batch)))
        assert torch.allclose(parts, whole, atol=1e-5)
    later = torch.cat(list(sample_images(bank, plan, 2, seed=9, batch=2, first=6)))
    assert torch.allclose(later, whole[6:], atol=1e-5)
    assert not torch.allclose(torch.cat(list(sample_images(bank, plan, 8, seed=10, batch=8))), whole, atol=1e-2)
    assert all(not torch.allclose(whole[i], whole[i + 1], atol=1e-2) for i in range(7))
    pipe = pipeline(bank, plan)
    ones = [pipe(batch_size=n, seed=9, output_type="pt").images for n in (1, 3, 8)]
    assert all(torch.allclose(images, (whole[: len(images)] / 2 + 0.5), atol=1e-5) for images in ones)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_each_row_runs_its_entry_at_its_timestep_noisiest_first(kind):
    bank = bank_of()
    plan = plan_of(bank, kind, 5)
    pattern = torch.randint(2, (len(plan.rows),), generator=torch.Generator().manual_seed(3)).tolist()
    plan = plan.with_entries([("full", "slim")[i] for i in pattern])
    called = []
    for name in bank:
        bank[name].register_forward_pre_hook(
            lambda _, args, name=name: called.append((float(args[1]), name)), with_kwargs=False
        )
    pipeline(bank, plan)(batch_size=2)
    assert called == [(row.timestep, row.entry) for row in plan.rows]
    times = [t for t, _ in called]
    assert times == sorted(times, reverse=True)
    assert plan.macs == sum({"full": 4, "slim": 1}[name] for _, name in called)


def test_heun_has_a_row_for_each_evaluation_and_each_row_runs_its_entry():
    bank = bank_of()
    plan = plan_of(bank, "heun", 5)
    assert len(plan.rows) == 9
    entries = ["full", "slim", "slim", "full", "slim", "full", "full", "slim", "slim"]
    called = []
    for name in bank:
        bank[name].register_forward_hook(lambda *_, name=name: called.append(name))
    pipeline(bank, plan.with_entries(entries))(batch_size=1)
    assert called == entries


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ddim", "ddpm", "dpmsolver++", "heun", "euler"])
def test_a_trajectory_tells_every_row_and_goes_on_from_any_of_them(kind):
    """Oracle: a straight loop over diffusers' scheduler."""
    bank = bank_of()
    plan = plan_of(bank, kind).with_corrections([Correction(0.9, 0.1)] * len(plan_of(bank, kind).rows))
    scheduler = build_scheduler(plan)
    x = start_noise(bank, image_generators(3, 0, 2)) * scheduler.init_noise_sigma
    drawn = {"generator": image_generators(5, 0, 2)} if kind in ("ddim", "ddpm", "dpmsolver++") else {}
    left = []
    walked = trajectory(bank, plan, start_noise(bank, image_generators(3, 0, 2)), image_generators(5, 0, 2))
    for row, (t, step) in enumerate(zip(scheduler.timesteps, walked, strict=True)):
        left.append((x, copy.deepcopy(scheduler), [g.get_state() for g in drawn.get("generator", ())]))
        with torch.no_grad():
            found = bank["full"](scheduler.scale_model_input(x, t), t).sample
        assert step.row == row and torch.equal(step.sample, x) and torch.equal(step.prediction, found)
        x = scheduler.step(corrected(found, 0.9, 0.1), t, x, **drawn).prev_sample
        assert torch.equal(step.after, x)
    for row, (sample, stopped, states) in enumerate(left):
        generators = image_generators(0, 0, 2)
        for generator, state in zip(generators, states, strict=False):
            generator.set_state(state)
        again = trajectory(bank, plan, sample, generators, start=row, scheduler=stopped)
        assert torch.equal(last(again), x)


def test_a_trajectory_leaves_its_caller_out_of_inference_mode():
    bank, weight = bank_of(), torch.ones(1, requires_grad=True)
    inside = []
    bank["full"].register_forward_hook(lambda *_: inside.append(torch.is_inference_mode_enabled()))
    for step in trajectory(
        bank, plan_of(bank), start_noise(bank, image_generators(0, 0, 1)), image_generators(0, 0, 1)
    ):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        (weight * step.after.clone()).sum().backward()
    assert all(inside) and weight.grad.isfinite()


def test_a_trajectory_that_is_left_early_calls_no_more_networks():
    bank, called = bank_of(), []
    bank["full"].register_forward_hook(lambda *_: called.append(1))
    steps = trajectory(bank, plan_of(bank), start_noise(bank, image_generators(0, 0, 1)), image_generators(0, 0, 1))
    assert not called
    next(steps)
    next(steps)
    steps.close()
    assert len(called) == 2


def test_class_labels_reach_every_call_of_every_entry():
    bank = bank_of(num_class_embeds=4)
    plan = plan_of(bank, "ddim", 4).with_entries(["full", "slim", "slim", "full"])
    mine = pipeline(bank, plan)(
        batch_size=3, class_labels=[2, 0, 3], generator=image_generators(1, 0, 3), output_type="pt"
    ).images
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in image_generators(1, 0, 3)])
    for t, name in zip(scheduler.timesteps, plan.entries, strict=True):
        x = scheduler.step(bank[name](x, t, class_labels=torch.tensor([2, 0, 3])).sample, t, x).prev_sample
    assert torch.equal(mine, (x / 2 + 0.5).clamp(0, 1))
    images = torch.cat(list(sample_images(bank, plan, 5, seed=2, conditions=Conditions.of_classes([3, 2]))))
    theirs = pipeline(bank, plan)(batch_size=5, class_labels=[3, 2, 3, 2, 3], seed=2, output_type="pt").images
    assert torch.equal(images / 2 + 0.5, theirs)


def test_without_labels_the_classes_come_in_turn():
    bank = bank_of(num_class_embeds=4)
    pipe = pipeline(bank, plan_of(bank))
    images = pipe(batch_size=4, seed=0, output_type="pt").images
    assert torch.equal(images, pipe(batch_size=4, class_labels=[0, 1, 2, 3], seed=0, output_type="pt").images)
    assert not torch.equal(images, pipe(batch_size=4, class_labels=[3, 3, 3, 3], seed=0, output_type="pt").images)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_saved_pipeline_gives_the_same_images(kind, tmp_path):
    bank = bank_of()
    plan = replace(plan_of(bank, kind), prices=bank.prices())
    pipe = pipeline(bank, plan.with_entries([("slim", "full")[i % 3 == 2] for i in range(len(plan.rows))]))
    pipe.save_pretrained(tmp_path / "p")
    again = StepAwarePipeline.from_pretrained(tmp_path / "p")
    again.set_progress_bar_config(disable=True)
    assert again.plan == pipe.plan
    first = pipe(batch_size=2, output_type="pt").images
    assert torch.equal(first, again(batch_size=2, output_type="pt").images)
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    assert index["_class_name"] == "StepAwarePipeline"
    stock = getattr(diffusers, plan.sampler.name).from_pretrained(tmp_path / "p", subfolder="scheduler")
    assert type(stock) is type(again.scheduler)


def test_the_macs_of_a_plan_are_the_banks_own(tmp_path):
    """They were believed: a file that said 4 and 1 had its savings printed."""
    bank = bank_of()
    pipeline(bank, plan_of(bank)).save_pretrained(tmp_path / "p")
    with pytest.warns(UserWarning, match=r"plan\.json.*full 4"):
        again = StepAwarePipeline.from_pretrained(tmp_path / "p")
    assert again.plan.prices == bank.prices()
    again.save_pretrained(tmp_path / "p")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert StepAwarePipeline.from_pretrained(tmp_path / "p").plan == again.plan


@pytest.mark.parametrize("cls", [StepAwarePipeline, Bank])
def test_diffusers_options_act_or_are_refused_by_name(cls, tmp_path):
    """Every keyword was swallowed: torch_dtype and typing errors alike."""
    bank = bank_of()
    plan = replace(plan_of(bank), prices=bank.prices())
    pipeline(bank, plan).save_pretrained(tmp_path / "p", safe_serialization=True)
    folder = tmp_path / "p" / ("bank" if cls is Bank else "")
    found = cls.from_pretrained(folder, torch_dtype=torch.float16, use_safetensors=True, local_files_only=True)
    assert {p.dtype for p in getattr(found, "bank", found).parameters()} == {torch.float16}
    for option in ("torch_dtpye", "variant", "revision", "trust_remote_code", "cache_dir"):
        with pytest.raises(TypeError, match=option):
            cls.from_pretrained(folder, **{option: None})
    with pytest.raises(ModelError, match="use_safetensors"):
        cls.from_pretrained(folder, use_safetensors=False)
    with pytest.raises(ModelError, match="safe_serialization"):
        found.save_pretrained(tmp_path / "q", safe_serialization=False)
    with pytest.raises(TypeError, match="push_to_hub"):
        found.save_pretrained(tmp_path / "q", push_to_hub=True)
    assert not (tmp_path / "q").exists()


def test_noise_is_drawn_where_its_generator_is(monkeypatch):
    """A generator of another device cannot draw on the CPU; here torch tells which device was asked for."""
    asked, draw = [], torch.randn

    class Elsewhere:
        device = "elsewhere"

    def randn(shape, generator, device):
        asked.append(device)
        return draw(shape, generator=torch.Generator().manual_seed(1))

    monkeypatch.setattr(torch, "randn", randn)
    noise = start_noise(bank_of(), [Elsewhere(), torch.Generator()])
    assert asked == ["elsewhere", torch.device("cpu")] and noise.shape == (2, 1, 8, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_list_of_cuda_generators_draws():
    bank = bank_of().to("cuda")
    generators = [torch.Generator("cuda").manual_seed(k) for k in range(2)]
    for kind in SCHEDULERS:
        images = pipeline(bank, plan_of(bank, kind))(batch_size=2, generator=generators, output_type="pt").images
        assert images.shape == (2, 1, 8, 8) and bool(images.isfinite().all())


def test_a_pipeline_moves_like_any_other():
    bank = bank_of()
    pipe = pipeline(bank, plan_of(bank)).to(torch.float64)
    assert pipe.bank.dtype == torch.float64 and set(pipe.components) == {"bank", "scheduler"}
    assert pipe(batch_size=2, output_type="pt").images.dtype == torch.float64


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_trajectory_has_a_fresh_scheduler(kind):
    bank = bank_of()
    pipe = pipeline(bank, plan_of(bank, kind))
    first = pipe(batch_size=2, output_type="pt").images
    other = pipe(batch_size=3, seed=5, output_type="pt").images
    assert torch.equal(first, pipe(batch_size=2, output_type="pt").images)
    assert torch.equal(other, pipe(batch_size=3, seed=5, output_type="pt").images)


def test_a_plan_given_to_the_call_takes_the_place_of_the_pipelines_own():
    bank = bank_of()
    plan = plan_of(bank)
    pipe = pipeline(bank, plan)
    for other in (plan.uniform("slim"), fewer_steps(plan, 3), plan_of(bank, "heun", 4)):
        assert torch.equal(
            pipe(batch_size=2, plan=other, output_type="pt").images,
            pipeline(bank, other)(batch_size=2, output_type="pt").images,
        )
    assert pipe.plan == plan


def test_output_types():
    from PIL import Image

    for channels, mode in ((1, "L"), (3, "RGB")):
        model = net(0, 16, colours=channels)
        bank = Bank({"full": model}, "full", "epsilon")
        pipe = pipeline(bank, reference_plan(bank, DDPMScheduler().config, SampleSpec(steps=3), {"full": 1}))
        tensor = pipe(batch_size=2, output_type="pt").images
        array = pipe(batch_size=2, output_type="np").images
        pictures = pipe(batch_size=2).images
        assert tensor.shape == (2, channels, 8, 8) and tensor.dtype == torch.float32
        assert isinstance(array, np.ndarray) and array.shape == (2, 8, 8, channels)
        assert tensor.min() >= 0 and tensor.max() <= 1 and tensor.std() > 0.01
        assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
        assert len(pictures) == 2 and all(isinstance(p, Image.Image) and p.size == (8, 8) for p in pictures)
        assert all(p.mode == mode for p in pictures)
        shown = np.stack([np.asarray(p).reshape(8, 8, channels) for p in pictures])
        assert np.array_equal(shown, (array * 255).round().astype(np.uint8))
        assert torch.equal(pipe(batch_size=2, output_type="pt", return_dict=False)[0], tensor)


def test_oblong_images_are_oblong():
    bank = Bank({"full": net(0, 16, size=(8, 16))}, "full", "epsilon")
    plan = reference_plan(bank, DDPMScheduler().config, SampleSpec(steps=2), {"full": 1})
    assert next(sample_images(bank, plan, 2, seed=0)).shape == (2, 1, 8, 16)
    assert pipeline(bank, plan)(batch_size=1, generator=torch.Generator()).images[0].size == (16, 8)


def test_fewer_steps_is_a_plan_of_the_same_sampler():
    bank = bank_of()
    plan = fewer_steps(plan_of(bank, steps=8), 3)
    assert len(plan.rows) == 3 and set(plan.entries) == {"full"}
    assert torch.equal(
        torch.cat(list(sample_images(bank, plan, 2, seed=0))),
        torch.cat(list(sample_images(bank, plan_of(bank, steps=3), 2, seed=0))),
    )


def test_more_steps_than_the_scheduler_was_trained_with_are_refused():
    bank = bank_of()
    with pytest.raises(PlanError, match="at most the 1000"):
        fewer_steps(plan_of(bank), 1001)
    with pytest.raises(PlanError, match="at most the 1000"):
        plan_for(bank, DDPMScheduler(), 2000, {"full": 1, "slim": 1})


def test_ddim_with_the_exact_score_of_a_gaussian_carries_noise_to_it():
    """Missing U, check 13: the probability flow to N(m, v) is the affine map m + sqrt(v) x of the start noise x."""
    mean, variance = 0.1, 0.05
    alphas = DDPMScheduler().alphas_cumprod

    class Exact(UNet2DModel):
        def forward(self, sample, timestep, *args, **kwargs):
            alpha = alphas[timestep].reshape(-1, 1, 1, 1)
            return ((1 - alpha).sqrt() * (sample - alpha.sqrt() * mean) / (alpha * variance + 1 - alpha),)

    exact = Exact.from_config(net(0, 16).config).eval()
    bank = Bank({"full": exact}, "full", "epsilon")
    start = start_noise(bank, image_generators(0, 0, 8))
    errors = []
    for steps in (100, 1000):
        images = torch.cat(list(sample_images(bank, plan_of(bank, steps=steps), 8, seed=0)))
        errors.append(((images - mean) / variance**0.5 - start).abs().max().item())
    assert errors[1] < 0.02 * start.abs().max() and errors[1] < errors[0] / 5  # of first order
    assert images.mean().item() == pytest.approx(mean + variance**0.5 * start.mean().item(), rel=0.02)
    assert images.var().item() == pytest.approx(variance * start.var().item(), rel=0.02)


@pytest.mark.parametrize("kind", ["ddim", "dpmsolver++"])
def test_a_correction_is_what_a_net_with_a_scaled_thresholded_output_does(kind):
    class Shrunk(UNet2DModel):
        def forward(self, *args, **kwargs):
            (out,) = super().forward(*args, **kwargs)
            return (0.9 * out.sign() * (out.abs() - 0.2).clamp(min=0),)

    bank, shrunk = bank_of(), Shrunk.from_config(net(0, 16).config)
    shrunk.load_state_dict(bank["full"].state_dict())
    plan = plan_of(bank, kind)
    twin = Bank({"full": shrunk.eval(), "slim": bank["slim"]}, "full", "epsilon")
    wanted = torch.cat(list(sample_images(twin, plan, 3, seed=1)))
    corrected = plan.with_corrections([Correction(0.9, 0.2)] * len(plan.rows))
    assert torch.equal(torch.cat(list(sample_images(bank, corrected, 3, seed=1))), wanted)


def drawn(bank, plan, **options):
    return torch.cat(list(sample_images(bank, plan, 3, seed=1, **options)))


class Mixed(torch.nn.Module):
    """What autoguidance is said to be, in closed form: D_w = w D_1 + (1 - w) D_0, as one net."""

    def __init__(self, own, guide, weight):
        super().__init__()
        self.own, self.guide, self.weight, self.config = own, guide, weight, own.config

    def forward(self, sample, timestep, **kwargs):
        own, guide = (net(sample, timestep, **kwargs)[0] for net in (self.own, self.guide))
        return (self.weight * own + (1 - self.weight) * guide,)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["ddim", "ddpm", "dpmsolver++", "heun"])
def test_a_guided_row_is_the_closed_form_of_autoguidance(kind, prediction, conditional):
    bank = bank_of(prediction, **({"num_class_embeds": 3} if conditional else {}))
    config = DDPMScheduler(prediction_type=prediction).config
    plan = reference_plan(bank, config, SampleSpec(scheduler=kind, steps=5), {"full": 4, "slim": 1})
    guided = plan.with_guides([Guide("slim", 2.5)] * len(plan.rows))
    mixed = Bank({"full": Mixed(bank["full"], bank["slim"], 2.5), "slim": bank["slim"]}, "full", prediction)
    found, wanted, plain = drawn(bank, guided), drawn(mixed, plan), drawn(bank, plan)
    assert (found - wanted).abs().max() < 1e-4 and (found - plain).abs().max() > 0.01
    first = plan.with_guides([Guide("slim", 2.5), *[None] * (len(plan.rows) - 1)])
    assert all(
        (drawn(bank, first) - other).abs().max() > 1e-3 for other in (found, plain)
    )  # it is rows that are guided
    correction = [Correction(0.9, 0.1)] * len(plan.rows)  # of what was guided
    corrected, twin = guided.with_corrections(correction), plan.with_corrections(correction)
    assert (drawn(bank, corrected) - drawn(mixed, twin)).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["ddim", "ddpm", "heun"])
def test_a_guide_of_weight_one_is_none_and_of_weight_zero_runs_alone(kind):
    bank = bank_of()
    plan = plan_of(bank, kind)
    rows = len(plan.rows)
    assert (drawn(bank, plan.with_guides([Guide("slim", 1.0)] * rows)) - drawn(bank, plan)).abs().max() < 1e-5
    alone = drawn(bank, plan.with_guides([Guide("slim", 0.0)] * rows))
    assert torch.equal(alone, drawn(bank, plan.uniform("slim")))


def test_every_network_call_of_a_guided_plan_is_priced_and_a_step_tells_the_rows_own_prediction():
    bank, called = bank_of(), []
    plan = plan_of(bank, "ddim", 4).with_guides([None, Guide("slim", 2.0), Guide("full", 3.0), None])
    for name in bank:
        bank[name].register_forward_hook(lambda net, inputs, out, name=name: called.append((name, out[0])))
    generators = image_generators(0, 0, 1)
    steps = list(trajectory(bank, plan, start_noise(bank, generators), generators))
    assert plan.called == tuple(name for name, _ in called) == ("full", "full", "slim", "full", "full", "full")
    assert plan.macs == sum({"full": 4, "slim": 1}[name] for name, _ in called)
    assert all(torch.equal(step.prediction, called[k][1]) for step, k in zip(steps, (0, 1, 3, 5), strict=True))


def test_a_guided_pipeline_is_saved_and_draws_the_same(tmp_path):
    bank = bank_of()
    plan = replace(plan_of(bank), prices=bank.prices()).with_guides([Guide("slim", 1.5), *[None] * 4])
    pipeline(bank, plan).save_pretrained(tmp_path / "p")
    again = StepAwarePipeline.from_pretrained(tmp_path / "p")
    assert again.plan == plan and torch.equal(drawn(again.bank, again.plan), drawn(bank, plan))


@pytest.mark.parametrize("kind", ["ddim", "ddpm", "dpmsolver++", "heun", "euler"])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_net_that_predicts_something_else_is_corrected_in_its_noise(kind, prediction):
    """Oracle: the same net as a predictor of the noise, corrected."""
    alphas = DDPMScheduler().alphas_cumprod.double()
    sigmas = ((1 - alphas) / alphas).sqrt().numpy()

    class Other(UNet2DModel):
        def forward(self, sample, timestep, *args, **kwargs):
            (noise,) = super().forward(sample, timestep, *args, **kwargs)
            sigma = float(np.interp(float(timestep), np.arange(1000), sigmas))
            signal, rest = (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5
            clean = (sample - rest * noise) / signal
            return (clean if prediction == "sample" else signal * noise - rest * clean,)

    bank, other = bank_of(), Other.from_config(net(0, 16).config)
    other.load_state_dict(bank["full"].state_dict())
    plan = plan_of(bank, kind)
    corrected = plan.with_corrections([Correction(0.9, 0.2)] * len(plan.rows))
    wanted = torch.cat(list(sample_images(bank, corrected, 2, seed=1)))
    assert not torch.allclose(wanted, torch.cat(list(sample_images(bank, plan, 2, seed=1))), atol=0.05)
    twin = Bank({"full": other.eval()}, "full", prediction)
    config = {**corrected.sampler.config, "prediction_type": prediction}
    told = replace(corrected, sampler=replace(corrected.sampler, config=config))
    found = torch.cat(list(sample_images(twin, told, 2, seed=1)))
    assert (found - wanted).abs().max() < 2e-3


def test_settings_that_diffusers_trips_over_are_refused_in_one_line():
    bank = bank_of()
    with pytest.raises(PlanError, match="PNDMScheduler refuses"):
        plan_for(bank, diffusers.PNDMScheduler(), 3, {"full": 1, "slim": 1})
    plan = plan_of(bank, "euler")
    for wrong in (
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
        {"beta_start": float("nan")},
        {"foreign": 1},
        {"num_train_timesteps": 10**9},
        {"trained_betas": ["a"]},
        {"interpolation_type": "cubic"},
    ):
        with pytest.raises(PlanError) as error:
            pipeline(bank, replace(plan, sampler=replace(plan.sampler, config={**plan.sampler.config, **wrong})))
        assert "\n" not in str(error.value)


def test_plans_that_do_not_fit_are_refused():
    bank = bank_of()
    plan = plan_of(bank)
    prices = {**plan.prices, "w9": Price(1)}

    def told(**changes):
        return replace(plan, sampler=replace(plan.sampler, **changes))

    wrong = [
        replace(plan, rows=(Row(5.0, "full"), *plan.rows[1:])),
        replace(plan, rows=(Row(float("nan"), "full"), *plan.rows[1:])),
        replace(plan, rows=plan.rows[::-1]),
        replace(plan, rows=plan.rows[:-1]),
        replace(plan, rows=(*plan.rows, plan.rows[-1])),
        told(steps=plan.sampler.steps + 1),
        told(config={**plan.sampler.config, "timestep_spacing": "trailing"}),
        told(name="DDPMPipeline"),
        told(name="UNet2DModel"),
        told(name="NoSuchScheduler"),
        told(name="__version__"),
        replace(plan, prices=prices, rows=(Row(plan.rows[0].timestep, "w9"), *plan.rows[1:])),
        replace(plan, prices=prices).with_guides([Guide("w9", 2.0)] * len(plan.rows)),
    ]
    for bad in wrong:
        with pytest.raises(PlanError) as error:
            pipeline(bank, bad)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_list_of_generators_that_is_not_one_per_image_is_refused(count):
    bank = bank_of()
    with pytest.raises(PlanError) as error:
        pipeline(bank, plan_of(bank))(batch_size=2, generator=image_generators(0, 0, count))
    assert f"{count} generators" in str(error.value) and "2" in str(error.value)


def test_folders_that_hold_no_pipeline_are_refused(tmp_path):
    with pytest.raises(HalfstepError) as error:
        StepAwarePipeline.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    bank = bank_of()
    DDPMPipeline(bank["full"], DDPMScheduler()).save_pretrained(tmp_path / "stock")
    with pytest.raises(PlanError, match="DDPMPipeline"):
        StepAwarePipeline.from_pretrained(tmp_path / "stock")
    pipeline(bank, plan_of(bank)).save_pretrained(tmp_path / "p")
    file = tmp_path / "p" / "plan.json"
    record = json.loads(file.read_text())
    record["prices"]["w9"], record["rows"][0]["entry"] = {"macs": 1}, "w9"
    file.write_text(json.dumps(record))
    write_sums(tmp_path / "p")
    with pytest.raises(PlanError, match="w9"):
        StepAwarePipeline.from_pretrained(tmp_path / "p")
    file.unlink()
    write_sums(tmp_path / "p")
    with pytest.raises(HalfstepError, match=r"plan\.json"):
        StepAwarePipeline.from_pretrained(tmp_path / "p")
