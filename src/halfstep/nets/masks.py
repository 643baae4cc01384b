"""N:M masks: of every M neighbouring weights along a layer's input, the N largest stay, the others are zero.

The groups lie where sparse hardware wants them: along the input features of a linear layer, and for a convolution
along the input channels at one kernel tap, which is the input of the matrix product that a convolution is (im2col).
Masks are functions of the weights alone: nothing is stored, and without a mask the network is the dense one again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from halfstep.core.errors import ModelError, RecipeError
from halfstep.core.typed import shown


@dataclass(frozen=True, order=True)
class Pattern:
    """Keep `n` of every `m` weights."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """From "2:4". Raises RecipeError for anything but 0 < N < M <= 64."""
        found = re.fullmatch(r"\s*(\d{1,3})\s*:\s*(\d{1,3})\s*", str(text))
        n, m = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 0 < n < m <= 64:
            raise RecipeError(
                got=f"pattern {text!r}",
                expected="N:M with 0 < N < M <= 64",
                where="pattern",
                do="write e.g. 2:4, which keeps 2 of every 4 weights",
            )
        return cls(n, m)

    @property
    def density(self) -> float:
        """The share of weights, and of multiply-accumulates, that stays."""
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def fits(self, shape: Collection[int]) -> bool:
        """Whether weights of this shape (out, in, ...) fall into whole groups."""
        return len(shape) >= 2 and tuple(shape)[1] % self.m == 0


@dataclass(frozen=True)
class Masking:
    """That the parameters in `names` follow `pattern`."""

    pattern: Pattern
    names: tuple[str, ...]

    def require_fits(self, model: nn.Module, where: object) -> None:
        """Raise ModelError, which names it, for a weight that is none of a layer's of `model` or has no whole groups.

        A mask over an unknown name would be no mask, and its entry a dense net under the name of a sparse one.
        """
        if not self.names:
            raise ModelError(
                got="a mask over nothing", expected="weights of the model's layers", where=where, do="remove the mask"
            )
        layers = {f"{name}.weight": module for name, module in model.named_modules() if name}
        for name in self.names:
            layer: Any = layers.get(name)
            known = isinstance(layer, nn.Conv2d | nn.Linear)
            if not known or not self.pattern.fits(layer.weight.shape):
                raise ModelError(
                    got=f"a mask over {shown(name)}" + (f" of shape {tuple(layer.weight.shape)}" if known else ""),
                    expected=f"weights of the model's layers whose inputs are multiples of {self.pattern.m}",
                    where=where,
                    do="save the bank again, or remove the mask",
                )

    def layers(self) -> dict[str, float]:
        """The share of MACs that stays, by layer."""
        return {name.removesuffix(".weight"): self.pattern.density for name in self.names}


def groups_of(weight: torch.Tensor, m: int) -> torch.Tensor:
    """[O, I] or [O, I, kh, kw] -> [groups, m], neighbours along I; a group never crosses a row or a kernel tap."""
    return weight.movedim(1, -1).reshape(-1, m)


def ungrouped(groups: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `groups_of`."""
    return groups.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


@torch.no_grad()
def keep_mask(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Which weights stay, bool of the weight's shape: in each group the N of largest magnitude, of equals the first."""
    size = groups_of(weight.detach(), pattern.m).abs()
    ahead = torch.zeros_like(size, dtype=torch.uint8)  # how many of its group each weight comes after
    for i in range(pattern.m):  # M comparisons of all weights: several times faster than sorting short rows
        one = size[:, i : i + 1]
        ahead += one > size
        ahead[:, i + 1 :] += one == size[:, i + 1 :]
    return ungrouped(ahead < pattern.n, weight.shape)


def masked(weight: torch.Tensor, pattern: Pattern | None) -> torch.Tensor:
    """The weight with its mask; gradients pass straight through to all weights (straight-through estimator)."""
    if pattern is None:
        return weight
    dropped = weight.detach() * ~keep_mask(weight, pattern)
    return weight - dropped  # w - 0 and w - w are exact


def mask_all(
    weights: Mapping[str, torch.Tensor], names: Collection[str], pattern: Pattern | None
) -> dict[str, torch.Tensor]:
    """All weights, those in `names` masked."""
    return {name: masked(value, pattern) if name in names else value for name, value in weights.items()}


# ------------------------------------------------------------------------------------------------------------ storage


def pack(weight: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Store an N:M weight as its kept values [groups, N] and their places, uint8, ceil(log2 M) bits each.

    2:4 in 16 bits takes 0.5625 of the dense bytes. Raises ModelError when the weight does not follow the pattern.
    """
    mask = keep_mask(weight, pattern)
    if not pattern.fits(weight.shape) or bool((weight * ~mask).count_nonzero()):
        raise ModelError(
            got=f"a weight of shape {tuple(weight.shape)} with more than {pattern} values",
            expected=f"at most {pattern.n} of every {pattern.m} non-zero",
            where="pack",
            do="bake the mask first",
        )
    places = groups_of(mask, pattern.m).nonzero()[:, 1].view(-1, pattern.n)
    values = groups_of(weight.detach(), pattern.m).gather(1, places)
    bits = (places.cpu().numpy()[..., None] >> np.arange(_bits(pattern))) & 1
    return values.contiguous(), torch.from_numpy(np.packbits(bits.astype(np.uint8).ravel()))


def unpack(
    values: torch.Tensor, places: torch.Tensor, pattern: Pattern, shape: torch.Size, where: object
) -> torch.Tensor:
    """The dense weight again, bit for bit. Raises ModelError for parts that do not belong together."""
    width, groups = _bits(pattern), shape.numel() // pattern.m
    if not pattern.fits(shape) or (tuple(values.shape), tuple(places.shape)) != _packed_shapes(shape, pattern):
        raise _torn(f"{tuple(values.shape)} values and {tuple(places.shape)} bytes of places", pattern, shape, where)
    bits = np.unpackbits(places.cpu().numpy())[: groups * pattern.n * width].reshape(groups, pattern.n, width)
    index = torch.from_numpy((bits.astype(np.int64) << np.arange(width)).sum(-1))
    if bool((index >= pattern.m).any()) or bool((index[:, 1:] <= index[:, :-1]).any()):
        raise _torn("places that do not rise inside their group", pattern, shape, where)
    dense = torch.zeros(groups, pattern.m, dtype=values.dtype)
    return ungrouped(dense.scatter_(1, index, values.cpu()), shape).contiguous()


def pack_all(weights: Mapping[str, torch.Tensor], masking: Masking) -> dict[str, torch.Tensor]:
    """Tensors to store: each masked weight as `<name>.values` and `<name>.places`, the others as they are."""
    found = {}
    for name, value in weights.items():
        if name in masking.names:
            found[f"{name}.values"], found[f"{name}.places"] = pack(value, masking.pattern)
        else:
            found[name] = value
    return found


def packed_shapes(shapes: Mapping[str, Sequence[int]], masking: Masking) -> dict[str, tuple[int, ...]]:
    """The shapes of what `pack_all` stores of weights of these shapes."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name in masking.names:
            found[f"{name}.values"], found[f"{name}.places"] = _packed_shapes(shape, masking.pattern)
        else:
            found[name] = tuple(shape)
    return found


def _packed_shapes(shape: Sequence[int], pattern: Pattern) -> tuple[tuple[int, int], tuple[int]]:
    groups = math.prod(shape) // pattern.m
    return (groups, pattern.n), (-(-groups * pattern.n * _bits(pattern) // 8),)


def unpack_all(
    stored: Mapping[str, torch.Tensor], masking: Masking, shapes: Mapping[str, torch.Size], where: object
) -> dict[str, torch.Tensor]:
    """The inverse of `pack_all`. Raises KeyError for a missing tensor, ModelError for torn ones."""
    return {
        name: unpack(stored[f"{name}.values"], stored[f"{name}.places"], masking.pattern, shape, where)
        if name in masking.names
        else stored[name]
        for name, shape in shapes.items()
    }


def _bits(pattern: Pattern) -> int:
    return math.ceil(math.log2(pattern.m))


def _torn(got: str, pattern: Pattern, shape: torch.Size, where: object) -> ModelError:
    expected = f"those of a {pattern} weight of shape {tuple(shape)}"
    return ModelError(got=got, expected=expected, where=where, do="save or copy the model again")
