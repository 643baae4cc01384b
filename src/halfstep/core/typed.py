"""Frozen dataclasses of plain fields from text and JSON, checked by their type hints; errors name the nearest field.

The one typed reader of the house. It understands int, float, str, bool, None, `Any`, `Literal`, unions,
`tuple[X, ...]`, `tuple[A, B]`, `list[X]`, `dict[str, X]`, nested dataclasses and named tuples, and `Annotated`:
`Bounds` of the value, and a text that says what the field means, e.g.
`steps: Annotated[int, Bounds(1, 1000), "sampling steps"] = 50`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NoReturn

from halfstep.core.errors import HalfstepError, RecipeError


@dataclass(frozen=True)
class Bounds:
    """From `low` to `high`, both allowed, None: open. Of a number its value, of a text or a collection its length.

    `above`: `low` itself is not allowed.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False

    def __contains__(self, value: Any) -> bool:
        size = value if isinstance(value, int | float) else len(value)
        if self.low is not None and (size < self.low or (self.above and size == self.low)):
            return False
        return self.high is None or size <= self.high

    def __str__(self) -> str:
        low, high = _figure(self.low), _figure(self.high)
        if self.above:
            return f"above {low}" if self.high is None else f"above {low}, at most {high}"
        if self.high is None:
            return f"{low} or more" if self.low is not None else "any"
        return f"at most {high}" if self.low is None else f"{low} to {high}"


def _figure(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value or 0:g}"


@dataclass(frozen=True)
class Leaf:
    """A plain field somewhere in nested dataclasses: its dotted name, its value, and its hint as it was declared."""

    name: str
    value: Any
    hint: Any

    @property
    def meaning(self) -> str:
        """The text that stands in the hint; "" where none does."""
        return next((note for note in _notes(self.hint) if isinstance(note, str)), "")

    @property
    def allowed(self) -> str:
        """Type and range in words, e.g. "a whole number, 1 to 64"."""
        return describe(self.hint)

    @property
    def choices(self) -> str:
        """What a user may type, in short: "1 to 64", "ddim, ddpm", "true, false"; "" for any text."""
        return _choices(self.hint)


def nearest(name: str, names: Iterable[str]) -> str:
    """The known name closest to a mistyped one, for error messages."""
    match = difflib.get_close_matches(name[:80], list(names), n=1, cutoff=0.0)  # difflib is slow on long texts
    return match[0] if match else ""


def near(name: str, names: Iterable[str]) -> str:
    """The same where the two are alike, "" where a name is probably no slip for any of them."""
    match = difflib.get_close_matches(name[:80], list(names), n=1)
    return match[0] if match else ""


@cache
def hints_of(cls: Any) -> dict[str, Any]:
    """The hints of a dataclass's fields, with their `Annotated`."""
    return typing.get_type_hints(cls, include_extras=True)


def leaves(value: Any, prefix: str = "") -> Iterator[Leaf]:
    """Every plain field of nested dataclasses, in their order."""
    cls: Any = type(value)
    hints = hints_of(cls)
    for item in dataclasses.fields(value):
        inner = getattr(value, item.name)
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{prefix}{item.name}.")
        else:
            yield Leaf(f"{prefix}{item.name}", inner, hints[item.name])


def parse(text: str, hint: Any, path: str) -> Any:
    """A value of type `hint` from its text; tuples are separated by commas."""
    refuse = RecipeError(
        got=shown(text), expected=describe(hint), where=f"--set {path}", do="give a value of that type"
    )
    if typing.get_origin(hint) is Annotated:
        return parse(text, typing.get_args(hint)[0], path)
    if _is_union(hint):
        if text.lower() == "none":
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(parse(part.strip(), inner, path) for part in text.split(",") if part.strip())
    if typing.get_origin(hint) is Literal:
        return next((value for value in typing.get_args(hint) if str(value) == text), text)
    if hint is bool:
        if text.lower() in ("true", "yes", "1", "false", "no", "0"):
            return text.lower() in ("true", "yes", "1")
        raise refuse
    try:
        return hint(text)
    except ValueError:
        raise refuse from None


def build(
    cls: Any,
    record: Any,
    prefix: str,
    where: object,
    *,
    error: type[HalfstepError] = RecipeError,
    do: str = "",
) -> Any:
    """A dataclass or a named tuple from its JSON record; `prefix` is the dotted name of what is above it.

    Raises `error`, which says `where` and what to `do`, for what is no section of fields, for unknown and for missing
    fields, and for values of another type or out of their bounds.
    """
    hints = hints_of(cls)
    if not isinstance(record, Mapping):
        raise error(
            got=shown(record), expected="a section of fields", where=where, do=do or f"mend {prefix or 'the file'}"
        )
    for name in record:
        if name not in hints:
            close = prefix + nearest(str(name), hints)
            raise error(
                got=shown(f"{prefix}{name}"),
                expected="a field of the recipe" if error is RecipeError else "a known field",
                where=where,
                do=f"did you mean {close}?" + (f" Else {do}" if do else ""),
            )
    for name in _required(cls):
        if name not in record:
            raise error(
                got=f"no {prefix}{name}",
                expected=describe(hints[name]),
                where=where,
                do=do or "add that field",
            )
    return cls(**{name: typed(value, hints[name], prefix + name, where, error, do) for name, value in record.items()})


def typed(
    value: Any, hint: Any, path: str, where: object, error: type[HalfstepError] = RecipeError, do: str = ""
) -> Any:
    """`value` as its `hint` has it: lists become tuples, whole numbers floats, records dataclasses.

    A bool is no number, and a number is finite. Raises `error` with `path`, the dotted name of the value.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)

    def refuse(expected: str) -> NoReturn:
        place = ": ".join(part for part in (str(where), path) if part)
        raise error(got=shown(value), expected=expected, where=place, do=do or "give such a value")

    def one(value: Any, hint: Any, path: str = path) -> Any:
        return typed(value, hint, path, where, error, do)

    if hint is Any:
        return value
    if origin is Annotated:
        return _within(value, hint, one, refuse)
    if _is_union(hint):
        return _one_of(value, hint, one, refuse)
    if _is_record(hint):
        return build(hint, value, f"{path}.", where, error=error, do=do)
    if origin is tuple and isinstance(value, list | tuple) and (inner[-1] is Ellipsis or len(value) == len(inner)):
        return tuple(map(one, value, inner[:1] * len(value) if inner[-1] is Ellipsis else inner))
    if origin is list and isinstance(value, list | tuple):
        return [one(item, inner[0]) for item in value]
    if origin in (dict, Mapping) and isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: one(item, inner[1], f"{path}.{name[:80]}".lstrip(".")) for name, item in value.items()}
    if origin is Literal and any(type(value) is type(known) and value == known for known in inner):
        return value
    if origin is Literal and isinstance(value, str) and not do:
        do = f"did you mean {nearest(value, map(str, inner))}?"
    if hint is float and type(value) is int and value.bit_length() < 1024:  # a larger one is no float
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        if isinstance(value, float) and not math.isfinite(value):
            refuse("a finite number")
        return value
    return refuse(describe(hint))


def _within(value: Any, hint: Any, one: Callable[..., Any], refuse: Callable[[str], NoReturn]) -> Any:
    """A value of an `Annotated` hint, within all of its bounds."""
    limits = [note for note in _notes(hint) if isinstance(note, Bounds)]
    many = isinstance(value, list | tuple | Mapping)  # their length first: a million values are not typed in vain
    if many and not all(value in bounds for bounds in limits):
        refuse(describe(hint))
    found = one(value, typing.get_args(hint)[0])
    if not all(found in bounds for bounds in limits):
        refuse(describe(hint))
    return found


def _one_of(value: Any, hint: Any, one: Callable[..., Any], refuse: Callable[[str], NoReturn]) -> Any:
    """A value of a union: as the first of its hints that takes it."""
    hints = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if value is None and len(hints) < len(typing.get_args(hint)):
        return None
    for kind in hints:
        try:
            return one(value, kind)
        except HalfstepError:
            if len(hints) == 1:  # its own error says more than the union's
                raise
    return refuse(describe(hint))


def require_typed(value: Any, *, where: object = "", error: type[HalfstepError] = RecipeError, do: str = "") -> None:
    """Raise `error` where a field of nested dataclasses that were put together by hand is not as its hint has it."""
    for leaf in leaves(value):
        typed(leaf.value, leaf.hint, leaf.name, where, error, do)


def _notes(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()


def _required(cls: Any) -> list[str]:
    """The fields without a default."""
    if not dataclasses.is_dataclass(cls):
        return [name for name in cls._fields if name not in cls._field_defaults]
    items = dataclasses.fields(cls)
    return [one.name for one in items if one.default is one.default_factory is dataclasses.MISSING]


def _is_record(hint: Any) -> bool:
    """Whether a hint is a dataclass or a named tuple."""
    return dataclasses.is_dataclass(hint) or (isinstance(hint, type) and hasattr(hint, "_field_defaults"))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


_KINDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false, several"),
    str: ("a text", "texts"),
    Any: ("any value", "any values"),
}
"""Words for one and for several."""


def describe(hint: Any) -> str:
    """What a hint takes, in words: "a whole number, 1 to 64", "one of 'a', 'b'"."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        kind, bounds = describe(inner[0]), ", ".join(str(note) for note in inner[1:] if isinstance(note, Bounds))
        if not bounds:
            return kind
        return f"{kind}, {bounds}" if inner[0] in (int, float) else f"{kind}, {bounds} long"
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        return "a list of " + ", ".join(describe(h) for h in inner)
    if origin is tuple:
        return f"{_several(inner[0])} separated by commas"
    if origin is list:
        return f"a list of {_several(inner[0])}"
    if origin in (dict, Mapping):
        return f"names, each with {describe(inner[1])}"
    if _is_union(hint):
        return " or ".join(describe(h) for h in inner)
    if _is_record(hint):
        return "a section of fields"
    return _KINDS.get(hint, ("none", ""))[0]


def _choices(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = [note for note in inner[1:] if isinstance(note, Bounds)]
        if inner[0] not in (int, float) or not bounds:
            return _choices(inner[0])
        wide = [Bounds(b.low, None if (b.high or 0) >= _ENDLESS else b.high, b.above) for b in bounds]
        return ", ".join(map(str, wide))
    if origin is Literal:
        return ", ".join(str(one) for one in inner if one != "")
    if origin is tuple:
        return f"several, {_choices(inner[0])}".removesuffix(", ")
    if _is_union(hint):
        return " or ".join(_choices(one) for one in inner)
    return {int: "a whole number", float: "a number", bool: "true, false", str: ""}.get(hint, "none")


_ENDLESS = 10**9
"""A bound so high that nobody meets it."""


def _several(hint: Any) -> str:
    if typing.get_origin(hint) is Annotated:
        bounds = ", ".join(str(note) for note in _notes(hint) if isinstance(note, Bounds))
        long = "" if typing.get_args(hint)[0] in (int, float) else " long"
        return f"{_several(typing.get_args(hint)[0])}, each {bounds}{long}," if bounds else _several(hint.__origin__)
    return _KINDS[hint][1] if hint in _KINDS else f"{describe(hint)}s"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlong, _SHORT.maxlevel = 40, 3


def shown(value: object) -> str:
    """A value as an error message shows it: its `repr`, cut to what one line bears."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python writes no integer of more than some thousand digits
        return "a number of thousands of digits"
    return text if len(text) <= 120 else f"{text[:117]}..."
