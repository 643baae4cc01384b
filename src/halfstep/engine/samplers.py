"""Samplers: which diffusers schedulers a plan may name, and how a recipe's sampler is put on a forward process."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch

from halfstep.core.errors import PlanError
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "ddpm": (diffusers.DDPMScheduler, {}),
    "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
}
"""The samplers that a recipe names. Others enter through `plan_for` with a scheduler of the user's own: any class of
`process.BETA_SCHEDULERS` but those of `REFUSED`."""

REFUSED = {
    "DPMSolverSDEScheduler": "whose noise hangs on the batch and not on an image's generator",
}
"""Schedulers of a process of betas that no plan may name, and why."""

LEAST_SIGNAL = 1e-6
"""Below this alpha_bar a predicted noise tells nothing of the picture: its error is multiplied by 1/sqrt(alpha_bar)."""


def sampler_of(process: Process, sample: SampleSpec) -> Any:
    """The scheduler of a recipe's sampler on a process.

    Where the process ends in pure noise (zero terminal SNR, cosine betas) and the noise is what is predicted, a sampler
    that does not clip its estimate must not start at the last timestep: one error there, thousands of times itself, is
    all that is left in the picture. It takes "leading" timesteps, which leave the last ones out.
    Raises PlanError for a sampler that cannot be put on the process.
    """
    cls, options = SCHEDULERS[sample.scheduler]
    trained = process.scheduler()
    config = process.config() | options
    if sample.scheduler == "ddpm":
        config["variance_type"] = {"posterior": "fixed_small", "beta": "fixed_large"}[sample.variance]
    if process.beta_schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2"):  # which DDPM alone knows
        config["trained_betas"] = trained.betas.tolist()
    if process.rescale_betas_zero_snr and sample.scheduler == "heun":
        raise PlanError(
            got="heun",
            expected="ddim, ddpm, dpmsolver++ or euler",
            where="a process of zero terminal SNR",
            do="write e.g. --set sample.scheduler=ddim",
        )
    clips = sample.scheduler in ("ddim", "ddpm") and (process.clip_sample or process.thresholding)
    if process.prediction == "epsilon" and float(trained.alphas_cumprod[-1]) < LEAST_SIGNAL and not clips:
        config["timestep_spacing"] = "leading"
        if 2 * sample.steps > process.timesteps:
            raise PlanError(
                got=f"{sample.steps} steps of {sample.scheduler}",
                expected=f"at most {process.timesteps // 2} where the process ends in pure noise",
                where="sample.steps",
                do="take fewer steps, or --set sample.scheduler=ddim",
            )
    return cls.from_config(config)


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
            walker.scale_model_input(sample, t)
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
