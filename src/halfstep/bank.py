"""Bank: named denoisers that can stand in for one another at any step, saved with shared weights stored once."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from halfstep.classes import read_classes
from halfstep.continuous import ContinuousUNet2DModel
from halfstep.denoiser import class_count
from halfstep.disk import read_json, write_atomic
from halfstep.errors import ModelError, shortened
from halfstep.masks import Masking, Pattern, mask_all, pack_all, unpack_all
from halfstep.profiling import call_times, count_macs, latency
from halfstep.results import Cost
from halfstep.slices import Slices, cut_all, slices_from_json, slices_to_json
from halfstep.spectral import SpectralUNet2DModel
from halfstep.uvit import UViT2DModel

DIGITS_MODEL = Path(__file__).parent / "assets" / "digits_model"
MODEL_CLASSES: dict[str, type[ModelMixin]] = {
    "UNet2DModel": diffusers.UNet2DModel,
    "UViT2DModel": UViT2DModel,
    "SpectralUNet2DModel": SpectralUNet2DModel,
    "ContinuousUNet2DModel": ContinuousUNet2DModel,
}
"""The denoiser classes that may be loaded, by the name in their config.json. Nothing else is ever imported."""

VAE_CLASSES: dict[str, type[ModelMixin]] = {"AutoencoderKL": diffusers.AutoencoderKL}

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PACKED = "packed.safetensors"

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9 .,:+@=~_()-]{0,78}[A-Za-z0-9:+@=~_()-])?")
"""What an entry may be called: it becomes a folder's name, on any file system."""
MAX_ENTRIES = 256


@dataclass(frozen=True)
class Shared:
    """That an entry's weights are slices of another entry's (all of them without `slices`), masked where the bank says
    so: it is stored without weights of its own."""

    source: str
    slices: Slices | None = None


class Bank(torch.nn.Module):
    """Denoisers by name, with one reference.

    `entries`: name -> diffusers model; `shared`: how an entry's weights follow from another entry's; `masking`: which
    weights of an entry follow an N:M pattern (they are stored packed, and their MACs count by the pattern).
    `prediction_type`: what all of them predict ("epsilon", "v_prediction" or "sample"). `vae`: what decodes their
    samples, where they work on latents; `classes`: the names of their classes by number, where they are known (the
    pipeline stores both).
    Raises ModelError when an entry's input, output or class conditioning differs from the reference's, and for names
    that make no folder of their own (see `check_names`).
    """

    def __init__(
        self,
        entries: Mapping[str, torch.nn.Module],
        reference: str,
        prediction_type: str,
        shared: Mapping[str, Shared] | None = None,
        masking: Mapping[str, Masking] | None = None,
        vae: torch.nn.Module | None = None,
        classes: Sequence[str] = (),
    ):
        super().__init__()
        check_names(entries, "bank")
        if reference not in entries:
            raise ModelError(
                got=f"reference {reference!r}",
                expected=f"one of {', '.join(entries)}",
                where="bank",
                do="name an entry",
            )
        self.names = tuple(entries)
        self.reference = reference
        self.prediction_type = prediction_type
        self.shared, self.masking = dict(shared or {}), dict(masking or {})
        self.vae, self.classes = vae, tuple(classes)
        self.models = torch.nn.ModuleList(entries.values())  # names may hold dots, which ModuleDict refuses
        for name in self.names:
            self._check_stands_in(name)
        class_count(self.config)  # refuses a conditioning that no sampler here can give
        self.eval()

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise ModelError(
                got=f"entry {name!r}",
                expected=f"one of {', '.join(self.names)}",
                where="bank",
                do="use the bank's names",
            )
        return self.models[self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    @property
    def config(self) -> Mapping[str, Any]:
        """The reference's config: sample size, channels, class conditioning."""
        return self[self.reference].config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.models.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.models.parameters()).device

    def fastest_layouts(self, batch: int, repeats: int = 5) -> dict[str, str]:
        """Which memory layout each entry runs faster in here, "contiguous" or "channels_last", timed in turns.

        It differs between processors and between widths: up to a third of an entry's time.
        """
        found = {}
        for name in self.names:
            both = {layout: copy.deepcopy(self[name]).to(memory_format=kind) for layout, kind in LAYOUTS.items()}
            times = call_times(both, batch=batch, repeats=repeats)
            found[name] = min(LAYOUTS, key=lambda layout: median(times[layout]))
        return found

    def set_layouts(self, layouts: Mapping[str, str]) -> None:
        """Put entries into memory layouts, as `fastest_layouts` names them; results stay the same but for rounding."""
        for name, layout in layouts.items():
            self[name].to(memory_format=LAYOUTS[layout])

    def macs(self) -> dict[str, int]:
        """MACs per image of one call of every entry; masked weights count by their pattern."""
        layers = {name: masking.layers() for name, masking in self.masking.items()}
        return {name: count_macs(self[name], densities=layers.get(name)) for name in self.names}

    def costs(self, *, batch: int = 1, repeats: int = 10) -> dict[str, Cost]:
        """What every entry costs here, timed in turns: MACs as `macs`, bytes as stored by `save_pretrained`."""
        measured = latency({name: self[name] for name in self.names}, batch=batch, repeats=repeats)
        macs, stored = self.macs(), {name: self._stored_bytes(name) / 2**20 for name in self.names}
        return {name: replace(cost, macs=macs[name], stored_mib=stored[name]) for name, cost in measured.items()}

    def _stored_bytes(self, name: str) -> int:
        if name in self.shared:
            return 0
        weights, masking = self[name].state_dict(), self.masking.get(name)
        return sum(value.nbytes for value in (pack_all(weights, masking) if masking else weights).values())

    def with_entry(
        self,
        name: str,
        model: torch.nn.Module,
        prediction_type: str,
        shared: Shared | None = None,
        masking: Masking | None = None,
    ) -> Bank:
        """A bank with one more entry. Raises ModelError when it cannot stand in for the reference."""
        if prediction_type != self.prediction_type:
            raise ModelError(
                got=f"prediction type {prediction_type!r}",
                expected=repr(self.prediction_type),
                where=f"bank entry {name!r}",
                do="train it with the reference's prediction type",
            )
        entries = {**dict(zip(self.names, self.models, strict=True)), name: model}
        links = {**self.shared, name: shared} if shared else self.shared
        masks = {**self.masking, name: masking} if masking else self.masking
        return Bank(entries, self.reference, prediction_type, links, masks, self.vae, self.classes)

    def _check_stands_in(self, name: str) -> None:
        mine, theirs = self[name].config, self.config
        for key in ("sample_size", "in_channels", "out_channels", "num_class_embeds", "class_embed_type"):
            if json.dumps(mine.get(key)) != json.dumps(theirs.get(key)):  # (8, 8) is [8, 8] once loaded
                raise ModelError(
                    got=f"{key} {mine.get(key)}",
                    expected=f"{theirs.get(key)}, as the reference {self.reference!r}",
                    where=f"bank entry {name!r}",
                    do="only denoisers of the same input and output can share a bank",
                )

    def save_pretrained(self, folder: str | Path, **_: object) -> None:
        """Write bank.json and one folder per entry; one that shares weights has slices.json in their place, one that is
        masked has mask.json and packed weights."""
        write_atomic(Path(folder), self._write)

    def _write(self, folder: Path) -> None:
        folder.mkdir()
        for name in self.names:
            model = self[name]
            place = folder / _folder(name)
            place.mkdir()
            config = {"_class_name": type(model).__name__, **_plain(model.config)}
            (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            masking = self.masking.get(name)
            if masking:
                mask = {"pattern": str(masking.pattern), "names": list(masking.names)}
                (place / "mask.json").write_text(json.dumps(mask) + "\n")
            if name in self.shared:
                shared = self.shared[name]
                link = {"of": shared.source, "slices": shared.slices and slices_to_json(shared.slices)}
                (place / "slices.json").write_text(json.dumps(link) + "\n")
            else:
                tensors = {key: value.contiguous().cpu() for key, value in model.state_dict().items()}
                tensors = pack_all(tensors, masking) if masking else tensors
                save_file(tensors, place / (_PACKED if masking else _WEIGHTS), metadata={"format": "pt"})
        record: dict[str, Any] = {
            "format": 1,
            "reference": self.reference,
            "prediction_type": self.prediction_type,
            "entries": list(self.names),
        }
        (folder / "bank.json").write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: object) -> Bank:
        """Read a bank. Raises RunError or ModelError for missing, foreign or cut files."""
        folder = Path(folder)
        record = read_json(folder / "bank.json", what="a bank.json", do="give a folder that Bank.save_pretrained wrote")
        try:
            names, reference, kind = list(record["entries"]), record["reference"], record["prediction_type"]
        except (KeyError, TypeError) as error:
            raise ModelError(
                got=f"no {error}",
                expected="entries, reference, prediction_type",
                where=folder / "bank.json",
                do="save it again",
            ) from error
        check_names(names, folder / "bank.json")  # before any of them is joined to a path
        entries: dict[str, torch.nn.Module] = {}
        shared: dict[str, Shared] = {}
        masking: dict[str, Masking] = {}
        for name in sorted(names, key=lambda n: (folder / _folder(n) / "slices.json").is_file()):  # sources come first
            place = folder / _folder(name)
            if (place / "mask.json").is_file():
                masking[name] = _masking(place / "mask.json")
            if (place / "slices.json").is_file():
                link = read_json(place / "slices.json", what="slices", do="save the bank again")
                shared[name] = Shared(link["of"], link["slices"] and slices_from_json(link["slices"]))
                entries[name] = _cut_model(place, entries[link["of"]], shared[name].slices, masking.get(name))
            elif name in masking:
                entries[name] = _unpacked_model(place, masking[name])
            else:
                entries[name] = load_model(place)
        return cls({name: entries[name] for name in names}, reference, kind, shared, masking)


def check_names(names: Iterable[object], where: object) -> None:
    """Raise ModelError unless each entry's name is plain text that makes a folder of its own inside the bank's.

    At most `MAX_ENTRIES` names of `NAME`'s letters, no two of which share a folder, whatever the case of letters.
    """

    def refuse(got: str, expected: str) -> ModelError:
        return ModelError(got=got, expected=expected, where=where, do="rename the entry")

    names = list(names)
    if len(names) > MAX_ENTRIES:
        raise refuse(f"{len(names)} entries", f"at most {MAX_ENTRIES}")
    taken = {"bank.json": "bank.json"}
    for name in names:
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            letters = "up to 80 plain letters, digits, spaces and .,:+@=~_()-, the first a letter or digit"
            raise refuse(f"an entry named {shortened(name)}", letters)
        key = _folder(name).casefold()
        if key in taken:
            raise refuse(f"entries {taken[key]!r} and {name!r}", f"one name for the folder {_folder(name)}")
        taken[key] = name


def _folder(name: str) -> str:
    """An entry's folder: 2:4 becomes 2of4, for a colon is no file name on every system."""
    return name.replace(":", "of")


def _masking(file: Path) -> Masking:
    record = read_json(file, what="a mask", do="save the bank again")
    try:
        return Masking(Pattern.parse(record["pattern"]), tuple(map(str, record["names"])))
    except (KeyError, TypeError) as error:
        raise ModelError(
            got=f"no {error}", expected="pattern and names", where=file, do="save the bank again"
        ) from error


def _unpacked_model(folder: Path, masking: Masking) -> torch.nn.Module:
    model, file = build_model(_config(folder), where=folder), folder / _PACKED
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    try:
        weights = unpack_all(load_file(file), masking, shapes, file)
        model.load_state_dict({name: value.float() for name, value in weights.items()})
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise ModelError(
            got=f"an unreadable file ({str(error).splitlines()[0]})",
            expected="whole packed weights that fit config.json",
            where=file,
            do="save or copy the model again",
        ) from error
    return model.eval()


def _cut_model(
    folder: Path, source: torch.nn.Module, slices: Slices | None, masking: Masking | None
) -> torch.nn.Module:
    model = build_model(_config(folder), where=folder)
    try:
        weights = cut_all(source.state_dict(), slices) if slices else source.state_dict()
        weights = mask_all(weights, masking.names, masking.pattern) if masking else weights
        model.load_state_dict({name: value.clone() for name, value in weights.items()})
    except (KeyError, RuntimeError, IndexError) as error:
        raise ModelError(
            got="slices that do not fit the stored weights",
            expected="matching files",
            where=folder,
            do="save the bank again",
        ) from error
    return model.eval()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            got="no config.json",
            expected="a diffusers model or pipeline folder",
            where=folder,
            do="give the folder that save_pretrained wrote, or 'digits' for the bundled model",
        ) from None
    except (json.JSONDecodeError, OSError, UnicodeDecodeError) as error:
        raise ModelError(
            got=f"an unreadable file ({error})",
            expected="JSON",
            where=folder / "config.json",
            do="save the model again",
        ) from error


def build_model(
    config: Mapping[str, Any], *, where: object, classes: Mapping[str, type[ModelMixin]] = MODEL_CLASSES
) -> ModelMixin:
    """A model with fresh weights from a diffusers config that names one of `classes`. Raises ModelError."""
    name = config.get("_class_name") if isinstance(config, Mapping) else None
    if name not in classes:
        raise ModelError(
            got=f"a {name or 'config without a class'}",
            expected=f"a model of class {' or '.join(classes)}",
            where=where,
            do="give a denoiser (or for latents its VAE) in diffusers format",
        )
    try:
        model = classes[str(name)].from_config(dict(config))
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ModelError(
            got=f"a config that builds nothing ({error})", expected=f"a {name}", where=where, do="mend it"
        ) from error
    return model


def load_model(folder: Path, classes: Mapping[str, type[ModelMixin]] = MODEL_CLASSES) -> ModelMixin:
    """A diffusers model from a folder with config.json and safetensors weights. Raises ModelError."""
    folder = Path(folder)
    model = build_model(_config(folder), where=folder, classes=classes)
    file = folder / _WEIGHTS
    if not file.is_file():
        others = [p.name for p in folder.glob("*.bin")]
        raise ModelError(
            got=f"only {others[0]}, a pickle" if others else "no weights",
            expected=_WEIGHTS,
            where=folder,
            do="save it again with safe_serialization=True",
        )
    try:
        model.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    except (SafetensorError, OSError) as error:
        raise ModelError(
            got=f"an unreadable file ({error})",
            expected="whole safetensors weights",
            where=file,
            do="copy or save it again",
        ) from error
    except RuntimeError as error:
        raise ModelError(
            got="weights of another network",
            expected="weights that fit config.json",
            where=file,
            do="save the model again",
        ) from error
    return model.eval()


def _pipeline_folder(source: str | Path) -> Path:
    folder = DIGITS_MODEL if source == "digits" else Path(source)
    if not folder.is_dir():
        raise ModelError(
            got="no such folder", expected="a diffusers model or pipeline folder", where=folder, do="check --model"
        )
    return folder / "pipeline" if (folder / "pipeline" / "model_index.json").is_file() else folder


def load_vae(source: str | Path) -> Any:
    """The VAE of a latent diffusion pipeline (or of a folder that is one); None for pixels. Raises ModelError."""
    folder = _pipeline_folder(source)
    for place in (folder, folder / "vae", folder / "vqvae"):
        if (place / "config.json").is_file() and (place != folder or _config(place).get("_class_name") in VAE_CLASSES):
            return load_model(place, VAE_CLASSES).requires_grad_(False)
    return None


def load_classes(source: str | Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes of a denoiser with this config, by number; () without. Raises ModelError."""
    folder, count = _pipeline_folder(source), class_count(config)
    for place in (folder, folder.parent):
        names = read_classes(place, count) if count else ()
        if names:
            return names
    return ()


def load_denoiser(source: str | Path) -> tuple[ModelMixin, dict[str, Any]]:
    """A denoiser and the config of its noise scheduler.

    `source`: "digits" (bundled), a diffusers pipeline folder (its `unet` and `scheduler`), a run folder of
    `halfstep train`, or a model folder (then DDPM's linear schedule with epsilon prediction is assumed, unless a
    folder `scheduler` stands beside or inside it). Raises ModelError.
    """
    folder = _pipeline_folder(source)
    inner = folder / "unet" if (folder / "unet").is_dir() else folder
    model = load_model(inner)
    for place in (folder / "scheduler", folder.parent / "scheduler"):
        if (place / "scheduler_config.json").is_file():
            record = read_json(place / "scheduler_config.json", what="a scheduler config", do="save the pipeline again")
            return model, record
    return model, dict(diffusers.DDPMScheduler().config)
