"""Files of a run folder: every write is whole or absent, every read is bounded, and errors speak plainly."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar, overload

from halfstep.core.errors import HalfstepError, RunError
from halfstep.core.typed import build, shown

MAX_JSON = 64 << 20
"""Bytes of one JSON file that are read; a plan of a thousand steps has 30 thousand."""
MAX_RECORDS = 256 << 20
"""Bytes of one file of JSON lines that are read: two million records of a training."""
MAX_DEPTH = 64
"""JSON within JSON that is read."""
MAX_DIGITS = 100
"""Digits of an integer in JSON; Python itself refuses to write integers of more than 4,300."""
_REFUSALS = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOENT),
)
Record = TypeVar("Record")


@contextmanager
def plain_os_errors(path: Path) -> Iterator[None]:
    """Turn the file system's refusals (read-only, full, no permission) into a RunError that names the path."""
    try:
        yield
    except Exception as error:
        code = _error_number(error)
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                got="a full disk", expected="room to write", where=path, do="free some space and run again to resume"
            ) from error
        if code in _REFUSALS:
            raise RunError(
                got=os.strerror(code).lower(),
                expected="a folder that can be written",
                where=path,
                do="choose another --out or change its permissions",
            ) from error
        raise


def _error_number(error: Exception) -> int | None:
    """The file system's number; safetensors' own exception only tells it in its text: "… (os error 28)"."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary sibling (a file or a folder) of `path`, flush it to disk, then rename it to `path`.

    The temporary name starts with a dot, carries the process id and is no other program's. An old file or folder at
    `path` is replaced only after the new one is whole.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.halfstep-tmp")
    with plain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            _flush(temporary)
            if temporary.is_dir() and path.is_dir():  # a folder cannot be renamed over a full folder
                old = path.with_name(f".{path.name}.{os.getpid()}.halfstep-old")
                os.replace(path, old)
                try:
                    os.replace(temporary, path)
                except OSError:
                    os.replace(old, path)
                    raise
                _flush_folder(path.parent)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
                _flush_folder(path.parent)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


def write_many(writes: Mapping[Path, Callable[[Path], object]]) -> None:
    """As `write_atomic`, for many files of one folder: each whole or absent. They are flushed together: a disk that is
    asked for each alone takes most of the time that small files take."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.halfstep-tmp") for path in writes}
    try:
        for path, write in writes.items():
            with plain_os_errors(path):
                write(temporary[path])
        for path, there in temporary.items():
            with plain_os_errors(path):
                _flush(there)
        for path, there in temporary.items():
            with plain_os_errors(path):
                os.replace(there, path)
        for folder in {path.parent for path in writes}:
            _flush_folder(folder)
    finally:
        for there in temporary.values():
            there.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Bring a file, or every file and folder of a folder, to the disk itself."""
    mask = os.umask(0)
    os.umask(mask)
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        file.chmod(0o666 & ~mask)  # safetensors writes files that only their owner can read
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    for folder in [path, *(p for p in path.rglob("*") if p.is_dir())] if path.is_dir() else []:
        _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    """Bring a folder's names to the disk: a rename outlives a loss of power only then."""
    with suppress(OSError):  # not every file system can do that, and Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; names of files that are none (surrogates, to Python) are escaped."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: Path, record: object) -> None:
    """Write strict JSON. Raises RunError for a number that is not finite: there is no such number in JSON."""
    write_text(path, to_json(record, where=path, indent=2) + "\n")


def to_json(record: object, *, where: object, indent: int | None = None) -> str:
    """Strict JSON of a record; `where` it is to be written goes into the RunError for a number that is not finite."""
    try:
        return json.dumps(record, indent=indent, allow_nan=False)
    except ValueError as error:
        raise RunError(
            got=f"{error} in {shown(record)}",
            expected="finite numbers",
            where=where,
            do="look for what made them: a training that diverged, or images without any difference",
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    write_atomic(path, lambda temporary: temporary.write_bytes(content))


def write_png(path: Path, picture: Any) -> None:
    """Write a Pillow image."""
    write_atomic(path, lambda temporary: picture.save(temporary, "PNG"))


def read_bytes(path: Path, limit: int, *, what: str, do: str, error: type[HalfstepError] = RunError) -> bytes:
    """The content of a regular file of at most `limit` bytes; `what` it should be and what to `do` go into the error.

    Raises `error` when it is missing, larger, not readable, or a folder, a pipe or a device: none of these may hang.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise error(got="an unreadable file (not a regular one)", expected=what, where=path, do=do)
        with Path(path).open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise error(got="no such file", expected=what, where=path, do=do) from None
    except OSError as refused:
        raise error(got=f"an unreadable file ({refused})", expected=what, where=path, do=do) from refused
    except ValueError:  # a NUL in the name; an error of ours is one too
        if "\0" not in str(path):
            raise
        raise error(got="a name with NUL", expected=what, where=shown(str(path)), do=do) from None
    if len(content) > limit:
        raise error(got=f"more than {limit >> 20} MiB", expected=what, where=path, do=do)
    return content


def read_json(path: Path, *, what: str, do: str, error: type[HalfstepError] = RunError, infinity: bool = False) -> dict:
    """Read a JSON object; `what` it should be and what to `do` go into the error.

    `infinity`: that is a number, as in the configs of diffusers' schedulers ("lambda_min_clipped": -Infinity).
    Raises `error` when the file is missing, cut off, or no JSON object within the bounds above.
    """
    content = read_bytes(path, MAX_JSON, what=what, do=do, error=error)
    return parse_json(content, where=path, what=what, do=do, error=error, infinity=infinity)


def parse_json(
    content: bytes,
    *,
    where: object,
    what: str,
    do: str,
    error: type[HalfstepError] = RunError,
    infinity: bool = False,
) -> dict:
    """The JSON object in these bytes: strict, finite, in UTF-8, of bounded depth. Raises `error`."""
    try:
        constant = _infinite if infinity else _no_number
        record = json.loads(
            content.decode("utf-8"), parse_constant=constant, parse_float=_finite, parse_int=_short_integer
        )
        _require_shallow(record)
    except (ValueError, RecursionError) as broken:
        raise error(got=f"an unreadable file ({broken})", expected=what, where=where, do=do) from broken
    if not isinstance(record, dict):
        raise error(got=f"a JSON {type(record).__name__}", expected=what, where=where, do=do)
    return record


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _infinite(name: str) -> float:
    return float(name) if name != "NaN" else _no_number(name)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _short_integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _require_shallow(record: object) -> None:
    level = [record]
    for _ in range(MAX_DEPTH):
        level = [inner for one in level for inner in _containers(one)]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _containers(one: Any) -> list:
    values = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return [value for value in values if isinstance(value, dict | list)]


def read_record(path: Path, cls: type[Record], *, what: str, do: str, error: type[HalfstepError] = RunError) -> Record:
    """Read a JSON object as a dataclass of typed fields (see `typed.build`). Raises `error`."""
    return build(cls, read_json(path, what=what, do=do, error=error), "", path, error=error, do=do)


def append_record(path: Path, record: dict) -> None:
    """Append one line of strict JSON and flush it: a run that is killed keeps every line but perhaps the last.

    Raises RunError for a number that is not finite.
    """
    line = to_json(record, where=path).encode() + b"\n"
    with plain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("ab+") as handle:
            _end_the_last_line(handle)
            handle.write(line)
            handle.flush()
            with suppress(OSError):  # a pipe or a device cannot be flushed
                os.fsync(handle.fileno())
        if new:
            _flush_folder(path.parent)


def _end_the_last_line(handle: Any) -> None:
    """Take away the line that a killed run cut off; a whole one that lost only its end of line gets it."""
    end = handle.seek(0, os.SEEK_END)
    handle.seek(max(0, end - 1))
    if end == 0 or handle.read(1) == b"\n":
        return
    handle.seek(0)
    start = handle.read().rfind(b"\n") + 1
    handle.seek(start)
    try:
        json.loads(handle.read())
    except ValueError:
        handle.truncate(start)
    else:
        handle.write(b"\n")


@overload
def read_records(path: Path, *, do: str = ...) -> list[dict]: ...
@overload
def read_records(path: Path, cls: type[Record], *, do: str = ...) -> list[Record]: ...
def read_records(path: Path, cls: Any = None, *, do: str = "delete that line, or the file") -> list:
    """The records of a JSON-lines file, as dataclasses `cls` where one is given; a missing file has none.

    A last line that a kill cut off is left out in silence. Raises RunError, which names the line, for every other one
    that is no record: what a run measured is damaged, and the lines around it may be.
    """
    if not path.exists():
        return []
    what = "lines of JSON"
    lines = read_bytes(path, MAX_RECORDS, what=what, do=do).split(b"\n")
    records: list = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line, where=f"{path}: line {number}", what="a record", do=do)
        except RunError:
            if number == len(lines):  # no end of line: cut off, or nothing at all behind the last one
                break
            raise
        place = f"{path}: line {number}"
        records.append(record if cls is None else build(cls, record, "", place, error=RunError, do=do))
    return records


def keep_records(path: Path, keep: Callable[[Record], bool], cls: type[Record]) -> None:
    """Rewrite a JSON-lines file with the records that `keep` accepts: what lies behind a resumed step is dropped.

    Raises RunError as `read_records` does.
    """
    if path.exists():
        lines = zip(read_records(path), read_records(path, cls), strict=True)
        write_text(path, "".join(to_json(line, where=path) + "\n" for line, record in lines if keep(record)))


def require_writable(folder: Path) -> Path:
    """Make `folder` and prove, before any work is done, that a file can be written there. Raises RunError."""
    folder = Path(folder)
    with plain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}.halfstep-tmp"
        try:
            probe.write_bytes(b"0" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    return folder


def recover(folder: Path) -> None:
    """Clear what killed processes left in a run folder: half-written files go, a folder set aside comes back.

    Only names that `write_atomic` and `require_writable` make are touched, and only call it on a folder of ours.
    """
    for left in [path for path in folder.rglob(".*") if _LEFT.fullmatch(path.name)]:
        name, process, kind = _LEFT.fullmatch(left.name).groups()  # type: ignore[union-attr]
        if _runs(int(process)):
            continue
        if kind == "old" and not left.with_name(name).exists():  # killed between the two renames
            os.replace(left, left.with_name(name))
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def is_left(name: str) -> bool:
    """Whether a name is of a file that a killed process of ours left."""
    return bool(_LEFT.fullmatch(name))


_LEFT = re.compile(r"\.(.+)\.(\d+)\.halfstep-(tmp|old)")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
