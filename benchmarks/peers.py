"""Ours beside what others offer, on the pixel models of Fashion-MNIST: one run, rows in turns, quality beside time.

    pip install -c constraints.txt 'halfstep[onnx,openvino]'
    python benchmarks/peers.py --size 32 --only quality     # the distances; resumes
    python benchmarks/peers.py --size 32                    # times, its section of docs/peers.md, docs/peers32.png
    python benchmarks/peers.py --size 16

Every row draws from the same noise. Runtimes in float32 draw the same pictures to rounding, so that their rows have the
distance of their plan; what is drawn in float32 is drawn by ONNX Runtime. What was measured is kept by plan in
peers-quality.json, with how many pictures it was measured on: an hour and more for each model, so that a table of times
does not draw it again, and fewer pictures than are kept change nothing. Times are those of the processor, of one
thread: other work beside it is not counted. The text model's section: `peers_text.py`.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

import free
from halfstep.app.searching import Ground
from halfstep.app.subject import open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core import disk
from halfstep.core.machine import cpu_name
from halfstep.core.plan import Row as PlanRow
from halfstep.core.plan import StepPlan
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec
from halfstep.engine.bank import Bank, calls_of
from halfstep.engine.entry import Backend
from halfstep.engine.pricing import walk_us
from halfstep.engine.profiling import Layout, interleave
from halfstep.engine.sampling import reference_plan
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.nets.models import load_model
from halfstep.report.figures import Pareto, Series, draw_all
from halfstep.report.page import Table
from halfstep.report.words import change_cell
from peers_pruned import folder_of, load_pruned

BATCH = 64
DOCS = free.HERE.parent / "docs"
OURS = {
    32: {
        "optimize, 1/8": "joint, 1/8 of the time",
        "optimize, 1/16": "joint, 1/16 of the time",
        "optimize, 1/22": "joint, 1/22 of the time",
    },
    16: {
        "optimize, 1/5.6 (the dense net alone)": "joint, 1/5.6 of the time",
        "optimize, 1/8": "joint, 1/8 of the time",
        "optimize, 1/11": "joint, 1/11 of the time",
        "optimize, 1/22": "joint, 1/22 of the time",
    },
}
"""What the rows of our plans are called, and the plans: the shares of stock's time that they were searched for."""
KEPT = free.HERE / "peers-quality.json"
STITCHED = {32: (1, 2, 3), 16: (2, 4, 6)}
"""Steps that T-Stitch's rule gives to the small net."""
REMOVED = (0.5, 0.75)
HEADINGS = {16: "## 16x16 pixels", 32: "## 32x32 pixels", 0: "## Text, latents of 32x32", -1: "## Not run, and why"}
COLUMNS = (
    *("", "whose", "calls", "ms", "of DDIM-50's", "of the best free's", "ms, batch 1", "of DDIM-50's"),
    *("FD", "pictures", "beside DDIM-50", "beside the best free"),
)


@dataclass(frozen=True)
class Row:
    """A row of the table: whose it is, the plan that it draws, and what runs its networks."""

    name: str
    group: str
    plan: StepPlan
    backend: Backend = "eager"
    layout: Layout = "contiguous"

    @property
    def told(self) -> str:
        words = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "compile": "torch.compile"}
        layout = self.layout if self.layout != "contiguous" else ""
        return ", ".join(filter(None, [self.name, words.get(self.backend, ""), layout]))


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What is known of a plan's pictures: how many, their distance with its interval, and the paired changes from
    DDIM-50 and from the best free with their verdicts, in words; "" where that was not drawn beside them."""

    name: str
    n: int
    value: float
    low: float
    high: float
    today: str = ""
    best: str = ""

    @property
    def fd(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def is_one(self, base: str, verdicts: Sequence[str]) -> bool:
        """Whether the verdict beside `today` or the `best` free is one of these."""
        return getattr(self, base).split(", ")[-1] in verdicts


def bank_of(size: int) -> Bank:
    """The supernet, the small net that was trained alone and the pruned ones that are there, each in bf16 too."""
    bank = pipeline_of(size).bank
    others = {"small": load_model(free.HERE / "models" / f"fashion{size}-small" / "unet")}
    others |= {pruned_name(one): load_pruned(size, one) for one in REMOVED if folder_of(size, one).is_dir()}
    for name, net in others.items():
        bank = bank.with_entry(name, net, bank.prediction_type)
    return bank.with_casts(["bf16"], bank.computed)


def pipeline_of(size: int) -> StepAwarePipeline:
    return StepAwarePipeline.from_pretrained(free.HERE / "models" / f"fashion{size}-supernet")


def pruned_name(removed: float) -> str:
    return f"pruned{removed * 100:.0f}"


def in_bf16(plan: StepPlan) -> StepPlan:
    """The same plan, its corrections too, of entries in bf16, what guides them too."""

    def half(row: PlanRow) -> PlanRow:
        guide = row.guide and row.guide._replace(entry=f"{row.guide.entry}@bf16")
        return replace(row, entry=f"{row.entry}@bf16", guide=guide)

    prices = {f"{name}@bf16": price for name, price in plan.prices.items() if "@" not in name}
    return replace(plan, rows=tuple(half(row) for row in plan.rows), prices={**prices, **plan.prices})


def best_of_runtimes(row: Row, many: bool = False) -> list[Row]:
    """The row as it is, by ONNX Runtime, and in bf16; `many`: by every other runtime too."""
    found = [row, replace(row, backend="onnx")]
    if many:
        found += [replace(row, layout="channels_last"), replace(row, backend="openvino")]
        found += [replace(row, backend="compile", layout="channels_last")]
    return [*found, replace(row, name=f"{row.name}, bf16", plan=in_bf16(row.plan), layout="channels_last")]


def rows_of(size: int, bank: Bank, process: Process) -> list[Row]:
    known = free.known_plans(free.HERE / f"free{size}-plans.json")
    known = {name: replace(plan, prices={**plan.prices, **bank.prices()}) for name, plan in known.items()}
    if size == 16:  # of which a measurement on more pictures chose another (free16.md)
        chosen = reference_plan(bank, process, SampleSpec(scheduler="pndm", steps=10))
        known |= {"of the search": known["best free"], "best free": chosen}
    best = known["best free"]
    today = reference_plan(bank, process, SampleSpec(scheduler="ddim", steps=50))
    stock = Row("DDIM, 50 steps", "stock", today)
    rows = [stock, replace(stock, group="runtimes", backend="onnx")]
    if "of the search" in known:
        rows.append(Row(known["of the search"].sampler.told, "stock", known["of the search"]))
    first, *others = best_of_runtimes(Row(best.sampler.told, "runtimes", best), many=True)
    rows += [replace(first, name=f"best free: {best.sampler.told}", group="stock"), *others]
    best = known.get("of the search", best)  # the cheaper one
    for k in STITCHED[size]:
        stitched = best.with_entries(["small"] * k + [best.reference] * (len(best.rows) - k))
        rows += best_of_runtimes(Row(f"T-Stitch, small net in the first {k} of {len(best.rows)}", "T-Stitch", stitched))
    for removed in REMOVED:
        if pruned_name(removed) in bank:
            name = f"Diff-Pruning, {removed:.0%} of the MACs removed"
            rows += best_of_runtimes(Row(name, "Diff-Pruning", best.uniform(pruned_name(removed))))
    for name, key in OURS[size].items():
        rows += best_of_runtimes(Row(name, "ours", known[key]))
    return rows


def known_quality(size: int) -> dict[str, Quality]:
    """By digest of the plan."""
    known = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    return {digest: Quality(**one) for digest, one in known.get(str(size), {}).items()}


def keep_quality(size: int, found: dict[str, Quality]) -> None:
    known = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    known[str(size)] = {digest: vars(one) for digest, one in found.items()}
    disk.write_json(KEPT, known)


def draw_quality(size: int, rows: Sequence[Row], bank: Bank, images: int, seconds: float) -> None:
    """Draw the plans that are not known on as many pictures, the dearest last, and none that is not begun after so many
    seconds; what is found is kept."""
    work, known = Path(f"runs/peers{size}"), known_quality(size)
    recipe = free.recipe_of(size, ["search.reuse=0", f"sample.batch={BATCH}"])
    ground = Ground(open_subject(free.MODELS[size], free.DATA, recipe, watch=RichWatch()), bank, work, RichWatch())
    plans = {row.plan.digest: row.plan for row in rows}
    names = {row.plan.digest: row.name for row in reversed(rows)}
    best = next(row.plan.digest for row in rows if row.name.startswith("best free"))
    needed = {digest for digest in plans if digest not in known or known[digest].n < images} | {best}
    bank, judge = ground.book.judge.bank, ground.book.judge
    bank.set_runtimes(dict.fromkeys(bank.uncast, "onnx"), [BATCH])
    drawn = {digest: plan for digest, plan in plans.items() if digest in needed}
    found = free.measured(ground, drawn, images, work / "distances.jsonl", seconds)
    beside = {base: free.changes(judge, found, base) for base in (rows[0].plan.digest, best) if base in found}
    for digest, one in found.items():
        if digest in known and known[digest].n >= images:
            continue
        words = {base: f"{change_cell(all_[digest])}, {all_[digest].verdict(0.05)}" for base, all_ in beside.items()}
        low, high = one.interval
        known[digest] = Quality(
            name=names[digest],
            n=one.n,
            value=max(0, one.value),
            low=max(0, low),
            high=max(0, high),
            today=words.get(rows[0].plan.digest, ""),
            best=words.get(best, ""),
        )
    keep_quality(size, known)


def times_of(size: int, rows: Sequence[Row], batch: int, repeats: int) -> list[float]:
    """Processor milliseconds of a batch of every row: those of its calls, all of them timed in turns in one run, and of
    what its sampler takes beside them."""
    used: dict[tuple[Backend, Layout], set[str]] = {}
    for row in rows:
        used.setdefault((row.backend, row.layout), set()).update(row.plan.called)
    banks: dict[tuple[Backend, Layout], Bank] = {}
    calls: dict[tuple[Backend, Layout, str], Callable[[], object]] = {}
    for (backend, layout), names in used.items():
        whole_bank = bank_of(size)
        bank = banks[backend, layout] = whole_bank.only({whole_bank.reference, *names})
        bank.set_layouts(dict.fromkeys(bank, layout))
        if backend != "eager":
            bank.set_runtimes(dict.fromkeys(names, backend), [batch])
        calls |= {(backend, layout, name): call for name, call in calls_of(bank, batch).items() if name in names}
    with torch.inference_mode():
        found = interleave({str(key): call for key, call in calls.items()}, repeats=repeats, clock=time.process_time)
    ms = {key: median(found[str(key)]) for key in calls}

    def whole(row: Row) -> float:
        beside = walk_us(banks[row.backend, row.layout], row.plan, batch, time.process_time) * batch / 1e3
        return beside + sum(ms[row.backend, row.layout, name] for name in row.plan.called)

    return [whole(row) for row in rows]


# ------------------------------------------------------------------------------------------------------------- the page


def table_of(size: int, rows: Sequence[Row], known: dict[str, Quality], ms: dict[int, list[float]]) -> Table:
    best, batch = next(k for k, row in enumerate(rows) if row.name.startswith("best free")), max(ms)
    cells = []
    for k in sorted(range(len(rows)), key=lambda k: -ms[batch][k]):
        row, one = rows[k], known.get(rows[k].plan.digest)
        cells.append(
            (
                row.told,
                row.group,
                f"{len(row.plan.called)}",
                f"{ms[batch][k]:,.0f}",
                f"1/{ms[batch][0] / ms[batch][k]:.1f}",
                f"1/{ms[batch][best] / ms[batch][k]:.2f}",
                f"{ms[1][k]:,.1f}",
                f"1/{ms[1][0] / ms[1][k]:.1f}",
                *((one.fd, f"{one.n:,}", one.today, one.best) if one else ("not drawn", "", "", "")),
            )
        )
    columns = (*COLUMNS[:3], f"ms, batch {batch}", *COLUMNS[4:])
    return Table(title=f"Fashion-MNIST {size}x{size}", columns=columns, rows=tuple(cells), note="")


def at_equal_quality(rows: Sequence[Row], known: dict[str, Quality], ms: Sequence[float]) -> str:
    """Ours and the others' fastest row whose quality holds beside DDIM-50 and beside the best free, and that is not
    shown to be worse."""
    told = []
    for base in ("today", "best"):
        for words, verdicts in (("held", ("held",)), ("held or not decided", ("held", "not decided"))):
            able = [
                k for k, row in enumerate(rows) if (one := known.get(row.plan.digest)) and one.is_one(base, verdicts)
            ]
            mine, theirs = ([k for k in able if (rows[k].group == "ours") is own] for own in (True, False))
            line = f"- {words.capitalize()} beside {'DDIM-50' if base == 'today' else 'the best free'}: "
            other, own = (min(ones, key=lambda k: ms[k], default=None) for ones in (theirs, mine))
            said = [
                "none" if k is None else f"{rows[k].told} (1/{ms[0] / ms[k]:.1f}, FD {known[rows[k].plan.digest].fd})"
                for k in (other, own)
            ]
            line += f"the fastest of the others is {said[0]}, of ours {said[1]}"
            if other is not None and own is not None:
                line += f": {ms[other] / ms[own]:.2f} times as fast"
            told.append(f"{line}.")
    return "\n".join(told)


def frontier(rows: Sequence[Row], known: dict[str, Quality], ms: Sequence[float]) -> str:
    """Rows of others that no row of ours beats in both time and distance, as measured."""
    value = {k: known[row.plan.digest].value for k, row in enumerate(rows) if row.plan.digest in known}
    ours = [k for k in value if rows[k].group == "ours"]
    others = [k for k in value if rows[k].group != "ours"]
    left = [rows[k].told for k in others if not any(ms[o] <= ms[k] and value[o] <= value[k] for o in ours)]
    if not left:
        return "- As measured every row of the others is beaten by one of ours in both time and distance."
    return f"- As measured no row of ours is both faster and nearer than: {'; '.join(left)}."


def section(size: int, table: Table, told: Sequence[str], repeats: int) -> str:
    used = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "onnxruntime", "openvino"))
    about = (
        f"`python benchmarks/peers.py --size {size}`: {cpu_name()}, {torch.get_num_threads()} thread, {used}; "
        f"processor time of a plan's calls, each the median of {repeats}, all in turns in one run, and of what its "
        f"sampler takes beside them. FD corrected for bias, on as many pictures of one noise as stands beside it."
    )
    figure = f"![Distance against time, {size}x{size}](peers{size}.png)"
    return "\n\n".join([about, free.markdown(table), "\n".join(told), figure])


def put(heading: str, text: str) -> None:
    """The section of the page under this heading, in place of the one that is there."""
    page = DOCS / "peers.md"
    parts = page.read_text().split("\n## ")
    parts = [parts[0], *(f"## {part}" for part in parts[1:])]
    parts = [part.strip() for part in parts]
    fresh = f"{heading}\n\n{text}"
    found = [k for k, part in enumerate(parts) if part.startswith(heading)]
    if found:
        parts[found[0]] = fresh
    else:
        parts.append(fresh)
    order = [None, *HEADINGS.values()]
    parts.sort(key=lambda part: next((k for k, one in enumerate(order) if one and part.startswith(one)), 0))
    disk.write_text(page, "\n\n".join(parts) + "\n")


def pareto(size: int, rows: Sequence[Row], known: dict[str, Quality], ms: dict[int, list[float]]) -> bytes:
    series, batch = [], max(ms)
    for group in dict.fromkeys(row.group for row in rows):
        points = []
        for row, took in zip(rows, ms[batch], strict=True):
            if row.group == group and row.plan.digest in known:
                one = known[row.plan.digest]
                points.append((took / batch, one.value, one.low, one.high))
        series.append(Series(name=group, points=tuple(sorted(points)), style="group"))
    label = f"milliseconds per image (batch {batch}, one thread)"
    title = f"Fashion-MNIST {size}x{size}: distance against time"
    return draw_all([Pareto(title=title, metric_label="FD", series=tuple(series), cost_label=label)])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=(16, 32), default=32)
    parser.add_argument("--only", choices=("quality", "table", "page"), help="page: of the times of before")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=BATCH, help="images of a timed batch")
    parser.add_argument("--without", nargs="*", default=[], help="runtimes that are left out: compile, openvino …")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row's pictures after so long")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work, pipe = Path(f"runs/peers{args.size}"), pipeline_of(args.size)
    work.mkdir(parents=True, exist_ok=True)
    bank = bank_of(args.size)
    rows = rows_of(args.size, bank, pipe.process)
    if args.only in (None, "quality"):
        draw_quality(args.size, rows, bank, args.images, args.seconds)
    if args.only == "quality":
        return
    known, file = known_quality(args.size), work / "times.json"
    if args.only == "page":
        kept = json.loads(file.read_text())
        rows = [row for row in rows if row.told in kept]
        ms = {batch: [kept[row.told][k] for row in rows] for k, batch in enumerate((1, args.batch))}
    else:
        rows = [row for row in rows if row.backend not in args.without]
        ms = {batch: times_of(args.size, rows, batch, args.repeats) for batch in (1, args.batch)}
        disk.write_json(file, {row.told: [found[k] for found in ms.values()] for k, row in enumerate(rows)})
    table = table_of(args.size, rows, known, ms)
    told = [one(rows, known, ms[args.batch]) for one in (at_equal_quality, frontier)]
    put(HEADINGS[args.size], section(args.size, table, told, args.repeats))
    (DOCS / f"peers{args.size}.png").write_bytes(pareto(args.size, rows, known, ms))
    print("\n".join(" | ".join([row[0], *row[3:6], *row[8:]]) for row in table.rows), *told, sep="\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
