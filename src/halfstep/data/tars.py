"""Tars, plain or packed: walked member by member with bounds on everything, and whole or refused."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfstep.data.sources import MAX_FILE_BYTES, bad, reading, require_size

PADDING_BYTES = 1 << 26  # of zeros behind the end of a tar
_PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open, b"BZ": bz2.open}


def is_packed(path: Path) -> bool:
    """Whether a file is packed by gzip, xz or bzip2."""
    with reading(path, WHOLE), path.open("rb") as file:
        return file.read(2) in _PACKED


WHOLE = "a whole tar, plain or packed by gzip, xz or bzip2"


@contextmanager
def walking(path: Path) -> Iterator[tuple[Iterator[tarfile.TarInfo], Unpacked]]:
    """All members of a tar that are no folders, in its order, and the stream that their content lies in. Inside, what
    goes wrong is a DataError that names the tar; at the end of the walk one that is cut off or damaged is refused."""
    with (
        reading(path, WHOLE),
        Unpacked(path) as stream,
        tarfile.open(fileobj=stream, mode="r:") as tar,  # type: ignore[call-overload]
    ):
        yield _walk(tar, stream, path), stream


def _walk(tar: tarfile.TarFile, stream: Unpacked, path: Path) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else it keeps all of them: a gigabyte for a million
        if not member.isdir():
            yield member
    # tarfile takes a cut or damaged header for the end. The real end is a block of zeros; behind it, gzip and xz
    # keep the checksum of everything, which they compare only when all is read.
    stream.seek(tar.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise bad(path, "an archive that is cut short or damaged", "a whole tar", "fetch the file again")
    while stream.read(1 << 20):
        if stream.tell() > tar.offset + PADDING_BYTES:
            raise bad(path, "an archive with no end", "a tar that ends in a few zeros", "write it anew")


def members(archive: Path) -> list[str]:
    """The names of all in a tar that are no folders, in its order. Raises DataError, as reading one does."""
    with walking(archive) as (found, _):
        return [member.name for member in found]


def contents(archive: Path, keep: set[str]) -> dict[str, bytes]:
    """What these members of a tar hold, by name."""
    return {where.removeprefix(f"{archive}:"): content for where, content in streamed(archive, keep)}


def streamed(archive: Path, keep: set[str]) -> Iterator[tuple[str, bytes]]:
    """(where, content) of the members in `keep`, in one pass."""
    with walking(archive) as (found, stream):
        for member in found:
            if member.name in keep:
                yield f"{archive}:{member.name}", content_of(member, stream, archive)


def content_of(member: tarfile.TarInfo, stream: Unpacked, archive: Path) -> bytes:
    """What a member holds. Raises DataError, as `require_regular`."""
    require_regular(member, archive)
    stream.seek(member.offset_data)
    return stream.read(member.size)


def refuse_twins(names: Sequence[str], archive: Path) -> None:
    """Raise DataError for a name that comes twice."""
    for name, count in Counter(names).most_common(1):
        if count > 1:
            got, expected = f"a name that comes {count} times", "distinct names"
            raise bad(f"{archive}:{name}", got, expected, "write the archive anew")


def require_regular(member: tarfile.TarInfo, archive: Path) -> None:
    """Raise DataError for a link, a device, a sparse file and one that is too large."""
    if not member.isreg() or member.issparse() or member.size > MAX_FILE_BYTES:
        got, expected = "a link or a device, or too large a file", f"files up to {MAX_FILE_BYTES >> 20} MiB"
        raise bad(f"{archive}:{member.name}", got, expected, "write the archive anew")


class Unpacked:
    """The plain bytes of a file, packed or not, for tarfile: bounded in all, and in what one read may ask for."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            packed = _PACKED.get(file.read(2))
        self.path, self.size, self.packed = path, path.stat().st_size, packed is not None
        self.file: Any = (packed or open)(path, "rb")

    def __enter__(self) -> Unpacked:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, place: int) -> int:
        self._require(place)
        return self.file.seek(place)

    def read(self, count: int) -> bytes:
        """At most `count` bytes."""
        if count > MAX_FILE_BYTES:  # of a name: tarfile would hold it all
            raise bad(self.path, f"a header of {count} bytes", "an archive of pictures", "write it anew")
        self._require(self.tell() + count)
        return self.file.read(count)

    def _require(self, place: int) -> None:
        if self.packed:
            require_size(self.path, place, self.size)
