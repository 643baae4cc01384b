"""Regularised score matching: an l1 penalty on the score, its closed forms, and corrections that need no training.

Paper: Regularization can make diffusion models more efficient, Taheri and Lederer, 2025, arXiv 2502.09151.

Implemented: the penalised denoising loss in five variants, on pixels or Haar coefficients, centred or not; the
predictions that minimise it; their training-free counterpart, scale * soft-threshold of a plain model's prediction; and
a Gaussian toy whose sampler's law is exact for the three variance rules, on which the theory can be checked.

What differs, and why:
- The paper bounds a network of unit size and learns its scale kappa under the penalty r * kappa. As the size is
  homogeneous, that is the plain loss plus r times the size of the network's output, which needs no constraint.
- The size is a mean over coordinates, as the loss is, and is taken of the prediction in epsilon units, which has unit
  scale at every timestep: one r then means the same for every image size. Predictions of v and of the clean sample are
  converted; their loss stays their own, so that r = 0 is the plain objective bit for bit.
- Which l1 size the paper means is not settled by what could be read: outputs are the default, and parameters are
  penalised by their mean magnitude (the sum's r is this one divided by the number of weights).
- The exact score of a noisy Gaussian is never sparse: on a coordinate without data it is at its largest. On a N(0, 1)
  coordinate, score + x is exactly zero; `center` penalises that.

What is exact in the toy, 1 - alpha_t = 4 log T / T, KL divergence of the sampler from the target per coordinate:

    >>> levels = theory_levels(100)
    >>> law = gaussian_sampler_variance(torch.tensor([1.0, 4.0]), levels, "beta")
    >>> [f"{kl:.1e}" for kl in gaussian_kl(law, torch.tensor([1.0, 4.0])).tolist()]
    ['0.0e+00', '1.4e-03']
    >>> unit = torch.ones(1)
    >>> posterior = gaussian_sampler_variance(unit, levels, "posterior")
    >>> f"{posterior.item():.2f}"  # too narrow: this is what shrinking the prediction offsets
    '0.67'
    >>> scale = exact_scale(unit, levels, "posterior")  # [T, 1], from 0.53 at t = 1 to 1.00
    >>> f"{gaussian_sampler_variance(unit, levels, 'posterior', scale).item():.6f}"
    '1.000000'
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from halfstep.core.errors import DataError, HalfstepError
from halfstep.core.recipe import Recipe, RegularSpec
from halfstep.core.seeds import seeded
from halfstep.engine.subject import Subject
from halfstep.nets.denoiser import Draw, Memo, clean_and_noise, copy_of, predictor, soft
from halfstep.nets.fresh import new_model
from halfstep.nets.wavelet import haar
from halfstep.training.draft import Draft
from halfstep.training.train import Batch, Diffusion, Objective, TrainState

Rule = Literal["posterior", "beta", "beta_over_alpha"]
"""The variance of a reverse step: (1 - a_t)(1 - abar_{t-1}) / (1 - abar_t), 1 - a_t, or (1 - a_t) / a_t."""


# --------------------------------------------------------------------------------------------------------- the penalty


def coordinates(noise: torch.Tensor, noisy: torch.Tensor, level: torch.Tensor, spec: RegularSpec) -> torch.Tensor:
    """What an output penalty takes the magnitude of, [B, D]: the predicted noise, in the units and basis of `spec`.

    Raises DataError for wavelets on anything but images [B, C, H, W] of even size.
    """
    sigma = (1 - _across(level, noisy)).sqrt()
    if spec.center:
        noise = noise - sigma * noisy  # -sigma * (score + x)
    if spec.penalty == "score_l1":
        noise = noise / sigma
    if spec.basis == "wavelet":
        if noise.ndim != 4:
            shape, do = list(noise.shape), "write --set regular.basis=pixel"
            raise DataError(got=f"samples of shape {shape}", expected="[B, C, H, W]", where="wavelet", do=do)
        noise = haar(noise)
    return noise.flatten(1)


def _across(level: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return level.to(like).reshape(-1, *[1] * (like.ndim - 1))


def penalty(
    noise: torch.Tensor,
    noisy: torch.Tensor,
    level: torch.Tensor,
    spec: RegularSpec,
    parameters: Iterable[nn.Parameter] = (),
) -> torch.Tensor:
    """The size of a prediction, a number to be multiplied by r; means over coordinates, as the loss.

    noise: [B, ...] in epsilon units.  noisy: [B, ...].  level: alphas_cumprod at the samples' timesteps, [B].
    parameters: the model's; only "param_l1" looks at them, and only at those with two or more axes.
    """
    if spec.penalty == "param_l1":
        weights = [p for p in parameters if p.ndim > 1]
        return torch.stack([w.abs().sum() for w in weights]).sum() / sum(w.numel() for w in weights)
    sizes = coordinates(noise, noisy, level, spec).abs().mean(1)
    match spec.penalty:
        case "out_l1_sq":
            return sizes.square().mean()
        case "scale":
            return sizes.max()
        case _:
            return sizes.mean()


def regular_objective(
    model: nn.Module, draw: Draw, spec: RegularSpec, alphas_cumprod: torch.Tensor, prediction_type: str
) -> Objective:
    """The plain loss + r * penalty, one loss a step; with r = 0 the plain loss and nothing else.

    L = mean (f - target)^2 + r H(f), the paper's (3) with its scale kappa = H inside the network f (see this module's
    head); "out_l1", for one: H = mean over coordinates of |f_j|, f in epsilon units.

    alphas_cumprod: [T], the levels that `draw`'s timesteps index.
    """
    predict = predictor(model)

    def objective(batch: Batch) -> Iterator[torch.Tensor]:
        noisy, timestep, target = draw(batch.clean, batch.generator, batch.share)
        found = predict(noisy, timestep, batch.cond, Memo()).float()
        loss = F.mse_loss(found, target)
        if spec.r:
            level = alphas_cumprod.to(timestep.device)[timestep]
            noise = clean_and_noise(found, noisy, level, prediction_type)[1]
            loss = loss + spec.r * penalty(noise, noisy, level, spec, model.parameters())
        yield loss

    return objective


# ------------------------------------------------------------------------------------------- what minimises it, exactly


def minimiser_l1(mean: torch.Tensor, r: float) -> torch.Tensor:
    """The prediction that minimises the loss with "out_l1", given the plain one E[noise | x] ("mean")."""
    return soft(mean, r / 2)


def minimiser_l1_sq(mean: torch.Tensor, r: float) -> torch.Tensor:
    """The same for "out_l1_sq", over the last axis (all D coordinates of a sample).

    The threshold is (r / D) S_k / (1 + (r / D) k), S_k the sum of the k largest magnitudes, for the k that makes it
    largest: it grows with k as long as the next magnitude exceeds it.
    """
    largest = mean.abs().sort(dim=-1, descending=True).values
    r = r / mean.shape[-1]
    k = torch.arange(1, mean.shape[-1] + 1, dtype=mean.dtype, device=mean.device)
    return soft(mean, (r * largest.cumsum(-1) / (1 + r * k)).amax(-1, keepdim=True))


# ------------------------------------------------------------------------------------- the toy with an exact score


def theory_levels(steps: int, c: float = 4.0) -> torch.Tensor:
    """alphas_cumprod, float64 [T], of the theory's schedule 1 - alpha_t = c log T / T. Raises HalfstepError unless that
    is below 1."""
    beta = c * math.log(steps) / steps if steps > 1 else 1.0
    if not 0 < beta < 1:
        got, expected = f"c log T / T = {beta:.3g} at T = {steps}", "a number between 0 and 1"
        raise HalfstepError(got=got, expected=expected, where="theory schedule", do="take more steps or a smaller c")
    return (1 - beta) ** torch.arange(1, steps + 1, dtype=torch.float64)


def gaussian_variance(variances: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Variance of a Gaussian coordinate at a noise level: level * variance + 1 - level."""
    return level * variances + 1 - level


def gaussian_score(x: torch.Tensor, variances: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """The exact score of noisy N(0, diag(variances)) at x [..., d]; variances: [d]."""
    return -x / gaussian_variance(variances, level)


def reverse_steps(alphas_cumprod: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha_t, variance of the noise added on the way from t to t - 1), each [T], for t = 1 ... T.

    A respaced chain is one with fewer levels: alpha_t is the ratio of two neighbours.
    """
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    alpha = alphas_cumprod / before
    match rule:
        case "posterior":
            return alpha, (1 - alpha) * (1 - before) / (1 - alphas_cumprod)
        case "beta":
            return alpha, 1 - alpha
        case "beta_over_alpha":
            return alpha, (1 - alpha) / alpha
    do = "take one of these"
    raise HalfstepError(got=rule, expected="posterior, beta or beta_over_alpha", where="variance rule", do=do)


def gaussian_sampler_variance(
    variances: torch.Tensor, alphas_cumprod: torch.Tensor, rule: Rule, scale: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """What the sampler makes of N(0, I) with the exact score, [d]: its law stays Gaussian, coordinate by coordinate.

    variances: the target's, [d].  alphas_cumprod: [T], decreasing.  scale: multiplies the predicted noise: a number, or
    [T, 1] or [T, d] for t = 1 ... T.  Every step adds noise, the last one too (which is zero for "posterior").
    """
    levels, variances = alphas_cumprod.double()[:, None], variances.double()
    alpha, added = (part[:, None] for part in reverse_steps(alphas_cumprod.double(), rule))
    shrink = (1 - scale * (1 - alpha) / gaussian_variance(variances, levels)).square() / alpha
    law = torch.ones_like(variances)
    for factor, noise in zip(shrink.flip(0), added.flip(0), strict=True):
        law = factor * law + noise
    return law


def exact_scale(variances: torch.Tensor, alphas_cumprod: torch.Tensor, rule: Rule) -> torch.Tensor:
    """The scale of the predicted noise, [T, d], with which each reverse step maps the law at t to the one at t - 1.

    Below 1 where the rule adds too little noise ("posterior"), above where it adds too much.
    """
    levels = alphas_cumprod.double()[:, None]
    alpha, added = (part[:, None] for part in reverse_steps(alphas_cumprod.double(), rule))
    here = gaussian_variance(variances.double(), levels)
    there = gaussian_variance(variances.double(), levels / alpha)
    return (1 - (alpha * (there - added).clamp(min=0) / here).sqrt()) * here / (1 - alpha)


def gaussian_kl(variance: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """KL(N(0, variance) || N(0, target)) of each coordinate; for the product, sum them."""
    ratio = variance.double() / target.double()
    return 0.5 * (ratio - 1 - ratio.log())


# -------------------------------------------------------------------------------------------- from a subject to a draft


def draft(subject: Subject, recipe: Recipe) -> Draft:
    """A net to be trained with one weight `regular.r`, from images or on from a dense model. Its bank holds one entry,
    "r=0.1". Raises for images of odd sizes on wavelets."""
    name = name_of(recipe.regular.r)
    net = net_of(subject, recipe)

    def objective(_: TrainState) -> Objective:
        diffusion = Diffusion(recipe.noise)
        levels = diffusion.scheduler.alphas_cumprod
        return regular_objective(net, diffusion.draw, recipe.regular, levels, recipe.noise.prediction)

    return Draft(
        method="regularized",
        tag="regularized",
        net=net,
        bank_of=lambda trained: subject.bank_of({name: trained}, name),
        objective=objective,
        main=name,
    )


def net_of(subject: Subject, recipe: Recipe) -> Any:
    """The net to train, a copy of the dense one where there is one. Raises for what the recipe cannot be trained on."""
    images = subject.encoded()
    blank = torch.zeros(1, images.channels, images.size, images.size)
    coordinates(blank, blank, torch.tensor(0.5), recipe.regular)  # refuses odd sizes for wavelets
    if subject.dense is not None:
        return copy_of(subject.dense)
    with seeded(recipe.seed):
        return new_model(recipe.model, images, recipe.noise.timesteps)


def name_of(r: float) -> str:
    """The bank name of a regularised denoiser: 0.1 -> "r=0.1"."""
    return f"r={r:g}"
