"""Bank: named denoisers that can stand in for one another at any step, saved with shared weights stored once."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from safetensors.torch import save_file

from halfstep.content import fingerprint
from halfstep.denoiser import class_count, eager
from halfstep.disk import read_record, write_atomic
from halfstep.errors import ModelError, RecipeError
from halfstep.latents import decode_macs
from halfstep.masks import Masking, Pattern, mask_all, pack_all, packed_shapes, unpack_all
from halfstep.models import WEIGHTS, empty_model, filled_model, load_model, read_config
from halfstep.models import load_denoiser as load_denoiser  # scripts of before import it from here
from halfstep.plan import Price
from halfstep.profiling import call_times, count_macs, latency, layout_of
from halfstep.results import Cost
from halfstep.slices import Pieces, Slices, cut_all, require_inside, slices_to_json
from halfstep.sums import require_whole
from halfstep.typed import Bounds, shown
from halfstep.weights import (
    open_weights,
    require_finite,
    require_safetensors,
    require_same_shapes,
    shapes_of,
    stored_shapes,
)

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

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
        self._check_links()
        self._prices: dict[str, Price] = {}
        self._fingerprints: dict[tuple[str, torch.dtype], str] = {}
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

        It differs between processors and between widths: up to a third of an entry's time. Entries that share their
        weights in memory share the layout too: the one in which they are faster together.
        """
        found: dict[str, str] = {}
        for names in self._in_one_memory():
            total = dict.fromkeys(LAYOUTS, 0.0)
            for name in names:
                both = {layout: copy.deepcopy(self[name]).to(memory_format=kind) for layout, kind in LAYOUTS.items()}
                for layout, times in call_times(both, batch=batch, repeats=repeats).items():
                    total[layout] += median(times)
            found |= dict.fromkeys(names, min(total, key=lambda layout: total[layout]))
        return {name: found[name] for name in self.names}

    def set_layouts(self, layouts: Mapping[str, str]) -> None:
        """Put entries into memory layouts, as `fastest_layouts` names them; results stay the same but for rounding.

        Raises ModelError for two layouts of entries that share their weights in memory, and for an unknown layout.
        """
        for names in self._in_one_memory():
            asked = {name: layouts[name] for name in names if name in layouts}
            if len(set(asked.values())) > 1 or not set(asked.values()) <= set(LAYOUTS):
                raise ModelError(
                    got=f"{', '.join(f'{name}: {layout}' for name, layout in asked.items())}",
                    expected=f"one of {' or '.join(LAYOUTS)} for entries that share their weights",
                    where="memory layouts",
                    do="give them one layout",
                )
            for name, layout in asked.items():
                self[name].to(memory_format=LAYOUTS[layout])

    def layouts(self) -> dict[str, str]:
        """The memory layout that every entry's convolutions are in."""
        return {name: layout_of(self[name]) for name in self.names}

    def _in_one_memory(self) -> list[list[str]]:
        """The names, those together whose parameters are the same tensors: whatever is done to one is done to all."""
        groups: list[tuple[set[int], list[str]]] = []
        for name in self.names:
            own = {id(parameter) for parameter in self[name].parameters()}
            for known, names in groups:
                if known & own:
                    known |= own
                    names.append(name)
                    break
            else:
                groups.append((own, [name]))
        return [names for _, names in groups]

    def prices(self) -> dict[str, Price]:
        """What one call of every entry costs per image; masked weights count by their pattern."""
        if not self._prices:  # a tenth of a second each, and no weight or layout changes them
            layers = {name: masking.layers() for name, masking in self.masking.items()}
            self._prices = {name: Price(count_macs(self[name], densities=layers.get(name))) for name in self.names}
        return dict(self._prices)

    def fixed(self) -> Price:
        """What a trajectory costs per image beside its calls: decoding its sample, where the bank works on latents."""
        return Price(0) if self.vae is None else Price(decode_macs(self.vae, self.config))

    def fingerprint(self, name: str) -> str:
        """16 hex digits that change with any weight or setting of an entry, or with what it predicts; read once."""
        key = name, self.dtype
        if key not in self._fingerprints:
            self._fingerprints[key] = fingerprint(eager(self[name]), {"prediction_type": self.prediction_type})
        return self._fingerprints[key]

    def costs(self, *, batch: int = 1, repeats: int = 10) -> dict[str, Cost]:
        """What every entry costs here, timed in turns: MACs as `prices`, bytes as stored by `save_pretrained`."""
        measured = latency({name: self[name] for name in self.names}, batch=batch, repeats=repeats)
        prices, stored = self.prices(), {name: self._stored_bytes(name) / 2**20 for name in self.names}
        return {name: replace(cost, macs=prices[name].macs, stored_mib=stored[name]) for name, cost in measured.items()}

    def _stored_bytes(self, name: str) -> int:
        if name in self.shared:
            return 0
        weights, masking = eager(self[name]).state_dict(), self.masking.get(name)
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
        links = {n: link for n, link in self.shared.items() if n != name} | ({name: shared} if shared else {})
        masks = {n: mask for n, mask in self.masking.items() if n != name} | ({name: masking} if masking else {})
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
        kinds = {p.dtype for p in self[name].parameters()}
        if not kinds <= {self.dtype}:
            raise ModelError(
                got=f"weights in {', '.join(sorted(map(str, kinds)))}",
                expected=f"{self.dtype}, as the other entries",
                where=f"bank entry {name!r}",
                do="convert it with .to(...) first: one bank has one precision",
            )

    def _check_links(self) -> None:
        """Weights are shared with an entry that has its own, and masks lie over weights that are there."""
        for name, link in self.shared.items():
            if name not in self or link.source not in self or link.source in self.shared:
                raise ModelError(
                    got=f"the weights of {shown(link.source)} for {shown(name)}",
                    expected="an entry with weights of its own, for another entry",
                    where="bank",
                    do="share the weights of such an entry",
                )
        for name, masking in self.masking.items():
            masking.require_fits(eager(self[name]), f"bank entry {name!r}")

    def save_pretrained(self, folder: str | Path, *, safe_serialization: bool = True) -> None:
        """Write bank.json and one folder per entry; one that shares weights has slices.json in their place, one that is
        masked has mask.json and packed weights."""
        require_safetensors(safe_serialization, "safe_serialization")
        write_atomic(Path(folder), self._write)

    def _write(self, folder: Path) -> None:
        folder.mkdir()
        for name in self.names:
            model = eager(self[name])
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
                save_file(tensors, place / (_PACKED if masking else WEIGHTS), metadata={"format": "pt"})
        record: dict[str, Any] = {
            "format": 1,
            "reference": self.reference,
            "prediction_type": self.prediction_type,
            "entries": list(self.names),
        }
        (folder / "bank.json").write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        use_safetensors: bool | None = True,
        local_files_only: bool = True,
        checked: bool = False,
    ) -> Bank:
        """Read a bank, in float32 or `torch_dtype`. Raises ModelError for missing, foreign, changed or cut files.

        `local_files_only`: as diffusers has it; nothing is ever fetched. `checked`: that the digests of the pipeline
        around it were compared already.
        """
        require_safetensors(use_safetensors, "use_safetensors")
        folder = Path(folder)
        if not checked:
            require_whole(folder.absolute().parent)
        do = "give a folder that Bank.save_pretrained wrote"
        record = read_record(folder / "bank.json", _Record, what="a bank.json", do=do, error=ModelError)
        check_names(record.entries, folder / "bank.json")  # before any of them is joined to a path
        places = {name: folder / _folder(name) for name in record.entries}
        shared, masking = _links(places), _maskings(places)
        entries: dict[str, torch.nn.Module] = {}
        for name in sorted(places, key=lambda n: n in shared):  # sources come first
            place, mask = places[name], masking.get(name)
            if name in shared:
                entries[name] = _cut_model(place, entries[shared[name].source], shared[name].slices, mask)
            else:
                entries[name] = load_model(place) if mask is None else _unpacked_model(place, mask)
        ordered = {name: entries[name] for name in record.entries}
        bank = cls(ordered, record.reference, record.prediction_type, shared, masking)
        return bank if torch_dtype is None else bank.to(torch_dtype)


# --------------------------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class _Record:
    """What bank.json says."""

    entries: tuple[str, ...]
    reference: str
    prediction_type: str
    format: Annotated[int, Bounds(1, 1)] = 1


@dataclass(frozen=True)
class _Link:
    """What slices.json says."""

    of: str
    slices: dict[str, tuple[Annotated[Pieces, Bounds(1, 4096)], ...]] | None


@dataclass(frozen=True)
class _Mask:
    """What mask.json says."""

    pattern: str
    names: tuple[str, ...]


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
            raise refuse(f"an entry named {shown(name)}", letters)
        key = _folder(name).casefold()
        if key in taken:
            raise refuse(f"entries {taken[key]!r} and {name!r}", f"one name for the folder {_folder(name)}")
        taken[key] = name


def _folder(name: str) -> str:
    """An entry's folder: 2:4 becomes 2of4, for a colon is no file name on every system."""
    return name.replace(":", "of")


def _links(places: Mapping[str, Path]) -> dict[str, Shared]:
    """Which entries are stored without weights of their own. Raises ModelError for one that follows from no such entry:
    itself, one that is not in the bank, or one that has none either."""
    found = {}
    for name, place in places.items():
        file = place / "slices.json"
        if file.exists():
            link = read_record(file, _Link, what="slices", do="save the bank again", error=ModelError)
            found[name] = Shared(link.of, link.slices)
    for name, shared in found.items():
        if shared.source not in places or shared.source in found:
            raise ModelError(
                got=f"a part of {shown(shared.source)}",
                expected="one of an entry with weights of its own",
                where=places[name] / "slices.json",
                do="save the bank again",
            )
    return found


def _maskings(places: Mapping[str, Path]) -> dict[str, Masking]:
    found = {}
    for name, place in places.items():
        file = place / "mask.json"
        if file.exists():
            mask = read_record(file, _Mask, what="a mask", do="save the bank again", error=ModelError)
            try:
                found[name] = Masking(Pattern.parse(mask.pattern), mask.names)
            except RecipeError as error:  # which speaks of a recipe
                raise ModelError(got=error.got, expected=error.expected, where=file, do="save it again") from error
    return found


def _unpacked_model(folder: Path, masking: Masking) -> torch.nn.Module:
    empty, file = empty_model(read_config(folder), where=folder), folder / _PACKED
    masking.require_fits(empty, folder / "mask.json")
    shapes = {name: value.shape for name, value in empty.state_dict().items()}
    wanted = packed_shapes(shapes, masking)
    with open_weights(file, what="whole packed weights") as opened:
        places = [f"{name}.places" for name in masking.names]
        require_same_shapes(stored_shapes(opened, places), wanted, file, type(empty).__name__)
        stored = {name: opened.get_tensor(name) for name in wanted}
    weights = unpack_all(stored, masking, shapes, file)
    require_finite(weights, file)
    return filled_model(empty, {name: value.float() for name, value in weights.items()})


def _cut_model(
    folder: Path, source: torch.nn.Module, slices: Slices | None, masking: Masking | None
) -> torch.nn.Module:
    empty, weights = empty_model(read_config(folder), where=folder), source.state_dict()
    if slices is not None:
        require_inside(slices, shapes_of(weights), folder / "slices.json")
        weights = cut_all(weights, slices)
    require_same_shapes(shapes_of(weights), shapes_of(empty.state_dict()), folder, type(empty).__name__)
    if masking:
        masking.require_fits(empty, folder / "mask.json")
        weights = mask_all(weights, masking.names, masking.pattern)
    return filled_model(empty, {name: value.clone() for name, value in weights.items()})


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}
