"""What Halfstep knows of diffusers' `UNet2DModel`: fresh and narrower configs, free channels, its levels, its cuts.

A narrow net is a plain `UNet2DModel` (see `methods/slimmable.py`, whose paper asks for it) whose parameters are leading
slices of the full one's, but for what `slice_exceptions` names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownBlock2D,
    AttnUpBlock2D,
    DownBlock2D,
    ResnetDownsampleBlock2D,
    ResnetUpsampleBlock2D,
    UpBlock2D,
)
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.core.recipe import ModelSpec
from halfstep.nets.channels import Free, between, inside_attention, inside_resnet, outputs
from halfstep.nets.denoiser import Cond
from halfstep.nets.slices import Pieces, nearest_frequencies


def fresh_config(spec: ModelSpec, size: int, channels: int, classes: int | None, timesteps: int) -> dict[str, Any]:
    """The config of a fresh U-Net for images [channels, size, size]. Raises ModelError for sizes that do not fit."""
    halvings = 2 ** (len(spec.channels) - 1)
    if size % halvings:
        raise ModelError(
            got=f"images of {size}x{size}",
            expected=f"a multiple of {halvings}, for {len(spec.channels)} levels",
            where="model.channels",
            do="choose another --set data.size or fewer levels",
        )
    attended = [c for c, flag in zip(spec.channels, spec.attention, strict=True) if flag] + [spec.channels[-1]]
    if min(attended) < spec.head_dim:
        raise ModelError(
            got=f"heads of {spec.head_dim} channels",
            expected=f"at most {min(attended)}, the narrowest level with attention",
            where="model.head_dim",
            do=f"write --set model.head_dim={min(attended)}",
        )
    return {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": spec.layers,
        "block_out_channels": spec.channels,
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in spec.attention),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(spec.attention)),
        "norm_num_groups": spec.groups,
        "attention_head_dim": spec.head_dim,
        "dropout": spec.dropout,
        "num_class_embeds": classes,
        "num_train_timesteps": timesteps,
    }


def levels(model: UNet2DModel) -> list[nn.Module]:
    """The last ResNet block of every level of both paths, and the middle: what a level puts out, [B, C, h, w]."""
    last = [block.resnets[-1] for block in (*model.down_blocks, *model.up_blocks)]
    return [*last, model.mid_block] if model.mid_block is not None else last


# ---------------------------------------------------------------------------------------------------- narrower versions


def narrow_config(config: Mapping[str, Any], width: float) -> dict[str, Any]:
    """The `UNet2DModel` config at `width` in (0, 1]. Raises ModelError when a level gets no whole channel groups."""
    narrow = narrow_sizes(config, width)
    if head := config.get("attention_head_dim"):  # a head must not be wider than the narrowest attended level
        narrow["attention_head_dim"] = min(head, *(_attended(config, narrow["block_out_channels"]) or [head]))
    return narrow


def narrow_sizes(config: Mapping[str, Any], width: float) -> dict[str, Any]:
    """The same config with narrower levels and time embedding, its attention as it is. Raises ModelError."""
    narrow = {key: value for key, value in config.items() if not key.startswith("_")}
    groups = config["norm_num_groups"] or 1
    channels = []
    for full in config["block_out_channels"]:
        c = round(full * width, 2)  # so that 1/3 may be written 0.333333, as the message below does
        if c != int(c) or c < 1 or c % groups:
            expected = f"a multiple of the model's {groups} norm groups"
            raise refused_width(config, f"{full} channels x {width} = {c:g}", expected)
        channels.append(int(c))
    _require_whole_frequencies(config, channels[0], width)
    narrow["block_out_channels"] = tuple(channels)
    if config.get("class_embed_type") == "identity":  # the caller hands in embeddings of the full size
        narrow["time_embedding_dim"] = config.get("time_embedding_dim") or 4 * config["block_out_channels"][0]
    elif config.get("time_embedding_dim"):
        narrow["time_embedding_dim"] = max(2, round(config["time_embedding_dim"] * width))
    return narrow


def _require_whole_frequencies(config: Mapping[str, Any], first: int, width: float) -> None:
    """A narrow net has a sinusoid of its own, pairs of a sine and a cosine: its first level has even channels."""
    full = config["block_out_channels"][0]
    if first % 2 and first != full and config.get("time_embedding_type", "positional") == "positional":
        got = f"{full} channels x {width} = {first} in the first level"
        raise refused_width(config, got, "an even number, for the sines and cosines of its time embedding")


def refused_width(config: Mapping[str, Any], got: str, expected: str) -> ModelError:
    groups, full = config["norm_num_groups"] or 1, config["block_out_channels"]
    shared = math.gcd(*(c // groups for c in full))
    even = config.get("time_embedding_type", "positional") == "positional"
    usable = [k / shared for k in range(1, shared + 1) if k == shared or not (even and full[0] * k // shared % 2)]
    do = f"choose widths such as {', '.join(f'{u:g}' for u in _some(usable))}"
    return ModelError(got=got, expected=expected, where="slim.widths", do=do)


def _some(values: Sequence[float]) -> Sequence[float]:
    return values if len(values) <= 8 else [values[round(i * (len(values) - 1) / 7)] for i in range(8)]


def _attended(config: Mapping[str, Any], channels: Sequence[int]) -> list[int]:
    found = [c for kind, c in zip(config["down_block_types"], channels, strict=True) if "Attn" in kind]
    found += [c for kind, c in zip(config["up_block_types"], reversed(channels), strict=True) if "Attn" in kind]
    if config.get("mid_block_type", "UNetMidBlock2D") and config.get("add_attention", True):
        found.append(channels[-1])
    return found


def slice_exceptions(
    config: Mapping[str, Any], narrow: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], concat: str
) -> Iterator[tuple[str, int, Pieces]]:
    """The dimensions that are no plain prefix, as (parameter, dimension, pieces)."""
    for name in shapes:
        if name in ("time_embedding.linear_1.weight", "class_embedding.linear_1.weight"):
            yield name, 1, time_columns(config, narrow)
        if ".time_emb_proj." in name and config.get("resnet_time_scale_shift") == "scale_shift":
            half = shapes[name][0] // 2  # scale and shift are the two halves of one output
            yield name, 0, ((0, half), (config["block_out_channels"][level_of(config, name)], half))
    if concat == "leading":
        return
    for name, shape in shapes.items():
        parts = name.split(".")
        if parts[:1] != ["up_blocks"] or parts[2] != "resnets" or parts[4] not in ("norm1", "conv1", "conv_shortcut"):
            continue
        dim = 0 if parts[4] == "norm1" else 1
        if dim >= len(shape):  # a bias of a convolution sees no input
            continue
        hidden, slim = (
            _hidden_channels(c["block_out_channels"], int(parts[1]), int(parts[3])) for c in (config, narrow)
        )
        yield name, dim, ((0, slim), (hidden, shape[dim] - slim))


def _hidden_channels(channels: Sequence[int], block: int, resnet: int) -> int:
    """Channels of the hidden part of the concatenation that enters `up_blocks[block].resnets[resnet]`."""
    upward = list(reversed(channels))
    return upward[max(0, block - 1)] if resnet == 0 else upward[block]


def level_of(config: Mapping[str, Any], name: str) -> int:
    """The level of the block that owns a parameter, 0 at the full size."""
    where, *rest = name.split(".")
    last = len(config["block_out_channels"]) - 1
    if where == "mid_block":
        return last
    return int(rest[0]) if where == "down_blocks" else last - int(rest[0])


def time_columns(config: Mapping[str, Any], narrow: Mapping[str, Any]) -> Pieces:
    """Columns of the first time layer: the features that the narrow net's own time embedding has."""
    full, slim = config["block_out_channels"][0], narrow["block_out_channels"][0]
    kind = config.get("time_embedding_type", "positional")
    if kind == "learned":
        return ((0, slim),)
    if kind == "fourier":  # sin and cos of `slim` random frequencies, which are a prefix of the full ones
        return ((0, slim), (full, slim))
    return nearest_frequencies(full // 2, slim // 2, config.get("freq_shift", 0))


# ----------------------------------------------------------------------------------------------- channels of free order


def free_channels(model: UNet2DModel) -> Iterator[Free]:
    """All channels of free order, one by one; apply an order before asking for the next."""
    yield from free_in_blocks(model)
    yield from _inside_time_embedding(model)


def free_in_blocks(model: nn.Module) -> Iterator[Free]:
    """Those inside ResNet blocks and attention."""
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            yield inside_resnet(module)
        elif isinstance(module, Attention):
            yield from inside_attention(module)


def _inside_time_embedding(model: UNet2DModel) -> Iterator[Free]:
    first, second = model.time_embedding.linear_1, model.time_embedding.linear_2
    yield between(first, second)
    readers = [m.time_emb_proj for m in model.modules() if isinstance(m, ResnetBlock2D) and m.time_emb_proj is not None]
    if model.config.class_embed_type is not None or not readers:
        return  # other embeddings of the caller's own order are added to this one
    score = torch.stack([layer.weight.norm(dim=0) for layer in readers]).norm(dim=0) * second.weight.norm(dim=1)
    moves = [*outputs(second), *((layer.weight, 1, 1) for layer in readers)]
    if model.class_embedding is not None:
        moves.append((model.class_embedding.weight, 1, 1))
    yield Free(score, tuple(moves), tuple(layer.weight for layer in readers))


# --------------------------------------------------------------------------------------------------- features to reuse
# DeepCache (Ma et al., CVPR 2024, arXiv 2312.00858), for any layers_per_block L. The way down leaves the skips
# s_0 … s_(n-1), n = blocks * (L + 1); the way up joins them in reverse, a ResNet block each. Cut c: the hidden state
# that meets s_c, before the concatenation; where a block opens with it, after the upsampler of the block before.

_KNOWN_DOWN = (DownBlock2D, AttnDownBlock2D, ResnetDownsampleBlock2D)
_KNOWN_UP = (UpBlock2D, AttnUpBlock2D, ResnetUpsampleBlock2D)

Layer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden state [B, C, h, w], embedding of time and class [B, E]) -> hidden state"""


def cut_count(model: UNet2DModel) -> int:
    """One cut for every skip. Raises ModelError for blocks of other types, which may hand on more than one state (those
    with a `skip_conv` have a second stream)."""
    both = ((model.down_blocks, _KNOWN_DOWN), (model.up_blocks, _KNOWN_UP))
    for block, known in ((block, known) for blocks, known in both for block in blocks):
        if type(block) not in known:
            raise ModelError(
                got=f"a {type(block).__name__}",
                expected=f"blocks of {', '.join(kind.__name__ for kind in known)}",
                where="cuts to reuse features at",
                do='reuse its whole output, cut "out"',
            )
    return sum(len(block.resnets) for block in model.up_blocks)


def tapped(
    model: UNet2DModel, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, cuts: Collection[int]
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The plain call, bit for bit, and the features at the cuts; see `architectures.Cuts`."""
    x, time = _entered(model, sample, timestep, **cond)
    skips = []
    for layer in _down_layers(model):
        x = layer(x, time.embedding)
        skips.append(x)
    if model.mid_block is not None:
        x = model.mid_block(x, time.embedding)
    kept = {}
    for layer in _up_layers(model):
        if len(skips) - 1 in cuts:
            kept[len(skips) - 1] = x
        x = layer(torch.cat([x, skips.pop()], dim=1), time.embedding)
    return _left(model, x, time), kept


def shallow(
    model: UNet2DModel, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, cut: int, features: torch.Tensor
) -> torch.Tensor:
    """The layers down to s_cut, and those that join s_cut … s_0; the embedding of time is this call's own."""
    x, time = _entered(model, sample, timestep, **cond)
    skips = []
    for layer in _down_layers(model)[: cut + 1]:
        x = layer(x, time.embedding)
        skips.append(x)
    x = features
    for layer in _up_layers(model)[-(cut + 1) :]:
        x = layer(torch.cat([x, skips.pop()], dim=1), time.embedding)
    return _left(model, x, time)


class _Time(NamedTuple):
    """`steps` [B]; `embedding` [B, E], that of the class added."""

    steps: torch.Tensor
    embedding: torch.Tensor


def _entered(
    model: Any, sample: torch.Tensor, timestep: torch.Tensor | float, class_labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, _Time]:
    """What the first convolution takes, and the time: `UNet2DModel.forward` up to there, step by step."""
    if model.config.center_input_sample:
        sample = 2 * sample - 1.0
    given = timestep if torch.is_tensor(timestep) else torch.tensor([timestep], dtype=torch.long)
    steps = given.reshape(-1).to(sample.device)
    steps = steps * torch.ones(sample.shape[0], dtype=steps.dtype, device=steps.device)
    embedding = model.time_embedding(model.time_proj(steps).to(dtype=model.dtype))
    if (model.class_embedding is None) != (class_labels is None):
        raise ValueError("class_labels exactly when the net is conditional on classes")  # as the plain call
    if model.class_embedding is not None:
        labels = model.time_proj(class_labels) if model.config.class_embed_type == "timestep" else class_labels
        embedding = embedding + model.class_embedding(labels).to(dtype=model.dtype)
    return sample, _Time(steps, embedding)


def _left(model: Any, x: torch.Tensor, time: _Time) -> torch.Tensor:
    """The prediction from the last hidden state."""
    x = model.conv_out(model.conv_act(model.conv_norm_out(x)))
    return x / time.steps.reshape(-1, 1, 1, 1) if model.config.time_embedding_type == "fourier" else x


def _down_layers(model: Any) -> list[Layer]:
    """What makes every skip of the one before, s_0 first."""
    layers: list[Layer] = [lambda x, _: model.conv_in(x)]
    for block in model.down_blocks:
        layers += _joined(block)
        layers += [partial(_resampled, sampler) for sampler in block.downsamplers or ()]
    return layers


def _up_layers(model: Any) -> list[Layer]:
    """What takes the hidden state beside every skip, s_(n-1) first, with the upsampler that follows."""
    layers: list[Layer] = []
    for block in model.up_blocks:
        *first, last = _joined(block)
        layers += [*first, partial(_in_turn, (last, *(partial(_resampled, one) for one in block.upsamplers or ())))]
    return layers


def _joined(block: Any) -> list[Layer]:
    """The ResNet blocks of a block, each with its attention."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return [partial(_with_attention, resnet, one) for resnet, one in zip(block.resnets, attentions, strict=True)]


def _with_attention(resnet: nn.Module, attention: nn.Module | None, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
    x = resnet(x, emb)
    return x if attention is None else attention(x)


def _resampled(sampler: nn.Module, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
    return sampler(x, emb) if isinstance(sampler, ResnetBlock2D) else sampler(x)


def _in_turn(layers: Sequence[Layer], x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x, emb)
    return x
