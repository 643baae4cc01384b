"""Tables for the terminal and the page, and the one self-contained HTML page with its figures and grids of pictures."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from halfstep.app.figures import Figure, draw_all
from halfstep.core import disk
from halfstep.data.pictures import CELL, GAP, picture_grid

if TYPE_CHECKING:  # rich loads only when something is printed
    import rich.table


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of text; `best`: the row to emphasise."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    best: int | None = None


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
class Report:
    """A whole page; `files`: name in the report's folder -> what it is."""

    title: str
    summary: str
    facts: Mapping[str, str]
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]
    grids: tuple[Grid, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    plates: tuple[Plate, ...] = ()


def write_report(report: Report, folder: Path) -> Path:
    """Write `folder`/report.html and its pictures under `folder`/figures; returns the page's path.

    All is drawn before anything is written, and the page comes last: a failure leaves the old page as it was.
    Raises RunError when the folder cannot be written, DataError for a grid of no images.
    """
    folder, pictures = Path(folder), dict[str, bytes]()
    drawn = draw_all(report.figures)
    for item, png in zip(report.figures + report.grids, drawn + [_grid_png(g) for g in report.grids], strict=True):
        slug = re.sub(r"[^a-z0-9]+", "-", item.title.lower()).strip("-") or "picture"
        same = sum(re.fullmatch(rf"{slug}(-\d+)?\.png", name) is not None for name in pictures)
        pictures[f"{slug}-{same + 1}.png" if same else f"{slug}.png"] = png
    page = _page(report, list(pictures.values()))
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
        *map(_plate, report.plates),
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


MOST_SIDE = 160
"""Pixels of a picture on a plate; larger ones are shrunk, so that a page stays light."""


def _plate(plate: Plate) -> str:
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in plate.columns)
    rows = []
    for k, row in enumerate(plate.rows):
        cells = (_cell(cell, f"{name}, picture {k}") for name, cell in zip(plate.columns, row, strict=True))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = f"<p class=note>{escape(plate.note)}</p>" * bool(plate.note)
    inner = f"<table class=plate><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<section><h2>{escape(plate.title)}</h2><div class=wide>{inner}</div>{note}</section>"


def _cell(cell: Cell, alt: str) -> str:
    side = max(cell.images.shape[2:])
    picture = picture_grid(cell.images, columns=len(cell.images))
    if side > MOST_SIDE:
        picture.thumbnail((MOST_SIDE * len(cell.images), MOST_SIDE))
    picture.save(file := io.BytesIO(), "PNG")
    data, (width, height) = base64.b64encode(file.getvalue()).decode(), picture.size
    hard = " class=hard" * (side <= MOST_SIDE)
    image = f'<img{hard} src="data:image/png;base64,{data}" width={width} height={height} alt="{escape(alt)}">'
    text = f"<span>{escape(cell.text)}</span>" * bool(cell.text)
    return f"<td{' class=marked' * cell.marked}>{image}{text}</td>"


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
.plate{width:auto}.plate th,.plate td,.plate td:first-child{padding:4px 10px 4px 0;border:0;font-weight:400}
.plate th{font-weight:600;white-space:normal;max-width:150px;vertical-align:bottom}
.plate img{max-width:none;padding:0;background:none}
.plate span{display:block;font-size:.8rem;color:var(--soft);font-variant-numeric:tabular-nums}
.plate .marked span{color:var(--go);font-weight:600}.plate .marked img{outline:3px solid var(--go)}
@media(max-width:600px){dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:10px}}
"""
