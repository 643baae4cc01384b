"""What a second process adds to `halfstep sample`: pictures a second and processor seconds a picture, in turns.

    python benchmarks/processes.py [--count 2048] [--steps 10] [--turns 2]
    python benchmarks/processes.py --count 50000 --steps 4 --turns 1 --keep DIR     # and look at what was drawn

Each turn is the whole command, one thread a process. What begins a process (Python, torch, the model: seconds, however
many pictures there are) is measured by a run of one batch and taken off: what is left is the drawing. Processor seconds
tell more than the clock on a machine that others use too: where two processes need as many as one, they lose nothing.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from halfstep.core.machine import cpu_name


def run(out: Path, processes: int, count: int, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds by the clock, and of the processor, of one command and all that it starts."""
    words = f"sample --model {args.model} --out {out} --count {count} --steps {args.steps} --batch {args.batch}"
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "halfstep", *words.split(), "--processes", str(processes)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begun, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--count", type=int, default=2048, help="pictures of a turn")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--keep", type=Path, help="where the pictures stay; else they are deleted")
    args = parser.parse_args()
    times: dict[int, list[tuple[float, float]]] = {count: [] for count in args.processes}
    with tempfile.TemporaryDirectory() as temporary:
        place = args.keep or Path(temporary)
        idle = {n: run(place / f"start-{n}", n, n * args.batch, args) for n in args.processes}
        for turn in range(args.turns):
            for n in args.processes if turn % 2 == 0 else reversed(args.processes):
                took = run(place / f"{turn}-{n}", n, args.count, args)
                times[n].append((took[0] - idle[n][0], took[1] - idle[n][1]))
    table = Table(
        title=f"{args.count} pictures of {args.model}, {args.steps} steps, batch {args.batch}, one thread a process",
        caption=f"{cpu_name()}, torch {torch.__version__}, median of {args.turns} turns; load {os.getloadavg()[0]:.1f}",
    )
    for column in ("processes", "pictures/s", "processor ms a picture", "efficiency by the processor", "by the clock"):
        table.add_column(column, justify="right")
    wall, spent = ({n: statistics.median(one[i] for one in times[n]) for n in times} for i in (0, 1))
    first, drawn = args.processes[0], args.count
    for n in args.processes:
        less = args.count - n * args.batch
        clock = wall[first] / wall[n] * first / n * less / (drawn - first * args.batch)
        work = spent[first] / spent[n] * less / (drawn - first * args.batch)
        table.add_row(f"{n}", f"{less / wall[n]:.1f}", f"{1e3 * spent[n] / less:.1f}", f"{work:.2f}", f"{clock:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
