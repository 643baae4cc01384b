"""Which runtime each entry of a bank runs by on this machine: measured once, kept with the run, said in words."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from halfstep.core import disk
from halfstep.core.errors import HalfstepError, ModelError
from halfstep.core.recipe import RuntimeName
from halfstep.core.watch import SILENT, Watch
from halfstep.engine.bank import Bank, calls_of
from halfstep.engine.entry import Backend, Half, Int8, Reuse, Runtime
from halfstep.engine.pricing import Setting
from halfstep.engine.profiling import example_inputs
from halfstep.engine.runtime import PACKAGES, Tried, backends_for, fastest, held, installed, ready


@dataclass(frozen=True, kw_only=True)
class Runtimes:
    """state/runtimes.json: what runs every entry, what was tried for each, and the setting and the versions of what
    runs nets beside PyTorch in which that was found."""

    entries: dict[str, Backend]
    tried: dict[str, tuple[Tried, ...]]
    setting: Setting
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Trials:
    """What became of every runtime that is installed: by entry and batch, and the setting of it all."""

    tried: dict[str, dict[int, list[Tried]]]
    setting: Setting

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def settle_runtimes(
    bank: Bank,
    file: Path | None,
    asked: RuntimeName,
    batch: int,
    more: Iterable[int] = (),
    *,
    watch: Watch = SILENT,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Have every entry run by what is asked for, in the layouts that they are in. "auto" is the fastest at `batch`
    images of those that are installed; what was measured once is kept in `file` and holds for this machine, its
    setting and its versions: elsewhere it is measured again, which `watch` is told. `more`: other sizes of batches that
    will be run.

    Raises ModelError for a backend asked for by name that is not installed, does not take a net or strays from eager;
    RunError for a file that holds something else.
    """
    sizes = [size * times for size in (batch, *more) for times in ((1,) if bank.null is None else (1, 2))]
    if asked == "auto":
        found = _known(bank, file, batch, watch) or _measured(bank, file, batch, sizes, watch, clock)
        bank.set_runtimes({name: found.entries[name] for name in bank.computed}, sizes)
        return
    halves = [name for name in bank.computed if isinstance(bank.entries[name].weights, Half) and asked in PACKAGES]
    if halves:
        watch.say(f"{', '.join(halves)} run by PyTorch: graphs for {asked} are of float32")
    simulated = [name for name in bank.computed if isinstance(bank.entries[name].weights, Int8)]
    if simulated and asked not in PACKAGES:
        watch.say(f"{', '.join(simulated)}: PyTorch only simulates eight bits; {' or '.join(PACKAGES)} compute in them")
    names = [name for name in bank.computed if name not in halves]
    by: dict[str, Backend] = {name: "eager" if name in halves else asked for name in bank.computed}
    bank.set_runtimes(by, sizes)
    if asked != "eager":
        for name in names:
            _require_stands(bank, name, asked, batch)


def _require_stands(bank: Bank, name: str, asked: Backend, batch: int) -> None:
    entry = bank.entries[name]
    ready(entry)  # refuses what is not installed
    tried = held(entry, entry.runtime, example_inputs(entry.model, batch, tokens=bank.tokens))
    if tried.dropped:
        raise ModelError(
            got=f"entry {name!r} by {asked}: {tried.dropped}",
            expected="its eager prediction",
            where="runtime",
            do="take --runtime eager, or auto, which drops what fails",
        )


def tried_runtimes(
    bank: Bank,
    name: str,
    batch: int,
    sizes: Iterable[int] = (),
    *,
    clock: Callable[[], float] = time.perf_counter,
    repeats: int = 7,
) -> tuple[Runtime, list[Tried]]:
    """The fastest runtime here of a computed entry at `batch` images, and what became of the others; `sizes`: of other
    batches that it will be run with."""
    batches, entry = tuple(sorted({batch, *sizes})), bank.entries[name]
    others = [one for one in backends_for(entry) if one != "eager"]
    candidates = [replace(entry.runtime, backend=one, batches=batches) for one in others]
    return fastest(entry, candidates, batch, tokens=bank.tokens, repeats=repeats, clock=clock)


def _measured(
    bank: Bank, file: Path | None, batch: int, sizes: Iterable[int], watch: Watch, clock: Callable[[], float]
) -> Runtimes:
    others = [one for one in backends_for(bank.entries[bank.reference]) if one != "eager"]
    missing = [one for one in PACKAGES if bank.device.type == "cpu" and not installed(one)]
    lacking = f"; not installed: {', '.join(f'halfstep[{one}]' for one in missing)}" if missing else ""
    watch.say(f"trying {', '.join(others)} for every entry, up to a minute each{lacking}")
    found = {}
    for name in bank.computed:
        best, tried = found[name] = tried_runtimes(bank, name, batch, sizes, clock=clock)
        watch.say(f"{name} runs by {best.backend}: {'; '.join(map(str, tried))}")
    chosen: dict[str, Backend] = {name: best.backend for name, (best, _) in found.items()}
    chosen |= dict.fromkeys(_untaken(bank, chosen, batch, sizes, watch), "eager")
    record = Runtimes(
        entries=chosen,
        tried={name: tuple(tried) for name, (_, tried) in found.items()},
        setting=_setting(bank, batch),
        versions=_versions(),
    )
    if file is not None:
        disk.write_json(file, asdict(record))
    return record


def _untaken(
    bank: Bank, chosen: Mapping[str, Backend], batch: int, sizes: Iterable[int], watch: Watch
) -> dict[str, None]:
    """The entries whose features cannot be reused by what runs them fastest."""
    bank.set_runtimes(chosen, sizes)
    found: dict[str, None] = {}
    for name, call in calls_of(bank, batch).items():
        link = bank.entries[name].weights
        if isinstance(link, Reuse) and link.of not in found:
            try:
                call()
            except HalfstepError as error:
                watch.say(f"{link.of} runs eagerly: {error}")
                found[link.of] = None
    return found


def _known(bank: Bank, file: Path | None, batch: int, watch: Watch) -> Runtimes | None:
    """What was measured before, where it holds here and now."""
    if file is None or not file.exists():
        return None
    found = disk.read_record(file, Runtimes, what="runtimes", do="delete it to choose them anew")
    now = _versions()
    reasons = found.setting.changes(_setting(bank, batch))
    reasons += [f"{name} {now.get(name)}, not {one}" for name, one in found.versions.items() if now.get(name) != one]
    reasons += [f"{name} {now[name]}, new" for name in now if name not in found.versions]
    lacking = [name for name in bank.computed if name not in found.entries]
    reasons += [f"none of {', '.join(lacking)}"] if lacking else []
    if reasons:
        watch.say(f"runtimes are measured again: {'; '.join(reasons)}")
        return None
    return found


def _setting(bank: Bank, batch: int) -> Setting:
    """Where they are chosen, whatever runs the entries at the moment."""
    return replace(Setting.of(bank, batch), runtimes={})


def _versions() -> dict[str, str]:
    there = dict.fromkeys(package for one, packages in PACKAGES.items() if installed(one) for package in packages)
    return {package: importlib.metadata.version(package) for package in there}
