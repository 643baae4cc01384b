"""What a report says at its top; oracles: the verdict that each record was made with, the arithmetic of its shares."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_page import ABOUT, CHANGE, ROW, plan_of_one

from halfstep.core.results import Comparison, PlanRow
from halfstep.report.tables import more_table, time_table
from halfstep.report.words import headline, numbers, to_decide

NARROW = replace(CHANGE, share=0.01, relative_low=-0.02, relative_high=0.03, least=32, scale=1.0)
WIDE = replace(CHANGE, share=0.02, relative_low=-0.1, relative_high=0.14, least=32, scale=1.0)
NEAR = replace(CHANGE, share=0.05, relative_low=-0.1, relative_high=0.2, least=32, scale=1.0)
HELD = replace(ROW, difference=NARROW, verdict="held", held=True, wall_share=0.25, wall_ms=40.0)


def beside(row: PlanRow, free: str | None = "best free", **about) -> Comparison:
    """A plan beside what is run today, 160 ms, and where there is one the best free, 80 ms."""
    plans = {"reference": replace(ROW, wall_ms=160.0)}
    if free == "best free":
        plans["best free"] = replace(ROW, wall_ms=80.0, wall_share=0.5, calls=12)
    return Comparison(about=replace(ABOUT, free=free, **about), plans={**plans, "plan": row})


def with_free(row: PlanRow, change=NARROW, verdict="held") -> PlanRow:
    return replace(row, free_difference=change, free_verdict=verdict, free_wall=0.5)


def test_a_plan_that_held_beside_both():
    record = beside(with_free(HELD))
    said = headline(record, plan_of_one())
    assert said == (
        "The plan is 4.0 times as fast as what you run today (50 DDIM calls) and 2.0 times as fast as the best that is "
        "free (a stock sampler in 12 calls), and quality held beside both."
    )
    assert to_decide(record) == ("", "")
    assert [(one.number, one.what) for one in numbers(record)] == [
        ("40 ms", "for a batch of 8"),
        ("4.0×", "as fast as today"),
        ("2.0×", "as fast as the best free"),
        ("+1.0%", "change of the Fréchet distance"),
    ]
    assert "160 ms" in numbers(record)[0].beside and "[−2.0%, +3.0%]" in numbers(record)[3].beside.replace("-", "−")


def test_a_plan_that_held_beside_one_and_not_beside_the_other():
    change = replace(NARROW, share=0.2, relative_low=0.1, relative_high=0.3)
    said = headline(beside(with_free(HELD, change, "not held")), plan_of_one())
    assert "(50 DDIM calls), and quality held. It is 2.0 times" in said and said.endswith("and quality did not hold.")


def test_what_is_not_decided_says_how_many_images_would_decide_it_and_how_they_are_drawn():
    undecided = replace(HELD, difference=WIDE, verdict="not decided", held=False, decided_by=1_201)
    record = beside(with_free(undecided, WIDE, "not decided"))
    assert headline(record, plan_of_one()).endswith("and whether quality held is not decided beside both.")
    said, setting = to_decide(record)
    wanted = max(1_300, -(-WIDE.decided_by(0.05) // 100) * 100)  # 64 (0.12 / 0.03)^2 = 1,024 beside the best free
    assert setting == f"--set eval.images={wanted}" and f"{wanted:,} images" in said and "64 were drawn" in said
    table = time_table(record)
    assert table.rows[2][-2:] == ("not decided; about 1,300 images would", "not decided; about 1,100 images would")
    half = to_decide(beside(with_free(replace(undecided, decided_by=None), WIDE, "not decided")))
    assert "beside the best free (beside today a million would not)" in half[0] and half[1].endswith("=1100")
    hopeless = replace(undecided, difference=NEAR, decided_by=None)
    assert to_decide(beside(hopeless, None)) == (
        "A million images would not decide it: the change is too near to the tolerance of 5%.",
        "",
    )


def test_only_what_is_open_is_counted():
    record = beside(with_free(HELD, WIDE, "not decided"))
    assert to_decide(record)[1] == "--set eval.images=1100"


def test_beside_a_broken_reference_nothing_is_said_to_have_held():
    record = beside(replace(with_free(HELD, NARROW, "broken reference"), verdict="broken reference"))
    said = headline(record, plan_of_one())
    assert said.endswith("and nothing can be said of quality: the reference is broken.") and "held" not in said
    assert to_decide(record) == ("", "")


def test_without_a_better_stock_sampler_and_without_one_looked_for():
    assert headline(beside(HELD, "reference"), plan_of_one()).endswith(
        "and quality held. No stock sampler of the same net is as good in less time."
    )
    alone = beside(HELD, None)
    assert headline(alone, plan_of_one()).endswith("(50 DDIM calls), and quality held.")
    assert len(numbers(alone)) == len(numbers(beside(HELD, "reference"))) == 3
    assert "of the best free's time" not in time_table(alone).columns


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.98, "is about as fast as what"), (2.0, "takes 2.0 times as long as what"), (0.05, "is 20.0 times as fast as")],
)
def test_speed_is_told_as_it_is(share, said):
    assert f"The plan {said}" in headline(beside(replace(HELD, wall_share=share), None), plan_of_one())


def test_a_record_of_before_is_told_without_a_count():
    old = replace(HELD, verdict=None, held=False, difference=replace(WIDE, least=None, scale=None))
    record = beside(old, None, floor=None, scale=None)
    assert "not decided" in headline(record, plan_of_one()) and to_decide(record) == ("", "")


def test_the_table_begins_with_time_and_marks_the_line_to_beat():
    record = beside(with_free(HELD))
    table = time_table(record)
    assert table.columns[:4] == ("", "ms, batch of 8", "of today's time", "of the best free's time")
    assert [row[0] for row in table.rows] == ["reference: today", "best free: the line to beat", "plan"]
    assert (table.beat, table.best) == (1, 2)
    assert table.rows[2][1:4] == ("40", "25%", "50%") and table.rows[2][-2:] == ("held", "held")
    assert table.rows[0][-2] == "—" and table.rows[1][-1] == "—"
    assert not any("MAC" in name for name in table.columns)
    assert more_table(record).columns[-2:] == ("MACs", "MMACs")


def test_where_today_is_the_best_free_its_row_is_the_line_to_beat_and_no_column_is_said_twice():
    table = time_table(beside(HELD, "reference"))
    assert table.beat == 0 and table.rows[0][0] == "reference: today, and the line to beat"
    assert not any("best free" in name for name in table.columns)
