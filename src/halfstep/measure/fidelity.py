"""Fidelity: how far a plan's pictures are from the converged pictures of the same noise, image by image.

The converged picture of a noise is where the reference's probability flow leads it: a solver of so many steps that more
of them change nothing that anybody sees. A deterministic plan of the same noise wants to end there; how far off it does
is told in pixels, in structure (SSIM) and in perceptual features, and needs a few dozen images where a distance to the
data needs thousands: nothing is compared with the data, so that no sampling of it is in the number. What is far from
its converged picture can still be a good one; distances to the data decide (`quality`).

A sampler that draws noise on its way (DDPM, SDE solvers, ancestral ones) has no converged picture of its start: it is
refused, or averaged over so many ways from each start where that is asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from halfstep.core.errors import DataError, PlanError
from halfstep.core.plan import Sampler, StepPlan
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec
from halfstep.core.results import Fidelity, Interval
from halfstep.data.arrays import open_array, open_cached, write_cached
from halfstep.engine.bank import Bank
from halfstep.engine.cluster import Held
from halfstep.engine.conditions import Conditions, cond_for
from halfstep.engine.samplers import LEAST_SIGNAL, model_input, scheduler_of, step_options, with_timesteps
from halfstep.engine.sampling import (
    Prices,
    denoise,
    image_generators,
    reference_plan,
    sample_images,
    start_noise,
    to_images,
)
from halfstep.measure.features import Extractor, extract
from halfstep.nets.content import fingerprint

FINE = 100
"""Steps of DPM-Solver++ (order 2) that are converged: see `benchmarks/guides16.md`."""
BATCH = 256
"""Pictures that a feature network sees at once."""
SPAN = 2.0
"""From black to white, of pictures in [-1, 1]."""
WINDOW, SIGMA = 11, 1.5
"""Pixels of SSIM's Gaussian window, and its standard deviation (Wang et al. 2004)."""
Metric = Literal["mse", "ssim", "features"]

# ---- the converged plan --------------------------------------------------------------------------------------------


def converged_plan(
    bank: Bank, process: Process | Mapping[str, Any], steps: int = FINE, prices: Prices | None = None
) -> StepPlan:
    """The reference in every row of a fine solver: DPM-Solver++ of order 2 at trailing timesteps, of half the process's
    at most; of flow matching Heun's. `prices` as in `plan_for`.

    Where a process ends in pure noise, its sampler leaves the last timesteps out ("leading"), and there order 2 leads
    further away with more steps: order 1 (DDIM that does not clip) with five times as many takes its place. Stock DDIM
    is none: it clips its estimate of the picture and not the noise with it, and more steps lead it ever further from
    the probability flow (both in `benchmarks/guides16.md`). Raises PlanError as `reference_plan`.
    """
    process = Process.of(process)
    most = max(1, process.timesteps // 2)
    if process.is_flow:
        return reference_plan(bank, process, SampleSpec(scheduler="heun", steps=min(steps, most)), prices)
    fine = SampleSpec(scheduler="dpmsolver++", spacing="trailing", steps=min(steps, most))
    if process.prediction == "epsilon" and float(process.scheduler().alphas_cumprod[-1]) < LEAST_SIGNAL:
        fine = replace(fine, spacing="leading", order=1, steps=min(5 * steps, most))
    return reference_plan(bank, process, fine, prices)


@functools.lru_cache(maxsize=1024)
def stochastic(sampler: Sampler) -> bool:
    """Whether a sampler draws noise on its way; decided by walking it, not by its name.

    Two numbers that start alike, each with a generator of its own, part at the first noise that is drawn: SA-Solver
    adds some at certain timesteps only, DPM-Solver under one algorithm_type and not under another, TCD at all but one.
    """
    scheduler = with_timesteps(scheduler_of(sampler.name, sampler.config), sampler.steps)
    options = step_options(scheduler, image_generators(0, 0, 2))
    sample = torch.ones(2, 1, 2, 2)
    for t in scheduler.timesteps if options else ():
        model_input(scheduler, sample, t)
        sample = scheduler.step(torch.zeros_like(sample), t, sample, return_dict=False, **options)[0]
        if not torch.equal(sample[0], sample[1]):
            return True
    return False


# ---- pictures side by side -----------------------------------------------------------------------------------------


def squared_errors(found: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of pictures [N,C,H,W] from their twins, over channels and pixels -> [N]."""
    return (found.float() - twins.float()).square().mean((1, 2, 3))


def similarities(found: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
    """Structural similarity of pictures [N,C,H,W] in [-1, 1] with their twins: at most 1, of equal ones -> [N].

    Wang et al. 2004, eq. 13, with K1 = 0.01 and K2 = 0.03, in a Gaussian window of 11 pixels (of as many as
    fit, in smaller pictures), the mean over channels and over all places where the window lies inside.
    """
    a, b = found.float(), twins.float()
    c1, c2 = (0.01 * SPAN) ** 2, (0.03 * SPAN) ** 2
    rows, columns = (_windows(side).to(a.device) for side in a.shape[2:])
    mean_a, mean_b, aa, bb, ab = (rows @ x @ columns.T for x in (a, b, a * a, b * b, a * b))
    var_a, var_b, cov = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    level = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (level * (2 * cov + c2) / (var_a + var_b + c2)).mean((1, 2, 3))


def _windows(side: int) -> torch.Tensor:
    """The window's weights at every place where it fits into `side` pixels: [places, side], rows sum to 1."""
    width = min(WINDOW, side - (side + 1) % 2)  # odd
    offset = torch.arange(side) - torch.arange(side - width + 1)[:, None] - width // 2
    weights = torch.exp(-0.5 * (offset / SIGMA) ** 2) * (offset.abs() <= width // 2)
    return weights / weights.sum(1, keepdim=True)


# ---- fidelity of plans ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Fidelities:
    """What every picture of a plan is off its converged twin: float64 [n] each, image k of every plan from one noise.

    `mse`: mean squared difference of pixels in [-1, 1]. `ssim`: structural similarity. `features`: squared distance in
    a feature network's features, None without one. `draws`: ways from each start that were averaged; 0 of a
    deterministic sampler. `target`: digest of the converged pictures' plan, weights, seed and classes.
    """

    mse: np.ndarray
    ssim: np.ndarray
    features: np.ndarray | None
    features_name: str | None
    target: str
    seed: int
    draws: int = 0

    def __len__(self) -> int:
        return len(self.mse)

    def of(self, metric: Metric) -> np.ndarray:
        """One measure of every image [n]. Raises DataError for features that were not measured."""
        found = getattr(self, metric)
        if found is None:
            do = "give Converged an extractor"
            raise DataError(got="no features", expected="a feature network's", where="fidelity", do=do)
        return found

    def mean(self) -> Fidelity:
        """Means over the images, each with its 95 % interval."""
        return Fidelity(
            mse=mean_of(self.mse, least=0.0),
            ssim=mean_of(self.ssim, most=1.0),
            features=None if self.features is None else mean_of(self.features, least=0.0),
            n=len(self),
            seed=self.seed,
            draws=self.draws,
            features_name=self.features_name,
            target=self.target,
        )


def difference(a: Fidelities, b: Fidelities, metric: Metric = "mse") -> Interval:
    """How much larger a measure is of b's pictures than of a's, paired by image, with its 95 % interval.

    An interval that holds 0 does not tell the two apart. Raises DataError for pictures that are no pairs.
    """
    if (a.target, len(a)) != (b.target, len(b)):
        got = f"{len(a)} pictures beside {a.target}, {len(b)} beside {b.target}"
        do = "measure both plans on one Converged, with the same count"
        raise DataError(got=got, expected="pairs of one noise", where="fidelity", do=do)
    return mean_of(b.of(metric) - a.of(metric))


def mean_of(values: np.ndarray, least: float = -math.inf, most: float = math.inf) -> Interval:
    """The mean of independent values [n] with its 95 % interval by Student's t, within the bounds of the measure.

    Of one value alone the interval is all that the bounds leave. Raises DataError without any.
    """
    n = len(values)
    if not n:
        raise DataError(got="no images", expected="at least one", where="fidelity", do="draw some")
    value = float(values.mean())
    reach = student(n - 1) * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Interval(value=value, low=max(least, value - reach), high=min(most, value + reach))


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by its expansion about the normal's (Abramowitz & Stegun 26.7.5).

    Within 1 % from 2 degrees of freedom, 0.1 % from 4; 11 % low at 1.
    """
    z = 1.959963984540054
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**i for i, term in enumerate(terms))


def fidelities_of(
    pictures: np.ndarray, twins: np.ndarray, extractor: Extractor, *, target: str, seed: int, draws: int = 0
) -> Fidelities:
    """What pictures in [-1, 1], [N, C, H, W], are off their twins of the same noise, whoever drew either: `target` says
    what the twins are. Raises DataError for pictures that are no pairs."""
    if pictures.shape != twins.shape:
        got, expected = f"{list(pictures.shape)} beside {list(twins.shape)}", "pairs of one noise"
        raise DataError(got=got, expected=expected, where="fidelity", do="draw as many of one shape")
    found, other = torch.from_numpy(pictures), torch.from_numpy(twins)
    mse, ssim = _pixels(found, other)
    a, b = (extract(extractor, one.split(BATCH)) for one in (found, other))
    features = np.square(a - b).sum(axis=1)
    return Fidelities(
        mse=mse,
        ssim=ssim,
        features=features,
        features_name=extractor.name,
        target=target,
        seed=seed,
        draws=draws,
    )


class Converged(Held):
    """The converged pictures of images 0 … count - 1 of a seed, drawn once, and how far plans are from them.

    `plan`: a fine, deterministic one (`converged_plan`). `extractor`: None leaves features out. `batch`: images per
    call. `conditions`: as of `sample_images`. `cache`: a folder (of a run: state/) in which the
    pictures are kept, by the content of all that they hang on; a file there that is cut or changed is drawn again.
    Raises PlanError for a plan whose sampler draws noise, DataError for a count below 1.
    """

    def __init__(
        self,
        bank: Bank,
        plan: StepPlan,
        extractor: Extractor | None = None,
        *,
        count: int,
        seed: int,
        batch: int = 256,
        conditions: Conditions | None = None,
        cache: Path | None = None,
    ):
        if stochastic(plan.sampler):
            raise _drawing_noise(plan, "a deterministic solver, which can converge", "take converged_plan")
        if count < 1:
            raise DataError(got=f"{count} images", expected="at least one", where="fidelity", do="take some dozens")
        self.bank, self.plan, self.extractor = bank, plan, extractor
        self.count, self.seed, self.batch, self.conditions = count, seed, batch, conditions
        self.target = self._content()
        self.pictures = self._kept(cache)
        """float32 [count, C, H, W] in [-1, 1], in the machine's memory or on its disk."""
        self.features = None if extractor is None else extract(extractor, self._twins(count))

    def distance(self, plan: StepPlan, count: int | None = None, *, draws: int = 0) -> Fidelity:
        """The means of `fidelities`."""
        return self.fidelities(plan, count, draws=draws).mean()

    def fidelities(self, plan: StepPlan, count: int | None = None, *, draws: int = 0, first: int = 0) -> Fidelities:
        """What pictures `first` … `count` - 1 of a plan (None: all) are off their converged twins.

        `draws`: of a sampler that draws noise on its way, how many ways from each start are averaged; each costs as
        much as the pictures themselves. Without it such a sampler is refused.
        Raises PlanError, and DataError for more images than were converged.
        """
        count = self.count if count is None else count
        if not first < count <= self.count:
            expected, do = f"1 to {self.count}, as many as were converged", "converge more, or compare fewer"
            raise DataError(got=f"{count} images", expected=expected, where="fidelity", do=do)
        noisy = stochastic(plan.sampler)
        if noisy and draws < 1:
            do = "take ddim or dpmsolver++, or average over several ways from each start (draws=4)"
            raise _drawing_noise(plan, "a deterministic one: from one start it leads to many pictures", do)
        parts = [self._compared(plan, begin, count, draws if noisy else 1) for begin in range(first, count, self.batch)]
        mse, ssim, features = (np.concatenate(each) for each in zip(*parts, strict=True))
        return Fidelities(
            mse=mse,
            ssim=ssim,
            features=None if self.extractor is None else features,
            features_name=None if self.extractor is None else self.extractor.name,
            target=self.target,
            seed=self.seed,
            draws=draws if noisy else 0,
        )

    def apart(self, plan: StepPlan, first: int, last: int) -> np.ndarray:
        """Squared distances in features of pictures `first` … `last` - 1 from their converged twins, [last - first]; a
        sampler that draws noise is judged by one of its ways."""
        return self.fidelities(plan, last, first=first, draws=1).of("features")

    def _compared(self, plan: StepPlan, begin: int, count: int, draws: int) -> tuple[np.ndarray, ...]:
        """Errors, similarities and squared feature distances of one batch, each the mean over its draws, [B]."""
        rows = slice(begin, min(begin + self.batch, count))
        generators = image_generators(self.seed, begin, rows.stop - begin)
        noise = start_noise(self.bank, generators)
        cond = cond_for(self.bank, begin, len(generators), self.conditions)
        total: list[np.ndarray] = []
        for _ in range(draws):  # the generators go on: each way's noise is fresh, and image k's hangs on k alone
            found = to_images(self.bank, denoise(self.bank, plan, noise, generators, cond))
            twins = torch.from_numpy(np.array(self.pictures[rows])).to(found.device)
            total.append(np.stack([*_pixels(found, twins), self._apart(found, rows)]))
        return tuple(np.mean(total, axis=0))

    def _apart(self, found: torch.Tensor, rows: slice) -> np.ndarray:
        """Squared distances in features, [B]; zeros without a feature network."""
        if self.extractor is None or self.features is None:
            return np.zeros(len(found))
        return np.square(extract(self.extractor, [found]) - self.features[rows]).sum(axis=1)

    def _twins(self, count: int) -> Iterator[torch.Tensor]:
        for begin in range(0, count, self.batch):
            yield torch.from_numpy(np.array(self.pictures[begin : begin + self.batch]))

    def _content(self) -> str:
        """16 hex digits of what decides the converged pictures, but for their number and rounding."""
        weights = [self.bank.fingerprint(name) for name in sorted(self.plan.nets)]
        cond = cond_for(self.bank, 0, self.count, self.conditions)
        return fingerprint(self.plan.digest, weights, self.seed, str(self.bank.dtype), cond, self.bank.vae)

    def _drawn(self) -> Iterator[np.ndarray]:
        bank, plan, seed, batch = self.bank, self.plan, self.seed, self.batch
        for images in sample_images(bank, plan, self.count, seed=seed, batch=batch, conditions=self.conditions):
            yield images.float().cpu().numpy()

    def _kept(self, cache: Path | None) -> np.ndarray:
        """The pictures, from the cache where they are whole there."""
        if cache is None:
            return np.concatenate(list(self._drawn()))
        file = Path(cache) / f"converged-{self.target}-{self.count}.npy"
        found = _whole(file, self.count)
        if found is None:
            drawn = np.concatenate(list(self._drawn()))
            write_cached(file, drawn.shape, "<f4", [drawn])
            return drawn
        return found


def _whole(file: Path, count: int) -> np.ndarray | None:
    """The pictures that a cache holds; None where they are absent, cut, changed or of another number."""
    try:
        shape = open_array(file).shape
    except ValueError:
        return None
    return open_cached(file, shape, "<f4") if len(shape) == 4 and shape[0] == count else None


def _pixels(found: torch.Tensor, twins: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Errors and similarities of a batch, float64 [B]."""
    errors, alike = squared_errors(found, twins), similarities(found, twins)
    return errors.double().cpu().numpy(), alike.double().cpu().numpy()


def _drawing_noise(plan: StepPlan, expected: str, do: str) -> PlanError:
    return PlanError(
        got=f"{plan.sampler.short}, which draws noise on its way", expected=expected, where="fidelity", do=do
    )
