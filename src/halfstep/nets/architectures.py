"""The families of denoisers: one row each for what a family gives beyond being called as a denoiser.

A new family is a net file and a row here. What a family does not give is None in its row, and is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.nets import blocks, dit, transformers, unet, unet_condition, uvit, wavelet
from halfstep.nets.channels import Free
from halfstep.nets.continuous import ContinuousUNet2DModel
from halfstep.nets.denoiser import Cond, class_example, copy_of, eager, sample_shape
from halfstep.nets.precision import Cast
from halfstep.nets.slices import Pieces, cut_all
from halfstep.nets.uvit import UViT2DModel
from halfstep.nets.wavelet import SpectralUNet2DModel

Config = Mapping[str, Any]
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Slimming:
    """How a family is slimmed.

    `narrow(config, width in (0, 1])`: the config of the narrower net; raises ModelError for widths that do not fit.
    `exceptions(config, narrow config, narrow shapes, "aligned" or "leading")`: the dimensions of its parameters that
    are no plain prefix of the full net's, as (parameter, dimension, pieces).
    """

    narrow: Callable[[Config, float], dict[str, Any]]
    exceptions: Callable[[Config, Config, Shapes, str], Iterable[tuple[str, int, Pieces]]]


@dataclass(frozen=True)
class Parts:
    """Convolutions and linear layers of a family that stand apart from the bulk of it, as globs of their names.

    `ends`: the first and the last ones. `time`: the embeddings of time and class, and of what is added to them.
    `text`: those that read the text alone. `skips`: those of long skips.
    """

    ends: tuple[str, ...] = ()
    time: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    skips: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cuts:
    """How a family's deep features are taken out of one call and put into a later one (see `reuse.py`).

    `count(model)`: its cuts are 0 … count - 1, a cheaper pass the lower; raises ModelError, which names the part, for
    a net that is built of others than are known. `tapped(model, sample, timestep, cond, cuts)`: the prediction, bit for
    bit the plain call's, and the features at the cuts. `shallow(model, sample, timestep, cond, cut, features)`: the
    prediction with these features in the place of all that is deeper than the cut.
    """

    count: Callable[[Any], int]
    tapped: Callable[
        [Any, torch.Tensor, torch.Tensor, Cond, Collection[int]], tuple[torch.Tensor, dict[int, torch.Tensor]]
    ]
    shallow: Callable[[Any, torch.Tensor, torch.Tensor, Cond, int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """What a family of denoisers gives; None: it does not.

    `kind`: its class, by whose name a config.json asks for it. `own_checks`: its constructor refuses every config that
    it could not run; without, a config is run once without memory before it is built.
    `slim`: narrower versions on the same weights. `free`: its channels of free order, one by one.
    `levels`: the modules whose outputs spectral distillation compares, of the same sizes for the same layout.
    `gated`: the class with the same layout that resamples by wavelets.
    `cuts`: where its deep features can be reused.
    `parts`: which of its layers stand apart.
    `example(config, batch, tokens)`: a condition [B, ...] as its calls take it, float32 on the CPU, for prices and
    checks; `tokens`: how long a text is, by default as the family's pipelines have it; raises ModelError for one that
    is not known. `shape(config, batch)`: of the sample beside it; raises ModelError for a config without one.
    `null(config)`: the condition of one sample, each tensor [1, ...], that stands for none, where the family has one in
    its own layers; a text's is its encoder's.
    `word`: what a recipe's `model.kind` calls it. `fresh`: the config for (spec, size, channels, classes, timesteps).
    """

    kind: type[ModelMixin]
    own_checks: bool = False
    slim: Slimming | None = None
    free: Callable[[Any], Iterator[Free]] | None = None
    levels: Callable[[Any], list[nn.Module]] | None = None
    gated: type[ModelMixin] | None = None
    cuts: Cuts | None = None
    parts: Parts = Parts()
    example: Callable[[Config, int, int | None], Cond] = class_example
    null: Callable[[Config], Cond] | None = None
    shape: Callable[[Config, int], tuple[int, ...]] = sample_shape
    word: str = ""
    fresh: Callable[..., dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        return self.kind.__name__


_MODULATION = ("time_text_embed.*", "*.norm.linear", "*.norm1.linear", "*.norm1_context.linear", "norm_out.linear")
"""Embeddings of time and pooled text, and the layers that scale, shift and gate by them."""

_CONTEXT = ("context_embedder", "transformer_blocks.0.attn.add_[qkv]_proj")
"""What reads the text before the picture's tokens have been mixed into it."""


def _by_blocks(walked: blocks.Walked) -> Cuts:
    """The cuts of a transformer whose calls are known in blocks."""
    return Cuts(blocks.cut_count, partial(blocks.tapped, walked), partial(blocks.shallow, walked))


ROWS = (
    Architecture(
        UNet2DModel,
        slim=Slimming(unet.narrow_config, unet.slice_exceptions),
        free=unet.free_channels,
        levels=unet.levels,
        gated=SpectralUNet2DModel,
        cuts=Cuts(unet.cut_count, unet.tapped, unet.shallow),
        parts=Parts(ends=("conv_in", "conv_out"), time=("time_*", "*.time_emb_proj", "class_embedding*")),
        word="unet",
        fresh=unet.fresh_config,
    ),
    Architecture(
        UViT2DModel,
        own_checks=True,
        slim=Slimming(uvit.narrow_config, uvit.slice_exceptions),
        free=uvit.free_channels,
        cuts=Cuts(uvit.cut_count, uvit.tapped, uvit.shallow),
        parts=Parts(ends=("patch_embed.*", "decoder_pred", "final_layer"), time=("time_*",), skips=("*.skip_linear",)),
        word="uvit",
        fresh=uvit.fresh_config,
    ),
    Architecture(
        SpectralUNet2DModel,
        own_checks=True,
        free=unet.free_in_blocks,
        levels=wavelet.levels,
        cuts=Cuts(wavelet.cut_count, wavelet.tapped, wavelet.shallow),
        parts=Parts(
            ends=("net.conv_in", "net.conv_out"), time=("net.time_*", "*.time_emb_proj", "net.class_embedding*")
        ),
    ),
    Architecture(
        ContinuousUNet2DModel, own_checks=True, parts=Parts(ends=("stem.*", "head"), time=("*.film", "*.stage.*"))
    ),
    Architecture(
        UNet2DConditionModel,
        slim=Slimming(unet_condition.narrow_config, unet_condition.slice_exceptions),
        free=unet_condition.free_channels,
        levels=unet.levels,
        cuts=Cuts(unet_condition.cut_count, unet_condition.tapped, unet_condition.shallow),
        parts=Parts(
            ends=("conv_in", "conv_out"),
            time=("time_*", "*.time_emb_proj", "class_embedding*", "add_embedding*"),
            text=("*.attn2.to_k", "*.attn2.to_v", "encoder_hid_proj*"),
        ),
        example=unet_condition.example,
    ),
    Architecture(
        DiTTransformer2DModel,
        slim=Slimming(dit.narrow_config, dit.slice_exceptions),
        free=dit.free_channels,
        cuts=_by_blocks(dit.walked),
        parts=Parts(ends=("pos_embed.*", "proj_out_2"), time=("*.norm1.*", "proj_out_1")),
        example=dit.example,
        null=dit.null,
    ),
    Architecture(
        PixArtTransformer2DModel,
        cuts=_by_blocks(transformers.pixart),
        parts=Parts(
            ends=("pos_embed.*", "proj_out"),
            time=("adaln_single.*",),
            text=("caption_projection.*", "*.attn2.to_k", "*.attn2.to_v"),
        ),
        example=transformers.pixart_example,
    ),
    Architecture(
        SD3Transformer2DModel,
        cuts=_by_blocks(transformers.sd3),
        parts=Parts(ends=("pos_embed.*", "proj_out"), time=_MODULATION, text=_CONTEXT),
        example=transformers.sd3_example,
    ),
    Architecture(
        FluxTransformer2DModel,
        cuts=_by_blocks(transformers.flux),
        parts=Parts(ends=("x_embedder", "proj_out"), time=_MODULATION, text=_CONTEXT),
        example=transformers.flux_example,
        shape=transformers.flux_shape,
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = {row.name: row for row in ROWS}
"""Every family of denoisers, by the name of its class."""

Ability = Literal["slim", "free", "levels", "gated", "cuts", "fresh"]
MISSING: Mapping[Ability, str] = {
    "slim": "cannot be slimmed",
    "free": "has no known channels of free order",
    "levels": "has no levels to compare",
    "gated": "has no wavelet-gated student",
    "cuts": "has no cuts to reuse features at",
    "fresh": "is not made from a recipe's sizes",
}


def net_of(model: Any) -> Any:
    """The net inside what compiles or casts it; any other model itself."""
    model = eager(model)
    return model.model if isinstance(model, Cast) else model


def architecture_of(model: Any, rows: Iterable[Architecture] = ROWS) -> Architecture:
    """The family of a model, whatever compiled or cast it. Raises ModelError for what is of none."""
    rows = tuple(rows)
    for row in rows:
        if isinstance(net_of(model), row.kind):
            return row
    names = " or ".join(row.name for row in rows)
    raise ModelError(got=f"a {type(model).__name__}", expected=names, where="the model", do="bring one of these")


def example_of(model: Any, batch: int, tokens: int | None = None) -> Cond:
    """A condition as the model's calls take it, see `Architecture.example`; for a model of no family one on classes,
    as its config says."""
    model = net_of(model)
    example = next((row.example for row in ROWS if isinstance(model, row.kind)), class_example)
    return example(model.config, batch, tokens)


def shape_of(model: Any, batch: int) -> tuple[int, ...]:
    """The shape of the sample that a call of the model takes; [B, C, H, W] but for packed tokens, [B, L, C]."""
    model = net_of(model)
    shape = next((row.shape for row in ROWS if isinstance(model, row.kind)), sample_shape)
    return shape(model.config, batch)


def require(family: Architecture, ability: Ability, rows: Iterable[Architecture] = ROWS) -> Any:
    """What `family` gives for `ability`. Raises ModelError, which names the families that have it."""
    found = getattr(family, ability)
    if found is None:
        able = " or ".join(row.name for row in rows if getattr(row, ability) is not None)
        got = f"a {family.name}, which {MISSING[ability]}"
        raise ModelError(got=got, expected=able, where="the model", do="bring one of these")
    return found


# ----------------------------------------------------------------------------------------- which weights a width uses


def narrowed(family: Architecture, config: Config, width: float) -> dict[str, Any]:
    """The config of a denoiser of `family` at `width`. Raises ModelError for widths that do not divide it."""
    return require(family, "slim").narrow(config, width)


def skeleton(family: Architecture, config: Config) -> Any:
    """A denoiser without memory (on the meta device), to be run with weights from elsewhere."""
    with torch.device("meta"):
        return family.kind.from_config(dict(config))


def constants(family: Architecture, config: Config) -> dict[str, torch.Tensor]:
    """The buffers of a denoiser that no file holds (sinusoids of places), whose numbers a skeleton lacks."""
    net = skeleton(family, config)
    unsaved = {name for name, _ in net.named_buffers()} - set(net.state_dict())
    if not unsaved:
        return {}
    with torch.random.fork_rng(devices=[]):
        net = family.kind.from_config(dict(config))
    return {name: buffer for name, buffer in net.named_buffers() if name in unsaved}


def slices_for(
    family: Architecture, config: Config, width: float, concat: str = "aligned"
) -> dict[str, tuple[Pieces, ...]]:
    """Which part of every parameter of the full network the network at `width` uses."""
    narrow = narrowed(family, config, width)
    full_shapes = {name: value.shape for name, value in skeleton(family, config).state_dict().items()}
    slim_shapes = {name: value.shape for name, value in skeleton(family, narrow).state_dict().items()}
    slices: dict[str, tuple[Pieces, ...]] = {name: tuple(((0, n),) for n in s) for name, s in slim_shapes.items()}
    for name, dim, pieces in require(family, "slim").exceptions(config, narrow, slim_shapes, concat):
        slices[name] = (*slices[name][:dim], pieces, *slices[name][dim + 1 :])
    for name, dims in slices.items():
        for dim, pieces in enumerate(dims):
            fits = all(start + length <= full_shapes[name][dim] for start, length in pieces)
            assert fits and sum(n for _, n in pieces) == slim_shapes[name][dim], (name, dim, pieces)
    return slices


def sort_channels(model: Any) -> Any:
    """A copy of `model` whose channels of free order stand by importance, so that slices keep what contributes most; it
    computes the same function. A channel's importance is the size of its contribution to the next layer."""
    copy = copy_of(model)
    for free in require(architecture_of(copy), "free")(copy):
        free.apply(free.by_score())
    return copy


def leading_slices(model: Any, width: float) -> dict[str, torch.Tensor]:
    """The tensors of the model at `width`, by name: the most important channels of each of its layers."""
    family = architecture_of(model)
    return cut_all(sort_channels(model).state_dict(), slices_for(family, model.config, width))
