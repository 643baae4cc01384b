"""Nets and pictures small enough for a test, shared by the tests of nets, papers and measuring."""

from __future__ import annotations

import torch

from halfstep.nets.continuous import ContinuousUNet2DModel
from halfstep.nets.wavelet import SpectralUNet2DModel


def wavelet_unet(seed: int = 0, **config) -> SpectralUNet2DModel:
    torch.manual_seed(seed)
    small = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8, "norm_num_groups": 8,
    }  # fmt: skip
    return SpectralUNet2DModel(**(small | config)).eval()


def ode_unet(seed: int = 0, **config) -> ContinuousUNet2DModel:
    torch.manual_seed(seed)
    small = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "base_channels": 4, "levels": 2, "time_embed_dim": 16,
        "attention_head_dim": 4, "zero_head": False,
    }  # fmt: skip
    model = ContinuousUNet2DModel(**(small | config)).eval()
    for name, value in model.named_parameters():  # norms and gains start at 1, biases of norms at 0: hides mistakes
        if "norm" in name or "gain" in name:
            torch.nn.init.normal_(value, mean=float(not name.endswith("bias")), std=0.2)
    return model


def pink(count: int = 8, size: int = 32) -> torch.Tensor:
    """Images whose amplitude falls as 1 / f."""
    generator = torch.Generator().manual_seed(0)
    radius = (torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.fftfreq(size)[None] ** 2).sqrt().clamp(min=1 / size)
    spectrum = torch.fft.fft2(torch.randn(count, 1, size, size, generator=generator)) / radius
    images = torch.fft.ifft2(spectrum).real
    return images / images.std()
