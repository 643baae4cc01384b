"""Frozen dataclasses of plain fields from text and JSON, checked by their type hints; errors name the nearest field."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from halfstep.errors import RecipeError


def nearest(name: str, names: Iterable[str]) -> str:
    """The known name closest to a mistyped one, for error messages."""
    names = list(names)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
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
        got=repr(text), expected=_describe(hint), where=f"--set {path}", do="give a value of that type"
    )
    if isinstance(hint, types.UnionType):
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


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"{_describe(typing.get_args(hint)[0])}s separated by commas"
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(h) for h in typing.get_args(hint))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(hint, "none")


def build(cls: Any, record: Any, prefix: str, where: object) -> Any:
    """A dataclass from its JSON record. Raises RecipeError for unknown fields and for values of another type."""
    hints = typing.get_type_hints(cls)
    if not isinstance(record, Mapping):
        raise RecipeError(
            got=repr(record), expected="a section of fields", where=where, do=f"mend {prefix or 'the file'}"
        )
    values = {}
    for name, value in record.items():
        if name not in hints:
            close = prefix + nearest(name, hints)
            raise RecipeError(
                got=repr(prefix + name), expected="a field of the recipe", where=where, do=f"did you mean {close}?"
            )
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = build(hint, value, f"{prefix}{name}.", where)
        else:
            values[name] = typed(value, hint, prefix + name, where)
    return cls(**values)


def typed(value: Any, hint: Any, path: str, where: object) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(typed(v, typing.get_args(hint)[0], path, where) for v in value)
    if typing.get_origin(hint) is Literal and value in typing.get_args(hint):
        return value
    if hint is float and type(value) is int and value.bit_length() < 1024:  # a larger one is no float
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise RecipeError(
        got=repr(value), expected=_describe(hint), where=f"{where}: {path}", do="give a value of that type"
    )
