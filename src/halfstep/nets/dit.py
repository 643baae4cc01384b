"""What Halfstep knows of diffusers' `DiTTransformer2DModel`: narrower configs, free channels, its call in blocks.

Paper: DiT, Peebles and Xie, ICCV 2023, arXiv 2212.09748. Which blocks a cut skips stands in `blocks.py`. A narrow net
has fewer heads of the same size, so fewer channels, and an MLP as much narrower; its sinusoids of place are those of
its own width, as stock diffusers makes them, and its 256 of time are the full net's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.models.activations import GEGLU, SwiGLU

from halfstep.core.errors import ModelError
from halfstep.nets.blocks import Streams, Walk, known, picture
from halfstep.nets.channels import Free, between, inside_attention
from halfstep.nets.denoiser import Cond, cond_of, per_sample
from halfstep.nets.slices import Pieces

_GATED = ("geglu", "swiglu")
"""Activations whose first layer puts out values and gates, one behind the other."""


def narrow_config(config: Mapping[str, Any], width: float) -> dict[str, Any]:
    """The config at `width` in (0, 1]. Raises ModelError when the width gives no whole heads, or channels that no
    sinusoid of two axes has."""
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    kept = round(heads * width, 2)
    fits = [k for k in range(1, heads + 1) if k * size % 4 == 0 or k == heads]
    if kept not in fits:
        raise ModelError(
            got=f"{heads} heads x {width:g} = {kept:g}",
            expected=f"a whole number of heads of {size}, in all a multiple of 4 channels",
            where="slim.widths",
            do=f"choose widths such as {', '.join(f'{k / heads:g}' for k in fits[:8])}",
        )
    narrow = {key: value for key, value in config.items() if not key.startswith("_")}
    return narrow | {"num_attention_heads": int(kept)}


def slice_exceptions(
    config: Mapping[str, Any], narrow: Mapping[str, Any], names: Iterable[str], concat: str
) -> Iterator[tuple[str, int, Pieces]]:
    """The dimensions of the slim weights that are no plain prefix, as (parameter, dimension, pieces)."""
    full, slim = (c["num_attention_heads"] * c["attention_head_dim"] for c in (config, narrow))
    for name in names:
        if ".norm1.linear." in name:  # shift, scale and gate, of attention and of the MLP
            yield name, 0, tuple((k * full, slim) for k in range(6))
        if name.startswith("proj_out_1."):  # shift and scale
            yield name, 0, ((0, slim), (full, slim))
        if ".ff.net.0." in name and config["activation_fn"] in _GATED:
            yield name, 0, ((0, 4 * slim), (4 * full, 4 * slim))


def free_channels(model: DiTTransformer2DModel) -> Iterator[Free]:
    """All channels of free order, one by one; apply an order before asking for the next."""
    for block in model.transformer_blocks:
        yield from inside_attention(block.attn1)
        first, last = block.ff.net[0], block.ff.net[2]
        if not isinstance(first, GEGLU | SwiGLU):  # whose two halves would have to move together
            yield between(first.proj, last)
        embedder = block.norm1.emb.timestep_embedder
        yield between(embedder.linear_1, embedder.linear_2)


def example(config: Mapping[str, Any], batch: int, tokens: int | None = None) -> Cond:
    """Classes for `batch` samples, without which no DiT runs."""
    return cond_of(torch.zeros(batch, dtype=torch.long))


def null(config: Mapping[str, Any]) -> Cond:
    """The condition on no class: the row after the classes', which training drops them to (arXiv 2212.09748)."""
    return {"class_labels": torch.tensor([config["num_embeds_ada_norm"]])}


def walked(model: Any, sample: torch.Tensor, timestep: torch.Tensor, cond: Mapping[str, Any]) -> Walk:
    """`DiTTransformer2DModel.forward` in its parts, step by step."""
    given = known(cond, ("class_labels", "cross_attention_kwargs"), model)
    labels, options = given.get("class_labels"), given.get("cross_attention_kwargs")
    steps = per_sample(timestep, sample.shape[0])

    def run(block: Any, streams: Streams) -> Streams:
        return (block(streams[0], timestep=steps, class_labels=labels, cross_attention_kwargs=options),)

    def left(x: torch.Tensor) -> torch.Tensor:
        embedding = model.transformer_blocks[0].norm1.emb(steps, labels, hidden_dtype=x.dtype)
        shift, scale = model.proj_out_1(F.silu(embedding)).chunk(2, dim=1)
        x = model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        side = int(x.shape[1] ** 0.5)
        return picture(x, side, side, model.patch_size)

    return Walk((model.pos_embed(sample),), [partial(run, block) for block in model.transformer_blocks], left)
