"""The tables of what was measured: plans side by side, costs, runtimes, restored pictures, spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from halfstep.app.page import Table
from halfstep.app.words import change_cell, quality_cell, verdict_of
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
from halfstep.search.scores import Scored

SETTINGS = ("device", "dtype", "threads", "batch", "layout", "backend")
"""Of a `Cost`: what its milliseconds hang on."""


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
