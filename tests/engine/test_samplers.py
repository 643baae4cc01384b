"""Stock samplers as arms. Oracles: diffusers' schedulers made by hand and walked straight, their signatures, and the
probability flow of a Gaussian in closed form."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler

from halfstep.core.errors import PlanError
from halfstep.core.plan import Sampler
from halfstep.core.process import Process
from halfstep.core.recipe import Order, SamplerName, SampleSpec, Spacing
from halfstep.core.solvers import EVEN, SOLVERS, SPACED
from halfstep.engine.bank import Bank
from halfstep.engine.samplers import (
    families,
    plain_config,
    rehearse,
    sampler_of,
    scheduler_of,
    settled,
    with_timesteps,
)
from halfstep.engine.sampling import denoise, image_generators, reference_plan, start_noise
from tiny import unet

STEPS = 6
MULTISTEP, UNIPC, DEIS = (
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.DEISMultistepScheduler,
)
HEUN, EULER = diffusers.HeunDiscreteScheduler, diffusers.EulerDiscreteScheduler
BETAS = {"beta_start": 1e-4, "beta_end": 0.02}
BY_HAND = {
    "DDIM": diffusers.DDIMScheduler(),
    "DDIM trailing": diffusers.DDIMScheduler(timestep_spacing="trailing"),
    **{
        f"DPM-Solver++ {order}{word}": MULTISTEP(solver_order=order, **options)
        for order in (2, 3)
        for word, options in {
            "": {},
            " leading": {"timestep_spacing": "leading"},
            " trailing": {"timestep_spacing": "trailing"},
            " Karras": {"use_karras_sigmas": True},
            " log-SNR": {"use_lu_lambdas": True},
        }.items()
    },
    **{
        f"UniPC {order}{word}": UNIPC(solver_order=order, **options)
        for order in (2, 3)
        for word, options in {
            "": {},
            " trailing": {"timestep_spacing": "trailing"},
            " Karras": {"use_karras_sigmas": True},
        }.items()
    },
    **{
        f"DEIS {order}{word}": DEIS(solver_order=order, **options)
        for order in (2, 3)
        for word, options in {
            "": {},
            " trailing": {"timestep_spacing": "trailing"},
            " Karras": {"use_karras_sigmas": True},
        }.items()
    },
    "Heun": HEUN(clip_sample=True, **BETAS),
    "Heun trailing": HEUN(clip_sample=True, timestep_spacing="trailing", **BETAS),
    "Heun Karras": HEUN(clip_sample=True, use_karras_sigmas=True, **BETAS),
    "Euler": EULER(),
    "Euler trailing": EULER(timestep_spacing="trailing"),
    "Euler Karras": EULER(use_karras_sigmas=True),
    "PNDM": diffusers.PNDMScheduler(skip_prk_steps=True),
    "PNDM trailing": diffusers.PNDMScheduler(skip_prk_steps=True, timestep_spacing="trailing"),
    "DDPM": DDPMScheduler(),
}


@dataclass(frozen=True)
class Arm:
    """A sampler and its number of steps: what a recipe says of it, what a plan says, and how many `calls` of the
    network a trajectory takes, which are more than its steps under Heun (2n - 1) and PNDM (n + 1)."""

    spec: SampleSpec
    sampler: Sampler
    calls: int

    @property
    def told(self) -> str:
        """Its name and its steps: "DPM-Solver++ 3 trailing, 10 steps"."""
        return self.sampler.told


def arm_of(process: Process, sample: SampleSpec, own: Mapping[str, Any] | None = None) -> Arm:
    """The arm of a recipe's sampler, rehearsed. Raises PlanError as `sampler_of` and `rehearse`."""
    scheduler = sampler_of(process, sample, own)
    sampler = Sampler(type(scheduler).__name__, plain_config(scheduler), sample.steps)
    fresh = with_timesteps(scheduler_of(sampler.name, sampler.config), sample.steps)
    rehearse(fresh)
    return Arm(sample, sampler, len(fresh.timesteps))


def free_arms(process: Process, steps: Sequence[int]) -> list[Arm]:
    """Every family at each of these numbers of steps, of several arms that are one and the same there the first."""
    found: dict[Sampler, Arm] = {}
    for family, count in itertools.product(families(process), steps):
        with contextlib.suppress(PlanError):
            arm = arm_of(process, replace(family, steps=count))
            found.setdefault(arm.sampler, arm)
    return list(found.values())


ARMS = {arm.sampler.short: arm for arm in free_arms(Process(), [STEPS])}


def test_the_words_of_a_recipe_are_the_samplers_there_are():
    assert get_args(SamplerName) == ("own", *SOLVERS)
    assert get_args(Spacing) == ("own", *EVEN, *SPACED)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_sampler_takes_the_spacings_and_orders_that_its_class_has(name):
    solver = SOLVERS[name]
    known = inspect.signature(getattr(diffusers, solver.cls).__init__).parameters
    assert {word for word, (key, _) in SPACED.items() if key in known} == set(solver.spacings) - set(EVEN)
    assert "timestep_spacing" in known and set(EVEN) <= set(solver.spacings)
    assert bool(solver.orders) == ("solver_order" in known)
    assert not solver.orders or solver.order == known["solver_order"].default


def test_every_free_sampler_is_told_by_its_config_and_each_once():
    assert set(ARMS) == set(BY_HAND)
    assert {arm.told for arm in free_arms(Process(), [STEPS, 1])} >= {
        "DPM-Solver++ 3 trailing, 6 steps",
        "DDIM, 1 step",
    }


@pytest.mark.parametrize("told", BY_HAND)
@torch.no_grad()
def test_an_arm_is_the_scheduler_that_a_diffusers_user_makes(told):
    """Its pictures, its calls and its name."""
    arm, scheduler = ARMS[told], BY_HAND[told]
    bank = Bank({"full": unet()}, "full", "epsilon")
    plan = reference_plan(bank, Process(), arm.spec, {"full": 1})
    assert plan.sampler == arm.sampler and plan.sampler.told == arm.told == f"{told}, {STEPS} steps"
    assert len(plan.rows) == arm.calls == {"Heun": 2 * STEPS - 1, "PNDM": STEPS + 1}.get(told.split()[0], STEPS)
    generators = image_generators(1, 0, 2)
    mine = denoise(bank, plan, start_noise(bank, generators), generators)
    scheduler.set_timesteps(STEPS)
    generators = image_generators(1, 0, 2)
    options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = start_noise(bank, generators) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        prediction = bank["full"](scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(prediction, t, x, **options).prev_sample
    assert torch.equal(mine, x)


class Gaussian(diffusers.UNet2DModel):
    """The exact noise of pixels that are N(0.3, 0.2^2): sigma (x - alpha m) / (alpha^2 s^2 + sigma^2)."""

    def forward(self, sample, timestep, *args, **kwargs):
        alpha, sigma = levels(timestep)
        return (sigma * (sample - alpha * 0.3) / (alpha**2 * 0.2**2 + sigma**2),)


ALPHAS = DDPMScheduler().alphas_cumprod.double()


def levels(timestep) -> tuple[torch.Tensor, torch.Tensor]:
    level = ALPHAS[int(timestep)]
    return level.sqrt(), (1 - level).sqrt()


def error(arm: Arm, bank: Bank) -> float:
    """Of the end of a trajectory, against x_0 = m + s z with z = (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2), which
    the probability flow of a Gaussian keeps from its first timestep on."""
    plan = reference_plan(bank, PLAIN, arm.spec, {"full": 1})
    noise = start_noise(bank, image_generators(0, 0, 4))
    alpha, sigma = levels(plan.rows[0].timestep)
    exact = 0.3 + 0.2 * (noise - alpha * 0.3) / (alpha**2 * 0.2**2 + sigma**2).sqrt()
    return float((denoise(bank, plan, noise, []) - exact).square().mean().sqrt())


PLAIN = Process(clip_sample=False)
DETERMINISTIC = {arm.sampler.short: arm.spec for arm in free_arms(PLAIN, [5]) if arm.spec.scheduler != "ddpm"}


@pytest.mark.parametrize("told", DETERMINISTIC)
def test_every_deterministic_arm_comes_nearer_to_the_flow_with_more_steps(told):
    bank = Bank({"full": Gaussian.from_config(unet().config).double()}, "full", "epsilon")
    errors = [error(arm_of(PLAIN, replace(DETERMINISTIC[told], steps=steps)), bank) for steps in (5, 15, 45)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < errors[0] / 2


@pytest.mark.parametrize("told", ["DPM-Solver++ 2", "DPM-Solver++ 3", "UniPC 2", "DEIS 2", "Heun"])
def test_a_solver_of_higher_order_is_nearer_at_ten_steps_than_one_of_the_first(told):
    bank = Bank({"full": Gaussian.from_config(unet().config).double()}, "full", "epsilon")
    spec = replace(DETERMINISTIC[told], steps=10)
    assert error(arm_of(PLAIN, spec), bank) < error(arm_of(PLAIN, replace(DETERMINISTIC["Euler"], steps=10)), bank)


REFUSED = {
    "karras of ddim": ("ddim", "karras", 0, "leading, trailing or linspace"),
    "karras of pndm": ("pndm", "karras", 0, "leading, trailing or linspace"),
    "lambdas of unipc": ("unipc", "lambdas", 0, "karras"),
    "order of euler": ("euler", "own", 2, "no choice of orders"),
    "order of the default": ("own", "own", 1, "no choice of orders"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_sampler_does_not_know_is_refused_with_what_it_has(case):
    name, spacing, order, has = REFUSED[case]
    with pytest.raises(PlanError, match=has) as error:
        sampler_of(Process(), SampleSpec(scheduler=name, spacing=spacing, order=order))
    told = str(error.value)
    assert ("ddim" if name == "own" else name) in told and str(order or spacing) in told and "\n" not in told


COSINE = Process(beta_schedule="squaredcos_cap_v2")


def test_where_a_process_ends_in_pure_noise_the_arms_leave_its_last_timesteps_out():
    arms = free_arms(COSINE, [10])
    assert {arm.sampler.config["timestep_spacing"] for arm in arms if arm.spec.scheduler != "ddim"} == {"leading"}
    assert not any(arm.sampler.config.get(key) for arm in arms for key, _ in SPACED.values())
    for spacing in ("karras", "trailing"):
        with pytest.raises(PlanError, match="pure noise"):
            sampler_of(COSINE, SampleSpec(scheduler="dpmsolver++", spacing=spacing))
    assert {arm.spec.spacing for arm in free_arms(replace(COSINE, prediction="v_prediction"), [10])} > {"karras"}


def test_samplers_that_cannot_be_put_on_a_process_are_no_arms_of_it():
    zero = replace(PLAIN, rescale_betas_zero_snr=True, prediction="v_prediction")
    assert {arm.spec.scheduler for arm in free_arms(zero, [8])} == {"ddim", "ddpm", "dpmsolver++", "unipc", "euler"}
    assert {arm.spec.scheduler for arm in free_arms(replace(PLAIN, prediction="sample"), [8])} == set(SOLVERS) - {
        "pndm"
    }


OWN = {
    "PNDM": diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    "Euler, trailing": EULER(timestep_spacing="trailing"),
    "DPM-Solver++ 3, Karras": MULTISTEP(solver_order=3, use_karras_sigmas=True),
    "singlestep": diffusers.DPMSolverSinglestepScheduler(),
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler(),
    "DDIM": diffusers.DDIMScheduler(timestep_spacing="trailing"),
}


def saved(scheduler) -> dict:
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


@pytest.mark.parametrize("scheduler", OWN.values(), ids=OWN)
def test_own_is_the_sampler_that_the_model_came_with_whole(scheduler):
    found = sampler_of(Process.of(saved(scheduler)), SampleSpec(), saved(scheduler))
    kept = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    assert type(found) is type(scheduler) and {key: found.config[key] for key in kept} == kept


@pytest.mark.parametrize(
    "own",
    [None, saved(DDPMScheduler()), saved(diffusers.DDPMParallelScheduler()), {}],
    ids=["none", "DDPM", "DDPM parallel", "empty"],  # a config's text hangs on the order of a set
)
def test_own_is_ddim_where_the_model_came_with_its_trainings_process(own):
    process = Process(clip_sample_range=0.5)
    found, wanted = (sampler_of(process, SampleSpec(scheduler=name), own) for name in ("own", "ddim"))
    assert type(found) is type(wanted) is diffusers.DDIMScheduler and found.config == wanted.config


@pytest.mark.parametrize("spacing", ["own", "leading", "trailing", "linspace"])
@pytest.mark.parametrize("options", [{}, {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}], ids=str)
def test_own_is_called_ddim_where_it_is_that_to_the_letter(options, spacing):
    own = saved(diffusers.DDIMScheduler(**options, **({} if spacing == "own" else {"timestep_spacing": spacing})))
    process = Process.of(own)
    spec = settled(process, SampleSpec(), own)
    assert spec == SampleSpec(scheduler="ddim") == settled(process, SampleSpec(), None)
    found, whole = (plain_config(sampler_of(process, one, own)) for one in (spec, SampleSpec()))
    assert found == whole
    assert settled(process, SampleSpec(scheduler="euler"), own) == SampleSpec(scheduler="euler")


def test_own_stays_own_where_ddim_by_name_is_another_sampler():
    brought = (OWN["PNDM"], diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False,
                                                    timestep_spacing="trailing"))  # fmt: skip
    for own in map(saved, brought):  # by name the second would leave out the last timesteps
        assert settled(Process.of(own), SampleSpec(), own) == SampleSpec()


def test_a_spacing_and_an_order_are_put_on_the_models_own_sampler():
    own = saved(OWN["DPM-Solver++ 3, Karras"])
    found = sampler_of(Process.of(own), SampleSpec(spacing="trailing", order=2), own)
    assert (found.config.use_karras_sigmas, found.config.timestep_spacing, found.config.solver_order) == (
        False,
        "trailing",
        2,
    )
    with pytest.raises(PlanError, match="KDPM2"):
        own = saved(diffusers.KDPM2DiscreteScheduler())
        sampler_of(Process.of(own), SampleSpec(order=2), own)


def test_orders_are_those_of_a_recipe():
    assert {order for solver in SOLVERS.values() for order in solver.orders} < set(get_args(Order))
