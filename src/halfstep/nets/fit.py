"""Whether images fit a model: size, channels and classes, matched by name where the model knows its names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from halfstep.core.errors import DataError
from halfstep.data.classes import listed
from halfstep.data.images import Images
from halfstep.data.latents import Latents, shape_for
from halfstep.nets.denoiser import class_count


class Fitted(NamedTuple):
    """Images whose labels are the model's class numbers, and in words how they were matched ("" without classes)."""

    images: Images
    matched: str


def fit(config: Mapping[str, Any], images: Images, vae: Any = None, names: Sequence[str] = ()) -> Fitted:
    """The images as a model with this config takes them; `names`: its classes, where its folder records them.

    Raises DataError when their size or channels are not the model's (or its VAE's), and for a class-conditional model
    when they have no labels, more classes than it has, or a class of a name that it does not know.
    """
    channels, size = shape_for(config, vae)
    if (images.channels, images.size) != (channels, size):
        raise DataError(
            got=f"{images.channels} channels at {images.size}x{images.size}",
            expected=f"{channels} at {size}x{size}, as the model",
            where=images.name,
            do=f"add --set data.size={size} --set data.channels={channels}, or bring another model",
        )
    count = class_count(config)
    if not count:
        return Fitted(images, "")
    labels = require_labelled(images, f"as the model is conditional on {count}")
    return _by_name(images, labels, names) if names else _by_number(images, labels, count)


def names_of(config: Mapping[str, Any], images: Images, names: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of a model's classes once it was trained on these images: `names`, which it knew before, else those of
    the images, where there are as many."""
    return tuple(names) or (images.classes if class_count(config) == len(images.classes) else ())


def require_labelled(images: Images | Latents, why: str) -> np.ndarray:
    """The labels. Raises DataError for images that do not say which class they are of."""
    if images.labels is None:
        raise DataError(
            got="images without labels",
            expected=f"a class for each, {why}",
            where=images.name,
            do="put the images of each class into a folder of its own, or use an unconditional model",
        )
    return images.labels


def _by_name(images: Images, labels: np.ndarray, names: Sequence[str]) -> Fitted:
    number = {name: k for k, name in enumerate(names)}
    here = np.unique(labels)
    strange = [images.classes[k] for k in here if images.classes[k] not in number]
    if strange:
        raise DataError(
            got=f"images of class {listed(map(repr, strange))}",
            expected=f"the model's classes {listed(names)}",
            where=images.name,
            do="rename or remove these classes, or bring a model that was trained on them",
        )
    table = np.array([number.get(name, -1) for name in images.classes], dtype=np.int64)
    told = f"labels are matched by name with the model's {len(names)} classes{_without(names, table[here])}"
    if np.array_equal(table[here], here):
        return Fitted(replace(images, classes=tuple(names)), told)
    numbers = table[labels]
    numbers.flags.writeable = False
    # What was encoded or trained under the old numbers is not this.
    digest = hashlib.sha256(f"{images.fingerprint} {table.tolist()}".encode()).hexdigest()[:16]
    moved = replace(images, labels=numbers, classes=tuple(names), fingerprint=digest)
    return Fitted(moved, f"{told}; the numbers differ")


def _by_number(images: Images, labels: np.ndarray, count: int) -> Fitted:
    here = np.unique(labels)
    if int(here[-1]) >= count:
        raise DataError(
            got=f"{len(images.classes)} classes ({listed(images.classes)})",
            expected=f"at most {count}, as the model",
            where=images.name,
            do="remove the classes that it was not trained on, or bring a model that was trained on all of them",
        )
    missing = _without([str(k) for k in range(count)], here)
    return Fitted(images, f"labels are matched by number, as the model's folder does not name its classes{missing}")


def _without(names: Sequence[str], here: np.ndarray) -> str:
    """Which of the classes have no image, in words."""
    present = set(here.tolist())
    absent = [name for k, name in enumerate(names) if k not in present]
    return f"; no images of {listed(absent)}" if absent else ""
