"""The calls of diffusers' text-to-image transformers in blocks, so that ranges of them can be skipped (`blocks.py`).

PixArt, arXiv 2310.00426, and PixArt-Sigma, arXiv 2403.04692: `PixArtTransformer2DModel`. Stable Diffusion 3, arXiv
2403.03206: `SD3Transformer2DModel`. FLUX.1 (Black Forest Labs, 2024): `FluxTransformer2DModel`, whose double blocks and
single blocks are one row of blocks here. The text's tokens are a stream beside the picture's where blocks change them.

Each is its class's `forward`, step by step, on the model's public parts. Residuals of a ControlNet are added behind the
blocks that run; those of skipped blocks are in what these added. Other options of `forward` are refused by their name.

A `FluxTransformer2DModel` is called as FluxPipeline calls it: packed tokens [B, L, C], timesteps in 0 … 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from halfstep.nets.blocks import Streams, Walk, known, picture
from halfstep.nets.denoiser import Cond, per_sample

Config = Mapping[str, Any]
Options = Mapping[str, Any]


# -------------------------------------------------------------------------------------------------------------- PixArt

_PIXART = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "attention_mask",
    "added_cond_kwargs",
    "cross_attention_kwargs",
)


def pixart(model: Any, sample: torch.Tensor, timestep: torch.Tensor, cond: Mapping[str, Any]) -> Walk:
    given = known(cond, _PIXART, model)
    height, width = (side // model.config.patch_size for side in sample.shape[-2:])
    tokens = model.pos_embed(sample)
    time, embedding = model.adaln_single(
        per_sample(timestep, sample.shape[0]),
        given.get("added_cond_kwargs"),
        batch_size=sample.shape[0],
        hidden_dtype=tokens.dtype,
    )
    text = given.get("encoder_hidden_states")
    if model.caption_projection is not None:
        text = model.caption_projection(text).view(sample.shape[0], -1, tokens.shape[-1])
    options = {
        "encoder_hidden_states": text,
        "attention_mask": _bias(given.get("attention_mask"), sample.dtype),
        "encoder_attention_mask": _bias(given.get("encoder_attention_mask"), sample.dtype),
        "cross_attention_kwargs": given.get("cross_attention_kwargs"),
    }

    def run(block: Any, streams: Streams) -> Streams:
        return (block(streams[0], timestep=time, **options),)

    def left(x: torch.Tensor) -> torch.Tensor:
        shift, scale = (model.scale_shift_table[None] + embedding[:, None]).chunk(2, dim=1)
        return picture(model.proj_out(model.norm_out(x) * (1 + scale) + shift), height, width, model.config.patch_size)

    return Walk((tokens,), [partial(run, block) for block in model.transformer_blocks], left)


def pixart_example(config: Config, batch: int, tokens: int | None = None) -> Cond:
    """A condition as `architectures.Architecture.example` asks for it; 120 tokens as PixArtAlphaPipeline has them."""
    size, tokens = config["caption_channels"] or config["cross_attention_dim"], tokens or 120
    text = {
        "encoder_hidden_states": torch.zeros(batch, tokens, size),
        "encoder_attention_mask": torch.ones(batch, tokens),
    }
    sized = config["use_additional_conditions"]
    if not (config["sample_size"] == 128 if sized is None else sized):
        return text
    return text | {"added_cond_kwargs": {"resolution": torch.ones(batch, 2), "aspect_ratio": torch.ones(batch, 1)}}


def _bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask [B, L] of what is kept as what attention adds to its scores, [B, 1, L]; a bias as it is."""
    return mask if mask is None or mask.ndim != 2 else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


# -------------------------------------------------------------------------------------------------- Stable Diffusion 3

_SD3 = ("encoder_hidden_states", "pooled_projections", "block_controlnet_hidden_states", "joint_attention_kwargs")


def sd3(model: Any, sample: torch.Tensor, timestep: torch.Tensor, cond: Mapping[str, Any]) -> Walk:
    given, steps = known(cond, _SD3, model), per_sample(timestep, sample.shape[0])
    time = model.time_text_embed(steps, given["pooled_projections"])
    options = dict(given.get("joint_attention_kwargs", {}))
    if "ip_adapter_image_embeds" in options:
        image, image_time = model.image_proj(options.pop("ip_adapter_image_embeds"), steps)
        options |= {"ip_hidden_states": image, "temb": image_time}
    residuals = given.get("block_controlnet_hidden_states", ())
    every = len(model.transformer_blocks) / max(1, len(residuals))

    def run(i: int, block: Any, streams: Streams) -> Streams:
        x, text = streams
        text, x = block(hidden_states=x, encoder_hidden_states=text, temb=time, joint_attention_kwargs=options)
        if block.context_pre_only:  # the last one, which leaves no text
            return (x,)
        return (x + residuals[int(i / every)] if len(residuals) else x), text

    def left(x: torch.Tensor) -> torch.Tensor:
        height, width = (side // model.config.patch_size for side in sample.shape[-2:])
        return picture(model.proj_out(model.norm_out(x, time)), height, width, model.config.patch_size)

    streams = model.pos_embed(sample).contiguous(), model.context_embedder(given["encoder_hidden_states"])
    return Walk(streams, [partial(run, i, block) for i, block in enumerate(model.transformer_blocks)], left)


def sd3_example(config: Config, batch: int, tokens: int | None = None) -> Cond:
    """As above; 333 tokens, CLIP's 77 and T5's 256, as StableDiffusion3Pipeline has them."""
    return {
        "encoder_hidden_states": torch.zeros(batch, tokens or 333, config["joint_attention_dim"]),
        "pooled_projections": torch.zeros(batch, config["pooled_projection_dim"]),
    }


# ---------------------------------------------------------------------------------------------------------------- FLUX

_FLUX = (
    "encoder_hidden_states",
    "pooled_projections",
    "img_ids",
    "txt_ids",
    "guidance",
    "joint_attention_kwargs",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "controlnet_blocks_repeat",
)


def flux(model: Any, sample: torch.Tensor, timestep: torch.Tensor, cond: Mapping[str, Any]) -> Walk:
    given, x = known(cond, _FLUX, model), model.x_embedder(sample)
    times = [per_sample(timestep, sample.shape[0]).to(x.dtype) * 1000]
    if "guidance" in given:
        times.append(given["guidance"].to(x.dtype) * 1000)
    time = model.time_text_embed(*times, given["pooled_projections"])
    options = dict(given.get("joint_attention_kwargs", {}))
    if "ip_adapter_image_embeds" in options:
        options["ip_hidden_states"] = model.encoder_hid_proj(options.pop("ip_adapter_image_embeds"))
    ids = [each[0] if each.ndim == 3 else each for each in (given["txt_ids"], given["img_ids"])]
    places = model.pos_embed(torch.cat(ids))
    common = {"temb": time, "image_rotary_emb": places, "joint_attention_kwargs": options}

    def run(block: Any, residual: torch.Tensor | None, streams: Streams) -> Streams:
        text, x = block(hidden_states=streams[0], encoder_hidden_states=streams[1], **common)
        return (x if residual is None else x + residual), text

    double = _residuals(given, "controlnet_block_samples", len(model.transformer_blocks))
    single = _residuals(given, "controlnet_single_block_samples", len(model.single_transformer_blocks))
    both = [
        *zip(model.transformer_blocks, double, strict=True),
        *zip(model.single_transformer_blocks, single, strict=True),
    ]
    blocks: list[Callable[[Streams], Streams]] = [partial(run, block, residual) for block, residual in both]
    streams = x, model.context_embedder(given["encoder_hidden_states"])
    return Walk(streams, blocks, lambda x: model.proj_out(model.norm_out(x, time)))


def _residuals(given: Options, name: str, count: int) -> list[torch.Tensor | None]:
    """The ControlNet's residual behind each of `count` blocks: each for a run of blocks, or all of them in turn."""
    samples = given.get(name, ())
    if not len(samples):
        return [None] * count
    every = math.ceil(count / len(samples))
    in_turn = name == "controlnet_block_samples" and given.get("controlnet_blocks_repeat")
    return [samples[i % len(samples) if in_turn else i // every] for i in range(count)]


SIDE = 64
"""Tokens on a side of a picture of 1024 pixels, FLUX's own size, which its config does not say."""


def flux_shape(config: Config, batch: int) -> tuple[int, int, int]:
    """[B, L, C], packed."""
    return batch, SIDE * SIDE, config["in_channels"]


def flux_example(config: Config, batch: int, tokens: int | None = None) -> Cond:
    """As above; 512 tokens as FluxPipeline has them."""
    tokens, places = tokens or 512, torch.arange(float(SIDE))
    text = {
        "encoder_hidden_states": torch.zeros(batch, tokens, config["joint_attention_dim"]),
        "pooled_projections": torch.zeros(batch, config["pooled_projection_dim"]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), places, places),
        "txt_ids": torch.zeros(tokens, 3),
    }
    return text | ({"guidance": torch.ones(batch)} if config["guidance_embeds"] else {})
