"""The order in which a training meets pictures that are read where they lie: within a buffer, found at any place."""

from __future__ import annotations

import hashlib

import torch

CHUNKS = 16
"""Stretches of neighbouring pictures, from all over the data, that lie in the buffer at a time."""


class BufferedOrder:
    """Positions 0, 1, 2, … of an endless pass over n images, of which each epoch has its own order.

    An epoch cuts the data into stretches, takes these in an order of its own, `CHUNKS` at a time, and shuffles what
    they hold, about `buffer` images. It hangs on the seed and the epoch alone, and any position is found without those
    before it. Neighbours are read together, and at most a buffer's numbers are held at a time.
    """

    def __init__(self, n: int, seed: int, buffer: int):
        self.n, self.seed, self.stretch = n, seed, max(1, min(buffer, n) // CHUNKS)
        self._epoch = self._window = -1
        self._stretches = self._begins = self._images = torch.empty(0, dtype=torch.long)

    def take(self, start: int, count: int) -> torch.Tensor:
        """The image indices at positions start … start + count - 1, int64 [count]."""
        parts = [torch.empty(0, dtype=torch.long)]
        while count:
            epoch, offset = divmod(start, self.n)
            images, begin = self._at(epoch, offset)
            part = images[offset - begin : offset - begin + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)

    def _at(self, epoch: int, offset: int) -> tuple[torch.Tensor, int]:
        """The buffer that position `offset` of an epoch lies in, and where it begins."""
        if epoch != self._epoch:
            self._begin(epoch)
        window = int(torch.searchsorted(self._begins, offset, right=True)) - 1
        if window != self._window:
            chosen = self._stretches[window * CHUNKS : (window + 1) * CHUNKS].tolist()
            spans = [torch.arange(k * self.stretch, min((k + 1) * self.stretch, self.n)) for k in chosen]
            images = torch.cat(spans)
            self._images = images[self._shuffled(len(images), epoch, window)]
            self._window = window
        return self._images, int(self._begins[window])

    def _begin(self, epoch: int) -> None:
        """The stretches of an epoch in their order, and where each buffer of them begins."""
        count = -(-self.n // self.stretch)
        self._stretches = self._shuffled(count, epoch, -1)
        sizes = torch.full((count,), self.stretch)
        sizes[self._stretches == count - 1] = self.n - (count - 1) * self.stretch
        self._begins = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])[:-1:CHUNKS].contiguous()
        self._epoch, self._window = epoch, -1

    def _shuffled(self, count: int, *place: int) -> torch.Tensor:
        digest = hashlib.sha256(f"buffered {self.seed} {place}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randperm(count, generator=generator)
