"""Numbers that carry their unit, their n, their interval and how they were taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfstep import disk
from halfstep.errors import RunError
from halfstep.typed import build, shown, typed


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one denoiser, or one whole plan, costs per image.

    `macs`: multiply-accumulates per image (1 MAC = 2 FLOPs); for a plan, summed over its steps.
    `latency_ms`: median milliseconds per call at `batch`; None where it was not measured.
    `latency_spread_ms`: half the distance between the quartiles of those calls.
    `peak_mib`: peak extra memory of one call, MiB; None where it was not measured.
    `stored_mib`: MiB of weights of its own on disk; 0 where it shares another entry's, None where unknown.
    """

    macs: int
    params: int
    latency_ms: float | None = None
    latency_spread_ms: float | None = None
    peak_mib: float | None = None
    stored_mib: float | None = None
    batch: int | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    layout: str | None = None
    backend: str = "eager"

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, object], *, where: object = "cost.json") -> Cost:
        """Rebuild a cost. Raises RunError."""
        return build(cls, record, "", where, error=RunError)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One measured quality number.

    `metric`: "fd" (Fréchet distance), "kid", "precision", "recall", "density" or "coverage".
    `low`, `high`: 95 % bootstrap interval over the generated images.
    `n`: generated images; `n_reference`: real images.
    `features`: name of the feature network; two values with different ones must never be compared.
    `reference`: fingerprint of the real images.
    `raw`: of a Fréchet distance, as measured; `value` is corrected for bias. None elsewhere, and in results of before.
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
    n_reference: int
    features: str
    reference: str
    seed: int
    raw: float | None = None

    @property
    def lower_is_better(self) -> bool:
        return self.metric in ("fd", "kid")

    def comparable(self, other: Quality) -> bool:
        """Whether the two numbers may stand in one table."""
        mine = (self.metric, self.features, self.reference, self.n)
        return mine == (other.metric, other.features, other.reference, other.n)

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Final:
    """The best plan of one number of steps: its score on fresh seeds, and MACs per image and trajectory."""

    score: float
    macs: int


@dataclass(frozen=True, kw_only=True)
class GridScores:
    """grid.json: the score of every weight of a penalty, by its entry "r=0.1", and of the plain training's controls."""

    images: int
    scores: dict[str, float]
    controls: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What n perfect draws from the real images score, by chance alone (`quality.floor`).

    `raw`: in the mean, before the correction.  `high`: corrected, 95 of 100 sets of draws stay below.  `fresh`: as
    `raw`, for fresh real images that are not in the reference, which is a sample too.
    """

    raw: float
    high: float
    fresh: float


@dataclass(frozen=True, kw_only=True)
class Change:
    """See `quality.Difference`; results of before 2026-11-26 have no `scale` and no `least`."""

    value: float
    low: float
    high: float
    share: float | None
    relative_low: float | None
    relative_high: float | None
    fd_a: float
    fd_b: float
    n: int
    features: str
    reference: str
    seed: int
    scale: float | None = None
    least: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """What `judge.measure_plans` measured of one plan; results of before have no `verdict`."""

    macs: int
    share: float
    calls: int
    wall_ms: float
    wall_share: float
    wall_share_low: float
    wall_share_high: float
    quality: dict[str, Quality]
    difference: Change
    held: bool
    verdict: str | None = None
    decided_by: int | None = None


@dataclass(frozen=True, kw_only=True)
class About:
    """How the plans of quality.json were measured; results of before have no `floor`."""

    reference: str
    batch: int
    repeats: int
    seed: int
    n: int
    tolerance: float
    data: str
    machine: dict[str, Any]
    device: str
    dtype: str
    layout: str
    threads: int | None = None
    floor: Floor | None = None
    scale: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """quality.json: plans side by side, and how long the call took that measured them, seconds."""

    about: About
    plans: dict[str, PlanRow]
    seconds: float = 0.0


def read_costs(file: Path, do: str = "run again") -> dict[str, Cost]:
    """cost.json, by entry. Raises RunError."""
    return _by_name(file, Cost, "costs", do)


def read_finals(file: Path, do: str = "delete it") -> dict[str, Final]:
    """finals.json, by number of steps. Raises RunError."""
    return _by_name(file, Final, "scores", do)


def _by_name(file: Path, cls: Any, what: str, do: str) -> dict[str, Any]:
    return typed(disk.read_json(file, what=what, do=do), dict[str, cls], "", file, RunError, do)


def read_comparison(file: Path, do: str = "run again") -> dict[str, Any]:
    """quality.json as its record, once it was found to be a `Comparison`. Raises RunError."""
    record = disk.read_json(file, what="measured qualities", do=do)
    known = build(Comparison, record, "", file, error=RunError, do=do)
    for name in (known.about.reference, "plan"):
        if name not in known.plans:
            raise RunError(got=f"no plan {shown(name)}", expected="it among the plans", where=file, do=do)
    for name, row in known.plans.items():
        if lacking := {"fd", "kid", "precision", "recall"} - set(row.quality):
            raise RunError(
                got=f"no {', '.join(sorted(lacking))} of {shown(name)}",
                expected="all qualities of every plan",
                where=file,
                do=do,
            )
    return record
