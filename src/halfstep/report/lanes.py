"""Trajectories as strips of a page: beside one another on one scale, and the plan's rows, each as wide as its price."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from halfstep.report.markup import scrolling, var
from halfstep.report.palette import amount
from halfstep.report.strips import Call, PlanChart, calls_of

SINGLE = 120
"""Calls of a strip up to which each has a bar of its own; of more, neighbours of one entry have one together."""
PRICED = "Prices are of single calls, measured before the search; times in tables of whole pictures, measured after it"


def lanes(chart: PlanChart, colours: Mapping[str, str]) -> str:
    """The strips of a chart with costs, and a table of the plan's rows."""
    own = calls_of(chart)
    others = {name: _end_to_end(entries, chart.costs) for name, entries in chart.against.items()}
    widest = max(calls[-1].end for calls in (own, *others.values())) or 1.0
    found = [_lane(name, calls, widest, chart, colours) for name, calls in others.items()]
    found.append(_lane(chart.name, own, widest, chart, colours, main=True))
    return f'<div class="lanes">{"".join(found)}</div>{_steps(chart, own, colours)}'


def _end_to_end(entries: Sequence[str], costs: Mapping[str, float]) -> list[Call]:
    ends = list(itertools.accumulate(costs[entry] for entry in entries))
    return [Call(e, end - costs[e], end, row) for row, (e, end) in enumerate(zip(entries, ends, strict=True))]


def _lane(
    name: str, calls: Sequence[Call], widest: float, chart: PlanChart, colours: Mapping[str, str], main: bool = False
) -> str:
    total = calls[-1].end
    bars = "".join(
        f'<i class="guide" style="flex-grow:{width:.4g};background-color:{var(colours[entry])}"></i>'
        if guide
        else f'<i style="flex-grow:{width:.4g};background:{var(colours[entry])}"></i>'
        for entry, guide, width in _bars(calls)
    )
    kinds = {entry: sum(call.entry == entry for call in calls) for entry in dict.fromkeys(c.entry for c in calls)}
    told = f"{len(calls)} calls: {', '.join(f'{count} of {entry}' for entry, count in kinds.items())}"
    close = ' class="bars close"' if len(calls) > 40 else ' class="bars"'
    return (
        f"<div{' class=own' * main}><p><b>{escape(name)}</b> <span>{amount(total)} {chart.unit} per image</span></p>"
        f'<div class="track"><div{close} role="img" aria-label="{escape(told)}" '
        f'style="width:{100 * total / widest:.4g}%">{bars}</div></div></div>'
    )


def _bars(calls: Sequence[Call]) -> list[tuple[str, bool, float]]:
    """(entry, whether it is a guide, width) of every bar."""
    if len(calls) <= SINGLE:
        return [(call.entry, call.is_guide, call.end - call.start) for call in calls]
    runs = itertools.groupby(calls, key=lambda call: (call.entry, call.is_guide))
    return [(entry, guide, sum(call.end - call.start for call in run)) for (entry, guide), run in runs]


class _Row(NamedTuple):
    """Rows of a plan that are alike, the first of `rows`."""

    first: int
    rows: int
    runs: str
    calls: tuple[Call, ...]


def _alike(chart: PlanChart, calls: Sequence[Call]) -> list[_Row]:
    """The plan's rows, of more than twenty those together that are alike and follow one another."""
    by_row = [tuple(run) for _, run in itertools.groupby(calls, key=lambda call: call.row)]
    found: list[_Row] = []
    for row, own in enumerate(by_row):
        guide = chart.guides[row] if chart.guides else None
        runs = own[0].entry + (f", guided by {guide.entry} ×{guide.weight:g}" if guide else "")
        runs += ", corrected" * bool(chart.corrected and chart.corrected[row])
        last = found[-1] if found else None
        if last and last.runs == runs and len(by_row) > 20:
            found[-1] = last._replace(rows=last.rows + 1)
        else:
            found.append(_Row(row, 1, runs, own))
    return found


def _steps(chart: PlanChart, calls: Sequence[Call], colours: Mapping[str, str]) -> str:
    """What runs at each row, its price in figures and as a bar: a table."""
    rows, body = _alike(chart, calls), []
    price = {row: sum(call.end - call.start for call in row.calls) for row in rows}
    most = max(price.values()) or 1.0
    for row in rows:
        last = row.first + row.rows - 1
        number = f"{row.first + 1}" if row.rows == 1 else f"{row.first + 1} to {last + 1}"
        at = f"{chart.timesteps[row.first]:.4g}" + (f" to {chart.timesteps[last]:.4g}" if row.rows > 1 else "")
        bars = "".join(
            f'<i{" class=guide" * call.is_guide} style="width:{100 * (call.end - call.start) / most:.4g}%;'
            f'background-color:{var(colours[call.entry])}"></i>'
            for call in row.calls
        )
        each = f"{amount(price[row])}" + " each" * (row.rows > 1)
        body.append(
            f'<tr><th scope="row">{number}</th><td class="n">{at}</td><td>{escape(row.runs)}</td>'
            f'<td class="n">{each}</td><td class="price" aria-hidden="true">{bars}</td></tr>'
        )
    heads = ("row", "timestep", "what runs", f"{chart.unit} per image", "")
    kinds = ("", "n", "", "n", "price")
    head = "".join(
        f'<th scope="col" class="{k}">{h}</th>' if h else f'<td class="{k}"></td>'
        for h, k in zip(heads, kinds, strict=True)
    )
    caption = "The plan row by row, from noise to picture: each as wide as its price"
    caption += f". {PRICED}" * (chart.unit == "ms")
    inner = f"<caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return scrolling(f'<table class="steps">{inner}</table>', "The plan row by row")
