"""Which plan is best for a budget: the error table and the exact frontier, on evaluators given as callables.

The search knows entries, their MACs and a score (lower is better); it does not know what an entry is or how a score is
measured. Rows of a plan are grouped into genes, stretches of neighbouring rows that share an entry: few genes search
better than many (DDSM's own vector has one per timestep).

Source of the error table: HarmoniCa (arXiv 2410.01723), which weighs a step by what swapping it alone does to the final
image; here it is how far that moves the final image, paired by noise: tens of images rank the swaps, where a difference
of two distances to the data needs thousands (benchmarks/error_table.md).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfstep.bank import Bank
from halfstep.denoiser import Memo, predictor
from halfstep.disk import read_json
from halfstep.errors import PlanError, RunError
from halfstep.plan import StepPlan
from halfstep.sampling import (
    Labels,
    build_scheduler,
    cond_for,
    image_generators,
    last,
    start_noise,
    to_images,
    trajectory,
)
from halfstep.typed import build

Genes = tuple[int, ...]
"""The entry's index of every gene."""
Measure = Callable[[torch.Tensor, torch.Tensor], float]
"""How far images are from their twins of the same noise, both [N,C,H,W] in [-1, 1] (decoded where the bank works on
latents): (twins in the reference's run, images) -> 0 or more."""


@dataclass(frozen=True)
class Space:
    """What a search may choose: `entries` by name, their `macs` per call, and the number of rows of each gene."""

    entries: tuple[str, ...]
    macs: tuple[int, ...]
    rows: tuple[int, ...]
    reference: int

    @classmethod
    def of(cls, plan: StepPlan, entries: Sequence[str], genes: int) -> Space:
        """Group the plan's rows into at most `genes` stretches of nearly equal length."""
        count = min(genes, len(plan.rows))
        edges = np.linspace(0, len(plan.rows), count + 1).round().astype(int)
        names = tuple(entries)
        macs = tuple(plan.prices[name].macs for name in names)
        return cls(names, macs, tuple(int(n) for n in np.diff(edges)), names.index(plan.reference))

    @property
    def gene_macs(self) -> np.ndarray:
        """MACs per image of every (gene, entry), int64 [K, E]."""
        return np.outer(self.rows, self.macs).astype(np.int64)

    @property
    def full_macs(self) -> int:
        return sum(self.rows) * self.macs[self.reference]

    def cost(self, genes: Sequence[int]) -> int:
        """MACs per image of a plan."""
        return int(self.gene_macs[np.arange(len(self.rows)), list(genes)].sum())

    def share(self, genes: Sequence[int]) -> float:
        return self.cost(genes) / self.full_macs

    def uniform_within(self, macs: int) -> list[Genes]:
        """The plans of one entry everywhere that cost at most `macs`, the dearest first."""
        plans = [(entry,) * len(self.rows) for entry in range(len(self.entries))]
        return sorted((genes for genes in plans if self.cost(genes) <= macs), key=self.cost, reverse=True)

    def expand(self, genes: Sequence[int]) -> list[str]:
        """The entry of every row."""
        return [self.entries[g] for g, n in zip(genes, self.rows, strict=True) for _ in range(n)]

    def require_budget(self, budget: float) -> int:
        """The budget in MACs. Raises PlanError outside of (0, 1] or below the cheapest plan."""
        cheapest = sum(self.rows) * min(self.macs) / self.full_macs
        if not 0 < budget <= 1:
            raise PlanError(got=budget, expected="a share of the MACs in (0, 1]", where="budget", do="write e.g. 0.5")
        if budget < cheapest - 1e-9:
            raise PlanError(
                got=budget,
                expected=f"at least {cheapest:.3f}, the cheapest entry everywhere",
                where="budget",
                do="raise the budget or add narrower widths",
            )
        return int(budget * self.full_macs + 0.5)


# ------------------------------------------------------------------------------------------------------ error table


MEASURE_AGAIN = "delete it to measure again"


@dataclass(frozen=True)
class ErrorTable:
    """`local` [T, E]: mean squared distance of each entry's prediction from the reference's, at each row of the
    reference's own trajectories; `damage` [K, E]: how far the final images move when one gene alone runs the entry.

    A damage is blind to the way: an entry that makes pictures better, or only other ones as good, moves them too. The
    plans that are measured against the data (`fit_costs`) are there to see that. `measure`: what a damage is.
    """

    timesteps: tuple[float, ...]
    entries: tuple[str, ...]
    local: np.ndarray
    damage: np.ndarray
    images: int
    measure: str = "moved features"

    def costs(self, table: str, rows: Sequence[int]) -> np.ndarray:
        """The additive error model [K, E]: the measured "damage", or the "local" errors."""
        if table == "damage":
            return self.damage
        return np.add.reduceat(self.local, np.cumsum([0, *rows[:-1]]), axis=0)

    def to_json(self) -> dict[str, Any]:
        return {
            "timesteps": list(self.timesteps),
            "entries": list(self.entries),
            "local": self.local.tolist(),
            "damage": self.damage.tolist(),
            "images": self.images,
            "measure": self.measure,
        }

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and of genes."""
        return len(self.local), len(self.damage)

    @classmethod
    def load(cls, file: Path) -> ErrorTable:
        """Read errors.json. Raises RunError."""
        return cls.from_json(read_json(file, what="an error table", do=MEASURE_AGAIN), where=file)

    @classmethod
    def from_json(cls, record: Mapping[str, Any], *, where: object = "errors.json") -> ErrorTable:
        """Rebuild a table; those of before the paired measure say "change of distance".

        Raises RunError for what is none, and for numbers that are not one for each of its rows and entries.
        """
        one = build(_Table, record, "", where, error=RunError, do=MEASURE_AGAIN)
        sizes = [(len(table), {len(row) for row in table}) for table in (one.local, one.damage)]
        if sizes[0][0] != len(one.timesteps) or any(found != {len(one.entries)} for _, found in sizes):
            raise RunError(
                got="tables of uneven sizes",
                expected=f"a number for each of {len(one.entries)} entries in every row",
                where=where,
                do=MEASURE_AGAIN,
            )
        return cls(one.timesteps, one.entries, np.array(one.local), np.array(one.damage), one.images, one.measure)


@dataclass(frozen=True, kw_only=True)
class _Table:
    """errors.json."""

    timesteps: tuple[float, ...]
    entries: tuple[str, ...]
    local: tuple[tuple[float, ...], ...]
    damage: tuple[tuple[float, ...], ...]
    images: int
    measure: str = "change of distance"


@torch.inference_mode()
def error_table(
    bank: Bank,
    plan: StepPlan,
    space: Space,
    measure: Measure,
    *,
    images: int,
    seed: int,
    batch: int = 256,
    labels: Labels | None = None,
) -> Iterator[tuple[int, int, ErrorTable | None]]:
    """Measure the table on `images` trajectories of the plan's own sampler; yields (done, total, None), then the table.

    Each gene is swapped alone: the reference runs up to it, the entry inside it, the reference after it.
    `labels`: as in `sample_images`.
    """
    swaps = [(k, e) for k in range(len(space.rows)) for e in range(len(space.entries)) if e != space.reference]
    starts = np.cumsum([0, *space.rows])
    total, done = len(swaps) * -(-images // batch), 0
    local = np.zeros((len(plan.rows), len(space.entries)))
    finals: dict[tuple[int, int], list[torch.Tensor]] = {swap: [] for swap in [*swaps, (0, space.reference)]}
    for first in range(0, images, batch):
        n = min(batch, images - first)
        walk = _ReferenceWalk(bank, plan, space, seed, first, n, labels)
        local += walk.local * n / images
        finals[0, space.reference].append(walk.final)
        for k, e in swaps:
            row_entries = [plan.reference] * len(plan.rows)
            row_entries[starts[k] : starts[k + 1]] = [space.entries[e]] * space.rows[k]
            finals[k, e].append(walk.resume(int(starts[k]), plan.with_entries(row_entries)))
            done += 1
            yield done, total, None
    base = torch.cat(finals[0, space.reference])
    damage = np.zeros((len(space.rows), len(space.entries)))
    for k, e in swaps:
        damage[k, e] = measure(base, torch.cat(finals[k, e]))
    timesteps = tuple(row.timestep for row in plan.rows)
    yield total, total, ErrorTable(timesteps, space.entries, local, damage, images)


class _ReferenceWalk:
    """One batch of reference trajectories, with what is needed to leave them at the start of any gene."""

    def __init__(self, bank: Bank, plan: StepPlan, space: Space, seed: int, first: int, n: int, labels: Labels | None):
        self.bank, self.seed, self.first = bank, seed, first
        self.generators = image_generators(seed, first, n)
        self.cond = cond_for(bank, first, n, labels)
        self.saved: dict[int, tuple[torch.Tensor, Any, list[torch.Tensor]]] = {}
        self.local = np.zeros((len(plan.rows), len(space.entries)))
        starts = {int(s) for s in np.cumsum([0, *space.rows[:-1]])}
        scheduler = build_scheduler(plan, bank.device)
        sample = start_noise(bank, self.generators) * scheduler.init_noise_sigma
        others = [(e, predictor(bank[name])) for e, name in enumerate(space.entries) if e != space.reference]
        before, states = copy.deepcopy(scheduler), [g.get_state() for g in self.generators]
        for step in trajectory(bank, plan.uniform(), sample, self.generators, self.cond, scheduler=scheduler):
            if step.row in starts:
                self.saved[step.row] = (step.sample.clone(), copy.deepcopy(before), states)
            t = scheduler.timesteps[step.row]
            inputs = before.scale_model_input(step.sample, t)
            for e, other in others:
                gap = other(inputs, t, self.cond, Memo()) - step.prediction
                self.local[step.row, e] = gap.square().mean().item()
            sample = step.after
            before, states = copy.deepcopy(scheduler), [g.get_state() for g in self.generators]
        self.final = to_images(bank, sample)

    def resume(self, row: int, plan: StepPlan) -> torch.Tensor:
        """Leave the reference trajectory at `row` and follow `plan` from there."""
        sample, scheduler, states = self.saved[row]
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)
        left = trajectory(
            self.bank, plan, sample.clone(), self.generators, self.cond, start=row, scheduler=copy.deepcopy(scheduler)
        )
        return to_images(self.bank, last(left))


# --------------------------------------------------------------------------------------------------------- frontier


@dataclass(frozen=True)
class Point:
    """A plan on the frontier: its MACs per image, its modelled error, its genes."""

    macs: int
    error: float
    genes: Genes


def frontier(costs: np.ndarray, macs: np.ndarray, most: int = 100_000) -> list[Point]:
    """Every plan that is best for some budget when errors add up, cheapest first.

    costs, macs: [K, E], the error and the MACs of entry e in gene k. Dynamic programming over undominated partial
    plans: exact, equal to trying all E^K plans. Where more than `most` of them stay undominated (hundreds of genes),
    the Lagrangian hull is returned instead: its points are exact, between them lies at most one gene's upgrade.
    Raises PlanError for an empty or mismatched table.
    """
    costs, macs = np.asarray(costs, dtype=np.float64), np.asarray(macs, dtype=np.int64)
    if costs.shape != macs.shape or costs.ndim != 2 or 0 in costs.shape or not np.isfinite(costs).all():
        raise PlanError(
            got=f"tables of shape {costs.shape} and {macs.shape}",
            expected="finite [genes, entries]",
            where="frontier",
            do="measure the error table again",
        )
    total_macs, total_error = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []  # per gene: (parent state, chosen entry) of every kept state
    entries = costs.shape[1]
    for k in range(len(costs)):
        new_macs = (total_macs[:, None] + macs[k]).ravel()
        new_error = (total_error[:, None] + costs[k]).ravel()
        kept = _undominated(new_macs, new_error)
        if len(kept) > most:
            return hull(costs, macs)
        total_macs, total_error = new_macs[kept], new_error[kept]
        trail.append((kept // entries, kept % entries))
    return [Point(int(total_macs[i]), float(total_error[i]), _walk_back(trail, i)) for i in range(len(total_macs))]


def hull(costs: np.ndarray, macs: np.ndarray) -> list[Point]:
    """The frontier's lower convex hull: start from the cheapest plan, apply upgrades by error saved per MAC."""
    genes, upgrades = [], []
    for k in range(len(costs)):
        kept = _undominated(macs[k], costs[k])
        corners = [int(kept[0])]
        for e in map(int, kept[1:]):
            while len(corners) > 1 and _saving(costs, macs, k, corners[-2], e) >= _saving(
                costs, macs, k, corners[-2], corners[-1]
            ):
                corners.pop()
            corners.append(e)
        genes.append(corners[0])
        upgrades += [(_saving(costs, macs, k, a, b), k, a, b) for a, b in itertools.pairwise(corners)]
    rows = np.arange(len(costs))
    total_macs, total_error = int(macs[rows, genes].sum()), float(costs[rows, genes].sum())
    points = [Point(total_macs, total_error, tuple(genes))]
    for _, k, a, b in sorted(upgrades, key=lambda u: -u[0]):
        genes[k] = b
        total_macs, total_error = (
            total_macs + int(macs[k, b] - macs[k, a]),
            total_error + float(costs[k, b] - costs[k, a]),
        )
        points.append(Point(total_macs, total_error, tuple(genes)))
    return points


def _saving(costs: np.ndarray, macs: np.ndarray, k: int, a: int, b: int) -> float:
    """Error saved per MAC when gene k goes from entry a to entry b."""
    return float((costs[k, a] - costs[k, b]) / (macs[k, b] - macs[k, a]))


def _undominated(macs: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Indices of the points that no cheaper or equal one beats, by rising MACs."""
    order = np.lexsort((error, macs))
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(error[order])[:-1]])
    return order[error[order] < best_before]


def _walk_back(trail: list[tuple[np.ndarray, np.ndarray]], state: int) -> Genes:
    genes = []
    for parents, entries in reversed(trail):
        genes.append(int(entries[state]))
        state = int(parents[state])
    return tuple(reversed(genes))


def best_within(points: Sequence[Point], macs: int) -> Point:
    """The frontier's plan with the least error among those of at most `macs`. Raises PlanError when there is none."""
    fitting = [p for p in points if p.macs <= macs]
    if not fitting:
        raise PlanError(
            got=f"{macs} MACs", expected=f"at least {points[0].macs}", where="budget", do="raise the budget"
        )
    return fitting[-1]


STRENGTHS = np.geomspace(0.003, 30.0, 13)
"""How strongly the fitted model is pulled to the table's, in units of the scores' noise: which one, the scores tell."""


def fit_costs(
    costs: np.ndarray, plans: Sequence[Genes], scores: Sequence[float], draw: np.random.Generator | None = None
) -> np.ndarray:
    """Rescale an additive error model to measured plans: score = base + sum_k a[k] * costs[k, g_k] + b[k, g_k].

    Non-negative a[k] near one common factor and entry offsets near zero: ridge regression, whose strength and noise
    follow from the scores by their marginal likelihood (the noise from what the fit leaves free, not from its
    residuals: with more coefficients than plans those are nearly zero). Returns the new costs [K, E], in units of the
    score, up to a constant. With `draw` they are one sample of the posterior over strength, noise and coefficients
    instead of its mean (Thompson sampling): plausible for what was measured so far.
    """
    genes, entries = costs.shape
    rows = np.arange(genes)
    unit = costs / max(float(np.abs(costs).max()), 1e-12)
    x = np.zeros((len(plans), genes + genes * entries))
    for i, plan in enumerate(plans):
        x[i, :genes] = unit[rows, list(plan)]
        x[i, genes + rows * entries + np.array(plan)] = 1.0
    y = np.asarray(scores, dtype=np.float64)
    total = x[:, :genes].sum(axis=1)  # of the common factor, which is not pulled
    design, y = np.column_stack([total - total.mean(), x - x.mean(axis=0)]), y - y.mean()
    penalty = np.concatenate([np.full(genes, 1.0), np.full(genes * entries, 4.0)])
    evidence, noise = np.array([_evidence(design, y, strength * penalty) for strength in STRENGTHS]).T
    at = int(evidence.argmax())
    if draw is not None:
        likely = np.exp(evidence - evidence.max())
        at = int(draw.choice(len(likely), p=likely / likely.sum()))
    precision = design.T @ design + np.diag([1e-9, *STRENGTHS[at] * penalty])
    solved = np.linalg.solve(precision, design.T @ y)
    if draw is not None:
        free = max(1, len(plans) - 2)
        spread = np.sqrt(noise[at] * free / draw.chisquare(free))
        solved += spread * np.linalg.solve(np.linalg.cholesky(precision).T, draw.standard_normal(len(solved)))
    factors = np.maximum(max(solved[0], 1e-6) + solved[1 : genes + 1], 0.0)
    return factors[:, None] * unit + solved[genes + 1 :].reshape(genes, entries)


def _evidence(design: np.ndarray, y: np.ndarray, penalty: np.ndarray) -> tuple[float, float]:
    """Log marginal likelihood of y [n], up to a constant, and its noise variance, when coefficients [P] of
    design[:, 1:] have variance noise / penalty; constant and first column are free (restricted likelihood)."""
    n = len(y)
    covariance = np.eye(n) + (design[:, 1:] / penalty) @ design[:, 1:].T
    free = np.column_stack([np.ones(n), design[:, 0]])
    whitened = np.linalg.solve(np.linalg.cholesky(covariance), np.column_stack([free, y]))
    free, y = whitened[:, :2], whitened[:, 2]
    gram = free.T @ free + 1e-12 * np.eye(2)
    rest = y - free @ np.linalg.solve(gram, free.T @ y)
    degrees = max(1, n - 2)
    noise = max(float(rest @ rest) / degrees, 1e-24)
    determinants = np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(gram)[1]
    return -0.5 * (degrees * np.log(noise) + determinants), noise


def promising(
    space: Space,
    costs: np.ndarray,
    plans: Sequence[Genes],
    scores: Sequence[float],
    macs: int,
    draw: np.random.Generator,
) -> Genes:
    """What to measure next: the best plan within `macs` of an error model drawn at random among those that are
    plausible for the measured plans (Thompson sampling); a new plan where ten draws find one."""
    for _ in range(10):
        sampled = fit_costs(costs, plans, scores, draw=draw)
        genes = best_within(frontier(sampled, space.gene_macs, most=5000), macs).genes
        if genes not in plans:
            break
    return genes
