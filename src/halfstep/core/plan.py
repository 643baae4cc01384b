"""StepPlan: which denoiser runs at which step of which sampler and what that costs, as one immutable value."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from halfstep.core.disk import read_json, write_json
from halfstep.core.errors import PlanError
from halfstep.core.process import BETA_SCHEDULERS
from halfstep.core.solvers import WORDS, name_of
from halfstep.core.typed import Bounds, build

Name = Annotated[str, Bounds(1, 80)]
Steps = Annotated[int, Bounds(1, 100_000)]


@dataclass(frozen=True)
class Price:
    """What something costs per image: multiply-accumulates (1 MAC = 2 FLOPs), and microseconds, rounded to nanoseconds;
    None: not measured."""

    macs: Annotated[int, Bounds(0, 10**18)]
    us: Annotated[float, Bounds(0, 1e15)] | None = None

    def __post_init__(self) -> None:
        if self.us is not None:
            object.__setattr__(self, "us", round(float(self.us), 3))

    def __add__(self, other: Price) -> Price:
        """Both together; no time is known where one of them has none."""
        us = None if self.us is None or other.us is None else self.us + other.us
        return Price(self.macs + other.macs, us)

    def __mul__(self, count: int) -> Price:
        return Price(self.macs * count, None if self.us is None else self.us * count)

    def __str__(self) -> str:
        time = "" if self.us is None else f", {self.us / 1e3:,.2f} ms"
        return f"{self.macs / 1e6:,.1f} MMACs{time}"

    def to_json(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


class Correction(NamedTuple):
    """Of a predicted noise e, without training: scale * soft(e, threshold). A scale above 0, a threshold of 0 or more;
    1 and 0 leave it alone."""

    scale: float = 1.0
    threshold: float = 0.0


NONE = Correction()


class Guide(NamedTuple):
    """Another prediction that a row's is led away from: guide + weight * (own - guide). A finite weight: 1 is unguided,
    more leads away from the guide.

    Where the bank has a null condition, the entry runs under it: classifier-free guidance (arXiv 2207.12598), of the
    row's own entry or of a cheaper one. Where it has none, a worse entry runs under the row's own condition:
    autoguidance (arXiv 2406.02507), D_w = w D_1 + (1 - w) D_0.
    """

    entry: Name
    weight: float


BAR = "|"
"""In the name of a call, between an entry and what guides it; no entry's name has it."""


def call_of(name: str, guidance: float) -> tuple[str, Guide | None]:
    """What a call's name stands for: an entry and its guide.

    "full": the entry, guided by itself with the weight `guidance`, unguided where that is 1. "full|": unguided.
    "full|slim": guided by another entry with that weight. "full|slim*2": with weight 2.
    Raises PlanError for a weight that is no number.
    """
    entry, bar, rest = name.partition(BAR)
    other, star, weight = rest.partition("*")
    try:
        used = float(weight) if star else guidance
    except ValueError:
        raise _refused(f"call {name!r}", "a weight after the star", "write e.g. full|slim*2") from None
    guide = (other or entry) if not bar or other else ""
    return entry, Guide(guide, used) if guide and used != 1 else None


@dataclass(frozen=True)
class Row:
    """One step: the scheduler's timestep (larger is noisier), the bank entry that runs there, and what is done to its
    prediction: led away from a guide's, if there is one, then corrected."""

    timestep: float
    entry: Name
    correction: Correction = NONE
    guide: Guide | None = None

    @property
    def corrected(self) -> bool:
        return self.correction != NONE

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {"timestep": float(self.timestep), "entry": self.entry}
        if self.corrected:
            record["correction"] = self.correction._asdict()
        if self.guide is not None:
            record["guide"] = self.guide._asdict()
        return record


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler: the `name` of its class, its `config` as JSON has it, and the number that its
    `set_timesteps` takes (a second-order scheduler has more rows than steps)."""

    name: Name
    config: Mapping[str, Any] = field(repr=False)
    steps: Steps

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", dict(self.config))  # nobody else's to change

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Its config with the name of its class, as diffusers' scheduler_config.json has it."""
        return {**self.config, "_class_name": self.name}

    @property
    def short(self) -> str:
        """Its name, as sentences have it, with its order and its spacing where there is a choice: "DDIM",
        "DPM-Solver++ 3 Karras"."""
        return name_of(self.name, self.config, self.spacing)

    @property
    def told(self) -> str:
        """Its name and its steps: "DPM-Solver++ 3 trailing, 10 steps"."""
        return f"{self.short}, {self.steps} step{'s' if self.steps > 1 else ''}"

    @property
    def spacing(self) -> str | None:
        """How the timesteps are spaced, where that is not what the scheduler does by itself."""
        own = BETA_SCHEDULERS.get(self.name)
        said = self.config.get("timestep_spacing") or own
        return said if said != own else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __hash__(self) -> int:
        return hash((self.name, self.steps, _hashable(self.config)))


@dataclass(frozen=True)
class Baseline:
    """What a plan replaced: in words, and the price of its network calls."""

    what: str
    price: Price

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "price": self.price.to_json()}


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The whole recipe of a trajectory: one row per step, noisiest first, and the sampler.

    `reference`: the bank's reference entry; `prices`: of one call of each entry. `fixed`: what a trajectory costs
    beside its calls (decoding latents); no share and no budget counts it. `baseline`: the plan that a search chose this
    one instead of; None where there was none. `guidance`: the weight with which the reference is guided by itself, and
    by default every entry; 1 where it is unguided.
    Raises PlanError for a plan without rows, a sampler whose config is none, an entry or a guide without a price or of
    a name that joins calls (see `call_of`), a reference or a baseline that costs nothing (shares are of it), and
    numbers out of the bounds of `Correction` and `Guide`.
    """

    rows: tuple[Row, ...]
    sampler: Sampler
    reference: str
    prices: Mapping[str, Price]
    fixed: Price = Price(0)
    baseline: Baseline | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not self.rows:
            raise _refused("no rows", "one row per step", "give at least one row")
        for key, kind in WORDS.items():
            said = self.sampler.config.get(key)
            if said is not None and not isinstance(said, (float, int) if kind is float else kind):
                raise _refused(f"a sampler with {key} {said!r}", f"a {kind.__name__}", "use its scheduler's own config")
        for name in (self.reference, *self.nets):
            if BAR in name or "*" in name:
                raise _refused(f"entry {name!r}", f"a name without {BAR} and *, which join calls", "name it otherwise")
            if name not in self.prices:
                raise _refused(f"entry {name!r}", f"one of {', '.join(self.prices)}", "use the bank's names")
        for price in (self.prices[self.reference], *([self.baseline.price] if self.baseline else [])):
            if price.macs < 1:
                raise _refused(f"{price.macs} MACs", "a reference and a baseline of 1 or more", "count them again")
        for row in self.rows:
            scale, threshold = row.correction
            if not (0 < scale < math.inf and 0 <= threshold < math.inf):
                told = f"scale {scale:g}, threshold {threshold:g}"
                raise _refused(told, "a scale above 0 and a threshold of 0 or more", "correct the row")
        for weight in (self.guidance, *(row.guide.weight for row in self.rows if row.guide)):
            if not math.isfinite(weight):
                raise _refused(f"guidance of weight {weight:g}", "a finite weight", "correct the plan")

    # ------------------------------------------------------------------------------------------------ what it is

    @property
    def corrected(self) -> bool:
        """Whether any row corrects its prediction."""
        return any(row.corrected for row in self.rows)

    @property
    def entries(self) -> tuple[str, ...]:
        """The entry of every row, in order."""
        return tuple(row.entry for row in self.rows)

    @property
    def guides(self) -> tuple[Guide | None, ...]:
        """The guide of every row."""
        return tuple(row.guide for row in self.rows)

    @property
    def called(self) -> tuple[str, ...]:
        """The entry of every network call, in order: of a guided row its own, then its guide's."""
        return tuple(name for row in self.rows for name in (row.entry, *([row.guide.entry] if row.guide else [])))

    @property
    def nets(self) -> tuple[str, ...]:
        """The entries that it calls, guides too, each once, by first call."""
        return tuple(dict.fromkeys(self.called))

    @property
    def corrections(self) -> tuple[Correction, ...]:
        """The correction of every row."""
        return tuple(row.correction for row in self.rows)

    @property
    def digest(self) -> str:
        """16 hex digits of its rows and its sampler: what decides the pictures that a bank draws by it."""
        said = {"rows": [row.to_json() for row in self.rows], "sampler": self.sampler.to_json()}
        text = json.dumps(said, sort_keys=True, separators=(",", ":"), default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def runs(self) -> list[tuple[str, float, float, int]]:
        """Stretches of equal entries, noisiest first: (entry, first timestep, last timestep, number of rows)."""
        found = []
        for entry, group in itertools.groupby(self.rows, key=lambda row: row.entry):
            rows = list(group)
            found.append((entry, rows[0].timestep, rows[-1].timestep, len(rows)))
        return found

    # ------------------------------------------------------------------------------------------------ what it costs

    @property
    def price(self) -> Price:
        """Of all its network calls, those of guides too."""
        return sum((self.prices[name] for name in self.called), start=Price(0, 0))

    @property
    def whole(self) -> Price:
        """Of the whole trajectory, the fixed part too."""
        return self.price + self.fixed

    @property
    def macs(self) -> int:
        """MACs per image of its network calls."""
        return self.price.macs

    @property
    def share(self) -> float:
        """MACs as a share of the same plan with the reference in every row."""
        return self.macs / (self.price_of(self.reference).macs * len(self.rows))

    def price_of(self, call: str) -> Price:
        """Of one row that makes a call, its guide's with it (see `call_of`)."""
        entry, guide = call_of(call, self.guidance)
        return self.prices[entry] if guide is None else self.prices[entry] + self.prices[guide.entry]

    # ------------------------------------------------------------------------------------------------ other plans

    def replacing(self, other: StepPlan) -> StepPlan:
        """The same plan, told as a replacement of another."""
        net = f"{other.entries[0]!r}" if len(other.nets) == 1 else "several entries"
        what = f"{len(other.called)} {other.sampler.short} calls of {net}"
        return replace(self, baseline=Baseline(what, other.price))

    def with_entries(self, entries: Sequence[str]) -> StepPlan:
        """The same sampler with other entries, one per row, uncorrected: a correction belongs to its entry. Each is
        guided as the reference is, by itself, unless its name says by what (see `call_of`).

        Raises PlanError for a wrong length or an unknown name.
        """
        self._require_length(entries, "entries")
        calls = {name: call_of(name, self.guidance) for name in set(entries)}
        rows = zip(self.rows, entries, strict=True)
        return replace(self, rows=tuple(Row(row.timestep, calls[e][0], guide=calls[e][1]) for row, e in rows))

    def with_corrections(self, corrections: Sequence[Correction]) -> StepPlan:
        """The same entries and guides with other corrections, one per row. Raises PlanError for a wrong length, a scale
        that is not above 0 or a threshold below 0."""
        self._require_length(corrections, "corrections")
        pairs = zip(self.rows, corrections, strict=True)
        return replace(self, rows=tuple(replace(row, correction=one) for row, one in pairs))

    def with_guides(self, guides: Sequence[Guide | None]) -> StepPlan:
        """The same entries and corrections with other guides, one per row. Raises PlanError for a wrong length, an
        unknown entry or a weight that is not finite."""
        self._require_length(guides, "guides")
        return replace(self, rows=tuple(replace(row, guide=one) for row, one in zip(self.rows, guides, strict=True)))

    def with_guidance(self, weight: float) -> StepPlan:
        """The plan whose reference is guided so, in all its rows; 1: unguided."""
        return replace(self, guidance=weight).uniform()

    def uniform(self, entry: str | None = None) -> StepPlan:
        """The same sampler with one entry everywhere (the reference by default), guided as the reference is."""
        return self.with_entries([entry or self.reference] * len(self.rows))

    def _require_length(self, values: Sequence[object], what: str) -> None:
        if len(values) != len(self.rows):
            raise _refused(f"{len(values)} {what}", f"{len(self.rows)}, one per row", "give one per row")

    # ------------------------------------------------------------------------------------------------ told and stored

    def __str__(self) -> str:
        base = self.baseline or Baseline(f"{self.reference!r} everywhere", self.uniform().price)
        saving = 1 - self.macs / base.price.macs
        word = "less" if saving >= 0 else "more"
        lines = [
            f"{self.sampler.told}, {len(self.called)} network calls: "
            f"{self.price} per image, {abs(saving):.0%} {word} than {base.what}"
        ]
        for entry, first, last, count in self.runs():
            lines.append(
                f"  t {first:>6g} … {last:>6g}  {entry:<12} {count:>4} calls at {self._of(entry)} of the reference"
            )
        lines += self._guided_lines()
        if self.corrected:
            scales, thresholds = ({f"{value:g}" for value in values} for values in zip(*self.corrections, strict=True))
            lines.append(f"  predictions scaled by {_span(scales)}, soft-thresholded at {_span(thresholds)}")
        if self.fixed.macs or self.fixed.us:
            lines.append(f"  beside the calls {self.fixed} per image, {self.whole} in all")
        return "\n".join(lines)

    def _guided_lines(self) -> list[str]:
        """Which rows are guided by what: a line for every stretch of equal guides."""
        lines = []
        for guide, group in itertools.groupby(self.rows, key=lambda row: row.guide):
            rows = list(group)
            if guide is not None:
                lines.append(
                    f"  t {rows[0].timestep:>6g} … {rows[-1].timestep:>6g}  guided by {guide.entry}, weight "
                    f"{guide.weight:g}: {len(rows)} more calls at {self._of(guide.entry)} of the reference"
                )
        return lines

    def _of(self, entry: str) -> str:
        return f"{self.prices[entry].macs / self.prices[self.reference].macs:>4.0%}"

    def to_json(self) -> dict[str, Any]:
        return {
            "format": 2,
            "sampler": self.sampler.to_json(),
            "reference": self.reference,
            "prices": {name: price.to_json() for name, price in self.prices.items()},
            "fixed": self.fixed.to_json(),
            "macs": self.macs,
            "rows": [row.to_json() for row in self.rows],
            **({"baseline": self.baseline.to_json()} if self.baseline else {}),
            **({"guidance": self.guidance} if self.guidance != 1 else {}),
        }

    def to_content(self) -> dict[str, Any]:
        """What it is among a run's inputs (`Subject.content`): format 1's record, so that runs begun under it resume; a
        guided plan, which that format cannot tell, is as `to_json` has it."""
        return self.to_json() if any(self.guides) or self.guidance != 1 else _Format1.of(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any], *, where: object = "plan.json") -> StepPlan:
        """Rebuild a plan. Raises PlanError when a field is missing, foreign, of another type or out of all bounds."""
        first = isinstance(record, Mapping) and record.get("format", 1) == 1
        told = build(
            _Format1 if first else _Format2, record, "", where, error=PlanError, do="write it with StepPlan.save"
        )
        try:
            return told.plan()
        except PlanError as error:  # which does not know where the record is from
            raise PlanError(got=error.got, expected=error.expected, where=where, do=error.do) from error

    def save(self, file: Path) -> None:
        write_json(Path(file), self.to_json())

    @classmethod
    def load(cls, file: Path) -> StepPlan:
        """Read plan.json. Raises RunError when it cannot be read, PlanError when it is no plan."""
        record = read_json(Path(file), what="a plan.json", do="give the file that a search wrote")
        return cls.from_json(record, where=file)

    def __hash__(self) -> int:
        return hash((self.rows, self.sampler))


# ------------------------------------------------------------------------------------------------------------ records


@dataclass(frozen=True, kw_only=True)
class _Format2:
    """What plan.json says. `macs` is for its readers: a plan counts its own."""

    rows: Annotated[tuple[Row, ...], Bounds(1, 100_000)]
    sampler: Sampler
    reference: Name
    prices: dict[str, Price]
    fixed: Price = Price(0)
    macs: int | None = None
    baseline: Baseline | None = None
    guidance: float = 1.0
    format: Annotated[int, Bounds(2, 2)]

    def plan(self) -> StepPlan:
        return StepPlan(
            rows=self.rows,
            sampler=self.sampler,
            reference=self.reference,
            prices=self.prices,
            fixed=self.fixed,
            baseline=self.baseline,
            guidance=self.guidance,
        )


_Macs = Annotated[int, Bounds(1, 10**18)]


@dataclass(frozen=True)
class _Baseline1:
    what: str
    macs: _Macs


@dataclass(frozen=True, kw_only=True)
class _Format1:
    """What plan.json said up to 2026-11-26: rows by position, MACs without times."""

    rows: Annotated[tuple[tuple[float, Name] | tuple[float, Name, float, float], ...], Bounds(1, 100_000)]
    scheduler: Name
    scheduler_config: dict[str, Any]
    steps: Steps
    reference: Name
    entry_macs: dict[str, _Macs]
    macs: int | None = None
    baseline: _Baseline1 | None = None
    format: Annotated[int, Bounds(1, 1)] = 1

    def plan(self) -> StepPlan:
        base = self.baseline
        return StepPlan(
            rows=tuple(Row(timestep, entry, Correction(*rest)) for timestep, entry, *rest in self.rows),
            sampler=Sampler(self.scheduler, self.scheduler_config, self.steps),
            reference=self.reference,
            prices={name: Price(macs) for name, macs in self.entry_macs.items()},
            baseline=Baseline(base.what, Price(base.macs)) if base else None,
        )

    @staticmethod
    def of(plan: StepPlan) -> dict[str, Any]:
        """The record of an unguided plan."""
        base = plan.baseline
        return {
            "format": 1,
            "scheduler": plan.sampler.name,
            "scheduler_config": dict(plan.sampler.config),
            "steps": plan.sampler.steps,
            "reference": plan.reference,
            "entry_macs": {name: price.macs for name, price in plan.prices.items()},
            "macs": plan.macs,
            "rows": [[row.timestep, row.entry, *(row.correction if row.corrected else ())] for row in plan.rows],
            **({"baseline": {"what": base.what, "macs": base.price.macs}} if base else {}),
        }


def _refused(got: str, expected: str, do: str) -> PlanError:
    return PlanError(got=got, expected=expected, where="plan", do=do)


def _hashable(value: Any) -> Any:
    """What stands for a JSON-like value in a hash: equal ones alike, whatever the order of their names."""
    if isinstance(value, Mapping):
        return frozenset((name, _hashable(one)) for name, one in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    return value


def _span(values: set[str]) -> str:
    ordered = sorted(values, key=float)
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"
