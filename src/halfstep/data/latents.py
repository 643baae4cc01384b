"""Latent diffusion: images through an `AutoencoderKL` once, and denoised latents back to images.

A denoiser that works on latents comes with its VAE in one pipeline folder (`vae/`, or `vqvae/` as diffusers'
LDMPipeline names it). What the denoiser sees is (z - shift) * scaling, as the VAE's config says; the rest of Halfstep
is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from halfstep.core.errors import DataError, ModelError
from halfstep.core.share import Share
from halfstep.core.watch import SILENT, Watch
from halfstep.data.arrays import cache_root, cached
from halfstep.data.images import Images, plain


def factor(vae: Any) -> int:
    """How many pixels wide one latent is."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def shape_for(config: Any, vae: Any = None) -> tuple[int, int]:
    """Channels and side of the images of a denoiser with this config; with a VAE, of what its latents decode to."""
    side = config["sample_size"]
    side = side if isinstance(side, int) else side[0]
    return (config["in_channels"], side) if vae is None else (vae.config.in_channels, side * factor(vae))


@torch.no_grad()
def decode(vae: Any, sample: torch.Tensor) -> torch.Tensor:
    """Denoised latents [B, c, s, s] -> images [B, C, s * factor, s * factor] in about [-1, 1]."""
    shift, scaling = _affine(vae)
    return vae.decode(sample / scaling + shift).sample


def _affine(vae: Any) -> tuple[float, float]:
    return getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor


def check_vae(vae: Any, config: Any, where: object) -> None:
    """Raise ModelError when a VAE's latents are not what a denoiser of `config` takes."""
    if vae.config.latent_channels != config["in_channels"]:
        raise ModelError(
            got=f"a VAE with {vae.config.latent_channels} latent channels",
            expected=f"{config['in_channels']}, as the denoiser takes",
            where=where,
            do="bring the VAE that the denoiser was trained with",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Latents:
    """Encoded images, for the training loop what `Images` is.

    moments: float16 [N, 2, c, s, s], mean and standard deviation of every image's posterior; `batch` draws from it.
    """

    name: str
    moments: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]
    fingerprint: str
    shift: float
    scaling: float

    @property
    def size(self) -> int:
        return self.moments.shape[3]

    @property
    def channels(self) -> int:
        return self.moments.shape[2]

    def __len__(self) -> int:
        return len(self.moments)

    @property
    def buffer(self) -> int:
        """0: a training shuffles all of them."""
        return 0

    def coming(self, indices: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, Latents]]:
        """As of `Images`."""
        return ((index, self) for index in indices)

    def batch(
        self,
        index: torch.Tensor | np.ndarray | slice,
        *,
        flip: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        share: Share | None = None,
    ) -> torch.Tensor:
        """float32 [B, c, s, s], scaled, drawn with `generator` (torch's own without one); `share`: which images of a
        training step these are.

        Raises DataError for flips: the mirror image's latents are not the mirrored latents.
        """
        if flip is not None:
            raise DataError(got="flips", expected="none on latents", where=self.name, do="set data.flip=false")
        mean, std = torch.from_numpy(np.array(self.moments[plain(index)])).float().unbind(1)
        drawn = torch.randn((share.whole if share else len(std), *std.shape[1:]), generator=generator)
        return (mean + std * (share.of(drawn) if share else drawn) - self.shift) * self.scaling

    def batch_labels(self, index: torch.Tensor | np.ndarray | slice) -> torch.Tensor | None:
        """int64 [B], or None when the images have no labels."""
        return None if self.labels is None else torch.from_numpy(np.array(self.labels[plain(index)]))


def encode_images(vae: Any, images: Images, *, batch: int = 64, watch: Watch = SILENT) -> Latents:
    """The latents of images, encoded once into the cache. Raises DataError for images that the VAE does not take."""
    step = factor(vae)
    if images.channels != vae.config.in_channels or images.size % step:
        raise DataError(
            got=f"{images.channels} channels at {images.size}x{images.size}",
            expected=f"{vae.config.in_channels} channels, a size that is a multiple of {step}, as the VAE takes",
            where=images.name,
            do="change --set data.size or data.channels, or bring another VAE",
        )
    file = cache_root() / "latents" / f"{images.fingerprint}-{_fingerprint(vae)}.npy"
    side = images.size // step
    shape = (len(images), 2, vae.config.latent_channels, side, side)
    moments = cached(file, shape, "<f2", lambda row: _encode(vae, images, range(row, len(images), batch), watch))
    shift, scaling = _affine(vae)
    return Latents(
        name=images.name,
        moments=moments,
        labels=images.labels,
        classes=images.classes,
        fingerprint=f"{images.fingerprint}-{_fingerprint(vae)}",
        shift=shift,
        scaling=scaling,
    )


@torch.no_grad()
def _encode(vae: Any, images: Images, begins: range, watch: Watch) -> Iterator[np.ndarray]:
    """float16 [batch, 2, c, s, s], the posteriors' means and standard deviations, of the batches that begin so."""
    indices = (torch.arange(k, min(k + begins.step, len(images))) for k in begins)
    with watch.stage("encode images", len(images)) as told:
        for begin, (index, seen) in zip(begins, images.coming(indices), strict=True):
            pixels = seen.batch(index).to(vae.device, vae.dtype)
            found = vae.encode(pixels).latent_dist
            yield torch.stack([found.mean, found.std], dim=1).cpu().to(torch.float16).numpy()
            told(min(begin + begins.step, len(images)))


def _fingerprint(vae: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
