"""Arrays in files: opened within bounds, never unpickled, and compared with a digest where a cache keeps them."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from halfstep.core import disk
from halfstep.core.errors import HalfstepError, RunError


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


def open_cached(file: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray | None:
    """What `write_cached` wrote, as a memory map; None when it is absent, cut, changed, or of another shape."""
    try:
        record = disk.read_json(_record(file), what="the digest of an array", do="delete it")
        found = open_array(file)
    except (ValueError, HalfstepError):
        return None
    whole = found.shape == shape and found.dtype == np.dtype(dtype) and found.flags.c_contiguous
    return found if whole and _digest(found) == record.get("sha256") else None


def _record(file: Path) -> Path:
    return file.with_suffix(".json")


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(array), 1024):
        digest.update(array[start : start + 1024].tobytes())
    return digest.hexdigest()
