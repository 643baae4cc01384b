"""What a verb is about to do and how long that takes here, told before it begins: `will draw 38,400 images …`.

A guess, of prices that were timed or from timing a call of each network for a moment; the scheduler's own work and
scoring are left out. Work of a few seconds is not announced.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from halfstep.core.plan import StepPlan
from halfstep.core.watch import Watch
from halfstep.engine.bank import Bank
from halfstep.engine.profiling import TIMED_BATCH, example_inputs
from halfstep.nets.denoiser import Memo, predictor

LEAST_SECONDS = 5.0
"""Below this nothing is told."""
TIMING_SECONDS = 1.0
"""What all of the calibrating timings may take together."""
EFFICIENCY, WORST_EFFICIENCY = 0.25, 0.02
"""Of a network's MACs per second beside one large matrix product's, before it was timed: usual, and of tiny nets."""
CALL_SECONDS = 0.004
"""What a call may take beside its MACs, its layers one by one; a training step three times that."""
TRAINING = 3
"""A training step costs about three calls: the gradients of the weights and of the activations are one each."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """`images` drawn, each as `plan` says, or by so many MACs (of a stage with many plans, their mean)."""

    images: int
    plan: StepPlan | None = None
    macs: int = 0


@dataclass(frozen=True, kw_only=True)
class Training:
    """`steps` training steps of `batch` images: nets that are trained, and those that only teach, by their entries."""

    steps: int
    batch: int
    trained: tuple[str, ...]
    teachers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """In all: images drawn, network calls for them (of MACs: so many of the reference), in how many stages, training
    steps, seconds. `where`: what the seconds are of."""

    images: int
    calls: int
    stages: int
    steps: int
    batch: int
    seconds: float
    where: str
    doing: str = "draw"

    def __str__(self) -> str:
        told = []
        if self.steps:
            told.append(f"train {self.steps:,} steps of {self.batch:,} images")
        if self.images:
            stages = f" in {self.stages} stages" if self.stages > 1 else ""
            told.append(f"{self.doing} {self.images:,} images{stages}")
        return f"will {' and '.join(told)}: about {_span(self.seconds)} {self.where}"


def estimate(
    bank: Bank, work: Sequence[Drawing | Training], *, us: Mapping[str, float] | None = None, batch: int = TIMED_BATCH
) -> Estimate:
    """What `work` with a bank's networks takes where the bank lies now.

    `us`: microseconds of one call of an entry, per image; of those that it lacks the bank's prices are asked, and what
    these do not know is timed at `batch` images or fewer, in `TIMING_SECONDS` in all. Of a plan the calls that differ
    from an entry of the bank count by their MACs.
    """
    drawings = [one for one in work if isinstance(one, Drawing)]
    trainings = [one for one in work if isinstance(one, Training)]
    named = {bank.reference, *(n for one in drawings if one.plan for n in one.plan.nets)}
    named |= {name for one in trainings for name in (*one.trained, *one.teachers)}
    prices = bank.prices()
    known = {name: float(price.us) for name, price in prices.items() if price.us is not None} | dict(us or {})
    known |= _timed(bank, [name for name in bank if name in named - set(known)], batch)
    per_mac = known[bank.reference] / prices[bank.reference].macs

    def call(name: str, macs: int) -> float:
        return known.get(name, macs * per_mac)

    seconds, calls = 0.0, 0.0
    for one in drawings:
        if one.plan:
            each = sum(call(name, one.plan.prices[name].macs) for name in one.plan.called)
        else:
            each = one.macs * per_mac
        seconds += one.images * each / 1e6
        calls += one.images * (len(one.plan.called) if one.plan else one.macs / prices[bank.reference].macs)
    for two in trainings:
        passes = sum(TRAINING * known[name] for name in two.trained) + sum(known[name] for name in two.teachers)
        seconds += two.steps * two.batch * passes / 1e6
    return Estimate(
        images=sum(one.images for one in drawings),
        calls=round(calls),
        stages=len(drawings),
        steps=sum(one.steps for one in trainings),
        batch=max((one.batch for one in trainings), default=0),
        seconds=seconds,
        where=_where(bank.device),
    )


def announce(
    watch: Watch,
    bank: Bank,
    work: Sequence[Drawing | Training],
    *,
    us: Mapping[str, float] | None = None,
    batch: int = TIMED_BATCH,
    doing: str = "draw",
) -> None:
    """Say what is about to be done, unless it takes a moment. `doing`: what is done with the images, if not that.

    Nothing is timed where the MACs alone say that it is a moment, on any machine that multiplies as fast as this one.
    """
    if _at_most(bank, work, batch) < LEAST_SECONDS:
        return
    found = replace(estimate(bank, work, us=us, batch=batch), doing=doing)
    if found.seconds >= LEAST_SECONDS:
        watch.say(str(found))


def _at_most(bank: Bank, work: Sequence[Drawing | Training], batch: int) -> float:
    """Seconds that work surely stays below, by its MACs and its number of calls."""
    prices, macs, calls = bank.prices(), 0.0, 0.0
    for one in work:
        if isinstance(one, Drawing):
            each = one.plan.macs if one.plan else one.macs
            macs += one.images * each
            calls += -(-one.images // batch) * (len(one.plan.called) if one.plan else 1)
        else:
            passes = [TRAINING * prices[name].macs for name in one.trained] + [prices[n].macs for n in one.teachers]
            macs += one.steps * one.batch * sum(passes)
            calls += one.steps * (TRAINING * len(one.trained) + len(one.teachers))
    return macs / (_product_rate(bank.device, bank.dtype) * WORST_EFFICIENCY) + calls * CALL_SECONDS


def _span(seconds: float) -> str:
    """As one says it: 40 s, 3 min, 2.5 h; no finer than the guess is."""
    if seconds < 90:
        return f"{max(1, round(seconds / 5) * 5 if seconds >= 10 else round(seconds))} s"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.2g} h" if seconds < 100 * 3600 else f"{seconds / 86400:.0f} days"


def _where(device: torch.device) -> str:
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"on this machine ({threads} thread{'s' * (threads > 1)})"
    return f"on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"on {device}"


def _timed(bank: Bank, names: Collection[str], batch: int) -> dict[str, float]:
    """Microseconds per image of one call of each, from a call to get warm and one to three that count.

    A network whose MACs say that even one image would take too long is not run: they are all that is known of it.
    """
    if not names:
        return {}
    prices, rate = bank.prices(), _product_rate(bank.device, bank.dtype) * EFFICIENCY
    turn = TIMING_SECONDS / len(names) / 3
    found: dict[str, float] = {}
    for name in bank.computed:
        if name not in names:
            continue
        at_once = min(batch, int(turn * rate / max(1, prices[name].macs)))
        found[name] = _call_us(bank[name], at_once, turn, bank.tokens) if at_once else prices[name].macs / rate * 1e6
    for name in set(names) - set(found):  # a reused pass runs only behind a whole one: its share of that
        source = bank.entries[name].weights.of or bank.reference
        of = found.get(source, prices[source].macs / rate * 1e6)
        found[name] = of * prices[name].macs / prices[source].macs
    return found


@torch.no_grad()
def _call_us(model: Any, batch: int, seconds: float, tokens: int | None = None) -> float:
    """Microseconds per image of a model's call, the median of those that fit into so many seconds."""
    call, inputs = predictor(model), example_inputs(model, batch, tokens=tokens)
    took: list[float] = []
    begun = time.perf_counter()
    for turn in range(4):
        before = time.perf_counter()
        call(*inputs, Memo())
        if inputs.sample.device.type == "cuda":
            torch.cuda.synchronize(inputs.sample.device)
        now = time.perf_counter()
        if turn or now - begun > 2 * seconds:  # the first one loads and plans
            took.append(now - before)
        if took and now - begun > 2 * seconds:
            break
    return statistics.median(took) / batch * 1e6


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """MACs per second of one large matrix product, the better of two: what this device can do at most."""
    side = 512 if device.type == "cpu" else 4096
    a = torch.ones(side, side, device=device, dtype=dtype)
    took = []
    for _ in range(3):
        begun = time.perf_counter()
        (a @ a)[0, 0].item()
        took.append(time.perf_counter() - begun)
    return side**3 / min(took)
