"""Flow matching, from a scheduler's config to pictures. Oracles: diffusers' own loop, and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as Euler
from diffusers import FlowMatchHeunDiscreteScheduler as Heun

from halfstep.core.errors import PlanError, RecipeError
from halfstep.core.plan import Row
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec
from halfstep.engine.bank import Bank
from halfstep.engine.samplers import at_calls, families, plain_config, sampler_of
from halfstep.engine.sampling import (
    build_scheduler,
    denoise,
    image_generators,
    last,
    plan_for,
    reference_plan,
    start_noise,
    trajectory,
    walk,
)
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.measure.fidelity import converged_plan, stochastic
from halfstep.nets.denoiser import clean_and_noise, corrected_as
from halfstep.nets.reuse import shallow, tapped
from halfstep.training.train import Batch, Diffusion
from tiny import unet
from transformers_tiny import inputs_of, sd3

FLOW = Process(prediction="flow_prediction")
SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
STOCK = {
    "Euler": Euler(),
    "Euler, shift 3": Euler(shift=3.0),
    "Euler Karras": Euler(use_karras_sigmas=True),
    "Euler, stochastic": Euler(stochastic_sampling=True),
    "Euler, stretched": Euler(shift_terminal=0.1),
    "Heun": Heun(),
    "Heun, shift 3": Heun(shift=3.0),
    "DPM-Solver++": diffusers.DPMSolverMultistepScheduler(flow_shift=3.0, **SIGMAS),
    "SDE": diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **SIGMAS),
    "UniPC": diffusers.UniPCMultistepScheduler(flow_shift=3.0, **SIGMAS),
}


def bank() -> Bank:
    return Bank({"full": unet()}, "full", "flow_prediction")


@torch.no_grad()
def by_hand(model, scheduler, steps: int) -> torch.Tensor:
    generators = image_generators(1, 0, 2)
    sample = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators])
    scheduler.set_timesteps(steps)
    drawn = {} if isinstance(scheduler, diffusers.UniPCMultistepScheduler) else {"generator": generators}
    for t in scheduler.timesteps:
        sample = scheduler.step(model(sample, t).sample, t, sample, return_dict=False, **drawn)[0]
    return sample


@pytest.mark.parametrize("name", STOCK)
def test_a_plan_under_flow_matching_is_diffusers_own_loop(name, tmp_path):
    own, nets = STOCK[name], bank()
    plan = plan_for(nets, own, 5)
    generators = image_generators(1, 0, 2)
    mine = denoise(nets, plan, start_noise(nets, generators), generators)
    assert torch.equal(mine, by_hand(nets["full"], type(own).from_config(own.config), 5))
    assert len(plan.rows) == (9 if name.startswith("Heun") else 5)
    assert stochastic(plan.sampler) == (name in ("Euler, stochastic", "SDE"))
    pipe = StepAwarePipeline(nets, plan)
    pipe.save_pretrained(tmp_path)
    again = StepAwarePipeline.from_pretrained(tmp_path)
    assert again.process == pipe.process and again.process.is_flow and again.plan == plan
    pictures = [p(batch_size=2, seed=1, output_type="pt").images for p in (pipe, again)]
    assert torch.equal(*pictures)


@torch.no_grad()
def test_stable_diffusion_3_is_sampled_with_its_texts_and_reuse_between():
    """Oracle: diffusers' own loop over the stock net; a plan with reuse, over the two stages."""
    model = sd3()
    _, _, cond = inputs_of(model)
    nets = Bank({"full": model}, "full", "flow_prediction").with_reuse([1])
    plan = plan_for(nets, Euler(shift=3.0), 4)

    def drawn(plan):
        generators = image_generators(1, 0, 2)
        return denoise(nets, plan, start_noise(nets, generators), generators, cond)

    own, sample = Euler(shift=3.0), start_noise(nets, image_generators(1, 0, 2))
    own.set_timesteps(4)
    kept, cheap = {}, sample
    for t in own.timesteps:
        both = torch.stack([t, t])
        sample = own.step(model(sample, timestep=both, **cond).sample, t, sample, return_dict=False)[0]
    assert torch.equal(drawn(plan), sample)
    own.set_timesteps(4)
    for i, t in enumerate(own.timesteps):
        if i % 2:
            found = shallow(model, cheap, t, cond, 1, kept[1])
        else:
            found, kept = tapped(model, cheap, t, cond, [1])
        cheap = own.step(found, t, cheap, return_dict=False)[0]
    assert torch.equal(drawn(plan.with_entries(["full", "full~1"] * 2)), cheap)


def test_the_process_is_read_from_every_class_and_put_back():
    for name, stock in STOCK.items():
        process = Process.of({**plain_config(stock), "_class_name": type(stock).__name__})
        assert process.is_flow and process.shift == (3.0 if "shift" in name or name in ("DPM-Solver++", "UniPC") else 1)
    shifted = replace(FLOW, shift=3.0)
    assert Process.of({**shifted.config(), "_class_name": "UniPCMultistepScheduler"}) == replace(
        shifted, clip_sample=False
    )
    assert "shift 3" in str(shifted) and str(FLOW).startswith("flow matching over 1000 timesteps")


def test_runs_of_before_shifts_know_their_process_by_the_same_text():
    assert "shift" not in repr(Process()) and "shift=3.0" in repr(replace(FLOW, shift=3.0))
    assert eval(repr(FLOW)) == FLOW


def test_a_shift_by_mu_is_the_shift_that_the_message_names():
    """Oracle: diffusers' own dynamic shifting."""
    dynamic, mu = Euler(use_dynamic_shifting=True), 1.15
    with pytest.raises(PlanError, match=r"exp\(mu\)"):
        plan_for(bank(), dynamic, 4, {"full": 1})
    sigmas = [1.0, 0.75, 0.5, 0.25]
    dynamic.set_timesteps(sigmas=sigmas, mu=mu)
    static = Euler(shift=math.exp(mu))
    static.set_timesteps(sigmas=sigmas)
    assert torch.allclose(static.timesteps, dynamic.timesteps)


# --- predictions ------------------------------------------------------------------------------------------------------


def test_a_velocity_holds_the_picture_and_the_noise():
    draw = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 2, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    s = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    part = s.reshape(-1, 1, 1, 1)
    sample = (1 - part) * clean + part * noise
    found = clean_and_noise(noise - clean, sample, 1 - s, "flow_prediction")
    assert torch.allclose(found[0], clean) and torch.allclose(found[1], noise)


@pytest.mark.parametrize("s", [0.05, 0.4, 0.97])
def test_a_corrected_velocity_has_the_corrected_noise_of_the_same_sample(s):
    draw = torch.Generator().manual_seed(0)
    sample, velocity = (torch.randn(2, 2, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    level = torch.tensor(1 - s, dtype=torch.float64)
    mended = corrected_as("flow_prediction", velocity, sample, level, 0.9, 0.1)
    noise = clean_and_noise(velocity, sample, level, "flow_prediction")[1]
    clean, wanted = clean_and_noise(mended, sample, level, "flow_prediction")
    assert torch.allclose(wanted, 0.9 * noise.sign() * (noise.abs() - 0.1).clamp(min=0))
    assert torch.allclose((1 - s) * clean + s * wanted, sample)


def test_at_the_first_moment_the_sample_is_the_noise_and_nothing_is_corrected():
    sample, velocity = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0)
    assert torch.equal(corrected_as("flow_prediction", velocity, sample, torch.tensor(0.0), 0.5, 0.1), velocity)


@pytest.mark.parametrize("stock", [Euler(), Heun()], ids=["Euler", "Heun"])
def test_rows_are_corrected_at_their_own_noise_levels(stock):
    """Oracle: `corrected_as` at the level that the timestep says."""
    nets = bank()
    plan = plan_for(nets, stock, 4, {"full": 1})
    plan = replace(plan, rows=tuple(Row(r.timestep, r.entry, (0.9, 0.01)) for r in plan.rows))
    generators = image_generators(1, 0, 2)
    asked = []

    def spy(sample, t, cond, memo):
        asked.append((sample, float(t)))
        return nets["full"](sample, t).sample

    spied = lambda *given: (spy(*given), None)  # noqa: E731
    own = build_scheduler(plan)
    steps = list(walk([spied] * len(plan.rows), plan.rows, own, start_noise(nets, generators), generators))
    twin = build_scheduler(plan)
    for step, (sample, t) in zip(steps, asked, strict=True):
        level = torch.tensor(1 - t / 1000)
        used = corrected_as("flow_prediction", step.prediction, sample, level, 0.9, 0.01)
        after = twin.step(used, twin.timesteps[step.row], step.sample, return_dict=False)[0]
        assert torch.allclose(after, step.after, atol=1e-5)


# --- samplers by name -------------------------------------------------------------------------------------------------


def test_a_recipe_names_flow_matchings_samplers_by_the_same_words():
    for word, cls in (("euler", Euler), ("heun", Heun), ("own", Euler)):
        scheduler = sampler_of(replace(FLOW, shift=2.0), SampleSpec(scheduler=word, shift=3.0))
        assert type(scheduler) is cls and scheduler.config.shift == 3.0
        assert sampler_of(replace(FLOW, shift=2.0), SampleSpec(scheduler=word)).config.shift == 2.0
    multistep = sampler_of(FLOW, SampleSpec(scheduler="dpmsolver++", order=3, shift=3.0))
    said = multistep.config
    assert (said.flow_shift, said.solver_order, said.use_flow_sigmas) == (3.0, 3, True)
    own = sampler_of(replace(FLOW, shift=3.0), SampleSpec(), {**Euler(shift=3.0).config, "_class_name": Euler.__name__})
    assert own.config.shift == 3.0


@pytest.mark.parametrize("name", ["ddim", "ddpm", "pndm", "deis"])
def test_a_sampler_without_a_flow_is_refused_by_name(name):
    with pytest.raises(PlanError, match="dpmsolver"):
        sampler_of(FLOW, SampleSpec(scheduler=name))


def test_spacings_of_betas_and_shifts_of_betas_are_refused():
    with pytest.raises(PlanError, match="spacing karras"):
        sampler_of(FLOW, SampleSpec(scheduler="euler", spacing="karras"))
    with pytest.raises(PlanError, match="a shift of 3"):
        sampler_of(Process(), SampleSpec(scheduler="euler", shift=3.0))


def test_the_search_has_families_of_flow_matching_each_sampled_and_told_apart():
    nets, process = bank(), replace(FLOW, shift=3.0)
    told = set()
    for family in families(process):
        spec = at_calls(family, 5)
        plan = reference_plan(nets, process, spec, {"full": 1})
        assert len(plan.rows) == 5
        told.add(plan.sampler.told)
    assert len(told) == len(families(process)) == 12
    assert {"Euler flow shift 3, 5 steps", "Euler flow, 5 steps", "DPM-Solver++ 2 flow shift 3, 5 steps"} <= told


@torch.no_grad()
def test_every_family_comes_nearer_to_a_gaussians_flow_with_more_steps():
    """Oracle: of pictures N(m, v) the flow carries noise x to m + sqrt(v) x; the velocity is the closed form's."""
    mean, variance = 0.3, 0.25

    def exact(x, t, cond, memo):
        s = t / 1000
        total = (1 - s) ** 2 * variance + s**2
        gap = x - (1 - s) * mean
        return s * gap / total - mean - (1 - s) * variance * gap / total

    flowing = lambda *given: (exact(*given), None)  # noqa: E731
    noise = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    nets = bank()
    for family in families(FLOW):
        gaps = []
        for steps in (6, 24):
            plan = reference_plan(nets, FLOW, replace(family, steps=steps), {"full": 1})
            found = last(walk([flowing] * len(plan.rows), plan.rows, build_scheduler(plan), noise))
            gaps.append(float((found - mean - variance**0.5 * noise).abs().max()))
        assert gaps[1] < 0.6 * gaps[0] and gaps[1] < 0.1, (family, gaps)


def test_the_converged_plan_is_heuns():
    plan = converged_plan(bank(), FLOW, 20, {"full": 1})
    assert plan.sampler.name == "FlowMatchHeunDiscreteScheduler" and len(plan.rows) == 39
    [*_] = trajectory(bank(), plan, torch.zeros(1, 1, 8, 8), image_generators(0, 0, 1))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_training_step_is_on_the_straight_line_at_the_shifted_level(shift):
    clean = torch.rand(4096, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    process = replace(FLOW, shift=shift)
    noisy, timestep, target = Diffusion(process).draw(clean, torch.Generator().manual_seed(0))
    s = (timestep / 1000).double().reshape(-1, 1, 1, 1)
    assert torch.allclose(noisy - s * target, clean, atol=1e-6)
    even = s / (shift - (shift - 1) * s)  # the shift undone
    assert abs(float(even.mean()) - 0.5) < 0.02 and float(s.min()) > 0 and float(s.max()) <= 1
    grid = Euler(shift=shift).sigmas.double()
    assert float((s.flatten()[:, None] - grid).abs().min(dim=1).values.max()) < 1e-6


def test_the_loss_of_the_true_velocity_is_nought():
    clean = torch.zeros(8, 1, 4, 4)
    truth = lambda x, t, cond, memo: x / (t / 1000).reshape(-1, 1, 1, 1)  # noqa: E731
    assert float(Diffusion(FLOW).loss(truth, Batch(clean, {}))) < 1e-9


def test_what_wants_betas_refuses_a_flow_by_name():
    with pytest.raises(RecipeError, match="flow matching"):
        FLOW.scheduler()
    with pytest.raises(RecipeError, match="flow matching"):
        Diffusion(FLOW).scheduler  # noqa: B018
