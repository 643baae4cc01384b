"""Bank: named denoisers that can stand in for one another at any step, saved with shared weights stored once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
from safetensors.torch import save_file

from halfstep.core.disk import read_record, write_atomic
from halfstep.core.errors import ModelError
from halfstep.core.plan import Price
from halfstep.core.results import Cost
from halfstep.core.sums import require_whole
from halfstep.core.typed import Bounds, shown
from halfstep.core.watch import SILENT, Watch
from halfstep.engine.cluster import Held
from halfstep.engine.entry import (
    LAYOUTS,
    Backend,
    Entry,
    Half,
    Int8,
    Reuse,
    Rounded,
    read_entry,
    require_sources,
    sources_first,
)
from halfstep.engine.format1 import read_entry_of_before
from halfstep.engine.profiling import (
    Layout,
    count_macs,
    decode_macs,
    example_inputs,
    in_latency,
    interleave,
    latency,
    reused_macs,
)
from halfstep.engine.runtime import ready
from halfstep.nets.architectures import net_of
from halfstep.nets.content import fingerprint
from halfstep.nets.denoiser import Cond, Memo, class_count, eager, flattened, nested
from halfstep.nets.int8 import Spans, quantised
from halfstep.nets.precision import Cast, Precision
from halfstep.nets.reuse import Forwards, Order, Place, Reused, require_cut, taking, tapped
from halfstep.nets.weights import open_weights, require_finite, require_safetensors

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9 .,:+@=~_()-]{0,78}[A-Za-z0-9:+@=~_()-])?")
"""What an entry may be called: it becomes a folder's name, on any file system."""
MAX_ENTRIES = 256
NULL_FILE = "null.safetensors"


_SHARED = (
    "sample_size",
    "in_channels",
    "out_channels",
    "num_class_embeds",
    "class_embed_type",
    "num_embeds_ada_norm",
    "joint_attention_dim",
    "pooled_projection_dim",
    "caption_channels",
)
"""What entries of a bank have in common of their configs: what goes in and what comes out."""


class Bank(Held, torch.nn.Module):
    """Denoisers by name, with one reference.

    `entries`: name -> `Entry`, or a diffusers model with weights of its own. `prediction_type`: what all of them
    predict ("epsilon", "v_prediction" or "sample"). `vae`: what decodes their samples, where they work on latents;
    `classes`: the names of their classes by number, where they are known (the pipeline stores both). `null`: the
    condition of one sample, each tensor [1, ...], that stands for none, where the model was trained with one: guides
    run under it (classifier-free guidance, arXiv 2207.12598). `guidance`: the weight with which the reference is then
    guided by itself; 1: unguided.
    `bank[name]` is the model, `bank.entries[name]` the entry. An entry that reuses another's features (`entry.Reuse`)
    runs in a trajectory only: `bank[name]` refuses it, for its model alone is its source's; `computed` leaves it out.
    Raises ModelError when an entry's input, output or class conditioning differs from the reference's, when its weights
    do not follow from the entry that it names, for a reference that reuses another's features, and for names that make
    no folder of their own (see `check_names`).
    """

    def __init__(
        self,
        entries: Mapping[str, Entry | torch.nn.Module],
        reference: str,
        prediction_type: str,
        vae: torch.nn.Module | None = None,
        classes: Sequence[str] = (),
        null: Cond | None = None,
        guidance: float = 1.0,
    ):
        super().__init__()
        check_names(entries, "bank")
        able = [name for name, given in entries.items() if not isinstance(Entry.of(given).weights, Reuse | Rounded)]
        if reference not in able:
            raise ModelError(
                got=f"reference {reference!r}",
                expected=f"one of {', '.join(able)}",
                where="bank",
                do="name an entry that runs alone",
            )
        self.reference = reference
        self.prediction_type = prediction_type
        self.vae, self.classes, self.null, self.guidance = vae, tuple(classes), null, guidance
        if guidance != 1 and null is None:
            raise ModelError(
                got=f"guidance of weight {guidance:g}",
                expected="1, no guidance: the model has no null condition",
                where="bank",
                do="leave it out, or train the model with conditions dropped",
            )
        self._entries = {name: Entry.of(given) for name, given in entries.items()}
        require_sources({name: entry.weights for name, entry in self._entries.items()}, "bank")
        self._follow()
        # a second home of the models, for `to` and `state_dict`; names may hold dots, which ModuleDict refuses
        self.models = torch.nn.ModuleList(dict.fromkeys(entry.model for entry in self._entries.values()))
        for name in self:
            self._check_stands_in(name)
        class_count(self.config)  # refuses a conditioning that no sampler here can give
        for name, entry in self._entries.items():
            source = None if entry.weights.of is None else self[entry.weights.of]
            entry.require_sound(source, f"bank entry {name!r}")
        asked = {name: entry.runtime.layout for name, entry in self._entries.items()}
        if asked != {name: entry.seen().runtime.layout for name, entry in self._entries.items()}:
            self.set_layouts(asked)
        self.folder: Path | None = None  # that it was read from
        self._prices: dict[str, Price] = {}
        self._fingerprints: dict[tuple[str, torch.dtype], str] = {}
        self.eval()

    def __repr__(self) -> str:
        """A line for each entry, where its models print hundreds."""
        lines = (f"\n  {name}: {entry!r}" for name, entry in self._entries.items())
        return f"Bank of {len(self)}, reference {self.reference!r}, predicts {self.prediction_type}:{''.join(lines)}"

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Every entry by name, in order."""
        return MappingProxyType(self._entries)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    @property
    def computed(self) -> tuple[str, ...]:
        """The names of the entries that a call alone computes: all but those that reuse another's features."""
        return tuple(name for name, entry in self._entries.items() if not isinstance(entry.weights, Reuse))

    @property
    def uncast(self) -> tuple[str, ...]:
        """Those of the computed ones that are no copies in fewer bits."""
        return tuple(name for name in self.computed if not isinstance(self._entries[name].weights, Rounded))

    def __getitem__(self, name: str) -> Any:
        if name not in self._entries:
            raise ModelError(
                got=f"entry {name!r}",
                expected=f"one of {', '.join(self.names)}",
                where="bank",
                do="use the bank's names",
            )
        entry = self._entries[name]
        if isinstance(entry.weights, Reuse):
            raise ModelError(
                got=f"entry {name!r}, which takes features that {entry.weights.of!r} left in an earlier row",
                expected=f"one of {', '.join(self.computed)}, which run alone",
                where="bank",
                do="run it in a plan",
            )
        return entry.model

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @property
    def config(self) -> Mapping[str, Any]:
        """The reference's config: sample size, channels, class conditioning."""
        return self[self.reference].config

    @property
    def tokens(self) -> int | None:
        """How long a text is that calls are priced with: as that of `null`, for encoders pad all texts alike; None
        without one, as the family's pipelines have it."""
        text = (self.null or {}).get("encoder_hidden_states")
        return None if text is None else text.shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """The reference's, and of all entries that are not cast to another."""
        return next(self[self.reference].parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.models.parameters()).device

    @property
    def eager(self) -> bool:
        """Whether PyTorch runs every entry as it is; graphs are run by one thread of this process alone."""
        return all(entry.runtime.backend == "eager" for entry in self._entries.values())

    def forwards(self, name: str) -> Forwards:
        """How rows call an entry that runs alone, by its runtime. Raises ModelError as `ready`."""
        self[name]  # refuses what does not
        return ready(self._entries[name])

    def runtimes(self) -> dict[str, Backend]:
        """What runs every entry."""
        return {name: entry.runtime.backend for name, entry in self._entries.items()}

    def set_runtimes(self, backends: Mapping[str, Backend], batches: Iterable[int]) -> None:
        """Have computed entries run by these, graphs of one size for batches of these sizes; what reuses features runs
        as its source does. Results stay the same but for rounding (see `runtimes.py`). Raises ModelError for names
        that are no computed entries."""
        sizes = tuple(sorted(set(batches)))
        for name, backend in backends.items():
            self[name]
            entry = self._entries[name]
            self._entries[name] = replace(entry, runtime=replace(entry.runtime, backend=backend, batches=sizes))
        self._follow()

    def _follow(self) -> None:
        """What reuses features runs as its source does."""
        for name, entry in self._entries.items():
            if isinstance(entry.weights, Reuse):
                self._entries[name] = replace(entry, runtime=self._entries[entry.weights.of].runtime)

    def _apply(self, fn: Any, recurse: bool = True) -> Bank:
        """What moves a module or changes its precision: graphs of before are of other tensors."""
        for entry in self._entries.values():
            entry.graphs.clear()
        return super()._apply(fn, recurse)

    def set_layouts(self, layouts: Mapping[str, Layout]) -> None:
        """Put entries into memory layouts; results stay the same but for rounding (see `layouts.py`).

        Raises ModelError for two layouts of entries that share their weights in memory, for an unknown layout, and for
        names that are no entries.
        """
        for name in layouts:
            if name not in self:
                self[name]  # refuses what is no entry
        for names in self.in_one_memory():
            asked = {name: layouts[name] for name in names if name in layouts}
            if len(set(asked.values())) > 1 or not set(asked.values()) <= set(LAYOUTS):
                raise ModelError(
                    got=f"{', '.join(f'{name}: {layout}' for name, layout in asked.items())}",
                    expected=f"one of {' or '.join(LAYOUTS)} for entries that share their weights",
                    where="memory layouts",
                    do="give them one layout",
                )
            for name, layout in asked.items():
                self._entries[name] = self._entries[name].put(layout)
            self._entries |= {name: self._entries[name].seen() for name in names}

    def layouts(self) -> dict[str, Layout]:
        """The memory layout that every entry's convolutions are in."""
        return {name: entry.runtime.layout for name, entry in self._entries.items()}

    def in_one_memory(self) -> list[list[str]]:
        """The names, those together whose parameters are the same tensors: whatever is done to one is done to all."""
        groups: list[tuple[set[int], list[str]]] = []
        for name in self:
            own = {id(parameter) for parameter in self._entries[name].model.parameters()}
            for known, names in groups:
                if known & own:
                    known |= own
                    names.append(name)
                    break
            else:
                groups.append((own, [name]))
        return [names for _, names in groups]

    def prices(self) -> dict[str, Price]:
        """What one call of every entry costs per image; masked weights count by their pattern, and what reuses features
        by what is left to compute. A MAC in fewer bits is a MAC: what that saves is time."""
        for name in self:
            if name not in self._prices:  # a tenth of a second each, and no weight or layout changes them
                self._prices[name] = Price(self._macs(name))
        return {name: self._prices[name] for name in self}

    def _macs(self, name: str) -> int:
        entry = self._entries[name]
        if isinstance(entry.weights, Rounded):
            return self._macs(entry.weights.of)
        if not isinstance(entry.weights, Reuse):
            inputs = example_inputs(entry.model, tokens=self.tokens)
            return count_macs(entry.model, inputs=inputs, densities=entry.masking.layers() if entry.masking else None)
        links = ((other, self._entries[other].weights) for other in self._prices)
        for other, link in links:  # a forecast costs no more than what it forecasts for
            if isinstance(link, Reuse) and (link.of, link.cut) == (entry.weights.of, entry.weights.cut):
                return self._prices[other].macs
        source = self._entries[entry.weights.of]
        masking = (self._entries[source.weights.of] if isinstance(source.weights, Rounded) else source).masking
        return reused_macs(net_of(entry.model), entry.weights.cut, masking.layers() if masking else None, self.tokens)

    def fixed(self) -> Price:
        """What a trajectory costs per image beside its calls: decoding its sample, where the bank works on latents."""
        return Price(0) if self.vae is None else Price(decode_macs(self.vae, self.config))

    def fingerprint(self, name: str) -> str:
        """16 hex digits that change with any weight or setting of an entry, or with what it predicts; read once."""
        key, entry = (name, self.dtype), self._entries.get(name)
        if key not in self._fingerprints:
            told: dict[str, Any] = {"prediction_type": self.prediction_type}
            if self.null is not None:
                told["null"] = fingerprint(self.null)
            if entry is not None and isinstance(entry.weights, Reuse | Rounded):
                source = self.fingerprint(entry.weights.of)
                self._fingerprints[key] = fingerprint(source, {**told, **entry.weights.to_json()})
            else:
                self._fingerprints[key] = fingerprint(eager(self[name]), told)
        return self._fingerprints[key]

    def costs(self, *, batch: int = 1, repeats: int = 10) -> dict[str, Cost]:
        """What every entry costs here, timed in turns: MACs as `prices`, bytes as stored by `save_pretrained`."""
        called = {name: self.call(name, batch) for name in self}
        measured = latency(called, batch=batch, repeats=repeats, tokens=self.tokens)
        if not self.eager:  # which cannot be seen from a model
            times = interleave(calls_of(self, batch), repeats=repeats)
            by = self.runtimes()
            measured = {
                name: replace(cost, backend=by[name], **in_latency(times[name])) for name, cost in measured.items()
            }
        prices, stored = self.prices(), {name: entry.stored_bytes / 2**20 for name, entry in self._entries.items()}
        return {name: replace(cost, macs=prices[name].macs, stored_mib=stored[name]) for name, cost in measured.items()}

    def call(self, name: str, batch: int = 1) -> Any:
        """What one row of an entry calls, as a denoiser that is counted and timed: its model, or for one that reuses
        features its shallow pass on those of `example_inputs`, for calls of at most `batch` images."""
        if name not in self or not isinstance(link := self._entries[name].weights, Reuse):
            return self[name]
        model = self[link.of]
        return Reused(model, link.cut, link.order, *example_inputs(model, batch, tokens=self.tokens))

    @property
    def beside(self) -> dict[str, Any]:
        """What it has beside its entries, as its constructor takes it."""
        return {"vae": self.vae, "classes": self.classes, "null": self.null, "guidance": self.guidance}

    def _of(self, entries: Mapping[str, Entry | torch.nn.Module], **changed: Any) -> Bank:
        """A bank of other entries of the same kind, with all that is beside these but for what `changed`."""
        return Bank(entries, self.reference, self.prediction_type, **{**self.beside, **changed})

    def with_vae(self, vae: torch.nn.Module | None, classes: Sequence[str] = ()) -> Bank:
        """The same entries, with what decodes their samples (None: they are pictures) and the names of classes."""
        return self._of(self._entries, vae=vae, classes=classes)

    def with_null(self, null: Cond | None, guidance: float = 1.0) -> Bank:
        """The same entries with the condition that guides run under (None: under the own call's), and the weight with
        which the reference is guided. Raises ModelError for guidance without a null condition."""
        return self._of(self._entries, null=null, guidance=guidance)

    def only(self, names: Iterable[str]) -> Bank:
        """A bank of some of the entries and of what they follow from, in their order, with all that is beside them."""
        kept, more = set[str](), {*names}
        while more:
            kept |= more
            more = {of for name in more if (of := self._entries[name].weights.of) is not None} - kept
        return self._of({name: entry for name, entry in self._entries.items() if name in kept})

    def with_entry(self, name: str, entry: Entry | torch.nn.Module, prediction_type: str) -> Bank:
        """A bank with one more entry. Raises ModelError when it cannot stand in for the reference."""
        if prediction_type != self.prediction_type:
            raise ModelError(
                got=f"prediction type {prediction_type!r}",
                expected=repr(self.prediction_type),
                where=f"bank entry {name!r}",
                do="train it with the reference's prediction type",
            )
        return self._with({name: entry})

    def _with(self, more: Mapping[str, Entry | torch.nn.Module]) -> Bank:
        """A bank with more entries, or others of these names; of the rest, what is known stays known."""
        bank = self._of({**self._entries, **more})
        kept = {name for name, one in self._entries.items() if not {name, one.weights.of} & set(more)}
        bank._prices = {name: price for name, price in self._prices.items() if name in kept}
        bank._fingerprints = {key: found for key, found in self._fingerprints.items() if key[0] in kept}
        return bank

    def with_reuse(self, cuts: Iterable[Place], orders: Iterable[Order] = (0,), watch: Watch = SILENT) -> Bank:
        """A bank in which every computed entry can be reused at these cuts, e.g. as full~2, with order 1 full~2+; no
        weights are copied. What a net cannot give is left out, and `watch` is told why."""
        more: dict[str, Entry] = {}
        cuts, orders = list(dict.fromkeys(cuts)), list(dict.fromkeys(orders))
        for name in self.computed:
            for cut in cuts:
                try:
                    require_cut(self[name], cut, f"bank entry {name!r}")
                except ModelError as error:
                    watch.say(f"no reuse of {name} at cut {cut}: {error}")
                    continue
                links = [Reuse(name, cut, order) for order in orders]
                more |= {one.name: Entry(self[name], one) for one in links if one.name not in self}
        return self._with(more)

    def with_casts(self, precisions: Iterable[Precision], names: Iterable[str] | None = None) -> Bank:
        """A bank in which computed entries (all, where no `names` are given) are there in half precision too, as
        full@bf16; their weights are copied, and never stored twice."""
        entries = [one for one in names or self.uncast if one in self.uncast]
        links = [Half(name, precision) for name in entries for precision in dict.fromkeys(precisions)]
        more = {one.name: one for one in links if one.name not in self}
        casts = {name: Entry.of(Cast(self[one.of], one.precision)) for name, one in more.items()}
        return self._with({name: replace(entry, weights=more[name]) for name, entry in casts.items()})

    def with_int8(self, spans: Mapping[str, Spans]) -> Bank:
        """A bank in which these computed entries are there in eight bits too, as full@int8, each by its spans (see
        `calibration.calibrated`); their weights are copied, and never stored twice."""
        links = {link.name: link for link in (Int8(name, one) for name, one in spans.items())}
        more = {name: quantised(self[link.of], link.spans, f"bank entry {name!r}") for name, link in links.items()}
        return self._with({name: replace(Entry.of(model), weights=links[name]) for name, model in more.items()})

    def _check_stands_in(self, name: str) -> None:
        mine, theirs = self._entries[name].model.config, self.config
        for key in _SHARED:
            if json.dumps(mine.get(key)) != json.dumps(theirs.get(key)):  # (8, 8) is [8, 8] once loaded
                raise ModelError(
                    got=f"{key} {mine.get(key)}",
                    expected=f"{theirs.get(key)}, as the reference {self.reference!r}",
                    where=f"bank entry {name!r}",
                    do="only denoisers of the same input and output can share a bank",
                )
        model = self._entries[name].model
        kinds = {p.dtype for p in model.parameters()} if not isinstance(model, Cast) else set()
        if not kinds <= {self.dtype}:
            raise ModelError(
                got=f"weights in {', '.join(sorted(map(str, kinds)))}",
                expected=f"{self.dtype}, as the other entries",
                where=f"bank entry {name!r}",
                do="convert it with .to(...) first: one bank has one precision",
            )

    def save_pretrained(self, folder: str | Path, *, safe_serialization: bool = True) -> None:
        """Write bank.json and one folder per entry: its config.json, its entry.json, and what weights it has alone."""
        require_safetensors(safe_serialization, "safe_serialization")
        write_atomic(Path(folder), self._write)

    def _write(self, folder: Path) -> None:
        folder.mkdir()
        for name, entry in self._entries.items():
            entry.write(folder / _folder(name))
        record: dict[str, Any] = {
            "format": 2,
            "reference": self.reference,
            "prediction_type": self.prediction_type,
            "entries": list(self.names),
        }
        if self.null is not None:
            record["guidance"] = self.guidance
            save_file(dict(flattened(self.null)), folder / NULL_FILE, metadata={"format": "pt"})
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
        read = read_entry if record.format > 1 else read_entry_of_before
        stored = {name: read(folder / _folder(name)) for name in record.entries}
        require_sources({name: one.weights for name, one in stored.items()}, folder)
        entries: dict[str, Entry] = {}
        for name in sources_first({name: one.weights for name, one in stored.items()}):
            entries[name] = stored[name].restore(entries)
        null, known = _read_null(folder / NULL_FILE), {name: entries[name] for name in stored}
        bank = cls(known, record.reference, record.prediction_type, null=null, guidance=record.guidance)
        bank.folder = folder
        return bank if torch_dtype is None else bank.to(torch_dtype)


ModelMixin = Bank
"""The name under which diffusers looks for a class that knows `from_pretrained`, in the module of a component that is
not its own: so `DiffusionPipeline.from_pretrained` loads a bank (see `custom.py`)."""


def calls_of(bank: Bank, batch: int) -> dict[str, Callable[[], torch.Tensor]]:
    """One call of every entry at `batch` images as a row of a trajectory makes it: where it is, by its runtime, in
    inference mode, the timestep a tensor of no axes. What is timed. That of an entry that reuses features takes those
    of one call of its source, made here."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for name, entry in bank.entries.items():
        link = entry.weights if isinstance(entry.weights, Reuse) else None
        source = name if link is None else link.of
        inputs, memo = example_inputs(bank[source], batch, dtype=bank.dtype, tokens=bank.tokens), Memo()
        predict = bank.forwards(source).plain
        if link is not None:
            with torch.inference_mode():
                kept = tapped(bank[source], *inputs, [link.cut])[1][link.cut]
            memo[source, str(link.cut)] = tuple((float(k), kept) for k in range(link.rows_before))
            predict = taking(bank.forwards(source), source, link.cut, link.order, float(link.rows_before))
        call = partial(predict, inputs.sample, inputs.timestep[0], inputs.cond, memo)
        found[name] = torch.inference_mode()(call)
    return found


# --------------------------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class _Record:
    """What bank.json says."""

    entries: tuple[str, ...]
    reference: str
    prediction_type: str
    format: Annotated[int, Bounds(1, 2)] = 1
    guidance: Annotated[float, Bounds(-1e6, 1e6)] = 1.0


def _read_null(file: Path) -> Cond | None:
    """The null condition of a bank's folder; None where it has none. Raises ModelError for one that is broken."""
    if not file.is_file():
        return None
    with open_weights(file, what="a whole null condition") as opened:
        names = opened.keys()
        found = {name: opened.get_tensor(name) for name in names}
    require_finite(found, file)
    return nested(found)


def check_names(names: Iterable[object], where: object) -> None:
    """Raise ModelError unless each entry's name is plain text that makes a folder of its own inside the bank's.

    At most `MAX_ENTRIES` names of `NAME`'s letters, no two of which share a folder, whatever the case of letters.
    """

    def refuse(got: str, expected: str) -> ModelError:
        return ModelError(got=got, expected=expected, where=where, do="rename the entry")

    names = list(names)
    if len(names) > MAX_ENTRIES:
        raise refuse(f"{len(names)} entries", f"at most {MAX_ENTRIES}")
    taken = {name: name for name in ("bank.json", NULL_FILE)}
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
