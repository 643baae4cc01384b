"""Distillation by spectrum. Oracles: the mean squared error, the losses written out, regression on Gaussian data."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from scipy.stats import spearmanr

from halfstep.core.errors import ModelError
from halfstep.core.process import Process
from halfstep.core.recipe import SpectralSpec
from halfstep.engine.profiling import count_macs
from halfstep.measure.spectrum import radial_mean, wiener_noise
from halfstep.methods.slimmable import Supernet
from halfstep.methods.spectral import (
    Levels,
    Pupil,
    frequency_loss,
    levels_of,
    spectral_objective,
    spectral_weights,
    student_configs,
    student_of,
)
from halfstep.nets.architectures import sort_channels
from halfstep.nets.wavelet import SpectralUNet2DModel
from halfstep.training.train import Batch, Diffusion
from tiny import pink, unet, wavelet_unet


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
    student, teacher = wavelet_unet(), wavelet_unet(block_out_channels=(32, 64)).net
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
    student, teacher, diffusion = wavelet_unet(), wavelet_unet(3, block_out_channels=(32, 64)).net, Diffusion(Process())
    pupil, seen = Pupil(student, teacher), []
    handles = [m.register_forward_pre_hook(lambda _m, given: seen.append(given[:2])) for m in (student, teacher)]
    spec = SpectralSpec(spatial=spatial, freq=freq, ramp=0.0)
    batch = Batch(torch.randn(2, 1, 8, 8), {}, 5)
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
    student, teacher, diffusion = wavelet_unet(5), wavelet_unet(5), Diffusion(Process())
    pupil, batch = Pupil(student, teacher), Batch(torch.randn(2, 1, 8, 8), {})
    for align in pupil.align:
        torch.nn.init.dirac_(align.weight)
        torch.nn.init.zeros_(align.bias)
    losses = []
    for size in (0.0, 5.0):
        torch.manual_seed(1)
        spec = SpectralSpec(spatial=size, freq=size)
        losses += spectral_objective(pupil, teacher, diffusion.draw, spec, 10)(batch)
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)
    other, found, spec = wavelet_unet(6), [], SpectralSpec(spatial=0.0, ramp=0.2)
    for step in (0, 9, 19, 60):
        torch.manual_seed(1)
        objective = spectral_objective(Pupil(student, other), other, diffusion.draw, spec, 100)
        found += [x.item() for x in objective(Batch(batch.clean, {}, step))]
    assert found[0] < found[1] < found[2] == found[3]


def test_students_of_a_teacher_are_narrower_and_narrower():
    teacher = wavelet_unet(block_out_channels=(32, 64)).net
    configs = student_configs(teacher.config)
    sizes = [sum(config["block_out_channels"]) for config in configs]
    assert configs[0]["block_out_channels"] == (32, 64) and sizes == sorted(sizes, reverse=True)
    assert configs[-1]["block_out_channels"] == (4, 4)
    for config in configs:
        assert SpectralUNet2DModel(**config)(torch.randn(1, 1, 8, 8), 3).sample.shape == (1, 1, 8, 8)


def test_a_teacher_with_other_levels_is_refused():
    with pytest.raises(ModelError, match="as many levels"):
        Pupil(wavelet_unet(), wavelet_unet(sample_size=16).net)


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


# ---- a student that begins as a width of the teacher ---------------------------------------------------------------


def student_from(teacher, **spec):
    return student_of(teacher, SpectralSpec(start="teacher", reduction=2.5, **spec))


def test_a_plain_student_that_begins_as_the_teachers_is_its_narrower_width():
    teacher = unet(0, (16, 32), size=16)
    student = student_from(teacher, wavelet=False)
    half = Supernet(sort_channels(teacher), (1.0, 0.5)).subnet(0.5)
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([3, 700])
    assert torch.equal(student(x, t).sample, half(x, t).sample)
    assert count_macs(teacher) / count_macs(student) >= 2.5


@pytest.mark.parametrize("gate", ["channel", "scalar"])
def test_a_gated_student_has_the_teachers_width_but_for_its_resampling(gate):
    teacher = unet(0, (16, 32), size=16, attend=True, num_class_embeds=3, num_train_timesteps=1000)
    student = student_from(teacher, gate=gate)
    half = Supernet(sort_channels(teacher), (1.0, 0.5)).subnet(0.5).state_dict()
    own = student.net.state_dict()
    assert {name for name in own if name not in half} == {n for n in own if ".gate." in n or ".project." in n}
    assert {name for name in half if name not in own} == {n for n in half if "samplers.0.conv" in n}
    assert all(torch.equal(own[name], value) for name, value in half.items() if name in own)
    assert count_macs(teacher) / count_macs(student) >= 2.5


def test_a_teacher_with_what_the_gated_net_has_not_is_refused_by_name():
    odd = unet(0, (16, 32), size=16, resnet_time_scale_shift="scale_shift")
    with pytest.raises(ModelError, match=r"resnet_time_scale_shift 'scale_shift'.*spectral\.wavelet=false"):
        student_from(odd)
    assert student_from(odd, wavelet=False).config.resnet_time_scale_shift == "scale_shift"
