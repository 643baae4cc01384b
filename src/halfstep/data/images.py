"""Images by name or place, decoded once into a memory-mapped cache: `load_images("digits") -> Images`.

A source is `scheme:place`. Each scheme has one reader that returns a `Source`: where the images are, in a fixed order,
with their labels. Everything after that is common: decode, or look through what shall stay encoded, cache, open.
Input is checked and refused, never repaired; nothing is unpickled and no archive is extracted to disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from halfstep.core.bundled import BUNDLED, FASHION_IMAGES
from halfstep.core.disk import read_json
from halfstep.core.errors import DataError
from halfstep.core.share import Share
from halfstep.core.typed import near
from halfstep.core.watch import SILENT, Watch
from halfstep.data.ahead import ahead, workers_here
from halfstep.data.arrays import VERIFY_BYTES, Growing, cache_root, one_at_a_time, open_array
from halfstep.data.encoded import FEW, Encoded, Look, Size, extremes, stretches
from halfstep.data.layout import is_system
from halfstep.data.pictures import is_grey, opened
from halfstep.data.shards import read_tar, shard_files
from halfstep.data.sources import READERS as FILE_READERS
from halfstep.data.sources import Pictures, Source, Stream, bad, names_below, reading
from halfstep.data.tables import read_parquet, read_table

READERS = {**FILE_READERS, "tar": read_tar, "parquet": read_parquet, "hub": read_table}
SHARDED = ("tar", "parquet")
CACHE_FORMAT = 6  # part of the cache key: raise it when the decoding below changes what it gives


@dataclass(frozen=True, kw_only=True, eq=False)
class Images:
    """Decoded square images and their labels.

    name: the source as given.  pixels: uint8 [N, C, H, W], read-only; or what decodes it.  labels: int64 [N], or None.
    classes: one name per label value, () without labels.  fingerprint: 16 hex digits of content and labels.
    left_out: what lay there and was not read, a reason with its count each, () if that is nothing.
    sizes: the smallest and the largest (width, height) of the pictures as they came, () where nobody recorded it.
    """

    name: str
    pixels: np.ndarray | Encoded
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

    @property
    def buffer(self) -> int:
        """Pictures that a training shuffles within; 0: all of them."""
        return self.pixels.buffer if isinstance(self.pixels, Encoded) else 0

    def coming(self, indices: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, Images]]:
        """For each index, int64 [B], images that hold these and where they are among them: what is decoded when it is
        asked for is decoded ahead, by processes of its own."""
        if not isinstance(self.pixels, Encoded):
            yield from ((index, self) for index in indices)
            return
        for index, pixels in self.pixels.coming(indices):
            labels = None if self.labels is None else self.labels[index]
            yield torch.arange(len(index)), replace(self, pixels=pixels, labels=labels)

    def batch(
        self,
        index: torch.Tensor | np.ndarray | slice,
        *,
        flip: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        share: Share | None = None,
    ) -> torch.Tensor:
        """float32 [B, C, H, W] in [-1, 1]; `flip`, bool [B], says which images to mirror left to right.

        Nothing is drawn: `generator` and `share` are for what stands in their place (`Latents`).
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
    stream: int = 0,
    workers: int | None = None,
) -> Images:
    """Images of a source, from the cache if it was decoded before.

    source: `digits`, `fashion`, `idx:DIR`, `folder:DIR`, `npz:FILE`, `tar:` or `parquet:` with a FILE, a DIR, a glob or
        {000..123}, or `hub:NAME`. `layout` says which
        folders are splits and classes; what is left out stands in the answer.
    size: None keeps the one square size that all images share. Otherwise the largest centred square of each image is
        resampled to size x size: by area (Pillow's BOX) to shrink it, so that nothing aliases, BICUBIC to grow it.
    channels: 1 or 3; None is 1 if every image is grey and 3 otherwise. Transparency is laid on white, 16-bit grey is
        scaled to 8 bits, and an EXIF orientation is applied.
    split: "train" is everything where a source has no splits.
    cache: folder to keep decoded data in; default: $HALFSTEP_CACHE, else ~/.cache/halfstep. The key holds the sizes and
        times of a local source's files. A hub name is decoded once: delete its cache folder to see a newer version.
    watch: is told how the decoding goes.
    stream: above 0, pictures are not decoded into the cache, but when they are asked for, and a training shuffles them
        within a buffer of so many. Of a folder, plain tars and tables.
    workers: processes that decode; None: one for each core.
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
    record = [CACHE_FORMAT, scheme, file_stats(scheme, place), size, channels, split, *(["stream"] if stream else [])]
    key = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:24]
    folder = (cache or cache_root()) / "data" / key
    how = _How(source=source, size=size, channels=channels, workers=workers, watch=watch)
    if stream:
        return _streamed(READERS[scheme](place, split), how, stream, folder)
    return _open_cache(folder, source) or _build(READERS[scheme](place, split), how, folder)


def file_stats(scheme: str, place: str) -> list:
    """What identifies the source's present content: its absolute path and each file's name, size and time."""
    with reading(place, "a path"):
        path = FASHION_IMAGES if scheme == "fashion" else Path(place).expanduser()
        if scheme == "digits" or (scheme == "hub" and not path.exists()):
            return [place]
        if scheme in SHARDED and not path.is_file():
            shards = [(file, file.stat()) for file in shard_files(place, scheme)]
            return [place, [(str(file.resolve()), s.st_size, s.st_mtime_ns) for file, s in shards]]
        for schemes, right, kind in (("idx", "folder"), path.is_dir, "folder"), (("npz",), path.is_file, "file"):
            if scheme in schemes and not right():
                got = f"no {kind}" if path.exists() else "nothing there"
                raise bad(path, got, f"a {kind} for {scheme}:", "check the path")
        names = [""] if path.is_file() else [str(name) for name in names_below(path) if not is_system(name.name)]
        stats = [(name, (path / name).stat()) for name in names]
        return [str(path.resolve()), [(name, s.st_size, s.st_mtime_ns) for name, s in stats]]


# ---- what every scheme shares --------------------------------------------------------------------------------------


def plain(index: torch.Tensor | np.ndarray | slice) -> np.ndarray | slice:
    """An index as numpy takes it."""
    return index.detach().cpu().numpy() if isinstance(index, torch.Tensor) else index


def _fingerprint(pixels: np.ndarray, labels: np.ndarray | None, shape: str = "") -> str:
    digest = hashlib.sha256(f"{shape or pixels.shape} {labels is not None}".encode())
    for start in range(0, len(pixels), 4096):
        digest.update(pixels[start : start + 4096].tobytes())
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


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


@dataclass(frozen=True, kw_only=True)
class _How:
    """How a source is read, as `load_images` was asked."""

    source: str
    size: int | None
    channels: int | None
    workers: int | None
    watch: Watch

    def workers_for(self, count: int) -> int:
        return workers_here(self.workers) if count >= FEW else 0

    def look(self, pictures: Pictures | Stream) -> Look:
        """The work on the pictures, as what was asked and, where that is open, the first one have it."""
        where, raw = next(pictures.read()) if isinstance(pictures, Stream) else pictures[0]
        with opened(where, raw) as image:
            first, channels = image.size, self.channels or (1 if is_grey(image) else 3)
        fixed = None if self.size else first
        return Look(pictures=pictures, first=fixed, side=self.size or first[0], channels=channels)


def _build(decoded: Source, how: _How, folder: Path) -> Images:
    """Decode into a sibling of the cache folder, which the next process goes on with if this one is killed, and rename
    it, so that a cache is whole or absent. Of several processes one decodes, and the others wait for it."""
    root, part = folder.parent, folder.with_name(f"{folder.name}.part")
    try:
        with one_at_a_time(folder.name, root.parent):
            images = _open_cache(folder, how.source)
            if images is None:
                shutil.rmtree(folder, ignore_errors=True)  # a cut or changed cache
                part.mkdir(parents=True, exist_ok=True)
                _write(decoded, how, part)
                os.replace(part, folder)
                images = _open_cache(folder, how.source)
        if images is None:
            raise OSError(f"{folder} cannot be written")
        return images
    except OSError as error:
        do = "set HALFSTEP_CACHE to a writable folder with enough space"
        raise bad(root, f"a failed write ({error})", "a writable cache", do) from error
    except DataError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        with suppress(OSError):  # it is gone, or holds what the next process goes on with
            part.rmdir()


def _write(decoded: Source, how: _How, folder: Path) -> None:
    look, labels = how.look(decoded.pictures), decoded.labels
    labels = None if labels is None else np.asarray(labels, dtype=np.int64)
    if (folder / "3.npy.part").exists() and how.channels is None:  # a process that was killed had found a colour
        look = replace(look, channels=3)
    done = _decode(how, look, labels, folder)
    if done is None:  # a picture in colour among grey ones: what is decoded is not what is wanted
        look = replace(look, channels=3)
        done = _decode(how, look, labels, folder)
        (folder / "1.npy.part").unlink(missing_ok=True)
    assert done is not None, "in three channels there is no such surprise"
    fingerprint, sizes = done
    os.replace(folder / f"{look.channels}.npy", folder / "pixels.npy")
    if labels is not None:
        np.save(folder / "labels.npy", labels)
    shape = (len(decoded.pictures), look.channels, look.side, look.side)
    record: dict = {"source": how.source, "shape": shape, "classes": decoded.classes, "fingerprint": fingerprint}
    record |= {"left_out": decoded.left_out, "sizes": sizes}
    (folder / "meta.json").write_text(json.dumps({**record, "check": _check(record)}))


def _decode(how: _How, look: Look, labels: np.ndarray | None, folder: Path) -> tuple[str, tuple[Size, Size]] | None:
    """Write the pixels of all pictures; returns their fingerprint, and the smallest and the largest size. None as soon
    as one is in colour where they were taken for grey.

    In order, rather than through a memory map: on a full disk a map ends the process with SIGBUS.
    """
    assert look.channels is not None
    count, guessed = len(look.pictures), how.channels is None and look.channels == 1
    shape = (count, look.channels, look.side, look.side)
    head = f"{shape} {labels is not None}".encode()
    growing = Growing(folder / f"{look.channels}.npy", shape, "|u1", head)
    with closing(growing) as pixels, how.watch.stage(f"decode {how.source}", count) as told:
        begun, before = time.perf_counter(), pixels.rows
        sizes = [(width, height) for width, height in pixels.note.get("sizes", ())]
        for seen in ahead(look, stretches(look.pictures, before), how.workers_for(count - before)):
            if guessed and not seen.grey:
                return None
            sizes = list(extremes([*sizes, *seen.sizes]))
            pixels.add(seen.array, {"sizes": sizes})
            told(pixels.rows, f"{(pixels.rows - before) / (time.perf_counter() - begun):.1f} pictures/s")
        digest = pixels.finish()
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()[:16], (sizes[0], sizes[-1])


# ---- without a decoded copy ----------------------------------------------------------------------------------------


def _streamed(decoded: Source, how: _How, buffer: int, folder: Path) -> Images:
    """The pictures where they lie. They are looked through once: their sizes, and a digest of each, go into the cache.

    Raises DataError for a source that has no pictures to decode, or none that can be read for itself.
    """
    pictures = decoded.pictures
    if isinstance(pictures, Stream) or isinstance(pictures[0][1], np.ndarray):
        got = "a packed archive" if isinstance(pictures, Stream) else "pixels"
        expected = "pictures that are read one by one: of a folder, of plain tars or of a table"
        raise bad(how.source, f"{got}, to be streamed", expected, "leave data.stream out, or unpack it")
    try:
        with one_at_a_time(folder.name, folder.parent.parent):
            known = _open_looked(folder, len(pictures))
            if known is None:
                folder.mkdir(parents=True, exist_ok=True)
                _look_through(pictures, how, folder)
                known = _open_looked(folder, len(pictures))
        if known is None:
            raise OSError(f"{folder} cannot be written")
    except OSError as error:
        do = "set HALFSTEP_CACHE to a writable folder"
        raise bad(folder.parent, f"a failed write ({error})", "a writable cache", do) from error
    digests, meta = known
    channels, side = meta["shape"][1:3]
    workers = workers_here(how.workers)
    labels = None if decoded.labels is None else np.asarray(decoded.labels, dtype=np.int64)
    if labels is not None:
        labels.flags.writeable = False
    encoded = Encoded(pictures=pictures, digests=digests, channels=channels, side=side, buffer=buffer, workers=workers)
    return Images(
        name=how.source,
        pixels=encoded,
        labels=labels,
        classes=decoded.classes,
        fingerprint=_fingerprint(digests, labels, f"encoded {encoded.shape}"),
        left_out=decoded.left_out,
        sizes=tuple((width, height) for width, height in meta["sizes"]),
    )


def _open_looked(folder: Path, count: int) -> tuple[np.ndarray, dict] | None:
    """What `_look_through` wrote, the digests in memory; None when it is absent, cut or changed."""
    try:
        meta = read_json(folder / "meta.json", what="what a cache holds", do="delete it")
        digests = np.array(open_array(folder / "digests.npy"))
        whole = meta.pop("check") == _check(meta) and digests.shape == (count,)
        return (digests, meta) if whole and _fingerprint(digests, None) == meta["digest"] else None
    except (ValueError, KeyError, TypeError):
        return None


def _look_through(pictures: Pictures, how: _How, folder: Path) -> None:
    """One pass over all pictures, of which nothing but the header is decoded."""
    count, look = len(pictures), replace(how.look(pictures), channels=None)
    growing = Growing(folder / "digests.npy", (count,), "<u8")
    with closing(growing) as digests, how.watch.stage(f"look through {how.source}", count) as told:
        sizes, grey = digests.note.get("sizes", ()), digests.note.get("grey", True)
        for seen in ahead(look, stretches(pictures, digests.rows), how.workers_for(count - digests.rows)):
            sizes, grey = extremes([*map(tuple, sizes), *seen.sizes]), grey and seen.grey
            digests.add(seen.array, {"sizes": sizes, "grey": grey})
            told(digests.rows)
        digests.finish()
    found = np.array(open_array(folder / "digests.npy"))
    shape = (count, how.channels or (1 if grey else 3), look.side, look.side)
    record: dict = {"shape": shape, "sizes": sizes, "digest": _fingerprint(found, None)}
    (folder / "meta.json").write_text(json.dumps({**record, "check": _check(record)}))


def _check(record: dict) -> str:
    """Changes with anything in a cache's record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
