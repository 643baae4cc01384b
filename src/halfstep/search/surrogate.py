"""The surrogate: an additive error model fitted to measured plans of one or several arms, and what to measure next.

An arm is a sampler with its steps; a plan says what runs in each of its genes. Sources: ridge regression by marginal
likelihood (MacKay, Bayesian Interpolation, 1992), restricted for what is not pulled (Patterson and Thompson, 1971);
Thompson sampling (Thompson, 1933) for the next plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfstep.search.frontier import best_within, frontier
from halfstep.search.space import Genes, Space

STRENGTHS = np.geomspace(0.003, 30.0, 13)
"""How strongly the fitted model is pulled to the table's, in units of the scores' noise: which one, the scores tell."""

Plan = tuple[int, Genes]
"""An arm and what its genes run."""


@dataclass(frozen=True)
class Fitted:
    """An error model: per arm the error of every (gene, entry), [K, E], and what the arm adds to all its plans."""

    costs: tuple[np.ndarray, ...]
    offsets: np.ndarray

    def error(self, plan: Plan) -> float:
        arm, genes = plan
        return float(self.offsets[arm] + self.costs[arm][np.arange(len(genes)), list(genes)].sum())


def fit_arms(
    tables: Sequence[np.ndarray],
    plans: Sequence[Plan],
    scores: Sequence[float],
    errors: Sequence[float] = (),
    draw: np.random.Generator | None = None,
) -> Fitted:
    """Rescale the error tables of several arms to measured plans, all in one additive model:

        score = base + f * sum_k table[k, g_k] + e * errors[arm] + o[arm] + sum_k (a[s] * table[k, g_k] + b[s, g_k])

    tables: of every arm [K, E], in one measure and with one set of entries.  errors: of every arm, what it is off with
    the reference in every gene (0 by default).  Genes of unlike length are told by their place in the trajectory: s is
    the stage, of which there are as many as the finest arm has genes.
    The common factors f and e are free, a, b and o are pulled to zero: ridge regression, whose strength and noise
    follow from the scores by their marginal likelihood (the noise from what the fit leaves free, not from its
    residuals: with more coefficients than plans those are nearly zero). In units of the score. With `draw` it is one
    sample of the posterior over strength, noise and coefficients instead of its mean (Thompson sampling): plausible for
    what was measured so far.
    """
    layout = _Layout.of(tables, errors)
    x = np.array([layout.row(plan) for plan in plans])
    y = np.asarray(scores, dtype=np.float64)
    centre = x.mean(axis=0)
    weights = _ridge(x - centre, y - y.mean(), layout.penalty, draw)
    # every stage gets its own factor, and none says that damage does good
    weights[layout.factors] = np.maximum(max(weights[0], 1e-6) + weights[layout.factors], 0.0)
    weights[0] = 0.0
    base = y.mean() - centre @ weights
    return Fitted(tuple(one @ weights for one in layout.genes), base + layout.arms @ weights)


@dataclass(frozen=True)
class _Layout:
    """The rows of the design, as sums: `genes`: per arm what every (gene, entry) adds, [K, E, P]; `arms`: what the arm
    itself adds, [A, P]. Columns: all damage, the arm's error, damage by stage (`factors`), offsets by stage and entry,
    offsets by arm. The first two are free."""

    genes: tuple[np.ndarray, ...]
    arms: np.ndarray
    factors: slice
    penalty: np.ndarray

    @classmethod
    def of(cls, tables: Sequence[np.ndarray], errors: Sequence[float]) -> _Layout:
        stages, entries, count = max(len(table) for table in tables), tables[0].shape[1], len(tables)
        penalty = np.concatenate([np.full(stages, 1.0), np.full(stages * entries, 4.0), np.full(count, 1.0)])
        largest = max(1e-12, *(float(np.abs(table).max()) for table in tables))
        genes = []
        for table in tables:
            places, one = _places(len(table), stages), np.zeros((*table.shape, FREE + len(penalty)))
            one[:, :, 0] = unit = table / largest
            one[:, :, FREE : FREE + stages] = unit[:, :, None] * (places / places.sum(1, keepdims=True))[:, None]
            for e in range(entries):
                one[:, e, FREE + stages + e : FREE + stages + stages * entries : entries] = places
            genes.append(one)
        arms = np.zeros((count, FREE + len(penalty)))
        known = np.asarray(errors if len(errors) else np.zeros(count), dtype=np.float64)
        arms[:, 1] = known / max(float(np.abs(known).max()), 1e-12)
        arms[:, -count:] = np.eye(count)
        return cls(tuple(genes), arms, slice(FREE, FREE + stages), penalty)

    def row(self, plan: Plan) -> np.ndarray:
        """[P], of one plan."""
        arm, genes = plan
        return self.arms[arm] + self.genes[arm][np.arange(len(genes)), list(genes)].sum(axis=0)


FREE = 2
"""Columns of a design that are not pulled to zero: the common factors of damage and of the arms' errors."""


def _places(genes: int, stages: int) -> np.ndarray:
    """Which share of every stage each gene takes, [genes, stages]: columns sum to 1."""
    first, begin = (np.arange(genes) / genes)[:, None], np.arange(stages) / stages
    both = np.minimum(first + 1 / genes, begin + 1 / stages) - np.maximum(first, begin)
    return np.clip(both, 0, None) * stages


def _ridge(
    design: np.ndarray, y: np.ndarray, penalty: np.ndarray, draw: np.random.Generator | None = None
) -> np.ndarray:
    """The coefficients of y [n] by design [n, FREE + P], both centred: their posterior mean, or one draw of it."""
    evidence, noise = np.array([_evidence(design, y, strength * penalty) for strength in STRENGTHS]).T
    at = int(evidence.argmax())
    if draw is not None:
        likely = np.exp(evidence - evidence.max())
        at = int(draw.choice(len(likely), p=likely / likely.sum()))
    precision = design.T @ design + np.diag(np.concatenate([np.full(FREE, 1e-9), STRENGTHS[at] * penalty]))
    solved = np.linalg.solve(precision, design.T @ y)
    if draw is None:
        return solved
    free = _free_degrees(design)
    spread = np.sqrt(noise[at] * free / draw.chisquare(free))
    moved = np.linalg.solve(np.linalg.cholesky(precision).T, draw.standard_normal(len(solved)))
    moved[:FREE] *= _told(design)  # what no plan tells apart is not drawn: it would be anything
    return solved + spread * moved


def _told(design: np.ndarray) -> np.ndarray:
    """Which of the free columns differ among the plans, [FREE]."""
    return np.square(design[:, :FREE]).sum(axis=0) > 1e-12


def _free_degrees(design: np.ndarray) -> int:
    """Degrees of freedom of the noise: the plans without the constant and the free columns."""
    return max(1, len(design) - 1 - int(_told(design).sum()))


def _evidence(design: np.ndarray, y: np.ndarray, penalty: np.ndarray) -> tuple[float, float]:
    """Log marginal likelihood of y [n], up to a constant, and its noise variance, when the coefficients [P] of the
    pulled columns have variance noise / penalty; constant and free columns are free (restricted likelihood)."""
    n, pulled = len(y), design[:, FREE:]
    covariance = np.eye(n) + (pulled / penalty) @ pulled.T
    free = np.column_stack([np.ones(n), design[:, :FREE][:, _told(design)]])
    count = free.shape[1]
    whitened = np.linalg.solve(np.linalg.cholesky(covariance), np.column_stack([free, y]))
    free, y = whitened[:, :count], whitened[:, count]
    gram = free.T @ free + 1e-12 * np.eye(count)
    rest = y - free @ np.linalg.solve(gram, free.T @ y)
    degrees = _free_degrees(design)
    noise = max(float(rest @ rest) / degrees, 1e-24)
    determinants = np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(gram)[1]
    return -0.5 * (degrees * np.log(noise) + determinants), noise


def fit_costs(
    costs: np.ndarray, plans: Sequence[Genes], scores: Sequence[float], draw: np.random.Generator | None = None
) -> np.ndarray:
    """`fit_arms` of one arm: its new costs [K, E]."""
    return fit_arms([costs], [(0, genes) for genes in plans], scores, draw=draw).costs[0]


def promising(
    space: Space,
    costs: np.ndarray,
    plans: Sequence[Genes],
    scores: Sequence[float],
    price: int,
    draw: np.random.Generator,
) -> Genes:
    """What to measure next: the best plan within `price` of an error model drawn at random among those that are
    plausible for the measured plans (Thompson sampling); a new plan where ten draws find one."""
    for _ in range(10):
        sampled = fit_costs(costs, plans, scores, draw=draw)
        genes = best_within(frontier(sampled, space.gene_prices, most=5000), price).genes
        if genes not in plans:
            break
    return genes
