"""Channels whose order is free: putting them in another order leaves a denoiser's function as it is.

Free are the channels inside each ResNet block (but a group norm must see the same sets), the heads of attention and the
channels inside each head, the hidden units of an MLP, and the time embedding. The residual streams are not: several
group norms of different group sizes read each of them, or a raw sinusoid enters them. Which of these a net has, its own
file says (`free_channels` in `unet.py`, `uvit.py`); what they have in common is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


@dataclass(frozen=True)
class Free:
    """Channels of free order.

    `score` [n]: how much each contributes to what reads it. `readers`: weights [out, n, ...] whose inputs they are.
    `moves`: what an order changes, as (parameter, dimension, how many stacks of n follow each other there).
    `sets`: channels of one of that many equal sets stay together; `fixed`: and the sets stay where they are.
    `block`: each channel is that many neighbouring entries (a head).
    """

    score: torch.Tensor
    moves: tuple[tuple[torch.Tensor, int, int], ...]
    readers: tuple[torch.Tensor, ...] = ()
    sets: int = 1
    fixed: bool = False
    block: int = 1

    def by_score(self) -> torch.Tensor:
        """The order that puts large scores first: sets by their sums, then inside each."""
        score = self.score.view(self.sets, -1)
        first = torch.arange(self.sets)
        if not self.fixed:
            first = score.sum(1).argsort(descending=True, stable=True)
        inside = score[first].argsort(dim=1, descending=True, stable=True)
        return (first.to(inside.device)[:, None] * score.shape[1] + inside).flatten()

    @torch.no_grad()
    def apply(self, order: torch.Tensor) -> None:
        """Put the channels in `order` [n], in place."""
        entries = (order[:, None] * self.block + torch.arange(self.block, device=order.device)).flatten()
        for parameter, dim, stacks in self.moves:
            index = torch.cat([entries + i * len(entries) for i in range(stacks)])
            parameter.copy_(parameter.index_select(dim, index))


def inside_resnet(block: ResnetBlock2D) -> Free:
    """The channels between the two convolutions of diffusers' ResNet block."""
    # after group norm every channel has unit scale, so gamma times the outgoing weights is what it contributes
    score = block.norm2.weight.abs() * block.conv2.weight.flatten(2).norm(dim=(0, 2))
    moves = [*outputs(block.conv1), *outputs(block.norm2), (block.conv2.weight, 1, 1)]
    if block.time_emb_proj is not None:
        stacks = 2 if block.time_embedding_norm == "scale_shift" else 1
        moves += [(p, dim, stacks) for p, dim, _ in outputs(block.time_emb_proj)]
    return Free(score, tuple(moves), (block.conv2.weight,), sets=block.norm2.num_groups)


def inside_attention(attention: Attention) -> Iterator[Free]:
    """The heads of diffusers' attention, then the channels of keys and of values inside each; one by one."""
    q, k, v, out = attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]

    def value() -> torch.Tensor:
        return v.weight.norm(dim=1) * out.weight.norm(dim=0)

    heads = attention.heads
    inner = len(v.weight) // heads
    rows = (*outputs(q), *outputs(k), *outputs(v))
    yield Free(value().view(heads, -1).sum(1), (*rows, (out.weight, 1, 1)), block=inner)
    key = q.weight.norm(dim=1) * k.weight.norm(dim=1)
    yield Free(key, (*outputs(q), *outputs(k)), sets=heads, fixed=True)
    yield Free(value(), (*outputs(v), (out.weight, 1, 1)), (out.weight,), sets=heads, fixed=True)


def between(first: nn.Linear, second: nn.Linear) -> Free:
    """The hidden units of two layers."""
    score = first.weight.norm(dim=1) * second.weight.norm(dim=0)
    return Free(score, (*outputs(first), (second.weight, 1, 1)), (second.weight,))


def outputs(layer: nn.Module) -> tuple[tuple[torch.Tensor, int, int], ...]:
    """A layer's weight and bias along their outputs."""
    return tuple((p, 0, 1) for p in (layer.weight, layer.bias) if isinstance(p, nn.Parameter))
