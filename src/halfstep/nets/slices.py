"""Parameters that are slices of another network's parameters: the shared-weight form of a narrow network.

`Slices` maps a parameter's name to one tuple of (start, length) pieces per dimension; the pieces of a dimension are
concatenated in order. A plain prefix slice has one piece (0, n); an input that is itself a concatenation has one
piece per segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from halfstep.core.errors import ModelError
from halfstep.core.typed import shown

Pieces = tuple[tuple[int, int], ...]
Slices = Mapping[str, tuple[Pieces, ...]]


def cut(tensor: torch.Tensor, pieces_by_dim: Sequence[Pieces]) -> torch.Tensor:
    """The slice of one tensor; differentiable, a view wherever every dimension is one piece."""
    for dim, pieces in enumerate(pieces_by_dim):
        if len(pieces) == 1:
            start, length = pieces[0]
            if length != tensor.shape[dim]:
                tensor = tensor.narrow(dim, start, length)
        elif len(pieces) == 2:
            tensor = torch.cat([tensor.narrow(dim, start, length) for start, length in pieces], dim)
        else:
            index = torch.cat([torch.arange(start, start + length) for start, length in pieces])
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def cut_all(weights: Mapping[str, torch.Tensor], slices: Slices) -> dict[str, torch.Tensor]:
    """The slices of every tensor that `slices` names."""
    return {name: cut(weights[name], pieces) for name, pieces in slices.items()}


def pieces_of(indices: Sequence[int]) -> Pieces:
    """Write a list of indices as the fewest (start, length) pieces."""
    pieces: list[tuple[int, int]] = []
    for index in indices:
        if pieces and index == sum(pieces[-1]):
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + 1)
        else:
            pieces.append((index, 1))
    return tuple(pieces)


def nearest_frequencies(full: int, slim: int, shift: float = 0) -> Pieces:
    """Columns of a layer on sines and cosines of `full` frequencies that a net with `slim` of them uses: the nearest.

    `shift` is diffusers' `downscale_freq_shift` of both sinusoids.
    """
    ratio = (full - shift) / max(slim - shift, 1)
    nearest = [min(full - 1, int(i * ratio + 0.5)) for i in range(slim)]
    return pieces_of(nearest + [full + i for i in nearest])


def slices_to_json(slices: Slices) -> dict[str, list]:
    return {name: [[list(piece) for piece in pieces] for pieces in dims] for name, dims in slices.items()}


def require_inside(slices: Slices, shapes: Mapping[str, Sequence[int]], where: object) -> None:
    """Raise ModelError, which names a tensor, unless every piece lies inside a tensor of `shapes` and no slice is
    longer than what it is cut from: what is cut takes no more memory than what is there."""
    for name, dims in slices.items():
        shape = shapes.get(name, ())
        fits = len(dims) == len(shape) and all(
            all(start >= 0 and 0 < length <= full - start for start, length in pieces)
            and 0 < sum(length for _, length in pieces) <= full
            for pieces, full in zip(dims, shape, strict=True)
        )
        if not fits:
            raise ModelError(
                got=f"a slice of {shown(name)}",
                expected=f"pieces inside its shape, {tuple(shape)}" if shape else "a tensor of the stored weights",
                where=where,
                do="save the bank again",
            )
