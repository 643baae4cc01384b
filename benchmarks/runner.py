"""The runner beside the pipeline: from a command to the first picture, in turns, and the bytes that each installs.

    python benchmarks/runner.py [--model fashion] [--rounds 10]

Both draw one picture of the same plan, in a fresh process with one thread; seconds by the clock, which other work
stretches, and of the processor, which it does not. Bytes: of every distribution that the one
and the other wants, with what those want, as installed here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PIPELINE = """
import sys
from halfstep.engine.stepaware import StepAwarePipeline
pipe = StepAwarePipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
pipe(batch_size=1, seed=0).images[0].save(sys.argv[2])
"""


def closure(*names: str) -> set[str]:
    """The distributions that these want, themselves among them, on this machine."""
    found: set[str] = set()
    queue = list(names)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found:
            continue
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        asked = map(Requirement, wanted)
        queue += [one.name for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def installed(names: set[str]) -> int:
    """Bytes of the files of these distributions."""
    files = {Path(file.locate()).resolve() for name in names for file in importlib.metadata.files(name) or ()}
    return sum(file.stat().st_size for file in files if file.is_file())


def seconds(command: list[str]) -> tuple[float, float]:
    """Of a command, by the clock and of the processor."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begun, spent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--steps", default="10")
    parser.add_argument("--rounds", type=int, default=10)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        pipe, graphs = f"{place}/pipe", f"{place}/onnx"
        for to, out in (("diffusers", pipe), ("onnx", graphs)):
            said = [
                "export",
                asked.model,
                "--steps",
                asked.steps,
                "--scheduler",
                "dpmsolver++",
                "--to",
                to,
                "--out",
                out,
            ]
            seconds([sys.executable, "-m", "halfstep", *said])
        rows = {
            "pipeline": [sys.executable, "-c", PIPELINE, pipe, f"{place}/one.png"],
            "runner": [sys.executable, str(ROOT / "runner/halfstep_run.py"), graphs, "--count", "1", "--threads", "1",
                       "--out", f"{place}/pics"],
        }  # fmt: skip
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
        for k in range(asked.rounds + 1):
            for name, command in rows.items():
                spent = seconds(command)
                if k:  # the first round reads files into memory
                    times[name].append(spent)
    wants = {"pipeline": closure("torch", "diffusers", "accelerate", "safetensors", "pillow")}
    wants["runner"] = closure("numpy", "onnxruntime")
    wants["halfstep whole"] = closure("halfstep")
    for k, told in enumerate(("by the clock", "of the processor")):
        for name, both in times.items():
            some = [one[k] for one in both]
            middle, span = statistics.median(some), f"{min(some):.2f} to {max(some):.2f}"
            print(f"{name}: first picture after {middle:.2f} s {told} ({span})")
        pairs = zip(times["pipeline"], times["runner"], strict=True)
        ratio = statistics.median(b[k] / a[k] for a, b in pairs)
        print(f"ratio of a round {told}, median of {asked.rounds}: {ratio:.3f}")
    sizes = {name: installed(names) for name, names in wants.items()}
    for name, size in sizes.items():
        print(f"{name}: {size / 1e6:.0f} MB installed, {len(wants[name])} distributions")
    for name in ("pipeline", "halfstep whole"):
        print(f"ratio to {name}: {sizes['runner'] / sizes[name]:.3f}")


if __name__ == "__main__":
    main()
