"""What names of files say: which are pictures, which folders are splits, which are classes, and what is left out.

Nothing is read here: a folder on disk and the names in an archive follow the same rules.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from halfstep.core.errors import DataError, printable

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
# Files that commonly lie beside pictures. Any other is refused, so that no picture is left out for its suffix.
SIDECARS = frozenset({
    "", ".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".html", ".htm", ".yaml", ".yml", ".toml",
    ".db", ".ini", ".cfg", ".log", ".lst", ".py", ".sh", ".m", ".mat", ".npy", ".npz", ".pkl", ".pdf", ".url", ".lnk",
    ".xmp", ".aae", ".thm", ".md5", ".sha1", ".sha256", ".zip", ".tar", ".gz", ".mp4", ".mov",
})  # fmt: skip
# What storage and systems put into folders of pictures; names that begin with a dot are theirs too.
SYSTEM = frozenset({
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "__macosx",
    "__pycache__", "lost+found", "system volume information",
})  # fmt: skip
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "eval"), "val"),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which of the names belong to a split (indices, in order), their class numbers or None, and the classes' names."""

    chosen: list[int]
    labels: list[int] | None
    classes: tuple[str, ...]
    left_out: tuple[str, ...]


def split_of(name: str) -> str | None:
    """train, test or val, as a folder or a user calls it (`Train`, `test_set`, `validation`); None for other names."""
    return _SPLITS.get(re.sub(r"[ _.-]*(set|data|split|images|imgs|20[0-9][0-9])$", "", name.lower()))


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes, each once: by number where all are whole numbers, else as text."""
    names = sorted(set(names))
    return sorted(names, key=int) if all(re.fullmatch("[0-9]{1,18}", name) for name in names) else names


def is_system(name: str) -> bool:
    """Whether a file or folder of this name is a system's and no user's."""
    return name.startswith(".") or name.lower() in SYSTEM


class Sieve:
    """Which of many names are pictures, asked one by one, and at the end what the others are."""

    def __init__(self, where: object):
        self.where = where
        self.systems: set[tuple[str, ...]] = set()
        self.others = Counter[str]()

    def takes(self, path: PurePosixPath) -> bool:
        """Whether the path is a picture's; else it is counted. Raises DataError for files of a strange kind."""
        suffix = path.suffix.lower()
        depth = next((k for k, part in enumerate(path.parts, start=1) if is_system(part)), None)
        if depth is not None:
            self.systems.add(path.parts[:depth])
        elif suffix in SUFFIXES:
            return True
        elif suffix in SIDECARS:
            self.others[f"file(s) {suffix}" if suffix else "file(s) without a suffix"] += 1
        else:
            raise DataError(
                got=f"a {suffix} file",
                expected=f"images ({' '.join(SUFFIXES)})",
                where=f"{self.where}/{path}",
                do="convert or remove it",
            )
        return False

    def left(self) -> Counter[str]:
        """What was no picture, with counts."""
        found = Counter(self.others)
        for *_, name in sorted(self.systems):
            found["name(s) beginning with a dot" if name.startswith(".") else name] += 1
        return found


def sift(paths: Iterable[PurePosixPath], where: object) -> tuple[list[int], tuple[str, ...]]:
    """Which paths are pictures, and what the others are, with counts. Raises DataError for files of a strange kind."""
    sieve = Sieve(where)
    pictures = [i for i, path in enumerate(paths) if sieve.takes(path)]
    return pictures, told(sieve.left())


def arrange(paths: Sequence[PurePosixPath], split: str, where: object) -> Layout:
    """The split's pictures among paths of pictures, and their classes, by `arrange_folders`. Raises: DataError."""
    numbers: dict[tuple[str, ...], int] = {}
    folder = [numbers.setdefault(path.parts[:-1], len(numbers)) for path in paths]
    counts = Counter(folder)
    found = arrange_folders(list(numbers), [counts[k] for k in range(len(numbers))], split, where)
    chosen = [i for i, k in enumerate(folder) if found.label[k] is not None]
    labels = [found.label[folder[i]] for i in chosen] if found.classes else None
    return Layout(chosen=chosen, labels=labels, classes=found.classes, left_out=told(found.left_out))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Of every folder the class number of its pictures, 0 where there are no classes, None where they are left out;
    the classes' names, and what is left out with counts."""

    label: list[int | None]
    classes: tuple[str, ...]
    left_out: Counter[str]


Folder = tuple[str, ...] | None
"""The parts of a folder's path; None: what is in it is left out."""


def arrange_folders(paths: Sequence[tuple[str, ...]], counts: Sequence[int], split: str, where: object) -> Folders:
    """Which folders belong to a split, and their classes; `counts`: of the pictures right inside each.

    Folders by a split's name are splits if one is for training and another is not, or if there are no others. Below
    them, or at the top, the first folder is the class. Whatever lies around one folder with everything, beside the
    splits, or (if they are fewer) beside several class folders is left out. Raises: DataError, for an unknown split.
    """
    if not paths:
        raise DataError(
            got="no images", expected=f"image files ({' '.join(SUFFIXES)})", where=where, do="check the path"
        )
    folders, left_out = _unwrapped(paths, counts)
    tops = {folder[0] for folder in folders if folder}
    kinds = {top: kind for top in tops if (kind := split_of(top))}
    wanted = split_of(split) or split
    mine = [folder is not None for folder in folders]
    if kinds and ({"train"} < set(kinds.values()) or tops == set(kinds)):
        _known(split, wanted in kinds.values(), sorted(set(kinds.values())), where)
        asked = sorted(top for top, kind in kinds.items() if kind == wanted)
        if len(asked) > 1:
            got = f"folders {', '.join(map(printable, asked))}"
            raise DataError(got=got, expected=f"one folder for split {split!r}", where=where, do="rename the others")
        inside = [bool(folder) and folder[0] in kinds for folder in folders]  # type: ignore[index]
        beside = (
            n for folder, n, known in zip(folders, counts, inside, strict=True) if folder is not None and not known
        )
        left_out["picture(s) beside the splits"] = sum(beside)
        mine = [bool(folder) and folder[0] == asked[0] for folder in folders]  # type: ignore[index]
        folders = [folder[1:] if known else None for folder, known in zip(folders, inside, strict=True)]  # type: ignore[index]
    else:
        _known(split, wanted == "train", ["train"], where)
    return _classed(folders, counts, mine, left_out)


def _classed(folders: list[Folder], counts: Sequence[int], mine: list[bool], left_out: Counter[str]) -> Folders:
    """The classes of folders, by the first part of each; `mine`: whether it belongs to the split."""
    both = list(zip(folders, counts, mine, strict=True))
    inside = sum(n for folder, n, asked in both if asked and folder)
    strays = sum(n for folder, n, asked in both if asked and not folder)
    several = len({folder[0] for folder, _, asked in both if asked and folder}) > 1
    if not inside or (strays and not (strays < inside and several)):
        return Folders(label=[0 if asked else None for asked in mine], classes=(), left_out=left_out)
    left_out["picture(s) beside the class folders"] = strays
    classes = in_order(folder[0] for folder in folders if folder)  # of all splits, so that they number them alike
    number = {name: label for label, name in enumerate(classes)}
    label = [number[folder[0]] if asked and folder else None for folder, _, asked in both]
    return Folders(label=label, classes=tuple(map(printable, classes)), left_out=left_out)


def _unwrapped(paths: Sequence[tuple[str, ...]], counts: Sequence[int]) -> tuple[list[Folder], Counter[str]]:
    """Without folders around everything; what lies beside one is left out, as None."""
    folders: list[Folder] = list(paths)
    left_out = Counter[str]()
    while True:
        tops = {folder[0] for folder in folders if folder}
        inner = {folder[1] for folder in folders if folder and len(folder) > 1}
        flat = sum(n for folder, n in zip(folders, counts, strict=True) if folder is not None and len(folder) < 2)
        several = len(inner) > 1 and 2 * flat < sum(counts)
        if len(tops) != 1 or split_of(*tops) or not inner or not (flat == 0 or several):
            return folders, left_out
        beside = sum(n for folder, n in zip(folders, counts, strict=True) if folder == ())
        left_out[f"picture(s) beside the folder {printable(next(iter(tops)))}"] = beside
        folders = [folder[1:] if folder else None for folder in folders]


def told(left_out: Counter[str]) -> tuple[str, ...]:
    """Reasons with counts in words, the largest first."""
    return tuple(f"{n} {what.replace('(s)', 's' * (n > 1), 1)}" for what, n in left_out.most_common() if n)


def _known(split: str, known: bool, names: list[str], where: object) -> None:
    if not known:
        got, expected = f"split {split!r}", f"one of: {', '.join(names)}"
        raise DataError(got=got, expected=expected, where=where, do="name a split that it has")
