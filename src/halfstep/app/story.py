"""Tell a finished run as a report: the summary sentence, the tables, the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.app.figures import Curve, Heatmap, Pareto, PlanChart, Series
from halfstep.app.page import Grid, Report, Table, write_report
from halfstep.core import disk
from halfstep.core.errors import PlanError, RunError
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import Recipe, RunRecord
from halfstep.core.results import (
    About,
    Comparison,
    Cost,
    Difference,
    FreeRecord,
    GridScores,
    PlanRow,
    Quality,
    Rings,
    Spectra,
    Verdict,
    read_comparison,
    read_costs,
    read_spectra,
)
from halfstep.data.arrays import read_arrays
from halfstep.data.pictures import picture_grid
from halfstep.engine.runtimes import Trials
from halfstep.measure.restore import Restored
from halfstep.search.damage import ErrorTable
from halfstep.search.scores import SEARCHED, Scored, read_scores
from halfstep.training.train import Logged

MAX_PICTURES = 1 << 28
"""Bytes of pictures that a report is told from: the largest of ours has a few megabytes."""

SETTINGS = ("device", "dtype", "threads", "batch", "layout", "backend")
"""Of a `Cost`: what its milliseconds hang on."""


def quality_cell(quality: Quality) -> str:
    """A value with its interval, to two decimals."""
    return f"{quality.value:.2f} [{quality.low:.2f}, {quality.high:.2f}]"


def change_cell(change: Difference) -> str:
    """A change with its interval: a share, or the distance itself where the reference is within its floor."""
    if change.share is None or change.relative_low is None or change.relative_high is None:
        return f"{change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"
    return f"{_signed(change.share)} [{_signed(change.relative_low)}, {_signed(change.relative_high)}]"


def _signed(share: float) -> str:
    return f"{share:+.1%}" if abs(share) < 0.1 else f"{share:+.0%}"


def verdict_of(row: PlanRow, tolerance: float) -> Verdict:
    """A plan's verdict; told from its interval where the record is of before there were three."""
    if row.verdict is not None:
        return row.verdict
    if row.held:
        return "held"
    low = row.difference.relative_low
    return "not held" if low is not None and low > tolerance else "not decided"


def decided_text(row: PlanRow) -> str:
    """How many images would decide what is not decided, as the end of a sentence; nothing in records of before."""
    if row.verdict is None:
        return ""
    if row.decided_by is None:
        return "; a million images would not decide it"
    return f"; about {_round_up(row.decided_by):,} images would decide it"


def _round_up(count: int) -> int:
    """To two digits."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit


def plans_table(record: Comparison, title: str = "Reference, plan and controls", *, brief: bool = False) -> Table:
    """The table of `judge.measure_plans`: cost, speed, quality with intervals, difference to the first row.

    `brief`: only what fits a terminal of 80 columns.
    """
    about = record.about
    rows = [_plan_cells(name, row, about) for name, row in record.plans.items()]
    first = record.reference.quality["fd"]
    note = (
        f"MMACs per image and trajectory. Wall-clock of whole trajectories at batch {about.batch} on "
        f"{about.device}, {about.dtype}, {about.layout}, "
        f"median of {about.repeats} taken in turns. Fréchet distance (FD, lower is better) on "
        f"{about.n} images of the same seeds against {first.n_reference} real ones, features "
        f"{first.features}; 95 % bootstrap intervals, the change is paired. {_statistics(about)}"
    )
    columns: tuple[str, ...] = ("", "MACs", "time", "FD", "change of FD", f"within {about.tolerance:.0%}")
    if about.free:
        columns += ("of the best free's time", "beside the best free")
    alone = len(record.plans) == 1  # a dense model, which has no plan: nothing stands beside it
    if brief and not alone:  # the rest is detail, and lies beyond the edge of a narrow page
        columns = columns[:6]
        rows = [row[: len(columns)] for row in rows]
    else:
        single = ("ms of one image",) if record.reference.alone_ms is not None else ()
        agreement = (AGREEMENT,) if _agrees(record) else ()
        columns += ("MMACs", "ms", *single, "KID", "precision", "recall", *agreement)
    names = list(record.plans)
    if AGREEMENT in columns:
        note += " Class agreement: the share of images that the features' classifier takes for the class asked for."
    if about.free:
        note += f" The best free: {_called_free(record)}; every plan is held against it too."
    if alone:
        title, note = "The reference", note.replace(", the change is paired", "")
        columns, rows = tuple(_beside_none(columns)), [tuple(_beside_none(row)) for row in rows]
    return Table(
        title=title, columns=columns, rows=tuple(rows), note=note, best=names.index("plan") if "plan" in names else None
    )


AGREEMENT = "class agreement"
"""The share of images that the features' classifier takes for the class they were asked to be."""


def _agrees(record: Comparison) -> bool:
    """Whether every plan was measured so."""
    return all("agreement" in row.quality for row in record.plans.values())


def _beside_none(cells: Sequence[str]) -> list[str]:
    """A line of `plans_table` without its shares, change and verdict, which one plan alone has not."""
    return [cells[0], cells[3], *cells[6:]]


def _plan_cells(name: str, row: PlanRow, about: About) -> tuple[str, ...]:
    """One plan's line of `plans_table`."""
    reference = name == about.reference
    return (
        name,
        f"{row.share:.0%}",
        f"{row.wall_share:.0%}",
        quality_cell(row.quality["fd"]),
        "—" if reference else change_cell(row.difference),
        "—" if reference else verdict_of(row, about.tolerance),
        *(_beside_free(row, free=name == about.free) if about.free else ()),
        f"{row.macs / 1e6:,.0f}",
        f"{row.wall_ms:,.0f}",
        *(() if row.alone_ms is None else (f"{row.alone_ms:,.1f}",)),
        *(f"{row.quality[metric].value:.3g}" for metric in ("kid", "precision", "recall")),
        *(f"{one.value:.1%} [{one.low:.1%}, {one.high:.1%}]" for one in (row.quality.get("agreement"),) if one),
    )


def _beside_free(row: PlanRow, *, free: bool) -> tuple[str, str]:
    """Time and verdict of a plan beside the best stock sampler."""
    if free or row.free_difference is None or row.free_wall is None:
        return "100%" if free else "–", "—" if free else "–"
    return f"{row.free_wall:.0%}", f"{change_cell(row.free_difference)}, {row.free_verdict}"


def _called_free(record: Comparison) -> str:
    """What the best free is, in words."""
    row = record.plans[record.about.free or record.about.reference]
    return f"the reference in the {row.calls} calls of the best stock sampler of this quality"


def _statistics(about: About) -> str:
    """What a reader must know of the distances: their correction and floor, what was wrong; of old records, that they
    have neither."""
    if about.floor is None or about.scale is None:
        return (
            "Measured before distances were corrected for bias: small ones are mostly chance, and so are their shares."
        )
    least = about.floor
    said = (
        f"FD is corrected for bias; perfect draws score {least.raw:.2g} before that and up to {least.high:.2g} "
        f"after it (fresh real images about {least.fresh:.2g} before). Where the reference scores no more, changes "
        f"are told as they are and held against {about.scale:.2g}, a hundredth of the data's spread."
    )
    return " ".join([said, *(f"Warning: {one}." for one in about.warnings)])


def costs_table(costs: Mapping[str, Cost], reference: str) -> Table:
    """What one call of each entry costs, beside the reference's; unmeasured is "–".

    The note states the settings that all entries have in common; a setting that differs gets a column instead. Raises
    PlanError where `reference` is not among `costs`.
    """
    if reference not in costs:
        expected = f"one of {', '.join(costs)}"
        raise PlanError(got=reference, expected=expected, where="reference", do="name an entry of the table")
    settings = {key: [getattr(cost, key) for cost in costs.values()] for key in SETTINGS}
    shared = [f"{key} {found[0]}" for key, found in settings.items() if len(set(found)) == 1 and found[0] is not None]
    differing = [key for key, found in settings.items() if len(set(found)) > 1]
    base = costs[reference]
    rows = tuple(
        (
            name,
            f"{cost.params / 1e6:.2f} M",
            _number(cost.stored_mib, ".2f"),
            f"{cost.macs / 1e6:,.2f}",
            f"{cost.macs / base.macs:.1%}",
            _number(cost.latency_ms, ".1f") + (f" ± {cost.latency_spread_ms:.1f}" if cost.latency_spread_ms else ""),
            f"{cost.latency_ms / base.latency_ms:.1%}" if cost.latency_ms and base.latency_ms else "–",
            _number(cost.peak_mib, ".1f"),
            *(str(getattr(cost, key) or "–") for key in differing),
        )
        for name, cost in costs.items()
    )
    note = (
        "MMACs per image; zeros of a mask are left out of them, whether a kernel skips them is what the time shows. "
        f"ms: one call, median ± half the inter-quartile distance, in turns; {', '.join(shared)}."
    )
    columns = ("", "params", "MiB stored", "MMACs", "share", "ms", "time", "MiB peak", *differing)
    return Table(title="The bank", columns=columns, rows=rows, note=note)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def runtimes_table(found: Trials) -> Table:
    """The milliseconds of a call of every entry by every runtime, as shares of PyTorch's as it is; why a runtime was
    dropped stands in place of them."""
    batches = list(next(iter(found.tried.values())))
    columns = ("", "runtime", *(head for batch in batches for head in (f"ms at batch {batch}", "time")), "")
    rows = []
    for name, by_batch in found.tried.items():
        for of_one in zip(*by_batch.values(), strict=True):
            cells = [name, of_one[0].backend]
            for one, tried in zip(of_one, by_batch.values(), strict=True):
                cells += [_number(one.ms, ".2f"), f"{one.ms / tried[0].ms:.0%}" if one.ms and tried[0].ms else "–"]
            rows.append((*cells, "; ".join(dict.fromkeys(one.dropped for one in of_one if one.ms is None))))
    it = found.setting
    note = (
        f"ms: median of one call, runtimes in turns, in the faster memory layout; {it.device}, {it.cpu}, {it.dtype}, "
        f"threads {it.threads}, torch {it.torch}."
    )
    return Table(title="Runtimes", columns=columns, rows=tuple(rows), note=note)


def restored_table(records: Sequence[Restored]) -> Table:
    """How well every method denoises the same pictures."""
    rows = [(r.name, f"{r.psnr_db:.2f}", f"{r.ssim:.3f}", f"{r.ms:,.0f}") for r in records]
    first = records[0]
    note = (
        f"Means over {first.pictures} picture{'s' * (first.pictures > 1)} with noise of {first.sigma:g} "
        f"(noisy: {first.noisy_psnr_db:.2f} dB), {first.threads} CPU thread{'s' * (first.threads > 1)}; median ms per "
        "picture, in turns. scikit-image has no BM3D."
    )
    return Table(title="Denoised", columns=("method", "PSNR dB", "SSIM", "ms"), rows=tuple(rows), note=note)


def tell_restored(out: Path, records: Sequence[Restored], shown: Mapping[str, np.ndarray]) -> Path:
    """Write report.html of `halfstep denoise`: the table, where originals are known, and pictures uint8 [C, H, W]."""
    report = Report(
        title="Denoised pictures",
        summary="What every method made of the same noisy pictures. Single files lie in the folders beside this page.",
        facts={},
        tables=(restored_table(records),) if records else (),
        figures=(),
        grids=tuple(Grid(title=name, images=image[None], columns=1) for name, image in shown.items()),
    )
    return write_report(report, out)


def summary(record: Comparison, plan: StepPlan) -> str:
    """One sentence with the claim and its measure, after what is wrong with them."""
    row, about = record.plans["plan"], record.about
    calls = f"{record.reference.calls} {plan.sampler.short} calls"
    change = f"the Fréchet distance changes by {change_cell(row.difference)} (95 % interval, n = {about.n})"
    wrong = "".join(f"Warning: {one}. " for one in about.warnings)
    if plan.corrected and row.share == 1:
        return f"{wrong}The corrections cost nothing; with {calls} {change}."
    what = f"The plan, {details}," if (details := _details(plan)) else "The plan"
    if record.about.free:
        return f"{wrong}{_beside_both(record, plan)}"
    saved = f"saves {1 - row.share:.0%} of the MACs and {1 - row.wall_share:.0%} of the time of {calls}"
    cost = saved if row.share != 1 else f"costs what {calls} of the reference cost"
    return f"{wrong}{what} {cost}; {change}, so {_judgement(row, about.tolerance)}."


def _beside_both(record: Comparison, plan: StepPlan) -> str:
    """The claim beside both references: what is run today, and the best that is free."""
    about, row = record.about, record.plans["plan"]
    free = record.plans[about.free or about.reference]
    today = plan.baseline.what if plan.baseline else f"{record.reference.calls} calls"
    said = "" if row.predicted_ms is None else f" (its prices said {row.predicted_ms:,.0f})"
    took = f"A batch of {about.batch} takes {row.wall_ms:,.0f} ms{said}"
    beside = f"{_times(row.wall_share)} as fast as what you run today ({today}, {record.reference.wall_ms:,.0f} ms)"
    change = f"the Fréchet distance changes by {change_cell(row.difference)} (95 % interval, n = {about.n})"
    text = f"{took}: {beside}; {change}, so {_judgement(row, about.tolerance)}."
    if free is record.reference or row.free_wall is None or row.free_difference is None:
        return f"{text} No stock sampler of the same net is as good in less time."
    best = f"{_times(row.free_wall)} as fast as the best that is free ({free.calls} calls, {free.wall_ms:,.0f} ms)"
    verdict = row.free_verdict or "not decided"
    return f"{text} It is {best}, whose distance it changes by {change_cell(row.free_difference)}: {verdict}."


def _times(share: float) -> str:
    """How many times as fast a share of a time is."""
    return f"{1 / share:.1f} times" if share < 0.95 else ("about" if share < 1.05 else f"{1 / share:.2f} times")


def _details(plan: StepPlan) -> str:
    """What a sentence on a plan tells of its entries: the one of all its rows, and its guides."""
    guided = [guide.entry for guide in plan.guides if guide]
    alone = f"{plan.entries[0]!r} in every {'row' if guided else 'call'}" if len(set(plan.entries)) == 1 else ""
    if not guided:
        return alone
    names = " and ".join(map(repr, dict.fromkeys(guided)))
    led = f"guided by {names} in {len(guided)} of {len(plan.rows)}"
    return f"{alone} and {led}" if alone else f"{led} rows"


def _judgement(row: PlanRow, tolerance: float) -> str:
    of = "" if row.difference.share is not None else " of a hundredth of the data's spread"
    within = f"within the tolerance of {tolerance:.0%}{of}"
    match verdict_of(row, tolerance):
        case "held":
            return f"quality held {within}"
        case "not held":
            return f"quality did not hold {within}"
        case "broken reference":
            return "nothing can be said of its quality: the reference is broken"
        case _:
            return f"whether quality held {within} is not decided{decided_text(row)}"


def _steps_table(scored: Sequence[Scored], images: int) -> list[Table]:
    """What competed for the budget, where numbers of steps and corrections did; `images`: so many for each."""
    ordered = sorted((one for one in scored if one.stage == "steps"), key=lambda one: one.score)
    if not ordered:
        return []
    rows = tuple((one.name, f"{one.macs / 1e6:,.0f}", f"{one.score:.3g}") for one in ordered)
    note = f"The best plan of each on {images} images of the same fresh noise, which chose the first."
    return [Table(title="Numbers of steps", columns=("", "MMACs", "FD"), rows=rows, note=note, best=0)]


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
    )


def plan_chart(plan: StepPlan) -> PlanChart:
    shares = {name: price.macs / plan.prices[plan.reference].macs for name, price in plan.prices.items()}
    steps = tuple(row.timestep for row in plan.rows)
    guides = plan.guides if any(plan.guides) else ()
    return PlanChart(
        title="What runs at each step", timesteps=steps, entries=plan.entries, shares=shares, guides=guides
    )


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


def _told_strip(plan: StepPlan, record: Comparison, costs: Mapping[str, Cost]) -> PlanChart:
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


def _grid_curve(out: Path) -> list[Curve]:
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


def _correction_curves(plan: StepPlan) -> list[Curve]:
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


def tell(out: Path) -> Path:
    """Write report.html and samples.png of a finished run that was measured, from what lies in its folder.

    Returns the report's path. Raises RunError when a file of the run is missing.
    """
    out, again = Path(out), "repeat the command that began the run, which finishes it"
    record = read_comparison(out / "quality.json", again)
    run = RunRecord.load(out)
    costs = read_costs(out / "cost.json", again)
    table = ErrorTable.load(out / "errors.json") if (out / "errors.json").exists() else None  # `compress` searches none
    plan = StepPlan.load(out / "plan.json")
    pictures = _pictures(out / "pictures.npz", again)
    scored = read_scores(out)
    searched = [one for one in scored if one.stage in SEARCHED and one.stage != "reference"] if table else []
    free = _free(out)
    if run.recipe is None:
        raise RunError(got="a run without a recipe", expected="one that was measured", where=out, do=again)
    report = Report(
        title="Halfstep report",
        summary=summary(record, plan),
        facts=_facts(run.inputs, run.recipe, record, len(searched), table),
        tables=(
            plans_table(record),
            *_steps_table(scored, run.recipe.search.final_images),
            costs_table(costs, plan.reference),
        ),
        figures=(
            time_pareto(record, free=free),
            pareto(record, searched, run.recipe.search.images),
            *([_told_strip(plan, record, costs)] if plan.nets != (plan.reference,) or not plan.corrected else []),
            *_correction_curves(plan),
            *([_heatmap(table)] if table else []),
            *_grid_curve(out),
            *training_curves(out),
        ),
        grids=tuple(Grid(title=name, images=images, columns=8) for name, images in pictures.items()),
        files={name: what for name, what in FILES.items() if (out / name).exists()},
    )
    side = picture_grid(np.concatenate([pictures["reference"][:16], pictures["plan"][:16]]), columns=16)
    disk.write_png(out / "samples.png", side)
    return write_report(report, out)


def _free(out: Path) -> FreeRecord | None:
    """What is free, where it was looked for. Raises RunError."""
    if not (out / "free.json").is_file():
        return None
    record: FreeRecord = disk.read_record(out / "free.json", FreeRecord, what="stock samplers", do="run again")
    return record


def _pictures(file: Path, do: str) -> dict[str, np.ndarray]:
    """The pictures of a run by the plan that drew them, uint8 [N, C, S, S]. Raises RunError."""
    what = "pictures of the reference and of the plan, uint8 [N, C, S, S]"
    found = read_arrays(file, MAX_PICTURES, what=what, do=do)
    shapes = {array.shape[1:] if array.dtype == np.uint8 and len(array) else () for array in found.values()}
    (shape, *others) = shapes or {()}
    if others or len(shape) != 3 or shape[0] not in (1, 3) or not {"reference", "plan"} <= set(found):
        told = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in found.items())
        raise RunError(got=told or "none", expected=what, where=file, do=do)
    return found


def tell_spectra(out: Path) -> Path:
    """Write report.html of what `halfstep spectrum` measured: one picture per timestep, all models in each.

    Raises RunError for a spectrum.json that is missing or holds something else.
    """
    record = read_spectra(out / "spectrum.json")
    report = Report(
        title="Power spectra",
        summary="A model that loses detail has less power at high frequencies than the linear bound allows.",
        facts={"data": record.data},
        tables=(_spectra_table(record),),
        figures=tuple(_spectra_curve(timestep, models) for timestep, models in record.timesteps.items()),
        grids=(),
    )
    return write_report(report, out)


def _spectra_curve(timestep: str, models: Mapping[str, Rings]) -> Curve:
    """The models' spectra; data that one sees otherwise than the first, in another size, have lines of their own."""
    lines: dict[str, tuple[tuple[float, float], ...]] = {}
    first = next(iter(models.values()))
    for name, rings in models.items():
        of = "" if (rings.frequency, rings.data) == (first.frequency, first.data) else f" of {name}"
        powers = {f"data{of}": rings.data, f"wiener{of}": rings.wiener, name: rings.model}
        lines |= {kind: tuple(zip(rings.frequency, power, strict=True)) for kind, power in powers.items()}
    title = f"Clean estimate at timestep {timestep}"
    return Curve(title=title, xlabel="frequency (cycles per pixel)", ylabel="power", lines=lines)


def _spectra_table(record: Spectra) -> Table:
    rows = []
    for timestep, models in record.timesteps.items():
        for name, rings in models.items():
            half = len(rings.frequency) // 2
            shares = [sum(power[half:]) / sum(rings.data[half:]) for power in (rings.model, rings.wiener, rings.error)]
            rows.append((timestep, name, *(f"{share:.3f}" for share in shares)))
    note = "Power in the upper half of the frequencies, as a share of the data's: of the estimate, of the best linear "
    return Table(
        title="High frequencies",
        columns=("timestep", "model", "estimate", "Wiener", "error"),
        rows=tuple(rows),
        note=note + f"one, and of the estimate's error. {record.images} images of {record.data}.",
    )


FILES = {
    "pipeline/": "the cheaper diffusers pipeline: StepAwarePipeline.from_pretrained",
    "plan.json": "what runs at each step",
    "quality.json": "every number of this page",
    "cost.json": "parameters, MACs, latency and memory of the bank",
    "errors.json": "the error table",
    "scores.jsonl": "every plan that was measured",
    "free.json": "the stock samplers that were measured",
    "search.jsonl": "every plan that was measured",
}


def _facts(
    inputs: Mapping[str, str], recipe: Recipe, record: Comparison, searched: int, table: ErrorTable | None
) -> dict[str, str]:
    about, search = record.about, {}
    if table:
        search["search"] = (
            f"{searched} plans of {recipe.search.images} images each, and an error table on {table.images} trajectories"
        )
    return {
        "model": inputs.get("model", ""),
        "data": f"{inputs.get('data', '')}, fingerprint {about.data}",
        "goal": inputs.get("goal", inputs.get("verb", "")),
        "recipe": f"{recipe.name}, seed {recipe.seed}, {recipe.train.steps} training steps",
        **search,
        "time of the last call": f"{record.seconds or 0:.0f} s",
        **{key: str(value) for key, value in about.machine.items()},
    }


def _heatmap(table: ErrorTable) -> Heatmap:
    return Heatmap(
        title="Error of each entry at each step",
        timesteps=table.timesteps,
        entries=table.entries,
        values=table.local,
        label="mean squared distance to the reference's prediction",
    )
