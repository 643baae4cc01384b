"""StepPlan: which denoiser runs at which step of which sampler, as one immutable value."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from halfstep.disk import read_json, write_json
from halfstep.errors import PlanError
from halfstep.process import BETA_SCHEDULERS
from halfstep.typed import Bounds, build


@dataclass(frozen=True)
class Row:
    """One network evaluation: the scheduler's timestep (larger is noisier) and the bank entry that runs there.

    `scale`, `threshold`: a correction of its predicted noise, scale * soft(noise, threshold); 1 and 0 leave it alone.
    """

    timestep: float
    entry: str
    scale: float = 1.0
    threshold: float = 0.0

    @property
    def corrected(self) -> bool:
        return (self.scale, self.threshold) != (1.0, 0.0)


@dataclass(frozen=True)
class Baseline:
    """What a plan replaced: in words, and its MACs per image."""

    what: str
    macs: Annotated[int, Bounds(1)]


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The whole recipe of a trajectory: one row per network evaluation, noisiest first, and the scheduler.

    `scheduler`: class name of a diffusers scheduler; `scheduler_config`: its config; `steps`: the number that its
    `set_timesteps` takes (a second-order scheduler has more rows than steps).
    `reference`: the bank's reference entry; `entry_macs`: MACs per image of one call of each entry. `baseline`: the
    plan that a search chose this one instead of; None where there was none.
    Raises PlanError for an entry without MACs and for a plan without rows.
    """

    rows: tuple[Row, ...]
    scheduler: str
    scheduler_config: Mapping[str, Any] = field(repr=False)
    steps: int
    reference: str
    entry_macs: Mapping[str, int]
    baseline: Baseline | None = None

    def __post_init__(self) -> None:
        if not self.rows:
            raise PlanError(got="no rows", expected="one row per step", where="plan", do="give at least one row")
        for name in (self.reference, *(row.entry for row in self.rows)):
            if name not in self.entry_macs:
                raise PlanError(
                    got=f"entry {name!r}",
                    expected=f"one of {', '.join(self.entry_macs)}",
                    where="plan",
                    do="use the bank's names",
                )
        for row in self.rows:
            if not (0 < row.scale < math.inf and 0 <= row.threshold < math.inf):
                raise PlanError(
                    got=f"scale {row.scale:g}, threshold {row.threshold:g}",
                    expected="a scale above 0 and a threshold of 0 or more",
                    where="plan",
                    do="correct the row",
                )

    @property
    def corrected(self) -> bool:
        """Whether any row corrects its prediction."""
        return any(row.corrected for row in self.rows)

    @property
    def entries(self) -> tuple[str, ...]:
        """The entry of every row, in order."""
        return tuple(row.entry for row in self.rows)

    @property
    def corrections(self) -> tuple[tuple[float, float], ...]:
        """The (scale, threshold) of every row."""
        return tuple((row.scale, row.threshold) for row in self.rows)

    @property
    def macs(self) -> int:
        """MACs per image of the whole trajectory: the sum over its rows."""
        return sum(self.entry_macs[row.entry] for row in self.rows)

    @property
    def mean_macs(self) -> float:
        """MACs per image and row."""
        return self.macs / len(self.rows)

    @property
    def share(self) -> float:
        """MACs as a share of the same plan with the reference in every row."""
        return self.macs / (self.entry_macs[self.reference] * len(self.rows))

    def replacing(self, other: StepPlan) -> StepPlan:
        """The same plan, told as a replacement of another."""
        net = f"{other.entries[0]!r}" if len(set(other.entries)) == 1 else "several entries"
        what = f"{len(other.rows)} {other.scheduler.removesuffix('Scheduler')} calls of {net}"
        return replace(self, baseline=Baseline(what, other.macs))

    def with_entries(self, entries: Sequence[str]) -> StepPlan:
        """The same sampler with other entries, one per row, uncorrected: a correction belongs to its entry.

        Raises PlanError for a wrong length or an unknown name.
        """
        self._require_length(entries, "entries")
        return replace(self, rows=tuple(Row(r.timestep, e) for r, e in zip(self.rows, entries, strict=True)))

    def with_corrections(self, corrections: Sequence[tuple[float, float]]) -> StepPlan:
        """The same entries with other corrections, one (scale, threshold) per row. Raises PlanError for a wrong length,
        a scale that is not above 0 or a threshold below 0."""
        self._require_length(corrections, "corrections")
        pairs = zip(self.rows, corrections, strict=True)
        return replace(self, rows=tuple(replace(r, scale=s, threshold=t) for r, (s, t) in pairs))

    def _require_length(self, values: Sequence[object], what: str) -> None:
        if len(values) != len(self.rows):
            raise PlanError(
                got=f"{len(values)} {what}",
                expected=f"{len(self.rows)}, one per row",
                where="plan",
                do="give one per row",
            )

    def uniform(self, entry: str | None = None) -> StepPlan:
        """The same sampler with one entry everywhere (the reference by default)."""
        return self.with_entries([entry or self.reference] * len(self.rows))

    def runs(self) -> list[tuple[str, float, float, int]]:
        """Stretches of equal entries, noisiest first: (entry, first timestep, last timestep, number of rows)."""
        found = []
        for entry, group in itertools.groupby(self.rows, key=lambda row: row.entry):
            rows = list(group)
            found.append((entry, rows[0].timestep, rows[-1].timestep, len(rows)))
        return found

    def __str__(self) -> str:
        base = self.baseline or Baseline(f"{self.reference!r} everywhere", self.uniform().macs)
        saving = 1 - self.macs / base.macs
        word = "less" if saving >= 0 else "more"
        lines = [
            f"{self.scheduler}, {self.steps} steps{self._spacing()}, {len(self.rows)} network calls: "
            f"{self.macs / 1e6:,.1f} MMACs per image, {abs(saving):.0%} {word} than {base.what}"
        ]
        for entry, first, last, count in self.runs():
            share = self.entry_macs[entry] / self.entry_macs[self.reference]
            lines.append(
                f"  t {first:>6g} … {last:>6g}  {entry:<12} {count:>4} calls at {share:>4.0%} of the reference"
            )
        if self.corrected:
            scales, thresholds = ({f"{value:g}" for value in values} for values in zip(*self.corrections, strict=True))
            lines.append(f"  predictions scaled by {_span(scales)}, soft-thresholded at {_span(thresholds)}")
        return "\n".join(lines)

    def _spacing(self) -> str:
        """How the timesteps are spaced, where that is not what the scheduler does by itself."""
        own = BETA_SCHEDULERS.get(self.scheduler)
        spacing = self.scheduler_config.get("timestep_spacing") or own
        return f" at {spacing} timesteps" if spacing != own else ""

    def to_json(self) -> dict[str, Any]:
        return {
            "format": 1,
            "scheduler": self.scheduler,
            "scheduler_config": dict(self.scheduler_config),
            "steps": self.steps,
            "reference": self.reference,
            "entry_macs": dict(self.entry_macs),
            "macs": self.macs,
            "rows": [
                [row.timestep, row.entry, *((row.scale, row.threshold) if row.corrected else ())] for row in self.rows
            ],
            **({"baseline": asdict(self.baseline)} if self.baseline else {}),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], *, where: object = "plan.json") -> StepPlan:
        """Rebuild a plan. Raises PlanError when a field is missing, foreign, of another type or out of all bounds."""
        told = build(_Record, record, "", where, error=PlanError, do="write it with StepPlan.save")
        return cls(
            rows=tuple(Row(*row) for row in told.rows),
            scheduler=told.scheduler,
            scheduler_config=told.scheduler_config,
            steps=told.steps,
            reference=told.reference,
            entry_macs=told.entry_macs,
            baseline=told.baseline,
        )

    def save(self, file: Path) -> None:
        write_json(Path(file), self.to_json())

    @classmethod
    def load(cls, file: Path) -> StepPlan:
        """Read plan.json. Raises RunError when it cannot be read, PlanError when it is no plan."""
        record = read_json(Path(file), what="a plan.json", do="give the file that a search wrote")
        return cls.from_json(record, where=file)

    def __hash__(self) -> int:
        config = json.dumps(dict(self.scheduler_config), sort_keys=True, default=str)  # equal mappings hash alike
        return hash((self.rows, self.scheduler, self.steps, config))


Name = Annotated[str, Bounds(1, 80)]
Macs = Annotated[int, Bounds(1, 10**18)]
Steps = Annotated[int, Bounds(1, 100_000)]


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What plan.json says. `macs` is for its readers: a plan counts its own."""

    rows: Annotated[tuple[tuple[float, Name] | tuple[float, Name, float, float], ...], Bounds(1, 100_000)]
    scheduler: Name
    scheduler_config: dict[str, Any]
    steps: Steps
    reference: Name
    entry_macs: dict[str, Macs]
    macs: int | None = None
    baseline: Baseline | None = None
    format: Annotated[int, Bounds(1, 1)] = 1


def _span(values: set[str]) -> str:
    ordered = sorted(values, key=float)
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"
