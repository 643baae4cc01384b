"""Numbers that carry their unit, their n, their interval and how they were taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


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
    def from_json(cls, record: Mapping[str, object]) -> Cost:
        return cls(**record)  # type: ignore[arg-type]


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

    @classmethod
    def from_json(cls, record: Mapping[str, object]) -> Quality:
        return cls(**record)  # type: ignore[arg-type]
