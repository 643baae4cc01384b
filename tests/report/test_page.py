"""The report page; oracles: the html parser, decoded PNGs, the pixels that went in."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from halfstep.core.errors import PlanError, RunError
from halfstep.core.plan import Correction, Guide, Price, Row, Sampler, StepPlan
from halfstep.core.results import About, Comparison, Cost, Difference, Floor, PlanRow, Quality, Rings
from halfstep.data.pictures import picture_grid
from halfstep.report.charts import plan_chart, spectra_curve, time_pareto, told_strip
from halfstep.report.figures import Curve, Heatmap, Pareto, PlanChart, Series, draw_all, draw_plan
from halfstep.report.page import Grid, Report, Table, rich_table, write_report
from halfstep.report.tables import costs_table, plans_table
from halfstep.report.words import summary


def full_report(rows: int = 20) -> Report:
    steps = tuple(float(1000 - i) for i in range(rows))
    images = np.random.default_rng(0).integers(0, 256, (9, 1, 8, 8), dtype=np.uint8)
    return Report(
        title='A <b>bold</b> & "quoted" report',
        summary="Saves 50 % of the MACs & holds.",
        facts={"machine": "<cpu>"},
        parts=(
            Table(title="Plans", columns=("", "FD"), rows=(("ref <1>", "1.0"), ("plan", "1.1")), best=1),
            Pareto(
                title="Quality",
                metric_label="FD",
                series=(
                    Series(name="reference", points=((1.0, 1.0, 0.8, 1.2),), style="star"),
                    Series(name="plans", points=((0.5, 2.0, None, None), (0.3, 30.0, None, None)), style="points"),
                ),
                band=(0.8, 1.2),
            ),
            PlanChart(
                title="Steps",
                timesteps=steps,
                entries=("w0.50",) * (rows - 1) + ("full",),
                shares={"full": 1.0, "w0.50": 0.25},
            ),
            Heatmap(
                title="Errors",
                timesteps=steps,
                entries=("full", "w0.50"),
                values=np.ones((rows, 2)) * [0.0, 0.1],
                label="mse",
            ),
            Curve(title="Loss", xlabel="step", ylabel="loss", lines={"supernet": ((1.0, 2.0), (2.0, 1.0))}),
            *(Grid(title="reference", images=images), Grid(title="plan", images=images)),
        ),
        files={"plan.json": "the plan"},
    )


@pytest.mark.parametrize("rows", [1, 20, 1000])
def test_the_page_is_whole_escaped_and_self_contained(tmp_path, rows):
    page = write_report(full_report(rows), tmp_path).read_text()
    HTMLParser().feed(page)
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert "<b>bold" not in page and "ref &lt;1&gt;" in page and "Saves 50 % of the MACs &amp; holds." in page
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) == 2  # the grids
    for picture in pictures:
        Image.open(io.BytesIO(base64.b64decode(picture))).verify()
    assert page.count("<svg") == page.count("</svg>") == 2 * 4
    assert len(list((tmp_path / "figures").glob("*.png"))) >= 4


def test_a_grid_keeps_the_pixels():
    images = np.random.default_rng(1).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    grid = np.asarray(picture_grid(images, columns=3, scale=4))
    for k, image in enumerate(images):
        y, x = k // 3 * (8 * 4 + 2), k % 3 * (8 * 4 + 2)
        assert np.array_equal(grid[y + 2 : y + 32 : 4, x + 2 : x + 32 : 4], image.transpose(1, 2, 0))


def test_an_empty_report_is_a_page(tmp_path):
    report = Report(title="t", summary="s", facts={}, parts=())
    assert "<title>t</title>" in write_report(report, tmp_path).read_text()


def test_the_terminal_table_has_every_cell():
    from rich.console import Console

    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(rich_table(full_report().parts[0]))
    text = console.export_text()
    assert all(cell in text for cell in ("ref <1>", "1.0", "plan", "1.1", "Plans"))


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError):
        write_report(full_report(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# --- the table of costs -----------------------------------------------------------------------------------------------


def test_costs_are_shown_with_shares_and_settings():
    setting = {"batch": 4, "device": "cpu: Test", "dtype": "float32", "threads": 2}
    full = Cost(macs=2_000_000_000, params=4_000_000, latency_ms=10.0, latency_spread_ms=0.5, peak_mib=3.0, **setting)
    half = Cost(macs=500_000_000, params=1_000_000, latency_ms=4.0, stored_mib=0.0, **setting)
    table = costs_table({"full": full, "half": half}, "full")
    assert table.rows == (
        ("full", "4.00 M", "–", "2,000.00", "100.0%", "10.0 ± 0.5", "100.0%", "3.0"),
        ("half", "1.00 M", "0.00", "500.00", "25.0%", "4.0", "40.0%", "–"),
    )
    for part in ("device cpu: Test", "dtype float32", "threads 2", "batch 4", "backend eager"):
        assert part in table.note


def test_a_setting_that_differs_gets_a_column():
    table = costs_table({"a": Cost(macs=1, params=1), "b": Cost(macs=1, params=1, backend="compile")}, "a")
    assert table.columns[-1] == "backend" and [row[-1] for row in table.rows] == ["eager", "compile"]
    assert "backend" not in table.note


def test_costs_refuse_an_unknown_reference():
    with pytest.raises(PlanError, match="full"):
        costs_table({"full": Cost(macs=1, params=1)}, "fall")


def test_a_summary_names_the_entry_of_a_uniform_plan_and_counts_the_calls_of_the_reference():
    rows = tuple(Row(t, "r=0.1") for t in (30.0, 20.0, 10.0))
    prices = {"r=0": Price(8), "r=0.1": Price(8)}
    plan = StepPlan(rows=rows, sampler=Sampler("DDPMScheduler", {}, 3), reference="r=0", prices=prices)
    change = replace(CHANGE, share=-0.2, relative_low=-0.3, relative_high=-0.1)
    row = replace(ROW, share=1.0, held=True, verdict=None, difference=change)
    about = replace(ABOUT, floor=None, scale=None)

    def said(row: PlanRow, plan: StepPlan = plan) -> str:
        return summary(Comparison(about=about, plans={"reference": ROW, "plan": row}), plan)

    assert "'r=0.1' in every call, costs what 50 DDPM calls of the reference cost" in said(row)
    assert "held within" in said(row)
    assert "saves 60% of the MACs" in said(replace(row, share=0.4))
    for low, told in ((-0.1, "within the tolerance of 5% is not decided"), (0.06, "did not hold within")):
        unlike = replace(row, held=False, difference=replace(change, relative_low=low, relative_high=0.2))
        assert told in said(unlike)
    assert said(replace(row, share=0.4), plan.with_entries(["r=0", "r=0.1", "r=0"])).startswith("The plan saves 60%")
    corrected = plan.with_corrections([Correction(0.9)] * 3)
    assert said(row, corrected).startswith("The corrections cost nothing; with 50 DDPM calls")
    guided = plan.with_guides([Guide("r=0", 2.0), None, Guide("r=0", 1.5)])
    told = "The plan, 'r=0.1' in every row and guided by 'r=0' in 2 of 3, costs what 50 DDPM calls"
    assert said(row, guided).startswith(told)
    mixed = plan.with_entries(["r=0", "r=0.1", "r=0"]).with_guides([None, Guide("r=0.1", 2.0), None])
    assert said(replace(row, share=0.4), mixed).startswith("The plan, guided by 'r=0.1' in 1 of 3 rows, saves 60%")


def test_a_chart_of_a_guided_plan_stacks_each_guide_s_call_on_its_row_s():
    """Oracle: the plan's own prices."""
    from matplotlib.figure import Figure

    names, prices = ("full", "half", "full", "half"), {"full": Price(8), "half": Price(3), "weak": Price(1)}
    rows = tuple(Row(float(9 - k), name) for k, name in enumerate(names))
    plan = StepPlan(rows=rows, sampler=Sampler("DDIMScheduler", {}, 4), reference="full", prices=prices)
    plan = plan.with_guides([Guide("weak", 2.0), None, Guide("weak", 1.5), Guide("full", 1.5)])
    axes = Figure().add_subplot()
    draw_plan(axes, plan_chart(plan), {"full": "#000000", "half": "#111111", "weak": "#222222"})
    heights = np.zeros(4)
    for bars in axes.containers:
        for bar in bars:
            heights[round(bar.get_x() + bar.get_width() / 2)] += bar.get_height()
    np.testing.assert_allclose(heights * 8, [9, 3, 9, 11])
    assert heights.sum() * 8 == pytest.approx(plan.macs)
    labels = axes.get_legend_handles_labels()[1]
    assert "full at 100 %: 2 of 7 calls" in labels and "guide weak at 12 %, weight 2: 1 of 7 calls" in labels
    assert len(labels) == 5 and len(draw_all([plan_chart(plan)])) == 1


def quality(metric: str) -> Quality:
    kind = {"n": 64, "n_reference": 1500, "features": "net", "reference": "abc", "seed": 3}
    return Quality(metric=metric, value=0.1, low=0.0, high=0.2, **kind)


CHANGE = Difference(
    value=0.05,
    low=-0.1,
    high=0.2,
    share=None,
    relative_low=None,
    relative_high=None,
    fd_a=0.1,
    fd_b=0.15,
    n=64,
    features="net",
    reference="abc",
    seed=3,
)
ROW = PlanRow(
    macs=8,
    share=0.4,
    calls=50,
    wall_ms=1.0,
    wall_share=0.5,
    wall_share_low=0.5,
    wall_share_high=0.5,
    quality={name: quality(name) for name in ("fd", "kid", "precision", "recall")},
    difference=CHANGE,
    held=False,
    verdict="not decided",
)
ABOUT = About(
    reference="reference",
    batch=8,
    repeats=5,
    seed=3,
    n=64,
    tolerance=0.05,
    floor=Floor(raw=0.14, high=0.08, fresh=0.3),
    scale=1.5,
    data="abc",
    machine={},
    device="cpu",
    dtype="float32",
    layout="contiguous",
)


def record_of(about: About = ABOUT, **changes) -> Comparison:
    """What `measure_plans` measured, its plan with these fields."""
    return Comparison(about=about, plans={"reference": ROW, "plan": replace(ROW, decided_by=12_345, **changes)})


def plan_of_one() -> StepPlan:
    sampler = Sampler("DDIMScheduler", {}, 1)
    return StepPlan(rows=(Row(1.0, "full"),), sampler=sampler, reference="full", prices={"full": Price(8)})


def test_a_change_within_the_floor_is_told_without_a_percentage_and_undecided_with_the_images_it_takes():
    record = record_of()
    table, said = plans_table(record), summary(record, plan_of_one())
    assert table.rows[1][4] == "+0.05 [-0.10, +0.20]" and table.rows[1][5] == "not decided"
    assert "13,000 images would decide it" in said and "hundredth of the data's spread" in said
    assert "0.14" in table.note and "0.08" in table.note and "0.3" in table.note  # the floor, before and after


def test_class_agreement_is_a_column_where_every_plan_has_it():
    more = ROW.quality | {"agreement": replace(quality("fd"), metric="agreement", value=0.93, low=0.9, high=0.95)}
    record = Comparison(about=ABOUT, plans={name: replace(ROW, quality=more) for name in ("reference", "plan")})
    table = plans_table(record)
    at = table.columns.index("class agreement")
    assert "Class agreement" in table.note
    assert all(row[at] == "93.0% [90.0%, 95.0%]" and len(row) == len(table.columns) for row in table.rows)
    assert "class agreement" not in plans_table(record, brief=True).columns + plans_table(record_of()).columns


def test_a_reference_alone_is_told_without_what_it_could_be_compared_by():
    record = Comparison(about=ABOUT, plans={"reference": ROW})
    for brief in (True, False):
        table = plans_table(record, brief=brief)
        assert table.title == "The reference" and table.columns == (
            "",
            "ms",
            "FD",
            "KID",
            "precision",
            "recall",
            "MMACs",
        )
        assert [len(row) for row in table.rows] == [7] and "—" not in table.rows[0] and "paired" not in table.note


def test_the_time_of_one_image_stands_beside_that_of_a_batch():
    rows = {"reference": replace(ROW, alone_ms=21.5), "plan": replace(ROW, alone_ms=4.25)}
    table = plans_table(Comparison(about=ABOUT, plans=rows))
    at = table.columns.index("ms of one image")
    assert table.columns[:3] == ("", "ms", "time") and [row[at] for row in table.rows] == ["21.5", "4.2"]
    assert {len(row) for row in table.rows} == {len(table.columns)}


def test_nothing_is_told_as_held_beside_a_broken_reference_and_the_warning_is_everywhere():
    warnings = ("100% of the reference's pixels are black or white, of the real images' 1%",)
    record = record_of(replace(ABOUT, warnings=warnings), verdict="broken reference")
    said, table = summary(record, plan_of_one()), plans_table(record, brief=True)
    assert said.startswith("Warning: 100% of the reference's pixels") and "the reference is broken" in said
    assert "held" not in said and table.rows[1][-1] == "broken reference" and "100% of the reference's" in table.note


def test_a_record_of_before_the_correction_is_still_told_and_says_so():
    change = replace(CHANGE, share=0.02, relative_low=-0.1, relative_high=0.04)
    record = record_of(replace(ABOUT, floor=None, scale=None), held=True, verdict=None, difference=change)
    assert "quality held within the tolerance of 5%" in summary(record, plan_of_one())
    table = plans_table(record)
    assert table.rows[1][5] == "held" and "before distances were corrected" in table.note


def test_time_is_drawn_from_what_was_measured_per_image_and_what_is_in_a_series_not_alone():
    record = Comparison(about=ABOUT, plans=dict.fromkeys(("reference", "plan", "free a", "free b", "small"), ROW))
    drawn = time_pareto(record, {"free": ["reference", "free a", "free b"]}, {"reference": "today"})
    assert [(one.name, one.style, len(one.points)) for one in drawn.series] == [
        ("free", "frontier", 3),
        ("plan", "star", 1),
        ("small", "points", 1),
        ("today", "mark", 1),
    ]
    assert {point for one in drawn.series for point in one.points} == {(1.0 / 8, 0.1, 0.0, 0.2)}
    assert drawn.cost_label == "milliseconds per image (batch 8)" and len(draw_all([drawn])) == 1


def test_a_finished_run_s_strip_stands_beside_its_reference_s_in_milliseconds_where_they_were_measured():
    plan, costs = plan_of_one(), {"full": Cost(macs=8, params=1, latency_ms=6.0, batch=4)}
    beside = lambda macs, **more: Comparison(  # noqa: E731
        about=replace(ABOUT, **more), plans={"reference": replace(ROW, macs=macs), "free": replace(ROW, macs=8 * 50)}
    )
    found = told_strip(plan, beside(8 * 50), costs)
    assert found.unit == "ms" and found.costs == {"full": 1.5}
    assert found.against == {"the reference: 50 calls of 'full'": ("full",) * 50}
    searched = plan.replacing(replace(plan, rows=plan.rows * 50))
    assert list(told_strip(searched, beside(8 * 50), costs).against) == ["the reference: 50 DDIM calls of 'full'"]
    assert list(told_strip(plan, beside(8 * 50, free="free"), costs).against)[1] == "the best free: 50 calls of 'full'"
    assert told_strip(plan, beside(9), costs).against == {}  # no uniform one, of which rows are known
    assert told_strip(plan, beside(8 * 50), {"full": Cost(macs=8, params=1)}).unit == "MMACs"


FREE = ("of the best free's time", "beside the best free")


def test_the_sentence_and_the_table_of_a_plan_tell_both_references():
    change = replace(CHANGE, share=-0.1, relative_low=-0.2, relative_high=-0.01)
    plan = replace(
        ROW, difference=change, verdict="held", free_difference=change, free_verdict="held", free_wall=0.25,
        wall_share=0.0625, wall_ms=10.0, predicted_ms=10.4,
    )  # fmt: skip
    rows = {"reference": replace(ROW, wall_ms=160.0), "best free": replace(ROW, wall_ms=40.0, calls=12), "plan": plan}
    record = Comparison(about=replace(ABOUT, free="best free"), plans=rows)
    told = summary(record, plan_of_one())
    assert "16.0 times as fast as what you run today" in told and "4.0 times as fast as the best that is free" in told
    assert "its prices said 10" in told and "(12 calls, 40 ms)" in told
    table = plans_table(record)
    (_, free, mine), at = table.rows, [table.columns.index(f"{one}") for one in FREE]
    assert [mine[k] for k in at] == ["25%", "-10% [-20%, -1.0%], held"] and [free[k] for k in at] == ["100%", "—"]
    alone = Comparison(about=replace(ABOUT, free="reference"), plans={"reference": ROW, "plan": plan})
    assert "No stock sampler of the same net is as good in less time" in summary(alone, plan_of_one())


def test_data_that_models_see_in_two_sizes_have_a_line_each():
    def rings(n: int, level: float) -> Rings:
        line = tuple([level] * n)
        return Rings(frequency=tuple(k / n for k in range(n)), data=line, wiener=line, model=line, error=line)

    models = {"small": rings(4, 1.0), "its twin": rings(4, 1.0), "large": rings(8, 2.0)}
    curve = spectra_curve("20", models)
    assert set(curve.lines) == {"data", "wiener", *models, "data of large", "wiener of large"}
    assert [len(curve.lines[name]) for name in ("data", "data of large")] == [4, 8]
