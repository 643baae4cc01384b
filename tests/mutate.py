"""Seeded damage to files and folders: JSON with hostile values, bytes flipped and cut, files that are no files.

`damage(rng, folder)` changes one thing in a folder and says what, so that a seed alone repeats a failure.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RAW = {
    "an integer of 5,000 digits": "9" * 5000,
    "1e999": "1e999",
    "-1e999": "-1e999",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "lists 100,000 deep": "[" * 100_000 + "]" * 100_000,
    "objects 100,000 deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "10**30": "1" + "0" * 30,
    "a lone surrogate": r'"\ud800"',
    "a NUL": r'"a\u0000b"',
    "5,000 characters": '"' + "x" * 5000 + '"',
    "a list of 100,000 zeros": "[" + ",".join("0" * 100_000) + "]",
}
"""Values as JSON text, for Python's own writer refuses some of them."""
PLAIN: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1000, 10**6, 2**31, 2**63, -(2**63), 10**12),
    *(0.5, -0.5, 1e-300, 1e300, "", "..", "../../../../stolen", "/etc/passwd", "2:4", "full", "a b", "[bold]", "ü"),
    *([], {}, [[]], [1, 2], ["a"], [None], {"a": 1}, [[[1, 2]]], [0, 0, 0, 0]),
)


def damage(rng: random.Random, folder: Path, files: list[str] | None = None) -> str:
    """Change one thing below `folder` (in one of `files`, where given); returns what was done."""
    names = files or sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    name = rng.choice(names)
    file = folder / name
    kinds: list[tuple[int, Callable[[random.Random, Path], str]]] = [(3, damage_bytes), (1, damage_kind)]
    if file.suffix in (".json", ".jsonl"):
        kinds.append((9, damage_json if file.suffix == ".json" else damage_lines))
    if file.suffix == ".safetensors":
        kinds.append((4, damage_safetensors))
    if file.suffix == ".npz":
        kinds.append((4, damage_npz))
    weights, choices = zip(*kinds, strict=True)
    return f"{name}: {rng.choices(choices, weights)[0](rng, file)}"


# --------------------------------------------------------------------------------------------------------------- json


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside of a JSON value; of long lists the first and last three."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(len(value)) if len(value) <= 6 else (0, 1, 2, len(value) - 3, len(value) - 2, len(value) - 1):
            yield from places(value[i], (*path, i))


def damage_json(rng: random.Random, file: Path) -> str:
    text, told = damaged_json(rng, file.read_text(encoding="utf-8"))
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    return told


def damage_lines(rng: random.Random, file: Path) -> str:
    """One line of a JSON-lines file changed, doubled, swapped, or made no JSON."""
    lines = file.read_text(encoding="utf-8").splitlines()
    if not lines:
        return damage_bytes(rng, file)
    i, kind = rng.randrange(len(lines)), rng.choice(("json", "json", "json", "text", "twice", "swap", "bytes"))
    told = f"line {i}: {kind}"
    if kind == "json":
        lines[i], inner = damaged_json(rng, lines[i])
        told = f"line {i}: {inner}"
    elif kind == "text":
        lines[i] = rng.choice(["3", "null", "[]", "{}", '"x"', "{", "\x00", "[1]", RAW["lists 100,000 deep"]])
        told += f" {lines[i][:20]!r}"
    elif kind == "twice":
        lines.insert(i, lines[i])
    elif kind == "swap":
        lines.reverse()
    content = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    file.write_bytes(content.replace(b'"', b"\xff", 1) if kind == "bytes" else content)
    return told


def damaged_json(rng: random.Random, text: str) -> tuple[str, str]:
    """(the text changed in one place, what was changed)."""
    record = json.loads(text)
    path = rng.choice(list(places(record)))
    where = "/".join(str(part)[:40] for part in path) or "the whole file"
    parent = record
    for part in path[:-1]:
        parent = parent[part]
    kind = rng.choice(("raw", "raw", "plain", "plain", "near", "near", "drop", "rename", "foreign", "twin"))
    if not path and kind in ("drop", "rename", "near"):
        kind = "plain"
    if kind == "raw":
        name = rng.choice(list(RAW))
        marked = _put(record, path, "@@@")
        return json.dumps(marked).replace('"@@@"', RAW[name]), f"{where} becomes {name}"
    if kind == "plain":
        value = rng.choice(PLAIN)
        return json.dumps(_put(record, path, value)), f"{where} becomes {value!r}"
    if kind == "near":
        value = near(rng, parent[path[-1]])
        return json.dumps(_put(record, path, value)), f"{where} becomes {str(value)[:60]!r}, near what it was"
    if kind == "drop":
        del parent[path[-1]]
        return json.dumps(record), f"{where} is dropped"
    if kind == "rename" and isinstance(parent, dict):
        name = rng.choice(("..", "x" * 5000, "a\0b", "", path[-1] + " ", "_" + path[-1], path[-1].upper()))
        parent[name] = parent.pop(path[-1])
        return json.dumps(record), f"{where} is renamed to {name[:40]!r}"
    here = record
    for part in path:
        here = here[part]
    if kind == "foreign" and isinstance(here, dict):
        here["foreign"] = rng.choice(PLAIN)
        return json.dumps(record), f"{where} gets a foreign field {here['foreign']!r}"
    if isinstance(here, list) and here:
        here.append(here[0])
        return json.dumps(record), f"{where} gets one more item"
    cut = rng.randrange(len(text) + 1)
    return text[:cut], f"cut after {cut} characters"


def near(rng: random.Random, value: Any) -> Any:
    """A value like this one: another number, another text, the same as another type, one item less."""
    if isinstance(value, bool) or value is None:
        return rng.choice((not value, str(value), int(bool(value))))
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2, value / 2, str(value), [value], float(value) + 0.5))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value.upper(), " " + value, [value], value.swapcase(), value * 2))
    if isinstance(value, list):
        return rng.choice((value[1:], value[::-1], value * 2, {str(i): v for i, v in enumerate(value)}, [value]))
    keys = list(value)
    return rng.choice((dict(list(value.items())[1:]), list(value.values()), keys))


def _put(record: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    parent = record
    for part in path[:-1]:
        parent = parent[part]
    parent[path[-1]] = value
    return record


# -------------------------------------------------------------------------------------------------------------- bytes


def damage_bytes(rng: random.Random, file: Path) -> str:
    content = bytearray(file.read_bytes())
    kind = rng.choice(("flip", "flip", "flip", "cut", "append", "zero", "empty", "text", "insert"))
    if kind == "flip" and content:
        i = rng.randrange(min(len(content), rng.choice((64, 4096, len(content)))))
        content[i] ^= 1 << rng.randrange(8)
        told = f"a bit of byte {i} flipped"
    elif kind == "cut" and content:
        i = rng.randrange(len(content))
        del content[i:]
        told = f"cut to {i} bytes"
    elif kind == "append":
        n = rng.choice((1, 8, 4096))
        content += rng.randbytes(n)
        told = f"{n} bytes appended"
    elif kind == "zero" and content:
        i, n = rng.randrange(len(content)), rng.choice((1, 16, 512))
        content[i : i + n] = bytes(len(content[i : i + n]))
        told = f"{n} bytes from {i} zeroed"
    elif kind == "text":
        content = bytearray(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        told = "a Git LFS pointer in its place"
    elif kind == "insert":
        i = rng.randrange(len(content) + 1)
        content[i:i] = b"\xff\xfe\x00"
        told = f"three bytes inserted at {i}"
    else:
        content, told = bytearray(), "emptied"
    file.write_bytes(content)
    return told


def damage_safetensors(rng: random.Random, file: Path) -> str:
    """The header of a safetensors file changed as JSON, its length made to lie, or weights made NaN."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], content[8 + length :]
    kind = rng.choice(("header", "header", "length", "nan", "sparse", "swap"))
    if kind == "header":
        text, told = damaged_json(rng, header.decode())
        raw = text.encode("utf-8", "surrogatepass")
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + body)
        return f"header: {told}"
    if kind == "length":
        claimed = rng.choice((0, 1, length - 1, length + 8, 90 << 20, 2**63, 2**64 - 1))
        file.write_bytes(claimed.to_bytes(8, "little") + content[8:])
        return f"a header length of {claimed}"
    if kind == "sparse":
        file.write_bytes((90 << 20).to_bytes(8, "little") + content[8:])
        os.truncate(file, (90 << 20) + 4096)
        return "a header of 90 MB, mostly a hole"
    if kind == "swap" and len(body) >= 8:
        file.write_bytes(content[: 8 + length] + body[4:] + body[:4])
        return "all weights moved by one place"
    place = 4 * rng.randrange(max(1, len(body) // 4))
    value = np.array([rng.choice((np.nan, np.inf, 1e38))], "<f4").tobytes()
    file.write_bytes(content[: 8 + length] + body[:place] + value + body[place + 4 :])
    return f"four bytes from {place} of the weights become {value.hex()}"


def damage_npz(rng: random.Random, file: Path) -> str:
    """Arrays of objects, of other shapes and types, headers that lie, members left out or doubled."""
    with np.load(file) as loaded:
        arrays: dict[str, Any] = {name: loaded[name] for name in loaded.files}
    name = rng.choice(sorted(arrays))
    kind = rng.choice(("objects", "float", "shape", "missing", "lie", "other", "huge", "empty"))
    told = f"{name}: {kind}"
    if kind == "objects":
        arrays[name] = np.array([{"a": 1}, None], dtype=object)
    elif kind == "float":
        arrays[name] = arrays[name].astype(np.float64) + 0.5
    elif kind == "shape":
        arrays[name] = arrays[name].reshape(-1)
    elif kind == "missing":
        del arrays[name]
    elif kind == "other":
        arrays["foreign"] = np.zeros(3)
    elif kind == "empty":
        arrays[name] = arrays[name][:0]
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    if kind in ("lie", "huge"):
        shape = (2**40,) if kind == "lie" else (10**6, 3, 64, 64)
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for other, array in arrays.items():
                whole = io.BytesIO()
                np.save(whole, array)
                archive.writestr(f"{other}.npy", head.getvalue() + bytes(64) if other == name else whole.getvalue())
    file.write_bytes(buffer.getvalue())
    return told


# --------------------------------------------------------------------------------------------------- no file any more


def damage_kind(rng: random.Random, file: Path) -> str:
    """The file goes, or something stands in its place that is no file."""
    kind = rng.choice(("gone", "gone", "a folder", "a pipe", "a link to itself", "/dev/zero", "a dangling link", "dir"))
    file.unlink()
    if kind == "a folder":
        file.mkdir()
    elif kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a link to itself":
        file.symlink_to(file.name)
    elif kind == "/dev/zero":
        file.symlink_to("/dev/zero")
    elif kind == "a dangling link":
        file.symlink_to("nowhere")
    elif kind == "dir":
        folder = file.parent
        shutil.rmtree(folder)
        if rng.random() < 0.5:
            folder.write_bytes(b"")
            return "its folder is a file"
        return "its folder is gone"
    return f"{kind} in its place" if kind != "gone" else "gone"
