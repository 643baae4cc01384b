"""Ranges of a transformer's blocks that one call skips, and makes up for by what they added in an earlier call.

Papers: Δ-DiT, Chen et al., 2024, arXiv 2406.01125 (what is kept is the output of a range of blocks minus its input, not
the output: a skipped range then still sees the sample of its own step); the block caches after it skip all but the
first blocks (first-block cache) or all but the first and the last ones (DBCache).

Implemented: the kept difference, of every stream of tokens that the blocks carry. Of n blocks, cut c (0 … n - 2) runs
c + 1, in turn one more of the first and of the last: cut 0 the first block alone, cut 1 the first and the last, cut 2
the first two and the last. The other blocks are the skipped range.

What differs: which rows skip, and at which cut, stands in the plan; the papers fix it by step or by a threshold. And
beside the difference d = fl(y - x) its rounding y - fl(x + d) is kept, a number that floating point has: (x + d) + that
is y to the bit where x is the same, which x + d is not. It costs the memory of a second d.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.utils import scale_lora_layers, unscale_lora_layers

from halfstep.core.errors import ModelError
from halfstep.nets.denoiser import Cond

Streams = tuple[torch.Tensor, ...]
"""The tokens of the picture, and where the blocks carry them on, those of the text: [B, L, D] each."""


class Walk(NamedTuple):
    """One call of a transformer in its parts: `streams` before the first block, the `blocks`, and `left`, which makes
    the output of the picture's tokens behind the last one."""

    streams: Streams
    blocks: Sequence[Callable[[Streams], Streams]]
    left: Callable[[torch.Tensor], torch.Tensor]


Walked = Callable[[Any, torch.Tensor, torch.Tensor, Mapping[str, Any]], Walk]
"""(model, sample, timestep [B] or of no axes, condition) -> its call in parts"""


def cut_count(model: Any) -> int:
    """One less than there are blocks, double and single ones where there are both. Raises ModelError for one block."""
    blocks = len(model.transformer_blocks) + len(getattr(model, "single_transformer_blocks", ()))
    if blocks < 2:
        raise ModelError(
            got=f"{blocks} block", expected="2 or more", where="cuts to reuse features at", do='take the cut "out"'
        )
    return blocks - 1


def skipped(cut: int, blocks: int) -> range:
    """The blocks that a shallow pass at `cut` leaves out."""
    return range((cut + 2) // 2, blocks - (cut + 1) // 2)


def tapped(
    walked: Walked, model: Any, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, cuts: Collection[int]
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The output, bit for bit the plain call's, and what the blocks added that each cut skips, [B, 2, L, D]."""
    with _lora_scaled(model, cond) as given:
        streams, blocks, left = walked(model, sample, timestep, given)
        ranges = {cut: skipped(cut, len(blocks)) for cut in cuts}
        entering: dict[int, Streams] = {}
        kept = {}
        for i, block in enumerate(blocks):
            entering |= {cut: streams for cut, part in ranges.items() if part.start == i}
            streams = block(streams)
            for cut, part in ranges.items():
                if part.stop == i + 1:
                    kept[cut] = _added(entering[cut], streams, last=part.stop == len(blocks))
        return left(streams[0]), kept


def shallow(
    walked: Walked,
    model: Any,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    cond: Cond,
    cut: int,
    features: torch.Tensor,
) -> torch.Tensor:
    """The output where the blocks that `cut` skips add what they added when the features were left."""
    with _lora_scaled(model, cond) as given:
        streams, blocks, left = walked(model, sample, timestep, given)
        part = skipped(cut, len(blocks))
        for block in blocks[: part.start]:
            streams = block(streams)
        streams = _with(streams, features)
        for block in blocks[part.stop :]:
            streams = block(streams)
        return left(streams[0])


def _added(before: Streams, after: Streams, last: bool) -> torch.Tensor:
    """What came between, and its rounding, the streams one behind the other. Behind the last block only the picture's
    is read."""
    x, y = (torch.cat(list(part[:1] if last else part), dim=1) for part in (before, after))
    difference = y - x
    return torch.stack([difference, y - (x + difference)], dim=1)


def _with(streams: Streams, features: torch.Tensor) -> Streams:
    """The streams with what is added; those that the features do not hold are not read any more."""
    sums, begin = [], 0
    for x in streams:
        difference, rounding = features[:, :, begin : begin + x.shape[1]].unbind(dim=1)
        if not difference.shape[1]:
            break
        sums.append(x + difference + rounding)
        begin += x.shape[1]
    return tuple(sums)


def known(cond: Mapping[str, Any], names: Sequence[str], model: Any) -> dict[str, Any]:
    """What is given of these keywords of a model's call. Raises ModelError, which names it, for any other that is."""
    given = {name: value for name, value in cond.items() if value is not None}
    for name in given:
        if name not in names:
            raise ModelError(
                got=f"the condition {name!r}",
                expected=", ".join(names),
                where=f"a {type(model).__name__} with reused features",
                do="leave it out, or run fresh rows only",
            )
    return given


def picture(tokens: torch.Tensor, height: int, width: int, patch: int) -> torch.Tensor:
    """[B, height * width, patch * patch * C] -> [B, C, height * patch, width * patch]; the channel runs fastest."""
    x = tokens.reshape(tokens.shape[0], height, width, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, height * patch, width * patch)


@contextlib.contextmanager
def _lora_scaled(model: Any, cond: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The condition without the scale of LoRA layers in it, which holds inside, as around diffusers' own calls."""
    options = cond.get("joint_attention_kwargs")
    if not options or "scale" not in options:
        yield cond
        return
    scale = options["scale"]
    scale_lora_layers(model, scale)
    try:
        yield {**cond, "joint_attention_kwargs": {name: one for name, one in options.items() if name != "scale"}}
    finally:
        unscale_lora_layers(model, scale)
