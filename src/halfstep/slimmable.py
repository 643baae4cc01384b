"""DDSM: one U-Net whose narrower versions share its weights, trained together by the sandwich rule.

Paper: Denoising Diffusion Step-aware Models, Yang et al., ICLR 2024, arXiv 2310.03337; slimmable networks and the
sandwich rule come from arXiv 1812.08928 and 1903.05134.

Implemented: the supernet (leading slices of every layer, group count held for all widths, time MLP slimmed too) and
its training (widest + narrowest + random widths between, losses summed, own timesteps and noise each). The search for a
width per step is in `search.py`, since it does not care what its entries are.

What differs, and why:
- Layers are not rewritten. A width is a plain, narrower `UNet2DModel` whose parameters are slices of the full one's
  (`slices_for`), run by `torch.func.functional_call`: gradients reach the shared weights, stock diffusers loads what
  comes out, and a narrow step costs what a narrow model costs. Any `UNet2DModel` config works.
- Inputs that are concatenations are sliced segment by segment (`concat="aligned"`): the slim net's skip half uses the
  weights that the full net uses for its skip. The released code takes the leading columns of the whole concatenation,
  which the full net uses for the hidden half; `concat="leading"` does that.
- The paper's time table stays at full size in front of the slim time MLP. A plain narrow U-Net has a narrower
  sinusoid, so its first time layer takes the columns of the *nearest frequencies* (exact for widths 1/2, 1/4, …).
- Widths that give no whole groups are refused instead of rounded.
- Optional, not in the paper: sorting the pretrained channels by importance first (`sort_channels`), and distillation
  from the widest or the dense net (`distill`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from halfstep import uvit
from halfstep.channels import free_channels
from halfstep.denoiser import Draw, Predict, copy_of, predictor
from halfstep.errors import ModelError
from halfstep.recipe import SlimSpec
from halfstep.slices import Pieces, Slices, cut_all, nearest_frequencies
from halfstep.uvit import UViT2DModel

Net: TypeAlias = UNet2DModel | UViT2DModel
"""What can be slimmed."""
Through = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
"""What is done to a width's weights before they are used, e.g. masking."""


def width_name(width: float) -> str:
    """The bank name of a width: 0.5 -> "w0.50"."""
    return f"w{width:.2f}"


# ----------------------------------------------------------------------------------------- which weights a width uses


def narrow_config(config: Mapping[str, Any], width: float) -> dict[str, Any]:
    """The `UNet2DModel` config at `width` in (0, 1]. Raises ModelError when a level gets no whole channel groups."""
    narrow = {key: value for key, value in config.items() if not key.startswith("_")}
    groups = config["norm_num_groups"] or 1
    channels = []
    for full in config["block_out_channels"]:
        c = round(full * width, 2)  # so that 1/3 may be written 0.333333, as the message below does
        if c != int(c) or c < 1 or c % groups:
            expected = f"a multiple of the model's {groups} norm groups"
            raise _refused_width(config, f"{full} channels x {width} = {c:g}", expected)
        channels.append(int(c))
    _require_whole_frequencies(config, channels[0], width)
    narrow["block_out_channels"] = tuple(channels)
    if config.get("class_embed_type") == "identity":  # the caller hands in embeddings of the full size
        narrow["time_embedding_dim"] = config.get("time_embedding_dim") or 4 * config["block_out_channels"][0]
    elif config.get("time_embedding_dim"):
        narrow["time_embedding_dim"] = max(2, round(config["time_embedding_dim"] * width))
    if head := config.get("attention_head_dim"):  # a head must not be wider than the narrowest attended level
        narrow["attention_head_dim"] = min(head, *(_attended(config, channels) or [head]))
    return narrow


def _require_whole_frequencies(config: Mapping[str, Any], first: int, width: float) -> None:
    """A narrow net has a sinusoid of its own, pairs of a sine and a cosine: its first level has even channels."""
    full = config["block_out_channels"][0]
    if first % 2 and first != full and config.get("time_embedding_type", "positional") == "positional":
        got = f"{full} channels x {width} = {first} in the first level"
        raise _refused_width(config, got, "an even number, for the sines and cosines of its time embedding")


def _refused_width(config: Mapping[str, Any], got: str, expected: str) -> ModelError:
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


def narrowed(kind: type[Net], config: Mapping[str, Any], width: float) -> dict[str, Any]:
    """The config of a denoiser of class `kind` at `width`. Raises ModelError for widths that do not divide it."""
    return uvit.narrow_config(config, width) if kind is UViT2DModel else narrow_config(config, width)


def skeleton(config: Mapping[str, Any], kind: type[Net] = UNet2DModel) -> Net:
    """A denoiser without memory (on the meta device), to be run with weights from elsewhere."""
    with torch.device("meta"):
        return kind.from_config(dict(config))


def slices_for(
    config: Mapping[str, Any], width: float, concat: str = "aligned", kind: type[Net] = UNet2DModel
) -> dict[str, tuple[Pieces, ...]]:
    """Which part of every parameter of the full network the network at `width` uses."""
    narrow = narrowed(kind, config, width)
    full_shapes = {name: value.shape for name, value in skeleton(config, kind).state_dict().items()}
    slim_shapes = {name: value.shape for name, value in skeleton(narrow, kind).state_dict().items()}
    slices: dict[str, tuple[Pieces, ...]] = {name: tuple(((0, n),) for n in s) for name, s in slim_shapes.items()}
    found = uvit.slice_exceptions if kind is UViT2DModel else _exceptions
    for name, dim, pieces in found(config, narrow, slim_shapes, concat):
        slices[name] = (*slices[name][:dim], pieces, *slices[name][dim + 1 :])
    for name, dims in slices.items():
        for dim, pieces in enumerate(dims):
            fits = all(start + length <= full_shapes[name][dim] for start, length in pieces)
            assert fits and sum(n for _, n in pieces) == slim_shapes[name][dim], (name, dim, pieces)
    return slices


def _exceptions(
    config: Mapping[str, Any], narrow: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], concat: str
) -> Iterator[tuple[str, int, Pieces]]:
    """The dimensions that are no plain prefix, as (parameter, dimension, pieces)."""
    for name in shapes:
        if name in ("time_embedding.linear_1.weight", "class_embedding.linear_1.weight"):
            yield name, 1, _time_columns(config, narrow)
        if ".time_emb_proj." in name and config.get("resnet_time_scale_shift") == "scale_shift":
            half = shapes[name][0] // 2  # scale and shift are the two halves of one output
            yield name, 0, ((0, half), (_full_out(config, name), half))
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


def _full_out(config: Mapping[str, Any], name: str) -> int:
    """Output channels of the full ResNet block that owns a `time_emb_proj` parameter."""
    where, *rest = name.split(".")
    channels = list(config["block_out_channels"])
    if where == "mid_block":
        return channels[-1]
    level = int(rest[0])
    return channels[level] if where == "down_blocks" else channels[::-1][level]


def _time_columns(config: Mapping[str, Any], narrow: Mapping[str, Any]) -> Pieces:
    """Columns of the first time layer: the features that the narrow net's own time embedding has."""
    full, slim = config["block_out_channels"][0], narrow["block_out_channels"][0]
    kind = config.get("time_embedding_type", "positional")
    if kind == "learned":
        return ((0, slim),)
    if kind == "fourier":  # sin and cos of `slim` random frequencies, which are a prefix of the full ones
        return ((0, slim), (full, slim))
    return nearest_frequencies(full // 2, slim // 2, config.get("freq_shift", 0))


# ----------------------------------------------------------------------------------------------------------- supernet


class Supernet:
    """A U-Net with its widths. The weights live in `model`; nothing is written onto modules.

    `predict(width)` runs a width on the shared weights (differentiable); `subnet(width)` copies them out as a plain
    `UNet2DModel`. `own` is the width of `model` itself, in the units of `widths` (see `supernet_of`). Raises ModelError
    for a model that is no UNet2DModel and for widths without whole channel groups.
    """

    def __init__(self, model: Net, widths: Sequence[float], concat: str = "aligned", own: float = 1.0):
        if not isinstance(model, Net):
            raise ModelError(
                got=type(model).__name__,
                expected="a UNet2DModel or UViT2DModel",
                where="the model to slim",
                do="bring a pixel U-Net or a U-ViT",
            )
        self.model, self.widths, self.own = model, tuple(sorted(widths, reverse=True)), own
        self.slices: dict[float, Slices] = {}
        self._skeletons: dict[float, Net] = {}
        for width in self.widths:
            if width != own:
                self.slices[width] = slices_for(model.config, width / own, concat, type(model))
                self._skeletons[width] = skeleton(narrowed(type(model), model.config, width / own), type(model))

    def predict(self, width: float, through: Through | None = None) -> Predict:
        """(sample, timestep, class_labels) -> prediction of the network at `width`, its weights passed `through`."""
        if width == self.own and through is None:
            return predictor(self.model)
        net = self.model if width == self.own else self._skeletons[width]

        def weights() -> Mapping[str, torch.Tensor]:
            net.train(self.model.training)
            found = self.model.state_dict(keep_vars=True)
            found = found if width == self.own else cut_all(found, self.slices[width])
            return through(found) if through else found

        return predictor(net, weights)

    def subnet(self, width: float, through: Through | None = None) -> Net:
        """A plain diffusers model that computes what the supernet computes at `width`, with weights of its own."""
        weights = self.model.state_dict()
        config = dict(self.model.config)
        if width != self.own:
            weights = cut_all(weights, self.slices[width])
            config = narrowed(type(self.model), config, width / self.own)
        weights = through(weights) if through else weights
        model = type(self.model).from_config(config)
        model.load_state_dict({name: value.clone() for name, value in weights.items()})
        return model.to(self.model.device).eval()


def supernet_of(dense: Net, spec: SlimSpec) -> Supernet:
    """The untrained supernet of a dense model, which stays as it is: its channels sorted, cut to the widest width.

    A plan's bank holds the dense model beside the supernet, so that `spec.widths` may leave 1.0 out: no step of the
    training is then spent on a second net of that size. Raises ModelError for widths without whole channel groups.
    """
    net = sort_channels(dense) if spec.sort else copy_of(dense)
    widest = max(spec.widths)
    if widest != 1.0:
        Supernet(net, spec.widths, spec.concat)  # its error speaks of the user's widths
        net = Supernet(net, (1.0, widest), spec.concat).subnet(widest)
    return Supernet(net, spec.widths, spec.concat, own=widest)


def sandwich_objective(
    supernet: Supernet,
    draw: Draw,
    spec: SlimSpec,
    teacher: Predict | None = None,
    through: Sequence[Through | None] = (None,),
) -> Callable[[Any], Iterator[torch.Tensor]]:
    """The losses of one sandwich step (spec section 2.4): widest, narrowest, then `spec.sandwich - 2` widths between.

    Each loss draws its own timestep and noise on the same images unless `spec.shared_noise`. With `spec.distill` the
    widths regress to a prediction instead of the target: the narrower ones to the widest net's, or all to `teacher`'s.
    Each loss draws one of `through`, what is done to its weights.
    """
    widest, narrowest, *between = supernet.widths[0], supernet.widths[-1], *supernet.widths[1:-1]
    if spec.distill == "widest":
        teacher = supernet.predict(widest)
    taught = {"none": (), "widest": supernet.widths[1:], "dense": supernet.widths}[spec.distill]

    def objective(batch: Any) -> Iterator[torch.Tensor]:
        widths = [widest] + ([narrowest] if narrowest != widest else [])
        if between:
            widths += [between[int(i)] for i in torch.randint(len(between), (spec.sandwich - 2,))]
        drawn, lesson = draw(batch.clean), None
        for i, width in enumerate(widths):
            if i and not spec.shared_noise:
                drawn = draw(batch.clean)
            noisy, timestep, target = drawn
            if teacher is not None and width in taught:
                if lesson is None or not spec.shared_noise:
                    with torch.no_grad():
                        lesson = teacher(noisy, timestep, batch.labels).float()
                target = lesson
            change = through[int(torch.randint(len(through), ()))] if len(through) > 1 else through[0]
            yield F.mse_loss(supernet.predict(width, change)(noisy, timestep, batch.labels).float(), target)

    return objective


# ------------------------------------------------------------------------------------------------- channel importance


def sort_channels(model: Net) -> Net:
    """A copy of `model` whose channels of free order stand by importance, so that slices keep what contributes most; it
    computes the same function. A channel's importance is the size of its contribution to the next layer."""
    copy = copy_of(model)
    for free in free_channels(copy):
        free.apply(free.by_score())
    return copy
