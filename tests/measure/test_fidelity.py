"""Fidelity. Oracles: scikit-image, scipy, the closed probability flow of Gaussian data, pictures drawn by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from hypothesis import given
from hypothesis import strategies as st

from halfstep.core.errors import DataError, PlanError
from halfstep.core.plan import Sampler
from halfstep.core.process import BETA_SCHEDULERS, Process
from halfstep.core.results import Fidelity
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions
from halfstep.engine.samplers import REFUSED, plain_config
from halfstep.engine.sampling import image_generators, plan_for, sample_images, start_noise
from halfstep.measure.features import Extractor
from halfstep.measure.fidelity import (
    FINE,
    Converged,
    Fidelities,
    converged_plan,
    difference,
    fidelities_of,
    mean_of,
    similarities,
    squared_errors,
    stochastic,
    student,
)
from tiny import unet

PROCESS = Process(clip_sample=False)
PRICES = {"full": 2, "w0.50": 1}
PLAIN = Extractor("plain", 64, lambda x: x.flatten(1))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bank_of(**config) -> Bank:
    return Bank({"full": unet(0, **config), "w0.50": unet(1, **config)}, "full", "epsilon")


def plan_of(bank: Bank, kind=DPMSolverMultistepScheduler, steps: int = 4, **options):
    return plan_for(bank, kind.from_config(PROCESS.config() | options), steps, PRICES)


def converged(bank: Bank, count: int = 5, steps: int = 12, **options) -> Converged:
    return Converged(bank, converged_plan(bank, PROCESS, steps, PRICES), count=count, **({"seed": 3} | options))


@pytest.fixture(scope="module")
def bank():
    return bank_of()


# ---- pictures side by side -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (2, 3, 24, 11), (2, 1, 33, 32)])
def test_similarity_and_psnr_are_those_of_scikit_image(shape):
    metrics = pytest.importorskip("skimage.metrics")
    a = normal(*shape).cumsum(2).tanh()
    b = (a + 0.2 * normal(*shape, seed=1)).clamp(-1, 1)
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 2.0}
    pairs = list(zip(a.double().numpy(), b.double().numpy(), strict=True))
    expected = [metrics.structural_similarity(x, y, channel_axis=0, **wang) for x, y in pairs]
    assert similarities(b, a).tolist() == pytest.approx(expected, abs=1e-5)
    errors = squared_errors(b, a)
    expected = [metrics.peak_signal_noise_ratio(x, y, data_range=2.0) for x, y in pairs]
    assert [10 * math.log10(4 / float(e)) for e in errors] == pytest.approx(expected, abs=1e-4)


def test_in_smaller_pictures_the_window_is_as_large_as_fits():
    """Wang's formula at every place, in loops: 8x8 pictures have 2x2 places for 7 pixels."""
    a, b = normal(1, 1, 8, 8).tanh(), normal(1, 1, 8, 8, seed=1).tanh()
    ring = np.exp(-0.5 * (np.arange(-3, 4) / 1.5) ** 2)
    window = np.outer(ring, ring) / ring.sum() ** 2
    found = []
    for top in range(2):
        for left in range(2):
            x, y = (p[0, 0, top : top + 7, left : left + 7].double().numpy() for p in (a, b))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy, cov = (
                (window * x * x).sum() - mx**2,
                (window * y * y).sum() - my**2,
                (window * x * y).sum() - mx * my,
            )
            c1, c2 = 0.02**2, 0.06**2
            found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert float(similarities(a, b)[0]) == pytest.approx(np.mean(found), abs=1e-5)


@given(side=st.integers(1, 40), channels=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_picture_is_like_itself_and_no_other_is_more(side, channels, seed):
    a, b = (
        normal(2, channels, side, side, seed=seed).clamp(-1, 1),
        normal(2, channels, side, side, seed=seed + 100).tanh(),
    )
    assert similarities(a, a).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert (similarities(a, b) <= 1 + 1e-6).all() and (similarities(a, b) >= -1 - 1e-6).all()
    assert similarities(a, b).tolist() == pytest.approx(similarities(b, a).tolist(), abs=1e-5)


# ---- who draws noise -----------------------------------------------------------------------------------------------

NOISY = {
    *("DDPMScheduler", "DDPMParallelScheduler", "LCMScheduler", "TCDScheduler", "SASolverScheduler"),
    *("EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
}
"""By their papers."""


def sampler_of(name: str, steps: int = 6, **options) -> Sampler:
    return Sampler(name, plain_config(getattr(diffusers, name).from_config(PROCESS.config() | options)), steps)


@pytest.mark.parametrize("name", [name for name in BETA_SCHEDULERS if name not in REFUSED])
def test_who_draws_noise_is_found_by_walking(name):
    assert stochastic(sampler_of(name)) == (name in NOISY)


def test_what_draws_noise_hangs_on_the_config_and_the_steps():
    for name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"):
        assert stochastic(sampler_of(name, algorithm_type="sde-dpmsolver++"))
    assert not stochastic(sampler_of("LCMScheduler", steps=1))  # the noise comes between two steps


# ---- converged pictures --------------------------------------------------------------------------------------------


def test_the_converged_plan_is_at_no_distance_from_itself(bank):
    target = converged(bank, extractor=PLAIN)
    found = target.distance(target.plan)
    assert (found.mse.value, found.features.value, found.psnr_db.value) == (0, 0, math.inf)
    assert (found.mse.low, found.mse.high, found.psnr_db.low) == (0, 0, math.inf)
    assert found.ssim.value == pytest.approx(1, abs=1e-6) and found.n == 5 and found.draws == 0
    assert "inf dB" in str(found)
    assert Fidelity.from_json(found.to_json()) == found


def test_every_picture_is_held_against_the_one_of_its_own_noise(bank):
    """By hand: both plans' pictures, the mean over pixels; the pixels as features are the sum over them."""
    target, plan = converged(bank, extractor=PLAIN, batch=2), plan_of(bank).uniform("w0.50")
    a, b = (torch.cat(list(sample_images(bank, p, 5, seed=3, batch=5))) for p in (target.plan, plan))
    found = target.fidelities(plan)
    expected = (a - b).square().mean((1, 2, 3))
    assert len(found) == 5 and np.allclose(found.mse, expected, rtol=1e-4)
    assert np.allclose(found.features, 64 * expected.numpy(), rtol=1e-4)
    assert np.allclose(found.ssim, similarities(a, b), atol=1e-4)
    few = target.fidelities(plan, 3)
    assert np.allclose(few.of("mse"), found.mse[:3], rtol=1e-4)
    mean = found.mean()
    assert mean.mse.value == pytest.approx(float(expected.mean()), rel=1e-4)
    assert mean.psnr_db.value == pytest.approx(10 * math.log10(4 / mean.mse.value))
    assert mean.psnr_db.low <= mean.psnr_db.value <= mean.psnr_db.high


def test_without_a_feature_network_there_are_no_features(bank):
    found = converged(bank, 2).fidelities(plan_of(bank))
    assert found.mean().features is None and found.mean().features_name is None
    with pytest.raises(DataError, match="extractor"):
        found.of("features")


def test_what_is_kept_is_known_by_content_and_drawn_again_where_it_is_damaged(bank, tmp_path):
    first = converged(bank, cache=tmp_path)
    again = converged(bank, cache=tmp_path)
    assert not isinstance(first.pictures, np.memmap) and isinstance(again.pictures, np.memmap)
    assert np.array_equal(first.pictures, again.pictures) and first.target == again.target
    other = Bank({"full": bank["w0.50"], "w0.50": bank["full"]}, "full", "epsilon")
    others = [converged(bank, seed=4), converged(bank, steps=13), converged(other)]
    assert len({one.target for one in (first, *others)}) == 4
    for damage in (lambda c: c[:-1], lambda c: c[:-1] + b"\0", lambda c: c[:200]):
        [file] = tmp_path.glob("converged-*.npy")
        file.write_bytes(damage(file.read_bytes()))
        mended = converged(bank, cache=tmp_path)
        assert not isinstance(mended.pictures, np.memmap) and np.array_equal(mended.pictures, first.pictures)


def test_classes_are_part_of_what_a_picture_is():
    bank = bank_of(num_class_embeds=3)
    in_turn, one = converged(bank), converged(bank, conditions=Conditions.of_classes([1]))
    assert in_turn.target != one.target and not np.allclose(in_turn.pictures, one.pictures)
    assert np.allclose(in_turn.pictures[[1, 4]], one.pictures[[1, 4]], atol=1e-5)
    assert one.distance(one.plan).mse.value == 0
    with pytest.raises(DataError, match="one noise"):
        difference(one.fidelities(plan_of(bank)), in_turn.fidelities(plan_of(bank)))


def test_latents_are_compared_as_pictures(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()  # fmt: skip
    bank = bank_of(colours=2).with_vae(vae)
    target = converged(bank, 3, cache=tmp_path)
    assert target.pictures.shape == (3, 3, 16, 16)
    assert converged(bank, 3, cache=tmp_path).distance(target.plan).mse.value == 0
    assert target.distance(plan_of(bank)).mse.value > 0
    assert target.target != converged(bank_of(colours=2), 3).target


def test_the_converged_plan_by_process(bank):
    """Whatever spacing a model's config asks for; where the process ends in pure noise, many steps of order 1."""
    plain = converged_plan(bank, replace(PROCESS, timestep_spacing="leading"), prices=PRICES)
    assert (plain.sampler.config["timestep_spacing"], plain.sampler.config["solver_order"]) == ("trailing", 2)
    assert (len(plain.rows), plain.rows[0].timestep) == (FINE, 999)
    cosine = converged_plan(bank, Process(beta_schedule="squaredcos_cap_v2"), prices=PRICES)
    assert (cosine.sampler.config["timestep_spacing"], cosine.sampler.config["solver_order"]) == ("leading", 1)
    assert len(cosine.rows) == 5 * FINE
    assert len(converged_plan(bank, Process(timesteps=30), prices=PRICES).rows) == 15


# ---- the closed flow of Gaussian data ------------------------------------------------------------------------------

MEAN, STD = 0.2, 0.15


class Gaussian(ModelMixin, ConfigMixin):
    """The exact noise predictor of pixels that are independent N(MEAN, STD^2), under the default process."""

    @register_to_config
    def __init__(self, sample_size: int = 4, in_channels: int = 1, out_channels: int = 1):
        super().__init__()
        self.none = torch.nn.Parameter(torch.zeros(1))
        self.levels = PROCESS.scheduler().alphas_cumprod.double()

    def forward(self, sample, timestep, return_dict=True):
        level = self.levels[timestep.long()]
        clean = MEAN + STD**2 * level.sqrt() / (level * STD**2 + 1 - level) * (sample - level.sqrt() * MEAN)
        noise = (sample - level.sqrt() * clean) / (1 - level).sqrt()
        return UNet2DOutput(sample=noise.to(sample)) if return_dict else (noise.to(sample),)


@pytest.fixture(scope="module")
def gaussian() -> Bank:
    return Bank({"full": Gaussian()}, "full", "epsilon")


def ends(bank: Bank, steps: int, count: int = 16) -> Converged:
    return Converged(bank, converged_plan(bank, PROCESS, steps, {"full": 1}), count=count, seed=0)


def test_converged_pictures_lie_where_the_flow_of_their_noise_ends(gaussian):
    """x_t = sqrt(a) m + sqrt(a s^2 + 1 - a) z with one z all along the flow: the picture is m + s z."""
    target = ends(gaussian, FINE)
    last = gaussian["full"].levels[-1]
    noise = start_noise(gaussian, image_generators(0, 0, 16))
    z = (noise - last.sqrt() * MEAN) / (last * STD**2 + 1 - last).sqrt()
    off = squared_errors(torch.from_numpy(target.pictures), MEAN + STD * z).mean()
    assert 10 * math.log10(4 / off) > 50
    assert ends(gaussian, 2 * FINE).distance(target.plan).psnr_db.value > 50  # half the step moves nothing that shows


@pytest.mark.parametrize("kind, order", [(DDIMScheduler, 1), (DPMSolverMultistepScheduler, 2)])
def test_the_error_falls_at_the_order_of_the_solver(gaussian, kind, order):
    target = ends(gaussian, 500)
    coarse, fine = (target.distance(plan_of(gaussian, kind, steps)).mse.value for steps in (40, 80))
    assert math.log2(math.sqrt(coarse / fine)) == pytest.approx(order, abs=0.3)


# ---- averages and intervals ----------------------------------------------------------------------------------------


def test_a_sampler_that_draws_noise_is_refused_or_averaged_over_its_noise(bank):
    target, plan = converged(bank), plan_of(bank, diffusers.DDPMScheduler)
    with pytest.raises(PlanError, match=r"DDPM, which draws noise on its way.*draws=4"):
        target.fidelities(plan)
    with pytest.raises(PlanError, match="converged_plan"):
        Converged(bank, plan, count=2, seed=0)
    pictures = torch.cat(list(sample_images(bank, plan, 5, seed=3)))
    once = target.fidelities(plan, draws=1)
    expected = squared_errors(pictures, torch.from_numpy(target.pictures))
    assert np.allclose(once.mse, expected, rtol=1e-4) and once.draws == 1
    twice, more = target.fidelities(plan, draws=2), target.fidelities(plan, draws=8)
    assert not np.allclose(twice.mse, once.mse, rtol=1e-3)
    batched = converged(bank, batch=2).fidelities(plan, draws=2)
    assert np.allclose(batched.mse, twice.mse, rtol=1e-3) and more.mean().draws == 8
    assert target.fidelities(target.plan, draws=3).draws == 0  # it draws no noise


@pytest.mark.parametrize("count", [0, 6, -1])
def test_counts_that_were_not_converged_are_refused(bank, count):
    with pytest.raises(DataError, match="1 to 5"):
        converged(bank).fidelities(plan_of(bank), count)
    if count < 1:
        with pytest.raises(DataError, match="at least one"):
            converged(bank, count)


def test_students_quantile_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for freedom, within in ((1, 0.12), (2, 0.01), (3, 2e-3), (4, 1e-3), (15, 1e-5), (1000, 1e-8)):
        assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=within)


def fidelities(mse: np.ndarray) -> Fidelities:
    return Fidelities(mse=mse, ssim=1 - mse, features=None, features_name=None, target="t", seed=0)


@pytest.mark.parametrize("n, least", [(16, 0.92), (64, 0.93)])
def test_paired_intervals_hold_the_true_change_as_often_as_they_say(n, least):
    """Skewed errors (gamma of shape 2), shared and own: pairs part what separate means do not."""
    draw, inside, parted, apart = np.random.default_rng(0), 0, 0, 0
    for _ in range(600):
        shared, one, other = draw.gamma(2, 1.0, n), draw.gamma(2, 0.1, n), draw.gamma(2, 0.2, n)
        a, b = fidelities(shared + one), fidelities(shared + other)
        change = difference(a, b)
        inside += change.low <= 0.2 <= change.high
        parted += change.low > 0
        apart += a.mean().mse.high < b.mean().mse.low
    assert least <= inside / 600 <= 0.98
    assert parted / 600 > 0.5 and apart / 600 < 0.05


def test_intervals_stay_within_what_a_measure_can_be():
    one = mean_of(np.array([0.5]), least=0.0)
    assert (one.value, one.low, one.high) == (0.5, 0.0, math.inf)
    wide = fidelities(np.array([0.0, 0.9])).mean()
    assert wide.mse.low == 0 and wide.ssim.high == 1 and wide.psnr_db.high == math.inf
    with pytest.raises(DataError):
        mean_of(np.array([]))


def test_pictures_beside_their_twins_whoever_drew_them_are_off_as_much_as_a_plan_s():
    bank = bank_of()
    known, plan = converged(bank, extractor=PLAIN), plan_of(bank)
    drawn = np.concatenate([x.numpy() for x in sample_images(bank, plan, 5, seed=3)])
    found, own = fidelities_of(drawn, known.pictures, PLAIN, target="", seed=3), known.fidelities(plan)
    for metric in ("mse", "ssim", "features"):
        np.testing.assert_allclose(found.of(metric), own.of(metric), rtol=1e-4)
    with pytest.raises(DataError, match="pairs of one noise"):
        fidelities_of(drawn[:4], known.pictures, PLAIN, target="", seed=3)
