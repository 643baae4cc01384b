"""A U-Net that resamples through gated wavelet bands: the net of Spectral Diffusion (see `methods/spectral.py`).

Paper: Diffusion Probabilistic Model Made Slim, Yang et al., CVPR 2023, arXiv 2211.17106 (its figure 5).

Implemented: the Haar transform, and wavelet-gated down- and upsampling in place of a U-Net's resampling convolutions.

What differs, and why:
- Gates are per band and channel with an FFN C -> C/2 -> gates, and upsampling ends in a 1x1 projection C/4 -> C: of the
  variants that the text allows, the one that gives the published parameters and MACs. `gate="scalar"` is the other.
- Gates start near averaging (low band open, details nearly shut): with all gates at 1/2, downsampling is decimation.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Literal

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.downsampling import Downsample2D
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.upsampling import Upsample2D
from torch import nn

from halfstep.core.errors import DataError
from halfstep.nets import unet
from halfstep.nets.denoiser import Cond, require_config

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

    g = sigmoid(FFN(mean over pixels of X)), one g_b for each of the bands b = LL, LH, HL, HH.
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
        return self.ffn(x.mean((2, 3))).sigmoid().view(x.shape[0], 4, self.gates, 1, 1)


class WaveletDown(nn.Module):
    """[B, C, H, W] -> [B, C, H/2, W/2]: the gated sum of the four bands, X' = sum over b of g_b X_b."""

    def __init__(self, channels: int, scalar: bool, start: tuple[float, float]):
        super().__init__()
        self.gate = Gates(channels, 1 if scalar else channels, start)

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        return (self.gate(x) * haar(x)).sum(1)


class WaveletUp(nn.Module):
    """[B, C, H, W] -> [B, C, 2H, 2W]: quarters of the channels are bands; gated, transformed back, projected to C.

    X' = P inverse_haar(g_LL X_LL, g_LH X_LH, g_HL X_HL, g_HH X_HH), P the 1x1 convolution C/4 -> C.
    """

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
    There are as many parameters as fields of the config, because diffusers' `register_to_config` makes it from them.
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


def levels(model: SpectralUNet2DModel) -> list[nn.Module]:
    """What its levels put out, see `unet.levels`."""
    return unet.levels(model.net)


def cut_count(model: SpectralUNet2DModel) -> int:
    """See `unet.cut_count`."""
    return unet.cut_count(model.net)


def tapped(
    model: SpectralUNet2DModel, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, cuts: Collection[int]
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """See `unet.tapped`."""
    return unet.tapped(model.net, sample, timestep, cond, cuts)


def shallow(
    model: SpectralUNet2DModel,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    cond: Cond,
    cut: int,
    features: torch.Tensor,
) -> torch.Tensor:
    """See `unet.shallow`."""
    return unet.shallow(model.net, sample, timestep, cond, cut, features)
