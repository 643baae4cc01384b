"""What is drawn of a run: quality against time and cost, plans, error tables, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.core import disk
from halfstep.core.errors import RunError
from halfstep.core.plan import StepPlan
from halfstep.core.results import (
    Comparison,
    Cost,
    FreeRecord,
    GridScores,
    Rings,
)
from halfstep.report.figures import Curve, Heatmap, Pareto, PlanChart, Series
from halfstep.search.damage import ErrorTable
from halfstep.search.scores import Scored
from halfstep.training.train import Logged


def pareto(record: Comparison, searched: Sequence[Scored], images: int = 0) -> Pareto:
    """Quality against MACs: the plans that the search measured, on `images` each, and the final rows with intervals."""
    of = record.reference.macs
    dots = tuple((one.macs / of if one.macs else one.share, one.score, None, None) for one in searched)
    label = f"the search, on {images} images\n(uncorrected: higher)"
    series = [Series(name=label, points=dots, style="points")] if dots else []
    for name, row in record.plans.items():
        fd = row.quality["fd"]
        style: Any = "star" if name in ("plan", "reference") else "points"
        series.append(Series(name=name, points=((row.share, fd.value, fd.low, fd.high),), style=style))
    reference = record.reference.quality["fd"]
    return Pareto(
        title="Quality against cost",
        metric_label="Fréchet distance (lower is better)",
        series=tuple(series),
        band=(reference.low, reference.high),
        floor=record.about.floor.high if record.about.floor else None,
    )


def time_pareto(
    record: Comparison,
    kinds: Mapping[str, Sequence[str]] | None = None,
    marked: Mapping[str, str] | None = None,
    free: FreeRecord | None = None,
) -> Pareto:
    """Quality against the measured milliseconds of an image, each plan with its interval.

    `kinds`: what a series is called, and the names of its plans, of which the best are connected (no cheaper one is as
    good); the others stand alone. `marked`: what is said beside a plan, by its name. `free`: the stock samplers that
    were measured, at the times that their prices say.
    """
    about, kinds, marked = record.about, dict(kinds or {}), dict(marked or {})
    points = {}
    for name, row in record.plans.items():
        fd = row.quality["fd"]
        points[name] = (row.wall_ms / about.batch, fd.value, fd.low, fd.high)
    series = [Series(name=kind, points=tuple(points[n] for n in of), style="frontier") for kind, of in kinds.items()]
    if free is not None and (timed := [arm for arm in free.frontier if arm.ms is not None]):
        dots = tuple((arm.ms or 0.0, arm.fd, None, None) for arm in timed)
        series.append(Series(name=f"stock samplers, {free.images} images", points=dots, style="frontier"))
    alone = [name for name in points if not any(name in names for names in kinds.values()) or name == "plan"]
    series += [
        Series(name=name, points=(points[name],), style="star" if name in ("plan", about.reference) else "points")
        for name in alone
    ]
    series += [Series(name=said, points=(points[name],), style="mark") for name, said in marked.items()]
    reference = record.reference.quality["fd"]
    threads = f", {about.threads} threads" if about.threads else ""
    return Pareto(
        title="Quality against time",
        metric_label="Fréchet distance (lower is better)",
        series=tuple(series),
        band=(reference.low, reference.high),
        floor=about.floor.high if about.floor else None,
        cost_label=f"milliseconds per image (batch {about.batch}{threads})",
        beat=points[about.free][:2] if about.free else None,
    )


def plan_chart(plan: StepPlan) -> PlanChart:
    shares = {name: price.macs / plan.prices[plan.reference].macs for name, price in plan.prices.items()}
    steps = tuple(row.timestep for row in plan.rows)
    guides = plan.guides if any(plan.guides) else ()
    return PlanChart(
        title="What runs at each step", timesteps=steps, entries=plan.entries, shares=shares, guides=guides
    )


def done_after(plan: StepPlan) -> list[float]:
    """The share of a trajectory's price that is done after each row: of its time where every call has one, else of its
    MACs."""
    nets = [(row.entry, *([row.guide.entry] if row.guide else [])) for row in plan.rows]
    timed = all(plan.prices[name].us is not None for names in nets for name in names)
    prices = [sum((plan.prices[n].us or 0.0) if timed else plan.prices[n].macs for n in names) for names in nets]
    sums = np.cumsum(prices)
    shares = sums / sums[-1] if sums[-1] else np.arange(1, len(nets) + 1) / len(nets)
    return [float(min(share, 1.0)) for share in shares]


def strip(
    plan: StepPlan, *, ms: Mapping[str, float] | None = None, against: Mapping[str, Sequence[str]] | None = None
) -> PlanChart:
    """A plan drawn by what its calls cost, beside others.

    `ms`: of one call of every entry, per image; else the plan's own prices: their microseconds, or their MACs where
    there are none. `against`: the entry of every call of what it replaces, by name (`StepPlan.called`).
    """
    others = {name: tuple(entries) for name, entries in (against or {}).items()}
    needed = {*plan.nets, *(entry for each in others.values() for entry in each)}
    times = {name: price.us / 1e3 for name, price in plan.prices.items() if price.us is not None} | dict(ms or {})
    timed = needed <= set(times)
    costs = {name: times[name] if timed else plan.prices[name].macs / 1e6 for name in needed}
    spacing = f" at {plan.sampler.spacing} timesteps" if plan.sampler.spacing else ""
    return replace(
        plan_chart(plan),
        costs=costs,
        unit="ms" if timed else "MMACs",
        name=f"the plan: {plan.sampler.short}, {plan.sampler.steps} steps{spacing}",
        corrected=tuple(row.corrected for row in plan.rows) if plan.corrected else (),
        against=others,
    )


def told_strip(plan: StepPlan, record: Comparison, costs: Mapping[str, Cost]) -> PlanChart:
    """The strip of a finished run's plan, beside those of what is run today and of the best free, where each is one
    entry in every call."""
    ms = {name: one.latency_ms / one.batch for name, one in costs.items() if one.latency_ms and one.batch}
    ms |= {name: price.us / 1e3 for name, price in plan.prices.items() if price.us is not None}
    today, one_call = record.reference, plan.prices[plan.reference].macs
    what = f"{today.calls} calls of {plan.reference!r}"
    if plan.baseline and plan.baseline.price.macs == today.macs:
        what = plan.baseline.what
    rows = {f"the reference: {what}": today}
    if record.about.free and record.about.free != record.about.reference:
        free = record.plans[record.about.free]
        rows[f"the best free: {free.calls} calls of {plan.reference!r}"] = free
    alone = {name: row for name, row in rows.items() if row.macs == row.calls * one_call}
    return strip(plan, ms=ms, against={name: (plan.reference,) * row.calls for name, row in alone.items()})


def training_curves(out: Path) -> list[Curve]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for file in (out / "log.jsonl", out / "supernet" / "log.jsonl", *sorted(out.glob("r=*/log.jsonl"))):
        for record in disk.read_records(file, Logged):
            tag = file.parent.name if file.parent.name.startswith("r=") else record.tag
            lines.setdefault(tag, []).append((record.step, record.loss))
    if not lines:
        return []
    points = {name: tuple(values) for name, values in lines.items()}
    return [Curve(title="Training loss", xlabel="step", ylabel="loss (summed over the widths)", lines=points)]


def grid_curve(out: Path) -> list[Curve]:
    """How the score hangs on the weight of a penalty, where a grid of them was trained."""
    if not (out / "grid.json").is_file():
        return []
    record = disk.read_record(out / "grid.json", GridScores, what="a grid's scores", do="run again")
    try:
        points = tuple((float(name.removeprefix("r=")), score) for name, score in record.scores.items())
    except ValueError as error:
        raise RunError(
            got=error, expected="names like r=0.1", where=out / "grid.json", do="delete it and run again"
        ) from error
    lines = {"trained with r": points}
    lines |= {f"r = 0, {name}": tuple((r, score) for r, _ in points) for name, score in record.controls.items()}
    label = f"Fréchet distance, {record.images} validation images"
    return [Curve(title="The choice of r", xlabel="r", ylabel=label, lines=lines)]


def correction_curves(plan: StepPlan) -> list[Curve]:
    """The scale and the threshold of every call, where a plan corrects its predictions."""
    if not plan.corrected:
        return []
    scales, thresholds = (tuple(enumerate(values, 1)) for values in zip(*plan.corrections, strict=True))
    found = (("Scale", "factor of the predicted noise", scales), ("Threshold", "of the predicted noise", thresholds))
    label = "call (noise on the left, picture on the right)"
    return [
        Curve(title=f"{title} at each call", xlabel=label, ylabel=unit, lines={title.lower(): points})
        for title, unit, points in found
    ]


def spectra_curve(timestep: str, models: Mapping[str, Rings]) -> Curve:
    """The models' spectra; data that one sees otherwise than the first, in another size, have lines of their own."""
    lines: dict[str, tuple[tuple[float, float], ...]] = {}
    first = next(iter(models.values()))
    for name, rings in models.items():
        of = "" if (rings.frequency, rings.data) == (first.frequency, first.data) else f" of {name}"
        powers = {f"data{of}": rings.data, f"wiener{of}": rings.wiener, name: rings.model}
        lines |= {kind: tuple(zip(rings.frequency, power, strict=True)) for kind, power in powers.items()}
    title = f"Clean estimate at timestep {timestep}"
    return Curve(title=title, xlabel="frequency (cycles per pixel)", ylabel="power", lines=lines)


def heatmap(table: ErrorTable) -> Heatmap:
    return Heatmap(
        title="Error of each entry at each step",
        timesteps=table.timesteps,
        entries=table.entries,
        values=table.local,
        label="mean squared distance to the reference's prediction",
    )
