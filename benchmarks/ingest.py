"""A million small pictures in tars: how long until a training begins, and what memory that takes.

    python benchmarks/ingest.py make DIR [--count 1000000] [--shard 10000]   # 16x16 PNGs with classes, so many in a tar
    python benchmarks/ingest.py measure DIR/*.tar --part DIR/000000.tar      # a process for every row -> ingest.md

Wall-clock seconds hang on who else works on the machine; processor seconds, of all processes together, hardly do.
`--part`: what the slower rows are measured on.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np

from halfstep.core.machine import machine
from halfstep.report.page import Table, markdown

SIDE, BATCH = 16, 128
HERE = Path(__file__).parent
ROWS = (
    ("looked through, to be streamed", {"stream": 16384, "workers": 2}, "all"),
    ("streamed again", {"stream": 16384, "workers": 2}, "all"),
    ("batches of 128 for a training", {"stream": 16384, "workers": 1, "batches": 400}, "all"),
    ("batches of 128 for a training", {"stream": 16384, "workers": 2, "batches": 400}, "all"),
    ("decoded to the disk", {"workers": 2}, "all"),
    ("opened again", {"workers": 2}, "all"),
    ("decoded to the disk", {"workers": 0}, "part"),
    ("decoded to the disk", {"workers": 1}, "part"),
    ("decoded to the disk", {"workers": 2}, "part"),
)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(pixels: np.ndarray) -> bytes:
    """A grey PNG [S, S], as fast as it goes: Pillow takes five times as long."""
    rows = np.pad(pixels, ((0, 0), (1, 0))).tobytes()
    head = struct.pack(">2I5B", *pixels.shape[::-1], 8, 0, 0, 0, 0)
    body = zlib.compress(rows, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def make(root: Path, count: int, shard: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for begin in range(0, count, shard):
        random = np.random.default_rng(begin)
        ramps = random.integers(0, 128, (2, shard, SIDE), dtype=np.uint8)
        with tarfile.open(root / f"{begin // shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for k in range(min(shard, count - begin)):
                content = png(np.add.outer(ramps[0, k], ramps[1, k]))
                for suffix, part in (("cls", b"%d" % random.integers(10)), ("png", content)):
                    info = tarfile.TarInfo(f"{begin + k:09d}.{suffix}")
                    info.size = len(part)
                    tar.addfile(info, io.BytesIO(part))
                tar.members = []  # type: ignore[attr-defined]


def anonymous() -> int:
    """MiB of this process that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("RssAnon")), 0)


def one(source: str, how: dict) -> dict:
    """A row: what loading, and some batches where `how` says so, took in this process and its workers."""
    import halfstep.core.threads  # noqa: F401
    from halfstep.data.images import load_images
    from halfstep.data.order import BufferedOrder

    batches, peak, begun = how.pop("batches", 0), [before := anonymous()], time.perf_counter()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            peak[0] = max(peak[0], anonymous())

    threading.Thread(target=watch, daemon=True).start()
    processor = sum(os.times()[:4])
    images = load_images(source, **how)
    count = len(images)
    if batches:
        begun, processor, count = time.perf_counter(), sum(os.times()[:4]), batches * BATCH
        order = BufferedOrder(len(images), 0, images.buffer)
        for index, seen in images.coming(order.take(k * BATCH, BATCH) for k in range(batches)):
            seen.batch(index)
    seconds = time.perf_counter() - begun
    done.set()
    del images
    most = [resource.getrusage(who).ru_maxrss >> 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found = {
        "count": count,
        "seconds": seconds,
        "processor": sum(os.times()[:4]) - processor,
    }
    return found | {"grown": peak[0] - before, "resident": most[0], "worker": most[1]}


def measure(whole: str, part: str) -> None:
    cells = []
    with tempfile.TemporaryDirectory() as cache:
        for number, (name, how, which) in enumerate(ROWS):
            place = f"{cache}/part{number}" if which == "part" else f"{cache}/all"
            command = [sys.executable, __file__, "one", part if which == "part" else whole, "--how", json.dumps(how)]
            environment = {**os.environ, "HALFSTEP_CACHE": place}
            told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            row = json.loads(told.stdout.splitlines()[-1])
            rate = f"{row['count'] / row['seconds']:,.0f}"
            numbers = (f"{row['seconds']:.1f}", f"{row['processor']:.1f}", rate, f"+{row['grown']}", row["resident"])
            worker = row["worker"] if how["workers"] else "—"
            cells.append((name, f"{row['count']:,}", str(how["workers"]), *map(str, (*numbers, worker))))
            print(cells[-1], flush=True)
            write(cells)


def write(cells: list[tuple[str, ...]]) -> None:
    heads = ("", "pictures", "workers", "s", "processor s", "pictures/s", "MiB more", "MiB peak", "of a worker")
    about = machine()
    lines = [
        "# A million small pictures",
        "",
        f"`python benchmarks/ingest.py measure`: PNGs of {SIDE}x{SIDE} with their classes. {about['cpu']}, "
        f"{about['cores']} cores, torch {about['torch']}, load {os.getloadavg()[2]:.1f} over the last 15 minutes.",
        "",
        markdown(Table(title="", columns=heads, rows=tuple(cells))),
        "",
        "MiB more: memory of no file that the first process took beyond its imports. MiB peak: its largest resident",
        "set, libraries and mapped files with it. Processor seconds are those of all processes.",
    ]
    (HERE / "ingest.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "measure", "one"))
    parser.add_argument("place", help="a folder to make, or a tar, a folder or a glob of them")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--shard", type=int, default=10_000)
    parser.add_argument("--part")
    parser.add_argument("--how", type=json.loads, default={})
    given = parser.parse_args()
    if given.what == "make":
        make(Path(given.place), given.count, given.shard)
    elif given.what == "measure":
        measure(f"tar:{given.place}", f"tar:{given.part or given.place}")
    else:
        print(json.dumps(one(given.place, given.how)))


if __name__ == "__main__":
    main()
