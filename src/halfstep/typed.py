"""Frozen dataclasses of plain fields from text and JSON, checked by their type hints; errors name the nearest field.

The one typed reader of the house. It understands int, float, str, bool, None, `Any`, `Literal`, unions,
`tuple[X, ...]`, `tuple[A, B]`, `list[X]`, `dict[str, X]`, nested dataclasses and `Annotated[hint, Bounds(low, high)]`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

from halfstep.errors import HalfstepError, RecipeError


@dataclass(frozen=True)
class Bounds:
    """From `low` to `high`, both allowed, None: open. Of a number its value, of a text or a collection its length."""

    low: float | None = None
    high: float | None = None

    def __contains__(self, value: Any) -> bool:
        size = value if isinstance(value, int | float) else len(value)
        return (self.low is None or size >= self.low) and (self.high is None or size <= self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"{self.low:g} or more"
        return f"at most {self.high:g}" if self.low is None else f"{self.low:g} to {self.high:g}"


def nearest(name: str, names: Iterable[str]) -> str:
    """The known name closest to a mistyped one, for error messages."""
    match = difflib.get_close_matches(name[:80], list(names), n=1, cutoff=0.0)  # difflib is slow on long texts
    return match[0] if match else ""


def leaves(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Every plain field of nested dataclasses, as (dotted name, value)."""
    for item in dataclasses.fields(value):
        inner = getattr(value, item.name)
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", inner


def parse(text: str, hint: Any, path: str) -> Any:
    """A value of type `hint` from its text; tuples are separated by commas."""
    refuse = RecipeError(
        got=shown(text), expected=_describe(hint), where=f"--set {path}", do="give a value of that type"
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
    """A dataclass from its JSON record; `prefix` is the dotted name of what is above it.

    Raises `error`, which says `where` and what to `do`, for what is no section of fields, for unknown and for missing
    fields, and for values of another type or out of their bounds.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
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
    for item in dataclasses.fields(cls):
        if item.default is item.default_factory is dataclasses.MISSING and item.name not in record:
            raise error(
                got=f"no {prefix}{item.name}",
                expected=_describe(hints[item.name]),
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
        place = f"{where}: {path}" if path else where
        raise error(got=shown(value), expected=expected, where=place, do=do or "give a value of that type")

    def each(values: Iterable[Any], hints: Iterable[Any]) -> list:
        return [typed(v, h, path, where, error, do) for v, h in zip(values, hints, strict=False)]

    if hint is Any:
        return value
    if origin is Annotated:
        limits = [bounds for bounds in inner[1:] if isinstance(bounds, Bounds)]
        many = isinstance(value, list | tuple | Mapping)  # their length first: a million values are not typed in vain
        if many and not all(value in bounds for bounds in limits):
            refuse(_describe(hint))
        found = typed(value, inner[0], path, where, error, do)
        if not all(found in bounds for bounds in limits):
            refuse(_describe(hint))
        return found
    if _is_union(hint):
        others = [one for one in inner if one is not type(None)]
        if value is None and len(others) < len(inner):
            return None
        for one in others:
            try:
                return typed(value, one, path, where, error, do)
            except HalfstepError:
                if len(others) == 1:  # its own error says more than the union's
                    raise
        refuse(_describe(hint))
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{path}.", where, error=error, do=do)
    if origin is tuple and isinstance(value, list | tuple):
        if inner[-1] is Ellipsis:
            return tuple(each(value, inner[:1] * len(value)))
        if len(value) == len(inner):
            return tuple(each(value, inner))
    if origin is list and isinstance(value, list | tuple):
        return each(value, inner * len(value))
    if origin in (dict, Mapping) and isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {n: typed(v, inner[1], f"{path}.{n[:80]}".lstrip("."), where, error, do) for n, v in value.items()}
    if origin is Literal and any(type(value) is type(known) and value == known for known in inner):
        return value
    if hint is float and type(value) is int and value.bit_length() < 1024:  # a larger one is no float
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        if isinstance(value, float) and not math.isfinite(value):
            refuse("a finite number")
        return value
    return refuse(_describe(hint))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _describe(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        kind, bounds = _describe(inner[0]), ", ".join(str(b) for b in inner[1:])
        return f"{kind}, {bounds}" if inner[0] in (int, float) else f"{kind}, {bounds} long"
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        return "a list of " + ", ".join(_describe(h) for h in inner)
    if origin is tuple:
        return f"{_describe(inner[0])}s separated by commas"
    if origin is list:
        return f"a list of {_describe(inner[0])}s"
    if origin in (dict, Mapping):
        return f"names, each with {_describe(inner[1])}"
    if _is_union(hint):
        return " or ".join(_describe(h) for h in inner)
    if dataclasses.is_dataclass(hint):
        return "a section of fields"
    known = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Any: "any value"}
    return known.get(hint, "none")


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
