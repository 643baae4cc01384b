"""Tables for the terminal and the page, and the one self-contained HTML page with its figures and grids of pictures."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

import numpy as np

from halfstep.core import disk
from halfstep.data.pictures import picture, picture_grid
from halfstep.report.figures import Curve, Figure, Heatmap, Pareto, colours_of, draw_png, draw_svg
from halfstep.report.lanes import lanes
from halfstep.report.markup import image_tag, light_and_dark, scrolling, shrunk, themed, tiles
from halfstep.report.reels import Reel, reel
from halfstep.report.strips import PlanChart
from halfstep.report.style import STYLE

if TYPE_CHECKING:  # rich loads only when something is printed
    import rich.table


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of text; `best`: the row to emphasise; `beat`: the row that it is held against, the line to beat."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    best: int | None = None
    beat: int | None = None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """`images` uint8 [N, C, H, W], C = 1 or 3; consecutive grids stand side by side."""

    title: str
    images: np.ndarray
    columns: int = 8
    note: str = ""


class Cell(NamedTuple):
    """One place of a plate: `images` uint8 [N, C, H, W] side by side, a text below; `marked`: it stands out."""

    images: np.ndarray
    text: str = ""
    marked: bool = False


@dataclass(frozen=True, kw_only=True)
class Plate:
    """Pictures in rows under named columns, as many cells in each row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Pictures of the same noises, a row for each name: uint8 [N, C, H, W], the same N everywhere. `pictured`: what
    each is of, "" where nothing was asked for."""

    title: str
    rows: Mapping[str, np.ndarray]
    pictured: tuple[str, ...] = ()
    note: str = ""


Part = Table | Figure | Grid | Plate | Beside | Reel


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole page, told in the order of `parts`; grids that follow one another stand side by side.

    `warnings`: what is wrong with all of it; `todo`: what would settle what is open, and the setting for it; `numbers`:
    (number, of what, what stands beside it); `files`: name in the report's folder -> what it is.
    """

    title: str
    summary: str
    facts: Mapping[str, str]
    parts: tuple[Part, ...]
    warnings: tuple[str, ...] = ()
    todo: tuple[str, str] = ("", "")
    numbers: tuple[tuple[str, str, str], ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


def write_report(report: Report, folder: Path) -> Path:
    """Write `folder`/report.html and its pictures under `folder`/figures; returns the page's path.

    All is drawn before anything is written, and the page comes last: a failure leaves the old page as it was.
    Raises RunError when the folder cannot be written, DataError for a grid of no images.
    """
    folder, pictures = Path(folder), dict[str, bytes]()
    colours = colours_of([part for part in report.parts if isinstance(part, Figure)])
    for part in report.parts:
        if isinstance(part, Figure | Grid):
            slug = re.sub(r"[^a-z0-9]+", "-", part.title.lower()).strip("-") or "picture"
            same = sum(re.fullmatch(rf"{slug}(-\d+)?\.png", name) is not None for name in pictures)
            png = _grid_png(part) if isinstance(part, Grid) else draw_png(part, colours)
            pictures[f"{slug}-{same + 1}.png" if same else f"{slug}.png"] = png
    page = _page(report, colours)
    for name, png in pictures.items():
        disk.write_bytes(folder / "figures" / name, png)
    disk.write_text(folder / "report.html", page)
    return folder / "report.html"


def markdown(table: Table) -> str:
    """The same table in Markdown, its note below; bars and line ends in cells are no edges of them."""
    lines = [markdown_row(table.columns), markdown_row(("---",) * len(table.columns)), *map(markdown_row, table.rows)]
    return "\n".join(lines) + (f"\n\n{table.note}" if table.note else "")


def markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def rich_table(table: Table) -> rich.table.Table:
    """The same table for the terminal; a cell is plain text, so its brackets are no markup."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    caption = Text(table.note, style="dim") if table.note else None
    out = RichTable(title=Text(table.title), title_justify="left", caption=caption, caption_justify="left")
    out.box, out.pad_edge = box.SIMPLE_HEAD, False
    for column, number in zip(table.columns, _are_numbers(table), strict=True):
        out.add_column(Text(column), justify="right" if number else "left", overflow="fold")
    for k, row in enumerate(table.rows):
        out.add_row(*map(Text, row), style="bold green" if k == table.best else None)
    return out


def _are_numbers(table: Table) -> list[bool]:
    """Which columns hold numbers: their cells begin with a digit or a sign."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.columns)
    return [any(cells) and all(re.match(r"[-+−–—<>~≈±]?\s*[\d.]|[—–-]?$", c) for c in cells) for cells in columns]


def _grid_png(grid: Grid) -> bytes:
    picture_grid(grid.images, grid.columns).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def _page(report: Report, colours: Mapping[str, str]) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in report.facts.items())
    files = (
        f'<dt><a href="{quote(n)}">{escape(n)}</a></dt><dd>{escape(what)}</dd>' for n, what in report.files.items()
    )
    body: list[str] = []
    for is_grid, parts in itertools.groupby(report.parts, key=lambda part: isinstance(part, Grid)):
        told = [_part(part, colours) for part in parts]
        body += [f'<div class="grids">{"".join(told)}</div>'] if is_grid else told
    found = (
        _top(report),
        *body,
        f"<section><h2>Files</h2><dl>{''.join(files)}</dl></section>" * bool(report.files),
        f"<details><summary>How this was made</summary><dl>{facts}</dl></details>" * bool(facts),
    )
    content = "\n".join(filter(None, found))
    style = STYLE + light_and_dark(content)
    return HEAD.format(title=escape(report.title), style=style) + content + FOOT


def _top(report: Report) -> str:
    """What a reader sees first: the claim in words, what is wrong with it or would settle it, the numbers."""
    said, setting = report.todo
    setting = f" <code>{escape(setting)}</code>" * bool(setting)
    numbers = "".join(
        f"<div><dt>{escape(what)}</dt><dd><b>{escape(number)}</b> <span>{escape(beside)}</span></dd></div>"
        for number, what, beside in report.numbers
    )
    return (
        f'<h1>{escape(report.title)}</h1><p class="lead">{escape(report.summary)}</p>'
        + "".join(f'<p class="wrong"><b>Warning:</b> {escape(one)}.</p>' for one in report.warnings)
        + f'<p class="todo">{escape(said)}{setting}</p>' * bool(said)
        + f'<dl class="numbers">{numbers}</dl>' * bool(numbers)
    )


def _part(part: Part, colours: Mapping[str, str]) -> str:
    match part:
        case Table():
            return _section(part.title, scrolling(_table(part), part.title), part.note)
        case Grid():
            images = shrunk(part.images)
            shown = tiles(images, part.columns)
            alt = f"{len(images)} pictures: {part.title}"
            return _section(part.title, image_tag(shown, alt, side=max(images.shape[2:])), part.note, "grid")
        case Plate():
            return _section(part.title, scrolling(_plate(part), part.title), part.note)
        case Beside():
            return _section(part.title, _beside(part), part.note, "beside")
        case Reel():
            return _section(part.title, reel(part), part.note)
        case PlanChart() if part.costs:
            return _section(part.title, lanes(part, colours), "")
        case _:
            return _section(part.title, _drawing(part, colours), "")


def _section(title: str, inner: str, note: str, kind: str = "") -> str:
    note = f'<p class="note">{escape(note)}</p>' * bool(note)
    return f"<section{f' class={kind}' * bool(kind)}><h2>{escape(title)}</h2>{inner}{note}</section>"


def _table(table: Table) -> str:
    kinds = [' class="n"' * number for number in _are_numbers(table)]
    head = "".join(
        f'<th scope="col"{k}>{escape(name)}</th>' if name else f"<td{k}></td>"
        for k, name in zip(kinds, table.columns, strict=True)
    )
    body = []
    for k, row in enumerate(table.rows):
        marks = [kind for kind, at in (("best", table.best), ("beat", table.beat)) if k == at]
        cells = [f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)]
        if not table.columns[0]:  # a name, not a value
            cells[0] = f'<th scope="row">{escape(row[0])}</th>'
        body.append(f"<tr{f' class={marks[0]}' if marks else ''}>{''.join(cells)}</tr>")
    caption = f'<caption class="unseen">{escape(table.title)}</caption>'
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _plate(plate: Plate) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in plate.columns)
    rows = []
    for k, row in enumerate(plate.rows):
        cells = (_cell(cell, f"{name}, picture {k}") for name, cell in zip(plate.columns, row, strict=True))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = f'<caption class="unseen">{escape(plate.title)}</caption>'
    return f'<table class="plate">{caption}<thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _cell(cell: Cell, alt: str) -> str:
    images = shrunk(cell.images)
    image = image_tag(picture_grid(images, columns=len(images)), alt, side=max(images.shape[2:]))
    text = f"<span>{escape(cell.text)}</span>" * bool(cell.text)
    return f"<td{' class=marked' * cell.marked}>{image}{text}</td>"


def _beside(part: Beside) -> str:
    found = []
    for name, images in part.rows.items():
        images = shrunk(images)
        asked = part.pictured[: len(images)] + ("",) * (len(images) - len(part.pictured))
        shown = "".join(
            image_tag(picture(one), f"picture {k + 1}{f', {what}' * bool(what)}, by {name}", side=max(images.shape[2:]))
            for k, (one, what) in enumerate(zip(images, asked, strict=True))
        )
        label = f"<p><b>{escape(name)}</b></p>"
        found.append(f'<div role="group" aria-label="{escape(name)}">{label}<div class="row">{shown}</div></div>')
    return "".join(found)


def _drawing(figure: Figure, colours: Mapping[str, str]) -> str:
    """A figure twice, of which one is seen: laid out for a page and for a phone."""
    wide, narrow = (themed(draw_svg(figure, colours, narrow=narrow)) for narrow in (False, True))
    alt = escape(_told(figure))
    return (
        f'<figure class="drawn" role="img" aria-label="{alt}"><div class="broad" aria-hidden="true">{wide}</div>'
        f'<div class="slim" aria-hidden="true">{narrow}</div></figure>'
    )


def _told(figure: Figure) -> str:
    """A figure in words, for who does not see it."""
    match figure:
        case Pareto():
            points = [(s.name, s.points[0]) for s in figure.series if len(s.points) == 1]
            told = "; ".join(f"{name}: {point[1]:.3g} at {point[0]:.3g}" for name, point in points)
            return f"{figure.title}: {figure.metric_label} against {figure.cost_label or 'share of the MACs'}. {told}"
        case Heatmap():
            return f"{figure.title}: {figure.label}, of {', '.join(figure.entries)} at {len(figure.timesteps)} steps"
        case Curve():
            ends = "; ".join(
                f"{name}: {line[0][1]:.3g} to {line[-1][1]:.3g}" for name, line in figure.lines.items() if line
            )
            return f"{figure.title}: {figure.ylabel} by {figure.xlabel}. {ends}"
        case _:
            return figure.title


HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>
"""
FOOT = "\n</main><footer>Written by Halfstep.</footer></body></html>\n"
