"""Tables, plots and picture grids, and the one self-contained HTML page that holds them."""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

import numpy as np
from PIL import Image

from halfstep import disk
from halfstep.errors import DataError

if TYPE_CHECKING:  # matplotlib and rich load only when something is drawn or printed
    import rich.table
    from matplotlib.axes import Axes

CELL, GAP = 64, 2  # pixels of a picture in a grid, about, and between two of them
INK, PALE, LINES = "#1f2430", "#f1f3f6", "#e3e7ee"
ROLES = {"reference": "#440154", "plan": "#e4572e"}  # the two that every figure is about
ACCENTS = ("#2e86ab", "#d99a1c", "#8f5ea2", "#4a9d5b", "#b0624a", "#5f6b7a")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of text; `best`: the row to emphasise."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    best: int | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points (share of MACs 0..1, value, low, high), the last two None where there is no interval."""

    name: str
    points: tuple[tuple[float, float, float | None, float | None], ...]
    style: Literal["line", "points", "star"]


@dataclass(frozen=True, kw_only=True)
class Pareto:
    """Quality against cost; `band`: the reference's interval, drawn as a strip; `floor`: what perfect draws reach by
    chance, drawn as a line."""

    title: str
    metric_label: str
    series: tuple[Series, ...]
    band: tuple[float, float] | None = None
    floor: float | None = None


@dataclass(frozen=True, kw_only=True)
class PlanChart:
    """What runs at each row of a plan, noisiest first; `shares`: an entry's MACs over the reference's."""

    title: str
    timesteps: tuple[float, ...]
    entries: tuple[str, ...]
    shares: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """`values` [steps, entries] in log colours."""

    title: str
    timesteps: tuple[float, ...]
    entries: tuple[str, ...]
    values: np.ndarray
    label: str


@dataclass(frozen=True, kw_only=True)
class Grid:
    """`images` uint8 [N, C, H, W], C = 1 or 3; consecutive grids stand side by side."""

    title: str
    images: np.ndarray
    columns: int = 8
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Lines of (x, y) points by name."""

    title: str
    xlabel: str
    ylabel: str
    lines: Mapping[str, tuple[tuple[float, float], ...]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole page; `files`: name in the report's folder -> what it is."""

    title: str
    summary: str
    facts: Mapping[str, str]
    tables: tuple[Table, ...]
    figures: tuple[Pareto | PlanChart | Heatmap | Curve, ...]
    grids: tuple[Grid, ...]
    files: Mapping[str, str] = field(default_factory=dict)


def write_report(report: Report, folder: Path) -> Path:
    """Write `folder`/report.html and its pictures under `folder`/figures; returns the page's path.

    All is drawn before anything is written, and the page comes last: a failure leaves the old page as it was.
    Raises RunError when the folder cannot be written, DataError for a grid of no images.
    """
    folder, pictures = Path(folder), dict[str, bytes]()
    shares = {name: share for f in report.figures if isinstance(f, PlanChart) for name, share in f.shares.items()}
    drawn = [_draw(figure, _entry_colours(shares)) for figure in report.figures]
    for item, png in zip(report.figures + report.grids, drawn + [_grid_png(g) for g in report.grids], strict=True):
        slug = re.sub(r"[^a-z0-9]+", "-", item.title.lower()).strip("-") or "picture"
        same = sum(re.fullmatch(rf"{slug}(-\d+)?\.png", name) is not None for name in pictures)
        pictures[f"{slug}-{same + 1}.png" if same else f"{slug}.png"] = png
    page = _page(report, list(pictures.values()))
    for name, png in pictures.items():
        disk.write_bytes(folder / "figures" / name, png)
    disk.write_text(folder / "report.html", page)
    return folder / "report.html"


def picture(pixels: np.ndarray) -> Image.Image:
    """uint8 [1 or 3, H, W] as a picture."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def picture_grid(images: np.ndarray, columns: int = 8, scale: int | None = None) -> Image.Image:
    """Images uint8 [N, 1 or 3, H, W] row by row, each pixel repeated `scale` times (by default to about 64 a cell)."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        got, expected = f"{images.dtype} {list(images.shape)}", "uint8 [N, 1 or 3, height, width]"
        raise DataError(got=got, expected=expected, where="picture grid", do="convert the images first")
    count, channels, height, width = images.shape
    scale = scale or max(1, round(CELL / max(height, width, 1)))
    columns = max(1, min(columns, count))
    rows, tall, wide = max(1, -(-count // columns)), height * scale + GAP, width * scale + GAP
    canvas = np.full((rows * tall - GAP, columns * wide - GAP, channels), 255, np.uint8)
    for k, image in enumerate(images.transpose(0, 2, 3, 1)):
        top, left = k // columns * tall, k % columns * wide
        canvas[top : top + tall - GAP, left : left + wide - GAP] = image.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def rich_table(table: Table) -> rich.table.Table:
    """The same table for the terminal; a cell is plain text, so its brackets are no markup."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    caption = Text(table.note, style="dim") if table.note else None
    out = RichTable(title=Text(table.title), title_justify="left", caption=caption, caption_justify="left")
    out.box, out.pad_edge = box.SIMPLE_HEAD, False
    for column, number in zip(table.columns, _are_numbers(table), strict=True):
        out.add_column(Text(column), justify="right" if number else "left")
    for k, row in enumerate(table.rows):
        out.add_row(*map(Text, row), style="bold green" if k == table.best else None)
    return out


def _are_numbers(table: Table) -> list[bool]:
    """Which columns hold numbers: their cells begin with a digit or a sign."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.columns)
    return [any(cells) and all(re.match(r"[-+−–—<>~≈±]?\s*[\d.]|[—–-]?$", c) for c in cells) for cells in columns]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2g} %"


def _entry_colours(shares: Mapping[str, float]) -> dict[str, str]:
    """One colour per entry by rank of cost, darker is more expensive."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    ranked = sorted(shares, key=lambda name: (-shares[name], name))
    return {name: to_hex(colormaps["viridis"](0.92 * k / max(1, len(ranked) - 1))) for k, name in enumerate(ranked)}


def _with_accents(names: Sequence[str], entries: Mapping[str, str]) -> dict[str, str]:
    """A colour for every name: an entry's or a role's own, else the next accent."""
    known = ROLES | dict(entries)
    free = [name for name in names if name not in known]
    return {name: known.get(name) or ACCENTS[free.index(name) % len(ACCENTS)] for name in names}


def _repeats(colours: Mapping[str, str]) -> dict[str, int]:
    """How many names before each have its colour: where colours come round, the marker or the dashes tell."""
    before = list(colours.values())
    return {name: before[:k].count(colour) for k, (name, colour) in enumerate(colours.items())}


def _draw(figure: Pareto | PlanChart | Heatmap | Curve, colours: Mapping[str, str]) -> bytes:
    """The PNG of a figure. Every colour is set by hand: a user's dark matplotlib style would write white on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(10, 4.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot(facecolor="white")
    match figure:
        case Pareto():
            _draw_pareto(axes, figure, colours)
        case PlanChart():
            _draw_plan(axes, figure, colours)
        case Heatmap():
            _draw_heatmap(axes, figure)
        case Curve():
            _draw_curve(axes, figure, colours)
    _finish(axes, *(("outside upper left", 3) if isinstance(figure, PlanChart) else ("outside right upper", 1)))
    canvas.savefig(file := io.BytesIO(), format="png", metadata={"Software": None})  # same numbers, same bytes
    return file.getvalue()


def _finish(axes: Axes, place: str, columns: int) -> None:
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=9.5, labelcolor=INK)
    for name, spine in axes.spines.items():
        spine.set(visible=name == "bottom", color="#c5cbd5")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(
            color=INK, fontsize=10.5, text=textwrap.fill(label.get_text(), 60 if label is axes.xaxis.label else 40)
        )
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        style = {"frameon": False, "fontsize": 9.5, "labelcolor": INK, "labelspacing": 0.7}
        axes.figure.legend(handles, labels, loc=place, ncols=columns, **style)
    if not axes.has_data():
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center", color=INK, fontsize=12)


def _draw_pareto(axes: Axes, pareto: Pareto, colours: Mapping[str, str]) -> None:
    if pareto.band:
        axes.axhspan(*pareto.band, color=LINES, linewidth=0, label="reference, 95 % interval")
    if pareto.floor:
        axes.axhline(pareto.floor, color=INK, linewidth=1, linestyle=":", label="perfect draws stay below")
    clouds = {s.name for s in pareto.series if s.style == "points" and len(s.points) > 1 and s.name not in colours}
    accents = _with_accents([s.name for s in pareto.series if s.name not in clouds], colours)
    repeats = _repeats(accents)
    for series in pareto.series:
        if series.points:
            marker = "*" if series.style == "star" else "osD^v"[repeats.get(series.name, 0) % 5]
            _draw_series(axes, series, accents.get(series.name, "#9aa3b2"), marker, cloud=series.name in clouds)
    shares, values = zip(*[point[:2] for s in pareto.series for point in s.points] or [(1.0, 1.0)], strict=True)
    _log_if_wide(axes, values)
    axes.set_xlim(0, 1.04 * max(1.0, *shares))
    axes.xaxis.set_major_formatter(lambda share, _: _percent(share))
    axes.set(xlabel="MACs per image, share of the reference", ylabel=pareto.metric_label)
    axes.grid(color=LINES, linewidth=0.8)


def _draw_series(axes: Axes, series: Series, colour: str, marker: str, cloud: bool) -> None:
    shares, values, low, high = np.array(series.points, dtype=float).T  # None becomes NaN: a bar that is not drawn
    bars = None if np.isnan([low, high]).all() else np.clip([values - low, high - values], 0, None)
    size = 5.0 if cloud else {"star": 17.0, "points": 8.0, "line": 5.5}[series.style]
    look = {"marker": marker, "markersize": size, "color": colour, "capsize": 3.5}
    look |= {"linestyle": "-" if series.style == "line" else "none", "markeredgecolor": "white", "elinewidth": 1.5}
    order = 2 if cloud else 4 if series.style == "star" else 3  # the many behind the few
    axes.errorbar(shares, values, bars, label=series.name, zorder=order, markeredgewidth=0.6, **look)


def _draw_plan(axes: Axes, chart: PlanChart, colours: Mapping[str, str]) -> None:
    heights = np.array([chart.shares[entry] for entry in chart.entries], dtype=float)
    dense, top = len(heights) > 60, 1.04 * max([1.0, *heights])
    for name in [name for name in colours if name in chart.entries]:
        at = np.flatnonzero([entry == name for entry in chart.entries])
        label = f"{name} at {_percent(chart.shares[name])}: {len(at):,} of {len(heights):,} calls"
        bars = axes.bar(at, heights[at], width=1.0 if dense else 0.88, color=colours[name], linewidth=0, label=label)
        for bar in bars:  # columns that touch show pale seams where their edges are smoothed
            bar.set_antialiased(not dense)
    _step_ticks(axes, chart.timesteps)
    axes.set(ylim=(0, top), ylabel="MACs of a call, share of the reference")
    axes.yaxis.set_major_formatter(lambda share, _: _percent(share))
    axes.grid(axis="y", color=LINES, linewidth=0.8)
    if len(heights):
        mean, red = heights.mean(), ROLES["plan"]
        axes.axhline(mean, color="white", linewidth=3.4)  # a white edge, seen on dark columns
        axes.axhline(mean, color=red, linewidth=1.7, linestyle=(0, (5, 2)))
        style = {"color": red, "weight": "bold", "va": "center", "transform": axes.transAxes}
        axes.text(1.01, mean / top, f"mean {_percent(mean)}\nof the reference", **style)  # beside the columns


def _draw_heatmap(axes: Axes, heatmap: Heatmap) -> None:
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
    bar = axes.figure.colorbar(shown, extend="min" if seen.size < values.size else "neither", pad=0.02)
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


def _log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """A log axis, its ticks in plain numbers, where positive values span more than tenfold; linear below the least of
    them where there are zeros, as corrected distances can be."""
    finite = [value for value in values if np.isfinite(value)]
    positive = [value for value in finite if value > 0]
    if positive and max(positive) > 10 * min(positive) and min(finite) == 0:
        axes.set_yscale("symlog", linthresh=min(positive))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
    elif finite and max(finite) > 10 * min(finite) > 0:
        axes.set_yscale("log")
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5) if max(finite) < 300 * min(finite) else (1,))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()


def _grid_png(grid: Grid) -> bytes:
    picture_grid(grid.images, grid.columns).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def _page(report: Report, pictures: Sequence[bytes]) -> str:
    plots = [_figure(f.title, "", png) for f, png in zip(report.figures, pictures, strict=False)]
    grids = zip(report.grids, pictures[len(plots) :], strict=True)
    shown = "".join(_figure(grid.title, grid.note, png) for grid, png in grids)
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in report.facts.items())
    files = (
        f'<dt><a href="{quote(n)}">{escape(n)}</a></dt><dd>{escape(what)}</dd>' for n, what in report.files.items()
    )
    parts = (
        f"<h1>{escape(report.title)}</h1><p class=lead>{escape(report.summary)}</p>",
        *map(_table, report.tables),
        f"<div class=grids>{shown}</div>" * bool(shown),
        *plots,
        f"<h2>Files</h2><dl>{''.join(files)}</dl>" * bool(report.files),
        f"<details><summary>How this was made</summary><dl>{facts}</dl></details>" * bool(facts),
    )
    return HEAD.format(title=escape(report.title), style=STYLE) + "\n".join(filter(None, parts)) + FOOT


def _table(table: Table) -> str:
    kinds = [" class=n" * number for number in _are_numbers(table)]
    head = "".join(f"<th scope=col{k}>{escape(name)}</th>" for k, name in zip(kinds, table.columns, strict=True))
    rows = ["".join(f"<td{k}>{escape(cell)}</td>" for k, cell in zip(kinds, row, strict=True)) for row in table.rows]
    body = "".join(f"<tr{' class=best' * (k == table.best)}>{row}</tr>" for k, row in enumerate(rows))
    note = f"<p class=note>{escape(table.note)}</p>" * bool(table.note)
    inner = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<section><h2>{escape(table.title)}</h2><div class=wide>{inner}</div>{note}</section>"


def _figure(title: str, note: str, png: bytes) -> str:
    width, height = Image.open(io.BytesIO(png)).size
    # Pictures no wider than their column are never shrunk, so their pixels may stay hard.
    hard = " class=hard" * (width <= 8 * (CELL + GAP))
    data, alt = base64.b64encode(png).decode(), escape(f"{title}. {note}".strip(". "))
    image = f'<img{hard} src="data:image/png;base64,{data}" width={width} height={height} alt="{alt}">'
    return f"<figure><h2>{escape(title)}</h2>{image}<figcaption>{escape(note)}</figcaption></figure>"


HEAD = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>
"""
FOOT = "\n<footer>Written by Halfstep.</footer></main></body></html>\n"
STYLE = """
:root{color-scheme:light dark;--ink:#1f2430;--soft:#5b6472;--paper:#fbfbfd;--line:#e3e7ee;--tint:#fdefe9;--go:#c2410c}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaf0;--soft:#a2aab8;--paper:#14161c;--line:#2d323d;--tint:#37231b;
--go:#fb9168}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:1148px;margin:0 auto;padding:48px 24px}h1{font-size:2.1rem;letter-spacing:-.02em;margin:0 0 12px}
h2{font-size:1.15rem;margin:44px 0 12px}.lead{font-size:1.25rem;line-height:1.5;margin:0;padding:2px 0 2px 18px;
border-left:4px solid var(--go);max-width:56em}.note,figcaption,footer{color:var(--soft);font-size:.875rem}
.note{margin:10px 0 0;max-width:68em}figcaption{margin-top:6px}figcaption:empty{display:none}footer{margin-top:56px}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.94rem}
th,td{padding:8px 12px;text-align:left;white-space:nowrap;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600}.n{text-align:right;font-variant-numeric:tabular-nums}td:first-child{font-weight:600}
.best td{background:var(--tint);color:var(--go);font-weight:600}figure{margin:0}
img{display:block;max-width:100%;height:auto;background:#fff;border-radius:10px;padding:5px}
.hard{image-rendering:pixelated;border-radius:6px}.grids{display:grid;gap:0 24px}
@media(min-width:1000px){.grids{grid-template-columns:1fr 1fr}}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 24px;margin:12px 0;font-size:.94rem}dt{font-weight:600}
dd{margin:0;overflow-wrap:anywhere}a{color:var(--go)}details{margin-top:44px}summary{cursor:pointer;font-weight:600}
@media(max-width:600px){dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:10px}}
"""
