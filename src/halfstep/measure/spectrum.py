"""Spectra of pictures and of what a denoiser makes of them, beside the best that a linear denoiser can do.

Source: Diffusion Probabilistic Model Made Slim, Yang et al., CVPR 2023, arXiv 2211.17106.

Implemented: the optimal linear (Wiener) denoiser of a power spectrum, spectra by frequency, four lines of a denoiser.

What differs, and why: the paper prints the Wiener filter with numerator 1; the minimiser has sqrt(1 - alpha_bar), and
only with it the clean estimate follows. The exact one is here.
"""

from __future__ import annotations

import torch

from halfstep.nets.denoiser import Cond, Memo, Predict, clean_and_noise

# ------------------------------------------------------------------------------------------ the optimal linear denoiser


def wiener_noise(alpha_bar: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """The filter on x_t that predicts the noise best when the data have this power spectrum:
    sqrt(1 - a) / (a S + 1 - a). Any shapes that broadcast."""
    return (1 - alpha_bar).sqrt() / (alpha_bar * power + 1 - alpha_bar)


def wiener_clean(alpha_bar: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """The filter on x_t that predicts the clean image best: sqrt(a) S / (a S + 1 - a)."""
    return alpha_bar.sqrt() * power / (alpha_bar * power + 1 - alpha_bar)


def wiener_power(alpha_bar: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """Power that the best linear clean estimate has: S times a S / (a S + 1 - a), never more than S."""
    return alpha_bar * power.square() / (alpha_bar * power + 1 - alpha_bar)


def power_spectrum(images: torch.Tensor) -> torch.Tensor:
    """Mean squared modulus of the orthonormal 2-D transform, over images and channels: [N, C, H, W] -> [H, W]."""
    return torch.fft.fft2(images.float(), norm="ortho").abs().square().mean((0, 1))


def radial_mean(spectrum: torch.Tensor, bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of a [H, W] spectrum over rings: (centres in cycles per pixel, 0 to 1/2, [bins]; means [bins])."""
    height, width = spectrum.shape
    radius = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.fftfreq(width)[None] ** 2).sqrt()
    ring = (radius * 2 * bins).long().clamp(max=bins)  # corners beyond 1/2 are left out
    sums = torch.zeros(bins + 1, dtype=spectrum.dtype).index_add_(0, ring.flatten(), spectrum.cpu().flatten())
    counts = torch.bincount(ring.flatten(), minlength=bins + 1)
    centres = (torch.arange(bins) + 0.5) / (2 * bins)
    return centres, sums[:bins] / counts[:bins].clamp(min=1)


@torch.no_grad()
def spectra(
    predict: Predict,
    clean: torch.Tensor,
    timestep: int,
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
    *,
    bins: int,
    seed: int = 0,
    cond: Cond | None = None,
) -> dict[str, torch.Tensor]:
    """How much power a denoiser's clean estimate has at each frequency, beside what can be had: four lines of [bins].

    "frequency" (cycles per pixel), "data" (the images' own power), "wiener" (of the best linear estimate from these
    noisy images), "model" (of this denoiser's), "error" (of its difference to the clean images). clean: [N,C,S,S]; the
    same seed draws the same noise for every model.
    """
    a = alphas_cumprod[timestep].to(clean)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
    noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
    steps = torch.full((len(clean),), timestep, device=clean.device)
    found = predict(noisy, steps, cond or {}, Memo()).float()
    estimate, _ = clean_and_noise(found, noisy, a, prediction_type)
    power = power_spectrum(clean)
    lines = {
        "data": power,
        "wiener": wiener_power(a, power),
        "model": power_spectrum(estimate),
        "error": power_spectrum(estimate - clean),
    }
    return {"frequency": radial_mean(power, bins)[0]} | {k: radial_mean(v, bins)[1] for k, v in lines.items()}
