"""Where images come from: one reader per scheme, each with its strict checks, giving a `Source` to decode."""

from __future__ import annotations

import errno
import gzip
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from halfstep.core.bundled import FASHION_IMAGES
from halfstep.core.errors import DataError
from halfstep.core.recipe import RunRecord
from halfstep.data.layout import arrange, is_system, sift

MAX_CLASSES = 1 << 16
MAX_FILE_BYTES = 1 << 28  # of one image file: an archive member that claims more is not read into memory
FREE_BYTES = 1 << 30  # what a packed file may become whatever its size
MAX_RATIO = 100  # above, how many times larger than packed; pictures shrink by 2 to 20, a bomb by 1,000


Raw = Path | bytes | np.ndarray
"""A picture as it lies there: a file, its bytes, or pixels."""


class Pictures(Protocol):
    """Pictures with where they lie, each for itself, in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int, /) -> tuple[object, Raw]: ...


@dataclass(frozen=True)
class Stream:
    """Pictures that can only be read one after another."""

    read: Callable[[], Iterator[tuple[object, Raw]]]
    count: int

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class _Arrays:
    """Pictures in memory, uint8 [N, H, W] or [N, H, W, C]."""

    where: object
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> tuple[str, np.ndarray]:
        return f"{self.where}: image {k}", self.images[k]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Pictures as pairs (where, image), in the same order each time; labels and classes belong to them.

    left_out: what lies there and is not read, a reason with its count each.
    """

    pictures: Pictures | Stream
    labels: list[int] | np.ndarray | None = None
    classes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def bad(where: object, got: str, expected: str, do: str) -> DataError:
    return DataError(got=got, expected=expected, where=where, do=do)


@contextmanager
def reading(where: object, expected: str) -> Iterator[None]:
    """Whatever goes wrong inside is a DataError that names `where`.

    Catches Exception: the decoders of images and archives raise OSError, ValueError, SyntaxError, struct.error, ...
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise bad(where, f"what cannot be read ({reason})", expected, "repair or replace it") from error


def names_below(root: Path) -> list[PurePosixPath]:
    """Every file below a folder, relative and sorted; a system's folders by their own name, without looking inside.

    Runs of ours are no data, so that `--out` may lie inside. Links are followed; a loop, a closed folder and what is no
    file (a pipe, a device) are refused.
    """
    names, seen = [], set()
    with reading(root, "folders that can be listed"):
        for folder, inner, files in os.walk(root, followlinks=True, onerror=_raise):  # by default it skips in silence
            real = os.path.realpath(folder)
            if real in seen:
                raise bad(folder, "a folder that was met before", "links without loops", "remove the link")
            seen.add(real)
            names += [Path(folder, name) for name in inner if is_system(name)]
            inner[:] = [name for name in inner if not is_system(name) and not RunRecord.is_in(Path(folder, name))]
            for name in files:
                _require_file(Path(folder, name))
            names += [Path(folder, name) for name in files]
    return sorted(PurePosixPath(name.relative_to(root).as_posix()) for name in names)


def _require_file(path: Path) -> None:
    if is_system(path.name):
        return
    try:
        kind = path.stat().st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        raise bad(path, "a link that leads nowhere", "a file", "remove the link") from error
    if not stat.S_ISREG(kind):
        raise bad(path, "a pipe, a socket or a device", "a file", "remove it")


def _raise(error: OSError) -> None:
    raise error


def _known_split(split: str, known: tuple[str, ...], where: object) -> None:
    if split not in known:
        raise bad(where, f"split {split!r}", f"one of: {', '.join(known)}", "name a split that it has")


def _arrays(images: np.ndarray, labels: np.ndarray | None, where: object, others: Iterable[np.ndarray] = ()) -> Source:
    """A source of uint8 images [N, H, W] or [N, H, W, C] and labels, integers [N] or [N, 1].

    The classes are the distinct numbers among the labels and `others`, those of the other splits.
    """
    if images.size == 0:
        raise bad(where, f"images of shape {list(images.shape)}", "at least one image", "give another file")
    source = Source(pictures=_Arrays(where, images))
    if labels is None:
        return source
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        got, expected = f"labels {labels.dtype} {list(labels.shape)}", f"integers [{len(images)}]"
        raise bad(where, got, expected, "give one class number per image, or no labels")
    numbers = np.unique(labels)
    for other in others:
        if other.dtype.kind in "iu":
            numbers = np.union1d(numbers, other)
    if numbers[0] < 0 or numbers[-1] >= 1 << 63 or len(numbers) > MAX_CLASSES:
        got, expected = (
            f"labels {numbers[0]} to {numbers[-1]}, {len(numbers)} numbers",
            f"0 or more, {MAX_CLASSES} at most",
        )
        raise bad(where, got, expected, "number the classes, or give no labels")
    return replace(source, labels=np.searchsorted(numbers, labels), classes=tuple(str(number) for number in numbers))


def require_size(where: object, size: int, packed: int) -> None:
    """Refuse, before memory is asked for, what claims to be far larger than its packed bytes."""
    if size > max(FREE_BYTES, MAX_RATIO * packed):
        got, expected = f"{size} bytes packed into {packed}", f"at most {MAX_RATIO} times as many"
        raise bad(where, got, expected, "keep it unpacked, or in smaller files")


def _digits(place: str, split: str) -> Source:
    """scikit-learn's 1797 handwritten 8x8 digits, 0..16 scaled to 0..255; 1500 to train and 297 to test."""
    from sklearn.datasets import load_digits

    _known_split(split, ("train", "test"), "digits")
    digits = load_digits()
    # The file is ordered by writer: a seeded shuffle gives both splits the same writers.
    order = np.random.default_rng(0).permutation(len(digits.images))
    order = order[:1500] if split == "train" else order[1500:]
    return _arrays(np.rint(digits.images[order] * (255 / 16)).astype(np.uint8), digits.target[order], "digits")


def _idx(place: str, split: str) -> Source:
    """The MNIST family: `train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte` and so on, plain or .gz."""
    folder = Path(place).expanduser()
    _known_split(split, ("train", "test"), folder)
    stem = {"train": "train", "test": "t10k"}[split]
    images = _idx_file(folder, f"{stem}-images", 3)
    if images is None:
        expected = f"{stem}-images-idx3-ubyte, plain or .gz"
        raise bad(folder, "no such file", expected, "check the folder and the split")
    labels = {stem: _idx_file(folder, f"{stem}-labels", 1) for stem in ("train", "t10k")}
    return _arrays(images, labels[stem], folder, [other for other in labels.values() if other is not None])


def _idx_file(folder: Path, stem: str, ndim: int) -> np.ndarray | None:
    """uint8 array of an IDX file, None if there is none: bytes 0, 0, type 8, ndim; ndim big-endian sizes; values."""
    names = [f"{stem}{dot}idx{ndim}-ubyte{gz}" for gz in ("", ".gz") for dot in "-."]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return None
    zipped = path.suffix == ".gz"
    with reading(path, "a whole IDX file"), (gzip.open if zipped else open)(path, "rb") as file:
        head = file.read(4 + 4 * ndim)
        if len(head) != 4 + 4 * ndim or head[:4] != bytes((0, 0, 8, ndim)):
            expected = f"an IDX header: magic 0000080{ndim} and {ndim} sizes"
            raise bad(path, f"a header {head.hex()}", expected, "give an IDX file of unsigned bytes")
        shape = np.frombuffer(head, dtype=">u4")[1:].tolist()
        count = math.prod(shape)
        stored = path.stat().st_size
        if zipped:
            require_size(path, count, stored)
        body = file.read(count + 1) if zipped or count <= stored else b""
    if len(body) != count:
        got = "more values" if len(body) > count else "fewer values"
        raise bad(path, got, f"{count} for sizes {shape}", "fetch the file again")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _npz(place: str, split: str) -> Source:
    """`images`, `x` or `arr_0` with `labels` or `y`; or by split `x_train`, `train_images` with `y_train`, ..."""
    path = Path(place).expanduser()
    with reading(path, "an .npz of plain arrays, without pickled objects"):
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise OSError("one .npy array")
        with loaded as file:
            pairs = [([f"x_{split}", f"{split}_images"], [f"y_{split}", f"{split}_labels"])]
            if split == "train":
                pairs.append((["images", "x", "arr_0"], ["labels", "y", "arr_1"]))
            found = [(name, targets) for names, targets in pairs for name in names if name in file.files]
            if not found:
                known = ", ".join(name for names, _ in pairs for name in names)
                got = f"arrays {', '.join(file.files) or 'none'}"
                raise bad(path, got, f"one of {known} for split {split!r}", "rename the images' array")
            name, targets = found[0]
            target = next((target for target in targets if target in file.files), None)
            images, labels = _member(file, name, path), None if target is None else _member(file, target, path)
            splits = [other for other in file.files if re.fullmatch(r"y_\w+|\w+_labels", other)] if target else []
            others = [_member(file, other, path) for other in splits if other != target]
    return _arrays(_channels_last(_bytes(images, f"{path}: {name}"), f"{path}: {name}"), labels, path, others)


def _member(file: np.lib.npyio.NpzFile, name: str, path: Path) -> np.ndarray:
    """One array of an .npz, whose header says how much memory it wants."""
    assert file.zip is not None, "an open .npz has its archive"
    stored = f"{name}.npy" if f"{name}.npy" in file.zip.namelist() else name
    with file.zip.open(stored) as head:
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(head)
    require_size(f"{path}: {name}", math.prod(shape) * dtype.itemsize, file.zip.getinfo(stored).compress_size)
    return file[name]


def _bytes(images: np.ndarray, where: str) -> np.ndarray:
    """uint8 from uint8, or from floats in [0, 1] or [-1, 1]."""
    if images.dtype == np.uint8 or images.size == 0:
        return images
    if images.dtype.kind != "f":
        raise bad(where, f"{images.dtype} values", "uint8, or floats in [0, 1] or [-1, 1]", "convert them first")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1 and high <= 1):  # so that NaN is refused too
        raise bad(where, f"values from {low} to {high}", "floats in [0, 1] or [-1, 1]", "scale them first")
    values = images.astype(np.float32)
    return np.rint(values * 255 if low >= 0 else (values + 1) * 127.5).astype(np.uint8)


def _channels_last(images: np.ndarray, where: str) -> np.ndarray:
    """[N, H, W] or [N, H, W, C] from NHW, NHWC or NCHW, where C is 1, 3 or 4."""
    if images.ndim == 3:
        return images
    last = images.ndim == 4 and images.shape[3] in (1, 3, 4)
    first = images.ndim == 4 and images.shape[1] in (1, 3, 4)
    if last and first:  # tiny images: only one reading is square
        last, first = images.shape[1] == images.shape[2], images.shape[2] == images.shape[3]
    if last == first:
        expected = "NHW, NHWC or NCHW with 1, 3 or 4 channels"
        raise bad(where, f"shape {list(images.shape)}", expected, "reorder its axes")
    images = images if last else images.transpose(0, 2, 3, 1)
    return images[..., 0] if images.shape[3] == 1 else images


FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def _fashion(place: str, split: str) -> Source:
    """The bundled pictures of Fashion-MNIST, 16x16, equally many of each class: 6,000 to train and 1,000 to test."""
    _known_split(split, ("train", "test"), "fashion")
    return replace(_npz(str(FASHION_IMAGES), split), classes=FASHION_CLASSES)


def _folder(place: str, split: str) -> Source:
    """Image files at any depth; folders by the names of splits are splits; the first sub-folder is the class."""
    root = Path(place).expanduser()
    names = names_below(root)
    pictures, left_out = sift(names, root)
    found = arrange([names[i] for i in pictures], split, root)
    files = [(str(root / names[pictures[i]]), root / names[pictures[i]]) for i in found.chosen]
    return Source(
        pictures=files,
        labels=found.labels,
        classes=found.classes,
        left_out=found.left_out + left_out,
    )


READERS: dict[str, Callable[[str, str], Source]] = {
    "digits": _digits, "fashion": _fashion, "idx": _idx, "folder": _folder, "npz": _npz,
}  # fmt: skip
