"""Files of a run folder: every write is whole or absent, and errors of the file system speak plainly."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfstep.errors import RunError


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
        if code in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
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

    The temporary name starts with a dot and carries the process id. An old file or folder at `path` is replaced only
    after the new one is whole.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with plain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            _flush(temporary)
            if temporary.is_dir() and path.is_dir():  # a folder cannot be renamed over a full folder
                old = path.with_name(f".{path.name}.{os.getpid()}.old")
                os.replace(path, old)
                try:
                    os.replace(temporary, path)
                except OSError:
                    os.replace(old, path)
                    raise
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        file.chmod(0o666 & ~mask)  # safetensors writes files that only their owner can read
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, record: object) -> None:
    write_text(path, json.dumps(record, indent=2) + "\n")


def write_bytes(path: Path, content: bytes) -> None:
    write_atomic(path, lambda temporary: temporary.write_bytes(content))


def write_png(path: Path, picture: Any) -> None:
    """Write a Pillow image."""
    write_atomic(path, lambda temporary: picture.save(temporary, "PNG"))


def read_json(path: Path, *, what: str, do: str) -> dict:
    """Read a JSON object; `what` it should be and what to `do` go into the error.

    Raises RunError when the file is missing, cut off, or no JSON object.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(got="no such file", expected=what, where=path, do=do) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(got=f"an unreadable file ({error})", expected=what, where=path, do=do) from error
    if not isinstance(record, dict):
        raise RunError(got=f"a JSON {type(record).__name__}", expected=what, where=path, do=do)
    return record


def append_record(path: Path, record: dict) -> None:
    """Append one line of JSON and flush it, so that a killed run keeps every line but perhaps the last."""
    with plain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as handle:
            end = handle.seek(0, os.SEEK_END)
            handle.seek(max(0, end - 1))
            cut = end > 0 and handle.read(1) != b"\n"  # a killed run's last line must not swallow this one
            handle.write((b"\n" if cut else b"") + json.dumps(record).encode() + b"\n")


def read_records(path: Path) -> list[dict]:
    """The records of a JSON-lines file; a line that a kill cut off is left out, a missing file has none."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def keep_records(path: Path, keep: Callable[[dict], bool]) -> None:
    """Rewrite a JSON-lines file with the records that `keep` accepts: what lies behind a resumed step is dropped."""
    if path.is_file():
        write_text(path, "".join(json.dumps(r) + "\n" for r in read_records(path) if keep(r)))


def require_writable(folder: Path) -> Path:
    """Make `folder` and prove, before any work is done, that a file can be written there. Raises RunError."""
    folder = Path(folder)
    with plain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        try:
            probe.write_bytes(b"0" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    return folder


def recover(folder: Path) -> None:
    """Clear what killed processes left in a run folder: half-written files go, a folder set aside comes back."""
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


_LEFT = re.compile(r"\.(.+)\.(\d+)\.(tmp|old)")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
