"""Captions and prompts: what pictures show in words, one text for every image, read and checked as images are.

    folder:DIR      metadata.jsonl (file_name, text), the imagefolder convention, or a .txt beside each picture
    tar:FILE        the same inside of an archive, or of shards
    hub:NAME        a column of texts; of parquet:FILES too
    prompts:FILE    one prompt a line (.txt), or JSON lines with a text and, where wanted, its class (.jsonl)

Texts are refused rather than repaired: missing for some pictures, empty, of several lines, named twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from halfstep.core.disk import MAX_RECORDS, parse_json, read_bytes
from halfstep.core.errors import DataError
from halfstep.core.typed import near, shown
from halfstep.data.layout import arrange, sift
from halfstep.data.shards import chosen_names
from halfstep.data.sources import bad, names_below
from halfstep.data.tables import read_texts
from halfstep.data.tars import contents

METADATA = "metadata.jsonl"
COLUMNS = ("text", "caption", "prompt")
"""Under which names the ecosystem keeps captions."""
MAX_LETTERS = 10_000
SCHEMES = ("folder", "tar", "parquet", "hub", "prompts")


@dataclass(frozen=True, kw_only=True, eq=False)
class Captions:
    """A text for every image, of image k by k alone.

    texts: the different ones, in the order in which they first come.  order: int64 [N], image k has
    texts[order[k % N]].  labels: int64 [N], the class number of each, where the file tells it.
    """

    name: str
    texts: tuple[str, ...]
    order: np.ndarray
    labels: np.ndarray | None = None

    @classmethod
    def of(cls, every: Iterable[str], name: str) -> Captions:
        """Those of images 0, 1, …; raises DataError for one that is no text, and for none at all."""
        found: dict[str, int] = {}
        order = [found.setdefault(text_of(one, f"{name}: image {k}"), len(found)) for k, one in enumerate(every)]
        if not order:
            raise bad(name, "no captions", "at least one", "give another file")
        return cls(name=name, texts=tuple(found), order=np.array(order, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, k: int) -> str:
        """The caption of image k; after the last one they begin again."""
        return self.texts[self.order[k % len(self.order)]]

    @property
    def fingerprint(self) -> str:
        """16 hex digits of texts, order and labels."""
        labels = None if self.labels is None else self.labels.tolist()
        content = json.dumps([self.texts, self.order.tolist(), labels])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def mixed(self, seed: int = 0) -> Captions:
        """The same in an order drawn by `seed`, so that every beginning has the mix of the whole, up to chance: files
        are often sorted by class. Pictures that are compared with the data have this order."""
        drawn = np.random.default_rng(seed).permutation(len(self))
        return replace(self, order=self.order[drawn], labels=None if self.labels is None else self.labels[drawn])


def read_captions(source: str, *, split: str = "train", column: str | None = None) -> Captions:
    """The captions of a source of images, of image k of `load_images(source, split=split)`, or prompts of a file.

    source: `folder:DIR`, `tar:FILES`, `parquet:FILES`, `hub:NAME` or `prompts:FILE`.  column: the column of a
    table or field of JSON lines that holds the text; None: the one of `COLUMNS` that is there. Raises: DataError.
    """
    scheme, _, place = source.partition(":")
    if scheme not in SCHEMES or not place:
        meant = near(scheme, SCHEMES)
        expected = "one of " + ", ".join(f"{name}:…" for name in SCHEMES)
        do = f"did you mean {meant}:…?" if meant else "put the pictures into a folder with a metadata.jsonl"
        raise bad("captions", f"source {source!r}", expected, do)
    if scheme == "prompts":
        return _prompts(Path(place).expanduser(), column, source)
    if scheme in ("hub", "parquet"):
        return Captions.of(read_texts(source, split, (column,) if column else COLUMNS), source)
    if scheme == "folder":
        files = _folder(Path(place).expanduser())
        return Captions.of(_of_files(files, _chosen(files, split), column), source)
    shards = (_archive(*shard, column) for shard in chosen_names(place, split))
    return Captions.of((text for texts in shards for text in texts), source)


def text_of(value: Any, where: object) -> str:
    """One caption without the spaces around it. Raises DataError unless it is one line of text."""
    if not isinstance(value, str):
        raise bad(where, shown(value), "a text", "write the caption as a text")
    text = value.strip()
    if not text or len(text.splitlines()) > 1 or len(text) > MAX_LETTERS:
        got = "an empty caption" if not text else f"{len(text.splitlines())} lines of {len(text)} letters"
        raise bad(where, got, f"one line of at most {MAX_LETTERS:,} letters", "write what the picture shows in a line")
    return text


# ---- files of prompts ----------------------------------------------------------------------------------------------


def _prompts(file: Path, column: str | None, name: str) -> Captions:
    """One prompt a line, or JSON lines, told apart by the file's suffix."""
    suffix = file.suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        raise bad(file, f"a {suffix or 'nameless'} file", "prompts in .txt or .jsonl", "write one prompt a line")
    lines = _lines(file, "prompts, one a line")
    if suffix == ".txt":
        return Captions.of((text_of(line, f"{file}: line {n}") for n, line in enumerate(lines, start=1)), name)
    records = [_record(line, f"{file}: line {n}") for n, line in enumerate(lines, start=1)]
    texts = [_field(one, column, f"{file}: line {n}") for n, one in enumerate(records, start=1)]
    labels = [one.get("label") for one in records]
    told = sum(label is not None for label in labels)
    if told and not all(type(label) is int and 0 <= label < 1 << 16 for label in labels):
        line = next(n for n, label in enumerate(labels, start=1) if type(label) is not int or not 0 <= label < 1 << 16)
        expected = "a class number in every line, or in none"
        raise bad(f"{file}: line {line}", f"label {shown(labels[line - 1])}", expected, "mend that line")
    found = Captions.of(texts, name)
    return replace(found, labels=np.array(labels, dtype=np.int64)) if told else found


def _lines(file: Path, what: str) -> list[str]:
    return _lines_of(read_bytes(file, MAX_RECORDS, what=what, do="check the path", error=DataError), file, what)


def _lines_of(content: bytes, file: object, what: str) -> list[str]:
    """The lines of a text file in UTF-8. Raises DataError for a file without any."""
    try:
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise bad(
            file, f"bytes that are no UTF-8 ({error.reason} at {error.start})", what, "save it as UTF-8"
        ) from error
    if lines == [""]:
        raise bad(file, "an empty file", what, "write at least one")
    return lines


def _record(line: str, where: str) -> dict:
    return parse_json(line.encode(), where=where, what="a JSON object", do="mend that line", error=DataError)


def _field(record: Mapping[str, Any], column: str | None, where: str) -> str:
    """The text of a record, in the field of this name or in the one of `COLUMNS` that it has."""
    known = (column,) if column else COLUMNS
    found = [name for name in known if name in record]
    if len(found) != 1:
        got = f"fields {', '.join(map(str, record)) or 'none'}"
        raise bad(where, got, f"one of {', '.join(known)}", "name the text's field so")
    return text_of(record[found[0]], where)


# ---- folders and archives ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    """What lies below `root`, a folder or an archive, in its order, and how texts there are read."""

    root: Path
    names: list[PurePosixPath]
    read: Callable[[PurePosixPath], bytes]

    def lines(self, name: PurePosixPath, what: str) -> list[str]:
        return _lines_of(self.read(name), self.where(name), what)

    def where(self, name: PurePosixPath) -> str:
        return f"{self.root}:{name}" if self.root.is_file() else str(self.root / name)


def _folder(root: Path) -> _Files:
    def read(name: PurePosixPath) -> bytes:
        return read_bytes(root / name, MAX_RECORDS, what="captions", do="check the path", error=DataError)

    return _Files(root, names_below(root), read)


def _chosen(files: _Files, split: str) -> list[PurePosixPath]:
    """The pictures of a split."""
    pictures, _ = sift(files.names, files.root)
    found = arrange([files.names[i] for i in pictures], split, files.root)
    return [files.names[pictures[i]] for i in found.chosen]


def _archive(file: Path, names: list[str], chosen: list[str], column: str | None) -> list[str]:
    """The captions of the pictures chosen in a tar, whose texts are read at once: it is a stream."""
    found = contents(file, {name for name in names if name.endswith((".txt", METADATA))})
    texts = {PurePosixPath(name): content for name, content in found.items()}
    files = _Files(file, [PurePosixPath(name) for name in names], texts.__getitem__)
    return _of_files(files, [PurePosixPath(name) for name in chosen], column)


def _of_files(files: _Files, chosen: list[PurePosixPath], column: str | None) -> list[str]:
    """From every metadata.jsonl there, or else from the .txt of the same name beside each picture."""
    root, names = files.root, files.names
    tables = [one for one in names if one.name == METADATA]
    if tables:
        told = _told_by(files, tables, column)
        how = f"a line in {METADATA}"
    else:
        beside = {one.with_suffix("") for one in names if one.suffix == ".txt"}
        told = {one: _beside(files, one) for one in chosen if one.with_suffix("") in beside}
        how = f"a .txt of its name, or a {METADATA}"
    without = [one for one in chosen if one not in told]
    if without:
        some = f"{len(without)} of {len(chosen)} pictures without a caption, the first {without[0]}"
        got = some if told else "pictures without captions"
        raise bad(root, got, f"for every picture {how}", "write the missing ones, or remove these pictures")
    return [told[one] for one in chosen]


def _beside(files: _Files, picture: PurePosixPath) -> str:
    name = picture.with_suffix(".txt")
    return text_of("\n".join(files.lines(name, "a caption")), files.where(name))


def _told_by(files: _Files, tables: list[PurePosixPath], column: str | None) -> dict[PurePosixPath, str]:
    """The caption of each picture that these tables name."""
    there = set(files.names)
    told: dict[PurePosixPath, str] = {}
    for table in tables:
        for number, line in enumerate(files.lines(table, "lines of JSON"), start=1):
            where = f"{files.where(table)}: line {number}"
            record = _record(line, where)
            given = record.get("file_name")
            picture = table.parent / given if isinstance(given, str) else None
            if picture is None or picture not in there:
                raise bad(
                    where, f"file_name {shown(given)}", "a picture that lies beside or below it", "mend that line"
                )
            if picture in told:
                raise bad(where, f"{given} for the second time", "one line for each picture", "remove one of them")
            told[picture] = _field(record, column, where)
    return told
