"""Pictures of random numbers, folders and tars of them: what tests of several sources draw."""

from __future__ import annotations

import io
import tarfile
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


def tarred(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(n: int, per: int, *, labels: bool = True, captions: bool = False) -> tuple[np.ndarray, list[dict]]:
    """n pictures 6x6 of three classes, and the members of their shards with `per` samples in each."""
    pixels, found = pictures(n, 6, 6), []
    for begin in range(0, n, per):
        members: dict[str, bytes] = {}
        for k in range(begin, min(begin + per, n)):
            members |= {f"{k:06d}.cls": str(k % 3).encode()} if labels else {}
            members |= {f"{k:06d}.png": png(pixels[k])}
            members |= {f"{k:06d}.txt": f"picture {k}".encode()} if captions else {}
        found.append(members)
    return pixels, found


def written(root: Path, shards_of: list[dict], name: str = "") -> str:
    """Shards in a folder, 000000.tar and so on."""
    for k, members in enumerate(shards_of):
        tarred(root / f"{name}{k:06d}.tar", members)
    return f"tar:{root}"
