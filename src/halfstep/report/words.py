"""What was measured, in words: numbers with their intervals, verdicts, the sentence of a run."""

from __future__ import annotations

from typing import NamedTuple

from halfstep.core.plan import StepPlan
from halfstep.core.results import (
    Comparison,
    Difference,
    PlanRow,
    Quality,
    Verdict,
)


def quality_cell(quality: Quality) -> str:
    """A value with its interval, to two decimals."""
    return f"{quality.value:.2f} [{quality.low:.2f}, {quality.high:.2f}]"


def change_cell(change: Difference) -> str:
    """A change with its interval: a share, or the distance itself where the reference is within its floor."""
    if change.share is None or change.relative_low is None or change.relative_high is None:
        return f"{change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"
    return f"{_signed(change.share)} [{_signed(change.relative_low)}, {_signed(change.relative_high)}]"


def _signed(share: float) -> str:
    return f"{share:+.1%}" if abs(share) < 0.1 else f"{share:+.0%}"


def verdict_of(row: PlanRow, tolerance: float) -> Verdict:
    """A plan's verdict; told from its interval where the record is of before there were three."""
    if row.verdict is not None:
        return row.verdict
    if row.held:
        return "held"
    low = row.difference.relative_low
    return "not held" if low is not None and low > tolerance else "not decided"


def verdict_cells(row: PlanRow, tolerance: float) -> tuple[str, str]:
    """A plan's verdicts beside what is run today and beside the best free, for a table; of one that is not decided, how
    many images would. "–" where none was given."""
    today = verdict_of(row, tolerance)
    return _with_count(today, row.decided_by), _with_count(row.free_verdict, free_decided_by(row, tolerance))


def _with_count(verdict: Verdict | None, count: int | None) -> str:
    if verdict != "not decided" or count is None:
        return verdict or "–"
    return f"not decided; about {_round_up(count):,} images would"


def free_decided_by(row: PlanRow, tolerance: float) -> int | None:
    """About how many images would decide what is not decided beside the best free; None where a million would not, and
    for records of before, which do not say."""
    change = row.free_difference
    if row.free_verdict != "not decided" or change is None or change.least is None:
        return None
    return change.decided_by(tolerance)


def decided_text(row: PlanRow) -> str:
    """How many images would decide what is not decided, as the end of a sentence; nothing in records of before."""
    if row.verdict is None:
        return ""
    if row.decided_by is None:
        return "; a million images would not decide it"
    return f"; about {_round_up(row.decided_by):,} images would decide it"


def _round_up(count: int) -> int:
    """To two digits."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit


def summary(record: Comparison, plan: StepPlan) -> str:
    """One sentence with the claim and its measure, after what is wrong with them."""
    row, about = record.plans["plan"], record.about
    calls = f"{record.reference.calls} {plan.sampler.short} calls"
    change = f"the Fréchet distance changes by {change_cell(row.difference)} (95 % interval, n = {about.n})"
    wrong = "".join(f"Warning: {one}. " for one in about.warnings)
    if plan.corrected and row.share == 1:
        return f"{wrong}The corrections cost nothing; with {calls} {change}."
    what = f"The plan, {details}," if (details := _details(plan)) else "The plan"
    if record.about.free:
        return f"{wrong}{_beside_both(record, plan)}"
    saved = f"saves {1 - row.share:.0%} of the MACs and {1 - row.wall_share:.0%} of the time of {calls}"
    cost = saved if row.share != 1 else f"costs what {calls} of the reference cost"
    return f"{wrong}{what} {cost}; {change}, so {_judgement(row, about.tolerance)}."


def _beside_both(record: Comparison, plan: StepPlan) -> str:
    """The claim beside both references: what is run today, and the best that is free."""
    about, row = record.about, record.plans["plan"]
    free = record.plans[about.free or about.reference]
    today = plan.baseline.what if plan.baseline else f"{record.reference.calls} calls"
    said = "" if row.predicted_ms is None else f" (its prices said {row.predicted_ms:,.0f})"
    took = f"A batch of {about.batch} takes {row.wall_ms:,.0f} ms{said}"
    beside = f"{_times(row.wall_share)} as fast as what you run today ({today}, {record.reference.wall_ms:,.0f} ms)"
    change = f"the Fréchet distance changes by {change_cell(row.difference)} (95 % interval, n = {about.n})"
    text = f"{took}: {beside}; {change}, so {_judgement(row, about.tolerance)}."
    if free is record.reference or row.free_wall is None or row.free_difference is None:
        return f"{text} No stock sampler of the same net is as good in less time."
    best = f"{_times(row.free_wall)} as fast as the best that is free ({free.calls} calls, {free.wall_ms:,.0f} ms)"
    verdict = row.free_verdict or "not decided"
    return f"{text} It is {best}, whose distance it changes by {change_cell(row.free_difference)}: {verdict}."


def _times(share: float) -> str:
    """How many times as fast a share of a time is."""
    return f"{1 / share:.1f} times" if share < 0.95 else ("about" if share < 1.05 else f"{1 / share:.2f} times")


def _details(plan: StepPlan) -> str:
    """What a sentence on a plan tells of its entries: the one of all its rows, and its guides."""
    guided = [guide.entry for guide in plan.guides if guide]
    alone = f"{plan.entries[0]!r} in every {'row' if guided else 'call'}" if len(set(plan.entries)) == 1 else ""
    if not guided:
        return alone
    names = " and ".join(map(repr, dict.fromkeys(guided)))
    led = f"guided by {names} in {len(guided)} of {len(plan.rows)}"
    return f"{alone} and {led}" if alone else f"{led} rows"


def _judgement(row: PlanRow, tolerance: float) -> str:
    of = "" if row.difference.share is not None else " of a hundredth of the data's spread"
    within = f"within the tolerance of {tolerance:.0%}{of}"
    match verdict_of(row, tolerance):
        case "held":
            return f"quality held {within}"
        case "not held":
            return f"quality did not hold {within}"
        case "broken reference":
            return "nothing can be said of its quality: the reference is broken"
        case _:
            return f"whether quality held {within} is not decided{decided_text(row)}"


# ------------------------------------------------------------------------------------------------ at the top of a page


def headline(record: Comparison, plan: StepPlan) -> str:
    """The claim in one or two plain sentences: how much faster, and whether the quality held, beside what is run today
    and beside the best that is free."""
    about, row = record.about, record.plans["plan"]
    what = plan.baseline.what if plan.baseline else f"{record.reference.calls} {plan.sampler.short} calls"
    held = _held(verdict_of(row, about.tolerance), row.difference)
    today = f"{_speed(row.wall_share)} what you run today ({what})"
    if about.free is None:
        return f"The plan {today}, {held}."
    if about.free == about.reference or row.free_wall is None or row.free_difference is None:
        return f"The plan {today}, {held}. No stock sampler of the same net is as good in less time."
    calls, beside = record.plans[about.free].calls, _held(row.free_verdict or "not decided", row.free_difference)
    free = f"{_speed(row.free_wall)} the best that is free (a stock sampler in {calls} calls)"
    if beside == held:
        return f"The plan {today} and {free.removeprefix('is ')}, {held}{' beside both' * ('reference' not in held)}."
    return f"The plan {today}, {held}. It {free}, {beside}."


def _speed(share: float) -> str:
    """How fast what takes this share of a time is, up to the name of what it is held against."""
    if 0.95 <= share < 1.05:
        return "is about as fast as"
    return f"is {1 / max(share, 1e-9):.1f} times as fast as" if share < 0.95 else f"takes {share:.1f} times as long as"


def _held(verdict: Verdict, change: Difference) -> str:
    if verdict == "broken reference":
        return "and nothing can be said of quality: the reference is broken"
    if verdict == "not decided":
        return "and whether quality held is not decided"
    high = change.high if change.relative_high is None else change.relative_high
    if verdict == "held" and high < 0:
        return "and quality is better"
    return "and quality held" if verdict == "held" else "and quality did not hold"


def to_decide(record: Comparison) -> tuple[str, str]:
    """How what is not decided would be, in words, and the setting that draws as many images; "" where all is decided,
    and no setting where a million images would not."""
    about, row = record.about, record.plans["plan"]
    asked = {"today": row.decided_by} if verdict_of(row, about.tolerance) == "not decided" else {}
    if row.free_verdict == "not decided" and about.free != about.reference:
        asked["the best free"] = free_decided_by(row, about.tolerance)
    if not asked or row.verdict is None:
        return "", ""
    counts = {name: count for name, count in asked.items() if count is not None}
    if not counts:
        told = "A million images would not decide it: the change is too near to the tolerance"
        return f"{told} of {about.tolerance:.0%}.", ""
    wanted = _round_up(max(counts.values()))
    beside = f" beside {next(iter(counts))}" * (len(counts) < len(asked))
    hopeless = "".join(f" (beside {name} a million would not)" for name in asked if name not in counts)
    said = (
        f"About {wanted:,} images would decide it{beside}{hopeless}; {about.n:,} were drawn. Repeat the command that "
    )
    return f"{said}began this run with this added; it trains and searches nothing again:", f"--set eval.images={wanted}"


class Number(NamedTuple):
    """One number of the top of a page: the number, of what, and what stands beside it."""

    number: str
    what: str
    beside: str = ""


def numbers(record: Comparison) -> tuple[Number, ...]:
    """What a reader takes away, time first."""
    about, row = record.about, record.plans["plan"]
    said = "" if row.predicted_ms is None else f"; its prices said {row.predicted_ms:,.0f}"
    beside = f"today {record.reference.wall_ms:,.0f} ms{said}"
    found = [Number(f"{row.wall_ms:,.0f} ms", f"for a batch of {about.batch}", beside)]
    turns = f"{_multiple(row.wall_share_high)} to {_multiple(row.wall_share_low)} in {about.repeats} turns"
    found.append(Number(_multiple(row.wall_share), "as fast as today", turns))
    if about.free and about.free != about.reference and row.free_wall is not None:
        free = record.plans[about.free].wall_ms
        found.append(Number(_multiple(row.free_wall), "as fast as the best free", f"which takes {free:,.0f} ms"))
    value, _, interval = change_cell(row.difference).partition(" ")
    of = f"95 % interval {interval}, {about.n:,} images"
    return (*found, Number(value.replace("-", "−"), "change of the Fréchet distance", of))


def _multiple(share: float) -> str:
    """How many times as fast, to two digits from ten times on."""
    return f"{1 / share:.1f}×" if share > 0.1005 else f"{1 / max(share, 1e-9):,.0f}×"
