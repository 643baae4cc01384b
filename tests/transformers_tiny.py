"""Diffusers' transformers small enough for a test, and what each is called with."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)

TEXT, TOKENS = 12, 5
Transformers = DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, FluxTransformer2DModel


def dit(seed: int = 0, **config) -> DiTTransformer2DModel:
    """Of three classes, with a learned variance."""
    small = {
        "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 2, "out_channels": 4, "num_layers": 4,
        "sample_size": 8, "num_embeds_ada_norm": 3,
    }  # fmt: skip
    return _made(DiTTransformer2DModel, seed, small | config)


def pixart(seed: int = 0, **config) -> PixArtTransformer2DModel:
    small = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 2, "out_channels": 4, "num_layers": 4,
        "sample_size": 8, "cross_attention_dim": 16, "caption_channels": TEXT, "num_embeds_ada_norm": 1000,
    }  # fmt: skip
    return _made(PixArtTransformer2DModel, seed, small | config)


def sd3(seed: int = 0, **config) -> SD3Transformer2DModel:
    small = {
        "sample_size": 8, "in_channels": 2, "out_channels": 2, "num_layers": 4, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": TEXT, "caption_projection_dim": 16,
        "pooled_projection_dim": 6, "pos_embed_max_size": 8,
    }  # fmt: skip
    return _made(SD3Transformer2DModel, seed, small | config)


def flux(seed: int = 0, **config) -> FluxTransformer2DModel:
    small = {
        "in_channels": 8, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": TEXT, "pooled_projection_dim": 6, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    return _made(FluxTransformer2DModel, seed, small | config)


def _made(kind: Any, seed: int, config: dict[str, Any]) -> Any:
    """A net no weight of which is trivial: gates start at 0."""
    torch.manual_seed(seed)
    model = kind(**config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def inputs_of(model: Any, seed: int = 0, count: int = 2) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """(sample, timestep [B], condition)"""
    config, draw = model.config, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=draw)

    times = torch.tensor([3, 700, 41])[:count]
    if isinstance(model, FluxTransformer2DModel):
        ids = torch.cartesian_prod(torch.arange(1.0), torch.arange(2.0), torch.arange(3.0))
        cond = {
            "encoder_hidden_states": normal(TOKENS, TEXT), "pooled_projections": normal(6), "img_ids": ids,
            "txt_ids": torch.zeros(TOKENS, 3),
        }  # fmt: skip
        if config.guidance_embeds:
            cond["guidance"] = torch.full((count,), 3.5)
        return normal(6, config.in_channels), times / 1000, cond
    sample = normal(config.in_channels, config.sample_size, config.sample_size)
    if isinstance(model, DiTTransformer2DModel):
        return sample, times, {"class_labels": torch.tensor([0, 2, 1])[:count]}
    cond = {"encoder_hidden_states": normal(TOKENS, TEXT)}
    if isinstance(model, SD3Transformer2DModel):
        return sample, times, cond | {"pooled_projections": normal(6)}
    mask = torch.ones(count, TOKENS)
    mask[0, 3:] = 0
    return sample, times, cond | {"encoder_attention_mask": mask}
