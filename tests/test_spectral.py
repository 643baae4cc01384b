"""Spectral Diffusion. Oracles: PyWavelets, pooling and decimation, regression on Gaussian data, the published sizes."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from halfstep.errors import DataError, ModelError
from halfstep.process import Process
from halfstep.profiling import count_params, macs_by_kind
from halfstep.recipe import SpectralSpec
from halfstep.spectral import (
    Gates,
    Levels,
    Pupil,
    SpectralUNet2DModel,
    WaveletDown,
    WaveletUp,
    frequency_loss,
    haar,
    inverse_haar,
    levels_of,
    power_spectrum,
    radial_mean,
    spectra,
    spectral_objective,
    spectral_weights,
    student_configs,
    wiener_clean,
    wiener_noise,
    wiener_power,
)
from halfstep.train import Batch, Diffusion


def make(seed: int = 0, **config) -> SpectralUNet2DModel:
    torch.manual_seed(seed)
    small = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8, "norm_num_groups": 8,
    }  # fmt: skip
    return SpectralUNet2DModel(**(small | config)).eval()


def forced(module, values: tuple[float, float, float, float]):
    """The module with gates of these values, whatever it sees."""
    module.gate.forward = lambda x: torch.tensor(values).view(1, 4, 1, 1, 1)
    return module


# --- the wavelet ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_haar_is_pywavelets_and_comes_back_with_its_energy(height, width, seed):
    x = torch.randn(2, 3, 2 * height, 2 * width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bands = haar(x)
    low, (across_rows, across_columns, both) = pywt.dwt2(x.numpy(), "haar")
    for ours, theirs in zip(bands.unbind(1), (low, across_rows, across_columns, both), strict=True):
        assert np.allclose(ours.numpy(), theirs, atol=1e-12)
    assert torch.allclose(inverse_haar(bands), x, atol=1e-12)
    assert torch.allclose(bands.square().sum(), x.square().sum())


def test_bands_are_what_they_are_called():
    flat = haar(torch.full((1, 1, 4, 4), 3.0))
    assert (flat[:, 0] == 6).all() and not flat[:, 1:].any()
    columns = torch.arange(4.0).expand(1, 1, 4, 4)
    assert haar(columns)[:, 2].any() and not haar(columns)[:, [1, 3]].any()
    assert haar(columns.mT)[:, 1].any() and not haar(columns.mT)[:, [2, 3]].any()
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)[None, None]
    assert haar(board)[:, 3].any() and not haar(board)[:, :3].any()


def test_gradients_flow_and_odd_sizes_are_refused():
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(haar, x) and torch.autograd.gradcheck(lambda y: inverse_haar(haar(y) ** 2), x)
    with pytest.raises(DataError, match="5x4"):
        haar(torch.zeros(1, 1, 5, 4))


# --- gated resampling -------------------------------------------------------------------------------------------------


def test_downsampling_is_pooling_or_decimation_for_these_gates():
    down, x = WaveletDown(8, True, (2.0, -2.0)), torch.randn(2, 8, 6, 6)
    assert torch.allclose(forced(down, (0.5, 0, 0, 0))(x), F.avg_pool2d(x, 2), atol=1e-6)
    assert torch.allclose(forced(down, (1, 0, 0, 0))(x), 2 * F.avg_pool2d(x, 2), atol=1e-6)
    assert torch.allclose(forced(down, (0.5, 0.5, 0.5, 0.5))(x), x[..., ::2, ::2], atol=1e-6)


def test_upsampling_is_nearest_or_the_inverse_transform_for_these_gates():
    up, x = WaveletUp(8, True, (2.0, -2.0)), torch.randn(2, 2, 6, 6)
    up.project = torch.nn.Identity()
    bands = haar(x)
    assert torch.allclose(forced(up, (1, 1, 1, 1))(bands.flatten(1, 2)), x, atol=1e-6)
    low = F.interpolate(bands[:, 0], scale_factor=2) / 2
    assert torch.allclose(forced(up, (1, 0, 0, 0))(bands.flatten(1, 2)), low, atol=1e-6)


@pytest.mark.parametrize("gates", [1, 8])
def test_gates_lie_between_0_and_1_start_near_averaging_and_see_the_mean_only(gates):
    gate, x = Gates(8, gates, (2.0, -2.0)), torch.randn(2, 8, 6, 6)
    found = gate(x)
    assert found.shape == (2, 4, gates, 1, 1) and ((found > 0) & (found < 1)).all()
    assert not torch.allclose(found[0], found[1])
    shuffled = x.flatten(2)[..., torch.randperm(36)].view_as(x)
    assert torch.allclose(gate(shuffled), found, atol=1e-6)
    assert found[:, 0].mean() > 0.8 and found[:, 1:].mean() < 0.2


def test_gates_of_the_network_answer_to_the_timestep():
    model, seen = make(), []
    gate = model.net.down_blocks[0].downsamplers[0].gate
    gate.register_forward_hook(lambda _m, _i, out: seen.append(out))
    x = torch.randn(1, 1, 8, 8)
    model(x, 0)
    model(x, 999)
    assert not torch.allclose(seen[0], seen[1], atol=1e-5)


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"gate": "scalar"}, {"num_class_embeds": 3}])
def test_it_saves_and_loads_as_a_diffusers_model(tmp_path, config):
    model, x = make(**config), torch.randn(2, 1, 8, 8)
    kwargs = {"class_labels": torch.tensor([0, 2])} if "num_class_embeds" in config else {}
    model.save_pretrained(tmp_path)
    again = SpectralUNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(again(x, 3, **kwargs).sample, model(x, 3, **kwargs).sample)
    assert model(x, 3, **kwargs).sample.shape == x.shape


def test_published_sizes():
    """LDM's FFHQ layout at base 64: 7.85 G and 22.41 M with convolutions, 6.69 G and 21.12 M with wavelets."""
    from diffusers import UNet2DModel

    layout = {
        "sample_size": 64, "in_channels": 3, "out_channels": 3, "block_out_channels": (64, 128, 192, 256),
        "layers_per_block": 2, "attention_head_dim": 32, "norm_num_groups": 32,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    with torch.device("meta"):
        plain = UNet2DModel(**layout)
    slim = SpectralUNet2DModel(**layout)
    cost = {name: macs_by_kind(model) for name, model in (("plain", plain), ("slim", slim))}
    gmacs = {name: (kinds["conv"] + kinds["linear"]) / 1e9 for name, kinds in cost.items()}
    assert gmacs["plain"] == pytest.approx(7.85, rel=0.03) and gmacs["slim"] == pytest.approx(6.69, rel=0.03)
    assert count_params(plain) / 1e6 == pytest.approx(22.41, rel=0.03)
    assert count_params(slim) / 1e6 == pytest.approx(21.12, rel=0.03)
    assert gmacs["plain"] - gmacs["slim"] == pytest.approx(1.16, rel=0.05)


@pytest.mark.parametrize(
    "config",
    [
        {"sample_size": 9},
        {"block_out_channels": (18, 32), "norm_num_groups": 2},
        {"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D")},
    ],
)
def test_sizes_that_do_not_fit_are_refused(config):
    with pytest.raises(ModelError, match="change the model's config"):
        make(**config)


# --- the optimal linear denoiser --------------------------------------------------------------------------------------


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

    def predict(noisy, timestep, _):
        a = alphas[timestep[0]]
        wanted = torch.fft.ifft2(torch.fft.fft2(noisy) * wiener_clean(a, power)).real
        noise = (noisy - a.sqrt() * wanted) / (1 - a).sqrt()
        return {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * wanted, "sample": wanted}[kind]

    for timestep in (1, 5, 8):
        rings = spectra(predict, clean, timestep, alphas, kind, bins=8, seed=5)  # pink() has seed 0
        assert torch.allclose(rings["model"], rings["wiener"], rtol=0.15)
        assert (rings["wiener"] <= rings["data"]).all() and (rings["error"] <= 1.1 * rings["data"]).all()


# --- the loss ---------------------------------------------------------------------------------------------------------


def pink(count: int = 8, size: int = 32) -> torch.Tensor:
    """Images whose amplitude falls as 1 / f."""
    generator = torch.Generator().manual_seed(0)
    radius = (torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.fftfreq(size)[None] ** 2).sqrt().clamp(min=1 / size)
    spectrum = torch.fft.fft2(torch.randn(count, 1, size, size, generator=generator)) / radius
    images = torch.fft.ifft2(spectrum).real
    return images / images.std()


def test_without_weights_it_is_the_mean_squared_error():
    a, b = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    weights = spectral_weights(torch.randn(2, 1, 8, 8), (8, 8), 0.0)
    assert torch.allclose(weights, torch.ones_like(weights))
    assert torch.allclose(frequency_loss(a, b, weights), F.mse_loss(a, b), rtol=1e-6)


def test_weights_fall_as_the_clean_spectrum_rises_and_forget_its_scale():
    clean = pink()
    weights = spectral_weights(clean, (32, 32), -1.0, most=1e9)
    magnitude = torch.fft.fft2(clean, norm="ortho").abs()
    for one, other in zip(weights, magnitude, strict=True):
        assert spearmanr(one.flatten(), other.flatten()).statistic <= -0.999
    assert torch.allclose(weights, spectral_weights(2 * clean, (32, 32), -1.0, most=1e9), rtol=1e-4)
    rings = radial_mean(weights.mean((0, 1)), 5)[1]
    assert (rings.diff() > 0).all() and rings.argmin() == 0
    assert weights.shape == (8, 1, 32, 32) and spectral_weights(clean, (8, 8), -1.0).shape == (8, 1, 8, 8)


@pytest.mark.parametrize("clean", [torch.zeros(1, 1, 8, 8), torch.cos(torch.arange(8.0)).expand(1, 1, 8, 8)])
def test_weights_are_finite_and_bounded_for_empty_and_pure_images(clean):
    weights = spectral_weights(clean, (8, 8), -1.0)
    assert weights.isfinite().all() and (weights <= 50).all() and (weights > 0).all()


def test_an_error_in_detail_costs_more_than_the_same_error_in_structure():
    clean = pink()
    weights = spectral_weights(clean, (32, 32), -1.0)
    radius = (torch.fft.fftfreq(32)[:, None] ** 2 + torch.fft.fftfreq(32)[None] ** 2).sqrt()
    noise = torch.fft.fft2(torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)), norm="ortho")
    costs = []
    for band in (radius < 0.1, (radius > 0.35) & (radius < 0.5)):
        error = torch.fft.ifft2(noise * band, norm="ortho").real
        error = error / error.square().mean().sqrt()
        costs.append(frequency_loss(error, torch.zeros_like(error), weights))
    assert costs[1] > 3 * costs[0]


def test_levels_of_teacher_and_student_have_the_same_sizes():
    student, teacher = make(), make(block_out_channels=(32, 64)).net
    sizes = []
    for model in (student, teacher):
        seen = []
        for module in levels_of(model):
            module.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(tuple(out.shape[2:])))
        model(torch.randn(1, 1, 8, 8), 3)
        sizes.append(seen)
    assert sizes[0] == sizes[1] == [(8, 8), (4, 4), (4, 4), (4, 4), (8, 8)]


@pytest.mark.parametrize(("spatial", "freq"), [(0.1, 0.1), (0.3, 0.0), (0.0, 0.2), (0.0, 0.0)])
def test_the_loss_is_noise_plus_both_terms_and_the_teacher_sees_the_same(spatial, freq):
    student, teacher, diffusion = make(), make(3, block_out_channels=(32, 64)).net, Diffusion(Process())
    pupil, seen = Pupil(student, teacher), []
    handles = [m.register_forward_pre_hook(lambda _m, given: seen.append(given[:2])) for m in (student, teacher)]
    spec = SpectralSpec(spatial=spatial, freq=freq, ramp=0.0)
    batch = Batch(torch.randn(2, 1, 8, 8), None, 5)
    torch.manual_seed(4)
    (loss,) = spectral_objective(pupil, teacher, diffusion.draw, spec, 10)(batch)
    for handle in handles:
        handle.remove()
    torch.manual_seed(4)
    noisy, timestep, target = diffusion.draw(batch.clean)
    assert len(seen) == (2 if spatial or freq else 1)
    assert all(torch.equal(a, noisy) and torch.equal(b, timestep) for a, b in seen)
    with Levels(student) as mine, Levels(teacher) as theirs:
        ours, lesson = student(noisy, timestep).sample, teacher(noisy, timestep).sample
    expected = F.mse_loss(ours, target)
    features = [(a(x), y) for a, x, y in zip(pupil.align, mine.seen, theirs.seen, strict=True)]
    for one, other in [*features, (ours, lesson)]:
        weights = spectral_weights(batch.clean, one.shape[2:], -1.0)
        expected = expected + spatial * F.mse_loss(one, other) + freq * frequency_loss(other, one, weights)
    assert torch.allclose(loss, expected, rtol=1e-5)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert (pupil.align[0].weight.grad is not None) == bool(spatial or freq)


def test_a_student_that_is_its_teacher_differs_in_no_term_and_the_ramp_grows_from_nothing():
    student, teacher, diffusion = make(5), make(5), Diffusion(Process())
    pupil, batch = Pupil(student, teacher), Batch(torch.randn(2, 1, 8, 8), None)
    for align in pupil.align:
        torch.nn.init.dirac_(align.weight)
        torch.nn.init.zeros_(align.bias)
    losses = []
    for size in (0.0, 5.0):
        torch.manual_seed(1)
        spec = SpectralSpec(spatial=size, freq=size)
        losses += spectral_objective(pupil, teacher, diffusion.draw, spec, 10)(batch)
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)
    other, found, spec = make(6), [], SpectralSpec(spatial=0.0, ramp=0.2)
    for step in (0, 9, 19, 60):
        torch.manual_seed(1)
        objective = spectral_objective(Pupil(student, other), other, diffusion.draw, spec, 100)
        found += [x.item() for x in objective(Batch(batch.clean, None, step))]
    assert found[0] < found[1] < found[2] == found[3]


def test_students_of_a_teacher_are_narrower_and_narrower():
    teacher = make(block_out_channels=(32, 64)).net
    configs = student_configs(teacher.config)
    sizes = [sum(config["block_out_channels"]) for config in configs]
    assert configs[0]["block_out_channels"] == (32, 64) and sizes == sorted(sizes, reverse=True)
    assert configs[-1]["block_out_channels"] == (4, 4)
    for config in configs:
        assert SpectralUNet2DModel(**config)(torch.randn(1, 1, 8, 8), 3).sample.shape == (1, 1, 8, 8)


def test_a_teacher_with_other_levels_is_refused():
    with pytest.raises(ModelError, match="as many levels"):
        Pupil(make(), make(sample_size=16).net)


FREQUENCIES = torch.fft.fftfreq(64).double()
HIGH = FREQUENCIES.abs() >= 0.25


def fitted(weights, wanted):
    """What a symmetric filter of three taps reaches at best: the weighted least squares fit to a response."""
    taps = torch.stack([torch.ones_like(FREQUENCIES), 2 * torch.cos(2 * torch.pi * FREQUENCIES)], dim=1)
    root = weights.sqrt()
    return taps @ torch.linalg.lstsq(root[:, None] * taps, (root * wanted)[:, None]).solution[:, 0]


@pytest.mark.parametrize("level, ratio", [(0.1, 17.7), (0.5, 5.0), (0.9, 2.0)])
def test_the_inverse_spectrum_moves_a_small_filter_s_error_from_high_to_low_frequencies(level, ratio):
    """Specification, check 18: three taps fitted to the exact linear denoiser of 1/f^2 data, with alpha 0 and -1."""
    power = FREQUENCIES.abs().clamp(min=1 / 64) ** -2
    power, a = power / power.mean(), torch.tensor(level, dtype=torch.double)
    wanted, noisy, errors = wiener_noise(a, power), a * power + 1 - a, {}
    for alpha in (0.0, -1.0):
        error = noisy * (fitted(power.sqrt() ** alpha * noisy, wanted) - wanted).square()
        errors[alpha] = [error[part].sum().item() for part in (HIGH, ~HIGH)]
    assert errors[0.0][0] / errors[-1.0][0] == pytest.approx(ratio, rel=0.03)
    assert errors[-1.0][1] > errors[0.0][1]


@pytest.mark.parametrize("high", [0.1, 0.03, 0.01])
def test_samples_of_a_small_filter_come_nearer_the_high_band_with_the_frequency_term(high):
    """Specification, check 19: data of two bands, a student of three taps at every timestep, 50 DDIM steps, exactly.

    Everything is linear, so that the samples' power is the squared gain of the chain; no training, no seeds.
    """
    power = torch.where(HIGH, high, 1.0).double()
    power = power / power.mean()
    weights = power.sqrt() ** -1 / (power.sqrt() ** -1).mean()
    scheduler, off = DDIMScheduler(num_train_timesteps=1000, clip_sample=False), []
    scheduler.set_timesteps(50)
    for freq in (0.0, 0.1, 1.0):
        gain = torch.ones_like(FREQUENCIES)  # of start noise to the state, frequency by frequency
        for t in scheduler.timesteps:
            a = scheduler.alphas_cumprod[t].double()
            response = fitted((a * power + 1 - a) * (1.1 + freq * weights), wiener_noise(a, power))
            gain = scheduler.step(response * gain, t, gain).prev_sample
        distance = (gain.square().log10() - power.log10()).abs()
        off.append((distance[HIGH].mean().item(), distance[~HIGH].mean().item()))
    (plain, low), (small, _), (large, low_large) = off
    assert large < small < plain
    assert low_large > low  # what the low band pays
