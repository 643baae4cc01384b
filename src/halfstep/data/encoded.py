"""Pictures that stay encoded where they lie: looked at and decoded stretch by stretch, ahead, by several processes.

The same few lines fill the decoded cache and feed a training that has none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfstep.data.ahead import ahead
from halfstep.data.pictures import decode, is_grey, opened
from halfstep.data.sources import Pictures, Raw, Stream, bad

STRETCH = 64  # pictures of one piece of work
FEW = 4096  # so many pictures are not worth starting processes

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a stretch of pictures showed.

    sizes: the smallest and the largest (width, height).  grey: all are.  array: pixels uint8 [n, C, S, S], or where
    nothing was decoded the pictures' digests, uint64 [n].
    """

    sizes: tuple[Size, Size]
    grey: bool
    array: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Look:
    """The work on a stretch of pictures: numbers of some, or pairs (where, image).

    side: of what is decoded.  first: the (width, height) that all must have, None for any.  channels: 1 or 3; None: the
    pictures are opened, and not decoded.
    """

    pictures: Pictures | Stream
    first: Size | None
    side: int
    channels: int | None

    def __call__(self, stretch: Iterable) -> Seen:
        sizes: list[Size] = []
        grey, arrays = True, []
        for one in stretch:
            where, raw = one if isinstance(one, tuple) else self.pictures[one]  # type: ignore[index]
            with opened(where, raw) as image:
                sizes.append(image.size)
                self._require(where, image.size, not sizes[1:])
                grey = grey and is_grey(image)
                arrays.append(digest_of(raw) if self.channels is None else decode(image, self.channels, self.side))
        array = np.array(arrays, dtype=np.uint64) if self.channels is None else np.stack(arrays)
        return Seen(sizes=extremes(sizes), grey=grey, array=array)

    def _require(self, where: object, size: Size, is_first: bool) -> None:
        if self.first is not None and (size[0] != size[1] or size != self.first):
            same = is_first and size == self.first
            expected = "a square image" if same else f"{self.first[0]}x{self.first[1]} as those before it"
            raise bad(where, f"{size[0]}x{size[1]}", expected, "pass a size to crop and resample to")


def extremes(sizes: Sequence[Size]) -> tuple[Size, Size]:
    """The smallest and the largest of some sizes, by area."""
    return min(sizes, key=math.prod), max(sizes, key=math.prod)


def stretches(pictures: Pictures | Stream, begin: int = 0) -> Iterator[list]:
    """All pictures from one on, in pieces of work for `Look`: numbers, or what a stream has there."""
    if not isinstance(pictures, Stream):
        yield from (list(range(k, min(k + STRETCH, len(pictures)))) for k in range(begin, len(pictures), STRETCH))
        return
    piece = []
    for number, pair in enumerate(pictures.read()):
        if number >= begin:
            piece.append(pair)
        if len(piece) == STRETCH:
            yield piece
            piece = []
    if piece:
        yield piece


def digest_of(raw: Raw) -> int:
    """64 bits of a picture's bytes, by which it is known again."""
    content: Any = raw.read_bytes() if isinstance(raw, Path) else raw
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """Pictures that are decoded when they are asked for, else like an array uint8 [N, C, S, S].

    digests: uint64 [N], of every picture's bytes when it was first looked at; another picture in its place is refused.
    buffer: pictures that a training shuffles within.  workers: processes that decode ahead of it.
    """

    pictures: Pictures
    digests: np.ndarray
    channels: int
    side: int
    buffer: int
    workers: int

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), self.channels, self.side, self.side

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        """uint8 [n, C, S, S]. Raises DataError for a picture that cannot be decoded, or is not the one it was."""
        numbers = np.arange(len(self))[index]
        if not len(numbers):
            return np.empty((0, *self.shape[1:]), np.uint8)
        return np.stack([self._decoded(int(k)) for k in numbers])

    def _decoded(self, k: int) -> np.ndarray:
        where, raw = self.pictures[k]
        if digest_of(raw) != self.digests[k]:
            do = "repeat the command in another --out, or bring the old picture back"
            raise bad(where, "another picture than when the data was looked through", "the same, by content", do)
        with opened(where, raw) as image:
            return decode(image, self.channels, self.side)

    def coming(self, indices: Iterable[torch.Tensor]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each index with its pictures, [n] and uint8 [n, C, S, S], decoded ahead by the workers."""
        return ahead(self._numbered, (index.numpy() for index in indices), self.workers)

    def _numbered(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return index, self[index]
