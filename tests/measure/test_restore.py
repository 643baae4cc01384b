"""Oracles: the exact denoiser of Gaussian data (posterior mean, probability flow), diffusers' DDIM, scikit-image."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.core.errors import DataError, HalfstepError, ModelError, PlanError
from halfstep.measure.restore import (
    CLASSICAL,
    Tiles,
    compare_denoisers,
    matching_timestep,
    psnr,
    restore,
    restore_picture,
    ssim,
    tiled,
    timesteps_from,
)
from halfstep.nets.denoiser import cond_of

KINDS = ("epsilon", "sample", "v_prediction")
ALPHAS = DDPMScheduler().alphas_cumprod


def in_tiles(predict, picture, sigma, process, *, steps, size, channels, cond=None, **tiles):
    return restore_picture(
        predict, picture, sigma, process, Tiles(size=size, channels=channels, **tiles), steps=steps, cond=cond
    )


def noise_config(kind="epsilon", **changes):
    return DDPMScheduler(prediction_type=kind, **{"clip_sample": False, **changes}).config


def ratio(timestep: int) -> float:
    """Noise over signal at a timestep, on data in [-1, 1]."""
    level = float(ALPHAS[timestep])
    return math.sqrt((1 - level) / level)


def from_estimate(estimate, kind):
    """The predictor whose clean estimate is estimate(sample, level)."""

    def predict(sample, timestep, cond, memo):
        level = float(ALPHAS[int(timestep[0])])
        clean = estimate(sample, level)
        noise = (sample - math.sqrt(level) * clean) / math.sqrt(1 - level)
        velocity = math.sqrt(level) * noise - math.sqrt(1 - level) * clean
        return {"epsilon": noise, "sample": clean, "v_prediction": velocity}[kind]

    return predict


def gaussian(mean, std, kind="epsilon"):
    """The exact denoiser of pixels that are independent N(mean, std^2) in [-1, 1]."""

    def estimate(sample, level):
        root = math.sqrt(level)
        return mean + std**2 * root / (level * std**2 + 1 - level) * (sample - root * mean)

    return from_estimate(estimate, kind)


def unchanged(sample, timestep, cond, memo):
    """The denoiser (epsilon) that finds no noise: what is left is the noisy picture."""
    return torch.zeros_like(sample)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- the matching timestep -----------------------------------------------------------------------------------------

SCHEDULES = {
    "linear": ALPHAS,
    "short": DDPMScheduler(num_train_timesteps=50, beta_end=0.2).alphas_cumprod,
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod,
    "zero end": DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod,
}


@given(name=st.sampled_from(list(SCHEDULES)), part=st.floats(0, 1), nudge=st.floats(-0.49, 0.49))
def test_the_matching_timestep_inverts_the_schedule(name, part, nudge):
    alphas = SCHEDULES[name].double()
    sigmas = ((1 - alphas) / alphas).sqrt() / 2
    timestep = round(part * (len(alphas) - 2))
    assert matching_timestep(float(sigmas[timestep]), SCHEDULES[name]) == timestep
    neighbour = timestep + (1 if nudge > 0 else -1)
    if 0 <= neighbour < len(alphas) and torch.isfinite(sigmas[neighbour]):
        between = sigmas[timestep] + abs(nudge) * (sigmas[neighbour] - sigmas[timestep])
        assert matching_timestep(float(between), SCHEDULES[name]) == timestep


def test_the_picture_at_the_matching_timestep_has_the_noise_that_the_model_expects():
    """In [0, 1]: clean + sigma n. Scaled to [-1, 1] and by sqrt(level) that is the forward process at the timestep."""
    timestep = 300
    sigma, level = ratio(timestep) / 2, float(ALPHAS[timestep])
    clean, n = torch.rand(1, 1, 8, 8, dtype=torch.float64), normal(1, 1, 8, 8)
    seen = []

    def predict(sample, t, cond, memo):
        seen.append((sample, t.tolist(), cond))
        return sample

    cond = cond_of(torch.tensor([7]))
    restore(predict, 2 * (clean + sigma * n) - 1, sigma, noise_config(), steps=1, cond=cond)
    forward = math.sqrt(level) * (2 * clean - 1) + math.sqrt(1 - level) * n
    assert len(seen) == 1 and seen[0][1] == [timestep] and seen[0][2] is cond
    assert torch.allclose(seen[0][0], forward, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.0, -0.1, 1e-4, 500.0, math.inf, math.nan])
def test_a_noise_level_outside_the_schedule_is_refused(sigma):
    with pytest.raises(DataError, match=r"noise: got .* expected 0.005 to 78\.\d") as error:
        matching_timestep(sigma, ALPHAS)
    assert "\n" not in str(error.value)
    assert matching_timestep(1e6, SCHEDULES["zero end"]) == len(ALPHAS) - 2  # the last one has no signal at all
    with pytest.raises(DataError):
        matching_timestep(math.inf, SCHEDULES["zero end"])


# ---- restoring -----------------------------------------------------------------------------------------------------


@given(start=st.integers(0, 999), part=st.floats(0, 1))
def test_timesteps_fall_evenly_from_the_start(start, part):
    steps = 1 + round(part * start)
    timesteps = timesteps_from(start, steps)
    falls = -np.diff([*timesteps, -1])
    assert len(timesteps) == steps and timesteps[0] == start and timesteps[-1] >= 0
    assert falls.min() >= 1 and falls.max() - falls.min() <= 1


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_diffusers_ddim_on_the_schedule_cut_at_the_start(kind, clip):
    """Cut there, with trailing spacing and a number of steps that divides it, diffusers' own grid is the right one."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 8, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(8, 2, 3, padding=1))
    net = net.double()
    start, steps = 239, 8
    config = noise_config(kind, clip_sample=clip, clip_sample_range=0.8)

    def predict(sample, timestep, cond=None, memo=None):
        return net(sample) + timestep.view(-1, 1, 1, 1) / 1000

    noisy = normal(3, 2, 8, 8)
    mine = restore(predict, noisy, ratio(start) / 2, config, steps=steps)
    ddim = DDIMScheduler(
        num_train_timesteps=start + 1,
        trained_betas=DDPMScheduler().betas[: start + 1].tolist(),
        prediction_type=kind,
        clip_sample=clip,
        clip_sample_range=0.8,
        timestep_spacing="trailing",
    )
    ddim.set_timesteps(steps)
    with torch.no_grad():
        theirs = noisy * ddim.alphas_cumprod[start].double().sqrt()
        for t in ddim.timesteps:
            theirs = ddim.step(predict(theirs, t.repeat(3)), t, theirs).prev_sample
    assert torch.allclose(mine, theirs, atol=1e-5)
    assert (mine - noisy).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 3, 7, 240])
def test_it_is_ddim_written_out_where_the_steps_do_not_divide_the_timesteps(kind, steps):
    """DDIM (arXiv 2010.02502, eq. 12, eta = 0) between the levels of `timesteps_from`, whatever falls between them."""
    start, predict = 239, from_estimate(lambda x, level: torch.tanh(x) * (1 - level / 2), kind)
    noisy, asked = normal(2, 1, 8, 8), []

    def noting(sample, timestep, cond, memo):
        asked.append(timestep.tolist())
        return predict(sample, timestep, cond, memo)

    found = restore(noting, noisy, ratio(start) / 2, noise_config(kind), steps=steps)
    timesteps = timesteps_from(start, steps)
    levels = [float(ALPHAS[t]) for t in timesteps] + [1.0]
    wanted = math.sqrt(levels[0]) * noisy
    for level, after in itertools.pairwise(levels):
        clean = torch.tanh(wanted) * (1 - level / 2)
        noise = (wanted - math.sqrt(level) * clean) / math.sqrt(1 - level)
        wanted = math.sqrt(after) * clean + math.sqrt(1 - after) * noise
    assert asked == [[t, t] for t in timesteps] and torch.allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timestep", [10, 150, 600])
def test_one_step_of_the_exact_denoiser_is_the_posterior_mean(kind, timestep):
    mean, std, r = torch.tensor([0.4, -0.3, 0.0]).view(1, 3, 1, 1).double(), 0.5, ratio(timestep)
    noisy = mean + std * normal(2, 3, 16, 16) + r * normal(2, 3, 16, 16, seed=1)
    found = restore(gaussian(mean, std, kind), noisy, r / 2, noise_config(kind), steps=1)
    posterior = mean + std**2 / (std**2 + r**2) * (noisy - mean)
    assert (found - posterior).abs().max() < 1e-5


def test_many_steps_of_the_exact_denoiser_follow_the_probability_flow_and_no_colour_shifts():
    """The flow maps N(m, s^2 + r^2) onto N(m, s^2), affinely: the mean of each channel and the spread come back."""
    timestep, std = 150, 0.5
    mean, r = torch.tensor([0.4, -0.3, 0.0]).view(1, 3, 1, 1).double(), ratio(timestep)
    noisy = mean + std * normal(4, 3, 64, 64) + r * normal(4, 3, 64, 64, seed=1)
    flow = mean + std / math.sqrt(std**2 + r**2) * (noisy - mean)
    gaps = []
    for steps in (5, 20, 80):
        found = restore(gaussian(mean, std), noisy, r / 2, noise_config(), steps=steps)
        gaps.append(float((found - flow).abs().max()))
        channel_means = found.mean((0, 2, 3))
        assert torch.allclose(channel_means, mean.flatten(), atol=4 * std / math.sqrt(4 * 64 * 64))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.02
    assert found.std((0, 2, 3)) == pytest.approx([std] * 3, rel=0.02)


@pytest.mark.parametrize(("std", "steps"), [(0.02, 1), (0.3, 1), (0.3, 100)])
def test_psnr_rises_as_theory_says(std, steps):
    """Shrunk by k towards the mean, pixels keep the error (1-k)^2 s^2 + k^2 r^2: one step has the k of least squares,
    s^2 / (s^2 + r^2), the flow that of equal spread, its root. (The grid of timesteps is too coarse for a spread as
    small as 0.02, which is the noise of timestep 1: the flow is not checked there.)"""
    r = ratio(200)
    clean = std * normal(8, 1, 64, 64)
    noisy = clean + r * normal(8, 1, 64, 64, seed=1)
    best = std**2 / (std**2 + r**2)
    k = best if steps == 1 else math.sqrt(best)
    found = restore(gaussian(0.0, std), noisy, r / 2, noise_config(), steps=steps)
    gain = 10 * math.log10(float((noisy - clean).square().mean() / (found - clean).square().mean()))
    assert gain == pytest.approx(10 * math.log10(r**2 / ((1 - k) ** 2 * std**2 + k**2 * r**2)), abs=0.15)


def test_one_step_is_better_in_psnr_and_many_steps_in_spread():
    r, std = ratio(200), 0.3
    clean = std * normal(8, 1, 64, 64)
    noisy = clean + r * normal(8, 1, 64, 64, seed=1)
    one, many = (restore(gaussian(0.0, std), noisy, r / 2, noise_config(), steps=n) for n in (1, 100))
    assert (one - clean).square().mean() < 0.8 * (many - clean).square().mean()
    assert many.std() == pytest.approx(std, rel=0.03) and one.std() < 0.7 * std


def test_a_start_that_is_not_scaled_drifts():
    """The released notebook starts from the picture itself; with the exact denoiser its mean moves, and ours stays."""
    timestep, mean, std = 400, 0.6, 0.4
    clean = mean + std * normal(4, 1, 32, 32)
    noisy = clean + ratio(timestep) * normal(4, 1, 32, 32, seed=1)
    scale = math.sqrt(float(ALPHAS[timestep]))
    ours, theirs = (
        restore(gaussian(mean, std), start, ratio(timestep) / 2, noise_config(), steps=1)
        for start in (noisy, noisy / scale)
    )
    assert abs(float((ours - clean).mean())) < 0.01 < 0.03 < abs(float((theirs - clean).mean()))
    assert (ours - clean).square().mean() < (theirs - clean).square().mean()


@pytest.mark.parametrize("steps", [0, -1, 12])
def test_more_steps_than_there_are_timesteps_are_refused(steps):
    with pytest.raises(PlanError, match="expected 1 to 11") as error:
        restore(unchanged, normal(1, 1, 8, 8), ratio(10) / 2, noise_config(), steps=steps)
    assert "\n" not in str(error.value)


def test_a_prediction_that_does_not_fit_is_refused():
    with pytest.raises(ModelError, match="predicts no variance"):
        restore(lambda x, *_: x.repeat(1, 2, 1, 1), normal(1, 1, 8, 8), 0.1, noise_config(), steps=1)
    with pytest.raises(ModelError, match="flow"):
        restore(unchanged, normal(1, 1, 8, 8), 0.1, noise_config() | {"prediction_type": "flow"}, steps=1)


# ---- whole pictures ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 33),
    width=st.integers(1, 33),
    size=st.sampled_from([4, 7, 16]),
    part=st.floats(0, 1),
    batch=st.sampled_from([7, 100]),
    steps=st.integers(1, 2),
)
def test_tiles_of_an_unchanging_denoiser_give_the_picture_back(height, width, size, part, batch, steps):
    """Blending weights are a partition of unity, at any size, overlap and batch, also where pictures are padded."""
    picture = torch.rand(3, height, width)
    options = {"steps": steps, "size": size, "channels": 3, "overlap": round(part * (size - 1)), "batch": batch}
    found = in_tiles(unchanged, picture, 0.1, noise_config(), **options)
    assert found.shape == picture.shape
    assert (found - picture).abs().max() < 1e-5


def test_tiles_overlap_and_come_in_batches():
    seen = []

    def call(tiles):
        seen.append(tiles)
        return tiles

    tiled(call, torch.arange(40.0).repeat(1, 20, 1), size=16, overlap=4, batch=5)
    tiles = torch.cat(seen)
    assert [len(tiles) for tiles in seen] == [5, 1]  # 2 rows of 3
    assert tiles.shape == (6, 1, 16, 16)
    assert tiles[:3, 0, 0, 0].tolist() == [0, 12, 24]  # each 16 wide, the last one ends at 39


def test_a_small_picture_is_padded_by_reflection():
    seen = []
    picture = torch.rand(1, 5, 3)
    tiled(lambda tiles: seen.append(tiles) or tiles, picture, size=16, overlap=4, batch=8)
    [tile] = seen
    padded = np.pad(picture[0].numpy(), ((5, 6), (6, 7)), mode="reflect")
    assert np.array_equal(tile[0, 0].numpy(), padded)


def test_no_seam_shows_where_tiles_disagree():
    """Each tile becomes its own mean: hard borders would jump by the whole difference of neighbours."""
    picture = torch.linspace(0, 1, 64).repeat(1, 16, 1)
    found = tiled(lambda t: t.mean((1, 2, 3), keepdim=True).expand_as(t), picture, size=16, overlap=8, batch=9)
    jumps = found.diff(dim=2).abs()
    apart = 8 / 63  # means of neighbouring tiles
    assert jumps.max() < 0.3 * apart
    assert found.diff(dim=2).min() > -1e-6  # and it rises from end to end, as the picture does


def test_the_batch_changes_nothing():
    config, options = noise_config(), {"steps": 3, "size": 16, "channels": 1}
    predict = from_estimate(lambda x, level: x.mean((2, 3), keepdim=True) + 0.1 * torch.tanh(x), "epsilon")
    picture = torch.rand(1, 37, 50)
    one, many = (in_tiles(predict, picture, 0.2, config, batch=b, **options) for b in (1, 64))
    assert torch.allclose(one, many, atol=1e-5)


def test_a_one_channel_model_restores_colours_one_by_one():
    config, options = noise_config(), {"steps": 2, "size": 16, "channels": 1, "cond": cond_of(torch.tensor([3]))}
    labels = []

    def predict(sample, timestep, cond, memo):
        label = cond["class_labels"]
        assert sample.shape[1:] == (1, 16, 16) and label.shape == timestep.shape == sample.shape[:1]
        labels.extend(label.tolist())
        return torch.tanh(sample - sample.mean((2, 3), keepdim=True))

    picture = torch.rand(3, 20, 33)
    whole = in_tiles(predict, picture, 0.1, config, **options)
    planes = [in_tiles(predict, plane[None], 0.1, config, **options) for plane in picture]
    assert torch.equal(whole, torch.cat(planes)) and set(labels) == {3}


@pytest.mark.parametrize(
    ("picture", "options", "words"),
    [
        (torch.rand(1, 20, 20), {"channels": 3}, "got 1 channels, expected 3, as the model"),
        (torch.rand(4, 20, 20), {"channels": 3}, "got 4 channels"),
        (torch.rand(20, 20), {}, "one picture"),
        (torch.rand(1, 0, 20), {}, "one picture"),
        (torch.full((1, 20, 20), math.nan), {}, "without NaN"),
        (torch.ones(1, 20, 20, dtype=torch.uint8), {}, "torch.uint8"),
        (torch.rand(1, 20, 20), {"overlap": 16}, "overlap 16"),
        (torch.rand(1, 20, 20), {"overlap": -1}, "overlap -1"),
        (torch.rand(1, 20, 20), {"batch": 0}, "batch 0"),
    ],
)
def test_pictures_and_tiles_that_do_not_fit_are_refused_in_one_line(picture, options, words):
    with pytest.raises(HalfstepError, match=words) as error:
        in_tiles(unchanged, picture, 0.1, noise_config(), **{"steps": 1, "size": 16, "channels": 1, **options})
    assert "\n" not in str(error.value)


# ---- classical denoisers and measures ------------------------------------------------------------------------------


def real(colour: bool, side: int = 96) -> torch.Tensor:
    from sklearn.datasets import load_sample_images

    flower = torch.from_numpy(load_sample_images().images[1][150 : 150 + side, 250 : 250 + side] / 255).permute(2, 0, 1)
    return flower.float() if colour else flower.float().mean(0, keepdim=True)


@pytest.mark.parametrize(("sigma", "gain"), [(0.05, 1.8), (0.1, 3.5), (0.2, 6)])
@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("name", CLASSICAL)
def test_classical_denoisers_raise_psnr_and_ssim_on_a_real_picture(name, colour, sigma, gain):
    pytest.importorskip("skimage")
    clean = real(colour)
    noisy = clean + sigma * normal(*clean.shape, dtype=torch.float32)
    found = CLASSICAL[name](noisy, sigma)
    assert found.shape == clean.shape and found.dtype == clean.dtype
    assert psnr(found, clean) > psnr(noisy, clean) + gain
    assert ssim(found, clean) > ssim(noisy, clean)


@pytest.mark.parametrize("name", CLASSICAL)
def test_classical_denoisers_find_a_flat_picture_under_the_noise(name):
    pytest.importorskip("skimage")
    clean = torch.full((1, 48, 64), 0.5)  # not square: a turned picture would show
    noisy = clean + 0.1 * normal(1, 48, 64, dtype=torch.float32)
    assert psnr(CLASSICAL[name](noisy, 0.1), clean) > psnr(noisy, clean) + 5


def test_measures_equal_scikit_image_and_torchmetrics():
    metrics = pytest.importorskip("skimage.metrics")
    from torchmetrics.functional.image import structural_similarity_index_measure

    clean = real(colour=True)
    noisy = (clean + 0.1 * normal(*clean.shape, dtype=torch.float32)).clamp(0, 1)
    assert psnr(noisy, clean) == pytest.approx(
        metrics.peak_signal_noise_ratio(clean.numpy(), noisy.numpy(), data_range=1), abs=1e-4
    )
    _, full = structural_similarity_index_measure(noisy[None], clean[None], data_range=1.0, return_full_image=True)
    inside = full[
        ..., 5:-5, 5:-5
    ]  # where the whole window lies in the picture; torchmetrics averages over the rest too
    assert ssim(noisy, clean) == pytest.approx(float(inside.mean()), abs=1e-4)
    assert psnr(clean, clean) == math.inf and ssim(clean, clean) == pytest.approx(1)


def test_measures_refuse_what_does_not_compare():
    pytest.importorskip("skimage")
    with pytest.raises(DataError, match="one shape"):
        psnr(torch.rand(1, 16, 16), torch.rand(3, 16, 16))
    with pytest.raises(DataError, match="at least 11 pixels"):
        ssim(torch.rand(1, 8, 16), torch.rand(1, 8, 16))
    with pytest.raises(DataError, match="no pictures"):
        compare_denoisers(CLASSICAL, [], 0.1, 0)


@pytest.mark.parametrize(("name", "absent"), [(n, "skimage.restoration") for n in CLASSICAL] + [("wavelet", "pywt")])
def test_a_missing_package_is_told_in_one_line(monkeypatch, name, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(HalfstepError, match=r"pip install halfstep\[denoise\]") as error:
        CLASSICAL[name](torch.rand(1, 16, 16), 0.1)
    assert "\n" not in str(error.value)


def test_restoring_needs_no_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    in_tiles(unchanged, torch.rand(1, 16, 16), 0.1, noise_config(), steps=1, size=16, channels=1)


# ---- side by side --------------------------------------------------------------------------------------------------


def test_methods_are_compared_on_the_same_noisy_pictures():
    pytest.importorskip("skimage")
    seen: dict[str, list] = {"nothing": [], "same": []}

    def spy(name):
        return lambda noisy, sigma: seen[name].append((noisy.clone(), sigma)) or noisy

    pictures = [real(True, 32), real(False, 48)]
    config = noise_config()

    def diffusion(noisy, sigma):
        flat = gaussian(0.0, 0.3)
        return in_tiles(flat, noisy, sigma, config, steps=2, size=32, channels=1)

    methods = {"nothing": spy("nothing"), "same": spy("same"), "diffusion": diffusion, **CLASSICAL}
    records = compare_denoisers(methods, pictures, 0.1, 5, steps={"diffusion": 2}, repeats=3)
    assert [r.name for r in records] == list(methods)
    assert len(seen["nothing"]) == 1 + 3 + 3  # one warm-up, then three runs of each picture
    for (a, sigma), (b, _) in zip(seen["nothing"], seen["same"], strict=True):
        assert torch.equal(a, b) and sigma == 0.1
    noisy = [seen["nothing"][0][0], seen["nothing"][-1][0]]
    for picture, clean in zip(noisy, pictures, strict=True):
        assert (picture - clean).std() == pytest.approx(0.1, rel=0.05)
        assert picture.min() < 0 or picture.max() > 1  # not clamped
    nothing, same, diffusion_record, *_ = records
    assert (nothing.psnr_db, nothing.ssim) == (same.psnr_db, same.ssim)
    assert nothing.psnrs_db == tuple(psnr(y.clamp(0, 1), x) for y, x in zip(noisy, pictures, strict=True))
    for record in records:
        assert record.noisy_psnr_db == pytest.approx(20, abs=0.3)  # -20 log10(sigma)
        assert record.psnr_db == pytest.approx(sum(record.psnrs_db) / 2) and record.ms > 0
        assert (record.pictures, record.seed, record.sigma) == (2, 5, 0.1) and record.to_json()["name"] == record.name
    assert diffusion_record.steps == 2 and nothing.steps is None
    assert all(r.psnr_db > nothing.psnr_db + 1 for r in records[3:])


def test_the_noise_of_a_picture_depends_on_the_seed_and_its_number_alone():
    pytest.importorskip("skimage")

    def noise_of(pictures, seed):
        seen = []
        compare_denoisers({"spy": lambda y, s: seen.append(y) or y}, pictures, 0.1, seed)
        return seen[-1] - pictures[-1]

    a, b = real(False, 32), real(False, 40)
    assert torch.allclose(noise_of([a, b], 1), noise_of([b, b], 1), atol=1e-6)
    assert not torch.allclose(noise_of([a, b], 1), noise_of([a, b], 2), atol=1e-2)
    assert not torch.allclose(noise_of([b], 1), noise_of([a, b], 1), atol=1e-2)
