"""What many workers gain, and what they cost the one that asks them.

    python benchmarks/scale.py            # needs halfstep[ray]; writes benchmarks/scale.md

Scores of plans of the bundled bank on Ray workers of this machine, one and two of them with a thread each, in turns,
and in this process alone; then the driver's own work for a plan, which bounds how many workers it can feed.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import ray
import torch

from halfstep.app.searching import Ground, work_of
from halfstep.app.subject import open_subject
from halfstep.core import disk
from halfstep.core.machine import cpu_name
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import Recipe, SampleSpec
from halfstep.core.recipes import named
from halfstep.core.watch import SILENT
from halfstep.engine.cluster import LOCAL, Cluster, connected
from halfstep.engine.sampling import reference_plan
from halfstep.report.page import Table, markdown
from halfstep.search.joint import Question
from halfstep.search.scores import open_scores

SDXL_STEP = 3.31 / 30
"""Seconds of a guided step of SDXL at 1024x1024 in bfloat16 on an A100, the VAE's share within: 3.31 s of 30 steps, by
https://pytorch.org/blog/accelerating-generative-ai-3 (SDPA, not compiled)."""
STAGES = (
    *("today", "the best free", "races by fidelity", "error tables", "plans that are measured", "finalists"),
    *("today, again: choice and report", "the report's other rows"),
)
PAGE = Path(__file__).with_name("scale.md")
CPU = torch.device("cpu")


def plans_of(ground: Ground, count: int) -> list[StepPlan]:
    """Plans of six rows, each another mix of widths."""
    base = reference_plan(ground.bank, ground.subject.process, SampleSpec(scheduler="unipc", steps=6))
    names = ground.bank.computed
    return [base.with_entries([names[(k + i * (k // 4 + 1)) % len(names)] for i in range(6)]) for k in range(count)]


def scored(ground: Ground, plans: list[StepPlan], images: int, executor: Cluster | None) -> tuple[float, list[float]]:
    """Seconds of all scores, and the scores."""
    with tempfile.TemporaryDirectory() as folder:
        book = open_scores(ground.book.judge, Path(folder), executor=executor)
        begun = time.perf_counter()
        found = book.on(images, 5).many(plans, "fit")
        return time.perf_counter() - begun, found


def efficiency(ground: Ground, plans: list[StepPlan], images: int, repeats: int) -> tuple[tuple[str, ...], ...]:
    """Here alone, and by one and two workers, in turns."""
    pools = {"in this process": None, "1 worker": Throttled(1), "2 workers": Throttled(2)}
    for pool in pools.values():  # banks are shipped and opened
        scored(ground, plans[:4], 64, pool)
    took: dict[str, list[float]] = {name: [] for name in pools}
    scores = set()
    for _ in range(repeats):
        for name, pool in pools.items():
            seconds, found = scored(ground, plans, images, pool)
            took[name].append(seconds)
            scores.add(tuple(found))
    assert len(scores) == 1, "every one of them finds the same to the last bit"
    drawn, one = len(plans) * images, median(took["1 worker"])
    return tuple(
        (name, f"{median(s):.2f}", f"{drawn / median(s):.0f}", f"{one / median(s) / (2 if name[0] == '2' else 1):.2f}")
        for name, s in took.items()
    )


class Throttled(Cluster):
    """At most so many tasks at once, as if there were no more workers."""

    def __init__(self, workers: int):
        super().__init__(connected(LOCAL), CPU)
        self.task = self.task.options(num_cpus=2 / workers) if workers < 2 else self.task


def own_work(ground: Ground, plans: list[StepPlan], images: int, tasks: int) -> tuple[tuple[str, str], ...]:
    """Processor time of the driver for one plan, part by part."""
    cluster, drawer, judge = Cluster(connected(LOCAL), CPU), ground.book.judge.drawer, ground.book.judge
    cluster.submit(drawer.part, plans[0], 1, 0, 0, 0).result()  # the bank is there now
    parts = -(-images // drawer.batch)
    packed = cluster._packed((drawer.part, (plans[0], images, 0, 0, 0), {}))
    pack = per_call(lambda: cluster._packed((drawer.part, (plans[0], images, 0, 0, 0), {})), 200)
    begun, wall = time.process_time(), time.perf_counter()
    for future in [cluster.submit(len, plans[0].rows) for _ in range(tasks)]:
        future.result()
    task, rate = (time.process_time() - begun) / tasks, tasks / (time.perf_counter() - wall)
    features, _ = judge.features(plans[0], images, 3)
    distance = per_call(lambda: judge.fd(features), 20)
    digest = per_call(lambda: ground.book.digest(plans[0]), 20)
    whole = parts * (task + pack) + distance + digest
    return (
        ("a task's pickle", f"{len(packed):,} bytes, {1e6 * pack:.0f} us"),
        ("a task, asked for and taken back", f"{1e6 * task:.0f} us; {rate:,.0f} empty tasks a second by two workers"),
        (f"a distance of {images} images, {features.shape[1]} features", f"{1e3 * distance:.2f} ms"),
        ("a plan's digest", f"{1e3 * digest:.2f} ms"),
        (f"a plan of {images} images in {parts} tasks", f"{1e3 * whole:.1f} ms, or {1 / whole:.0f} plans a second"),
        ("1,000 workers are busy where a task takes", f"{1000 * whole / parts:.1f} s or more of a worker"),
    )


def of_sdxl(ground: Ground, gpus: int) -> tuple[tuple[str, ...], ...]:
    """What a search by the default recipe draws, stage by stage, and what it costs at SDXL's published step."""
    today = ground.subject.reference(ground.bank)
    dense = today.prices[today.reference].macs
    rows, whole = [], 0.0
    for what, one in zip(STAGES, work_of(Question("macs", (today.macs // 10,)), today, Recipe()), strict=True):
        calls = one.images * (one.plan.macs if one.plan is not None else one.macs) / dense
        whole += calls
        rows.append((what, f"{one.images:,}", f"{calls:,.0f}", f"{calls * SDXL_STEP / 3600:.1f}"))
    hours = whole * SDXL_STEP / 3600
    return (*rows, ("all", "", f"{whole:,.0f}", f"{hours:.0f}, or {60 * hours / gpus:.0f} min of {gpus} GPUs at work"))


def per_call(call: Callable[[], object], times: int) -> float:
    """Seconds of the processor."""
    begun = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - begun) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = named("fashion").edit(["sample.layout=contiguous"])
    with tempfile.TemporaryDirectory() as out, torch.inference_mode():
        subject = open_subject("fashion", "fashion", recipe)
        ground = Ground(subject, subject.stand_ins, Path(out), SILENT)
        plans = plans_of(ground, args.plans)
        rows = efficiency(ground, plans, args.images, args.repeats)
        sdxl = of_sdxl(ground, 64)
        driver = own_work(ground, plans, args.images, args.tasks)
    columns = ("", "seconds", "pictures a second", "of one worker's, per worker")
    title = f"{args.plans} plans of {args.images} pictures"
    tables: tuple[Table, ...] = (Table(title=title, columns=columns, rows=rows, note=""),)
    tables += (Table(title="The driver's processor time", columns=("", ""), rows=driver, note=""),)
    columns = ("", "pictures", "calls of the dense net", "GPU hours")
    title = "A search by the default recipe, one budget, of a net of SDXL's size"
    tables += (Table(title=title, columns=columns, rows=sdxl, note=""),)
    load = os.getloadavg()[0]
    told = f"{cpu_name()}, {os.cpu_count()} cores, a thread a worker, ray {ray.__version__}, load {load:.1f} at the end"
    text = f"# Scale\n\n`python benchmarks/scale.py`: {told}; median of {args.repeats} in turns.\n\n"
    disk.write_text(PAGE, text + "\n\n".join(markdown(table) for table in tables) + "\n")
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
