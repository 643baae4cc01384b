"""What Halfstep knows of diffusers' `UNet2DConditionModel`, the U-Net of Stable Diffusion 1, 2 and XL.

Its calls with all of their keywords (ControlNet, T2I-Adapter, IP-Adapter, LoRA scale), so that deep features can be
taken out and put in; narrower configs; free channels; an example of what its calls take. Narrower levels have fewer
heads of attention where these stay whole, else as many narrower ones. The text stays as wide as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UNetMidBlock2DSimpleCrossAttn,
    UpBlock2D,
)
from diffusers.utils import USE_PEFT_BACKEND
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.nets import unet
from halfstep.nets.channels import Free, inside_attention, inside_resnet, outputs
from halfstep.nets.denoiser import Cond, class_example
from halfstep.nets.slices import Pieces, pieces_of

Config = Mapping[str, Any]

TOKENS = 77
"""How long a text is for CLIP, the encoder of all Stable Diffusions."""


def example(config: Config, batch: int, tokens: int | None = None) -> Cond:
    """A condition as the net's calls take it; see `architectures.Architecture`.

    "encoder_hidden_states" [B, tokens (77), dim]; where the config asks for them "class_labels", "timestep_cond"
    [B, dim], and "added_cond_kwargs" of "text_embeds" [B, dim] and "time_ids" [B, 6]. Raises ModelError for nets that
    are conditional on images.
    """
    hidden, added = config.get("encoder_hid_dim_type"), config.get("addition_embed_type")
    for name, kind, known in (
        ("encoder_hid_dim_type", hidden, (None, "text_proj")),
        ("addition_embed_type", added, (None, "text", "text_time")),
    ):
        if kind not in known:
            raise _unknown(f"{name} {kind!r}", f"one of {', '.join(map(str, known))}", "give the call's `inputs`")
    wide = config["encoder_hid_dim"] if hidden else config["cross_attention_dim"]
    size = wide if isinstance(wide, int) else wide[0]
    cond = {
        **class_example(config, batch),
        "encoder_hidden_states": torch.zeros(batch, TOKENS if tokens is None else tokens, size),
    }
    if config.get("time_cond_proj_dim"):
        cond["timestep_cond"] = torch.zeros(batch, config["time_cond_proj_dim"])
    if added == "text_time":
        whole, each = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
        ids = min(6, (whole - 1) // each)  # sizes and crops; the refiner has a score in the place of two of them
        pooled = {"text_embeds": torch.zeros(batch, whole - ids * each), "time_ids": torch.zeros(batch, ids)}
        cond["added_cond_kwargs"] = pooled
    return cond


# ---------------------------------------------------------------------------------------------------- narrower versions

_SLICED: Mapping[str, tuple[Any, ...]] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "attention_type": ("default",),
    "dual_cross_attention": (False,),
    "class_embeddings_concat": (False,),
    "time_embedding_type": ("positional",),
    "addition_embed_type": (None, "text", "text_time"),
}


def narrow_config(config: Config, width: float) -> dict[str, Any]:
    """The `UNet2DConditionModel` config at `width` in (0, 1]. Raises ModelError when a level gets no whole channel
    groups or heads, and for parts whose slices are not known."""
    for name, known in _SLICED.items():
        given = config.get(name, known[0])
        for one in given if isinstance(given, list | tuple) else (given,):
            if one not in known:
                expected = " or ".join(map(str, known))
                raise _unknown(f"{name} {one!r}", f"{expected}, whose narrower versions are known", "bring another net")
    narrow = unet.narrow_sizes(config, width)
    channels, attended = narrow["block_out_channels"], _attended(config)
    heads = [
        _narrow_heads(config, full, slim, count) if level in attended else count
        for level, (full, slim, count) in enumerate(
            zip(config["block_out_channels"], channels, _heads(config), strict=True)
        )
    ]
    narrow["attention_head_dim"] = heads[0] if len(set(heads)) == 1 else tuple(heads)
    return narrow


def _heads(config: Config) -> Sequence[int]:
    """How many heads every level has; the config calls them `attention_head_dim`, by diffusers' mistake of 2022."""
    given = config["attention_head_dim"]
    return [given] * len(config["block_out_channels"]) if isinstance(given, int) else given


def _attended(config: Config) -> set[int]:
    """The levels with attention."""
    count = len(config["block_out_channels"])
    found = {k for k, kind in enumerate(config["down_block_types"]) if "CrossAttn" in kind}
    found |= {count - 1 - k for k, kind in enumerate(config["up_block_types"]) if "CrossAttn" in kind}
    return found | ({count - 1} if "CrossAttn" in (config.get("mid_block_type") or "") else set())


def _narrow_heads(config: Config, full: int, slim: int, heads: int) -> int:
    """How many heads a level of `slim` channels has: fewer of the same size, where that is a whole number of them."""
    if full % heads == 0:
        if slim % (full // heads) == 0:
            return slim // (full // heads)
        if slim % heads == 0:
            return heads
    got = f"{full} channels x {slim / full:g} = {slim} for {heads} heads"
    raise unet.refused_width(config, got, f"a multiple of {heads}, or of the {full // heads} channels of a head")


def slice_exceptions(
    config: Config, narrow: Config, shapes: Mapping[str, Sequence[int]], concat: str
) -> Iterator[tuple[str, int, Pieces]]:
    """The dimensions that are no plain prefix, as (parameter, dimension, pieces)."""
    for name, dim, pieces in unet.slice_exceptions(config, narrow, shapes, concat):
        if not (name.startswith("class_embedding.") and config.get("class_embed_type") == "projection"):
            yield name, dim, pieces  # a projection's inputs are no frequencies
    if "time_embedding.cond_proj.weight" in shapes:  # what it puts out is added to the frequencies
        yield "time_embedding.cond_proj.weight", 0, unet.time_columns(config, narrow)
    for name, shape in shapes.items():
        if name.endswith((".ff.net.0.proj.weight", ".ff.net.0.proj.bias")):
            half = shape[0] // 2  # what is gated and what gates it are the two halves of one output
            whole = half * _channels(config, name) // _channels(narrow, name)
            yield name, 0, ((0, half), (whole, half))
        elif name.endswith((".to_q.weight", ".to_k.weight", ".to_v.weight")):
            yield name, 0, _head_pieces(config, narrow, name)
        elif name.endswith(".to_out.0.weight"):
            yield name, 1, _head_pieces(config, narrow, name)


def _channels(config: Config, name: str) -> int:
    return config["block_out_channels"][unet.level_of(config, name)]


def _head_pieces(config: Config, narrow: Config, name: str) -> Pieces:
    """The first channels of each of the first heads."""
    level = unet.level_of(config, name)
    whole = _channels(config, name) // _heads(config)[level]
    count = _heads(narrow)[level]
    part = _channels(narrow, name) // count
    return pieces_of([head * whole + i for head in range(count) for i in range(part)])


# ----------------------------------------------------------------------------------------------- channels of free order


def free_channels(model: UNet2DConditionModel) -> Iterator[Free]:
    """Those inside ResNet blocks, attention and feed-forward layers; apply an order before asking for the next."""
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            yield inside_resnet(module)
        elif isinstance(module, Attention) and module.added_kv_proj_dim is None:
            yield from inside_attention(module)
        elif isinstance(module, FeedForward) and isinstance(module.net[0], GEGLU):
            yield _inside_gated(module.net[0].proj, module.net[2])


def _inside_gated(first: nn.Linear, second: nn.Linear) -> Free:
    """The hidden units of a GEGLU feed-forward layer, each with its gate."""
    score = first.weight.view(2, -1, first.in_features).norm(dim=(0, 2)) * second.weight.norm(dim=0)
    moves = [(parameter, dim, 2) for parameter, dim, _ in outputs(first)]
    return Free(score, (*moves, (second.weight, 1, 1)), (second.weight,))


# --------------------------------------------------------------------------------------------------- features to reuse
# DeepCache (Ma et al., CVPR 2024, arXiv 2312.00858), numbered as in `unet.py`: cut c is the hidden state that meets the
# skip s_c. What a ControlNet adds to the skips is this call's own; what it adds to the middle is part of the features.

_KNOWN = {
    "down_blocks": (CrossAttnDownBlock2D, DownBlock2D),
    "mid_block": (UNetMidBlock2DCrossAttn, UNetMidBlock2D, UNetMidBlock2DSimpleCrossAttn, type(None)),
    "up_blocks": (CrossAttnUpBlock2D, UpBlock2D),
}
_TAKEN = (
    "encoder_hidden_states",
    "class_labels",
    "timestep_cond",
    "attention_mask",
    "cross_attention_kwargs",
    "added_cond_kwargs",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "encoder_attention_mask",
)

Layer = Callable[[torch.Tensor], torch.Tensor]
"""Hidden state [B, C, h, w] -> hidden state"""


def cut_count(model: UNet2DConditionModel) -> int:
    """One cut for every skip. Raises ModelError for blocks of other types, and for FreeU."""
    do = 'reuse its whole output, cut "out"'
    for place, known in _KNOWN.items():
        found = getattr(model, place)
        for block in found if isinstance(found, nn.ModuleList) else (found,):
            if type(block) not in known:
                names = ", ".join(kind.__name__ for kind in known if kind is not type(None))
                raise _unknown(f"a {type(block).__name__}", f"one of {names} in {place}", do)
    if any(getattr(block, name, None) for block in model.up_blocks for name in ("s1", "s2", "b1", "b2")):
        raise _unknown("FreeU", "hidden states that skips meet as they are", "call its disable_freeu()")
    return sum(len(block.resnets) for block in model.up_blocks)


def tapped(
    model: UNet2DConditionModel, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, cuts: Collection[int]
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The plain call, bit for bit, and the features at the cuts; see `architectures.Cuts`."""
    count = cut_count(model)
    with _lora_scaled(model, cond):
        x, call = _entered(model, sample, timestep, cond)
        x, skips = _down(model, call, x, count)
        x, kept = _up(model, call, _middle(model, call, x), skips, cuts)
        return _left(model, x), kept


def shallow(
    model: UNet2DConditionModel,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    cond: Cond,
    cut: int,
    features: torch.Tensor,
) -> torch.Tensor:
    """The layers down to s_cut, and those that join s_cut … s_0; text, embeddings and residuals are this call's own."""
    cut_count(model)
    with _lora_scaled(model, cond):
        x, call = _entered(model, sample, timestep, cond)
        _, skips = _down(model, call, x, cut + 1)
        return _left(model, _up(model, call, features, skips, ())[0])


class _Call(NamedTuple):
    """What the layers of one call are given beside the hidden state.

    `embedding` [B, E]; `attended`: keywords of every transformer; `adapter`: what a T2I-Adapter adds on the way down;
    `control`, `middle`: what a ControlNet adds to the skips and the middle; `odd`: skips have no halves of even sizes.
    """

    embedding: torch.Tensor
    attended: dict[str, Any]
    adapter: Sequence[torch.Tensor]
    control: Sequence[torch.Tensor] | None
    middle: torch.Tensor | None
    odd: bool


def _entered(
    model: Any, sample: torch.Tensor, timestep: torch.Tensor | float, cond: Cond
) -> tuple[torch.Tensor, _Call]:
    """What the first convolution takes, and the call: `UNet2DConditionModel.forward` up to there, step by step."""
    given = _known(cond)
    odd = any(side % 2**model.num_upsamplers for side in sample.shape[-2:])
    if model.config.center_input_sample:
        sample = 2 * sample - 1.0
    text, added = given["encoder_hidden_states"], given.get("added_cond_kwargs")
    embedding = model.time_embedding(model.get_time_embed(sample, timestep), given.get("timestep_cond"))
    classes = model.get_class_embed(sample, given.get("class_labels"))
    if classes is not None:
        both = model.config.class_embeddings_concat
        embedding = torch.cat([embedding, classes], dim=-1) if both else embedding + classes
    more = model.get_aug_embed(embedding, text, added)
    if model.config.addition_embed_type == "image_hint":
        more, hint = more
        sample = torch.cat([sample, hint], dim=1)
    embedding = embedding if more is None else embedding + more
    if model.time_embed_act is not None:
        embedding = model.time_embed_act(embedding)
    options = given.get("cross_attention_kwargs")
    attended = {
        "encoder_hidden_states": model.process_encoder_hidden_states(text, added),
        "cross_attention_kwargs": options and {name: one for name, one in options.items() if name != "scale"},
        "attention_mask": _bias(given.get("attention_mask"), sample.dtype),
        "encoder_attention_mask": _bias(given.get("encoder_attention_mask"), sample.dtype),
    }
    return sample, _Call(embedding, attended, *_residuals(given), odd)


def _known(cond: Cond) -> Cond:
    """The keywords of a call that are given. Raises ModelError for others than the net takes."""
    given = {name: value for name, value in cond.items() if value is not None}
    for name in given:
        if name not in _TAKEN:
            raise _unknown(f"a condition {name!r}", f"one of {', '.join(_TAKEN)}", "leave it out")
    if "encoder_hidden_states" not in given:
        raise _unknown("no encoder_hidden_states", "an encoded text", "give those of the text encoder")
    if given.get("cross_attention_kwargs", {}).get("gligen") is not None:
        raise _unknown("boxes of GLIGEN", "cross_attention_kwargs without gligen", "leave them out")
    return given


def _bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask [B, L] of what is kept as what attention adds to its scores, [B, 1, L]."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def _residuals(given: Cond) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor] | None, torch.Tensor | None]:
    """`adapter`, `control` and `middle` of a call. Until diffusers 0.20 adapters came by a ControlNet's keyword."""
    down, middle = given.get("down_block_additional_residuals"), given.get("mid_block_additional_residual")
    adapter = given.get("down_intrablock_additional_residuals")
    if down is not None and middle is not None:
        return adapter or (), down, middle
    return (down if adapter is None and middle is None else adapter) or (), None, None


@contextmanager
def _lora_scaled(model: Any, cond: Cond) -> Iterator[None]:
    """The model with its LoRA layers scaled as `cross_attention_kwargs` asks, as the decorator of its `forward`."""
    scale = (cond.get("cross_attention_kwargs") or {}).get("scale", 1.0)
    if not USE_PEFT_BACKEND:
        yield
        return
    scale_lora_layers(model, scale)
    try:
        yield
    finally:
        unscale_lora_layers(model, scale)


def _down(model: Any, call: _Call, x: torch.Tensor, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The hidden state behind s_(count - 1), and the skips s_0 … s_(count - 1)."""
    skips = []
    for layer in _down_layers(model, call)[:count]:
        x = layer(x)
        skips.append(x)
    if call.control is not None:
        skips = [skip + call.control[k] for k, skip in enumerate(skips)]
    return x, skips


def _down_layers(model: Any, call: _Call) -> list[Layer]:
    """What makes every skip of the one before, s_0 first."""
    layers: list[Layer] = [model.conv_in]
    for k, block in enumerate(model.down_blocks):
        joined = _joined(block, call)
        own = [*joined, *(block.downsamplers or ())]
        if k < len(call.adapter):  # behind the last transformer, or where there is none, behind the block
            at = len(joined) - 1 if isinstance(block, CrossAttnDownBlock2D) else len(own) - 1
            own[at] = partial(_added, own[at], call.adapter[k])
        layers += own
    return layers


def _middle(model: Any, call: _Call, x: torch.Tensor) -> torch.Tensor:
    """The hidden state behind the middle."""
    block, blocks = model.mid_block, len(model.down_blocks)
    if block is not None:
        attended = call.attended if getattr(block, "has_cross_attention", False) else {}
        x = block(x, call.embedding, **attended)
        if len(call.adapter) > blocks and call.adapter[blocks].shape == x.shape:
            x = x + call.adapter[blocks]
    return x if call.middle is None else x + call.middle


def _up(
    model: Any, call: _Call, x: torch.Tensor, skips: list[torch.Tensor], cuts: Collection[int]
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The last hidden state, from the one that meets the last of these skips, and those that meet them at the cuts."""
    layers, kept = [], {}
    for block in model.up_blocks:
        *first, last = _joined(block, call)
        layers += [*((layer, ()) for layer in first), (last, tuple(block.upsamplers or ()))]
    for layer, samplers in layers[-len(skips) :]:
        if len(skips) - 1 in cuts:
            kept[len(skips) - 1] = x
        x = layer(torch.cat([x, skips.pop()], dim=1))
        for sampler in samplers:
            x = sampler(x, skips[-1].shape[2:] if call.odd else None)
    return x, kept


def _joined(block: Any, call: _Call) -> list[Layer]:
    """The ResNet blocks of a block, each with its transformer."""
    transformers = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return [partial(_attended_to, *both, call) for both in zip(block.resnets, transformers, strict=True)]


def _attended_to(resnet: nn.Module, transformer: nn.Module | None, call: _Call, x: torch.Tensor) -> torch.Tensor:
    x = resnet(x, call.embedding)
    return x if transformer is None else transformer(x, **call.attended, return_dict=False)[0]


def _added(layer: Layer, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return layer(x) + residual


def _left(model: Any, x: torch.Tensor) -> torch.Tensor:
    """The prediction from the last hidden state."""
    if model.conv_norm_out:
        x = model.conv_act(model.conv_norm_out(x))
    return model.conv_out(x)


def _unknown(got: str, expected: str, do: str) -> ModelError:
    return ModelError(got=got, expected=expected, where="UNet2DConditionModel", do=do)
