"""The pictures of docs/concepts.md, by the project's own figures, from the bundled bank and from measured tables.

python docs/figures.py     writes docs/bank.svg, concept-plan.png, concept-frontier.png, held.svg, noise.png
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from diffusers import DEISMultistepScheduler
from diffusers.utils import make_image_grid
from PIL import Image

from halfstep.core.bundled import model_of
from halfstep.core.plan import StepPlan
from halfstep.engine.sampling import plan_for
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.report.charts import strip
from halfstep.report.figures import Pareto, Series, Style, draw_all
from halfstep.report.palette import INK, ROLES, SOFT, entry_colours

HERE = Path(__file__).parent
MIXED = ["w0.50"] * 3 + ["w0.75"] * 2 + ["full"] * 2 + ["w0.25"] * 2
"""A plan to look at, not one that was searched."""


def svg(width: int, height: int, parts: list[str]) -> str:
    style = 'font-family="system-ui, sans-serif" font-size="15"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>\n"])


def text(x: float, y: float, said: str, colour: str = INK, **look: str) -> str:
    more = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in look.items())
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" {more}>{said}</text>'


def bank_picture(pipe: StepAwarePipeline) -> str:
    """The entries as squares within one another: as wide as their channels, for they are the same weights."""
    macs = {name: price.macs for name, price in pipe.bank.prices().items()}
    full = macs["full"]
    colours = entry_colours({name: one / full for name, one in macs.items()})
    parts = []
    for name in sorted(macs, key=lambda name: -macs[name]):
        width = 1.0 if name == "full" else float(name.removeprefix("w"))
        side = 260 * width
        parts.append(
            f'<rect x="20" y="20" width="{side:g}" height="{side:g}" fill="{colours[name]}" '
            'stroke="#fff" stroke-width="2"/>'
        )
    for k, name in enumerate(sorted(macs, key=lambda name: -macs[name])):
        y, mmacs = 66 + 52 * k, macs[name] / 1e6
        parts += [f'<rect x="320" y="{y - 14:g}" width="18" height="18" fill="{colours[name]}"/>']
        parts += [text(350, y, name, font_weight="600")]
        what = "the reference" if name == "full" else f"{width_of(name)} of its channels"
        parts += [text(420, y, f"{mmacs:.3g} MMACs, {macs[name] / full:.0%}; {what}", SOFT)]
    return svg(800, 300, parts)


def width_of(name: str) -> str:
    return {"w0.75": "three quarters", "w0.50": "half", "w0.25": "a quarter"}[name]


def deis(pipe: StepAwarePipeline) -> StepPlan:
    return plan_for(pipe.bank, DEISMultistepScheduler.from_config(pipe.scheduler.config), 9)


def plan_picture(pipe: StepAwarePipeline) -> bytes:
    """Fifty calls, nine calls, and nine of which seven are cheaper."""
    today, free = pipe.plan, deis(pipe)
    against = {"today: DDIM, 50 steps": today.called, "free: DEIS, 9 steps": free.called}
    return draw_all([strip(free.with_entries(MIXED), against=against)])[0]


def rows_of(page: str, size: str) -> Iterator[list[str]]:
    """The cells of the rows of a page's table after a heading that begins with `size`."""
    part = (HERE / page).read_text().partition(f"## {size}")[2].partition("\n## ")[0]
    for line in part.splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) > 7 and re.match(r"[\d,]+$", cells[3]):
            yield cells


def measured(cells: list[str]) -> tuple[float, float, float, float]:
    """(ms, distance, low, high)"""
    value, low, high = (float(one) for one in re.findall(r"[\d.]+", cells[6])[:3])
    return float(cells[3].replace(",", "")), value, low, high


def frontier_picture() -> bytes:
    """Distance against time, of the table of docs/reaches.md for 16x16."""
    rows = list(rows_of("reaches.md", "16×16"))
    kinds: Mapping[str, str] = {"DDIM": "today", "best free": "best free", "UniPC": "another stock sampler"}
    kinds = {**kinds, "joint plan": "plans of the search", "random": "random plans", "uniform": "one width everywhere"}
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for cells in rows:
        kind = next(told for begin, told in kinds.items() if cells[0].startswith(begin))
        points.setdefault(kind, []).append(measured(cells))
    style: Mapping[str, Style] = {"plans of the search": "frontier", "today": "mark", "best free": "mark"}
    series = tuple(
        Series(name=name, points=tuple(each), style=style.get(name, "group")) for name, each in points.items()
    )  # fmt: skip
    figure = Pareto(
        title="Fashion-MNIST 16x16, 8,192 images", metric_label="Fréchet distance, lower is better",
        series=series, cost_label="ms of a batch of 64, one thread",
    )  # fmt: skip
    return draw_all([figure])[0]


def held_picture() -> str:
    """Three changes that were measured, with their intervals, beside the tolerance."""
    rows = {cells[0] + cells[3]: cells[7] for cells in rows_of("reaches.md", "16×16")}
    chosen = {
        "PNDM, 10 steps": "best free: PNDM, 10 steps2,281",
        "a plan at 1/15": "joint plan687",
        "a plan at 1/38": "joint plan271",
    }

    def at(share: float) -> float:
        return 200 + 260 * (share + 0.5)

    low, high = at(-0.05), at(0.05)
    parts = [f'<rect x="{low:g}" y="34" width="{high - low:g}" height="170" fill="#f6d9d1"/>']
    parts += [text(at(0), 24, "within 5 %", ROLES["plan"], text_anchor="middle", font_weight="600")]
    for k, (name, key) in enumerate(chosen.items()):
        value, start, end = (float(one.replace("−", "-")) / 100 for one in re.findall(r"[−+]\d+", rows[key])[:3])
        verdict, y = rows[key].rpartition(", ")[2], 66 + 54 * k
        parts += [text(20, y + 5, name), text(20, y + 23, verdict, SOFT, font_weight="600")]
        parts += [f'<line x1="{at(start):g}" x2="{at(end):g}" y1="{y}" y2="{y}" stroke="{INK}" stroke-width="4"/>']
        parts += [f'<circle cx="{at(value):g}" cy="{y}" r="7" fill="{ROLES["plan"]}"/>']
    for share in (-0.5, 0, 0.5, 1, 1.5):
        label = "0" if share == 0 else f"{share:+.0%}".replace("-", "−")
        parts += [text(at(share), 228, label, SOFT, text_anchor="middle", font_size="13")]
    parts += [text(at(0.5), 250, "change of the Fréchet distance beside fifty DDIM steps", SOFT, text_anchor="middle")]
    return svg(860, 262, parts)


def noise_picture(pipe: StepAwarePipeline) -> Image.Image:
    """The same noise through fifty steps, through nine, and through nine of the half width."""
    plans = [pipe.plan, deis(pipe), deis(pipe).uniform("w0.50")]
    images = [image for plan in plans for image in StepAwarePipeline(pipe.bank, plan)(batch_size=12, seed=3).images]
    grid = make_image_grid(images, rows=3, cols=12)
    return Image.fromarray(np.asarray(grid)).resize((grid.width * 4, grid.height * 4), Image.Resampling.NEAREST)


def main() -> None:
    pipe = StepAwarePipeline.from_pretrained(model_of("fashion"))
    (HERE / "bank.svg").write_text(bank_picture(pipe))
    (HERE / "held.svg").write_text(held_picture())
    (HERE / "concept-plan.png").write_bytes(plan_picture(pipe))
    (HERE / "concept-frontier.png").write_bytes(frontier_picture())
    noise_picture(pipe).save(HERE / "noise.png")


if __name__ == "__main__":
    main()
