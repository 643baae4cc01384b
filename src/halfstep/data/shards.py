"""Pictures in tars, one or many shards as webdataset writes them: an index of where each lies, and reading there.

    tar:FILE.tar                    laid out like a folder, or `key.png` with its class in `key.cls`
    tar:DIR                         every tar below it; tar:shards/train-*.tar and tar:train-{000..123}.tar: these
    tar:FILE.tar.gz (.xz, .bz2)     one packed tar, read as a stream

A shard's index is made in one walk over its headers and kept in the cache; shards are indexed side by side.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import json
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from halfstep.core import disk
from halfstep.core.errors import HalfstepError, printable
from halfstep.data.ahead import ahead, workers_here
from halfstep.data.arrays import cache_root, read_arrays, save_arrays
from halfstep.data.layout import Sieve, arrange, arrange_folders, in_order, sift, split_of, told
from halfstep.data.sources import MAX_CLASSES, Source, Stream, bad, names_below, reading
from halfstep.data.tars import (
    Unpacked,
    content_of,
    is_packed,
    members,
    refuse_twins,
    require_regular,
    streamed,
    walking,
)

INDEX_FORMAT = 1  # part of the key of a shard's index: raise it when `_Indexing` gives something else
MAX_INDEX = 1 << 32  # bytes of one that is read
MAX_SHARDS = 100_000
LARGE_BYTES = 1 << 25  # of shards, above which they are worth starting processes
MAX_LABEL = 200  # letters of a class in a .cls
CLASS = ".cls"


def read_tar(place: str, split: str) -> Source:
    """The pictures of a split in a tar or in shards, in the order of the shards and of what is in each.

    Classes are those of the `.cls` beside the pictures, else the folders inside. Raises: DataError, naming the shard.
    """
    files = shard_files(place)
    if is_packed(files[0]) and len(files) == 1:
        return _packed(files[0], split)
    shards = index_of(files)
    taken, arranged = _taken(shards, split_files(files, place, split), place)
    left_out = sum((Counter(shard.left) for shard in shards), Counter[str]()) if len(shards) > 1 else shards[0].left
    if not any(len(rows) for rows in taken):
        raise bad(place, "no images", "some in the split", "name a split that has some")
    pictures = Members.of(shards, taken)
    labels = None
    if arranged.classes:
        labels = np.concatenate([arranged.labels[k][rows] for k, rows in enumerate(taken)])
    return Source(
        pictures=pictures,
        labels=labels,
        classes=arranged.classes,
        left_out=told(arranged.left_out) + told(Counter(left_out)),
    )


# ---- which files ---------------------------------------------------------------------------------------------------


def shard_files(place: str, kind: str = "tar") -> list[Path]:
    """The files of this `kind` that a place names: itself, those below a folder, those of a {000..123}, of a {a,b} or
    of a glob, in order. Raises DataError where one that is named is missing, or none is found."""
    with reading(place, "a path"):
        path = Path(place).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            found = [path / name for name in names_below(path) if f".{kind}" in Path(name.name).suffixes]
        elif "{" in place:
            found = [one for name in _expanded(str(path)) for one in _globbed(name)]
        else:
            found = _globbed(str(path))
    if not found or len(found) > MAX_SHARDS:
        got = f"{len(found):,} files .{kind}" if path.is_dir() or found else "nothing there"
        raise bad(path, got, f"a .{kind} file, or a folder of 1 to {MAX_SHARDS:,}", f"check the path for {kind}:")
    missing = next((one for one in found if not one.is_file()), None)
    if missing is not None:
        got = "no file" if missing.exists() else "nothing there"
        raise bad(missing, got, f"a .{kind} file, as {printable(place)} says", "fetch it, or name the shards there are")
    return found


def _globbed(name: str) -> list[Path]:
    return [Path(one) for one in sorted(glob.glob(name))] if re.search(r"[*?\[]", name) else [Path(name)]


def _expanded(text: str) -> list[str]:
    """Every name of a text with braces, as shells and webdataset write it: {000..123} or {a,b}, also several."""
    found = re.search(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}|\{([^{}]*,[^{}]*)\}", text)
    if not found:
        return [text]
    first, last, words = found.groups()
    if words is None:
        if not 0 <= int(last) - int(first) < MAX_SHARDS:
            raise bad(text, found[0], f"{{first..last}} of 1 to {MAX_SHARDS:,}", "mend the braces")
        parts = [str(k).zfill(len(first) if first.startswith("0") else 0) for k in range(int(first), int(last) + 1)]
    else:
        parts = words.split(",")
    return [name for part in parts for name in _expanded(text[: found.start()] + part + text[found.end() :])]


def split_files(files: Sequence[Path], place: str, split: str) -> tuple[str, list[bool]]:
    """Which of several files belong to a split, and as which split what is in them is then read.

    Their folders or names (train/000.tar, train-00000-of-00010.parquet) say it, where every one does and one is for
    training and another is not; otherwise all belong together. Raises DataError for a split that there is not.
    """
    kinds = [_split_named(file, Path(place).expanduser()) for file in files]
    known = {kind for kind in kinds if kind}
    if None in kinds or not {"train"} < known:
        return split, [True] * len(files)
    wanted = split_of(split) or split
    if wanted not in known:
        expected = f"one of: {', '.join(sorted(known))}"
        raise bad(place, f"split {split!r}", expected, "name a split that it has")
    return "train", [kind == wanted for kind in kinds]


def _split_named(file: Path, root: Path) -> str | None:
    """The split that a folder below `root` or the words of a file's name say."""
    folders = file.relative_to(root).parts[:-1] if file.is_relative_to(root) else (file.parent.name,)
    words = [word for word in re.split(r"[-_.]", file.name.split(".tar")[0].split(".parquet")[0]) if word]
    return next((kind for one in (*folders[:1], *words) if (kind := split_of(one))), None)


# ---- the index -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """Where the n pictures of one tar lie, in its order.

    state: the file's size and time when it was indexed.  offset, size: int64 [n], in bytes.  folder: int32 [n], in
    `folders`.  label: int32 [n], in `labels`, what the `.cls` say; -1 where there is none.  left: what is no picture.
    unlabelled: the first picture without a `.cls`, "" where all or none have one.
    """

    file: Path
    state: tuple[int, int]
    offset: np.ndarray
    size: np.ndarray
    folder: np.ndarray
    folders: tuple[tuple[str, ...], ...]
    label: np.ndarray
    labels: tuple[str, ...]
    left: dict[str, int]

    def __len__(self) -> int:
        return len(self.offset)


def index_of(files: Sequence[Path], workers: int | None = None) -> list[Shard]:
    """The indices of tars, from the cache or made side by side. Raises DataError for a shard that is not whole, holds a
    name twice or is not what a folder of pictures may be."""
    keys = [_key(file) for file in files]
    found = [_kept(file, key) for file, key in zip(files, keys, strict=True)]
    missing = [k for k, shard in enumerate(found) if shard is None]
    large = len(missing) > 1 and sum(files[k].stat().st_size for k in missing) > LARGE_BYTES
    made = ahead(index_shard, [files[k] for k in missing], workers_here(workers) if large else 0)
    for k, shard in zip(missing, made, strict=True):
        found[k] = shard
        _keep(shard, keys[k])
    return [shard for shard in found if shard is not None]


def index_shard(file: Path) -> Shard:
    """The index of one plain tar, by one walk over its headers. Raises DataError."""
    if is_packed(file):
        raise bad(file, "a packed tar among shards", "plain tars: pictures are packed already", "unpack it")
    indexing = _Indexing(file)
    stat = file.stat()
    with walking(file) as (found, stream):
        for member in found:
            indexing.take(member, stream)
    return indexing.done((stat.st_size, stat.st_mtime_ns))


class _Indexing:
    """An index in the making: members are taken in the tar's order, those of one key (webdataset's name up to the
    first dot) one after another."""

    def __init__(self, file: Path):
        self.file, self.sieve = file, Sieve(file)
        columns = {"offset": "q", "size": "q", "folder": "q", "label": "q", "name": "Q"}
        self.rows = {name: array(kind) for name, kind in columns.items()}  # 8 bytes a number: lists take 40
        self.folders: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.key, self.begin, self.number = "", 0, -1  # of the present sample: its first picture, its class
        self.unlabelled = ""

    def take(self, member: tarfile.TarInfo, stream: Unpacked) -> None:
        folder, _, base = member.name.rpartition("/")
        key = f"{folder}/{base.split('.', 1)[0]}"
        if key != self.key:
            self._end()
            self.key = key
        if base.endswith(CLASS) and not base.startswith("."):
            self._label(member, stream)
        elif self.sieve.takes(PurePosixPath(member.name)):
            require_regular(member, self.file)
            if len(self.rows["offset"]) == self.begin:
                self.first = member.name
            row = (member.offset_data, member.size, self.folders.setdefault(folder, len(self.folders)), -1)
            for name, value in zip(self.rows, (*row, _short(member.name)), strict=True):
                self.rows[name].append(value)

    def _label(self, member: tarfile.TarInfo, stream: Unpacked) -> None:
        where = f"{self.file}:{member.name}"
        text = content_of(member, stream, self.file).decode("utf-8", "replace").strip()
        if not text.isprintable() or not 1 <= len(text) <= MAX_LABEL or "\ufffd" in text:
            raise bad(where, f"a class {text[:20]!r}", "a number or a name in one line", "mend that file")
        if self.number >= 0:
            raise bad(where, "a second class", "one for each key", "write the archive anew")
        text = str(int(text)) if re.fullmatch("[0-9]{1,18}", text) else text
        self.number = self.labels.setdefault(text, len(self.labels))

    def _end(self) -> None:
        """End a sample: its pictures get its class."""
        count = len(self.rows["offset"]) - self.begin
        if self.number >= 0:
            if count != 1:
                got, do = f"{count} pictures of one key with a class", "write the files of each key one after another"
                raise bad(f"{self.file}:{self.key.lstrip('/')}", got, f"one beside its {CLASS}", do)
            self.rows["label"][-1] = self.number
        elif count and not self.unlabelled:
            self.unlabelled = self.first
        self.begin, self.number = self.begin + count, -1

    def done(self, state: tuple[int, int]) -> Shard:
        """The index. Raises DataError for a name that comes twice, and for classes of some pictures only."""
        self._end()
        names = np.array(self.rows.pop("name"), dtype=np.uint64)
        if len(np.unique(names)) < len(names):
            self._refuse_twins()
        if self.labels and self.unlabelled:
            got, expected = f"no {CLASS} beside this picture", "one beside each, as others there have"
            raise bad(f"{self.file}:{self.unlabelled}", got, expected, "write it, next to its picture")
        rows = {name: np.array(column, dtype=np.int64) for name, column in self.rows.items()}
        folders = tuple(PurePosixPath(folder).parts for folder in self.folders)
        left = dict(self.sieve.left())
        return Shard(file=self.file, state=state, folders=folders, labels=tuple(self.labels), left=left, **rows)

    def _refuse_twins(self) -> None:
        names = [name for name in members(self.file) if not name.endswith(CLASS)]
        pictures, _ = sift(map(PurePosixPath, names), self.file)
        refuse_twins([names[k] for k in pictures], self.file)


def _short(name: str) -> int:
    """64 bits of a name, by which it is told from a million others."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def _key(file: Path) -> str:
    stat = file.stat()
    record = [INDEX_FORMAT, str(file.resolve()), stat.st_size, stat.st_mtime_ns]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:32]


_COLUMNS = ("offset", "size", "folder", "label")


def _keep(shard: Shard, key: str) -> None:
    about = [shard.state, shard.folders, shard.labels, shard.left]
    arrays = {name: getattr(shard, name) for name in _COLUMNS}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    with suppress(HalfstepError):  # a cache that cannot be written: it is made again the next time
        disk.write_atomic(cache_root() / "shards" / f"{key}.npz", lambda path: save_arrays(path, arrays))


def _kept(file: Path, key: str) -> Shard | None:
    """What `_keep` wrote; None when it is absent or damaged."""
    try:
        arrays = read_arrays(cache_root() / "shards" / f"{key}.npz", MAX_INDEX, what="an index", do="delete it")
        state, folders, labels, left = json.loads(arrays.pop("about").tobytes())
        columns: dict[str, Any] = {name: arrays[name] for name in _COLUMNS}
        columns |= {"folders": tuple(map(tuple, folders)), "labels": tuple(labels), "left": dict(left)}
        return Shard(file=file, state=tuple(state), **columns)
    except (ValueError, KeyError, TypeError):  # an error of ours is a ValueError
        return None


# ---- what is in a split --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Arranged:
    """labels: of each shard int64 [n], the class of every picture, -1 where it is left out."""

    labels: list[np.ndarray]
    classes: tuple[str, ...]
    left_out: Counter[str]


def _taken(shards: Sequence[Shard], asked: tuple[str, list[bool]], place: str) -> tuple[list[np.ndarray], _Arranged]:
    """Of each shard the rows of the pictures that belong to the split, and the classes of all."""
    split, mine = asked
    by_file = any(shard.labels for shard in shards)
    arranged = _by_cls(shards, place) if by_file else _by_folders(shards, split, place)
    if by_file and (split_of(split) or split) != "train":
        raise bad(place, f"split {split!r}", "one of: train", "name a split that it has")
    rows = [np.flatnonzero(label >= 0) if kept else np.empty(0, np.int64)
            for label, kept in zip(arranged.labels, mine, strict=True)]  # fmt: skip
    return rows, arranged


def _by_cls(shards: Sequence[Shard], place: str) -> _Arranged:
    bare = next((shard for shard in shards if len(shard) and not shard.labels), None)
    if bare is not None:
        got, expected = f"a shard without any {CLASS}", "one beside each picture, as the other shards have"
        raise bad(bare.file, got, expected, "write the missing classes, or leave that shard out")
    classes = in_order(name for shard in shards for name in shard.labels)  # of all splits
    if len(classes) > MAX_CLASSES:
        raise bad(place, f"{len(classes)} classes", f"{MAX_CLASSES} at most", f"remove the {CLASS} files")
    number = {name: k for k, name in enumerate(classes)}
    tables = [np.array([number[name] for name in shard.labels], dtype=np.int64) for shard in shards]
    labels = [table[shard.label] if len(shard) else shard.label for shard, table in zip(shards, tables, strict=True)]
    return _Arranged(labels=labels, classes=tuple(map(printable, classes)), left_out=Counter())


def _by_folders(shards: Sequence[Shard], split: str, place: str) -> _Arranged:
    counts = Counter[tuple[str, ...]]()
    for shard in shards:
        for folder, n in zip(shard.folders, np.bincount(shard.folder, minlength=len(shard.folders)), strict=True):
            counts[folder] += int(n)
    found = arrange_folders(list(counts), list(counts.values()), split, place)
    number = dict(zip(counts, found.label, strict=True))
    labels = []
    for shard in shards:
        table = [-1 if number[folder] is None else number[folder] for folder in shard.folders]
        labels.append(np.array(table, dtype=np.int64)[shard.folder] if len(shard) else shard.folder)
    return _Arranged(labels=labels, classes=found.classes, left_out=found.left_out)


def chosen_names(place: str, split: str) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Of each shard its file, the names of all that is in it, and of the pictures that belong to the split, in the
    order of `read_tar`. Raises: DataError."""
    files = shard_files(place)
    if is_packed(files[0]) and len(files) == 1:
        names = members(files[0])
        yield files[0], names, [names[k] for k in _arranged_names(names, split, files[0])[0]]
        return
    shards = index_of(files)
    taken, _ = _taken(shards, split_files(files, place, split), place)
    for shard, rows in zip(shards, taken, strict=True):
        if len(rows):
            names = [name for name in members(shard.file) if not name.endswith(CLASS)]
            pictures, _ = sift(map(PurePosixPath, names), shard.file)
            yield shard.file, names, [names[pictures[k]] for k in rows]


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Members:
    """The pictures of tars as a sequence of (where, bytes), each read where it lies.

    shard: int32 [N], in `files`.  offset, size: int64 [N].  Raises DataError for one that is not there any more.
    """

    files: tuple[tuple[str, int, int], ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    @classmethod
    def of(cls, shards: Sequence[Shard], rows: Sequence[np.ndarray]) -> Members:
        both = list(zip(shards, rows, strict=True))
        return cls(
            files=tuple((str(shard.file), *shard.state) for shard in shards),
            shard=np.repeat(np.arange(len(shards), dtype=np.int32), [len(taken) for taken in rows]),
            offset=np.concatenate([shard.offset[taken] for shard, taken in both]),
            size=np.concatenate([shard.size[taken] for shard, taken in both]),
        )

    def __len__(self) -> int:
        return len(self.offset)

    def __getitem__(self, k: int) -> tuple[Place, bytes]:
        file, offset, size = self.files[self.shard[k]], int(self.offset[k]), int(self.size[k])
        where = Place(file[0], offset)
        with reading(file[0], "the shard that was indexed"):
            raw = os.pread(_opened(*file).fileno(), size, offset)
        if len(raw) != size:
            raise bad(where, f"{len(raw)} bytes", f"{size}, as when it was indexed", "fetch the shard again")
        return where, raw


@functools.lru_cache(maxsize=16)
def _opened(file: str, size: int, time: int) -> io.FileIO:
    """A shard, open; by its state, so that another one of the same name is opened anew."""
    return open(file, "rb", buffering=0)


@dataclass(frozen=True)
class Place:
    """Where a member lies; its name is only looked for when somebody reads it."""

    file: str
    offset: int

    def __str__(self) -> str:
        try:
            with walking(Path(self.file)) as (found, _):
                name = next(one.name for one in found if one.offset_data == self.offset)
                return f"{self.file}:{name}"
        except (Exception, StopIteration):  # it changed meanwhile
            return f"{self.file}: byte {self.offset}"


def _packed(archive: Path, split: str) -> Source:
    """One packed tar, laid out like a folder; read as a stream, in its order."""
    names = members(archive)
    chosen, found = _arranged_names(names, split, archive)
    keep = {names[i] for i in chosen}
    return Source(
        pictures=Stream(lambda: streamed(archive, keep), len(keep)),
        labels=found[0],
        classes=found[1],
        left_out=found[2],
    )


def _arranged_names(names: Sequence[str], split: str, archive: Path) -> tuple[list[int], tuple[Any, Any, Any]]:
    pictures, left_out = sift([PurePosixPath(name) for name in names], archive)
    refuse_twins([names[i] for i in pictures], archive)
    found = arrange([PurePosixPath(names[i]) for i in pictures], split, archive)
    return [pictures[i] for i in found.chosen], (found.labels, found.classes, found.left_out + left_out)
