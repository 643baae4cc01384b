"""Tables of pictures: datasets of the Hugging Face hub or of a local folder, and parquet from any tool."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.core.errors import printable
from halfstep.data.layout import in_order, split_of
from halfstep.data.shards import shard_files, split_files
from halfstep.data.sources import MAX_CLASSES, Source, bad, reading

LABELS = ("label", "labels", "class", "target", "category", "fine_label", "y")
REACH_SECONDS = 5.0  # how long the hub may take to answer at all


def read_table(place: str, split: str) -> Source:
    """The picture column of a table (Image, or bytes, or a struct that holds bytes), and its label column if any.

    A label column is a ClassLabel, or text or integers under a name of `LABELS`. Raises: DataError.
    """
    import datasets
    from huggingface_hub import constants

    local = Path(place).expanduser()
    caches = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    roots = [os.path.abspath(root) for root in ([local] if local.exists() else caches)]
    return _source(_tables(place), split, _Where(f"hub:{place}"), roots)


def read_parquet(place: str, split: str) -> Source:
    """The same of parquet files, as `shard_files` names them; `datasets` reads them into its own memory-mapped cache.

    Splits are told by the files' names or folders. Raises DataError, naming the shard that is cut off, or has other
    columns than the first.
    """
    files = shard_files(place, "parquet")
    import pyarrow.parquet

    splits = _parquet(files, place, split)
    kept = [file for file, mine in zip(files, split_files(files, place, split)[1], strict=True) if mine]
    rows = tuple(pyarrow.parquet.read_metadata(file).num_rows for file in kept)
    return _source(splits, "train", _Where(f"parquet:{place}", tuple(map(str, kept)), rows), [])


@dataclass(frozen=True)
class _Where:
    """What a message calls a table, and a row of it: by its shard, where it is of several."""

    name: str
    shards: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name

    def row(self, number: int) -> str:
        for shard, count in zip(self.shards, self.rows, strict=True):
            if number < count:
                return f"{shard}: row {number}"
            number -= count
        return f"{self.name}: row {number}"


def _source(splits: Mapping[str, Any], split: str, where: _Where, roots: list[str]) -> Source:
    import datasets

    table = _split(splits, split, where)
    column = _picture_column(table, where)
    typed = isinstance(table.features[column], datasets.Image)
    raw = table.select_columns([column])
    raw = raw.cast_column(column, datasets.Image(decode=False)) if typed else raw
    target = _label_column(table.features)
    labels, classes = (None, ()) if target is None else _labels(splits, table, target, where)
    rest = [name for name in table.column_names if name not in (column, target if classes else None)]
    return Source(
        pictures=_Rows(raw, column, where, roots),
        labels=labels,
        classes=classes,
        left_out=(printable(f"{len(rest)} column{'s' * (len(rest) > 1)} ({', '.join(rest)})", 120),) if rest else (),
    )


def _parquet(files: Sequence[Path], place: str, split: str) -> Mapping[str, Any]:
    """The tables of parquet files: those of the split as "train", those of the others, whose classes count too, as
    "test"."""
    import datasets
    import pyarrow.parquet

    columns: list[str] = []
    for file in files:
        with reading(file, "a whole parquet file"):
            there = pyarrow.parquet.read_schema(file).names
        columns = columns or there
        if set(there) != set(columns):
            differ = ", ".join(sorted(set(there) ^ set(columns)))
            got, expected = f"other columns than {files[0].name} ({differ} differ)", "the same in every shard"
            raise bad(file, got, expected, "write the missing columns, or leave that shard out")
    wanted, mine = split_files(files, place, split)
    if (split_of(wanted) or wanted) != "train":
        raise bad(place, f"split {split!r}", "one of: train", "name a split that it has")
    parts = {"train": [str(f) for f, kept in zip(files, mine, strict=True) if kept]}
    others = [str(f) for f, kept in zip(files, mine, strict=True) if not kept]
    parts |= {"test": others} if others else {}
    with reading(f"parquet:{place}", "tables of the same columns"), _quiet(place, hub=False):
        return datasets.load_dataset("parquet", data_files=parts)


def read_texts(where: str, split: str, columns: Sequence[str]) -> list[Any]:
    """The column of a table, `hub:NAME` or `parquet:FILES`, that has one of these names, row by row, as its pictures
    are read. Raises: DataError."""
    scheme, _, place = where.partition(":")
    if scheme == "parquet":
        table = _split(_parquet(shard_files(place, "parquet"), place, split), "train", where)
    else:
        table = _split(_tables(place), split, where)
    found = [name for name in columns if name in table.column_names]
    if len(found) != 1:
        got = f"columns {', '.join(map(printable, table.column_names))}"
        raise bad(where, got, f"one of {', '.join(columns)}", "name the captions' column")
    return list(table[found[0]])


def _tables(place: str) -> Mapping[str, Any]:
    """The splits of a dataset by name."""
    import datasets

    local = Path(place).expanduser()
    inside = local.exists()
    with reading(f"hub:{place}", "a dataset"), _quiet(place, hub=not inside):
        return datasets.load_dataset(str(local) if inside else place)


@contextmanager
def _quiet(place: str, *, hub: bool) -> Iterator[None]:
    """Without the libraries' warnings, and without the network where it is not wanted or does not answer: what is in
    the cache is found all the same, and what is not is refused at once instead of after five retries."""
    import datasets
    from huggingface_hub import constants, get_session

    why = ""
    if hub and (datasets.config.HF_HUB_OFFLINE or constants.HF_HUB_OFFLINE):
        why = "HF_HUB_OFFLINE is set"
    elif hub:
        try:
            get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
        except Exception as error:  # of whichever client the hub's library uses
            why = f"{constants.ENDPOINT} does not answer: {error}"
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    verbosity, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if why or not hub:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
        datasets.disable_progress_bars()  # they are for downloads
    try:
        yield
    except Exception as error:
        if why:
            do = "connect, or give a folder with a copy of it"
            raise bad(f"hub:{place}", f"nothing in the cache, and {why}", "a dataset", do) from error
        raise
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _split(splits: Mapping[str, Any], split: str, where: object) -> Any:
    wanted = split if split in splits else split_of(split)
    found = [name for name in splits if wanted in (name, split_of(name))]
    if len(found) != 1:
        raise bad(where, f"split {split!r}", f"one of: {', '.join(splits)}", "name a split that it has")
    return splits[found[0]]


def _picture_column(table: Any, where: object) -> str:
    import datasets

    columns = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    columns = columns or [name for name, feature in table.features.items() if _holds_bytes(feature)]
    if len(columns) != 1 or len(table) == 0:
        got = f"{len(table)} rows with {len(columns)} image columns among {', '.join(table.column_names)}"
        raise bad(where, got, "rows with one image column", "save a copy with one image column")
    return columns[0]


def _holds_bytes(feature: Any) -> bool:
    """What pandas, polars and Spark write of pictures: plain bytes, or a struct with them."""
    if isinstance(feature, Mapping):
        return "bytes" in feature and _holds_bytes(feature["bytes"])
    return str(getattr(feature, "dtype", "")) in ("binary", "large_binary", "binary_view")


def _label_column(features: Mapping[str, Any]) -> str | None:
    import datasets

    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if named:  # the first: CIFAR-100 begins with the fine one
        return "label" if "label" in named else named[0]
    kinds = {name: str(getattr(feature, "dtype", "")) for name, feature in features.items()}
    plain = [name for name in LABELS if kinds.get(name, "").startswith(("int", "uint", "string", "large_string"))]
    return next(iter(plain), None)


def _labels(
    splits: Mapping[str, Any], table: Any, target: str, where: _Where
) -> tuple[list[int] | None, tuple[str, ...]]:
    """The class of every row and the classes' names; None and () for a split whose rows have none."""
    values, names = list(table[target]), getattr(table.features[target], "names", None)
    unlabelled = (None, -1)  # how the hub marks it
    if all(value in unlabelled for value in values):
        return None, ()
    first = next((k for k, value in enumerate(values) if value in unlabelled), None)
    if first is not None:
        do = "remove the rows without one"
        raise bad(where.row(first), f"rows without {target}, this the first", "a label in every row", do)
    if names is not None:
        if not 0 <= min(values) <= max(values) < len(names):
            raise bad(where, f"{target} {min(values)} to {max(values)}", f"0 to {len(names) - 1}", "mend its labels")
        return values, tuple(map(printable, names))
    every = {x for one in splits.values() if target in one.column_names for x in one.unique(target)}
    every = {x for x in every if x not in unlabelled}  # of all splits, so that they number them alike
    ordered = in_order(every) if isinstance(values[0], str) else sorted(every)
    if len(ordered) > MAX_CLASSES:
        raise bad(where, f"{len(ordered)} different {target}", f"{MAX_CLASSES} classes at most", "remove the column")
    number = {value: k for k, value in enumerate(ordered)}
    return [number[value] for value in values], tuple(map(printable, ordered))


@dataclass(frozen=True)
class _Rows:
    """The pictures of a table's column as a sequence of (where, image)."""

    table: Any
    column: str
    where: _Where
    roots: list[str]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, k: int) -> tuple[str, Path | bytes]:
        found = self.table[k][self.column]
        value = found if isinstance(found, Mapping) else {"bytes": found}
        path = value.get("path") or ""
        name = f"{self.where.row(k)} {path}".strip()
        if not value.get("bytes") and not path:
            raise bad(name, "no image", "an image in every row", "remove this row")
        if not value.get("bytes") and not any(Path(os.path.abspath(path)).is_relative_to(root) for root in self.roots):
            raise bad(name, "a file outside the dataset", "the image's bytes", "save a copy that holds its images")
        return name, value.get("bytes") or Path(path)
