"""The tables of what was measured: plans side by side, costs, runtimes, restored pictures, spectra."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from halfstep.core.errors import PlanError
from halfstep.core.results import (
    About,
    Comparison,
    Cost,
    PlanRow,
    Spectra,
)
from halfstep.engine.runtimes import Trials
from halfstep.measure.restore import Restored
from halfstep.report.page import Table
from halfstep.report.words import change_cell, quality_cell, verdict_cells, verdict_of
from halfstep.search.scores import Scored

SETTINGS = ("device", "dtype", "threads", "batch", "layout", "backend")
"""Of a `Cost`: what its milliseconds hang on."""


BRIEF = ("MACs", "time", "FD", "change of FD")
"""Of `plans_table`, with the verdict: what fits a terminal of 80 columns."""
AGREEMENT = "class agreement"
"""The share of images that the features' classifier takes for the class they were asked to be."""


def plans_table(record: Comparison, title: str = "Reference, plan and controls", *, brief: bool = False) -> Table:
    """The table of `judge.measure_plans`: time, quality with intervals, difference to the first row, cost.

    `brief`: only what fits a terminal of 80 columns.
    """
    columns = _columns(record)
    note = f"{_timed(record)} {_drawn(record)} MMACs per image and trajectory."
    if len(record.plans) == 1:  # a dense model, which has no plan: nothing stands beside it
        columns = {name: cells for name, cells in columns.items() if name not in _BESIDE}
        title, note = "The reference", note.replace(", the change is paired", "")
    elif brief:  # the rest is detail, and lies beyond the edge of a narrow page
        columns = {name: columns[name] for name in (*BRIEF, f"within {record.about.tolerance:.0%}")}
    return _of_plans(record, title, columns, f"{note}{_class_note(columns)}{_free_note(record)}")


def time_table(record: Comparison) -> Table:
    """What a reader of the page asks first: the time of each, of today's and of the best free's, and whether its
    quality held beside each, the verdicts in words. The best free's row is the line to beat."""
    about, found = record.about, _columns(record)
    free = about.free if about.free != about.reference else None  # else it stands there already
    named = [(name, verdict_cells(row, about.tolerance)) for name, row in record.plans.items()]
    today = ["—" if name == about.reference else cells[0] for name, cells in named]
    columns = {
        f"ms, batch of {about.batch}": found["ms"],
        "of today's time": found["time"],
        **({FREE_TIME: found[FREE_TIME]} if free else {}),
        "FD": found["FD"],
        "change from today": found["change of FD"],
        "quality beside today": today,
    }
    if free:
        columns["quality beside the best free"] = ["—" if name == free else cells[1] for name, cells in named]
    held = f"Held: the whole interval of the change lies within a loss of {about.tolerance:.0%}."
    note = f"{_timed(record)} {_drawn(record)} {held}{_free_note(record)}"
    table = _of_plans(record, "Time and quality", columns, note)
    beat = list(record.plans).index(about.free) if about.free else None
    said = {about.reference: ": today"} | ({about.free: ": the line to beat"} if about.free else {})
    if about.free == about.reference:
        said[about.reference] = ": today, and the line to beat"
    rows = tuple((cells[0] + said.get(cells[0], ""), *cells[1:]) for cells in table.rows)
    return replace(table, rows=rows, beat=beat)


def more_table(record: Comparison) -> Table:
    """The rest of what was measured of every plan: one image alone, other distances, MACs."""
    left = {"ms", "time", "FD", "change of FD", f"within {record.about.tolerance:.0%}", FREE_TIME}
    if record.about.free == record.about.reference:
        left.add(FREE_VERDICT)
    columns = {name: cells for name, cells in _columns(record).items() if name not in left}
    note = "KID, precision and recall on the same images and features. MMACs per image and trajectory."
    return _of_plans(record, "More of the same plans", columns, note + _class_note(columns))


FREE_TIME, FREE_VERDICT = "of the best free's time", "beside the best free"
_BESIDE = ("time", "change of FD", "MACs", FREE_TIME, FREE_VERDICT)
"""Columns that one plan alone has not, with the verdict."""


def _of_plans(record: Comparison, title: str, columns: Mapping[str, Sequence[str]], note: str) -> Table:
    names = list(record.plans)
    rows = tuple(zip(names, *columns.values(), strict=True))
    best = names.index("plan") if "plan" in names else None
    return Table(title=title, columns=("", *columns), rows=rows, note=note, best=best)


def _columns(record: Comparison) -> dict[str, list[str]]:
    """All that is told of the plans, by column, time first."""
    about, plans = record.about, record.plans
    beside = {name: row for name, row in plans.items() if name != about.reference}
    found = {
        "ms": [f"{row.wall_ms:,.0f}" for row in plans.values()],
        "time": [f"{row.wall_share:.0%}" for row in plans.values()],
        FREE_TIME: [_free_time(name, row, about) for name, row in plans.items()],
        "FD": [quality_cell(row.quality["fd"]) for row in plans.values()],
        "change of FD": [change_cell(row.difference) if name in beside else "—" for name, row in plans.items()],
        f"within {about.tolerance:.0%}": [
            verdict_of(row, about.tolerance) if name in beside else "—" for name, row in plans.items()
        ],
        FREE_VERDICT: [_free_verdict(name, row, about) for name, row in plans.items()],
        "ms of one image": ["–" if row.alone_ms is None else f"{row.alone_ms:,.1f}" for row in plans.values()],
    }
    if not beside:
        del found[f"within {about.tolerance:.0%}"]
    if record.reference.alone_ms is None:
        del found["ms of one image"]
    if not about.free:
        del found[FREE_TIME], found[FREE_VERDICT]
    for metric, name in (("kid", "KID"), ("precision", "precision"), ("recall", "recall")):
        found[name] = [f"{row.quality[metric].value:.3g}" for row in plans.values()]
    if all("agreement" in row.quality for row in plans.values()):
        seen = [row.quality["agreement"] for row in plans.values()]
        found[AGREEMENT] = [f"{one.value:.1%} [{one.low:.1%}, {one.high:.1%}]" for one in seen]
    found["MACs"] = [f"{row.share:.0%}" for row in plans.values()]
    return found | {"MMACs": [f"{row.macs / 1e6:,.0f}" for row in plans.values()]}


def _free_time(name: str, row: PlanRow, about: About) -> str:
    return "100%" if name == about.free else "–" if row.free_wall is None else f"{row.free_wall:.0%}"


def _free_verdict(name: str, row: PlanRow, about: About) -> str:
    if name == about.free:
        return "—"
    return "–" if row.free_difference is None else f"{change_cell(row.free_difference)}, {row.free_verdict}"


def _timed(record: Comparison) -> str:
    about = record.about
    return (
        f"Wall-clock of whole trajectories at batch {about.batch} on {about.device}, {about.dtype}, {about.layout}, "
        f"median of {about.repeats} taken in turns."
    )


def _drawn(record: Comparison) -> str:
    about, first = record.about, record.reference.quality["fd"]
    return (
        f"Fréchet distance (FD, lower is better) on {about.n} images of the same seeds against {first.n_reference} "
        f"real ones, features {first.features}; 95 % bootstrap intervals, the change is paired. {_statistics(about)}"
    )


def _class_note(columns: Iterable[str]) -> str:
    if AGREEMENT not in columns:
        return ""
    return " Class agreement: the share of images that the features' classifier takes for the class asked for."


def _free_note(record: Comparison) -> str:
    """What the best free is."""
    if not record.about.free:
        return ""
    calls = record.plans[record.about.free].calls
    return (
        f" The best free: the reference in the {calls} calls of the best stock sampler of this quality; every plan is "
        "held against it too."
    )


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


def steps_table(scored: Sequence[Scored], images: int) -> list[Table]:
    """What competed for the budget, where numbers of steps and corrections did; `images`: so many for each."""
    ordered = sorted((one for one in scored if one.stage == "steps"), key=lambda one: one.score)
    if not ordered:
        return []
    rows = tuple((one.name, f"{one.macs / 1e6:,.0f}", f"{one.score:.3g}") for one in ordered)
    note = f"The best plan of each on {images} images of the same fresh noise, which chose the first."
    return [Table(title="Numbers of steps", columns=("", "MMACs", "FD"), rows=rows, note=note, best=0)]


def spectra_table(record: Spectra) -> Table:
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
