"""Spectral Diffusion: a slim U-Net that resamples through gated wavelet bands, and distillation weighted by spectrum.

Paper: Diffusion Probabilistic Model Made Slim, Yang et al., CVPR 2023, arXiv 2211.17106.

Implemented: the Haar transform, wavelet-gated down- and upsampling in place of a U-Net's resampling convolutions, the
optimal linear (Wiener) denoiser of a spectrum, and the distillation loss: noise + 0.1 spatial + 0.1 frequency, where an
error at frequency f weighs |clean spectrum at f|^alpha with alpha = -1.

What differs, and why:
- The paper prints the Wiener filter with numerator 1; the minimiser has sqrt(1 - alpha_bar), and only with it the clean
  estimate follows. The exact one is here.
- Gates are per band and channel with an FFN C -> C/2 -> gates, and upsampling ends in a 1x1 projection C/4 -> C: of the
  variants that the text allows, the one that gives the published parameters and MACs. `gate="scalar"` is the other.
- Gates start near averaging (low band open, details nearly shut): with all gates at 1/2, downsampling is decimation.
- What the sources leave open in the loss is chosen so that its weights have a size-free meaning: orthonormal transform,
  means instead of sums, weights of mean 1 clamped at 50, a floor under the clean magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.downsampling import Downsample2D
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.upsampling import Upsample2D
from torch import nn

from halfstep.denoiser import Draw, Predict, clean_and_noise, predictor, require_config
from halfstep.errors import DataError, ModelError
from halfstep.recipe import SpectralSpec

# --------------------------------------------------------------------------------------------------------- the wavelet


def haar(x: torch.Tensor) -> torch.Tensor:
    """One level of the orthonormal Haar transform: [B, C, H, W] -> [B, 4, C, H/2, W/2], bands LL, LH, HL, HH.

    LH is what differs between rows, HL between columns. Raises DataError for odd sizes.
    """
    if x.shape[-1] % 2 or x.shape[-2] % 2:
        got = f"{x.shape[-2]}x{x.shape[-1]}"
        raise DataError(got=got, expected="even sizes", where="wavelet", do="resize the images with --set data.size")
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return torch.stack([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], dim=1) / 2


def inverse_haar(bands: torch.Tensor) -> torch.Tensor:
    """The inverse of `haar`: [B, 4, C, H, W] -> [B, C, 2H, 2W]."""
    low, lh, hl, hh = bands.unbind(1)
    rows = [
        torch.stack([low + lh + hl + hh, low + lh - hl - hh], dim=-1),
        torch.stack([low - lh + hl - hh, low - lh - hl + hh], dim=-1),
    ]
    return (torch.stack(rows, dim=-3) / 2).flatten(-2).flatten(-3, -2)


# ------------------------------------------------------------------------------------------------------------ the gates


class Gates(nn.Module):
    """Four gates in (0, 1) from the mean of the input: [B, C, H, W] -> [B, 4, gates, 1, 1].

    `gates`: channels of a band, or 1 for scalar gates. `start`: logits of the low and of the detail bands at the start.
    """

    def __init__(self, channels: int, gates: int, start: tuple[float, float]):
        super().__init__()
        self.gates = gates
        last = nn.Linear(channels // 2, 4 * gates)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([start[0], *[start[1]] * 3]).repeat_interleave(gates))
        self.ffn = nn.Sequential(nn.Linear(channels, channels // 2), nn.SiLU(), last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn(x.mean((2, 3))).sigmoid().view(len(x), 4, self.gates, 1, 1)


class WaveletDown(nn.Module):
    """[B, C, H, W] -> [B, C, H/2, W/2]: the gated sum of the four bands."""

    def __init__(self, channels: int, scalar: bool, start: tuple[float, float]):
        super().__init__()
        self.gate = Gates(channels, 1 if scalar else channels, start)

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        return (self.gate(x) * haar(x)).sum(1)


class WaveletUp(nn.Module):
    """[B, C, H, W] -> [B, C, 2H, 2W]: quarters of the channels are bands; gated, transformed back, projected to C."""

    def __init__(self, channels: int, scalar: bool, start: tuple[float, float]):
        super().__init__()
        self.gate = Gates(channels, 1 if scalar else channels // 4, start)
        self.project = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        bands = x.unflatten(1, (4, x.shape[1] // 4))
        return self.project(inverse_haar(self.gate(x) * bands))


class SpectralUNet2DModel(ModelMixin, ConfigMixin):
    """A `UNet2DModel` whose resampling convolutions are wavelet-gated. sample [B,C,S,S], timestep -> .sample.

    The arguments are `UNet2DModel`'s; `gate`: "channel" or "scalar"; `gate_start`: logits of the low and the detail
    gates at the start ((0, 0) makes downsampling plain decimation). Raises ModelError for channels that are no multiple
    of 4, for sizes that do not halve at every level, and for block types that resample inside their ResNet blocks.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 192, 256),
        layers_per_block: int = 2,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim: int = 32,
        norm_num_groups: int = 32,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        gate: Literal["channel", "scalar"] = "channel",
        gate_start: tuple[float, float] = (2.0, -2.0),
    ):
        super().__init__()
        levels = len(block_out_channels) - 1
        require = partial(require_config, where="SpectralUNet2DModel")
        require(sample_size % 2**levels == 0, f"size {sample_size}", f"a multiple of {2**levels}")
        require(all(c % 4 == 0 for c in block_out_channels), f"channels {tuple(block_out_channels)}", "multiples of 4")
        kinds = ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D")
        foreign = [kind for kind in (*down_block_types, *up_block_types) if kind not in kinds]
        require(not foreign, f"block type {foreign[:1]}", f"one of {', '.join(kinds)}")
        self.net = UNet2DModel(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            dropout=dropout,
            num_class_embeds=num_class_embeds,
        )
        scalar, start = gate == "scalar", (float(gate_start[0]), float(gate_start[1]))
        for block in self.net.down_blocks:
            if block.downsamplers:
                block.downsamplers[0] = WaveletDown(_channels(block.downsamplers[0]), scalar, start)
        for block in self.net.up_blocks:
            if block.upsamplers:
                block.upsamplers[0] = WaveletUp(_channels(block.upsamplers[0]), scalar, start)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        out = self.net(sample, timestep, class_labels=class_labels, return_dict=False)
        return UNet2DOutput(sample=out[0]) if return_dict else out


def _channels(layer: nn.Module) -> int:
    assert isinstance(layer, Downsample2D | Upsample2D)
    return int(layer.channels)


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
    labels: torch.Tensor | None = None,
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
    found = predict(noisy, steps, labels).float()
    estimate, _ = clean_and_noise(found, noisy, a, prediction_type)
    power = power_spectrum(clean)
    lines = {
        "data": power,
        "wiener": wiener_power(a, power),
        "model": power_spectrum(estimate),
        "error": power_spectrum(estimate - clean),
    }
    return {"frequency": radial_mean(power, bins)[0]} | {k: radial_mean(v, bins)[1] for k, v in lines.items()}


# ---------------------------------------------------------------------------------------------------------------- loss


def spectral_weights(clean: torch.Tensor, size: tuple[int, int], alpha: float, most: float = 50.0) -> torch.Tensor:
    """The weight of every frequency, from the clean images [B,C,H,W] resized to `size` by area: [B, 1, h, w].

    |spectrum|^alpha with a floor under the magnitude, divided by its mean over the frequencies, at most `most`.
    """
    resized = F.adaptive_avg_pool2d(clean.float(), size)
    magnitude = torch.fft.fft2(resized, norm="ortho").abs().mean(1, keepdim=True)
    floor = 1e-2 * magnitude.mean((2, 3), keepdim=True) + 1e-8
    weights = (magnitude + floor) ** alpha
    return (weights / weights.mean((2, 3), keepdim=True)).clamp(max=most)


def frequency_loss(theirs: torch.Tensor, ours: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean weighted squared modulus of the difference's orthonormal transform; [B,C,h,w] twice, weights [B,1,h,w]."""
    difference = torch.fft.fft2((theirs - ours).float(), norm="ortho")
    return (weights * (difference.real.square() + difference.imag.square())).mean()


def levels_of(model: Any) -> list[nn.Module]:
    """The modules whose outputs are compared: the last ResNet block of every level of both paths, and the middle."""
    net = model.net if isinstance(model, SpectralUNet2DModel) else model
    last = [block.resnets[-1] for block in (*net.down_blocks, *net.up_blocks)]
    return [*last, net.mid_block] if net.mid_block is not None else last


class Pupil(nn.Module):
    """A student and, for the training only, a learned 1x1 convolution for each compared level (to teacher channels).

    `teacher`: a `UNet2DModel` or `SpectralUNet2DModel` with as many levels of the same sizes; it gets no gradient.
    Raises ModelError when the levels do not match.
    """

    def __init__(self, student: Any, teacher: Any):
        super().__init__()
        self.model, self.config = student, student.config
        ours, theirs = _level_shapes(student), _level_shapes(teacher)
        if [shape[2:] for shape in ours] != [shape[2:] for shape in theirs]:
            raise ModelError(
                got=f"levels of sizes {[shape[-1] for shape in ours]}",
                expected=f"the teacher's, {[shape[-1] for shape in theirs]}",
                where="spectral distillation",
                do="take a teacher with as many levels and the same image size",
            )
        pairs = zip(ours, theirs, strict=True)
        self.align = nn.ModuleList(nn.Conv2d(mine[1], other[1], 1) for mine, other in pairs)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def _level_shapes(model: Any) -> list[torch.Size]:
    with Levels(model) as levels, torch.no_grad():
        config = model.config
        labels = {} if config.num_class_embeds is None else {"class_labels": torch.zeros(1, dtype=torch.long)}
        model(torch.zeros(1, config.in_channels, config.sample_size, config.sample_size), 1, **labels)
        return [value.shape for value in levels.seen]


class Levels:
    """Collects, inside a `with`, what the compared modules of a model put out, in the order in which they run."""

    def __init__(self, model: Any):
        self.model, self.seen = model, []  # type: ignore[var-annotated]

    def __enter__(self) -> Levels:
        keep = lambda _module, _given, out: self.seen.append(out)  # noqa: E731
        self._handles = [module.register_forward_hook(keep) for module in levels_of(self.model)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def spectral_objective(
    pupil: Pupil,
    teacher: nn.Module,
    draw: Draw,
    spec: SpectralSpec,
    steps: int,
) -> Callable[[Any], Iterator[torch.Tensor]]:
    """noise + spatial * sum of squared feature differences + freq * the same by frequency, weighted (section 4).

    Teacher and student see the same noisy images, timesteps and labels. The frequency term grows from 0 over the first
    `spec.ramp` of the steps.
    """
    ours, taught = predictor(pupil.model), predictor(teacher)

    def objective(batch: Any) -> Iterator[torch.Tensor]:
        noisy, timestep, target = draw(batch.clean)
        with Levels(pupil.model) as mine:
            found = ours(noisy, timestep, batch.labels).float()
        loss = F.mse_loss(found, target)
        freq = spec.freq * min(1.0, (batch.step + 1) / max(1.0, spec.ramp * steps))
        if spec.spatial or spec.freq:
            with torch.no_grad(), Levels(teacher) as theirs:
                lesson = taught(noisy, timestep, batch.labels).float()
            pairs = [
                (other.detach().float(), align(one).float())
                for one, other, align in zip(mine.seen, theirs.seen, pupil.align, strict=True)
            ]
            for other, one in [*pairs, (lesson, found)]:
                loss = loss + spec.spatial * F.mse_loss(one, other)
                if spec.freq:
                    weights = spectral_weights(batch.clean, (one.shape[2], one.shape[3]), spec.alpha)
                    loss = loss + freq * frequency_loss(other, one, weights)
        yield loss

    return objective


def student_configs(teacher: Mapping[str, Any], unit: int = 4) -> list[dict[str, Any]]:
    """Configs of slimmer U-Nets of a teacher's layout, widest first; the caller takes the first that is cheap enough.

    Channels are multiples of `unit`, which is also the number of norm groups where it divides them.
    """
    layout = ("sample_size", "in_channels", "out_channels", "layers_per_block", "down_block_types", "up_block_types")
    kept = {key: teacher[key] for key in (*layout, "num_class_embeds")}
    full = teacher["block_out_channels"]
    found: list[dict[str, Any]] = []
    for base in range(max(full), 0, -1):
        scale = base / max(full)
        channels = tuple(max(unit, unit * round(c * scale / unit)) for c in full)
        config = kept | {"block_out_channels": channels, "norm_num_groups": unit, "dropout": 0.0}
        config["attention_head_dim"] = min(teacher.get("attention_head_dim") or 8, min(channels))
        if not found or found[-1] != config:
            found.append(config)
    return found
