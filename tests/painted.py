"""Pictures of random numbers, and folders of them by class: what tests of several sources draw."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

RNG = np.random.default_rng(7)


def pictures(n: int, *shape: int) -> np.ndarray:
    """uint8 [n, ...], others at each call."""
    return RNG.integers(0, 256, (n, *shape), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def class_folder(root: Path, *, per_class: int = 2) -> dict[str, np.ndarray]:
    """`cat/0.png ...` and `dog/...` of 6x6 RGB; the arrays by relative path, in sorted order."""
    arrays = {f"{name}/{i}.png": pictures(1, 6, 6, 3)[0] for name in ("cat", "dog") for i in range(per_class)}
    for name, array in arrays.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(array))
    return arrays
