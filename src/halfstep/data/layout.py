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


def sift(paths: Sequence[PurePosixPath], where: object) -> tuple[list[int], tuple[str, ...]]:
    """Which paths are pictures, and what the others are, with counts. Raises DataError for files of a strange kind."""
    pictures, systems, others = [], set(), Counter[str]()
    for i, path in enumerate(paths):
        suffix = path.suffix.lower()
        depth = next((k for k, part in enumerate(path.parts, start=1) if is_system(part)), None)
        if depth is not None:
            systems.add(path.parts[:depth])
        elif suffix in SUFFIXES:
            pictures.append(i)
        elif suffix in SIDECARS:
            others[f"file(s) {suffix}" if suffix else "file(s) without a suffix"] += 1
        else:
            raise DataError(
                got=f"a {suffix} file",
                expected=f"images ({' '.join(SUFFIXES)})",
                where=f"{where}/{path}",
                do="convert or remove it",
            )
    for *_, name in sorted(systems):
        others["name(s) beginning with a dot" if name.startswith(".") else name] += 1
    return pictures, _told(others)


def arrange(paths: Sequence[PurePosixPath], split: str, where: object) -> Layout:
    """The split's pictures among paths of pictures, and their classes.

    Folders by a split's name are splits if one is for training and another is not, or if there are no others. Below
    them, or at the top, the first folder is the class. Whatever lies around one folder with everything, beside the
    splits, or (if they are fewer) beside several class folders is left out. Raises: DataError, for an unknown split.
    """
    if not paths:
        raise DataError(
            got="no images", expected=f"image files ({' '.join(SUFFIXES)})", where=where, do="check the path"
        )
    parts, left_out = _unwrapped([path.parts for path in paths])
    tops = {part[0] for part in parts if len(part) > 1}
    kinds = {top: kind for top in tops if (kind := split_of(top))}
    wanted = split_of(split) or split
    if kinds and ({"train"} < set(kinds.values()) or tops == set(kinds)):
        _known(split, wanted in kinds.values(), sorted(set(kinds.values())), where)
        mine = sorted(top for top, kind in kinds.items() if kind == wanted)
        if len(mine) > 1:
            got = f"folders {', '.join(map(printable, mine))}"
            raise DataError(got=got, expected=f"one folder for split {split!r}", where=where, do="rename the others")
        left_out["picture(s) beside the splits"] = sum(bool(part) and part[0] not in kinds for part in parts)
        chosen = [i for i, part in enumerate(parts) if part and part[0] == mine[0] and len(part) > 1]
        parts = [part[1:] if part and part[0] in kinds else () for part in parts]
    else:
        _known(split, wanted == "train", ["train"], where)
        chosen = [i for i, part in enumerate(parts) if part]
    inside = [i for i in chosen if len(parts[i]) > 1]
    strays = len(chosen) - len(inside)
    labelled = bool(inside) and (not strays or (strays < len(inside) and len({parts[i][0] for i in inside}) > 1))
    if labelled:
        chosen, left_out["picture(s) beside the class folders"] = inside, strays
    told = _told(left_out)
    if not labelled:
        return Layout(chosen=chosen, labels=None, classes=(), left_out=told)
    classes = in_order(part[0] for part in parts if len(part) > 1)  # of all splits, so that they number them alike
    number = {name: label for label, name in enumerate(classes)}
    labels = [number[parts[i][0]] for i in chosen]
    return Layout(chosen=chosen, labels=labels, classes=tuple(map(printable, classes)), left_out=told)


def _unwrapped(parts: list[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], Counter[str]]:
    """Without folders around everything; what lies beside one is left out, as ()."""
    left_out = Counter[str]()
    while True:
        tops = {part[0] for part in parts if len(part) > 1}
        inner = {part[1] for part in parts if len(part) > 2}
        flat = sum(0 < len(part) <= 2 for part in parts)
        several = len(inner) > 1 and 2 * flat < len(parts)
        if len(tops) != 1 or split_of(*tops) or not inner or not (flat == 0 or several):
            return parts, left_out
        left_out[f"picture(s) beside the folder {printable(next(iter(tops)))}"] = sum(len(part) == 1 for part in parts)
        parts = [part[1:] for part in parts]


def _told(left_out: Counter[str]) -> tuple[str, ...]:
    return tuple(f"{n} {what.replace('(s)', 's' * (n > 1), 1)}" for what, n in left_out.most_common() if n)


def _known(split: str, known: bool, names: list[str], where: object) -> None:
    if not known:
        got, expected = f"split {split!r}", f"one of: {', '.join(names)}"
        raise DataError(got=got, expected=expected, where=where, do="name a split that it has")
