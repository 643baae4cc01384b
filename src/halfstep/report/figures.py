"""Plots of a report: quality against cost, a plan, an error table, curves; each a value that is drawn as PNG."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from halfstep.report.palette import ACCENTS, INK, LINES, PALE, ROLES, amount, entry_colours, percent
from halfstep.report.strips import WIDTH, PlanChart, draw_strips, height_of

if TYPE_CHECKING:  # matplotlib loads only when something is drawn
    from matplotlib.axes import Axes

Style = Literal["line", "points", "star", "frontier", "mark", "group"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points (cost, value, low, high), the last two None where there is no interval.

    `style`: all points connected, none, one that is a star; "frontier": those connected that no cheaper one is as good
    as; "mark": ringed, its name beside it; "group": points of a colour and a marker of their own, where "points" that
    are many stay grey behind the others.
    """

    name: str
    points: tuple[tuple[float, float, float | None, float | None], ...]
    style: Style


@dataclass(frozen=True, kw_only=True)
class Pareto:
    """Quality against cost: the share of the reference's MACs (0..1), or what `cost_label` says, on a log axis where it
    spans more than tenfold. `band`: the reference's interval, drawn as a strip; `floor`: what perfect draws reach by
    chance, drawn as a line; `beat`: the point (cost, value) of the best that is free: what is dearer and no better is
    shaded."""

    title: str
    metric_label: str
    series: tuple[Series, ...]
    band: tuple[float, float] | None = None
    floor: float | None = None
    beat: tuple[float, float] | None = None
    cost_label: str = ""


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """`values` [steps, entries] in log colours."""

    title: str
    timesteps: tuple[float, ...]
    entries: tuple[str, ...]
    values: np.ndarray
    label: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Lines of (x, y) points by name."""

    title: str
    xlabel: str
    ylabel: str
    lines: Mapping[str, tuple[tuple[float, float], ...]]


MARKERS = "osD^vPX"
NARROW = (4.2, 4.9)
"""Of a figure on a phone, inches: its text is as large there as that of the page."""

Figure = Pareto | PlanChart | Heatmap | Curve


def draw_all(figures: Sequence[Figure]) -> list[bytes]:
    """PNGs of the figures of one page, in order; an entry of a plan has one colour in all of them."""
    colours = colours_of(figures)
    return [draw_png(figure, colours) for figure in figures]


def colours_of(figures: Sequence[Figure]) -> dict[str, str]:
    """The colour of every entry that the figures of one page tell of."""
    return entry_colours({name: share for f in figures if isinstance(f, PlanChart) for name, share in f.shares.items()})


def draw_png(figure: Figure, colours: Mapping[str, str]) -> bytes:
    _canvas(figure, colours).savefig(file := io.BytesIO(), format="png", metadata={"Software": None})
    return file.getvalue()  # same numbers, same bytes


def draw_svg(figure: Figure, colours: Mapping[str, str], *, narrow: bool = False) -> str:
    """The figure as an svg element without a ground of its own; `narrow`: laid out for the width of a phone."""
    from matplotlib import rc_context

    canvas = _canvas(figure, colours, narrow=narrow)
    for axes in canvas.axes:
        axes.patch.set_visible(False)
    with rc_context({"svg.hashsalt": "halfstep", "svg.fonttype": "path"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(file := io.StringIO(), format="svg", metadata=nothing, facecolor="none")
    return file.getvalue()[file.getvalue().index("<svg") :]


def _with_accents(names: Sequence[str], entries: Mapping[str, str]) -> dict[str, str]:
    """A colour for every name: an entry's or a role's own, else the next accent."""
    known = ROLES | dict(entries)
    free = [name for name in names if name not in known]
    return {name: known.get(name) or ACCENTS[free.index(name) % len(ACCENTS)] for name in names}


def _repeats(colours: Mapping[str, str]) -> dict[str, int]:
    """How many names before each have its colour: where colours come round, the marker or the dashes tell."""
    before = list(colours.values())
    return {name: before[:k].count(colour) for k, (name, colour) in enumerate(colours.items())}


def _canvas(figure: Figure, colours: Mapping[str, str], *, narrow: bool = False) -> Any:
    """A figure laid out. Every colour is set by hand: a user's dark matplotlib style would write white on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    is_strip = isinstance(figure, PlanChart) and bool(figure.costs)
    is_timed = isinstance(figure, Pareto) and bool(figure.cost_label)
    size, dpi = ((10, 4.2), 150) if not (is_strip or is_timed) else ((WIDTH, 5.4), 200)
    if is_strip:
        size = (WIDTH, height_of(figure))
    elif narrow:
        size = NARROW
    canvas = Canvas(figsize=size, dpi=dpi, layout=None if is_strip else "constrained", facecolor="white")
    FigureCanvasAgg(canvas)
    if is_strip:
        draw_strips(canvas.add_axes((0, 0, 1, 1)), figure, colours)
        return canvas
    axes = canvas.add_subplot(facecolor="white")
    match figure:
        case Pareto():
            _draw_pareto(axes, figure, colours)
        case PlanChart():
            draw_plan(axes, figure, colours)
        case Heatmap():
            _draw_heatmap(axes, figure, below=narrow)
        case Curve():
            _draw_curve(axes, figure, colours)
    columns = 3 if isinstance(figure, PlanChart) else 2 if is_timed else 1
    place = {3: "outside upper left", 2: "outside lower left", 1: "outside right upper"}[columns]
    _finish(axes, "outside lower left" if narrow else place, 1 if narrow else columns, narrow=narrow)
    return canvas


def _finish(axes: Axes, place: str, columns: int, *, narrow: bool = False) -> None:
    along, across = (34, 26) if narrow else (60, 40)  # letters of a line of a label
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=9.5, labelcolor=INK)
    for name, spine in axes.spines.items():
        spine.set(visible=name == "bottom", color="#c5cbd5")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(
            color=INK,
            fontsize=10.5,
            text=textwrap.fill(label.get_text(), along if label is axes.xaxis.label else across),
        )
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        style = {"frameon": False, "fontsize": 9.5, "labelcolor": INK, "labelspacing": 0.4 if narrow else 0.7}
        axes.figure.legend(handles, labels, loc=place, ncols=columns, **style)
    if not axes.has_data():
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center", color=INK, fontsize=12)


def _draw_pareto(axes: Axes, pareto: Pareto, colours: Mapping[str, str]) -> None:
    if pareto.band:
        axes.axhspan(*pareto.band, color=LINES, linewidth=0, label="reference, 95 % interval")
    if pareto.floor:
        axes.axhline(pareto.floor, color=INK, linewidth=1, linestyle=":", label="perfect draws stay below")
    many = {s.name for s in pareto.series if s.style == "points" and len(s.points) > 1 and s.name not in colours}
    marks = {s.name for s in pareto.series if s.style == "mark"}
    accents = _with_accents([s.name for s in pareto.series if s.name not in many | marks], colours)
    groups = [s.name for s in pareto.series if s.style == "group"]
    repeats = _repeats(accents) | {name: k for k, name in enumerate(groups)}
    for series in pareto.series:
        if series.points:
            marker = "*" if series.style == "star" else MARKERS[repeats.get(series.name, 0) % len(MARKERS)]
            _draw_series(
                axes,
                series,
                accents.get(series.name, INK if series.name in marks else "#9aa3b2"),
                marker,
                cloud=series.name in many,
            )
    costs, values = zip(*[point[:2] for s in pareto.series for point in s.points] or [(1.0, 1.0)], strict=True)
    _log_if_wide(axes, values)
    if axes.get_yscale() == "log":  # an interval down to zero has no end there: it must not take the scale
        axes.set_ylim(bottom=min(axes.get_ylim()[1], 0.5 * min(values)))
    if pareto.cost_label:
        axes.xaxis.set_major_formatter(lambda cost, _: amount(cost))
        _log_if_wide(axes, costs, along="x")
        axes.margins(x=0.08)
    else:
        axes.set_xlim(0, 1.04 * max(1.0, *costs))
        axes.xaxis.set_major_formatter(lambda share, _: percent(share))
    axes.set(xlabel=pareto.cost_label or "MACs per image, share of the reference", ylabel=pareto.metric_label)
    axes.grid(color=LINES, linewidth=0.8)
    if pareto.beat:
        _draw_beaten(axes, *pareto.beat)


def _draw_beaten(axes: Axes, cost: float, value: float) -> None:
    """The corner of what is dearer than the best free and no better, up to the edges that the axes have by now."""
    right, top, colour = axes.get_xlim()[1], axes.get_ylim()[1], ROLES["best free"]
    label = "no better than what is free"
    axes.fill_between([cost, right], value, top, color=colour, alpha=0.12, linewidth=0, zorder=0.5, label=label)
    axes.plot([cost, cost, right], [top, value, value], color=colour, linewidth=1.3, linestyle=(0, (5, 2)), zorder=1)
    axes.set(xlim=(axes.get_xlim()[0], right), ylim=(axes.get_ylim()[0], top))


def _draw_series(axes: Axes, series: Series, colour: str, marker: str, cloud: bool) -> None:
    costs, values, low, high = np.array(series.points, dtype=float).T  # None becomes NaN: a bar that is not drawn
    bars = None if np.isnan([low, high]).all() else np.clip([values - low, high - values], 0, None)
    if series.style == "mark":
        _draw_mark(axes, series, colour)
        return
    if series.style == "frontier":
        best = frontier(list(zip(costs, values, strict=True)))
        axes.plot(*zip(*best, strict=True), color=colour, linewidth=2.2, zorder=3)
    size = 5.0 if cloud else {"star": 17.0, "points": 8.0, "line": 5.5, "frontier": 6.5, "group": 6.5}[series.style]
    look = {"marker": marker, "markersize": size, "color": colour, "capsize": 3.5}
    look |= {"linestyle": "-" if series.style == "line" else "none", "markeredgecolor": "white", "elinewidth": 1.5}
    order = 2 if cloud else 4 if series.style == "star" else 3  # the many behind the few
    axes.errorbar(costs, values, bars, label=series.name, zorder=order, markeredgewidth=0.6, **look)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, value) points, lower is better, those that no other one is as good as at no more cost; by cost."""
    found: list[tuple[float, float]] = []
    for cost, value in sorted(points):
        if not found or value < found[-1][1]:
            found.append((cost, value))
    return found


def _draw_mark(axes: Axes, series: Series, colour: str) -> None:
    """Rings, each with the series' name on the side where nothing cheaper and better should be."""
    from matplotlib.patheffects import withStroke

    for cost, value, *_ in series.points:
        axes.plot([cost], [value], "o", markersize=15, markerfacecolor="none", markeredgecolor=colour, zorder=5)
        look = {"color": colour, "fontsize": 11, "weight": "bold", "zorder": 6, "va": "top", "ha": "right"}
        look["path_effects"] = [withStroke(linewidth=3, foreground="white")]
        axes.annotate(series.name, (cost, value), xytext=(-9, -7), textcoords="offset points", **look)


def draw_plan(axes: Axes, chart: PlanChart, colours: Mapping[str, str]) -> None:
    """A column for every row; what its guide costs stands on top, hatched."""
    heights = np.array([chart.shares[entry] for entry in chart.entries], dtype=float)
    guides = chart.guides or (None,) * len(heights)
    added = np.array([chart.shares[guide.entry] if guide else 0.0 for guide in guides], dtype=float)
    calls = len(heights) + sum(guide is not None for guide in guides)
    dense, top = len(heights) > 60, 1.04 * max([1.0, *(heights + added)])
    width = 1.0 if dense else 0.88
    for name in [name for name in colours if name in chart.entries]:
        at = np.flatnonzero([entry == name for entry in chart.entries])
        label = f"{name} at {percent(chart.shares[name])}: {len(at):,} of {calls:,} calls"
        bars = axes.bar(at, heights[at], width=width, color=colours[name], linewidth=0, label=label)
        for bar in bars:  # columns that touch show pale seams where their edges are smoothed
            bar.set_antialiased(not dense)
    for guide in dict.fromkeys(filter(None, guides)):
        at = np.flatnonzero([one == guide for one in guides])
        label = f"guide {guide.entry} at {percent(chart.shares[guide.entry])}, weight {guide.weight:g}: "
        label += f"{len(at):,} of {calls:,} calls"
        look = {"color": colours[guide.entry], "edgecolor": "white", "hatch": "///", "linewidth": 0}
        axes.bar(at, added[at], bottom=heights[at], width=width, label=label, **look)
    _step_ticks(axes, chart.timesteps)
    axes.set(ylim=(0, top), ylabel="MACs of a call, share of the reference")
    axes.yaxis.set_major_formatter(lambda share, _: percent(share))
    axes.grid(axis="y", color=LINES, linewidth=0.8)
    if len(heights):
        mean, red = (heights + added).mean(), ROLES["plan"]
        axes.axhline(mean, color="white", linewidth=3.4)  # a white edge, seen on dark columns
        axes.axhline(mean, color=red, linewidth=1.7, linestyle=(0, (5, 2)))
        style = {"color": red, "weight": "bold", "va": "center", "transform": axes.transAxes}
        axes.text(1.01, mean / top, f"mean {percent(mean)}\nof the reference", **style)  # beside the columns


def _draw_heatmap(axes: Axes, heatmap: Heatmap, *, below: bool = False) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    values = np.asarray(heatmap.values, dtype=float).T
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return
    # The reference's error is zero, or a tiny floor in its place: it must not take the scale from the others.
    seen = positive[positive > 1e-6 * positive.max()]
    paint = colormaps["magma_r"].with_extremes(under=PALE, bad=PALE)
    norm = LogNorm(seen.min(), max(seen.max(), 1.001 * seen.min()))
    shown = axes.imshow(np.ma.masked_invalid(values), paint, norm=norm, aspect="auto", interpolation="nearest")
    bar = axes.figure.colorbar(
        shown, extend="min" if seen.size < values.size else "neither", pad=0.02, location="bottom" if below else "right"
    )
    bar.set_label(textwrap.fill(heatmap.label, 40), color=INK, fontsize=10.5)
    bar.ax.tick_params(which="both", length=0, labelcolor=INK, labelsize=9.5)
    bar.outline.set_visible(False)
    every = -(-len(heatmap.entries) // 24)  # more names than that would overlap
    axes.set_yticks(range(0, len(heatmap.entries), every), heatmap.entries[::every])
    axes.hlines(np.arange(0.5, len(heatmap.entries) - 1), -0.5, len(values.T) - 0.5, "white", linewidth=2)
    _step_ticks(axes, heatmap.timesteps)


def _draw_curve(axes: Axes, curve: Curve, colours: Mapping[str, str]) -> None:
    accents = _with_accents(list(curve.lines), colours)
    repeats = _repeats(accents)
    for name, colour in accents.items():
        x, y = np.array(curve.lines[name], dtype=float).reshape(-1, 2).T
        dashes = ("-", "--", ":", "-.")[repeats[name] % 4]
        axes.plot(x, y, color=colour, linewidth=1.5, linestyle=dashes, label=name)
    _log_if_wide(axes, [y for line in curve.lines.values() for _, y in line])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x == round(x) else f"{x:g}")
    axes.set(xlabel=curve.xlabel, ylabel=curve.ylabel, xmargin=0.01)
    axes.grid(color=LINES, linewidth=0.8)


def _step_ticks(axes: Axes, timesteps: Sequence[float]) -> None:
    at = np.unique(np.linspace(0, len(timesteps) - 1, min(len(timesteps), 11)).round().astype(int))
    axes.set_xticks(at, [f"{timesteps[k]:.4g}" for k in at])
    axes.set(xlim=(-0.5, max(len(timesteps), 1) - 0.5), xlabel="timestep (noise on the left, picture on the right)")


def _log_if_wide(axes: Axes, values: Sequence[float], along: Literal["x", "y"] = "y") -> None:
    """A log axis, its ticks in plain numbers, where positive values span more than tenfold; linear below the least of
    them where there are zeros, as corrected distances can be."""
    finite = [value for value in values if np.isfinite(value)]
    positive = [value for value in finite if value > 0]
    axis, set_scale = (axes.xaxis, axes.set_xscale) if along == "x" else (axes.yaxis, axes.set_yscale)
    if positive and max(positive) > 10 * min(positive) and min(finite) == 0:
        set_scale("symlog", linthresh=min(positive))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_locator(_no_ticks())
    elif finite and max(finite) > 10 * min(finite) > 0:
        set_scale("log")
        axis.get_major_locator().set_params(subs=(1, 2, 5) if max(finite) < 300 * min(finite) else (1,))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_locator(_no_ticks())


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
