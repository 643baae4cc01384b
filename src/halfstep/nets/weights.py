"""Safetensors files that anybody may have written: bounded headers, names and shapes compared before a tensor loads."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from halfstep.core.errors import HalfstepError, ModelError
from halfstep.core.typed import shown

MAX_HEADER = 16 << 20
"""Bytes of a header that are read: a hundred thousand tensors. Stable Diffusion's U-Net has 686."""
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be stored as, by safetensors' name. Eight bits and fewer need scales, which no file of ours has."""

_FUSE = "fuse the LoRA first: pipe.fuse_lora(), then pipe.unload_lora_weights()"
LOADED: Mapping[str, tuple[str, str]] = {
    ".base_layer.": ("a LoRA", _FUSE),
    ".lora_": ("a LoRA", _FUSE),
    ".to_k_ip.": ("an IP-Adapter", "pipe.unload_ip_adapter(); a plan can be attached to the pipeline that has it"),
}
"""Parts of tensors' names that tell what was loaded into a network, and what to do about it."""


@contextmanager
def open_weights(
    path: str | Path,
    *,
    framework: str = "pt",
    what: str = "whole safetensors weights",
    do: str = "copy or save it again",
    error: type[HalfstepError] = ModelError,
) -> Iterator[Any]:
    """A safetensors file, open: `.keys()`, `.get_slice(name)` for its shape, `.get_tensor(name)`, `.metadata()`.

    safetensors itself compares every tensor with the file's size; its header, which it would read up to 100 MB of, is
    bounded here. Raises `error` for a file that is missing, cut, no regular file or no safetensors, also while it is
    read inside the `with`.
    """
    path = Path(path)
    try:
        _require_short_header(path)
        with safe_open(path, framework=framework) as file:
            yield file
    except FileNotFoundError:
        raise error(got="no such file", expected=what, where=path, do=do) from None
    except (SafetensorError, OSError) as broken:
        raise error(got=f"an unreadable file ({broken})", expected=what, where=path, do=do) from broken


def _require_short_header(path: Path) -> None:
    """The first eight bytes say how many bytes of JSON follow."""
    if not path.is_file():  # also a named pipe, which would wait for ever
        raise FileNotFoundError if not path.exists() else OSError("not a regular file")
    with path.open("rb") as file:
        first = file.read(8)
    if len(first) < 8:
        raise OSError("shorter than a header")
    (length,) = struct.unpack("<Q", first)
    if length > min(MAX_HEADER, path.stat().st_size - 8):
        raise OSError(f"a header of {length} bytes")


def require_safetensors(given: bool | None, option: str) -> None:
    """Raise ModelError for a diffusers option that asks for pickled weights."""
    if given is False:
        raise ModelError(
            got=f"{option}=False", expected="safetensors", where=option, do="leave it out: nothing is pickled here"
        )


def stored_shapes(file: Any, unsigned: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an open file.

    Raises OSError for values that are no floating-point numbers, and for those named `unsigned` that are no bytes.
    """
    found = {}
    for name in file.keys():  # noqa: SIM118 (no mapping)
        tensor, known = file.get_slice(name), ("U8",) if name in unsigned else tuple(FLOATS)
        if tensor.get_dtype() not in known:
            raise OSError(f"{shown(name)} in {tensor.get_dtype()}, where {', '.join(known)} is read")
        found[name] = tuple(tensor.get_shape())
    return found


def stored_dtypes(file: Any) -> set[torch.dtype]:
    """The precisions of an open file's tensors, which `stored_shapes` took."""
    return {FLOATS[file.get_slice(name).get_dtype()] for name in file.keys()}  # noqa: SIM118 (no mapping)


def require_plain(names: Iterable[str], where: object) -> None:
    """Raise ModelError for a network, by the names of its tensors, into which a LoRA (of PEFT) or an IP-Adapter was
    loaded: slices, masks and files of it would leave that out."""
    for name in names:
        for mark, (what, do) in LOADED.items():
            if mark in name:
                expected = "a network of its own weights alone"
                raise ModelError(
                    got=f"{what} beside its weights ({shown(name)})", expected=expected, where=where, do=do
                )


def shapes_of(weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


def require_same_shapes(
    stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: object, of: str
) -> None:
    """Raise ModelError, which names a tensor and its shapes, unless a file holds just the tensors of a network `of`."""

    def refuse(got: str, expected: str, do: str = "save the model again, with its own config.json") -> ModelError:
        return ModelError(got=got, expected=expected, where=where, do=do)

    missing, more = [n for n in wanted if n not in stored], [n for n in stored if n not in wanted]
    prefixed = [name for name in more if name.startswith("_orig_mod.")]
    if prefixed:
        do = "save what torch.compile wraps: model._orig_mod.save_pretrained(...)"
        raise refuse(f"a tensor {shown(prefixed[0])}", shown(prefixed[0].removeprefix("_orig_mod.")), do)
    if missing:
        beside = f", but {shown(more[0])}" if more else ""
        raise refuse(f"no tensor {shown(missing[0])}{_and(len(missing) - 1)}{beside}", f"those of a {of}")
    if more:
        raise refuse(f"a tensor {shown(more[0])}{_and(len(more) - 1)}", f"only those of a {of}")
    for name, shape in wanted.items():
        if stored[name] != shape:
            raise refuse(f"{name} of shape {_shape(stored[name])}", f"{_shape(shape)}, as config.json says")


def require_finite(weights: Mapping[str, torch.Tensor], where: object) -> None:
    """Raise ModelError, which names a tensor, for weights that hold NaN or infinity."""
    broken = [name for name, value in weights.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise ModelError(
            got=f"NaN or infinity in {broken[0]}{_and(len(broken) - 1)}",
            expected="finite weights",
            where=where,
            do="take an earlier checkpoint: a training that diverged draws nothing",
        )


def _and(more: int) -> str:
    return f" and {more} more" if more else ""


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"
