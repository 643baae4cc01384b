"""Where images come from: one reader per scheme, each with its strict checks, giving a `Source` to decode."""

from __future__ import annotations

import gzip
import math
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from halfstep.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Files that commonly lie beside images. Any other non-image is refused, so that no picture is left out unnoticed.
SIDECARS = ("", ".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".html", ".yaml", ".yml", ".db", ".ini")
SPLITS = ("train", "test", "val", "validation")
MAX_CLASSES = 1 << 16
MAX_FILE_BYTES = 1 << 28  # of one image file: an archive member that claims more is not read into memory


@dataclass(frozen=True, kw_only=True)
class Source:
    """`items()` yields `count` pairs (where, image) in the same order each time; labels and classes belong to them.

    left_out: what lies there and is not read, a reason with its count each.
    """

    items: Callable[[], Iterable[tuple[str, Path | bytes | np.ndarray]]]
    count: int
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


def _files(root: Path) -> list[Path]:
    """Every file below a folder, sorted; links are followed, a loop or a closed folder is refused."""
    files, seen = [], set()
    with reading(root, "folders that can be listed"):
        for folder, _, names in os.walk(root, followlinks=True, onerror=_raise):  # by default walk skips in silence
            real = os.path.realpath(folder)
            if real in seen:
                raise bad(folder, "a folder that was met before", "links without loops", "remove the link")
            seen.add(real)
            files += [Path(folder, name) for name in names]
    return sorted(files)


def _raise(error: OSError) -> None:
    raise error


def file_stats(scheme: str, place: str) -> list:
    """What identifies the source's present content: its absolute path and each file's name, size and time."""
    path = Path(place).expanduser()
    if scheme == "digits" or (scheme == "hub" and not path.exists()):
        return [place]
    for schemes, right, kind in (("idx", "folder"), path.is_dir, "folder"), (("npz", "tar"), path.is_file, "file"):
        if scheme in schemes and not right():
            got = f"no {kind}" if path.exists() else "nothing there"
            raise bad(path, got, f"a {kind} for {scheme}:", "check the path")
    stats = [(file, file.stat()) for file in ([path] if path.is_file() else _files(path))]
    return [str(path.resolve()), [(str(file.relative_to(path)), s.st_size, s.st_mtime_ns) for file, s in stats]]


def _known_split(split: str, known: tuple[str, ...], where: object) -> None:
    if split not in known:
        raise bad(where, f"split {split!r}", f"one of: {', '.join(known)}", "name a split that it has")


def _arrays(images: np.ndarray, labels: np.ndarray | None, where: object) -> Source:
    """A source of uint8 images [N, H, W] or [N, H, W, C] and labels, integers [N] or [N, 1]."""
    if images.size == 0:
        raise bad(where, f"images of shape {list(images.shape)}", "at least one image", "give another file")
    source = Source(items=lambda: ((f"{where}: image {i}", x) for i, x in enumerate(images)), count=len(images))
    if labels is None:
        return source
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        got, expected = f"labels {labels.dtype} {list(labels.shape)}", f"integers [{len(images)}]"
        raise bad(where, got, expected, "give one class number per image, or no labels")
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        got, expected = f"labels {labels.min()} to {labels.max()}", f"0 to at most {MAX_CLASSES - 1}"
        raise bad(where, got, expected, "number the classes from 0")
    return replace(source, labels=labels, classes=tuple(str(label) for label in range(int(labels.max()) + 1)))


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
    return _arrays(images, _idx_file(folder, f"{stem}-labels", 1), folder)


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
        # gzip cannot shrink more than 1032 to 1: a header that claims more lies, and is not given memory.
        fits = count <= path.stat().st_size * (1032 if zipped else 1)
        body = file.read(count + 1) if fits else b""
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
            images, labels = file[name], None if target is None else file[target]
    return _arrays(_channels_last(_bytes(images, f"{path}: {name}"), f"{path}: {name}"), labels, path)


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


def _is_image(path: PurePosixPath, where: object) -> bool:
    if any(part.startswith(".") for part in path.parts) or path.suffix.lower() in SIDECARS:
        return False
    if path.suffix.lower() not in SUFFIXES:
        raise bad(f"{where}/{path}", f"a {path.suffix} file", f"images ({' '.join(SUFFIXES)})", "convert or remove it")
    return True


def _layout(paths: list[PurePosixPath], split: str, where: object) -> tuple[list[int], list[int] | None, tuple]:
    """Which paths belong to the split, their labels or None, and the classes."""
    if not paths:
        raise bad(where, "no images", f"image files ({' '.join(SUFFIXES)})", "check the path")
    parts = [path.parts for path in paths]
    tops = {part[0] if len(part) > 1 else "" for part in parts}
    chosen = list(range(len(paths)))
    # A lone `train` may be a class (CIFAR-100 has one): splits are `train` and `test` together, or nothing but splits.
    if tops >= {"train", "test"} or tops <= set(SPLITS):
        _known_split(split, tuple(sorted(tops & set(SPLITS))), where)
        chosen = [i for i in chosen if parts[i][0] == split]
        parts = [part[1:] if part[0] in SPLITS else () for part in parts]
    else:
        _known_split(split, ("train",), where)
    if any(len(parts[i]) < 2 for i in chosen):
        return chosen, None, ()
    classes = sorted({part[0] for part in parts if len(part) > 1})  # of all splits, so that they number them alike
    number = {name: label for label, name in enumerate(classes)}
    return chosen, [number[parts[i][0]] for i in chosen], tuple(classes)


def _folder(place: str, split: str) -> Source:
    """Image files at any depth; `train/` and `test/` are splits; the first sub-folder is the class."""
    root = Path(place).expanduser()
    every = [PurePosixPath(file.relative_to(root).as_posix()) for file in _files(root)]
    paths = [path for path in every if _is_image(path, root)]
    chosen, labels, classes = _layout(paths, split, root)
    files = [(str(root / paths[i]), root / paths[i]) for i in chosen]
    return Source(items=lambda: files, count=len(files), labels=labels, classes=classes)


def _tar(place: str, split: str) -> Source:
    """A tar, .tar.gz or .tar.xz laid out like a folder, inside one folder or not; read as a stream, in its order."""
    archive = Path(place).expanduser()
    names = [name for name, _ in _members(archive, None)]
    for name, count in Counter(names).most_common(1):
        if count > 1:
            raise bad(
                f"{archive}:{name}", f"a name that comes {count} times", "distinct names", "write the archive anew"
            )
    paths = [PurePosixPath(name) for name in names]
    tops = {path.parts[0] for path in paths}
    while len(tops) == 1 and not tops & set(SPLITS) and all(len(path.parts) > 2 for path in paths):
        paths = [PurePosixPath(*path.parts[1:]) for path in paths]  # all lie in the folder that was packed
        tops = {path.parts[0] for path in paths}
    chosen, labels, classes = _layout(paths, split, archive)
    keep = {names[i] for i in chosen}
    return Source(items=lambda: _members(archive, keep), count=len(chosen), labels=labels, classes=classes)


def _members(path: Path, keep: set[str] | None) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the image members in `keep`; None lists the names of all, with no content."""
    with reading(path, "a whole tar, .tar.gz or .tar.xz"), tarfile.open(path, "r:*") as tar:
        for member in tar:
            if member.isdir() or not _is_image(PurePosixPath(member.name), path):
                continue
            if not member.isfile() or member.size > MAX_FILE_BYTES:
                got, expected = "a link or a device, or too large a file", f"files up to {MAX_FILE_BYTES >> 20} MiB"
                raise bad(f"{path}:{member.name}", got, expected, "write the archive anew")
            if keep is None:
                yield member.name, b""
            elif member.name in keep:
                file = tar.extractfile(member)
                assert file is not None, "a regular member has content"
                yield f"{path}:{member.name}", file.read()
        # tarfile takes a cut or damaged header for the end. The real end is a block of zeros; behind it, gzip and xz
        # keep the checksum of everything, which they compare only when all is read.
        stream = tar.fileobj
        assert stream is not None, "an open archive has its file"
        stream.seek(tar.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise bad(path, "an archive that is cut short or damaged", "a whole tar", "fetch the file again")
        while stream.read(1 << 20):
            pass


def _hub(place: str, split: str) -> Source:
    """A dataset of the Hugging Face hub, or of a local folder: its Image column, and its ClassLabel column if any."""
    import datasets

    where = f"hub:{place}"
    local = Path(place).expanduser()
    with reading(where, f"a dataset with a split {split!r}"):
        table = datasets.load_dataset(str(local) if local.exists() else place, split=split)
    columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if len(columns) != 1 or len(table) == 0:
        got = f"{len(table)} rows with {len(columns)} image columns among {', '.join(table.column_names)}"
        raise bad(where, got, "rows with one image column", "save a copy with one image column")
    named = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    target = "label" if "label" in named else next(iter(named), None)  # the first: CIFAR-100 begins with the fine one
    labels = None if target is None else list(table[target])
    if labels is not None and all(label in (None, -1) for label in labels):  # how the hub marks a split without labels
        labels = None
    if labels is not None and any(label in (None, -1) for label in labels):
        raise bad(where, f"rows without {target}", "a label in every row", "remove these rows")
    raw = table.select_columns(columns).cast_column(columns[0], datasets.Image(decode=False))
    classes = () if labels is None else tuple(table.features[target].names)
    return Source(items=lambda: _rows(raw, columns[0], where), count=len(table), labels=labels, classes=classes)


def _rows(table: Iterable[dict], column: str, where: str) -> Iterator[tuple[str, Path | bytes]]:
    for number, row in enumerate(table):
        value = row[column] or {}
        name = f"{where}: row {number} {value.get('path') or ''}".strip()
        if not value.get("bytes") and not value.get("path"):
            raise bad(name, "no image", "an image in every row", "remove this row")
        yield name, value.get("bytes") or Path(value["path"])


READERS: dict[str, Callable[[str, str], Source]] = {
    "digits": _digits, "idx": _idx, "folder": _folder, "npz": _npz, "tar": _tar, "hub": _hub,
}  # fmt: skip
