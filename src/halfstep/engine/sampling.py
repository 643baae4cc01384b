"""Run a plan: the one sampling loop, whose denoiser may change at every step, and what it is given."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from halfstep.core.errors import ModelError, PlanError
from halfstep.core.plan import Price, Row, Sampler, StepPlan
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec
from halfstep.data.latents import decode
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions, cond_for
from halfstep.engine.networks import RowCall, networks_of
from halfstep.engine.samplers import (
    model_input,
    noise_scale,
    plain_config,
    prediction_type,
    rehearse,
    sampler_of,
    scheduler_of,
    step_options,
    with_timesteps,
)
from halfstep.nets.denoiser import (
    Cond,
    Memo,
    corrected_as,
    require_same_shape,
    sample_shape,
)

Prices = Mapping[str, Price | int]
"""Of one call of each entry, per image; a number alone is its MACs."""


def plan_for(bank: Bank, scheduler: SchedulerMixin, steps: int, prices: Prices | None = None) -> StepPlan:
    """The plan that runs the bank's reference, guided as the bank says, at every step of a diffusers scheduler.

    `prices`: in place of the bank's own, which take a tenth of a second each to count; nothing is fixed then.
    Raises PlanError for a scheduler that no plan may name (see `samplers`), whose settings do not go together, or that
    takes another prediction than the bank gives; ModelError for a bank that predicts more than one picture.
    """
    require_same_shape(bank.config, f"bank entry {bank.reference!r}")
    name = type(scheduler).__name__
    config = plain_config(scheduler)
    process = Process.of({**config, "_class_name": name}, where=name, error=PlanError)
    if process.prediction != bank.prediction_type:
        raise PlanError(
            got=f"a scheduler for {process.prediction}",
            expected=f"{bank.prediction_type}, as the bank predicts",
            where=name,
            do=f"set its prediction_type to {bank.prediction_type!r}",
        )
    fresh = with_timesteps(scheduler_of(name, config, name), steps)
    rehearse(fresh)
    plan = StepPlan(
        rows=tuple(Row(float(t), bank.reference) for t in fresh.timesteps),
        sampler=Sampler(name, config, steps),
        reference=bank.reference,
        prices=_prices(bank.prices() if prices is None else prices),
        fixed=bank.fixed() if prices is None else Price(0),
    )
    return plan.with_guidance(bank.guidance)


def _prices(given: Prices) -> dict[str, Price]:
    return {name: one if isinstance(one, Price) else Price(one) for name, one in given.items()}


def reference_plan(
    bank: Bank,
    noise: Process | Mapping[str, Any],
    sample: SampleSpec,
    prices: Prices | None = None,
    own: Mapping[str, Any] | None = None,
) -> StepPlan:
    """The reference plan of a recipe's sampler; `noise`: the process of the model's training, or its config; `prices`
    as in `plan_for`; `own`: the scheduler config that the model came with (`noise`, where that is one)."""
    if own is None and not isinstance(noise, Process):
        own = noise
    return plan_for(bank, sampler_of(Process.of(noise), sample, own), sample.steps, prices)


def fewer_steps(plan: StepPlan, steps: int) -> StepPlan:
    """The reference in every row of the same sampler with another number of steps."""
    scheduler = with_timesteps(scheduler_of(plan.sampler.name, plan.sampler.config), steps)
    rows = tuple(Row(float(t), plan.reference) for t in scheduler.timesteps)
    return replace(plan, rows=rows, sampler=replace(plan.sampler, steps=steps)).uniform()


def build_scheduler(plan: StepPlan, device: torch.device | str = "cpu") -> SchedulerMixin:
    """A fresh scheduler for one trajectory, its timesteps set. Raises PlanError when they are not the plan's."""
    sampler = plan.sampler
    scheduler = with_timesteps(scheduler_of(sampler.name, sampler.config), sampler.steps, device)
    own = [float(t) for t in scheduler.timesteps]
    for i, row in enumerate(plan.rows):
        if i >= len(own) or not abs(own[i] - row.timestep) <= 1e-3:
            raise PlanError(
                got=f"timestep {row.timestep:g} in row {i}",
                expected=f"{own[i]:g}" if i < len(own) else f"{len(own)} rows",
                where=f"plan for {sampler.name} with {sampler.steps} steps",
                do="make the plan with the same scheduler and number of steps",
            )
    if len(own) != len(plan.rows):
        raise PlanError(
            got=f"{len(plan.rows)} rows",
            expected=f"{len(own)}",
            where=f"plan for {sampler.name}",
            do="give one per call",
        )
    return scheduler


def image_generators(seed: int, start: int, count: int) -> list[torch.Generator]:
    """One generator per image: image k depends on (seed, k) alone, not on the batch it is drawn in."""
    return [torch.Generator().manual_seed((seed * 1_000_003 + start + i) % 2**63) for i in range(count)]


@dataclass(frozen=True, slots=True)
class Step:
    """What one row did: `sample` [B,C,H,W] before the call, as the scheduler holds it, the network's own `prediction`
    of the same shape, neither guided nor corrected, that as it was `used`, and the sample `after` the row."""

    row: int
    sample: torch.Tensor
    prediction: torch.Tensor
    used: torch.Tensor
    after: torch.Tensor


def trajectory(
    bank: Bank,
    plan: StepPlan,
    sample: torch.Tensor,
    generators: Sequence[torch.Generator],
    cond: Cond | None = None,
    *,
    start: int = 0,
    scheduler: SchedulerMixin | None = None,
) -> Iterator[Step]:
    """One trajectory from noise [B,C,H,W] (unit variance, before the scheduler's scaling) to an image in about [-1, 1].

    With `start` and a `scheduler` that was stopped there, a trajectory is continued from row `start`: `sample` is then
    the scheduler's own. Raises PlanError, before the first step, for a plan that is not the scheduler's, and for a row
    that reuses features which no row from `start` on has left before it.
    """
    networks = networks_of(bank, plan, start)
    if scheduler is None:
        scheduler = build_scheduler(plan, sample.device)
        sample = sample * noise_scale(scheduler)
    return walk(networks, plan.rows, scheduler, sample, generators, cond, start)


@torch.inference_mode()  # around each row, not around what its caller does between two of them
def walk(
    networks: Sequence[RowCall],
    rows: Sequence[Row],
    scheduler: Any,
    sample: torch.Tensor,
    generators: Sequence[torch.Generator] = (),
    cond: Cond | None = None,
    start: int = 0,
) -> Iterator[Step]:
    """The one sampling loop: row after row a call, its guide's, its correction, and the scheduler's step.

    networks: by row, what it calls, its guide with it.  scheduler: its timesteps are those of the rows; it
    stands at row `start`.
    """
    kind, timesteps, cond, memo = prediction_type(scheduler), scheduler.timesteps, cond or {}, Memo()
    options = step_options(scheduler, generators)
    levels = levels_of(scheduler) if kind != "epsilon" and any(row.corrected for row in rows) else timesteps
    for i in range(start, len(rows)):
        row, t = rows[i], timesteps[i]
        inputs = model_input(scheduler, sample, t)
        inputs = inputs.flatten().view(inputs.shape)  # plain strides: else one entry's layout rules the next one's
        found, used = predicted(networks[i], row, inputs, t, cond, memo)
        if row.corrected:
            used = corrected_as(kind, used, inputs, levels[i], *row.correction)
        after = scheduler.step(used, t, sample, return_dict=False, **options)[0]
        yield Step(i, sample, found, used, after)
        sample = after


def last(steps: Iterator[Step]) -> torch.Tensor:
    """Run a trajectory to its end and return its final sample."""
    [end] = deque(steps, maxlen=1)
    return end.after


def denoise(
    bank: Bank, plan: StepPlan, noise: torch.Tensor, generators: Sequence[torch.Generator], cond: Cond | None = None
) -> torch.Tensor:
    """The image at the end of a whole `trajectory`."""
    return last(trajectory(bank, plan, noise, generators, cond))


def predicted(
    call: RowCall, row: Row, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, memo: Memo
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a row's entry predicts of the scheduler's scaled sample, and that as its guide leaves it."""
    found, other = call(sample, timestep, cond, memo)
    return found, found if row.guide is None or other is None else guided(found, other, row.guide.weight)


def guided(own: torch.Tensor, guide: torch.Tensor, weight: float) -> torch.Tensor:
    """A prediction led away from a worse one of the same input and conditions, all of one shape; weight 1 is unguided.

    Autoguidance (arXiv 2406.02507) with D_1 the own net and D_0 its guide: D_w = w D_1 + (1 - w) D_0. The same in
    noise, v and clean sample, which are affine in one another at one input and timestep.
    """
    return guide + weight * (own - guide)  # w D_1 + (1 - w) D_0


def levels_of(scheduler: Any) -> torch.Tensor:
    """alphas_cumprod at every call, [rows]: what the network's input is mixed by, once the scheduler has scaled it; of
    flow matching the share of the picture in it."""
    if prediction_type(scheduler) == "flow_prediction":
        return 1 - scheduler.sigmas[: len(scheduler.timesteps)]
    if hasattr(scheduler, "sigmas"):  # of float timesteps too
        return 1 / (1 + scheduler.sigmas[: len(scheduler.timesteps)].square())
    return scheduler.alphas_cumprod[scheduler.timesteps.cpu().long()]


def start_noise(bank: Bank, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Unit noise [B,C,H,W], one image per generator, drawn on the generator's own device; `image_generators` are on the
    CPU, so that devices agree."""
    shape = sample_shape(bank.config)
    noise = [torch.randn(shape, generator=g, device=g.device).to(bank.device) for g in generators]
    return torch.cat(noise).to(bank.dtype)


def sample_images(
    bank: Bank,
    plan: StepPlan,
    count: int,
    *,
    seed: int,
    batch: int = 256,
    conditions: Conditions | None = None,
    first: int = 0,
) -> Iterator[torch.Tensor]:
    """Images first … first + count - 1 of a seed, as batches in [-1, 1] (clamped), decoded where they are latents.

    `conditions`: which image is drawn under what (default: the classes in turn).
    """
    for begin in range(first, first + count, batch):
        n = min(batch, first + count - begin)
        generators = image_generators(seed, begin, n)
        noise = start_noise(bank, generators)
        yield to_images(bank, denoise(bank, plan, noise, generators, cond_for(bank, begin, n, conditions)))


def to_images(bank: Bank, sample: torch.Tensor) -> torch.Tensor:
    """What `denoise` gives, decoded where the bank works on latents, clamped to [-1, 1].

    Raises ModelError for pictures that are not finite, which would be stored as black ones.
    """
    images = sample if bank.vae is None else decode(bank.vae, sample)
    if not bool(images.isfinite().all()):
        raise ModelError(
            got="pictures that are not finite",
            expected="numbers",
            where="sampling",
            do="try another sampler or float32; if neither helps, the weights are broken",
        )
    return images.clamp(-1, 1)
