"""Arrays in files: opened within bounds, never unpickled, and compared with a digest where a cache keeps them."""

from __future__ import annotations

import hashlib
import io
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from halfstep.core import disk
from halfstep.core.errors import DataError, HalfstepError, RunError


def open_array(file: Path) -> np.ndarray:
    """An .npy file as a read-only memory map. Raises ValueError for anything else that may stand in its place."""
    if not file.is_file():  # a pipe would wait for ever
        raise ValueError(f"{file} is no regular file")
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of a damaged header numpy raises TokenError, SyntaxError, EOFError, OSError, ...
        raise ValueError(f"{file} is no whole .npy file") from error
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{file} is an archive")
    return found


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays as one .npz file."""
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_arrays(file: Path, most: int, *, what: str, do: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, at most `most` bytes unpacked; raises RunError before more memory is taken."""
    content = disk.read_bytes(file, most, what=what, do=do)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > most:
                raise ValueError(f"more than {most >> 20} MiB of arrays")
            return {member.filename.removesuffix(".npy"): _array(archive.read(member)) for member in members}
    except Exception as error:  # BadZipFile, zlib.error, NotImplementedError, TokenError, ...
        raise RunError(got=f"an unreadable file ({error})", expected=what, where=file, do=do) from error


def _array(content: bytes) -> np.ndarray:
    """The array of an .npy file's bytes: as many as its header says, and no objects."""
    stream = io.BytesIO(content)
    first = np.lib.format.read_magic(stream) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject or fortran or math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ValueError(f"an array {dtype} {list(shape)} in {len(content)} bytes")
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape)


# ------------------------------------------------------------------------------------------------ arrays in caches


def cache_root() -> Path:
    """Where decoded and encoded images are kept: $HALFSTEP_CACHE, else ~/.cache/halfstep; without a home directory, a
    folder of the user's among the temporary files."""
    given = os.environ.get("HALFSTEP_CACHE")
    try:
        return Path(given).expanduser() if given else Path.home() / ".cache" / "halfstep"
    except RuntimeError as error:
        if given:
            do = "write it without ~"
            raise DataError(got=given, expected="a folder", where="HALFSTEP_CACHE", do=do) from error
        return Path(tempfile.gettempdir(), f"halfstep-{os.getuid()}")


NOTED_BYTES = 1 << 25  # of an array that grows, after which it is brought to the disk: a kill loses so many, 32 MiB
VERIFY_BYTES = 1 << 28  # an array up to this size is re-hashed when opened (0.2 s); a larger one only measured


class Growing:
    """An .npy file that is written part by part along its first axis, and goes on where a killed process left it.

    `rows`: how many are there; `note`: what was noted with them.  head: goes into the digest before the rows.  It grows
    in FILE.part, whose rows are compared with their digest before it goes on, and gets its name when it is whole.
    """

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: str, head: bytes = b""):
        self.file, self.part, self.head = file, file.with_name(f"{file.name}.part"), head
        self.shape, self.dtype, self.rows, self.note = shape, np.dtype(dtype), 0, {}  # type: ignore[var-annotated]
        self.digest, self.unnoted = hashlib.sha256(head), 0
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
        self.header = header.getvalue()
        file.parent.mkdir(parents=True, exist_ok=True)
        self._resume()

    @property
    def _noted(self) -> Path:
        return self.file.with_name(f"{self.file.name}.part.json")

    def _resume(self) -> None:
        """Open the part behind the rows that are whole, or a new one."""
        try:
            known = disk.read_json(self._noted, what="what is noted of a part", do="delete it")
            with self.part.open("r+b") as part:
                digest, left = hashlib.sha256(self.head), int(known["rows"]) * self._row_bytes
                whole = known["header"] == self.header.hex() and part.read(len(self.header)) == self.header
                while whole and left and (content := part.read(min(left, 1 << 20))):
                    digest.update(content)
                    left -= len(content)
                if not whole or left or digest.hexdigest() != known["sha256"]:
                    raise ValueError("another part, or a damaged one")
                part.truncate(part.tell())
            self.rows, self.note, self.digest = int(known["rows"]), dict(known["note"]), digest
            self.out = self.part.open("ab")
        except (OSError, ValueError, KeyError, TypeError):  # an error of ours is a ValueError
            self._noted.unlink(missing_ok=True)
            self.out = self.part.open("wb")
            self.out.write(self.header)

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def add(self, part: np.ndarray, note: Mapping[str, Any] | None = None) -> None:
        """The next rows, and what is noted once they are there."""
        content = np.ascontiguousarray(part, self.dtype).tobytes()
        self.digest.update(content)
        self.out.write(content)
        self.rows, self.unnoted = self.rows + len(part), self.unnoted + len(content)
        self.note = dict(note or {})
        if self.unnoted >= NOTED_BYTES:
            self.out.flush()
            os.fsync(self.out.fileno())
            record = {"header": self.header.hex(), "rows": self.rows, "sha256": self.digest.hexdigest()}
            disk.write_json(self._noted, {**record, "note": self.note})
            self.unnoted = 0

    def finish(self) -> Any:
        """Give the array its name. Returns the digest of head and rows, a hash that can go on."""
        if self.rows != self.shape[0]:
            raise ValueError(f"{self.rows} rows of {self.shape[0]}")
        self.out.flush()
        os.fsync(self.out.fileno())
        self.out.close()
        os.replace(self.part, self.file)
        self._noted.unlink(missing_ok=True)
        return self.digest

    def close(self) -> None:
        """Leave it as it is, for another process to go on; nothing stays of one that has nothing noted."""
        self.out.close()
        if not self._noted.exists():
            self.part.unlink(missing_ok=True)


@contextmanager
def one_at_a_time(key: str, root: Path | None = None) -> Iterator[None]:
    """What is inside is done by one process at a time, of those that ask for the same key; the others wait."""
    folder = (root or cache_root()) / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock"):
        yield


def cached(file: Path, shape: tuple[int, ...], dtype: str, parts: Callable[[int], Iterable[np.ndarray]]) -> np.ndarray:
    """An array from the cache as a memory map, written there first where `open_cached` finds none.

    parts: its parts along the first axis from a row on, which is 0, or the end of a part: where a killed process ended.
    """
    with disk.plain_os_errors(file), one_at_a_time(file.stem):
        found = open_cached(file, shape, dtype, VERIFY_BYTES)
        if found is not None:
            return found
        with closing(Growing(file, shape, dtype)) as growing:
            for part in parts(growing.rows):
                growing.add(part)
            digest = growing.finish()
        disk.write_json(_record(file), {"shape": list(shape), "sha256": digest.hexdigest()})
        return open_array(file)


def write_cached(file: Path, shape: tuple[int, ...], dtype: str, parts: Iterable[np.ndarray]) -> None:
    """An array, which comes in parts along its first axis, as an .npy file with its digest in a file beside it."""
    digest = hashlib.sha256()

    def write(path: Path) -> None:
        with path.open("wb") as out:
            np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
            for part in parts:
                content = np.ascontiguousarray(part, dtype).tobytes()
                digest.update(content)
                out.write(content)

    disk.write_atomic(file, write)
    disk.write_json(_record(file), {"shape": list(shape), "sha256": digest.hexdigest()})


def open_cached(file: Path, shape: tuple[int, ...], dtype: str, most: int | None = None) -> np.ndarray | None:
    """What these two wrote, as a memory map; None when it is absent, cut, changed or of another shape.

    most: a larger array is not compared with its digest, only measured.
    """
    try:
        record = disk.read_json(_record(file), what="the digest of an array", do="delete it")
        found = open_array(file)
    except (ValueError, HalfstepError):
        return None
    whole = found.shape == shape and found.dtype == np.dtype(dtype) and found.flags.c_contiguous
    unread = most is not None and found.nbytes > most
    return found if whole and (unread or _digest(found) == record.get("sha256")) else None


def _record(file: Path) -> Path:
    return file.with_suffix(".json")


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(array), 1024):
        digest.update(array[start : start + 1024].tobytes())
    return digest.hexdigest()
