"""A net in eight bits: the weights of its convolutions and linear layers, and what goes in and out of these.

Weights are rounded to -127 … 127 with a scale for each output channel, activations to 0 … 255 with a scale and a zero
point for each tensor, by the ranges that were seen when the net was calibrated. Here the rounding is simulated in
float32, which is slow; ONNX Runtime and OpenVINO find QuantizeLinear and DequantizeLinear around each of these layers
in its graph and compute in eight bits (arXiv 1712.05877).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.core.typed import shown
from halfstep.nets.denoiser import eager

Span = tuple[float, float, float, float]
"""The least and the largest value that goes into a layer, and those that come out of it; each pair has 0 between."""

Spans = Mapping[str, Span]
"""By the path of a layer, for those in eight bits."""

LEVELS, WEIGHT = 255, 127
"""The largest number of an activation, and of a weight."""
_DO = "calibrate the entry again"


class _Rounded(nn.Module):
    """What a layer in eight bits has beside its own: its span, and its weights as whole numbers, `eight`, of a `scale`
    for each output channel. Its own weights stay as they are."""

    span: Span
    weight: torch.Tensor
    eight: torch.Tensor
    scale: torch.Tensor

    def fit(self, span: Span) -> None:
        weight = self.weight.detach()
        scale = (weight.flatten(1).abs().amax(1) / WEIGHT).clamp(min=1e-30)  # of a channel of zeros
        self.span = span
        self.register_buffer("eight", (weight / _outer(scale, weight)).round().to(torch.int8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def rounded(self) -> torch.Tensor:
        """The weights that it computes with, in float."""
        if not torch.compiler.is_exporting():
            return self.eight * _outer(self.scale, self.eight)
        return _operator(
            "DequantizeLinear", self.eight, self.scale, torch.zeros_like(self.scale).to(torch.int8), axis=0
        )


class Conv8(nn.Conv2d, _Rounded):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        found = self._conv_forward(within(input, *self.span[:2]), self.rounded(), self.bias)
        return within(found, *self.span[2:])


class Linear8(nn.Linear, _Rounded):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        found = nn.functional.linear(within(input, *self.span[:2]), self.rounded(), self.bias)
        return within(found, *self.span[2:])


KINDS: Mapping[type, type[_Rounded]] = {nn.Conv2d: Conv8, nn.Linear: Linear8}


def within(value: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Numbers as the nearest end of `LEVELS` steps from `low` to `high`, 0 among them; those outside as the last."""
    scale = (high - low) / LEVELS
    zero = round(-low / scale)
    if not torch.compiler.is_exporting():
        return (value / scale).round_().clamp_(-zero, LEVELS - zero).mul_(scale)
    how = torch.tensor(scale), torch.tensor(zero, dtype=torch.uint8)
    return _operator("DequantizeLinear", _operator("QuantizeLinear", value, *how), *how)


def _operator(name: str, value: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, **more: int) -> torch.Tensor:
    """An operator of ONNX by its name."""
    kind = zero.dtype if name == "QuantizeLinear" else scale.dtype
    return torch.onnx.ops.symbolic(name, (value, scale, zero), {**more}, dtype=kind, shape=value.shape)


def _outer(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[O] as [O, 1, ...], for weights [O, ...]."""
    return scale.view(-1, *[1] * (weight.ndim - 1))


def quantised(model: nn.Module, spans: Spans, where: object = "int8") -> Any:
    """A copy of a net with these layers in eight bits. Raises ModelError, which names the layer, for what is none of
    its convolutions or linear layers, and for a span that is no range around 0."""
    model = copy.deepcopy(eager(model))
    layers = dict(model.named_modules())
    if not spans:
        raise ModelError(got="no layer", expected="ranges of some layers", where=where, do=_DO)
    for name, span in spans.items():
        layer = layers.get(name)
        if type(layer) not in KINDS:
            got = f"ranges of {shown(name)}, " + ("no layer" if layer is None else f"a {type(layer).__name__}")
            expected = f"a {' or a '.join(kind.__name__ for kind in KINDS)} of a {type(model).__name__}"
            raise ModelError(got=got, expected=expected, where=where, do=_DO)
        if not all(low <= 0 <= high and 1e-30 < high - low < math.inf for low, high in (span[:2], span[2:])):
            expected = "a low and a high end of what goes in and of what comes out, 0 between"
            raise ModelError(got=f"ranges {span} of {shown(name)}", expected=expected, where=where, do=_DO)
        layer.__class__ = KINDS[type(layer)]  # its parameters and settings stay as they are
        cast(_Rounded, layer).fit(span)
    return model


def spans_of(model: nn.Module) -> dict[str, Span]:
    """Those of the layers that are in eight bits; none of a net as it was trained."""
    return {name: layer.span for name, layer in eager(model).named_modules() if isinstance(layer, _Rounded)}


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Span]]:
    """What goes through a net's layers inside; at the end the spans of those that are worth eight bits.

    Left in float are the first and the last layer, which take the sample and give the prediction, and those that work
    on one vector a sample ([B, C]: of the timestep, of classes), which take hardly any time and hurt most.
    """
    seen: dict[str, Span] = {}
    hooks = []
    for name, layer in eager(model).named_modules():
        if type(layer) in KINDS:

            def look(_: nn.Module, given: tuple[torch.Tensor], found: torch.Tensor, name: str = name) -> None:
                if given[0].ndim < 3:
                    return
                more = (*torch.aminmax(given[0].detach()), *torch.aminmax(found.detach()))
                low, high, least, most = (float(one) for one in more)
                now = seen.get(name, (0.0, 0.0, 0.0, 0.0))
                seen[name] = (min(now[0], low), max(now[1], high), min(now[2], least), max(now[3], most))

            hooks.append(layer.register_forward_hook(look))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
    for name in list(seen)[:1] + list(seen)[-1:]:
        seen.pop(name, None)
    for name in [name for name, span in seen.items() if span[0] == span[1] or span[2] == span[3]]:
        del seen[name]  # nothing but zeros went through it
