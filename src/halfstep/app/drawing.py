"""What `sample` draws: pictures as files, in batches that any of several processes may draw."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfstep.core.disk import write_many
from halfstep.core.parts import Parts
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import Recipe
from halfstep.core.watch import Told, Watch
from halfstep.data.pictures import picture, read_picture, to_uint8
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions
from halfstep.engine.device import default_device
from halfstep.engine.runtimes import settle_runtimes
from halfstep.engine.sampling import sample_images


@dataclass(frozen=True)
class Pictures:
    """Images 0 … `count` - 1 of a plan under `conditions`, image k as the file out/k.png; batch and runtime as the
    recipe says. Which batch an image is drawn in hangs on k alone, and so does not on who draws it."""

    bank: Bank
    plan: StepPlan
    count: int
    recipe: Recipe
    conditions: Conditions | None
    out: Path

    @property
    def batch(self) -> int:
        return min(self.count, self.recipe.sample.batch)

    def parts(self, dtype: str, watch: Watch) -> Parts:
        """The batches, by the number of their first image, once the networks are where and as they run."""
        self.bank.to(default_device(), getattr(torch, dtype))
        if self.recipe.sample.runtime != "eager":
            kept, rest = self.out / "state" / "runtimes.json", filter(None, [self.count % self.batch])
            settle_runtimes(self.bank, kept, self.recipe.sample.runtime, self.batch, rest, watch=watch)
        names = [f"{first:06d}" for first in range(0, self.count, self.batch)]
        return Parts(names, self._draw, self._done, self.out / "state" / "drawing")

    def _files(self, name: str) -> list[Path]:
        first = int(name)
        return [self.out / f"{k:06d}.png" for k in range(first, min(self.count, first + self.batch))]

    def _done(self, name: str) -> bool:
        return all(file.is_file() for file in self._files(name))

    def _draw(self, name: str) -> None:
        files = self._files(name)
        how: dict[str, Any] = {"seed": self.recipe.seed, "batch": self.batch, "conditions": self.conditions}
        [images] = sample_images(self.bank, self.plan, len(files), first=int(name), **how)
        pixels = to_uint8(images)
        write_many({file: partial(_save, one=one) for file, one in zip(files, pixels, strict=True)})

    def drawn(self, count: int) -> np.ndarray:
        """The first pictures as they lie there, uint8 [count, C, H, W]."""
        files = [self.out / f"{k:06d}.png" for k in range(count)]
        return np.stack([read_picture(file) for file in files])

    def pace(self, told: Told) -> Callable[[int], None]:
        """Tells batches that are done as images, with the rate of this call."""
        begun: list[float] = []

        def tell(done: int) -> None:
            images, now = min(self.count, done * self.batch), time.perf_counter()
            if not begun:
                begun.extend((now, images))
            rate = (images - begun[1]) / (now - begun[0]) if now > begun[0] else 0.0
            told(images, f"{rate:.1f} images/s" if rate else "")

        return tell


def _save(path: Path, one: np.ndarray) -> None:
    picture(one).save(path, "PNG")
