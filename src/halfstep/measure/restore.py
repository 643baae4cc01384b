"""Denoise real pictures with a diffusion denoiser, and measure that beside classical denoisers.

Source: The Missing U (arXiv 2310.20092), its denoising experiment; DDIM (arXiv 2010.02502, eq. 12 with eta = 0).
What differs from the released notebook: it feeds the noisy picture as it is, in [0, 1], at a hand-picked timestep. Here
the timestep is the one whose noise-to-signal ratio is the picture's and the start is sqrt(alpha_bar) times the picture
in [-1, 1], so that the denoiser sees what it was trained on: neither scale nor colour drifts.

The number of steps is a choice between two goods. One step is the denoiser's estimate of the mean of all pictures that
could lie under the noise: least squares, the highest PSNR, soft. Many steps follow the probability flow to one of those
pictures: as sharp as the training images, at a lower PSNR.

The classical denoisers come from scikit-image, which has no BM3D (the paper's baseline): non-local means is its nearest
relative there. All pictures in this file are float [C,H,W]; `sigma` is the noise's standard deviation in [0, 1] terms.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

from halfstep.core.errors import DataError, HalfstepError, ModelError, PlanError
from halfstep.core.plan import Row
from halfstep.core.process import Process
from halfstep.engine.networks import alone
from halfstep.engine.profiling import interleave
from halfstep.engine.samplers import with_timesteps
from halfstep.engine.sampling import image_generators, last, walk
from halfstep.nets.denoiser import Cond, Memo, Predict, repeated

Denoiser = Callable[[torch.Tensor, float], torch.Tensor]
"""(noisy [C,H,W], in [0, 1] but for the noise; sigma) -> restored [C,H,W] in about [0, 1]"""

# ---- by diffusion --------------------------------------------------------------------------------------------------


def matching_timestep(sigma: float, alphas_cumprod: torch.Tensor) -> int:
    """The timestep whose noise, relative to its signal, is nearest to `sigma` on pictures in [0, 1].

    In [-1, 1] the noise is 2 sigma. Raises DataError for a sigma that no timestep has.
    """
    alphas = alphas_cumprod.double()
    sigmas = ((1 - alphas) / alphas).sqrt() / 2
    low, high = float(sigmas[0]), float(sigmas[-1])
    if not (math.isfinite(sigma) and low * (1 - 1e-4) <= sigma <= high * (1 + 1e-4)):
        expected = f"{low:.2g} to {high:.3g}, a standard deviation on pictures in [0, 1]"
        do = "give a noise level that the model was trained on"
        raise DataError(got=f"{sigma:g}", expected=expected, where="noise", do=do)
    return int((sigmas - sigma).abs().argmin())


def timesteps_from(start: int, steps: int) -> list[int]:
    """`steps` timesteps from `start` down, even parts of 0 … start (what diffusers calls trailing spacing).

    Raises PlanError where fewer than `steps` timesteps lie there.
    """
    if not 1 <= steps <= start + 1:
        got, where = f"{steps} steps", f"denoising from timestep {start}"
        raise PlanError(got=got, expected=f"1 to {start + 1}", where=where, do="take that many steps")
    return [(start + 1) * (steps - i) // steps - 1 for i in range(steps)]


def restore(
    predict: Predict,
    noisy: torch.Tensor,
    sigma: float,
    process: Process | Mapping[str, Any],
    *,
    steps: int,
    cond: Cond | None = None,
) -> torch.Tensor:
    """Noisy pictures of the model's size -> restored ones, by DDIM without noise from the matching timestep.

    noisy: [B,C,S,S], in [-1, 1] but for the noise: do not clamp it.  sigma: as everywhere in [0, 1] terms.
    process: the process that the model was trained under, or its scheduler's config.
    steps: calls of the model; 1 is its one-shot estimate.  Returns [B,C,S,S] in about [-1, 1].
    A noisy picture is a sample at the last timestep of a shorter process, the model's own at `steps` of its timesteps
    ("respaced", arXiv 2102.09672): sampled at each of them, diffusers' grid is the right one for any number of steps.
    Raises: DataError (sigma), PlanError (steps), ModelError (a prediction that is no noise, picture or velocity).
    """
    process = Process.of(process)
    levels = process.scheduler().alphas_cumprod
    chosen = torch.tensor(timesteps_from(matching_timestep(sigma, levels), steps)).flip(0)
    scheduler = _respaced(process, levels[chosen])

    def there(sample: torch.Tensor, t: torch.Tensor, cond: Cond, memo: Memo) -> torch.Tensor:
        found = predict(sample, chosen[t].expand(len(sample)).to(sample.device), cond, memo)
        if found.shape != sample.shape:
            got, expected = f"a prediction {list(found.shape)}", f"{list(sample.shape)}, as the sample"
            raise ModelError(got=got, expected=expected, where="model", do="bring a model that predicts no variance")
        return found

    rows = [Row(float(t), "restored") for t in scheduler.timesteps]
    sample = scheduler.alphas_cumprod[-1].sqrt() * noisy
    return last(walk([alone(there)] * len(rows), rows, scheduler, sample, cond=cond))


def _respaced(process: Process, levels: torch.Tensor) -> DDIMScheduler:
    """DDIM at every timestep of the process whose alphas_cumprod are `levels`, falling: beta = 1 - level / the one
    before. What it clips is the model's process's."""
    exact = levels.double()
    betas = 1 - exact / torch.cat([exact.new_ones(1), exact[:-1]])
    own = {"num_train_timesteps": len(betas), "trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
    grid = {"timestep_spacing": "trailing", "steps_offset": 0, "set_alpha_to_one": True}
    return with_timesteps(DDIMScheduler.from_config(process.config() | own | grid), len(betas))


# ---- pictures larger than the model --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a model takes a picture of any size. `size`, `channels`: the model's. `overlap`: pixels that neighbours share
    at least (None: a quarter of `size`). `batch`: tiles per call."""

    size: int
    channels: int
    overlap: int | None = None
    batch: int = 16


def restore_picture(
    predict: Predict,
    picture: torch.Tensor,
    sigma: float,
    process: Process | Mapping[str, Any],
    tiles: Tiles,
    *,
    steps: int,
    cond: Cond | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """A noisy picture [C,H,W] of any size -> the restored one, both in about [0, 1], by overlapping tiles.

    A picture that is smaller than a tile is padded by reflection. A model of one channel restores the channels of a
    colour picture one by one; other mismatches are refused.
    cond: of one picture.  device: where `predict` wants its tiles; the picture stays where it is.
    Raises: DataError, and as `restore`.
    """
    floats = picture.is_floating_point() and bool(torch.isfinite(picture).all())
    if picture.ndim != 3 or not picture.numel() or not floats:
        got, do = f"{picture.dtype} {list(picture.shape)}", "give one picture as numbers in [0, 1], without NaN"
        raise DataError(got=got, expected="finite floats [C,H,W]", where="picture", do=do)
    require_channels(picture, tiles.channels)

    def call(given: torch.Tensor) -> torch.Tensor:
        each = repeated(cond or {}, len(given))
        found = restore(predict, 2 * given.to(device) - 1, sigma, process, steps=steps, cond=each)
        return (found / 2 + 0.5).to(given)

    overlap = tiles.size // 4 if tiles.overlap is None else tiles.overlap
    parts = picture.split(tiles.channels)
    return torch.cat([tiled(call, part, size=tiles.size, overlap=overlap, batch=tiles.batch) for part in parts])


def require_channels(picture: torch.Tensor, channels: int) -> None:
    """Raise DataError for a picture [C,H,W] that a model of so many channels does not restore."""
    if channels not in (1, len(picture)):
        got, do = f"{len(picture)} channels", "convert the picture, or bring another model"
        raise DataError(got=got, expected=f"{channels}, as the model", where="picture", do=do)


def tiled(
    call: Callable[[torch.Tensor], torch.Tensor], picture: torch.Tensor, *, size: int, overlap: int, batch: int
) -> torch.Tensor:
    """What `call`, made for tiles [B,C,size,size], gives for a picture [C,H,W]: tiles blended by Hann windows.

    Each pixel is the weighted mean of the tiles over it; a tile's weight falls smoothly towards its edge and is never
    zero, so that no seam shows and the border is covered. Raises: PlanError.
    """
    if not (0 <= overlap < size and batch >= 1):
        got = f"tiles of {size}, overlap {overlap}, batch {batch}"
        expected = "0 <= overlap < size and batch >= 1"
        raise PlanError(got=got, expected=expected, where="tiles", do="change one of these")
    height, width = picture.shape[1:]
    top, left = (max(0, size - n) // 2 for n in (height, width))
    padded = picture[:, _reflected(height, size)][:, :, _reflected(width, size)]
    ramp = torch.sin((torch.arange(size).to(padded) + 0.5) * (math.pi / size)).square()
    window, total, weight = torch.outer(ramp, ramp), torch.zeros_like(padded), torch.zeros_like(padded[0])
    corners = product(*(_starts(n, size, overlap) for n in padded.shape[1:]))
    places = [(slice(y, y + size), slice(x, x + size)) for y, x in corners]
    for begin in range(0, len(places), batch):
        chosen = places[begin : begin + batch]
        found = call(torch.stack([padded[:, down, across] for down, across in chosen]))
        for (down, across), tile in zip(chosen, found, strict=True):
            total[:, down, across] += window * tile
            weight[down, across] += window
    return (total / weight)[:, top : top + height, left : left + width]


def _reflected(length: int, size: int) -> torch.Tensor:
    """The indices 0 … length - 1, with mirrored ones around them up to `size` in all."""
    pad = max(0, size - length)
    return torch.from_numpy(np.pad(np.arange(length), (pad // 2, pad - pad // 2), mode="reflect"))


def _starts(length: int, size: int, overlap: int) -> list[int]:
    """Where tiles begin so that they reach from end to end, evenly spread; neighbours share `overlap` or more."""
    gaps = math.ceil((length - size) / (size - overlap))
    return [i * (length - size) // max(gaps, 1) for i in range(gaps + 1)]


# ---- classical denoisers -------------------------------------------------------------------------------------------


def non_local_means(noisy: torch.Tensor, sigma: float) -> torch.Tensor:
    """Mean of pixels with similar 5x5 surroundings (Buades et al. 2005), colour channels together.

    h = 0.6 sigma: the best of 0.5, 0.6, 0.8, 1 on average over three real pictures at sigma 0.02 … 0.2.
    """
    return _by_skimage("denoise_nl_means", noisy, patch_size=5, patch_distance=6, h=0.6 * sigma, sigma=sigma)


def total_variation(noisy: torch.Tensor, sigma: float) -> torch.Tensor:
    """The picture of least total variation near the noisy one (Chambolle 2004), channel by channel.

    weight = 0.6 sigma: the best of 0.4 … 1.7 on average, over the same pictures and sigmas as in `non_local_means`.
    """
    return _by_skimage("denoise_tv_chambolle", noisy, weight=0.6 * sigma)


def wavelet(noisy: torch.Tensor, sigma: float) -> torch.Tensor:
    """Soft-thresholded Daubechies-2 wavelets, BayesShrink (Chang et al. 2000), RGB in YCbCr."""
    _extra("pywt")
    colour = {"convert2ycbcr": True} if len(noisy) == 3 else {}
    return _by_skimage("denoise_wavelet", noisy, sigma=sigma, wavelet="db2", method="BayesShrink", **colour)


CLASSICAL: dict[str, Denoiser] = {
    "non-local means": non_local_means,
    "total variation": total_variation,
    "wavelet": wavelet,
}


def _by_skimage(function: str, noisy: torch.Tensor, **options: Any) -> torch.Tensor:
    """One channel goes without a channel axis: scikit-image 0.26 drops such an axis in non-local means."""
    denoise = getattr(_extra("skimage.restoration"), function)
    image = noisy.cpu().double().numpy()
    found = denoise(image[0], **options)[None] if len(image) == 1 else denoise(image, channel_axis=0, **options)
    return torch.from_numpy(np.ascontiguousarray(found)).to(noisy)


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        got, expected = f"no usable {module.partition('.')[0]} ({error})", "scikit-image and PyWavelets"
        do = "pip install halfstep[denoise]"
        raise HalfstepError(got=got, expected=expected, where="classical denoisers and SSIM", do=do) from error


# ---- measures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Restored:
    """How well one method restores pictures of one noise level.

    psnr_db, ssim: means over the pictures, against the clean ones; restored pictures are clamped to [0, 1] first.
    psnrs_db: the PSNR of each picture, in the same order for all methods: differences between methods are paired.
    noisy_psnr_db: of the noisy pictures, not clamped.  ms: median milliseconds per picture.
    steps: calls of the model per tile; None for methods that have no model.
    pictures: how many.  seed: of the noise, which is the same for all methods.  threads: of the CPU.
    """

    name: str
    sigma: float
    psnr_db: float
    ssim: float
    ms: float
    noisy_psnr_db: float
    steps: int | None
    psnrs_db: tuple[float, ...]
    pictures: int
    seed: int
    threads: int

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def psnr(found: torch.Tensor, clean: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures whose range is 1; inf where they are equal. Raises: DataError."""
    _same_shape(found, clean)
    error = float((found.double() - clean.double()).square().mean())
    return -10 * math.log10(error) if error else math.inf


def require_scorable(clean: torch.Tensor) -> None:
    """Raise DataError for a picture that is too small for SSIM, HalfstepError where scikit-image is not installed."""
    if min(clean.shape[1:]) < 11:
        got = f"a picture of {clean.shape[2]}x{clean.shape[1]}"
        do = "give larger pictures, or restore them without a measure (--noisy)"
        raise DataError(got=got, expected="sides of at least 11 pixels", where="SSIM", do=do)
    _extra("skimage.metrics")


def ssim(found: torch.Tensor, clean: torch.Tensor) -> float:
    """Structural similarity of pictures whose range is 1, with the 11-pixel Gaussian window of Wang et al. (2004).

    Mean over pixels and channels. Raises: DataError (shapes differ, or a side below 11 pixels).
    """
    _same_shape(found, clean)
    require_scorable(clean)
    a, b = (picture.cpu().double().numpy() for picture in (found, clean))
    measure = _extra("skimage.metrics").structural_similarity
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(measure(a, b, data_range=1.0, channel_axis=0, **wang))


def _same_shape(found: torch.Tensor, clean: torch.Tensor) -> None:
    if found.shape != clean.shape or clean.ndim != 3:
        got, expected = f"{list(found.shape)} beside {list(clean.shape)}", "two pictures [C,H,W] of one shape"
        raise DataError(got=got, expected=expected, where="pictures", do="compare a picture with its own original")


def with_noise(clean: torch.Tensor, sigma: float, seed: int, k: int) -> torch.Tensor:
    """A picture with noise that depends on the seed and the picture's number alone, not clamped."""
    return clean + sigma * torch.randn(clean.shape, generator=image_generators(seed, k, 1)[0]).to(clean)


def compare_denoisers(
    denoisers: Mapping[str, Denoiser],
    pictures: Sequence[torch.Tensor],
    sigma: float,
    seed: int,
    *,
    steps: Mapping[str, int] | None = None,
    repeats: int = 1,
    shown: Callable[[int, str, torch.Tensor], None] | None = None,
) -> list[Restored]:
    """Every method on the same noisy pictures: one record per method, in the order of `denoisers`.

    pictures: clean, [C,H,W] in [0, 1]; the noise of picture k depends on the seed and k alone, and is not clamped.
    steps: what a record tells of a method's model calls.  repeats: timed runs per picture; methods run in turns, after
    one warm-up each.  shown: is handed every picture, by its number and the name of what made it ("noisy" too).
    Raises: DataError, and what the methods raise.
    """
    if not pictures:
        raise DataError(got="no pictures", expected="at least one", where="compare_denoisers", do="give clean ones")
    noisy_psnrs: list[float] = []
    scores: dict[str, list[tuple[float, float]]] = {name: [] for name in denoisers}
    times: dict[str, list[float]] = {name: [] for name in denoisers}
    for k, clean in enumerate(pictures):
        noisy = with_noise(clean, sigma, seed, k)
        noisy_psnrs.append(psnr(noisy, clean))
        if shown:
            shown(k, "noisy", noisy)
        found, taken = _in_turns(denoisers, noisy, sigma, repeats=repeats, warmup=int(k == 0))
        for name in denoisers:
            restored = found[name].to(clean).clamp(0, 1)
            if shown:
                shown(k, name, restored)
            scores[name].append((psnr(restored, clean), ssim(restored, clean)))
            times[name] += taken[name]
    return [
        Restored(
            name=name,
            sigma=sigma,
            psnr_db=fmean(p for p, _ in scores[name]),
            ssim=fmean(s for _, s in scores[name]),
            ms=median(times[name]),
            noisy_psnr_db=fmean(noisy_psnrs),
            steps=(steps or {}).get(name),
            psnrs_db=tuple(p for p, _ in scores[name]),
            pictures=len(pictures),
            seed=seed,
            threads=torch.get_num_threads(),
        )
        for name in denoisers
    ]


def _in_turns(
    denoisers: Mapping[str, Denoiser], noisy: torch.Tensor, sigma: float, *, repeats: int, warmup: int
) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """What every method makes of one picture, and the milliseconds of each of its runs."""
    found: dict[str, torch.Tensor] = {}

    def run(name: str) -> None:
        found[name] = denoisers[name](noisy, sigma)

    calls = {name: functools.partial(run, name) for name in denoisers}
    return found, interleave(calls, repeats=repeats, warmup=warmup)
