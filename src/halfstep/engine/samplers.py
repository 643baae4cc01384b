"""Samplers: which diffusers schedulers a plan may name, and how a recipe's sampler is put on a forward process."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import torch

from halfstep.core.errors import PlanError
from halfstep.core.process import FLOW_SCHEDULERS, Process
from halfstep.core.recipe import Order, SamplerName, SampleSpec, Spacing
from halfstep.core.solvers import SOLVERS, SPACED, Solver, solver_of

SCHEDULERS: dict[SamplerName, tuple[Any, dict[str, Any]]] = {
    name: (getattr(diffusers, solver.cls), dict(solver.options)) for name, solver in SOLVERS.items()
}
"""The samplers that a recipe names, with what their configs say beside the process. Others enter as the model's own, or
through `plan_for`: any class of `process.BETA_SCHEDULERS` but those of `REFUSED`.

What diffusers does by itself at the end of few steps is kept, the best behaved of its settings at 5 to 15 steps:
DPM-Solver++ and UniPC step from the last noise level to 0 by one step of order 1 (`final_sigmas_type` "zero"), and
below 15 steps the step before is of order 2 (`lower_order_final`). On fashion16-dense the squared distance to the
converged pictures is 0.0234, 0.0131, 0.0068 and 0.0024 at 5, 8, 10 and 15 steps of DPM-Solver++ 3; with "sigma_min"
0.0224, 0.0123, 0.0062 and 0.0423; without the lower order too 0.541 and 0.0423 at 5 and 15; UniPC without it is
infinite."""

REFUSED = {
    "DPMSolverSDEScheduler": "whose noise hangs on the batch and not on an image's generator",
}
"""Schedulers of a process of betas that no plan may name, and why."""

TRAINING = ("DDPMScheduler", "DDPMParallelScheduler")
"""Schedulers that say how a model was trained; as samplers they need all the timesteps."""

LEAST_SIGNAL = 1e-6
"""Below this alpha_bar a predicted noise tells nothing of the picture: its error is multiplied by 1/sqrt(alpha_bar)."""


def sampler_of(process: Process, sample: SampleSpec, own: Mapping[str, Any] | None = None) -> Any:
    """The scheduler of a recipe's sampler on a process.

    `own`: the scheduler config that the model came with, for a recipe that says "own". It is taken whole, with the
    recipe's spacing and order if it says any; DDIM takes the place of DDPM, which needs all the timesteps, and of none.
    Raises PlanError for a sampler that cannot be put on the process, and for a spacing or an order that it has not.
    """
    if sample.scheduler == "own" and own is not None and own_class(own) not in TRAINING:
        return _own_sampler(process, sample, own)
    if process.is_flow:
        return _flow_sampler(process, sample)
    if sample.shift:
        got, expected = f"a shift of {sample.shift:g}", "0 for a process of betas"
        raise PlanError(got=got, expected=expected, where="sample.shift", do="leave it out")
    name = "ddim" if sample.scheduler == "own" else sample.scheduler
    solver, (cls, options) = SOLVERS[name], SCHEDULERS[name]
    trained = process.scheduler()
    config = process.config() | options | _choices(name, solver, sample)
    if name == "ddpm":
        config["variance_type"] = {"posterior": "fixed_small", "beta": "fixed_large"}[sample.variance]
    if process.beta_schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2"):  # which DDPM alone knows
        config["trained_betas"] = trained.betas.tolist()
    if process.rescale_betas_zero_snr and not _rescales(cls):
        raise PlanError(
            got=name,
            expected=_or([other for other, (one, _) in SCHEDULERS.items() if _rescales(one)]),
            where="a process of zero terminal SNR",
            do="write e.g. --set sample.scheduler=ddim",
        )
    clips = name in ("ddim", "ddpm") and (process.clip_sample or process.thresholding)
    if process.prediction == "epsilon" and float(trained.alphas_cumprod[-1]) < LEAST_SIGNAL and not clips:
        _require_leading(process, name, sample)
        config["timestep_spacing"] = "leading"
    return cls.from_config(config)


def _flow_sampler(process: Process, sample: SampleSpec) -> Any:
    """A recipe's sampler by its class for flow matching; Euler where the recipe says "own" and the model nothing.
    Raises PlanError for one that has none, and for a spacing: what spaces noise levels there is the shift."""
    name = "euler" if sample.scheduler == "own" else sample.scheduler
    solver = SOLVERS[name]
    if not solver.flow:
        able = _or([other for other, one in SOLVERS.items() if one.flow])
        raise PlanError(got=name, expected=able, where="flow matching", do="take one of these")
    if sample.spacing != "own":
        got, expected = f"spacing {sample.spacing} of {name}", "own: flow matching spaces by its shift"
        raise PlanError(got=got, expected=expected, where="sample.spacing", do="write e.g. --set sample.shift=3")
    process = replace(process, shift=sample.shift or process.shift)
    asked = _choices(name, solver, sample)
    if FLOW_SCHEDULERS[solver.flow] == "shift":
        return scheduler_of(solver.flow, {"num_train_timesteps": process.timesteps, "shift": process.shift} | asked)
    return scheduler_of(solver.flow, {**process.config(), **solver.options, **asked})


def own_class(config: Mapping[str, Any]) -> str:
    """The diffusers class of a scheduler's config; DDPM's where it says none."""
    return str(config.get("_class_name") or "DDPMScheduler")


def settled(process: Process, sample: SampleSpec, own: Mapping[str, Any] | None) -> SampleSpec:
    """A recipe's sampler by name, where "own" is DDIM to the letter: of a model that came with its training's process,
    with nothing, or with DDIM of which the process carries every key. So runs of before, whose recipes say DDIM, hold.
    """
    if sample.scheduler != "own":
        return sample
    if process.is_flow:
        return sample
    named = replace(sample, scheduler="ddim")
    if own is None or own_class(own) in TRAINING:
        return named
    if own_class(own) == "DDIMScheduler":
        with contextlib.suppress(PlanError):
            both = (plain_config(sampler_of(process, one, own)) for one in (named, sample))
            return named if next(both) == next(both) else sample
    return sample


def about_own(config: Mapping[str, Any], taken: SamplerName) -> str:
    """The sampler that a model came with, in words; `taken`: what the recipe says."""
    cls = own_class(config)
    solver = solver_of(cls)
    told = f"own sampler: {solver.told if solver else cls.removesuffix('Scheduler')}"
    return f"{told}, which needs all timesteps: DDIM runs" if taken in ("own", "ddim") and cls in TRAINING else told


def _own_sampler(process: Process, sample: SampleSpec, own: Mapping[str, Any]) -> Any:
    """The model's own scheduler, with the recipe's spacing and order if it says any."""
    cls = own_class(own)
    said = {key: value for key, value in own.items() if not key.startswith("_") and value is not None}
    said.pop("predict_epsilon", None)  # how diffusers said the prediction until 0.10
    if process.is_flow and sample.shift:
        said[FLOW_SCHEDULERS[cls]] = sample.shift
    if FLOW_SCHEDULERS.get(cls) == "shift":
        said.pop("prediction_type", None)  # which these have not: diffusers would say so each time
    config = said if process.is_flow else process.config() | said | {"prediction_type": process.prediction}
    if sample.spacing != "own":  # in place of what the config says
        others = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas")
        config = {key: value for key, value in config.items() if key not in others}
    asked = _choices(cls, solver_of(cls) or Solver(cls, cls), sample)
    return scheduler_of(cls, config | asked, "the model's own sampler")


def _choices(name: str, solver: Solver, sample: SampleSpec) -> dict[str, Any]:
    """What a recipe's spacing and order are in a config. Raises PlanError for those that the sampler has not."""
    if sample.order and sample.order not in solver.orders:
        raise PlanError(
            got=f"order {sample.order} of {name}",
            expected=_or([str(order) for order in solver.orders]) if solver.orders else "0: it has no choice of orders",
            where="sample.order",
            do="leave it out" if not solver.orders else "take one of these",
        )
    if sample.spacing not in ("own", *solver.spacings):
        raise PlanError(
            got=f"spacing {sample.spacing} of {name}",
            expected=_or(solver.spacings),
            where="sample.spacing",
            do=f"take one of these, or {_or([n for n, one in SOLVERS.items() if sample.spacing in one.spacings])}",
        )
    config: dict[str, Any] = {"solver_order": sample.order} if sample.order else {}
    if sample.spacing in SPACED:
        config[SPACED[sample.spacing][0]] = True
    elif sample.spacing != "own":
        config["timestep_spacing"] = sample.spacing
    return config


def _require_leading(process: Process, name: str, sample: SampleSpec) -> None:
    """Refuse what starts at the last timestep where nothing of the picture is left there."""
    if sample.spacing not in ("own", "leading"):
        raise PlanError(
            got=f"spacing {sample.spacing} of {name}",
            expected="leading, which leaves the last timesteps out: the process ends in pure noise",
            where="sample.spacing",
            do="leave it out, or --set sample.scheduler=ddim",
        )
    if 2 * sample.steps > process.timesteps:
        raise PlanError(
            got=f"{sample.steps} steps of {name}",
            expected=f"at most {process.timesteps // 2} where the process ends in pure noise",
            where="sample.steps",
            do="take fewer steps, or --set sample.scheduler=ddim",
        )


def _rescales(cls: Any) -> bool:
    """Whether a diffusers class knows of zero terminal SNR."""
    return "rescale_betas_zero_snr" in inspect.signature(cls.__init__).parameters


def _or(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


FREE: tuple[tuple[SamplerName, tuple[Order, ...], tuple[Spacing, ...]], ...] = (
    ("ddim", (0,), ("own", "trailing")),
    ("dpmsolver++", (2, 3), ("own", "leading", "trailing", "karras", "lambdas")),
    ("unipc", (2, 3), ("own", "trailing", "karras")),
    ("deis", (2, 3), ("own", "trailing", "karras")),
    ("heun", (0,), ("own", "trailing", "karras")),
    ("euler", (0,), ("own", "trailing", "karras")),
    ("pndm", (0,), ("own", "trailing")),
    ("ddpm", (0,), ("own",)),
)
"""What a user gets for a word: stock samplers, with the orders and the spacings that are worth a try."""


FLOW: tuple[tuple[SamplerName, tuple[Order, ...], tuple[float, ...]], ...] = (
    ("euler", (0,), (0, 1, 3)),
    ("heun", (0,), (0, 1, 3)),
    ("dpmsolver++", (2, 3), (0, 1, 3)),
    ("unipc", (2, 3), (0, 1, 3)),
)
"""The same for flow matching, with shifts of its noise levels: the process's own, none, and SD3's."""


def families(process: Process) -> list[SampleSpec]:
    """Every sampler of `FREE` with its order and spacing, but those that cannot be put on the process; for flow
    matching every one of `FLOW` with its order and shift."""
    if process.is_flow:
        found = [
            SampleSpec(scheduler=name, order=order, shift=shift, steps=FEW)
            for name, orders, shifts in FLOW
            for order, shift in itertools.product(orders, shifts)
            if shift != process.shift  # which 0 is already
        ]
    else:
        found = [
            SampleSpec(scheduler=name, spacing=spacing, order=order, steps=FEW)
            for name, orders, spacings in FREE
            for order, spacing in itertools.product(orders, spacings)
        ]
    return [spec for spec in found if _fits(process, spec)]


def _fits(process: Process, spec: SampleSpec) -> bool:
    with contextlib.suppress(PlanError):
        sampler_of(process, spec)
        return True
    return False


FEW = 4
"""Steps at which it is seen whether a sampler can be put on a process."""


def at_calls(family: SampleSpec, calls: int) -> SampleSpec | None:
    """The sampler with as many steps as take so many network calls; None where it has no such number: Heun takes
    2 n - 1 for n steps, PNDM n + 1."""
    match family.scheduler:
        case "heun":
            steps = (calls + 1) // 2 if calls % 2 else 0
        case "pndm":
            steps = calls - 1
        case _:
            steps = calls
    return replace(family, steps=steps) if steps > 1 else None


def scheduler_of(name: str, config: Mapping[str, Any], where: object = "plan") -> Any:
    """A fresh diffusers scheduler by the name of its class. Raises PlanError for one that no plan may name, and for a
    config that is of another process, unknown, or that the scheduler itself refuses."""
    Process.of({**config, "_class_name": name}, where=where, error=PlanError)
    if name in REFUSED:
        raise PlanError(
            got=f"{name}, {REFUSED[name]}",
            expected="a scheduler that draws from a generator for every image",
            where=where,
            do="take another, e.g. DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'",
        )
    try:
        return getattr(diffusers, name).from_config(dict(config))
    except Exception as error:  # whatever diffusers raises at values that do not go together
        raise _refused(name, error, where) from error


def plain_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config as JSON has it. Raises PlanError for what no file can hold (a function, say)."""
    said = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    said = {key: value for key, value in said.items() if value != -math.inf}  # DPM-Solver's "not clipped": no JSON
    try:
        return json.loads(json.dumps(said, default=lambda array: array.tolist()))
    except (TypeError, ValueError, AttributeError) as error:
        raise _refused(type(scheduler).__name__, error, "plan") from error


def with_timesteps(scheduler: Any, steps: int, device: torch.device | str = "cpu") -> Any:
    """A scheduler set to so many steps. Raises PlanError for a number that it refuses: more than in training."""
    try:
        scheduler.set_timesteps(steps, device=device)
    except Exception as error:
        name, most = type(scheduler).__name__, scheduler.config.num_train_timesteps
        if not 1 <= steps <= most:
            expected = f"at most the {most} of the training"
            raise PlanError(got=f"{steps} steps", expected=expected, where=name, do="take fewer steps") from error
        raise _refused(name, error, f"{steps} steps") from error
    return scheduler


def rehearse(scheduler: Any) -> None:
    """Walk a copy's whole trajectory on numbers instead of pictures, with a generator for each of two.

    scheduler: with its timesteps set; it stays where it is.  Raises PlanError, in diffusers' own words, for settings
    that it would trip over in the middle of a trajectory or that leave no number there.
    """
    walker, name = copy.deepcopy(scheduler), type(scheduler).__name__
    options = step_options(walker, [torch.Generator().manual_seed(k) for k in range(2)])
    sample = torch.ones(2, 1, 2, 2)
    try:
        for t in walker.timesteps:
            model_input(walker, sample, t)
            sample = walker.step(torch.zeros_like(sample), t, sample, return_dict=False, **options)[0]
    except Exception as error:
        raise _refused(name, error, "plan") from error
    if not bool(sample.isfinite().all()):
        raise PlanError(
            got=f"a {name} whose trajectory leaves the numbers",
            expected="a finite picture",
            where="plan",
            do="change the betas, the timestep spacing or the number of steps",
        )


def model_input(scheduler: Any, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What the network is given of the scheduler's sample at a timestep; flow matching's own classes scale nothing."""
    return scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample


def prediction_type(scheduler: Any) -> str:
    """What a scheduler takes; flow matching's own classes have no word for the one that they take."""
    return scheduler.config.get("prediction_type", "flow_prediction")


def noise_scale(scheduler: Any) -> Any:
    """What unit noise is multiplied by where a trajectory begins."""
    return getattr(scheduler, "init_noise_sigma", 1.0)


def step_options(scheduler: Any, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """What `scheduler.step` takes beside its three tensors: the images' generators, where it draws noise."""
    return {"generator": list(generators)} if "generator" in inspect.signature(scheduler.step).parameters else {}


def _refused(name: str, error: Exception, where: object) -> PlanError:
    told = str(error).strip().splitlines() or [type(error).__name__]
    return PlanError(
        got=f"settings that {name} refuses ({told[0]})",
        expected="settings that go together",
        where=where,
        do="change the scheduler's config or the number of steps",
    )
