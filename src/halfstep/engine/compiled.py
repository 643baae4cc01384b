"""A plan's sampler as numbers: each step a linear combination, read off the stock diffusers scheduler.

Every step of diffusers' samplers is linear in the samples and predictions of this and earlier rows, in fresh noise, and
in estimates of the clean picture that were clipped. So a scheduler that is walked with unit vectors in the place of
pictures, a new one for every sample and prediction that it is given, puts out its own coefficients, whatever it
remembers and corrects inside. What is read is then replayed on random numbers beside the scheduler itself: one that is
not linear (dynamic thresholding) is refused and never approximated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from halfstep.core.errors import PlanError
from halfstep.core.plan import Row, StepPlan
from halfstep.engine.samplers import (
    model_input,
    noise_scale,
    prediction_type,
    rehearse,
    scheduler_of,
    step_options,
    with_timesteps,
)
from halfstep.engine.sampling import build_scheduler, levels_of
from halfstep.nets.denoiser import clean_and_noise, corrected_as

Terms = tuple[tuple[int, float], ...]
"""Summands of a linear combination: (which, coefficient)."""

TOLERANCE = 1e-5
"""Of the largest number, how far a replay may be from the scheduler itself."""
_NOTHING = 2e-7
"""Of the largest coefficient: what float32 sigmas leave of a zero."""
_EXTRA, _WINDOW, _DRAWS = 128, 64, 4
"""Coordinates that hold noise alone; how many of the last draws a step may depend on, and how many it may make."""


@dataclass(frozen=True)
class Corrected:
    """A row's correction of its prediction p of the network's input x, by numbers: with the noise
    e = sample x + prediction p it uses p + slope (scale soft(e, threshold) - e)."""

    scale: float
    threshold: float
    sample: float
    prediction: float
    slope: float


@dataclass(frozen=True)
class Step:
    """One row: the network is given `scale` times the sample, and the sample after it is a sum over earlier and own
    samples, predictions as they were used, noise by the number of its draw, and clipped estimates.

    `draws`: how many more of them this row makes, each of the sample's shape. `estimate`: the clean picture as
    coefficients of its sample and its prediction, clipped before it is used; None where the sampler clips nothing.
    """

    timestep: float
    scale: float
    draws: int
    samples: Terms
    predictions: Terms
    noise: Terms = ()
    clipped: Terms = ()
    estimate: tuple[float, float] | None = None
    corrected: Corrected | None = None


@dataclass(frozen=True)
class Table:
    """A sampler's steps. `noise_scale`: of the unit noise at the start; `limit`: what estimates are clipped to."""

    sampler: str
    noise_scale: float
    limit: float
    steps: tuple[Step, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compiled(plan: StepPlan) -> Table:
    """The table of a plan's sampler, with its rows' corrections.

    Raises PlanError for a plan that is not its scheduler's, for dynamic thresholding, for a class whose clipped
    estimates are not told, and for steps that are no such sums.
    """
    scheduler = build_scheduler(plan)
    rehearse(scheduler)
    limit = _limit(scheduler)
    plain = scheduler if limit is None else _fresh(plan, clip_sample=False)
    read = _read(plain, estimates=limit is not None)
    steps = read if limit is None else _with_clips(read, build_scheduler(plan), limit)
    corrected = _corrections(build_scheduler(plan), plan.rows)
    steps = [replace(step, corrected=one) for step, one in zip(steps, corrected, strict=True)]
    table = Table(plan.sampler.name, float(noise_scale(scheduler)), limit or 0.0, tuple(map(_cleaned, steps)))
    _require_equal(table, build_scheduler(plan))
    return table


def _fresh(plan: StepPlan, **changes: Any) -> Any:
    """The plan's scheduler with another config."""
    sampler = plan.sampler
    return with_timesteps(scheduler_of(sampler.name, {**sampler.config, **changes}), sampler.steps)


def _limit(scheduler: Any) -> float | None:
    """What a scheduler clips estimates to; None: it does not. Raises PlanError for what no table can hold."""
    name, known = type(scheduler).__name__, inspect.signature(type(scheduler).__init__).parameters
    if "thresholding" in known and scheduler.config.thresholding:
        raise _refused(name, "dynamic thresholding, which is not linear", "set thresholding to false in its config")
    if "clip_sample" not in known or not scheduler.config.clip_sample:
        return None
    if not name.startswith(("DDIM", "DDPM", "Heun")):
        raise _refused(name, "clipped estimates that it does not tell", "set clip_sample to false in its config")
    return float(scheduler.config.clip_sample_range)


# ------------------------------------------------------------------------------------------------------------- reading


class _Draws:
    """Every noise that a scheduler draws from a generator, drawn along with it."""

    def __init__(self, size: int, seed: int = 0, dtype: torch.dtype = torch.float64):
        self.given, self.own = (torch.Generator().manual_seed(seed) for _ in range(2))
        self.size, self.dtype, self.found = size, dtype, list[torch.Tensor]()

    def new(self) -> int:
        """How many there are since the last time it was asked."""
        before = len(self.found)
        while not torch.equal(self.given.get_state(), self.own.get_state()) and len(self.found) < before + _DRAWS:
            drawn = torch.randn((1, 1, 1, self.size), generator=self.own, dtype=self.dtype)
            self.found.append(drawn.flatten())
        return len(self.found) - before


def _read(scheduler: Any, estimates: bool) -> list[Step]:
    """The steps, by unit vectors: coordinate i is the sample of row i, n + i its prediction, the last ones noise."""
    n = len(scheduler.timesteps)
    draws = _Draws(2 * n + _EXTRA)
    options = step_options(scheduler, [draws.given])
    unit = torch.eye(2 * n + _EXTRA, dtype=torch.float64)[:, None, None, None]
    steps = []
    for i, t in enumerate(scheduler.timesteps):
        scale = float(model_input(scheduler, unit[i], t).flatten()[i])
        after, *more = scheduler.step(unit[n + i], t, unit[i], return_dict=False, **options)
        new, found = draws.new(), after.flatten().double()
        noise = _noise_in(found[2 * n :], [one[2 * n :] for one in draws.found], type(scheduler).__name__)
        for k, weight in noise:
            found = found - weight * draws.found[k]
        samples, predictions = (_terms(found[a : a + i + 1]) for a in (0, n))
        estimate = tuple(float(more[0].flatten()[k]) for k in (i, n + i)) if estimates else None
        steps.append(Step(float(t), scale, new, samples, predictions, noise, (), estimate))  # type: ignore[arg-type]
    return steps


def _noise_in(found: torch.Tensor, draws: Sequence[torch.Tensor], name: str) -> Terms:
    """By which coefficients these numbers are made of the last draws. Raises PlanError where they are not."""
    first = max(0, len(draws) - _WINDOW)
    if not draws:
        if bool(found.any()):
            raise _refused(name, "a step that is no linear combination", "take another sampler")
        return ()
    basis = torch.stack(list(draws[first:]), dim=1)
    weights = torch.linalg.lstsq(basis, found[:, None], driver="gelsd").solution[:, 0]
    if bool((basis @ weights - found).abs().max() > TOLERANCE * max(1.0, float(found.abs().max()))):
        raise _refused(name, "noise of many rows ago", "take another sampler")
    return tuple((first + k, float(weight)) for k, weight in enumerate(weights))


def _with_clips(steps: Sequence[Step], scheduler: Any, limit: float) -> list[Step]:
    """The steps of a scheduler that clips, by those of the same that does not.

    In coordinate j the estimate of row j alone is three limits: what the scheduler puts out there differs by what it
    makes of the two that are cut off.
    """
    n = len(steps)
    draws = _Draws(2 * n + _EXTRA)
    options = step_options(scheduler, [draws.given])
    heights = [3 * limit / step.estimate[1] for step in steps if step.estimate is not None]
    found = []
    for i, (step, t) in enumerate(zip(steps, scheduler.timesteps, strict=True)):
        given = torch.zeros(1, 1, 1, 2 * n + _EXTRA, dtype=torch.float64)
        model_input(scheduler, given, t)
        given[..., i] = heights[i]
        after = scheduler.step(given, t, torch.zeros_like(given), return_dict=False, **options)[0].flatten().double()
        draws.new()
        for k, weight in step.noise:
            after = after - weight * draws.found[k]
        plain = torch.zeros(i + 1, dtype=torch.float64)
        for j, weight in step.predictions:
            plain[j] = weight * heights[j]
        clipped = _terms((after[: i + 1] - plain) / (-2 * limit))
        found.append(_folded(replace(step, clipped=clipped), steps))
    return found


def _folded(step: Step, steps: Sequence[Step]) -> Step:
    """A step whose clipped terms stand for what clipping changes, with terms for the clipped estimates themselves: sums
    of large numbers that cancel are done here and not on pictures."""
    samples, predictions = dict(step.samples), dict(step.predictions)
    for j, weight in step.clipped:
        estimate = steps[j].estimate
        assert estimate is not None
        samples[j] = samples.get(j, 0.0) - weight * estimate[0]
        predictions[j] = predictions.get(j, 0.0) - weight * estimate[1]
    return replace(step, samples=tuple(samples.items()), predictions=tuple(predictions.items()))


def _terms(found: torch.Tensor) -> Terms:
    return tuple((k, float(weight)) for k, weight in enumerate(found) if weight != 0)


def _cleaned(step: Step) -> Step:
    """Without the terms that rounding alone made, where noise was told apart from the rest."""
    if not step.noise:
        return step
    parts = step.samples, step.predictions, step.noise, step.clipped
    least = _NOTHING * max(abs(weight) for terms in parts for _, weight in terms)
    samples, predictions, noise, clipped = (tuple(t for t in terms if abs(t[1]) > least) for terms in parts)
    return replace(step, samples=samples, predictions=predictions, noise=noise, clipped=clipped)


def _corrections(scheduler: Any, rows: Sequence[Row]) -> list[Corrected | None]:
    """The rows' corrections; None where a row has none, or where its sample is noise alone."""
    if not any(row.corrected for row in rows):
        return [None] * len(rows)
    kind = prediction_type(scheduler)
    zero, one = (torch.full((1, 1, 1, 1), float(k), dtype=torch.float64) for k in range(2))
    found: list[Corrected | None] = []
    levels = torch.ones(len(rows)) if kind == "epsilon" else levels_of(scheduler)
    for row, level in zip(rows, levels, strict=True):
        if not row.corrected or (kind != "epsilon" and level == 0):
            found.append(None)
            continue
        of_sample, of_prediction = (
            (0.0, 1.0)
            if kind == "epsilon"
            else (float(clean_and_noise(p, x, level, kind)[1]) for p, x in ((zero, one), (one, zero)))
        )
        doubled = float(corrected_as(kind, one, zero, level, 2.0, 0.0))  # p + slope e, where p = 1 and x = 0
        found.append(Corrected(*row.correction, of_sample, of_prediction, (doubled - 1) / of_prediction))
    return found


# ------------------------------------------------------------------------------------------------------------ replaying


def replay(
    table: Table,
    sample: torch.Tensor,
    predict: Callable[[int, torch.Tensor], torch.Tensor],
    draw: Callable[[], torch.Tensor],
) -> list[torch.Tensor]:
    """The samples after every row, from unit noise. `predict(row, network's input)`; `draw()`: unit noise."""
    samples, used, noise, clipped = [sample * table.noise_scale], list[torch.Tensor](), list[torch.Tensor](), []
    for i, step in enumerate(table.steps):
        inputs = samples[-1] * step.scale
        used.append(_used(predict(i, inputs), inputs, step.corrected))
        noise += [draw() for _ in range(step.draws)]
        if step.estimate is not None:
            a, b = step.estimate
            clipped.append((a * samples[-1] + b * used[-1]).clamp(-table.limit, table.limit))
        parts = (step.samples, samples), (step.predictions, used), (step.noise, noise), (step.clipped, clipped)
        zero = torch.zeros_like(sample)
        samples.append(sum((weight * values[k] for terms, values in parts for k, weight in terms), start=zero))
    return samples[1:]


def _used(prediction: torch.Tensor, inputs: torch.Tensor, by: Corrected | None) -> torch.Tensor:
    if by is None:
        return prediction
    noise = by.sample * inputs + by.prediction * prediction
    return prediction + by.slope * (by.scale * (noise - noise.clamp(-by.threshold, by.threshold)) - noise)


def _require_equal(table: Table, scheduler: Any) -> None:
    """Raise PlanError unless the table replays the scheduler, uncorrected, on random numbers."""
    shape, n = (1, 1, 8, 8), len(table.steps)
    random = torch.Generator().manual_seed(1)
    noise, *predictions = torch.randn(n + 1, *shape, generator=random, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    options = step_options(scheduler, generators[:1])
    sample, wanted = noise * noise_scale(scheduler), []
    for t, prediction in zip(scheduler.timesteps, predictions, strict=True):
        model_input(scheduler, sample, t)
        sample = scheduler.step(prediction, t, sample, return_dict=False, **options)[0]
        wanted.append(sample)
    plain = replace(table, steps=tuple(replace(step, corrected=None) for step in table.steps))

    def draw() -> torch.Tensor:
        return torch.randn(shape, generator=generators[1], dtype=torch.float64)

    found = replay(plain, noise, lambda i, _: predictions[i], draw)
    gap = max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(found, wanted, strict=True))
    if not gap <= TOLERANCE:
        raise _refused(table.sampler, f"steps that a table misses by {gap:.1e}", "take another sampler")


def _refused(name: str, got: str, do: str) -> PlanError:
    return PlanError(got=f"{got}, in {name}", expected="steps that are linear combinations", where="export", do=do)
