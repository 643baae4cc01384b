"""Memory layouts: which one an entry runs faster in on this machine, chosen once and kept with the run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from halfstep.core import disk
from halfstep.core.errors import RunError
from halfstep.core.machine import cpu_name
from halfstep.core.typed import typed
from halfstep.engine.bank import Bank
from halfstep.engine.entry import LAYOUTS
from halfstep.engine.profiling import TIMED_BATCH, Layout, call_times


def fastest_layouts(bank: Bank, batch: int, repeats: int = 5) -> dict[str, Layout]:
    """Which memory layout each entry runs faster in here, "contiguous" or "channels_last", timed in turns.

    It differs between processors and between widths: up to a third of an entry's time. Entries that share their weights
    in memory share the layout too: the one in which they are faster together.
    """
    found: dict[str, Layout] = {}
    for names in bank.in_one_memory():
        total = dict.fromkeys(LAYOUTS, 0.0)
        for name in (name for name in names if name in bank.computed):  # what reuses features is as their source
            both: dict[str, Any] = {
                layout: copy.deepcopy(bank[name]).to(memory_format=kind) for layout, kind in LAYOUTS.items()
            }
            times = call_times(both, batch=batch, repeats=repeats)
            for layout in LAYOUTS:
                total[layout] += median(times[layout])
        found |= dict.fromkeys(names, min(total, key=lambda layout: total[layout]))
    return {name: found[name] for name in bank}


@dataclass(frozen=True, kw_only=True)
class Layouts:
    """state/layouts.json: the memory layout of every entry, and the setting in which the faster one was found."""

    entries: dict[str, Layout]
    device: str
    batch: int
    threads: int
    cpu: str


def settle_layouts(bank: Bank, file: Path, asked: Layout | Literal["auto"]) -> None:
    """Put every entry into the layout asked for. "auto" is its fastest; what was measured once holds for the run, whose
    last digits hang on it, and is kept in `file`. Raises RunError for a file that holds something else."""
    if asked != "auto":
        bank.set_layouts(dict.fromkeys(bank, asked))
        return
    known: Mapping[str, Layout] = _read(file) if file.exists() else {}
    if not set(bank.computed) <= set(known):
        known = fastest_layouts(bank, TIMED_BATCH)
        threads, device = torch.get_num_threads(), str(bank.device)
        found = Layouts(entries=dict(known), device=device, batch=TIMED_BATCH, threads=threads, cpu=cpu_name())
        disk.write_json(file, asdict(found))
    bank.set_layouts({name: known[name] for name in bank.computed})


def _read(file: Path) -> Mapping[str, Layout]:
    """The layouts of entries; those of before 2026-11-26 stand alone in their file."""
    do = "delete it to choose them anew"
    record = disk.read_json(file, what="layouts", do=do)
    found = typed(record, Layouts | dict[str, Layout], "", file, error=RunError, do=do)
    return found.entries if isinstance(found, Layouts) else found
