"""Trajectories as strips: a bar for every network call, as wide as its cost, beside the strips of what they replace.

All is laid out by hand, in inches from the upper left corner, so that text and bars keep clear of one another at any
number of calls. The largest strip spans the whole width; below, the plan's own is drawn again, as wide as that.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from halfstep.core.plan import Guide
from halfstep.report.palette import INK, LINES, PALE, ROLES, SOFT, amount, is_dark, source_of

if TYPE_CHECKING:  # matplotlib loads only when something is drawn
    from matplotlib.axes import Axes

WIDTH, MARGIN = 7.6, 0.3  # inches
ROOM = WIDTH - 2 * MARGIN
LANE, ZOOM = 0.72, 0.85  # heights: a line of text with its strip; the strip that is drawn large
LETTER = 0.0072  # of an average letter, inches for each point of its size
SHALLOW = 0.6  # the height of a reused pass beside a whole call's


@dataclass(frozen=True, kw_only=True)
class PlanChart:
    """What runs at each row of a plan, noisiest first; `shares`: an entry's MACs over the reference's; `guides`: of
    each row, drawn on top of its entry, () where no row has one.

    With `costs`, what one call of every entry costs in `unit`, it is drawn as strips: below one another `against`, the
    entry of every call of other trajectories by name, and the plan, by its `name`; then the plan once more, large.
    `corrected`: whether each row's prediction is, () where none.
    """

    title: str
    timesteps: tuple[float, ...]
    entries: tuple[str, ...]
    shares: Mapping[str, float]
    guides: tuple[Guide | None, ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)
    unit: str = "ms"
    name: str = "the plan"
    corrected: tuple[bool, ...] = ()
    against: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A bar: which entry, from where to where in the chart's unit, of which row, and whether it is the row's guide."""

    entry: str
    start: float
    end: float
    row: int
    is_guide: bool = False


def calls_of(chart: PlanChart) -> list[Call]:
    """The plan's network calls in order, end to end: of a guided row its own, then its guide's."""
    found: list[Call] = []
    at = 0.0
    for row, entry in enumerate(chart.entries):
        guide = chart.guides[row] if chart.guides else None
        for name in (entry, *([guide.entry] if guide else [])):
            is_guide = bool(found) and found[-1].row == row
            found.append(Call(name, at, at := at + chart.costs[name], row, is_guide))
    return found


def height_of(chart: PlanChart) -> float:
    """Of the whole picture, inches."""
    lanes = (len(chart.against) + 1) * LANE + 0.45 if chart.against else 0.5
    return lanes + ZOOM + 0.75 + 0.27 * -(-len(_legend(chart, calls_of(chart))) // 2) + 0.15


def draw_strips(axes: Axes, chart: PlanChart, colours: Mapping[str, str]) -> None:
    """Fill axes that span a canvas of `WIDTH` by `height_of(chart)` inches."""
    axes.set(xlim=(0, WIDTH), ylim=(height_of(chart), 0))
    axes.set_axis_off()
    calls = calls_of(chart)
    total = calls[-1].end
    y = 0.12
    if chart.against:
        others = {name: sum(chart.costs[entry] for entry in each) for name, each in chart.against.items()}
        widest = max(total, *others.values())
        for name, each in chart.against.items():
            ends = list(itertools.accumulate(chart.costs[entry] for entry in each))
            bars = [Call(e, end - chart.costs[e], end, 0) for e, end in zip(each, ends, strict=True)]
            _lane(axes, y, name, f"{amount(others[name])} {chart.unit} per image", bars, ROOM / widest, colours)
            y += LANE
        _lane(axes, y, chart.name, _saving(chart, total, others), calls, ROOM / widest, colours, main=True)
        _lens(axes, y + LANE - 0.08, total / widest)
        y += LANE + 0.45
    else:
        _text(axes, MARGIN, y + 0.12, chart.name, 12, weight="bold", color=ROLES["plan"])
        _text(axes, WIDTH - MARGIN, y + 0.12, f"{amount(total)} {chart.unit} per image", 11, ha="right")
        y += 0.38
    _large(axes, y, chart, calls, colours)
    _put_legend(axes, y + ZOOM + 0.75, _legend(chart, calls), colours)


def _saving(chart: PlanChart, total: float, others: Mapping[str, float]) -> str:
    """What the plan costs, and what share of each of the others that is, in their order."""
    shares = [f"1/{other / total:.2g}" if other > 1.5 * total else f"{total / other:.0%}" for other in others.values()]
    return f"{amount(total)} {chart.unit}: {' and '.join(shares)} of th{'ese' if len(others) > 1 else 'is'}"


def _lane(
    axes: Axes,
    y: float,
    name: str,
    note: str,
    calls: Sequence[Call],
    scale: float,
    colours: Mapping[str, str],
    main: bool = False,
) -> None:
    """One strip on the common scale (inches per unit), under a line that says what it is."""
    colour = ROLES["plan"] if main else INK
    name = textwrap.shorten(name, max(8, int(ROOM / (1.15 * LETTER * 12)) - len(note)), placeholder=" …")
    _text(axes, MARGIN, y + 0.12, name, 12, weight="bold", color=colour)
    _text(axes, WIDTH - MARGIN, y + 0.12, note, 11, ha="right", color=colour if main else SOFT, weight="bold" * main)
    axes.add_patch(_box(MARGIN, y + 0.27, ROOM, 0.34, PALE))
    _bars(axes, calls, y + 0.27, 0.34, scale, colours)


def _box(x: float, y: float, width: float, height: float, colour: str, **more: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=colour, linewidth=0, **more)


def _bars(axes: Axes, calls: Sequence[Call], y: float, height: float, scale: float, colours: Mapping[str, str]) -> None:
    """The calls side by side, upright on one line; what a reused pass does not compute is missing at its top."""
    seam = 0.012 if calls[-1].end * scale > 0.08 * len(calls) else 0.0  # closer, and they would flicker
    for call in calls:
        width = (call.end - call.start) * scale
        gap = min(seam, 0.12 * width)
        tall = height * (SHALLOW if source_of(call.entry) else 1)
        look: Any = {"hatch": "////", "edgecolor": "white"} if call.is_guide else {}
        box = _box(MARGIN + call.start * scale, y + height - tall, width - gap, tall, colours[call.entry], **look)
        axes.add_patch(box)


def _lens(axes: Axes, y: float, share: float) -> None:
    """From the plan's strip on the common scale down to the same strip drawn large."""
    from matplotlib.patches import Polygon

    corners = [(MARGIN, y), (MARGIN + ROOM * share, y), (WIDTH - MARGIN, y + 0.45), (MARGIN, y + 0.45)]
    axes.add_patch(Polygon(corners, closed=True, facecolor=ROLES["plan"], alpha=0.1, linewidth=0))


def _large(axes: Axes, y: float, chart: PlanChart, calls: Sequence[Call], colours: Mapping[str, str]) -> None:
    """The plan's strip over the whole width: entries by name where there is room, timesteps and corrections below."""
    scale = ROOM / calls[-1].end
    _bars(axes, calls, y, ZOOM, scale, colours)
    for (entry, is_guide), run in itertools.groupby(calls, key=lambda call: (call.entry, call.is_guide)):
        stretch = list(run)
        start, end = stretch[0].start * scale, stretch[-1].end * scale
        size = 11 if not source_of(entry) else 10
        if not is_guide and end - start > LETTER * size * len(entry) + 0.1:
            colour = "white" if is_dark(colours[entry]) else INK
            at = y + ZOOM * (1 - (SHALLOW if source_of(entry) else 1) / 2)
            look = {"color": colour, "weight": "bold", "path_effects": _outline(colours[entry])}
            _text(axes, MARGIN + (start + end) / 2, at, entry, size, ha="center", **look)
    fresh = [call for call in calls if not call.is_guide]
    last = -1.0
    for call, timestep in zip(fresh, chart.timesteps, strict=True):
        x = MARGIN + (call.start + call.end) / 2 * scale
        if chart.corrected and chart.corrected[call.row]:
            axes.plot([x], [y + ZOOM + 0.08], marker="^", color=ROLES["plan"], markersize=5, clip_on=False)
        said = f"{timestep:.4g}"
        if x - last > LETTER * 10 * len(said) + 0.12:
            half = LETTER * 5 * len(said)
            last = min(max(x, MARGIN + half), WIDTH - MARGIN - half)
            _text(axes, last, y + ZOOM + 0.24, said, 10, ha="center")
    _text(axes, MARGIN, y + ZOOM + 0.48, "timestep of each call: from noise to picture", 10, color=SOFT)
    _text(axes, WIDTH - MARGIN, y + ZOOM + 0.48, f"width: {chart.unit} of the call", 10, ha="right", color=SOFT)
    axes.plot([MARGIN, WIDTH - MARGIN], [y + ZOOM + 0.005] * 2, color=LINES, linewidth=1)


def _outline(colour: str) -> list[Any]:
    """Letters edged in the colour behind them, which keeps the seams between bars off them."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3, foreground=colour)]


def _legend(chart: PlanChart, calls: Sequence[Call]) -> list[tuple[str, str]]:
    """(entry, what is said of it), the dearest first; guides and corrections after the entries."""
    own = [call.entry for call in calls if not call.is_guide]
    said = []
    for name in sorted(dict.fromkeys(own), key=lambda name: -chart.costs[name]):
        times = own.count(name)
        said.append((name, f"{name}: {times} call{'s' * (times > 1)} of {amount(chart.costs[name])} {chart.unit}"))
    for guide in dict.fromkeys(filter(None, chart.guides)):
        times = chart.guides.count(guide)
        said.append(
            (f"/{guide.entry}", f"guide {guide.entry}, weight {guide.weight:g}: {times} call{'s' * (times > 1)}")
        )
    if any(source_of(name) for name in own):
        said.append(("", "lower: a pass that reuses the last whole one"))
    if any(chart.corrected):
        said.append(("^", f"prediction corrected: {sum(chart.corrected)} of {len(chart.entries)}"))
    return said


def _put_legend(axes: Axes, y: float, said: Sequence[tuple[str, str]], colours: Mapping[str, str]) -> None:
    """Two columns, row by row."""
    for k, (mark, text) in enumerate(said):
        x, at = MARGIN + (k % 2) * ROOM / 2, y + 0.27 * (k // 2)
        if mark == "^":
            axes.plot([x + 0.09], [at], marker="^", color=ROLES["plan"], markersize=6)
        elif mark:
            look: Any = {"hatch": "////", "edgecolor": "white"} if mark[0] == "/" else {}
            tall = 0.18 * (SHALLOW if source_of(mark) else 1)
            axes.add_patch(_box(x, at + 0.09 - tall, 0.18, tall, colours[mark.removeprefix("/")], **look))
        _text(axes, x + (0.27 if mark else 0), at, text, 10)


def _text(axes: Axes, x: float, y: float, text: str, size: float, *, ha: str = "left", **look: Any) -> None:
    axes.text(x, y, text, fontsize=size, ha=ha, va="center", **({"color": INK} | {k: v for k, v in look.items() if v}))
