"""The page and the picture of `benchmarks/text.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from halfstep.core.results import Difference, Interval
from halfstep.measure.agreement import Agreement
from halfstep.measure.quality import Distances
from halfstep.report.figures import Pareto, Series, draw_all
from halfstep.report.page import markdown_row
from halfstep.report.words import change_cell

TOLERANCE = 0.05
EQUAL = 1.03
"""Times that differ by less are called equal."""
GROUPS = (
    *("stock samplers", "joint plans", "controls of the joint plans", "DeepCache", "our reuse, equal intervals"),
    *("guidance", "widths", "masks"),
)
COLUMNS = (
    *("", "calls", "MMACs", "ms", "of stock's time", "of the best free's", "PSNR", "feature distance", "median", "FD"),
    *("beside stock", "verdict", "class agreement", "gained on stock"),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A row: what it costs, how far its pictures are from the converged ones of the same noise (`psnr` in dB, `far` in
    features, squared, and the `median`, which no single picture decides), its distance to the data with the paired
    `change` from stock, and whether the classifier sees what was asked for, paired too (`gained`). `beside`: the change
    from another row, by its key."""

    name: str
    group: str
    calls: str
    macs: int
    psnr: float
    far: Interval
    median: float
    distance: Distances
    change: Difference
    agreement: Agreement
    gained: tuple[float, float, float]
    beside: Callable[[str], Difference]
    floor: float
    ms: float = 0.0

    @property
    def fd(self) -> str:
        value, (low, high) = self.distance.value, self.distance.interval
        return f"{max(0, value):.2f} [{max(0, low):.2f}, {max(0, high):.2f}]"


def cells(one: Measured, stock: Measured, free: Measured) -> tuple[str, ...]:
    won, low, high = (100 * part for part in one.gained)
    return (
        one.name,
        one.calls,
        f"{one.macs / 1e6:,.0f}",
        f"{one.ms:,.0f}",
        f"1/{stock.ms / one.ms:.2f}",
        f"1/{free.ms / one.ms:.2f}",
        f"{one.psnr:.1f}",
        f"{one.far.value:.3g} [{one.far.low:.3g}, {one.far.high:.3g}]",
        f"{one.median:.2g}",
        one.fd,
        change_cell(one.change),
        one.change.verdict(TOLERANCE),
        str(one.agreement),
        f"{won:+.1f} [{low:+.1f}, {high:+.1f}]",
    )


def page(
    found: Mapping[str, Measured], today: str, free: str, ms: Mapping[str, float], about: str, *, repeats: int
) -> str:
    """The table by groups, the dearest first, and what it says of the aims."""
    stock, best = found[today], found[free]
    lines = [markdown_row(COLUMNS), markdown_row(("---",) * len(COLUMNS))]
    for group in GROUPS:
        rows = sorted((one for one in found.values() if one.group == group), key=lambda one: -one.ms)
        lines += ["| **" + group + "** |" + " |" * (len(COLUMNS) - 1)] if rows else []
        lines += [markdown_row(cells(one, stock, best)) for one in rows]
    parts = ["# The joint plan under a stock text-to-image pipeline", note(stock, best, ms, about, repeats)]
    parts += ["\n".join(lines), "\n".join(["**At equal time**", "", *equal_times(found, ms[today])])]
    parts.append("![Distance to the converged picture against time](text-pareto.png)")
    parts.append("The first twelve pictures, row by row: converged, then " + shown(found, today, free) + ".")
    return "\n\n".join([*parts, "![Pictures](text.png)"]) + "\n"


def note(stock: Measured, best: Measured, ms: Mapping[str, float], about: str, repeats: int) -> str:
    far, agreed = stock.distance, stock.agreement
    return (
        f"Fashion-MNIST at 32x32, `benchmarks/models/fashion-text` under diffusers' `StableDiffusionPipeline`, guided; "
        f"today is {stock.name}, the best free {best.name}. Every row draws the same {far.n:,} prompts "
        f"(`fashion-prompts.jsonl`) from the same noise. Calls are of one branch of guidance, the shallow ones of "
        f"reused features behind the plus; MMACs of the U-Net per picture. ms of a batch of 64 from encoded prompts to "
        f"pictures, processor time, median of {repeats} in turns in one run ({about}); encoding its prompts takes "
        f"{ms['prompts']:,.0f} ms more in every row, decoding is {ms['decoding']:,.0f} ms of each.\n\n"
        f"PSNR (dB) and squared distance in features: to the converged picture of the same noise, 64 pictures. FD: to "
        f"the training images, corrected for bias, features `{stock.change.features}`; as many perfect draws score up "
        f"to {stock.floor:.2f} by chance. Change and class agreement are paired with stock's pictures; held: the whole "
        f"interval within a loss of {TOLERANCE:.0%}; less than {stock.change.least} pictures decide nothing. The "
        f"classifier agrees with {agreed.ceiling:.1%} of real test pictures. 95 % intervals throughout."
    )


def equal_times(found: Mapping[str, Measured], today: float) -> list[str]:
    """Beside each row of DeepCache the dearest joint plan that takes no more time, and our reuse at its interval."""
    told = []
    for key, one in found.items():
        if one.group != "DeepCache":
            continue
        able = [other for other in found.values() if other.group == "joint plans" and other.ms <= EQUAL * one.ms]
        if not able:
            told.append(f"- {one.name} (1/{today / one.ms:.2f} of stock's time): no joint plan takes as little time.")
            continue
        ours = max(able, key=lambda other: other.ms)
        change = ours.beside(key)
        told.append(
            f"- {one.name} (1/{today / one.ms:.2f} of stock's time, FD {one.fd}) beside {ours.name} "
            f"(1/{today / ours.ms:.2f}, FD {ours.fd}): {word_of(change)} ({change.value:+.2f} "
            f"[{change.low:+.2f}, {change.high:+.2f}])."
        )
    return told or ["- no row of DeepCache"]


def word_of(change: Difference) -> str:
    if change.least is not None and change.n < change.least:
        return "too few pictures"
    return "ours is better" if change.high < 0 else "ours is worse" if change.low > 0 else "not told apart"


def grid_rows(found: Mapping[str, Measured], today: str, free: str) -> list[str]:
    """The rows whose pictures are shown, by key in the table's order."""
    wanted = {today, free} | {key for key, one in found.items() if one.group in ("joint plans", "DeepCache")}
    return [key for key in found if key in wanted]


def shown(found: Mapping[str, Measured], today: str, free: str) -> str:
    return "; ".join(found[key].name for key in grid_rows(found, today, free))


def pareto(found: Mapping[str, Measured], today: str) -> bytes:
    """How far pictures are from the converged ones against the share of stock's time, by groups; a PNG. The distance to
    the data of nearly all rows is below what perfect draws reach by chance."""
    stock = found[today]
    series = []
    for group in GROUPS:
        points = [(one.ms / stock.ms, one.median, None, None) for one in found.values() if one.group == group]
        if points:
            series.append(Series(name=group, points=tuple(sorted(points)), style="group"))
    figure = Pareto(
        title="Distance to the converged picture of the same noise",
        metric_label="median squared distance in features, 64 pictures",
        series=tuple(series),
        cost_label="part of the time of stock's fifty steps",
    )
    return draw_all([figure])[0]
