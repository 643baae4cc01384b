"""Digests of a folder's files: written with it as SHA256SUMS, for `sha256sum -c` too, and compared when it is read."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from halfstep.core.disk import read_bytes, write_text
from halfstep.core.errors import ModelError, RunError
from halfstep.core.typed import shown

FILE = "SHA256SUMS"
READ = (".json", ".safetensors")
"""Files that a model is read from: one of these that was never recorded changes what a folder means."""
State = Literal["whole", "changed", "missing", "unrecorded"]


@dataclass(frozen=True)
class Checked:
    """One file of a folder, by its path inside it, and how it compares with what was written."""

    file: str
    state: State


def write_sums(folder: Path) -> None:
    """Record the digest of every file that lies in `folder` now."""
    lines = [f"{digest_of(folder / name)}  {name}\n" for name in _files(folder)]
    write_text(folder / FILE, "".join(lines))


def digest_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def compare(folder: Path, *, renewing: bool = False) -> list[Checked]:
    """Every file of a folder beside its SHA256SUMS; all are unrecorded where there is none.

    Only what lies in the folder is opened. Raises RunError for a SHA256SUMS that is none; `renewing`, it counts as
    absent, for it is written anew.
    """
    try:
        recorded = _recorded(folder)
    except RunError:
        if not renewing:
            raise
        recorded = {}
    there = _files(folder)
    found = []
    for name in sorted({*recorded, *there}):
        if name not in there:
            state: State = "missing"
        elif name not in recorded:
            state = "unrecorded"
        else:
            state = "whole" if digest_of(folder / name) == recorded[name] else "changed"
        found.append(Checked(name, state))
    return found


def require_whole(folder: Path) -> bool:
    """Raise ModelError, which names a file, unless a folder's files are those that were written; False where nothing
    was recorded, as in folders of other programs and of before."""
    if not (folder / FILE).exists():
        return False
    odd = [c for c in compare(folder) if c.state in ("changed", "missing") or _is_new(c)]
    if odd:
        more = f" and {len(odd) - 1} more" if odd[1:] else ""
        raise ModelError(
            got=f"{odd[0].file} {odd[0].state}{more}",
            expected=f"the files that were written, by {FILE}",
            where=folder,
            do=f"copy it again; if the change is yours: halfstep verify {folder} --accept",
        )
    return True


def _is_new(checked: Checked) -> bool:
    return checked.state == "unrecorded" and checked.file.endswith(READ)


def _files(folder: Path) -> list[str]:
    """The regular files below a folder but its sums, by their paths inside it, with / on every system."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if path != folder / FILE and path.exists() and stat.S_ISREG(path.stat().st_mode):
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\0\r\n\\]{1,4096})")


def _recorded(folder: Path) -> dict[str, str]:
    file = folder / FILE
    if not file.exists():
        return {}
    what, do = "lines of sha256sum", f"copy it again, or write it anew: halfstep verify {folder} --accept"
    try:
        lines = read_bytes(file, 64 << 20, what=what, do=do).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise RunError(got=f"bytes that are no text ({error})", expected=what, where=file, do=do) from error
    found = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise RunError(got=f"a line {shown(line)}", expected=what, where=file, do=do)
        found[match[2]] = match[1]
    return found


def recorded_folders(top: Path) -> Iterator[Path]:
    """The folders at and below `top` whose files are recorded together: every pipeline. Links are not followed."""
    for place, folders, names in os.walk(top):
        if FILE in names or "model_index.json" in names:
            folders.clear()
            yield Path(place)
        folders.sort()
