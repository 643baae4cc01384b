"""Tables of pictures: datasets of the Hugging Face hub or of a local folder, such as parquet from any tool."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfstep.core.errors import printable
from halfstep.data.layout import in_order, split_of
from halfstep.data.sources import MAX_CLASSES, Source, bad, reading

LABELS = ("label", "labels", "class", "target", "category", "fine_label", "y")
REACH_SECONDS = 5.0  # how long the hub may take to answer at all


def read_table(place: str, split: str) -> Source:
    """The picture column of a table (Image, or bytes, or a struct that holds bytes), and its label column if any.

    A label column is a ClassLabel, or text or integers under a name of `LABELS`. Raises: DataError.
    """
    import datasets
    from huggingface_hub import constants

    where = f"hub:{place}"
    local = Path(place).expanduser()
    inside = local.exists()
    splits = _tables(place)
    table = _split(splits, split, where)
    column = _picture_column(table, where)
    typed = isinstance(table.features[column], datasets.Image)
    raw = table.select_columns([column])
    raw = raw.cast_column(column, datasets.Image(decode=False)) if typed else raw
    target = _label_column(table.features)
    labels, classes = (None, ()) if target is None else _labels(splits, table, target, where)
    rest = [name for name in table.column_names if name not in (column, target if classes else None)]
    caches = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    roots = [os.path.abspath(root) for root in ([local] if inside else caches)]
    return Source(
        items=lambda: _rows(raw, column, where, roots),
        count=len(table),
        labels=labels,
        classes=classes,
        left_out=(printable(f"{len(rest)} column{'s' * (len(rest) > 1)} ({', '.join(rest)})", 120),) if rest else (),
    )


def read_texts(place: str, split: str, columns: Sequence[str]) -> list[Any]:
    """The column of a table that has one of these names, row by row, as `read_table` has them. Raises: DataError."""
    where = f"hub:{place}"
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


def _split(splits: Mapping[str, Any], split: str, where: str) -> Any:
    wanted = split if split in splits else split_of(split)
    found = [name for name in splits if wanted in (name, split_of(name))]
    if len(found) != 1:
        raise bad(where, f"split {split!r}", f"one of: {', '.join(splits)}", "name a split that it has")
    return splits[found[0]]


def _picture_column(table: Any, where: str) -> str:
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


def _labels(splits: Mapping[str, Any], table: Any, target: str, where: str) -> tuple[list[int] | None, tuple[str, ...]]:
    """The class of every row and the classes' names; None and () for a split whose rows have none."""
    values, names = list(table[target]), getattr(table.features[target], "names", None)
    unlabelled = (None, -1)  # how the hub marks it
    if all(value in unlabelled for value in values):
        return None, ()
    if any(value in unlabelled for value in values):
        raise bad(where, f"rows without {target}", "a label in every row", "remove these rows")
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


def _rows(table: Iterable[dict], column: str, where: str, roots: list[str]) -> Iterator[tuple[str, Path | bytes]]:
    for number, row in enumerate(table):
        value = row[column] if isinstance(row[column], Mapping) else {"bytes": row[column]}
        path = value.get("path") or ""
        name = f"{where}: row {number} {path}".strip()
        if not value.get("bytes") and not path:
            raise bad(name, "no image", "an image in every row", "remove this row")
        if not value.get("bytes") and not any(Path(os.path.abspath(path)).is_relative_to(root) for root in roots):
            raise bad(name, "a file outside the dataset", "the image's bytes", "save a copy that holds its images")
        yield name, value.get("bytes") or Path(path)
