"""Numbers that carry their unit, their n, their interval and how they were taken."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from halfstep.core import disk
from halfstep.core.errors import RunError
from halfstep.core.typed import build, shown, typed


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

    `metric`: "fd" (Fréchet distance), "kid", "precision", "recall", "density", "coverage", or
    "agreement", the share of images that a classifier of the data takes for the class they were asked to be.
    `low`, `high`: 95 % bootstrap interval over the generated images; Wilson's of a share.
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

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


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


Verdict = Literal["held", "not held", "not decided", "broken reference"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much larger (worse) the Fréchet distance of b is than that of a, both corrected, with a paired 95 % interval.

    `share`, `relative_low`, `relative_high`: the same as a share of a's distance (0.05 is 5 % worse), from the
    resampled ratios; None where a is within its floor, where a ratio is one of noise. There the change is held against
    `scale`, a hundredth of the data's spread. `least`: images below which nothing is decided. Results of before
    2026-11-26 have neither; what is asked of them raises RunError.
    """

    value: float
    low: float
    high: float
    share: float | None
    relative_low: float | None
    relative_high: float | None
    fd_a: float
    fd_b: float
    scale: float | None = None
    least: int | None = None
    n: int
    features: str
    reference: str
    seed: int

    def verdict(self, tolerance: float) -> Verdict:
        """ "held": the whole interval lies within a loss of `tolerance` (a share); "not held": all of it above."""
        _, low, high, limit = self.against(tolerance)
        if self.n < self._least or low <= limit < high:
            return "not decided"
        return "held" if high <= limit else "not held"

    def held(self, tolerance: float) -> bool:
        """Whether the whole interval lies within a loss of `tolerance`, a share of a's distance or of `scale`."""
        return self.verdict(tolerance) == "held"

    def decided_by(self, tolerance: float) -> int | None:
        """About how many generated images decide it, if the change is what it seems: an interval halves with four
        times as many. None where a million would not."""
        value, low, high, limit = self.against(tolerance)
        reach, gap = (high - value if value <= limit else value - low), abs(limit - value)
        wanted = self.n * (reach / gap) ** 2 if gap > 0 else (math.inf if reach > 0 else 0)
        return max(self._least, math.ceil(wanted)) if wanted <= 1_000_000 else None

    @property
    def _least(self) -> int:
        if self.least is None:
            raise self._without("least")
        return self.least

    def against(self, tolerance: float) -> tuple[float, float, float, float]:
        """The change with its interval, and the largest that is tolerated, in the same unit."""
        if self.share is not None and self.relative_low is not None and self.relative_high is not None:
            return self.share, self.relative_low, self.relative_high, tolerance
        if self.scale is None:
            raise self._without("scale")
        return self.value, self.low, self.high, tolerance * self.scale

    def _without(self, name: str) -> RunError:
        return RunError(got=f"a change without its {name}", expected="one", where="quality.json", do="measure again")

    def __str__(self) -> str:
        if self.share is None:
            return f"{self.value:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"
        return f"{self.share:+.1%} [{self.relative_low:+.1%}, {self.relative_high:+.1%}]"

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How far a plan's pictures are from the converged pictures of the same noise (`measure/fidelity.py`).

    `mse`: mean squared difference of pixels in [-1, 1]. `ssim`: structural similarity, 1 of equal pictures. `features`:
    mean squared distance in the features of `features_name`; two values with different ones must never be compared.
    `n`: images, of `seed`. `draws`: ways from each start that were averaged, where a sampler draws noise on its way; 0
    of a deterministic one. `target`: digest of the converged plan, its weights, the seed and the classes.
    """

    mse: Interval
    ssim: Interval
    features: Interval | None = None
    features_name: str | None = None
    n: int
    seed: int
    draws: int = 0
    target: str

    @property
    def psnr_db(self) -> Interval:
        """Peak signal-to-noise ratio of all pictures together, in dB, of the range 2; infinite where they are equal."""
        ends = (self.mse.value, self.mse.high, self.mse.low)
        value, low, high = (10 * math.log10(4 / end) if end > 0 else math.inf for end in ends)  # 2^2 / mse
        return Interval(value=value, low=low, high=high)

    def __str__(self) -> str:
        psnr = self.psnr_db
        told = f"{psnr.value:.1f} dB [{psnr.low:.1f}, {psnr.high:.1f}], SSIM {self.ssim}"
        return told if self.features is None else f"{told}, in features {self.features}"

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, object], *, where: object = "fidelity") -> Fidelity:
        """Rebuild a fidelity. Raises RunError."""
        return build(cls, record, "", where, error=RunError)


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """What `judge.measure_plans` measured of one plan; results of before have no `verdict`.

    `difference`, `verdict`: beside the first plan, what is run today. `free_difference`, `free_verdict`, `free_wall`:
    the same, and the share of the time, beside the best stock sampler; None where none was looked for.
    `predicted_ms`: the time that the plan's prices say; None where they have none. `alone_ms`: the time of one image
    alone, where `wall_ms` is of a batch of several; results of before have none.
    """

    macs: int
    share: float
    calls: int
    wall_ms: float
    wall_share: float
    wall_share_low: float
    wall_share_high: float
    quality: dict[str, Quality]
    difference: Difference
    held: bool
    verdict: Verdict | None = None
    decided_by: int | None = None
    free_difference: Difference | None = None
    free_verdict: Verdict | None = None
    free_wall: float | None = None
    predicted_ms: float | None = None
    alone_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class About:
    """How the plans of quality.json were measured; results of before have no `floor`. `free`: which of them is the best
    stock sampler; None where none was looked for."""

    reference: str
    free: str | None = None
    batch: int
    repeats: int
    seed: int
    n: int
    tolerance: float
    floor: Floor | None = None
    scale: float | None = None
    warnings: tuple[str, ...] = ()
    data: str
    machine: dict[str, Any]
    device: str
    dtype: str
    threads: int | None = None
    layout: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """quality.json: plans side by side; the reference is the first.

    `seconds`: how long the call took that measured them; None, and not written, where that was not asked.
    """

    about: About
    plans: dict[str, PlanRow]
    seconds: float | None = None

    @property
    def reference(self) -> PlanRow:
        return self.plans[self.about.reference]

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        if self.seconds is None:
            del record["seconds"]
        return record


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """One pipeline of compare.json beside what `PlanRow` tells of it.

    `source`: the folder; `what`: its plan, in words. `params`: of the networks that the plan calls, each once.
    `stored_mib`: what their weights take on disk; `held_mib`: in memory, with a VAE's; `peak_mib`: the most that one
    call at the timed batch holds beyond them, None where it cannot be measured. `fidelity`: of its pictures to
    `target`, None where there is none. `near`, `near_to`: of its first pictures the distance in features to the nearest
    image of the data, and the number of that; `copies`: those that are nearer than any real image that was held out.
    """

    source: str
    what: str
    params: int
    stored_mib: float
    held_mib: float
    peak_mib: float | None
    fidelity: Fidelity | None
    target: str
    near: tuple[float, ...]
    near_to: tuple[int, ...]
    copies: tuple[int, ...]

    @property
    def memory_mib(self) -> float | None:
        """Weights as held, and the peak of a call beyond them."""
        return None if self.peak_mib is None else self.held_mib + self.peak_mib


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How near real images that no picture was drawn from lie to the data: what `Pipeline.near` is held against.

    `what`: which ones, `n` of them; `least`, `median`: of their distances to the nearest image of the data.
    """

    what: str
    n: int
    least: float
    median: float


@dataclass(frozen=True, kw_only=True)
class Compared:
    """compare.json: pipelines side by side, all held against the first; `images`: of the data, that pictures may be
    near to."""

    comparison: Comparison
    pipelines: dict[str, Pipeline]
    held_out: HeldOut
    images: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"comparison": self.comparison.to_json()}


def read_compared(file: Path, do: str = "run halfstep compare again") -> Compared:
    """compare.json. Raises RunError."""
    record = disk.read_json(file, what="compared pipelines", do=do)
    found: Compared = build(Compared, record, "", file, error=RunError, do=do)
    _require_rows(found.comparison, (), file, do)
    if list(found.pipelines) != list(found.comparison.plans):
        got, expected = (
            f"pipelines {shown(list(found.pipelines))}",
            f"{shown(list(found.comparison.plans))}, as measured",
        )
        raise RunError(got=got, expected=expected, where=file, do=do)
    return found


@dataclass(frozen=True, kw_only=True)
class FreeArm:
    """A stock sampler of the dense net: `what` it is, its network calls, `ms` per image by the prices measured here,
    None without, and its Fréchet distance `fd`, corrected for bias."""

    what: str
    calls: int
    ms: float | None = None
    fd: float


@dataclass(frozen=True, kw_only=True)
class FreeRecord:
    """free.json: what is run today, the best that is free, and the stock samplers that were measured on the way to it,
    each on `images` pictures of the search's noise."""

    today: FreeArm
    best: FreeArm
    frontier: tuple[FreeArm, ...]
    images: int

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Rings:
    """Power by frequency, in cycles per pixel: of the data, of a model's clean estimate, of the best linear denoiser's
    and of the estimate's error. All of one length."""

    frequency: tuple[float, ...]
    data: tuple[float, ...]
    model: tuple[float, ...]
    wiener: tuple[float, ...]
    error: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """spectrum.json: by timestep and model, over so many images of the data."""

    data: str
    images: int
    timesteps: dict[str, dict[str, Rings]]


def read_spectra(file: Path, do: str = "run halfstep spectrum again") -> Spectra:
    """spectrum.json. Raises RunError, for lines of unequal length too."""
    record = disk.read_json(file, what="measured spectra", do=do)
    found: Spectra = build(Spectra, record, "", file, error=RunError, do=do)
    for timestep, models in found.timesteps.items():
        for name, rings in models.items():
            if len(lengths := {len(line) for line in dataclasses.asdict(rings).values()}) > 1:
                got, expected = f"lines of {sorted(lengths)} numbers", "as many in each"
                raise RunError(got=got, expected=expected, where=f"{file}: {timestep}.{name[:80]}", do=do)
    return found


def read_costs(file: Path, do: str = "run again") -> dict[str, Cost]:
    """cost.json, by entry. Raises RunError."""
    return typed(disk.read_json(file, what="costs", do=do), dict[str, Cost], "", file, RunError, do)


def read_comparison(file: Path, do: str = "run again", *, rows: Sequence[str] = ("plan",)) -> Comparison:
    """quality.json; `rows`: the plans that must be there beside the reference. Raises RunError."""
    record = disk.read_json(file, what="measured qualities", do=do)
    found: Comparison = build(Comparison, record, "", file, error=RunError, do=do)
    _require_rows(found, rows, file, do)
    return found


def _require_rows(found: Comparison, rows: Sequence[str], file: Path, do: str) -> None:
    """Raise RunError where a plan is not there, or one of its qualities is not."""
    for name in (found.about.reference, *rows):
        if name not in found.plans:
            raise RunError(got=f"no plan {shown(name)}", expected="it among the plans", where=file, do=do)
    for name, row in found.plans.items():
        if lacking := {"fd", "kid", "precision", "recall"} - set(row.quality):
            raise RunError(
                got=f"no {', '.join(sorted(lacking))} of {shown(name)}",
                expected="all qualities of every plan",
                where=file,
                do=do,
            )
