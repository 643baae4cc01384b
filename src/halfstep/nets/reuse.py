"""Reuse of what a network computed in an earlier call: its deep features at a cut, or its whole prediction.

Papers: DeepCache, Ma et al., CVPR 2024, arXiv 2312.00858 (features at a cut, order 0); TaylorSeer, Liu et al., 2025,
arXiv 2503.06923 (their forecast, order 1).

Implemented: pure functions on a model's own public parts; nothing is hooked and no forward is patched, so that slices,
masks and `torch.func.functional_call` work. Where a family can be cut stands in its net file (`architectures.Cuts`).

What differs: a forecast divides by the gaps of the calls' own timesteps (Newton's divided differences), so that it is
exact on features that are linear in the timestep whatever the gaps are; TaylorSeer divides by the number of rows. The
timestep, and not log-SNR / 2: it is what the network itself is told, it is finite under zero terminal SNR, and the
last gap before a clean picture, which is many times the ones before in log-SNR, is not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.nets.architectures import Cuts, architecture_of, net_of, require
from halfstep.nets.denoiser import Cond, Kept, Memo, Predict, eager, prediction_of, predictor
from halfstep.nets.precision import Cast

OUT: Literal["out"] = "out"
"""The cut behind the whole network: what is reused is its prediction, and nothing is computed."""

Place = int | Literal["out"]
"""A cut by number, from 0, the cheapest, or `OUT`."""

Order = Literal[0, 1]
ORDERS: tuple[Order, ...] = (0, 1)
"""0: the last features as they are; 1: a straight line through those of the last two timesteps."""


def cut_count(model: nn.Module) -> int:
    """The model's cuts are 0 … count - 1. Raises ModelError for a family without cuts, and for parts that are not
    known."""
    return _cuts(model).count(net_of(model))


def require_cut(model: nn.Module, cut: Place, where: object) -> None:
    """Raise ModelError unless the model can be cut there; `OUT` is everywhere."""
    if cut == OUT:
        return
    count = cut_count(model)
    if not 0 <= cut < count:
        raise ModelError(
            got=f"cut {cut}", expected=f"0 to {count - 1}, or {OUT!r}", where=where, do="choose one that the net has"
        )


def tapped(
    model: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, cuts: Collection[Place]
) -> tuple[torch.Tensor, dict[Place, torch.Tensor]]:
    """The prediction [B,C,H,W], bit for bit that of the plain call, and the features at these cuts.

    A compiled model's cuts are taken of the model inside; what a cast net leaves is of the sample's precision. Raises
    ModelError for a family without cuts.
    """
    if isinstance(model, Cast):
        given, cond = model.given(sample, cond)
        prediction, left = tapped(model.model, given, timestep, cond, cuts)
        return prediction.to(sample.dtype), {cut: features.to(sample.dtype) for cut, features in left.items()}
    inner = [cut for cut in cuts if cut != OUT]
    kept: dict[Place, torch.Tensor] = {}
    if inner:
        output, found = _cuts(model).tapped(eager(model), sample, timestep, cond, inner)
        prediction = prediction_of(output, sample)
        kept.update(found.items())
    else:
        prediction = predictor(model)(sample, timestep, cond, Memo())
    if OUT in cuts:
        kept[OUT] = prediction
    return prediction, kept


def shallow(
    model: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, cut: Place, features: torch.Tensor
) -> torch.Tensor:
    """The prediction [B,C,H,W] with these features in the place of all that is deeper than the cut: that of the plain
    call, bit for bit, where `tapped` left them of the same input."""
    if cut == OUT:
        return features
    if isinstance(model, Cast):
        given, cond = model.given(sample, cond)
        return shallow(model.model, given, timestep, cond, cut, features.to(model.dtype)).to(sample.dtype)
    return prediction_of(_cuts(model).shallow(eager(model), sample, timestep, cond, cut, features), sample)


def forecast(known: Sequence[tuple[float, torch.Tensor]], time: float, order: int) -> torch.Tensor:
    """Features at `time` by those known at other times, all different, the newest last.

    h_0 + (t - t_0) (h_0 - h_1) / (t_0 - t_1) of order 1, Newton's form; where one is known, that one as it is.
    """
    now, features = known[-1]
    if order == 0 or len(known) == 1:
        return features
    before, others = known[-2]
    return features + ((time - now) / (now - before)) * (features - others)


@dataclass(frozen=True)
class Forwards:
    """The three ways in which a net is called, however it is run: `plain`; `tapped` and `shallow` as the functions
    here, but for the model."""

    plain: Predict
    tapped: Callable[
        [torch.Tensor, torch.Tensor, Cond, Collection[Place]], tuple[torch.Tensor, dict[Place, torch.Tensor]]
    ]
    shallow: Callable[[torch.Tensor, torch.Tensor, Cond, Place, torch.Tensor], torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Forwards:
        """Those of a model as it is."""
        return cls(predictor(model), partial(tapped, model), partial(shallow, model))


def leaving(net: Forwards, source: str, cuts: Collection[Place], time: float) -> Predict:
    """The net's plain call at timestep `time`, which leaves its features at the cuts in the memo, as `source`'s."""

    def predict(sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, memo: Memo) -> torch.Tensor:
        prediction, found = net.tapped(sample, timestep, cond, cuts)
        for cut, features in found.items():
            keep(memo, source, cut, time, features)
        return prediction

    return predict


def taking(net: Forwards, source: str, cut: Place, order: int, time: float) -> Predict:
    """The net's shallow pass at timestep `time`, on what calls of `source` left in the memo. Raises ModelError where
    they left nothing."""

    def predict(sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, memo: Memo) -> torch.Tensor:
        known = memo.get((source, str(cut)))
        if not known:
            got, expected = f"no features of {source!r} at cut {cut}", f"a call of {source!r} before"
            raise ModelError(got=got, expected=expected, where="memo", do="run the entry in a plan after its source")
        return net.shallow(sample, timestep, cond, cut, forecast(known, time, order))

    return predict


def keep(memo: Memo, source: str, cut: Place | str, time: float, features: torch.Tensor) -> None:
    """Leave features in the memo, beside the newest of before. Of one timestep the newer call counts alone: two
    (Heun's) have no slope between them."""
    key = source, str(cut)
    before = (one for one in memo.get(key, ()) if one[0] != time)
    memo[key] = (*before, (time, features))[-len(ORDERS) :]


def joined_kept(one: Kept, other: Kept) -> Kept | None:
    """What two batches left, as one batch of both would have; None where they left it at different timesteps."""
    if [time for time, _ in one] != [time for time, _ in other]:
        return None
    return tuple((time, torch.cat([a, b])) for (time, a), (_, b) in zip(one, other, strict=True))


def parted_kept(kept: Kept) -> tuple[Kept, Kept]:
    """What the halves of a batch left."""
    first, second = (tuple((time, features.chunk(2)[half]) for time, features in kept) for half in (0, 1))
    return first, second


def _cuts(model: nn.Module) -> Cuts:
    return require(architecture_of(model), "cuts")


class Reused(nn.Module):
    """One reuse row as a denoiser of its own, on features that one call of the model left: what is counted and timed.

    It has the model's config and its parameters. sample, timestep, cond: of the call that leaves the features, at least
    as many samples as it will be called with.
    """

    def __init__(
        self, model: nn.Module, cut: Place, order: int, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond
    ):
        super().__init__()
        self.model, self.cut, self.order = model, cut, order
        with torch.no_grad():
            features = tapped(model, sample, timestep, cond, [cut])[1][cut]
        self.features: torch.Tensor
        self.register_buffer("features", features)

    @property
    def config(self) -> Any:
        return eager(self.model).config

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True, **cond: Any
    ) -> tuple[torch.Tensor]:
        """`cond`: whatever keywords the model takes."""
        known = [(float(k), self.features[: len(sample)]) for k in range(self.order + 1)]
        features = forecast(known, self.order + 1.0, self.order)
        return (shallow(self.model, sample, timestep, cond, self.cut, features),)
