"""The surrogate: an additive error model fitted to measured plans, and what to measure next by it.

Sources: ridge regression by marginal likelihood (MacKay, Bayesian Interpolation, 1992), restricted for what is not
pulled (Patterson and Thompson, 1971); Thompson sampling (Thompson, 1933) for the next plan.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from halfstep.search.frontier import best_within, frontier
from halfstep.search.space import Genes, Space

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
