"""Which files of a diffusers model's folder hold its weights: one or shards, plain or of a variant such as fp16."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from halfstep.core.disk import read_json
from halfstep.core.errors import ModelError
from halfstep.core.typed import shown

STEM = "diffusion_pytorch_model"
"""How diffusers calls the files of weights; transformers calls them `model`."""
WEIGHTS, INDEX = f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"
_SHARD = re.compile(r".*-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a model's tensors, of which `variant`, and which of them says so."""

    files: tuple[Path, ...]
    variant: str | None
    where: Path


def weight_files(folder: Path, variant: str | None = None, stem: str = STEM) -> WeightFiles:
    """Those of a folder, which are called `stem`: of a `variant` where one is asked for, else its plain weights; of a
    folder that has one variant alone that one, and a warning says so.

    Raises ModelError, which names what lies there instead, and for an index of other than files beside it.
    """
    found = sorted(_variants(folder, stem))
    if variant is None and not any((folder / name).exists() for name in _names(stem, None)) and len(found) == 1:
        variant = found[0]
        warnings.warn(f"{folder}: there are no plain weights; those of its only variant, {variant}", stacklevel=3)
    one, index = _names(stem, variant)
    if (folder / index).exists():
        return WeightFiles(_shards(folder, folder / index), variant, folder / index)
    if (folder / one).is_file():
        return WeightFiles((folder / one,), variant, folder / one)
    raise _missing(folder, one, found)


def _names(stem: str, variant: str | None) -> tuple[str, str]:
    """One file's name, and the index's of many."""
    own = "" if variant is None else f".{variant}"
    return f"{stem}{own}.safetensors", f"{stem}.safetensors.index{own}.json"


def _variants(folder: Path, stem: str) -> set[str]:
    named = re.compile(rf"{stem}(?:\.safetensors\.index)?\.(\w[\w-]{{0,40}}?)\.(?:safetensors|json)")
    matches = [named.fullmatch(file.name) for file in folder.glob(f"{stem}.*") if file.is_file()]
    return {found[1] for found in matches if found and found[1] != "index" and not _SHARD.fullmatch(found[1])}


def _missing(folder: Path, wanted: str, variants: list[str]) -> ModelError:
    if variants:
        got, do = f"only the variants {', '.join(variants)}", f"give variant={variants[0]!r}, or save it again without"
        return ModelError(got=got, expected=wanted, where=folder, do=do)
    kinds = ("*.safetensors", "*.index.json"), ("*.bin", "*.pt", "*.pth", "*.ckpt")
    beside, pickles = (sorted(p.name for kind in both for p in folder.glob(kind) if p.is_file()) for both in kinds)
    got = f"only {beside[0]}" if beside else f"only {pickles[0]}, a pickle" if pickles else "no weights"
    do = "save it again without a variant, or rename that file" if beside else ""
    return ModelError(got=got, expected=wanted, where=folder, do=do or "save it again with safe_serialization=True")


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    do = "copy or save the model again"
    record = read_json(index, what="the index of a model's shards", do=do, error=ModelError)
    names = record.get("weight_map")
    if not (isinstance(names, dict) and names and isinstance(record.get("metadata"), dict)):
        raise ModelError(got="no weight_map", expected="the file of every tensor", where=index, do=do)
    plain = sorted({name if isinstance(name, str) else "" for name in names.values()})
    for name in plain:
        if not name.endswith(".safetensors") or Path(name).name != name or not (folder / name).is_file():
            expected = "names of safetensors files beside it"
            raise ModelError(got=f"a shard {shown(name)}", expected=expected, where=index, do=do)
    return tuple(folder / name for name in plain)
