"""What waiting asleep saves beside another busy process, and what it costs alone (`halfstep.core.threads`).

    python benchmarks/waiting.py [--model benchmarks/models/fashion16-dense] [--repeats 15] [--batch 64]

One call of the model's quarter-width net, by processes that differ only in their threads and in how these wait. The
processes take turns call by call, so that whatever else the machine does slows all of them alike; then the same again
beside one process that counts in a loop. The load of the machine before either is printed with the table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from statistics import median, quantiles

from rich.console import Console
from rich.table import Table

KINDS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads, as OpenMP comes": {"OMP_NUM_THREADS": "2"},
    "2 threads, passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    "2 threads, as here": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"},
    "2 threads, a longer spin": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5000"},
}


def work(model: str, batch: int) -> None:
    """The measured process: a call for every line read, its milliseconds on a line of their own."""
    import torch  # here, and not above: the process that counts the turns must not load OpenMP

    from halfstep.core.recipe import SlimSpec
    from halfstep.engine.profiling import example_inputs
    from halfstep.methods.slimmable import supernet_of
    from halfstep.nets.denoiser import Memo, predictor
    from halfstep.nets.models import load_denoiser

    net = supernet_of(load_denoiser(model)[0], SlimSpec(widths=(0.25,))).subnet(0.25).eval()
    predict, inputs = predictor(net), example_inputs(net, batch)
    with torch.no_grad():
        predict(*inputs, Memo())
        for _ in sys.stdin:
            begun = time.perf_counter()
            predict(*inputs, Memo())
            print(1e3 * (time.perf_counter() - begun), flush=True)


def started(environment: dict[str, str], model: str, batch: int) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, __file__, "--work", "--model", model, "--batch", str(batch)]
    return subprocess.Popen(command, env=clean | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def turns(processes: dict[str, subprocess.Popen[str]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of `repeats` calls of each process, in turns; the first two do not count."""
    times: dict[str, list[float]] = {name: [] for name in processes}
    for turn in range(repeats + 2):
        for name, process in processes.items():
            assert process.stdout is not None, "a pipe"
            print(file=process.stdin, flush=True)
            took = float(process.stdout.readline())
            if turn > 1:
                times[name].append(took)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="benchmarks/models/fashion16-dense")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.model, args.batch)
        return
    processes = {name: started(environment, args.model, args.batch) for name, environment in KINDS.items()}
    table = Table(title="One call, ms: median (quartiles)")
    for column in ("the machine", "load before", *KINDS):
        table.add_column(column, justify="right")
    for where in ("as it is", "and one busy process"):
        load = os.getloadavg()[0]
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if where != "as it is" else None
        try:
            times = turns(processes, args.repeats)
        finally:
            if busy:
                busy.kill()
                busy.wait()
        low, high = ({name: quantiles(t)[k] for name, t in times.items()} for k in (0, 2))
        cells = (f"{median(t):,.1f} ({low[name]:,.1f} … {high[name]:,.1f})" for name, t in times.items())
        table.add_row(where, f"{load:.1f}", *cells)
    for process in processes.values():
        process.communicate()
    table.caption = f"{args.model} at a quarter of its width, batch {args.batch}, {args.repeats} calls each in turns"
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
