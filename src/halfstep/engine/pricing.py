"""Prices in microseconds, measured here: one call of every entry, and what a trajectory costs beside its calls.

A plan's time is predicted as the sum of its calls and its fixed part. Times hold for one setting alone (device,
processor, threads, precision, images of a batch, memory layouts, version of torch): a `PriceList` says which, and is
measured again where it is another.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch

from halfstep.core import disk
from halfstep.core.errors import PlanError
from halfstep.core.machine import cpu_name
from halfstep.core.plan import Price, StepPlan
from halfstep.core.typed import Bounds
from halfstep.core.watch import SILENT, Watch
from halfstep.engine.bank import Bank, calls_of
from halfstep.engine.networks import RowCall, networks_of
from halfstep.engine.profiling import example_inputs, interleave
from halfstep.engine.samplers import noise_scale
from halfstep.engine.sampling import build_scheduler, image_generators, last, start_noise, to_images, walk
from halfstep.nets.denoiser import sample_shape

Clock = Callable[[], float]
"""Seconds since some moment."""

REPEATS, WARMUP = 10, 2
"""Calls of every entry that count, and those before that do not."""


def timed_prices(
    bank: Bank, batch: int, *, repeats: int = REPEATS, warmup: int = WARMUP, clock: Clock = time.perf_counter
) -> dict[str, Price]:
    """What one call of every entry costs per image: MACs, and microseconds in a call of `batch` images, where the bank
    is, in the layouts that it is in. Taken in turns."""
    times = interleave(calls_of(bank, batch), repeats=repeats, warmup=warmup, clock=clock)
    return {name: Price(price.macs, 1e3 * typical(times[name]) / batch) for name, price in bank.prices().items()}


def typical(times: Sequence[float]) -> float:
    """Their mean without the fastest and the slowest tenth, at least one of each where there are three: what adds up.
    Medians of many short calls fall short of what one long trajectory takes on a machine that is now and then busy."""
    cut = max(1, len(times) // 10) if len(times) > 2 else 0
    return fmean(sorted(times)[cut : len(times) - cut])


def drawing(bank: Bank, plan: StepPlan, batch: int) -> torch.Tensor:
    """One whole batch of a plan, from its noise to its pictures, [batch,C,H,W]: what is timed."""
    return to_images(bank, ended(bank, plan, batch, networks_of(bank, plan)))


def ended(bank: Bank, plan: StepPlan, batch: int, networks: Sequence[RowCall]) -> torch.Tensor:
    """Where a batch of a plan ends under these networks, one a row, not decoded."""
    generators = image_generators(0, 0, batch)
    noise = start_noise(bank, generators)
    scheduler = build_scheduler(plan, noise.device)
    start = noise * noise_scale(scheduler)
    cond = example_inputs(bank[bank.reference], batch, tokens=bank.tokens).cond
    return last(walk(networks, plan.rows, scheduler, start, generators, cond))


def walk_us(bank: Bank, plan: StepPlan, batch: int, clock: Clock = time.perf_counter) -> float:
    """Microseconds per image of a trajectory beside its calls and its decoding: noise, set-up and steps of the
    scheduler, guides' and corrections' arithmetic. It is walked with networks that cost nothing: they predict zeros."""
    zeros = torch.zeros(sample_shape(bank.config, batch), device=bank.device, dtype=bank.dtype)
    free: list[RowCall] = [lambda sample, timestep, cond, memo: (zeros, zeros)] * len(plan.rows)
    return _typical_us(partial(ended, bank, plan, batch, free), batch, clock)


def pictures_us(bank: Bank, batch: int, clock: Clock = time.perf_counter) -> float:
    """Microseconds per image of what a batch becomes at its end: decoded, where the bank works on latents."""
    zeros = torch.zeros(sample_shape(bank.config, batch), device=bank.device, dtype=bank.dtype)
    return _typical_us(partial(to_images, bank, zeros), batch, clock)


def _typical_us(call: Callable[[], object], batch: int, clock: Clock) -> float:
    with torch.no_grad():
        times = interleave({"it": call}, repeats=5, warmup=1, clock=clock)
    return 1e3 * typical(times["it"]) / batch


def predicted_ms(plan: StepPlan, batch: int) -> float:
    """Milliseconds of one batch of a priced plan: of all its calls and of its fixed part. Raises PlanError for a plan
    whose prices are without times."""
    if plan.whole.us is None:
        raise PlanError(
            got="a plan without times",
            expected="prices that were measured here",
            where="predicted time",
            do="price it with PriceBook.priced",
        )
    return plan.whole.us * batch / 1e3


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how times were measured."""

    device: str
    cpu: str
    threads: int
    dtype: str
    batch: int
    torch: str
    layouts: dict[str, str]
    runtimes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, bank: Bank, batch: int) -> Setting:
        """That of a bank as it is, here and now."""
        device = bank.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        return cls(
            device=f"{device.type}: {name}" if name else device.type,
            cpu=cpu_name(),
            threads=torch.get_num_threads(),
            dtype=str(bank.dtype).removeprefix("torch."),
            batch=batch,
            torch=torch.__version__,
            layouts=dict(bank.layouts()),
            runtimes={name: backend for name, backend in bank.runtimes().items() if backend != "eager"},
        )

    def changes(self, now: Setting) -> list[str]:
        """What is another now, in words: "threads 2, not 1"."""
        told = []
        for item in dataclasses.fields(self):
            before, after = getattr(self, item.name), getattr(now, item.name)
            if item.name == "layouts":  # entries come and go; what matters is how those that stay lie
                moved = [f"{name} {after[name]}" for name in after if name in before and before[name] != after[name]]
                told += [f"layout of {', '.join(moved)}"] if moved else []
            elif item.name == "runtimes":  # those that are not told of are eager
                both = {name: (before.get(name, "eager"), after.get(name, "eager")) for name in now.layouts}
                moved = [f"{name} {one}" for name, (was, one) in both.items() if name in self.layouts and was != one]
                told += [f"runtime of {', '.join(moved)}"] if moved else []
            elif before != after:
                told.append(f"{item.name} {after}, not {before}")
        return told


Micros = Annotated[float, Bounds(0, 1e15)]


@dataclass(frozen=True, kw_only=True)
class PriceList:
    """state/prices.json: per image, one call of every entry; `fixed`, the microseconds of a trajectory beside its calls
    by `PriceBook.key`, and those of its pictures at the end, which no sampler changes; and the setting in which all of
    it was measured."""

    setting: Setting
    prices: dict[str, Price]
    fixed: dict[str, Micros] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        record = dataclasses.asdict(self)
        return record | {"prices": {name: price.to_json() for name, price in self.prices.items()}}


class PriceBook:
    """The prices of a bank at one batch: measured once, kept in a file, measured again where they no longer hold.

    Raises RunError for a file that holds something else.
    """

    def __init__(
        self,
        bank: Bank,
        batch: int,
        file: Path | None = None,
        *,
        watch: Watch = SILENT,
        clock: Clock = time.perf_counter,
    ):
        self.bank, self.batch, self.file, self.clock = bank, batch, file, clock
        self._list = self._opened(watch)

    @property
    def prices(self) -> Mapping[str, Price]:
        """Of one call of every entry, per image."""
        return {name: self._list.prices[name] for name in self.bank}

    @property
    def setting(self) -> Setting:
        return self._list.setting

    def fixed(self, plan: StepPlan) -> Price:
        """What a trajectory of the plan costs per image beside its calls; measured on the first call for its sampler
        and its numbers of guided and corrected rows; its decoding, which is dear and the same for all, once."""
        key, told = f"{self.key(plan)} before pictures", "pictures"
        walked = self._fixed(key, lambda: walk_us(self.bank, plan, self.batch, self.clock))
        made = self._fixed(told, lambda: pictures_us(self.bank, self.batch, self.clock))
        return Price(self.bank.fixed().macs, walked + made)

    def _fixed(self, key: str, measure: Callable[[], float]) -> float:
        """A fixed part by its name, measured on the first call for it."""
        if key not in self._list.fixed:
            self._keep(replace(self._list, fixed={**self._list.fixed, key: round(measure(), 3)}))
        return self._list.fixed[key]

    def priced(self, plan: StepPlan) -> StepPlan:
        """The same plan with these prices, and with its fixed part."""
        return replace(plan, prices=self.prices, fixed=self.fixed(plan))

    @staticmethod
    def key(plan: StepPlan) -> str:
        """What a plan's fixed part hangs on, in words, with a digest of the sampler's config."""
        text = json.dumps(plan.sampler.to_json(), sort_keys=True, default=str)
        counts = {"guided": sum(map(bool, plan.guides)), "corrected": sum(row.corrected for row in plan.rows)}
        told = [plan.sampler.told, *(f"{count} {what}" for what, count in counts.items() if count)]
        return f"{', '.join(told)} [{sha256(text.encode()).hexdigest()[:8]}]"

    def _opened(self, watch: Watch) -> PriceList:
        now, do = Setting.of(self.bank, self.batch), "delete it to measure anew"
        if self.file is not None and self.file.exists():
            known = disk.read_record(self.file, PriceList, what="prices", do=do)
            reasons = known.setting.changes(now) + self._missing(known)
            if not reasons:
                return known
            watch.say(f"prices are measured again: {'; '.join(reasons)}")
        found = PriceList(setting=now, prices=timed_prices(self.bank, self.batch, clock=self.clock))
        self._keep(found)
        return found

    def _missing(self, known: PriceList) -> list[str]:
        """What a list does not have, or has of another network, in words."""
        macs = {name: price.macs for name, price in self.bank.prices().items()}
        lacking = [name for name in macs if name not in known.prices or known.prices[name].us is None]
        other = [name for name in macs if name not in lacking and known.prices[name].macs != macs[name]]
        told = {"no price of": lacking, "another network is": other}
        return [f"{what} {', '.join(names)}" for what, names in told.items() if names]

    def _keep(self, found: PriceList) -> None:
        self._list = found
        if self.file is not None:
            disk.write_json(self.file, found.to_json())
