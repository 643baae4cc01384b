"""Nearest: which real image each picture is nearest to in features, and how near, to see what was memorised.

Exact, over all images of the data, a chunk at a time: nothing holds their features. A distance means little by itself;
beside it belong those of real images that no model has seen (`held_out`), to the same images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from halfstep.data.images import Images
from halfstep.measure.features import Extractor, extract, slices_of

CHUNK = 1024
"""Images of the data that are looked at at once."""


class Near(NamedTuple):
    """Of every picture: the distance to its nearest image in features (float64 [Q]), and which one that is ([Q])."""

    distance: np.ndarray
    number: np.ndarray


def nearest_images(
    extractor: Extractor,
    seen: np.ndarray,
    images: Images,
    *,
    own: np.ndarray | None = None,
    told: Callable[[int], object] = lambda done: None,
) -> Near:
    """The nearest of all `images` to each picture, by its features `seen` [Q, F], under the Euclidean distance.

    `own`: [Q], of pictures that are images themselves their number, which is left out; -1 of one that is none. `told`
    hears how many images were looked at. Raises DataError as `extract`.
    """
    asked = torch.from_numpy(np.asarray(seen, dtype=np.float64))
    apart = torch.full((len(asked),), torch.inf, dtype=torch.float64)
    number = torch.full((len(asked),), -1)
    for rows in slices_of(len(images), CHUNK):
        real = torch.from_numpy(extract(extractor, [images.batch(part) for part in _within(rows)]))
        # by differences: by products, a picture would be some way off itself
        found = torch.cdist(asked, real, compute_mode="donot_use_mm_for_euclid_dist")
        if own is not None:
            inside = np.flatnonzero((own >= rows.start) & (own < rows.stop))
            found[inside, own[inside] - rows.start] = torch.inf
        least, at = found.min(dim=1)
        nearer = least < apart
        apart[nearer], number[nearer] = least[nearer], at[nearer] + rows.start
        told(rows.stop)
    return Near(apart.numpy(), number.numpy())


def _within(rows: slice) -> list[slice]:
    return [slice(rows.start + part.start, rows.start + part.stop) for part in slices_of(rows.stop - rows.start)]
