"""Stock diffusers pipelines: which part denoises, which half of a doubled batch is conditional, which samplers fit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from halfstep.core.errors import ModelError, PlanError
from halfstep.core.plan import Price, Row, Sampler, StepPlan, call_of
from halfstep.core.process import BETA_SCHEDULERS, FLOW_SCHEDULERS, Process
from halfstep.engine.calls import require_rows_fed
from halfstep.engine.entry import Reuse, reuse_named
from halfstep.engine.profiling import count_macs, example_inputs, reused_macs
from halfstep.engine.samplers import noise_scale, plain_config, scheduler_of, with_timesteps
from halfstep.nets.architectures import ARCHITECTURES
from halfstep.nets.denoiser import eager
from halfstep.nets.reuse import require_cut
from halfstep.nets.text import MOST_TOKENS

ROLES = ("unet", "transformer")
"""What diffusers pipelines call their denoiser."""

DENOISERS = tuple(
    dict.fromkeys(
        (
            *ARCHITECTURES,
            "UNet2DConditionModel",
            "DiTTransformer2DModel",
            "PixArtTransformer2DModel",
            "SD3Transformer2DModel",
            "FluxTransformer2DModel",
        )
    )
)
"""Denoisers that a plan can be put under, by class. Where they can be cut stands in `nets/architectures.py`."""

CONDITIONAL_HALF: Mapping[str, int] = {
    "DiTPipeline": 0,
    "LDMTextToImagePipeline": 1,
    "PixArtAlphaPipeline": 1,
    "PixArtSigmaPipeline": 1,
    "StableDiffusion3Img2ImgPipeline": 1,
    "StableDiffusion3InpaintPipeline": 1,
    "StableDiffusion3Pipeline": 1,
    "StableDiffusionControlNetImg2ImgPipeline": 1,
    "StableDiffusionControlNetInpaintPipeline": 1,
    "StableDiffusionControlNetPipeline": 1,
    "StableDiffusionImg2ImgPipeline": 1,
    "StableDiffusionInpaintPipeline": 1,
    "StableDiffusionPipeline": 1,
    "StableDiffusionXLControlNetPipeline": 1,
    "StableDiffusionXLImg2ImgPipeline": 1,
    "StableDiffusionXLInpaintPipeline": 1,
    "StableDiffusionXLPipeline": 1,
}
"""Pipelines that guide by one call of a doubled batch, and which half of it is the conditional one. Flux is none: its
true guidance makes two calls, and keeps its scale to itself."""

DROPS_VARIANCE = ("DiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline")
"""Pipelines that leave a learned variance unused."""

UNIT_NOISE = ("DDIMPipeline", "DDPMPipeline", "DiTPipeline", "LDMTextToImagePipeline")
"""Pipelines that begin with noise of unit variance whatever their scheduler says, so that samplers of noise levels
(Euler, Heun, LMS ...) draw nothing of use in them."""

STEP_TAKES = {"DDIMPipeline": "eta", "DDPMPipeline": "generator"}
"""What pipelines hand to their scheduler's step, whether it takes it or not."""

TIMES_1000 = ("FluxTransformer2DModel",)
"""Denoisers that take the scheduler's timesteps divided by 1000."""


def denoiser_of(pipe: Any) -> tuple[str, Any]:
    """The pipeline's denoiser, with its name there. Raises ModelError for a pipeline that has none that is known."""
    parts = getattr(pipe, "components", {})
    found = {role: parts[role] for role in ROLES if parts.get(role) is not None}
    for role, module in found.items():
        if family_name(module) is not None:
            return role, module
    told = ", ".join(f"{role} {type(eager(module)).__name__}" for role, module in found.items())
    raise ModelError(
        got=f"a {type(pipe).__name__} with {told or 'no ' + ' or '.join(ROLES)}",
        expected=f"a {' or '.join(DENOISERS)}",
        where="the pipeline",
        do="bring a pipeline with one of these",
    )


def family_name(module: Any) -> str | None:
    """Which of `DENOISERS` a module is, whatever compiled it or derives from it; None: of none."""
    names = (cls.__name__ for cls in eager(module).__class__.__mro__)  # that of what is inside, under a plan too
    return next((name for name in names if name in DENOISERS), None)


def says_guidance(plan: StepPlan) -> bool:
    """Whether a plan says of every row how it is guided; else it is left to the pipeline."""
    return plan.guidance != 1 or any(plan.guides)


def conditional_half(pipe: Any) -> int:
    """Which half of the pipeline's doubled batch is conditional. Raises PlanError where it has no such batch."""
    names = (cls.__name__ for cls in type(pipe).__mro__)
    found = next((CONDITIONAL_HALF[name] for name in names if name in CONDITIONAL_HALF), None)
    if found is None:
        raise PlanError(
            got=f"guides for a {type(pipe).__name__}",
            expected=f"a pipeline that guides in one call: {', '.join(CONDITIONAL_HALF)}",
            where="plan",
            do="leave the guides out of the plan",
        )
    return found


# ------------------------------------------------------------------------------------------------------------ samplers


def scheduler_for(pipe: Any, sampler: Sampler) -> Any:
    """A fresh scheduler of a plan's sampler, for the pipeline's process.

    Raises PlanError where the pipeline's own scheduler is of another process (other betas, another prediction, or, of a
    process that is not of betas, another class), and for a sampler that the pipeline's loop does not run.
    """
    own, name = pipe.scheduler, sampler.name
    mine, known = type(own).__name__, {*BETA_SCHEDULERS, *FLOW_SCHEDULERS}
    theirs, ours = plain_config(own), dict(sampler.config)
    if not {name, mine} <= known or (name == mine and FLOW_SCHEDULERS.get(name) == "shift"):
        if name != mine or theirs.get("num_train_timesteps") != ours.get("num_train_timesteps"):
            raise _another_process(pipe, name, mine)
        return type(own).from_config(ours)
    fresh = scheduler_of(name, sampler.config)
    if FLOW_SCHEDULERS.get(mine) == "shift":
        theirs["use_dynamic_shifting"] = False  # a matter of the sampler
    if not _same_process(theirs | {"_class_name": mine}, sampler.scheduler_config):
        raise _another_process(pipe, f"{name} of another process", mine)
    _require_runs(pipe, fresh)
    return fresh


def _require_runs(pipe: Any, scheduler: Any) -> None:
    """Raise PlanError for a scheduler that asks for more than the pipeline's loop does."""
    names = [cls.__name__ for cls in type(pipe).__mro__]
    given = next((STEP_TAKES[name] for name in names if name in STEP_TAKES), None)
    scaled = float(noise_scale(scheduler)) != 1 and bool({*names} & {*UNIT_NOISE})
    if scaled or (given is not None and given not in inspect.signature(scheduler.step).parameters):
        raise PlanError(
            got=f"a plan for {type(scheduler).__name__}",
            expected="a sampler that begins with unit noise" if scaled else f"one whose step takes {given}",
            where=type(pipe).__name__,
            do="take another, e.g. DDIMScheduler",
        )


def _another_process(pipe: Any, got: str, mine: str) -> PlanError:
    expected = f"one of the process of its {mine}"
    return PlanError(got=f"a plan for {got}", expected=expected, where=type(pipe).__name__, do="make the plan with it")


def _same_process(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two scheduler configs tell of the same noise and the same prediction."""
    both = [Process.of(config, where="the scheduler", error=PlanError) for config in (one, other)]
    if both[0].is_flow or both[1].is_flow:  # its shift is a matter of the sampler
        return both[0].is_flow == both[1].is_flow and both[0].timesteps == both[1].timesteps
    first, second = (process.scheduler().alphas_cumprod for process in both)
    same = first.shape == second.shape and torch.allclose(first, second, rtol=1e-4, atol=1e-9)
    return same and both[0].prediction == both[1].prediction


def set_for(pipe: Any, scheduler: Any, steps: int, height: int | None = None, width: int | None = None) -> Any:
    """The scheduler with the timesteps that the pipeline's loop would set. Height and width, in pixels and by default
    the pipeline's own, count where timesteps are shifted by the size of the picture (Flux, Stable Diffusion 3.5)."""
    if not getattr(scheduler.config, "use_dynamic_shifting", False) and family_name(pipe_net(pipe)) not in TIMES_1000:
        return with_timesteps(scheduler, steps)
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    keys = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    mu = calculate_shift(_tokens(pipe, height, width), *(config.get(key, value) for key, value in keys.items()))
    if family_name(pipe_net(pipe)) in TIMES_1000 and not config.get("use_flow_sigmas"):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    else:
        scheduler.set_timesteps(steps, mu=mu)
    return scheduler


def pipe_net(pipe: Any) -> Any:
    """The pipeline's denoiser."""
    return denoiser_of(pipe)[1]


def _tokens(pipe: Any, height: int | None, width: int | None) -> int:
    """How many tokens the transformer has of a picture."""
    scale, config = pipe.vae_scale_factor, pipe_net(pipe).config
    sides = [side or pipe.default_sample_size * scale for side in (height, width)]
    if family_name(pipe_net(pipe)) in TIMES_1000:  # latents packed two by two
        return int(np.prod([side // (2 * scale) for side in sides]))
    return int(np.prod([side // scale // config.patch_size for side in sides]))


# --------------------------------------------------------------------------------------------------------------- plans

FULL = "full"
"""What plans call a pipeline's own denoiser."""


def plan_for(
    pipe: Any,
    steps: int,
    *,
    phrases: Sequence[Sequence[str]] = ((FULL,),),
    guidance: float = 1.0,
    sampler: Any = None,
    height: int | None = None,
    width: int | None = None,
    prices: Mapping[str, Price] | None = None,
) -> StepPlan:
    """A plan for a diffusers pipeline, without any search.

    `phrases`: what rows call, one phrase after the other, the last one again and again until the rows end:
    (["full"] * 3, ["full", "full~0", "full~0"]) computes three rows whole, then one in three. "full" is the pipeline's
    own denoiser, "full~k" reuses its features at cut k, "full~k+" a straight line through the last two.
    `guidance`: 1 leaves guidance to the pipeline; with another weight every row is guided by its own entry, but for
    "full|", which is not, and "full|full~0", whose unconditional half reuses (see `core/plan.call_of`).
    `sampler`: a diffusers scheduler, or its `Sampler`, for `steps` steps; by default the pipeline's own scheduler.
    `height`, `width`: of the pictures in pixels, where timesteps hang on them (see `set_for`). `prices`: of one call of
    every entry; by default their MACs, counted here.
    Raises PlanError for entries that are none of these, for rows that reuse what too few rows before them have
    computed, for a sampler of another process, and for guidance that the
    pipeline has not; ModelError for a denoiser that is not known and for cuts that it has not.
    """
    net = pipe_net(pipe)
    if type(net) is not net.__class__:
        got, expected = "a pipeline that has a plan", "one that has none"
        raise PlanError(got=got, expected=expected, where="plan_for", do="detach(pipe) first")
    chosen = pipe.scheduler if sampler is None else sampler
    if not isinstance(chosen, Sampler):
        chosen = Sampler(type(chosen).__name__, plain_config(chosen), steps)
    fresh = set_for(pipe, scheduler_for(pipe, Sampler(chosen.name, chosen.config, steps)), steps, height, width)
    times = [float(t) for t in fresh.timesteps]
    spoken = _spoken(phrases, len(times))
    calls = [call_of(name, guidance) for name in dict.fromkeys(spoken)]
    if guidance != 1 or any(guide for _, guide in calls):
        conditional_half(pipe)
    names = dict.fromkeys(name for entry, guide in calls for name in (entry, *([guide.entry] if guide else [])))
    links = {name: own_reuse(name, net) for name in names if name != FULL}
    plan = StepPlan(
        rows=tuple(Row(t, FULL) for t in times),
        sampler=Sampler(chosen.name, chosen.config, steps),
        reference=FULL,
        prices=_macs(net, links, _padded(pipe)) if prices is None else dict(prices),
        guidance=guidance,
    )
    plan = plan.with_entries(spoken)
    require_rows_fed(plan.rows, links)
    return plan


def _spoken(phrases: Sequence[Sequence[str]], rows: int) -> list[str]:
    """The entry of every row. Raises PlanError for phrases without entries."""
    if not phrases or not all(phrases):
        raise PlanError(got="an empty phrase", expected="entries", where="phrases", do="give at least one, e.g. full")
    said = [name for phrase in phrases for name in phrase]
    while len(said) < rows:
        said += phrases[-1]
    return said[:rows]


def own_reuse(name: str, net: Any, of: str = FULL) -> Reuse:
    """The reuse of a pipeline's own denoiser by its entry's name. Raises PlanError for a name that is none, ModelError
    for a cut that the net has not."""
    link = reuse_named(name)
    if link is None or link.of != of:
        raise PlanError(
            got=f"entry {name!r}",
            expected=f"{of!r}, the pipeline's own denoiser, or its reuse, e.g. {of}~0",
            where="plan",
            do="give the bank that has it",
        )
    require_cut(net, link.cut, f"entry {name!r}")
    return link


def _padded(pipe: Any) -> int | None:
    """How many tokens Stable Diffusion's pipelines pad a prompt to, which their tokenizer says; None: as the denoiser's
    family has it."""
    tokenizer = getattr(pipe, "tokenizer", None)
    stable = any(cls.__name__.startswith("StableDiffusion") for cls in type(pipe).__mro__)
    if tokenizer is None or not stable or family_name(pipe_net(pipe)) != "UNet2DConditionModel":
        return None
    length = tokenizer.model_max_length  # 10 ** 30 where it knows none
    return length if length <= MOST_TOKENS else None


def _macs(net: Any, links: Mapping[str, Reuse], tokens: int | None) -> dict[str, Price]:
    """MACs of one call of the net, and of its reuse, with texts of so many tokens."""
    inputs = None if tokens is None else example_inputs(net, tokens=tokens)
    whole = {FULL: Price(count_macs(net, inputs=inputs))}
    return whole | {name: Price(reused_macs(net, one.cut, tokens=tokens)) for name, one in links.items()}
