"""Drawer: draws a plan's pictures and sees them in features. It is all that a worker of a search needs of a judge, and
knows nothing of the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from halfstep.core.plan import StepPlan
from halfstep.data.pictures import to_uint8
from halfstep.engine.bank import Bank
from halfstep.engine.cluster import Held
from halfstep.engine.conditions import Conditions
from halfstep.engine.sampling import sample_images
from halfstep.measure.features import Extractor, extract

Part = tuple[np.ndarray, np.ndarray | None]
"""Of one batch: features [B, F], and as uint8 those of its pictures that are kept, None where none is."""


@dataclass(frozen=True, eq=False)
class Drawer(Held):
    """`batch`: images of a call; `conditions`: of generated images, None without any."""

    bank: Bank
    extractor: Extractor
    batch: int
    conditions: Conditions | None

    def parts(
        self, plan: StepPlan, count: int, seed: int, keep: int = 0, executor: Executor | None = None
    ) -> Iterator[Part]:
        """`count` images of a plan, batch by batch; the first `keep` pictures are kept. With an executor all of them
        are asked for at once; they are the same images, for image k hangs on the seed and k alone."""
        work, begins = partial(self.part, plan, count, seed, keep), range(0, count, self.batch)
        return map(work, begins) if executor is None else executor.map(work, begins)

    def part(self, plan: StepPlan, count: int, seed: int, keep: int, begin: int) -> Part:
        """The batch that begins at image `begin`."""
        [images] = sample_images(
            self.bank,
            plan,
            min(self.batch, count - begin),
            seed=seed,
            batch=self.batch,
            conditions=self.conditions,
            first=begin,
        )
        pictures = to_uint8(images[: keep - begin].cpu()) if begin < keep else None
        return extract(self.extractor, [images]), pictures

    def moved(self, before: torch.Tensor, after: torch.Tensor) -> float:
        """Mean squared distance of images [N,C,H,W] from their twins of the same noise, in the extractor's features."""
        twins = (extract(self.extractor, images.split(self.batch)) for images in (before, after))
        return float(np.square(np.subtract(*twins)).sum(axis=1).mean())


def joined(parts: Iterable[Part]) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, F] of all batches, and the pictures that were kept, uint8 [K, C, H, W]."""
    every = list(parts)
    kept = [pictures for _, pictures in every if pictures is not None]
    return np.concatenate([one for one, _ in every]), np.concatenate(kept) if kept else np.zeros((0, 1, 1, 1), np.uint8)
