"""Tell what `compare` measured: a sentence, tables, the frontier, pictures of the same noise, lines of CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.core import disk
from halfstep.core.errors import RunError
from halfstep.core.recipe import RunRecord
from halfstep.core.results import Compared, Fidelity, Pipeline, PlanRow, read_compared
from halfstep.data.arrays import read_arrays
from halfstep.data.pictures import picture_grid
from halfstep.report.charts import pareto, time_pareto
from halfstep.report.figures import Pareto, Series, frontier
from halfstep.report.page import Cell, Plate, Report, Table, write_report
from halfstep.report.palette import percent
from halfstep.report.story import MAX_PICTURES
from halfstep.report.tables import plans_table
from halfstep.report.words import verdict_of

ROWS = 8
"""Noises whose pictures stand side by side."""

FILES = {
    "compare.json": "every number of this page",
    "compare.csv": "one line for each pipeline",
    "samples.png": "pictures of the same noise: a row for each noise, a column for each pipeline",
    "recipe.json": "what was asked and what was read",
}


def tell_compared(out: Path) -> Path:
    """Write report.html and samples.png of a folder that `halfstep compare` wrote; returns the page's path.

    Raises RunError for files that are missing or hold something else.
    """
    record, run = read_compared(out / "compare.json"), RunRecord.load(out)
    drawn, beside = _pictures(out / "pictures.npz", record)
    report = Report(
        title="Pipelines side by side",
        summary=summary(record),
        facts=_facts(run, record),
        parts=(
            *(quality_table(record), cost_table(record), fidelity_table(record), near_table(record)),
            *_frontiers(record),
            *(_same_noise(record, drawn), _nearest(record, drawn, beside)),
        ),
        files={name: what for name, what in FILES.items() if name == "samples.png" or (out / name).exists()},
    )
    rows = np.stack([drawn[name] for name in record.pipelines], axis=1)[:ROWS]  # [noise, pipeline, C, H, W]
    disk.write_png(out / "samples.png", picture_grid(rows.reshape(-1, *rows.shape[2:]), columns=rows.shape[1]))
    return write_report(report, out)


def _facts(run: RunRecord, record: Compared) -> dict[str, str]:
    about = record.comparison.about
    return {
        **{name: f"{one.source}: {one.what}" for name, one in record.pipelines.items()},
        "data": f"{run.inputs.get('data', '')}, fingerprint {about.data}",
        "seed": str(about.seed),
        "time of the call": f"{record.comparison.seconds or 0:.0f} s",
        **{key: str(value) for key, value in about.machine.items()},
    }


def _pictures(file: Path, record: Compared) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By pipeline: its first pictures, and the images of the data that they are nearest to, uint8 [N, C, H, W]."""
    what, do = "pictures of every pipeline, uint8 [N, C, H, W]", "run halfstep compare again"
    found = read_arrays(file, MAX_PICTURES, what=what, do=do)
    shapes = {array.shape if array.dtype == np.uint8 else () for array in found.values()}
    wanted = {f"{kind}-{k}" for kind in ("pictures", "nearest") for k in range(len(record.pipelines))}
    (shape, *others) = shapes or {()}
    counts = {len(one.near) for one in record.pipelines.values()}
    if (
        others
        or len(shape) != 4
        or not shape[0]
        or shape[1] not in (1, 3)
        or counts != {shape[0]}
        or set(found) != wanted
    ):
        told = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in found.items())
        raise RunError(got=told or "none", expected=what, where=file, do=do)
    drawn, beside = (
        {name: found[f"{kind}-{k}"] for k, name in enumerate(record.pipelines)} for kind in ("pictures", "nearest")
    )
    return drawn, beside


# ----------------------------------------------------------------------------------------- in words and tables


def summary(record: Compared) -> str:
    """What the others are beside the first, one clause for each; after what is wrong with the measurement."""
    about = record.comparison.about
    wrong = "".join(f"Warning: {one}. " for one in about.warnings)
    others = [(name, row) for name, row in record.comparison.plans.items() if name != about.reference]
    if not others:
        return f"{wrong}{about.reference} alone: name more pipelines to hold against it."
    clauses = (
        f"{name} takes {percent(row.wall_share)} of its time, quality {verdict_of(row, about.tolerance)}"
        for name, row in others
    )
    return f"{wrong}Beside {about.reference}, on the same noise: {'; '.join(clauses)}."


def quality_table(record: Compared, *, brief: bool = False) -> Table:
    """Time, distance and verdict of each beside the first. `brief`: what fits a terminal of 80 columns."""
    table = plans_table(record.comparison, "Quality and time, beside the first", brief=brief)
    return replace(table, best=None)  # none is the run's own, whatever its name


def cost_table(record: Compared) -> Table:
    """What each pipeline costs."""
    plans = record.comparison.plans
    rows = tuple(_cost_cells(name, one, plans[name]) for name, one in record.pipelines.items())
    about = record.comparison.about
    note = (
        "Parameters, bytes and memory of the networks that the plan calls. MiB of memory: weights as held (a VAE's "
        f"too), and the most that one call at batch {about.batch} holds beyond them ({about.device}; on a CPU by "
        "torch's own allocator). MMACs per image and trajectory."
    )
    columns = ("", "calls", "params", "MiB stored", "MMACs", "held", "of a call", "MiB of memory", "runs")
    return Table(title="What each costs", columns=columns, rows=rows, note=note)


def _cost_cells(name: str, one: Pipeline, row: PlanRow) -> tuple[str, ...]:
    peak, memory = one.peak_mib, one.memory_mib
    return (
        name,
        f"{row.calls:,}",
        f"{one.params / 1e6:.2f} M",
        f"{one.stored_mib:,.2f}",
        f"{row.macs / 1e6:,.0f}",
        f"{one.held_mib:,.1f}",
        "–" if peak is None else f"{peak:,.1f}",
        "–" if memory is None else f"{memory:,.1f}",
        one.what,
    )


def fidelity_table(record: Compared) -> Table:
    """How far each one's pictures are from their target."""
    rows = tuple((name, *_fidelity_cells(one.fidelity), one.target) for name, one in record.pipelines.items())
    known = [one.fidelity for one in record.pipelines.values() if one.fidelity is not None]
    note = (
        "Of the same noise, picture by picture. Converged pictures: where a fine solver leads the first one's network. "
        "A pipeline of another network leads elsewhere and is held beside the first one's own pictures: numbers to two "
        "different targets must not be compared. What is far off can be a good picture all the same; distances to the "
        "data decide."
    )
    if known:
        note = f"{known[0].n} pictures, features {known[0].features_name}, means with 95 % intervals. {note}"
    columns = ("", "mean squared error", "PSNR dB", "SSIM", "in features", "beside")
    return Table(title="Fidelity", columns=columns, rows=rows, note=note)


def _fidelity_cells(one: Fidelity | None) -> tuple[str, ...]:
    if one is None:
        return ("–",) * 4
    psnr = "∞" if one.mse.value == 0 else f"{one.psnr_db.value:.1f}"
    features = "–" if one.features is None else str(one.features)
    return f"{one.mse}", psnr, f"{one.ssim}", features


def near_table(record: Compared) -> Table:
    """How near the first pictures are to images of the data, beside real images that were held out."""
    held = record.held_out
    rows = [
        (name, str(len(one.near)), f"{min(one.near):.3g}", f"{float(np.median(one.near)):.3g}", str(len(one.copies)))
        for name, one in record.pipelines.items()
    ]
    rows.append(("real images, held out", f"{held.n:,}", f"{held.least:.3g}", f"{held.median:.3g}", "—"))
    note = (
        f"Distance in features to the nearest of the {record.images:,} images of the data. Held out: {held.what}. A "
        f"picture that is nearer than all of these is marked as one that may repeat an image; a fair one is that once "
        f"in {held.n + 1:,} times."
    )
    columns = ("", "pictures", "least", "median", "nearer than any held out")
    return Table(title="Nearest images of the data", columns=columns, rows=tuple(rows), note=note)


# ----------------------------------------------------------------------------------------- in pictures


def _frontiers(record: Compared) -> tuple[Pareto, ...]:
    return tuple(_with_frontier(one) for one in (time_pareto(record.comparison), pareto(record.comparison, [])))


def _with_frontier(figure: Pareto) -> Pareto:
    """The same with a line through the points that no cheaper one is as good as."""
    points = [point[:2] for series in figure.series for point in series.points]
    line = Series(name="frontier", points=tuple((*point, None, None) for point in frontier(points)), style="line")
    return replace(figure, series=(line, *figure.series))


def _same_noise(record: Compared, drawn: Mapping[str, np.ndarray]) -> Plate:
    names = tuple(record.pipelines)
    count = min(ROWS, len(drawn[names[0]]))
    rows = tuple(tuple(Cell(drawn[name][k : k + 1]) for name in names) for k in range(count))
    return Plate(title="Pictures of the same noise", columns=names, rows=rows, note="Each row begins in one noise.")


def _nearest(record: Compared, drawn: Mapping[str, np.ndarray], beside: Mapping[str, np.ndarray]) -> Plate:
    names = tuple(record.pipelines)
    rows = tuple(
        tuple(_pair(record.pipelines[name], k, np.stack([drawn[name][k], beside[name][k]])) for name in names)
        for k in range(len(drawn[names[0]]))
    )
    note = "Left a picture, right the image of the data that is nearest to it, and their distance in features."
    return Plate(title="Each picture and the nearest image of the data", columns=names, rows=rows, note=note)


def _pair(one: Pipeline, k: int, images: np.ndarray) -> Cell:
    marked = k in one.copies
    return Cell(images, f"{one.near[k]:.3g}" + ", nearer than any held out" * marked, marked)


# ----------------------------------------------------------------------------------------- as CSV


def csv_of(record: Compared) -> str:
    """One line for each pipeline; numbers as measured, units in the names, nothing where nothing was measured."""
    lines = [_line(name, one, record) for name, one in record.pipelines.items()]
    writer = csv.DictWriter(
        file := io.StringIO(), list(dict.fromkeys(key for one in lines for key in one)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def _line(name: str, one: Pipeline, record: Compared) -> dict[str, Any]:
    row, about = record.comparison.plans[name], record.comparison.about
    change = row.difference
    line: dict[str, Any] = {"name": name, "source": one.source, "runs": one.what, "calls": row.calls}
    line |= {"params": one.params, "stored_mib": one.stored_mib, "macs_per_image": row.macs}
    line |= {"ms_batch_1": row.wall_ms if about.batch == 1 else row.alone_ms, f"ms_batch_{about.batch}": row.wall_ms}
    line |= {"time_share": row.wall_share, "held_mib": one.held_mib, "peak_mib": one.peak_mib}
    for metric, quality in row.quality.items():
        line |= {metric: quality.value, f"{metric}_low": quality.low, f"{metric}_high": quality.high}
    line |= {"fd_change": change.value, "fd_change_low": change.low, "fd_change_high": change.high}
    line |= {
        "fd_change_share": change.share,
        "verdict": "" if name == about.reference else verdict_of(row, about.tolerance),
    }
    fidelity = one.fidelity
    for metric in ("mse", "ssim", "features"):
        found = None if fidelity is None else getattr(fidelity, metric)
        for end, key in (("value", ""), ("low", "_low"), ("high", "_high")):
            line[f"fidelity_{metric}{key}"] = None if found is None else getattr(found, end)
    line |= {
        "fidelity_beside": one.target,
        "nearest_least": min(one.near),
        "nearest_median": float(np.median(one.near)),
    }
    return line | {
        "nearer_than_held_out": len(one.copies),
        "images": about.n,
        "device": about.device,
        "dtype": about.dtype,
    }
