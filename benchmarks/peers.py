"""Ours beside what others offer, on the 32x32 pixel model: one run, rows in turns, quality beside time.

    python benchmarks/peers.py --only quality     # the distances that runs/free32 does not have yet
    python benchmarks/peers.py                    # times, docs/peers.md and docs/peers.png
    pip install -c constraints.txt 'halfstep[onnx,openvino]'

Every row draws what `benchmarks/free.py --size 32` draws, on the same noise. Runtimes in float32 draw the same pictures
to rounding, so that their rows have the distance of their plan. What was not run, and why, stands in the page.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

import free
from halfstep.app import story
from halfstep.app.figures import Pareto, Series, draw_all
from halfstep.app.page import Table
from halfstep.app.searching import Ground
from halfstep.app.subject import open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core import disk
from halfstep.core.machine import cpu_name
from halfstep.core.plan import StepPlan
from halfstep.engine.bank import Bank
from halfstep.engine.entry import Backend
from halfstep.engine.pricing import drawing
from halfstep.engine.profiling import interleave
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.measure.quality import Distances
from halfstep.nets.models import load_model

SIZE, BATCH = 32, 64
SMALL = free.HERE / "models" / "fashion32-small" / "unet"
PLANS = free.HERE / "free32-plans.json"
PAGE = free.HERE.parent / "docs" / "peers.md"
OURS = {"joint plan, 1/16": "joint, 1/16 of the time", "joint plan, 1/22": "joint, 1/22 of the time"}
NOT_RUN = {
    "OpenVINO int8 (NNCF)": "no int8 entry yet",
    "Torch-Pruning / Diff-Pruning at 50 % and 75 %": "as many fine-tuning steps as our supernet had are hours here",
    "tomesd": "merges tokens of attention; this U-Net has none above 8x8",
    "pruna": "its CPU path is torch.compile and quantisation, which stand as rows of their own",
    "DeepCache": "hooks into pipelines of text: beaten there at each of its intervals "
    "([benchmarks/text.md](../benchmarks/text.md))",
    "cache-dit, diffusers' caches": "are of transformers; a DiT of this project is not trained yet",
}


@dataclass(frozen=True)
class Row:
    """A row of the table: whose it is, the plan that it draws, and what runs its networks."""

    name: str
    group: str
    plan: StepPlan
    backend: Backend = "eager"
    layout: str = "contiguous"


def bank_of() -> Bank:
    """The supernet of 32x32 and the small net that was trained alone, each in bf16 too."""
    pipe = StepAwarePipeline.from_pretrained(free.MODELS[SIZE])
    bank = pipe.bank.with_entry("small", load_model(SMALL), pipe.bank.prediction_type)
    return bank.with_reuse([0]).with_casts(["bf16"], bank.computed)


def in_bf16(plan: StepPlan) -> StepPlan:
    """The same plan, its corrections too, of entries in bf16."""
    rows = tuple(replace(row, entry=f"{row.entry}@bf16") for row in plan.rows)
    return replace(plan, rows=rows)


def rows_of(today: StepPlan, bank: Bank) -> list[Row]:
    known = {"today": today} | free.known_plans(PLANS)
    known = {name: replace(plan, prices={**plan.prices, **bank.prices()}) for name, plan in known.items()}
    today, best = known["today"], known["best free"]
    rows = [Row("DDIM, 50 steps", "stock", today), Row("DDIM, 50 steps", "runtimes", today, "onnx")]
    rows += [Row(f"best free: {best.sampler.told}", "stock", best)]
    rows += [Row(best.sampler.told, "runtimes", best, layout="channels_last")]
    rows += [Row(best.sampler.told, "runtimes", best, backend) for backend in ("compile", "onnx", "openvino")]
    rows += [Row(f"{best.sampler.told}, bf16", "runtimes", in_bf16(best))]
    for k in (1, 2, 3):
        stitched = best.with_entries(["small"] * k + [best.reference] * (len(best.rows) - k))
        rows.append(Row(f"T-Stitch's rule: small net in the first {k} of {len(best.rows)}", "T-Stitch", stitched))
    for name, key in OURS.items():
        plan = known[key]
        rows += [Row(name, "ours", plan), Row(name, "ours", plan, "onnx"), Row(f"{name}, bf16", "ours", in_bf16(plan))]
    return rows


def distances_of(rows: Sequence[Row], ground: Ground, images: int) -> dict[str, Distances]:
    """By digest."""
    plans = {row.plan.digest: row.plan for row in rows}
    return free.measured(ground, plans, images, Path("runs/free32/distances.jsonl"), 1e9)


def times_of(rows: Sequence[Row], batch: int, repeats: int) -> list[float]:
    """Milliseconds of a batch of every row, in turns in one run."""
    banks: dict[tuple[Backend, str], Bank] = {}
    for row in rows:
        if (row.backend, row.layout) not in banks:
            bank = bank_of()
            if row.layout != "contiguous":
                bank.set_layouts(dict.fromkeys(bank, "channels_last"))
            full = [one for one in bank.computed if "@" not in one] if row.backend != "eager" else []
            bank.set_runtimes(dict.fromkeys(full, row.backend), [batch])
            banks[row.backend, row.layout] = bank
    calls = {str(k): partial(drawing, banks[row.backend, row.layout], row.plan, batch) for k, row in enumerate(rows)}
    with torch.inference_mode():
        found = interleave(calls, repeats=repeats, warmup=1)
    return [median(found[str(k)]) for k in range(len(rows))]


def told(row: Row) -> str:
    more = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "compile": "torch.compile"}.get(row.backend, "")
    return ", ".join(filter(None, [row.name, more, row.layout if row.layout != "contiguous" else ""]))


def table_of(rows: Sequence[Row], found: dict[str, Distances], ms: dict[int, list[float]], ground: Ground) -> Table:
    judge, best = ground.book.judge, next(row for row in rows if row.name.startswith("best free"))
    today = free.changes(judge, found, rows[0].plan.digest)
    beside = free.changes(judge, found, best.plan.digest)
    cells = []
    for k in sorted(range(len(rows)), key=lambda k: -ms[BATCH][k]):
        row, digest = rows[k], rows[k].plan.digest
        low, high = found[digest].interval
        cells.append(
            (
                told(row),
                row.group,
                f"{len(row.plan.called)}",
                f"{ms[BATCH][k]:,.0f}",
                f"1/{ms[BATCH][0] / ms[BATCH][k]:.1f}",
                f"1/{ms[BATCH][rows.index(best)] / ms[BATCH][k]:.2f}",
                f"{ms[1][k]:,.1f}",
                f"1/{ms[1][0] / ms[1][k]:.1f}",
                f"{max(0, found[digest].value):.2f} [{max(0, low):.2f}, {max(0, high):.2f}]",
                f"{story.change_cell(today[digest])}, {today[digest].verdict(0.05)}",
                f"{story.change_cell(beside[digest])}, {beside[digest].verdict(0.05)}",
            )
        )
    columns = (
        *("", "whose", "calls", "ms, batch 64", "of DDIM-50's", "of the best free's", "ms, batch 1", "of DDIM-50's"),
        *("FD", "beside DDIM-50", "beside the best free"),
    )
    return Table(title="Fashion-MNIST 32x32: ours and others", columns=columns, rows=tuple(cells), note="")


def page(table: Table, images: int, repeats: int) -> str:
    used = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "onnxruntime", "openvino"))
    missing = "\n".join(f"- {name}: {why}." for name, why in NOT_RUN.items())
    return (
        f"# Beside others\n\nThe 32x32 pixel model of Fashion-MNIST, `python benchmarks/peers.py`: {cpu_name()}, "
        f"{torch.get_num_threads()} thread, {used}; all rows in turns in one run, median of {repeats}. FD corrected "
        f"for bias on {images:,} images of one noise; 95 % intervals, changes paired; held: no more than 5 % worse by "
        f"the whole interval. Runtimes in float32 draw their plan's pictures, to rounding, and have its distance. "
        f"T-Stitch's rule (arXiv 2402.14167): a small net, trained alone, in the first steps of the best free "
        f"sampler.\n\n"
        f"{free.markdown(table)}\n\n![Distance against time](peers.png)\n\n## Not run\n\n{missing}\n"
    )


def pareto(rows: Sequence[Row], found: dict[str, Distances], ms: list[float]) -> bytes:
    series = []
    for group in dict.fromkeys(row.group for row in rows):
        points = []
        for row, took in zip(rows, ms, strict=True):
            if row.group == group:
                one = found[row.plan.digest]
                points.append((took / BATCH, max(0.0, one.value), *(max(0.0, edge) for edge in one.interval)))
        series.append(Series(name=group, points=tuple(sorted(points)), style="group"))
    label = f"milliseconds per image (batch {BATCH}, one thread)"
    figure = Pareto(title="Distance against time", metric_label="FD", series=tuple(series), cost_label=label)
    return draw_all([figure])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("quality", "table"))
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = free.recipe_of(SIZE, ["search.reuse=0", "sample.batch=64"])
    subject = open_subject(free.MODELS[SIZE], free.DATA, recipe, watch=RichWatch())
    ground = Ground(subject, bank_of(), Path("runs/free32"), RichWatch())
    rows = rows_of(subject.reference(ground.bank), ground.bank)
    found = distances_of(rows, ground, args.images)
    if args.only == "quality":
        return
    ms = {batch: times_of(rows, batch, args.repeats) for batch in (1, BATCH)}
    text = page(table_of(rows, found, ms, ground), args.images, args.repeats)
    disk.write_text(PAGE, text)
    PAGE.with_suffix(".png").write_bytes(pareto(rows, found, ms[BATCH]))
    print(text)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
