"""Images by name or place, decoded once into a memory-mapped cache: `load_images("digits") -> Images`.

A source is `scheme:place`. Each scheme has one reader that returns a `Source`: where the images are, in a fixed order,
with their labels. Everything after that is common: survey (sizes, grey or colour), decode, cache, open.
Input is checked and refused, never repaired; nothing is unpickled and no archive is extracted to disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from halfstep.core.bundled import BUNDLED
from halfstep.core.disk import read_json
from halfstep.core.typed import near
from halfstep.core.watch import SILENT, Told, Watch
from halfstep.data.arrays import open_array
from halfstep.data.pictures import decode, is_grey, opened
from halfstep.data.sources import READERS as FILE_READERS
from halfstep.data.sources import Source, bad, file_stats
from halfstep.data.tables import read_table

READERS = {**FILE_READERS, "hub": read_table}
CACHE_FORMAT = 6  # part of the cache key: raise it when the decoding below changes what it gives
VERIFY_BYTES = 1 << 28  # a cache up to this size is re-hashed when opened (0.2 s); a larger one only measured
STALE_SECONDS = 24 * 3600  # a temporary folder older than this belongs to a decode that was killed


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Decoded square images and their labels.

    name: the source as given.  pixels: uint8 [N, C, H, W], read-only.  labels: int64 [N], or None.
    classes: one name per label value, () without labels.  fingerprint: 16 hex digits of content and labels.
    left_out: what lay there and was not read, a reason with its count each, () if that is nothing.
    sizes: the smallest and the largest (width, height) of the pictures as they came, () where nobody recorded it.
    """

    name: str
    pixels: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]
    fingerprint: str
    left_out: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        return self.pixels.shape[2]

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many images each class has, in the order of `classes`."""
        if self.labels is None:
            return ()
        return tuple(np.bincount(self.labels, minlength=len(self.classes)).tolist())

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(
        self,
        index: torch.Tensor | np.ndarray | slice,
        *,
        flip: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """float32 [B, C, H, W] in [-1, 1]; `flip`, bool [B], says which images to mirror left to right.

        Nothing is drawn: `generator` is for what stands in their place (`Latents`).
        """
        pixels = torch.from_numpy(np.array(self.pixels[plain(index)]))
        if flip is not None:
            if flip.shape != pixels.shape[:1]:
                raise ValueError(f"flip has shape {tuple(flip.shape)}, the batch has {len(pixels)} images")
            pixels = torch.where(flip.bool().cpu()[:, None, None, None], pixels.flip(-1), pixels)
        return pixels.float().div_(127.5).sub_(1.0)

    def batch_labels(self, index: torch.Tensor | np.ndarray | slice) -> torch.Tensor | None:
        """int64 [B], or None when the source has no labels."""
        return None if self.labels is None else torch.from_numpy(np.array(self.labels[plain(index)]))

    def subset(self, n: int, seed: int = 0) -> Images:
        """`n` distinct images, chosen by `seed` alone; a larger n holds the smaller one. Raises: DataError."""
        if not 1 <= n <= len(self):
            raise bad(self.name, f"a subset of {n}", f"1 to {len(self)} images", "ask for that many")
        index = np.random.default_rng(seed).permutation(len(self))[:n]
        pixels, labels = np.array(self.pixels[index]), None if self.labels is None else np.array(self.labels[index])
        for array in (pixels, labels):
            if array is not None:
                array.flags.writeable = False
        return replace(self, pixels=pixels, labels=labels, fingerprint=_fingerprint(pixels, labels))


def load_images(
    source: str,
    *,
    size: int | None = None,
    channels: int | None = None,
    split: str = "train",
    cache: Path | None = None,
    watch: Watch = SILENT,
) -> Images:
    """Images of a source, from the cache if it was decoded before.

    source: `digits`, `fashion`, `idx:DIR`, `folder:DIR`, `npz:FILE`, `tar:FILE` or `hub:NAME`. `layout` says which
        folders are splits and classes; what is left out stands in the answer.
    size: None keeps the one square size that all images share. Otherwise the largest centred square of each image is
        resampled to size x size: by area (Pillow's BOX) to shrink it, so that nothing aliases, BICUBIC to grow it.
    channels: 1 or 3; None is 1 if every image is grey and 3 otherwise. Transparency is laid on white, 16-bit grey is
        scaled to 8 bits, and an EXIF orientation is applied.
    split: "train" is everything where a source has no splits.
    cache: folder to keep decoded data in; default: $HALFSTEP_CACHE, else ~/.cache/halfstep. The key holds the sizes and
        times of a local source's files. A hub name is decoded once: delete its cache folder to see a newer version.
    watch: is told how the decoding goes.
    Raises: DataError, naming the file at fault.
    """
    scheme, _, place = source.partition(":")
    if scheme not in READERS or (scheme in BUNDLED) != (place == ""):
        known = "one of " + ", ".join(name if name in BUNDLED else f"{name}:…" for name in READERS)
        meant = near(scheme, READERS)
        do = f"did you mean {meant if meant in BUNDLED else f'{meant}:…'}?" if meant else "name one of these"
        raise bad("data", f"source {source!r}", known, do)
    if size is not None and not (isinstance(size, int) and 1 <= size <= 4096):
        raise bad(source, f"size {size!r}", "1 to 4096 pixels", "give another size")
    if channels not in (None, 1, 3):
        raise bad(source, f"{channels!r} channels", "1 or 3", "give 1 or 3, or leave it out")
    record = [CACHE_FORMAT, scheme, file_stats(scheme, place), size, channels, split]
    key = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:24]
    root = (cache or cache_root()) / "data"
    found = _open_cache(root / key, source)
    if found is None:
        found = _build(READERS[scheme](place, split), source, size, channels, root / key, watch)
    return found


def cache_root() -> Path:
    """Where decoded and encoded images are kept: $HALFSTEP_CACHE, else ~/.cache/halfstep; without a home directory, a
    folder of the user's among the temporary files."""
    given = os.environ.get("HALFSTEP_CACHE")
    try:
        return Path(given).expanduser() if given else Path.home() / ".cache" / "halfstep"
    except RuntimeError as error:
        if given:
            raise bad("HALFSTEP_CACHE", given, "a folder", "write it without ~") from error
        return Path(tempfile.gettempdir(), f"halfstep-{os.getuid()}")


# ---- what every scheme shares --------------------------------------------------------------------------------------


def plain(index: torch.Tensor | np.ndarray | slice) -> np.ndarray | slice:
    """An index as numpy takes it."""
    return index.detach().cpu().numpy() if isinstance(index, torch.Tensor) else index


def _fingerprint(pixels: np.ndarray, labels: np.ndarray | None) -> str:
    digest = hashlib.sha256(f"{pixels.shape} {labels is not None}".encode())
    for start in range(0, len(pixels), 4096):
        digest.update(pixels[start : start + 4096].tobytes())
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _survey(
    decoded: Source, size: int | None, channels: int | None, told: Told
) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """The side and channels that all images will have, and their smallest and largest size, from the headers alone."""
    seen: dict[tuple[int, int], None] = {}  # the sizes, in the order they come
    grey = True
    for done, (where, raw) in enumerate(decoded.items(), start=1):
        with opened(where, raw) as image:
            width, height = image.size
            grey = grey and is_grey(image)
        seen[width, height] = None
        first = next(iter(seen))
        if size is None and (width != height or (width, height) != first):
            expected = "a square image" if first == (width, height) else f"{first[0]}x{first[1]} as those before it"
            raise bad(where, f"{width}x{height}", expected, "pass a size to crop and resample to")
        told(done)
    by_area = sorted(seen, key=math.prod)
    return size or by_area[0][0], channels or (1 if grey else 3), (by_area[0], by_area[-1])


# ---- the cache -----------------------------------------------------------------------------------------------------


def _open_cache(folder: Path, source: str) -> Images | None:
    """The cached images, or None when they are absent, cut or changed."""
    try:
        meta = read_json(folder / "meta.json", what="what a cache holds", do="delete it")
        if meta.pop("check") != _check(meta):
            return None
        pixels = open_array(folder / "pixels.npy")
        labels = open_array(folder / "labels.npy") if meta["classes"] else None
        whole = list(pixels.shape) == meta["shape"] and pixels.dtype == np.uint8
        whole = whole and (labels is None or (labels.shape == pixels.shape[:1] and labels.dtype == np.int64))
        if not whole or (pixels.nbytes <= VERIFY_BYTES and _fingerprint(pixels, labels) != meta["fingerprint"]):
            return None
        return Images(
            name=source,
            pixels=pixels,
            labels=labels,
            classes=tuple(meta["classes"]),
            fingerprint=str(meta["fingerprint"]),
            left_out=tuple(meta["left_out"]),
            sizes=tuple((width, height) for width, height in meta["sizes"]),
        )
    except (ValueError, KeyError, TypeError):  # an error of ours is a ValueError
        return None


def _build(decoded: Source, source: str, size: int | None, channels: int | None, folder: Path, watch: Watch) -> Images:
    """Decode into a temporary sibling of the cache folder and rename it, so that a cache is whole or absent."""
    root, temporary = folder.parent, None
    try:
        root.mkdir(parents=True, exist_ok=True)
        for stale in root.glob(f"{folder.name}.tmp-*"):
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(stale, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)  # a cut or changed cache
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=root))
        _write(decoded, source, size, channels, temporary, watch)
        with suppress(OSError):  # of several processes that decode the same source, the first to rename wins
            os.replace(temporary, folder)
        images = _open_cache(folder, source)
        if images is None:
            raise OSError(f"{folder} cannot be written")
        return images
    except OSError as error:
        do = "set HALFSTEP_CACHE to a writable folder with enough space"
        raise bad(root, f"a failed write ({error})", "a writable cache", do) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(decoded: Source, source: str, size: int | None, channels: int | None, folder: Path, watch: Watch) -> None:
    with watch.stage(f"look through {source}", decoded.count) as told:
        side, channels, sizes = _survey(decoded, size, channels, told)
    shape = (decoded.count, channels, side, side)
    # Written in order rather than through a memory map: on a full disk a map ends the process with SIGBUS.
    with open(folder / "pixels.npy", "wb") as file, watch.stage(f"decode {source}", decoded.count) as told:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        begun = time.perf_counter()
        for done, (where, raw) in enumerate(decoded.items(), start=1):
            with opened(where, raw) as image:
                array = decode(image, channels, side)
            file.write(array.tobytes())
            told(done, f"{done / (time.perf_counter() - begun):.1f} pictures/s")
    labels = None if decoded.labels is None else np.asarray(decoded.labels, dtype=np.int64)
    if labels is not None:
        np.save(folder / "labels.npy", labels)
    fingerprint = _fingerprint(np.load(folder / "pixels.npy", mmap_mode="r"), labels)
    record = {"source": source, "shape": shape, "classes": decoded.classes, "fingerprint": fingerprint}
    record |= {"left_out": decoded.left_out, "sizes": sizes}
    (folder / "meta.json").write_text(json.dumps({**record, "check": _check(record)}))


def _check(record: dict) -> str:
    """Changes with anything in a cache's record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
