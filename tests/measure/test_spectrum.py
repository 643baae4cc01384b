"""Spectra and the optimal linear denoiser. Oracles: regressions, white noise, known waves."""

from __future__ import annotations

import pytest
import torch

from halfstep.measure.spectrum import power_spectrum, radial_mean, spectra, wiener_clean, wiener_noise, wiener_power
from tiny import pink


@pytest.mark.parametrize("alpha_bar", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("power", [0.01, 1.0, 20.0])
def test_wiener_filters_are_the_regressions(alpha_bar, power):
    generator = torch.Generator().manual_seed(0)
    clean = power**0.5 * torch.randn(200_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(200_000, generator=generator, dtype=torch.float64)
    noisy = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise
    a, s = torch.tensor(alpha_bar, dtype=torch.float64), torch.tensor(power, dtype=torch.float64)
    for target, found in ((noise, wiener_noise(a, s)), (clean, wiener_clean(a, s))):
        slope = (noisy @ target) / (noisy @ noisy)
        assert abs(slope - found) < 0.01 * max(1, abs(found))
    assert torch.allclose((wiener_clean(a, s) * noisy).square().mean(), wiener_power(a, s), rtol=0.02)
    assert torch.allclose((1 - (1 - a).sqrt() * wiener_noise(a, s)) / a.sqrt(), wiener_clean(a, s))


def test_the_band_that_can_be_recovered_widens_as_noise_falls():
    frequency = torch.linspace(0.01, 0.5, 50)
    power = 0.05 / frequency**2
    shares = [wiener_power(torch.tensor(a), power) / power for a in (0.05, 0.3, 0.7, 0.99)]
    assert all((share <= 1).all() and (share.diff() <= 0).all() for share in shares)
    widths = [int((share > 0.5).sum()) for share in shares]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    assert torch.allclose(wiener_noise(torch.tensor(0.5), torch.tensor(1e-12)), torch.tensor(0.5**-0.5))


def test_spectra_of_known_images():
    white = torch.randn(400, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    centres, rings = radial_mean(power_spectrum(white), 8)
    assert torch.allclose(rings, torch.ones(8), atol=0.15) and centres[0] == 1 / 32 and centres[-1] == 15 / 32
    wave = torch.cos(2 * torch.pi * torch.arange(16) * 4 / 16).expand(1, 1, 16, 16)
    assert radial_mean(power_spectrum(wave), 8)[1].argmax() == 4


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_best_linear_denoiser_draws_the_wiener_line(kind):
    clean, alphas = pink(400, 16), torch.linspace(0.99, 0.01, 10)
    power = power_spectrum(clean)

    def predict(noisy, timestep, *_):
        a = alphas[timestep[0]]
        wanted = torch.fft.ifft2(torch.fft.fft2(noisy) * wiener_clean(a, power)).real
        noise = (noisy - a.sqrt() * wanted) / (1 - a).sqrt()
        return {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * wanted, "sample": wanted}[kind]

    for timestep in (1, 5, 8):
        rings = spectra(predict, clean, timestep, alphas, kind, bins=8, seed=5)  # pink() has seed 0
        assert torch.allclose(rings["model"], rings["wiener"], rtol=0.15)
        assert (rings["wiener"] <= rings["data"]).all() and (rings["error"] <= 1.1 * rings["data"]).all()
