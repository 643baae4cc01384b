"""Nets, pictures and recipes small enough for a test: what more than one file of tests builds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

from halfstep.core.recipe import Recipe
from halfstep.nets.architectures import example_of
from halfstep.nets.continuous import ContinuousUNet2DModel
from halfstep.nets.uvit import UViT2DModel
from halfstep.nets.wavelet import SpectralUNet2DModel


def recipes(edits: str) -> Callable[..., Recipe]:
    """What makes the default recipe under these edits, and under more that it is called with."""
    return lambda *more: Recipe().edit([*edits.split(), *more])


def unet(
    seed: int = 0,
    channels: tuple[int, ...] = (8, 16),
    *,
    size: int | tuple[int, int] = 8,
    colours: int = 1,
    attend: bool = False,
    **changes,
) -> UNet2DModel:
    """A stock U-Net of one layer a level: the same weights for the same seed. `attend`: its last level has attention;
    `changes`: of its config."""
    torch.manual_seed(seed)
    plain = ["DownBlock2D"] * (len(channels) - attend), ["UpBlock2D"] * (len(channels) - attend)
    small = {
        "sample_size": size, "in_channels": colours, "out_channels": colours, "block_out_channels": channels,
        "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4,
        "down_block_types": (*plain[0], *["AttnDownBlock2D"] * attend),
        "up_block_types": (*["AttnUpBlock2D"] * attend, *plain[1]),
    }  # fmt: skip
    return UNet2DModel(**(small | changes)).eval()


def text_unet(seed: int = 0, **config) -> UNet2DConditionModel:
    """Stable Diffusion's U-Net of two levels, the lower with cross-attention, no weight of which is trivial."""
    torch.manual_seed(seed)
    small = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 2, "norm_num_groups": 8, "cross_attention_dim": 12,
    }  # fmt: skip
    model = UNet2DConditionModel(**(small | config)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


SDXL = {
    "attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32,
}  # fmt: skip
"""What makes `text_unet` one as Stable Diffusion XL has it."""


def cond_for_net(model, batch: int = 2, seed: int = 0):
    """A condition as the net takes it, class numbers 0, 1 …, all else random."""
    random = torch.Generator().manual_seed(seed)

    def drawn(value):
        if isinstance(value, dict):
            return {name: drawn(one) for name, one in value.items()}
        if not value.is_floating_point():
            return torch.arange(batch)
        return torch.randn(value.shape, generator=random)

    return drawn(dict(example_of(model, batch, 5)))


def uvit(seed: int = 0, **config) -> UViT2DModel:
    torch.manual_seed(seed)
    small = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return UViT2DModel(**(small | config)).eval()


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


def tiny_vae(**more) -> AutoencoderKL:
    """A VAE of one level whose latents have two channels and half the side: the same weights every time."""
    torch.manual_seed(0)
    config = {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 2,
        "norm_num_groups": 4,
        "sample_size": 8,
        "scaling_factor": 0.7,
        "shift_factor": 0.2,
    }
    return AutoencoderKL(**(config | more)).eval()
