"""Budget: what a plan may cost, in its user's unit: a share, milliseconds of a batch, MACs of an image."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from halfstep.core.errors import PlanError
from halfstep.core.plan import Price
from halfstep.core.typed import nearest, shown

Unit = Literal["share", "time", "ms", "macs"]
"""`share` of the reference's MACs, in (0, 1]; `time`, share of its measured time, in (0, 1]; `ms`, of one batch;
`macs`, of one image."""

_SCALES: dict[str, tuple[Unit, float]] = {
    "": ("share", 1),
    "%": ("share", 1e-2),
    "t": ("time", 1),
    "ms": ("ms", 1),
    "s": ("ms", 1e3),
    "MACs": ("macs", 1),
    "kMACs": ("macs", 1e3),
    "MMACs": ("macs", 1e6),
    "GMACs": ("macs", 1e9),
    "TMACs": ("macs", 1e12),
}
_NUMBER = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\d\s.+-]*)\s*")
EXAMPLES = "0.5 (share of the MACs), 50%, 0.3t (share of the time), 120ms, 1.5s (a batch), 1.2GMACs (an image)"


@dataclass(frozen=True)
class Budget:
    """What all network calls of a plan may cost; with `ms` and `time` what the whole trajectory may take.

    Raises PlanError for a value that is not above 0 and finite, for a share above 1, and for a unit that is none.
    """

    value: float
    unit: Unit = "share"

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise _refused(f"a unit {shown(self.unit)}", f"one of {', '.join(get_args(Unit))}", self.unit)
        number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if not number or not 0 < self.value < math.inf:
            raise _refused(shown(self.value), "a number above 0")
        if self.unit in ("share", "time") and self.value > 1:
            what = "MACs" if self.unit == "share" else "time"
            raise _refused(f"{self.value:g}", f"a share of the {what} in (0, 1]", f"{self.value:g}")
        object.__setattr__(self, "value", float(self.value))

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget as a user writes it: see `EXAMPLES`. Raises PlanError with the nearest unit for one that is none."""
        match = _NUMBER.fullmatch(text)
        if not match:
            raise _refused(shown(text), "a number and a unit")
        number, unit = match.groups()
        if unit not in _SCALES:
            raise _refused(shown(text), f"a unit of {', '.join(filter(None, _SCALES))}, or none", unit)
        kind, scale = _SCALES[unit]
        value = float(number)
        return cls(value / 100 if unit == "%" else value * scale, kind)

    @classmethod
    def of(cls, given: Budget | float | str) -> Budget:
        """A budget of what stands for one in Python: a number is a share of the MACs, a text is read."""
        if isinstance(given, Budget):
            return given
        return cls.parse(given) if isinstance(given, str) else cls(given)

    @property
    def priced_in(self) -> Literal["macs", "us"]:
        """What it limits: an image's MACs, or its microseconds."""
        return "macs" if self.unit in ("share", "macs") else "us"

    def limit(self, reference: Price, batch: int) -> float:
        """The most that one image may cost, in MACs or in microseconds (`priced_in`).

        reference: of the plan that shares are of (its calls for MACs; as a whole for time).  batch: images of one
        batch, which `ms` is the time of.  Raises PlanError for a share of a time that was not measured.
        """
        if self.unit == "macs":
            return self.value
        if self.unit == "ms":
            return self.value * 1e3 / batch
        return self.value * _known(reference, self.priced_in)

    def told(self, price: Price, reference: Price, batch: int) -> str:
        """What something costs, in this budget's unit and as `parse` reads it, to three digits: how far it is over."""
        cost = _known(price, self.priced_in)
        if self.unit == "macs":
            return _plain(_rounded(cost), "macs")
        if self.unit == "ms":
            return _plain(_rounded(cost * batch / 1e3), "ms")
        return _plain(_rounded(cost / _known(reference, self.priced_in)), self.unit)

    def __str__(self) -> str:
        """As `parse` reads it, to the same value."""
        return _plain(self.value, self.unit)


def _plain(value: float, unit: Unit) -> str:
    """The shortest text of a value in a unit that is read as the same value."""
    spellings = [
        f"{number:g}{name}" if float(f"{number:g}") * scale == value else f"{number!r}{name}"
        for name, (kind, scale) in _SCALES.items()
        if kind == unit and name not in ("%", "s") and (number := value / scale) * scale == value
    ]
    if unit == "share":
        return repr(value)
    return min(spellings, key=lambda text: (len(text), text))


def _rounded(value: float) -> float:
    """To three digits, up: what is told as the cheapest is enough when it is asked for."""
    if value <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / step - 1e-9) * step:.6g}")


def _known(price: Price, unit: Literal["macs", "us"]) -> float:
    if unit == "macs":
        return price.macs
    if price.us is None:
        raise PlanError(
            got="a price without a time",
            expected="one that was measured here",
            where="--budget",
            do="measure it, or give a share of the MACs, e.g. 0.5",
        )
    return price.us


def _refused(got: str, expected: str, unit: str = "") -> PlanError:
    do = f"write e.g. {EXAMPLES}"
    if "flop" in unit.lower():
        do = "write MACs, of which each is 2 FLOPs: e.g. 1.2GMACs"
    elif unit and not unit.replace(".", "").isdigit():
        by_case = {name.lower(): name for name in _SCALES if name}
        do = f"did you mean {by_case[nearest(unit.lower(), by_case)]}? {do[0].upper()}{do[1:]}"
    return PlanError(got=got, expected=expected, where="--budget", do=do)
