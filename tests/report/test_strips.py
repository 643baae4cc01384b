"""Strips of plans and pictures of time; oracles: the plan's own prices, a renderer's boxes of the text, brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from halfstep.core.plan import Correction, Guide, Price, Row, Sampler, StepPlan
from halfstep.report.charts import strip
from halfstep.report.figures import Pareto, Series, _draw_pareto, draw_all, frontier
from halfstep.report.palette import amount, entry_colours
from halfstep.report.strips import MARGIN, PlanChart, calls_of, draw_strips, height_of

PRICES = {
    "full": Price(100, 2900),
    "w0.75": Price(56, 1900),
    "w0.50": Price(25, 1000),
    "w0.25": Price(6, 420),
    "full~2": Price(30, 900),
}
SAMPLER = Sampler("DPMSolverMultistepScheduler", {}, 10)
ROWS = ("w0.25", "w0.25", "full", "full~2", "w0.50", "w0.50", "w0.75", "w0.25")


def plan_of(*names: str, prices: dict[str, Price] = PRICES) -> StepPlan:
    rows = tuple(Row(999.0 - k * 998 / len(names), name) for k, name in enumerate(names))
    return StepPlan(rows=rows, sampler=SAMPLER, reference="full", prices=prices)


def drawn(chart: PlanChart) -> Figure:
    canvas = Figure(figsize=(7.6, height_of(chart)), dpi=100)
    FigureCanvasAgg(canvas)
    draw_strips(canvas.add_axes((0, 0, 1, 1)), chart, entry_colours(chart.shares))
    return canvas


def test_a_strip_s_calls_lie_end_to_end_and_cost_what_the_plan_does():
    plan = plan_of(*ROWS).with_guides([None] * 4 + [Guide("w0.25", 2.0)] * 2 + [None] * 2)
    calls = calls_of(strip(plan))
    assert tuple(call.entry for call in calls) == plan.called and [call.is_guide for call in calls].count(True) == 2
    assert calls[-1].end == pytest.approx(plan.price.us / 1e3)
    assert all(a.end == b.start for a, b in itertools.pairwise(calls))


def test_costs_are_milliseconds_where_all_that_is_drawn_has_them_and_macs_otherwise():
    plan = plan_of(*ROWS)
    untimed = plan_of(*ROWS, prices={name: Price(10**6 * price.macs) for name, price in PRICES.items()})
    assert (strip(plan).unit, strip(untimed).unit) == ("ms", "MMACs")
    assert sum(call.end - call.start for call in calls_of(strip(untimed))) * 1e6 == pytest.approx(untimed.macs)
    given = strip(untimed, ms=dict.fromkeys(PRICES, 2.0))
    assert given.unit == "ms" and calls_of(given)[-1].end == 2 * len(ROWS)
    partly = {name: 2.0 for name in PRICES if name != "w0.75"}
    assert strip(untimed, ms=partly).unit == "MMACs" and "DPM-Solver++ 2, 10 steps" in given.name


def test_bars_are_as_long_as_their_share_of_the_longest():
    """The reference's strip spans the page; the plan's, on the same scale, its share of it."""
    plan, reference = plan_of(*ROWS), plan_of(*["full"] * 50)
    canvas = drawn(strip(plan, against={"today: DDIM, 50 steps": reference.called}))
    boxes = [p for p in canvas.axes[0].patches if isinstance(p, Rectangle) and p.get_height() < 0.4]
    lanes = {}
    for box in boxes:
        if box.get_facecolor()[:3] != pytest.approx((0.945, 0.953, 0.965), abs=2e-3) and box.get_x() > MARGIN - 1e-9:
            bottom = round(box.get_y() + box.get_height(), 3)
            lanes[bottom] = max(lanes.get(bottom, 0.0), box.get_x() + box.get_width() - MARGIN)
    today, ours, *_ = (lanes[bottom] for bottom in sorted(lanes))
    assert ours / today == pytest.approx(plan.price.us / reference.price.us, rel=0.01)
    assert today == pytest.approx(7.0, abs=0.02)


CHARTS = {
    "one row": strip(plan_of("full")),
    "beside two": strip(plan_of(*ROWS), against={"today: DDIM, 50 steps": ("full",) * 50, "best": ("full",) * 15}),
    "dearer": strip(plan_of(*["full"] * 40), against={"a reference of a very long name " * 3: ("w0.25",) * 10}),
    "guided": strip(plan_of(*ROWS).with_guides([Guide("w0.25", 1.5)] * 8)),
    "corrected": strip(plan_of(*ROWS).with_corrections([Correction(0.98, 0.1)] * 8)),
    "a thousand": strip(plan_of(*itertools.islice(itertools.cycle(ROWS), 1000)), against={"all": ("full",) * 1000}),
}


@pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
def test_no_text_of_a_strip_lies_on_another_or_leaves_the_page(chart):
    canvas = drawn(chart)
    boxes = [text.get_window_extent(canvas.canvas.get_renderer()) for text in canvas.axes[0].texts]
    page = canvas.bbox
    for box in boxes:
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    for a, b in itertools.combinations(boxes, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        assert across <= 1 or min(a.y1, b.y1) - max(a.y0, b.y0) <= 3  # boxes are taller than their letters


def test_a_reused_pass_has_its_entry_s_colour_paler_and_is_lower():
    colours = entry_colours({name: price.macs / 100 for name, price in PRICES.items()})
    assert len(set(colours.values())) == len(PRICES) and colours["full"] == "#440154"
    assert entry_colours({"w0.5~1": 1.0, "full": 2.0}).keys() == {
        "w0.5~1",
        "full",
    }  # without its source: one of its own
    large = [p for p in drawn(strip(plan_of(*ROWS))).axes[0].patches if p.get_height() > 0.4]
    assert len({round(p.get_height(), 3) for p in large}) == 2 and min(p.get_height() for p in large) < 0.6


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
@settings(deadline=None)
def test_the_frontier_is_what_nothing_beats(points):
    best = frontier(points)
    brute = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert set(best) == brute and best == sorted(best)


def test_a_picture_of_time_draws_with_marks_frontiers_and_one_point():
    free = tuple((float(x), 4.0 / x, 3.0 / x, 5.0 / x) for x in (1, 2, 5, 50))
    series = (
        Series(name="free", points=free, style="frontier"),
        Series(name="today", points=free[-1:], style="mark"),
        Series(name="plan", points=((0.5, 1.0, None, None),), style="star"),
        Series(name="none", points=(), style="frontier"),
    )
    made = draw_all(
        [
            Pareto(
                title="t", metric_label="FD", series=series[:k], cost_label="milliseconds per image", band=(0.1, 0.2)
            )
            for k in (4, 1, 0)
        ]
    )
    assert all(png.startswith(b"\x89PNG") for png in made) and len(set(made)) == 3


def test_numbers_are_told_to_three_digits():
    assert [amount(value) for value in (0.4242, 2.9, 43.51, 145.4, 9302.6, 0)] == [
        "0.424",
        "2.9",
        "43.5",
        "145",
        "9,303",
        "0",
    ]


def test_groups_of_points_have_colours_and_markers_of_their_own():
    from matplotlib.figure import Figure

    names = ("stock", "joint", "controls", "DeepCache", "reuse", "guidance")
    points = ((0.2, 3.0, 2.0, 4.0), (0.5, 2.0, None, None))
    series = tuple(Series(name=name, points=points, style="group") for name in names)
    axes = Figure().add_subplot()
    _draw_pareto(axes, Pareto(title="", metric_label="", series=series, cost_label="time"), {})
    drawn = [line for line in axes.lines if line.get_marker() not in ("_", "None", "|")]
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == len(names)
    assert len({line.get_color() for line in drawn}) == len({line.get_marker() for line in drawn}) == len(names)
