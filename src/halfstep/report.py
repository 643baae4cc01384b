"""Tables, plots and picture grids as one self-contained HTML page, with each figure as a PNG beside it."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from halfstep import disk

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text; the first column names the row. `best`: the row to emphasise."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    best: int | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points (share of MACs, value, low, high); low and high may be None."""

    name: str
    points: tuple[tuple[float, float, float | None, float | None], ...]
    style: Literal["line", "points", "star"] = "points"


@dataclass(frozen=True, kw_only=True)
class Pareto:
    """Quality against cost. `band`: the reference's interval, shaded."""

    title: str
    metric_label: str
    series: tuple[Series, ...]
    band: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class PlanChart:
    """One column per row of a plan. `shares`: an entry's cost as a share of the reference's."""

    title: str
    timesteps: tuple[float, ...]
    entries: tuple[str, ...]
    shares: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """values [steps, entries], on a logarithmic scale."""

    title: str
    timesteps: tuple[float, ...]
    entries: tuple[str, ...]
    values: np.ndarray
    label: str


@dataclass(frozen=True, kw_only=True)
class Grid:
    """images: uint8 [N,C,H,W]."""

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
    """A whole page. `facts` and `files` are name -> text."""

    title: str
    summary: str
    facts: Mapping[str, str]
    tables: tuple[Table, ...] = ()
    figures: tuple[Pareto | PlanChart | Heatmap | Curve, ...] = ()
    grids: tuple[Grid, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


def write_report(report: Report, folder: Path) -> Path:
    """Write folder/report.html and folder/figures/*.png; returns the page's path. Raises RunError."""
    folder = Path(folder)
    figures = [(figure.title, _png(_draw(figure))) for figure in report.figures]
    for title, data in figures:
        disk.write_atomic(folder / "figures" / f"{slug(title)}.png", lambda path, data=data: path.write_bytes(data))
    disk.write_text(folder / "report.html", _page(report, figures))
    return folder / "report.html"


def slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "figure"


def picture_grid(images: np.ndarray, columns: int = 8, scale: int | None = None) -> Image.Image:
    """uint8 [N,C,H,W] as one picture: cells enlarged to about 64 pixels without smoothing, 2 white pixels between."""
    images = np.asarray(images)
    n, channels, height, width = images.shape
    scale = scale or max(1, round(64 / max(height, width)))
    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    cell_h, cell_w = height * scale + 2, width * scale + 2
    canvas = np.full((rows * cell_h - 2 if n else 1, columns * cell_w - 2 if n else 1, 3), 255, np.uint8)
    for i, image in enumerate(images):
        big = image.transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1)
        y, x = i // columns * cell_h, i % columns * cell_w
        canvas[y : y + height * scale, x : x + width * scale] = big  # one grey channel spreads over three
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def rich_table(table: Table) -> rich.table.Table:
    """The table for the terminal."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    shown = RichTable(title=escape(table.title), caption=escape(table.note) or None, caption_justify="left")
    for i, name in enumerate(table.columns):
        shown.add_column(escape(name), justify="right" if i else "left", overflow="fold")
    for i, row in enumerate(table.rows):
        shown.add_row(*map(escape, row), style="bold green" if i == table.best else None)
    return shown


# --- figures ----------------------------------------------------------------------------------------------------------


def _draw(figure: Any) -> Any:
    drawers = {Pareto: _pareto, PlanChart: _plan_chart, Heatmap: _heatmap, Curve: _curve}
    return drawers[type(figure)](figure)


def _axes(width: float = 8.0, height: float = 4.2) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.92 - 0.85 * i / max(1, count - 1)) for i in range(count)]


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _pareto(chart: Pareto) -> Any:
    from matplotlib import colormaps

    figure, axes = _axes(height=4.8)
    if chart.band:
        axes.axhspan(*chart.band, color="#2a9d8f", alpha=0.15, label="reference's 95 % interval", zorder=0)
    values = []
    for i, series in enumerate(chart.series):
        if not series.points:
            continue
        x, y, low, high = (np.array(column, dtype=float) for column in zip(*series.points, strict=True))
        values += list(y)
        many = len(x) > 4
        marker = {"star": "*", "line": "o", "points": "." if many else "o"}[series.style]
        size = {"star": 15, "line": 4, "points": 6 if many else 7}[series.style]
        colour = "#9aa0a6" if many and series.style == "points" else colormaps["tab10"](i % 10)
        style = "-" if series.style == "line" else "none"
        axes.plot(x, y, linestyle=style, marker=marker, markersize=size, color=colour, label=series.name, zorder=3)
        known = np.isfinite(low) & np.isfinite(high)
        if known.any():
            bars = [np.maximum(0, (y - low)[known]), np.maximum(0, (high - y)[known])]
            axes.errorbar(x[known], y[known], yerr=bars, fmt="none", ecolor=colour, capsize=3, zorder=2)
    if values and min(values) > 0 and max(values) / min(values) > 10:
        axes.set_yscale("log")
    _percent(axes.xaxis)
    axes.set(xlabel="MACs per image, share of the reference", ylabel=chart.metric_label, title=chart.title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _plan_chart(chart: PlanChart) -> Any:
    figure, axes = _axes(height=3.6)
    order = sorted(chart.shares, key=lambda name: (chart.shares[name], name))
    colours = dict(zip(order, _colours(len(order)), strict=True))
    heights = np.array([chart.shares[entry] for entry in chart.entries])
    places = np.arange(len(heights))
    for name in order:
        chosen = np.array([entry == name for entry in chart.entries])
        if chosen.any():
            label = f"{name} ({chart.shares[name]:.0%})"
            axes.bar(places[chosen], heights[chosen], width=0.92, color=colours[name], label=label)
    if len(heights):
        mean = float(heights.mean())
        axes.axhline(mean, color="#d1495b", linestyle="--", linewidth=1.2, label=f"mean {mean:.0%} of the reference")
        shown = np.unique(np.linspace(0, len(heights) - 1, min(11, len(heights))).round().astype(int))
        axes.set_xticks(shown, [f"{chart.timesteps[i]:.0f}" for i in shown])
    _percent(axes.yaxis)
    axes.set(xlabel="timestep (noisy → clean)", ylabel="cost of the call", title=chart.title)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _heatmap(chart: Heatmap) -> Any:
    from matplotlib.colors import LogNorm

    figure, axes = _axes(height=1.6 + 0.35 * len(chart.entries))
    values = np.where(chart.values > 0, chart.values, np.nan).T
    finite = values[np.isfinite(values)]
    norm = LogNorm(vmin=max(finite.min(), finite.max() * 1e-6), vmax=finite.max()) if finite.size else None
    picture = axes.imshow(values, aspect="auto", norm=norm, cmap="magma")
    shown = np.unique(np.linspace(0, len(chart.timesteps) - 1, min(11, len(chart.timesteps))).round().astype(int))
    axes.set_xticks(shown, [f"{chart.timesteps[i]:.0f}" for i in shown])
    axes.set_yticks(range(len(chart.entries)), chart.entries)
    axes.set(xlabel="timestep (noisy → clean)", title=chart.title)
    bar = figure.colorbar(picture, ax=axes)
    bar.set_label(chart.label, fontsize=7)
    return figure


def _curve(chart: Curve) -> Any:
    figure, axes = _axes(height=3.4)
    values = [y for points in chart.lines.values() for _, y in points]
    for name, points in chart.lines.items():
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, label=name, linewidth=1.4)
    if values and min(values) > 0 and max(values) / min(values) > 10:
        axes.set_yscale("log")
    axes.set(xlabel=chart.xlabel, ylabel=chart.ylabel, title=chart.title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    return figure


# --- the page ---------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2a7f62; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 1100px; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.9rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
.lead { font-size: 1.2rem; border-left: 4px solid var(--accent); padding: .4rem 1rem; background: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
table { font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.best { font-weight: 650; background: #2a7f6222; }
.note { font-size: .85rem; opacity: .8; } figure { margin: 1rem 0; } figcaption { font-size: .9rem; font-weight: 600; }
figure.plot img { width: 100%; max-width: 900px; background: #fff; border-radius: 10px; }
.grids { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 1rem; }
.grids img { width: 100%; image-rendering: pixelated; border-radius: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .88rem; } dd { margin: 0; }
dt { font-weight: 600; overflow-wrap: anywhere; }
"""


def _page(report: Report, figures: list[tuple[str, bytes]]) -> str:
    title = html.escape(report.title)
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>',
        f'<h1>{title}</h1><p class="lead">{html.escape(report.summary)}</p>',
        *map(_table, report.tables),
        *(f'<figure class="plot">{_image(name, data)}</figure>' for name, data in figures),
        '<h2>Pictures</h2><div class="grids">' if report.grids else "",
        *map(_grid, report.grids),
        "</div>" if report.grids else "",
        _details("Files", report.files),
        _details("Machine, versions, seeds, fingerprints", report.facts),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part)


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    rows = [
        ('<tr class="best">' if i == table.best else "<tr>")
        + "".join(f"<td>{html.escape(c)}</td>" for c in row)
        + "</tr>"
        for i, row in enumerate(table.rows)
    ]
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    body = "".join(rows)
    return (
        f'<h2>{html.escape(table.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _grid(grid: Grid) -> str:
    buffer = io.BytesIO()
    picture_grid(grid.images, grid.columns).save(buffer, "PNG")
    note = f' <span class="note">{html.escape(grid.note)}</span>' if grid.note else ""
    picture = _image(grid.title, buffer.getvalue())
    return f"<figure><figcaption>{html.escape(grid.title)}{note}</figcaption>{picture}</figure>"


def _image(name: str, data: bytes) -> str:
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _details(title: str, facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items())
    return f"<details><summary>{html.escape(title)}</summary><dl>{items}</dl></details>"
