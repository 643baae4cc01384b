"""Entry: a bank's denoiser, where its weights come from, its mask, how it runs here, and its folder on disk.

A kind of weights is one class here: what it says of itself in entry.json, which tensors it stores, how many bytes they
take, how it is read back, and what it refuses. The bank knows names, and none of these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors.torch import save_file

from halfstep.core.disk import read_record
from halfstep.core.errors import ModelError, RecipeError
from halfstep.core.typed import Bounds, build, shown
from halfstep.engine.profiling import Layout, layout_of
from halfstep.nets.denoiser import eager
from halfstep.nets.files import WEIGHTS
from halfstep.nets.int8 import Span, quantised, spans_of
from halfstep.nets.masks import Masking, Pattern, mask_all, pack_all, packed_shapes, unpack_all
from halfstep.nets.models import empty_model, filled_model, load_model, read_config
from halfstep.nets.precision import Cast, Precision
from halfstep.nets.reuse import ORDERS, OUT, Order, Place, require_cut
from halfstep.nets.slices import Pieces, cut_all, require_inside, slices_to_json
from halfstep.nets.weights import (
    open_weights,
    require_finite,
    require_plain,
    require_same_shapes,
    shapes_of,
    stored_shapes,
)

LAYOUTS: Mapping[Layout, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
_PACKED = "packed.safetensors"
_DO = "save the bank again"
Tensors = Mapping[str, torch.Tensor]
StoredSlices = Mapping[str, tuple[Annotated[Pieces, Bounds(1, 4096)], ...]]
"""`Slices` with what a file may hold of them."""
StoredSpans = Annotated[Mapping[str, Span], Bounds(1, 65_536)]
"""`Spans` with what a file may hold of them."""


Backend = Literal["eager", "compile", "cudagraph", "onnx", "openvino"]
"""What runs a call: PyTorch as it is, torch.compile, that with CUDA graphs, ONNX Runtime, OpenVINO."""


@dataclass(frozen=True)
class Runtime:
    """How an entry's calls run in this process: a matter of the machine, which changes numbers only by their rounding
    and is not stored. `layout`: the memory layout of its convolutions' weights; `backend`: what runs them; `batches`:
    the sizes of the batches that graphs of one size are made for. Others run eagerly."""

    layout: Layout = "contiguous"
    backend: Backend = "eager"
    batches: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.layout if self.backend == "eager" else f"{self.backend}, {self.layout}"


EAGER = Runtime()


# ------------------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Own:
    """Weights of its own; under a mask they are stored packed."""

    kind, of = "own", None

    def may_follow(self, source: Weights) -> bool:
        """Whether these weights may follow from an entry with the `source`'s."""
        return False

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def require_fits(self, model: Any, source: Any, where: object) -> None:
        """There is nothing that they must follow from."""

    def tensors(self, weights: Tensors, masking: Masking | None) -> tuple[str, Tensors]:
        """The file that is stored, and what it holds."""
        return (_PACKED, pack_all(weights, masking)) if masking else (WEIGHTS, weights)

    def restore(self, stored: Stored, source: Any) -> Any:
        """The model. Raises ModelError for files that are missing, cut or foreign."""
        if stored.masking is None:
            return load_model(stored.folder)
        empty, file = stored.empty(), stored.folder / _PACKED
        shapes = {name: value.shape for name, value in empty.state_dict().items()}
        wanted = packed_shapes(shapes, stored.masking)
        with open_weights(file, what="whole packed weights") as opened:
            places = [f"{name}.places" for name in stored.masking.names]
            require_same_shapes(stored_shapes(opened, places), wanted, file, type(empty).__name__)
            found = {name: opened.get_tensor(name) for name in wanted}
        weights = unpack_all(found, stored.masking, shapes, file)
        require_finite(weights, file)
        return filled_model(empty, {name: value.float() for name, value in weights.items()})


@dataclass(frozen=True)
class Twin:
    """All the weights of entry `of`, which has its own: solver steps of a continuous net, masks over one net."""

    of: str
    kind = "twin"

    def may_follow(self, source: Weights) -> bool:
        return source.of is None

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "of": self.of}

    def taken(self, weights: Tensors, where: object) -> Tensors:
        """What of the source's weights is this entry's, before its mask. Raises ModelError."""
        return weights

    def require_fits(self, model: Any, source: Any, where: object) -> Tensors:
        """What is taken of the source. Raises ModelError unless it has the shapes of the model's weights."""
        model, taken = eager(model), self.taken(eager(source).state_dict(), where)
        require_same_shapes(shapes_of(taken), shapes_of(model.state_dict()), where, type(model).__name__)
        return taken

    def tensors(self, weights: Tensors, masking: Masking | None) -> tuple[str, Tensors]:
        return WEIGHTS, {}

    def restore(self, stored: Stored, source: Any) -> Any:
        empty, masking = stored.empty(), stored.masking
        weights = self.require_fits(empty, source, stored.weights_file)
        weights = mask_all(weights, masking.names, masking.pattern) if masking else weights
        return filled_model(empty, {name: value.clone() for name, value in weights.items()})


@dataclass(frozen=True)
class Cut(Twin):
    """Slices of the weights of entry `of`, which has its own: a narrower width of a supernet."""

    slices: StoredSlices
    kind = "cut"

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"slices": slices_to_json(self.slices)}

    def taken(self, weights: Tensors, where: object) -> Tensors:
        require_inside(self.slices, shapes_of(weights), where)
        return cut_all(weights, self.slices)


@dataclass(frozen=True)
class Reuse:
    """No weights: entry `of`, computed from a cut on, with features that its earlier rows left (see `nets/reuse.py`).

    `cut`: which, or "out" for its whole prediction; `order`: 0 takes the last features as they are, 1 a straight line
    through the last two. `of` may be any entry that computes itself: a width, a mask, a twin. The model is `of`'s own.
    """

    of: str
    cut: Place
    order: Order = 0
    kind = "reuse"

    @property
    def name(self) -> str:
        """What such an entry is called: full~2, with order 1 full~2+."""
        return f"{self.of}~{self.cut}{'+' * self.order}"

    @property
    def rows_before(self) -> int:
        """How many rows of its source it needs before it."""
        return self.order + 1

    def may_follow(self, source: Weights) -> bool:
        return not isinstance(source, Reuse)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "of": self.of, "cut": self.cut, "order": self.order}

    def require_fits(self, model: Any, source: Any, where: object) -> None:
        """Raise ModelError unless the model is the source's, and can be cut there."""
        if eager(model) is not eager(source):
            got, expected = "a model of its own", f"that of {self.of!r}, whose features it takes"
            raise ModelError(got=got, expected=expected, where=where, do="make the entry with its source's model")
        if self.order not in ORDERS:
            got, expected = f"order {self.order!r}", " or ".join(map(str, ORDERS))
            raise ModelError(got=got, expected=expected, where=where, do="choose one of them")
        require_cut(model, self.cut, where)

    def tensors(self, weights: Tensors, masking: Masking | None) -> tuple[str, Tensors]:
        return WEIGHTS, {}

    def restore(self, stored: Stored, source: Any) -> Any:
        return source


@dataclass(frozen=True)
class Half:
    """The weights of entry `of`, which computes itself, in half precision: another net as far as numbers go, judged and
    searched as such. Nothing is stored; in memory it is a copy."""

    of: str
    precision: Precision
    kind = "cast"

    @property
    def name(self) -> str:
        """What such an entry is called: full@bf16."""
        return f"{self.of}@{self.precision}"

    def may_follow(self, source: Weights) -> bool:
        return not isinstance(source, Reuse | Rounded)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "of": self.of, "precision": self.precision}

    def require_fits(self, model: Any, source: Any, where: object) -> None:
        """Raise ModelError unless the model is one of the source's shapes, cast to this precision."""
        if not isinstance(model, Cast) or model.precision != self.precision:
            got, expected = f"a {type(model).__name__}", f"the model of {self.of!r} in {self.precision}"
            raise ModelError(got=got, expected=expected, where=where, do="make the entry with bank.with_casts")
        kind = type(model.model).__name__
        require_same_shapes(shapes_of(eager(source).state_dict()), shapes_of(model.model.state_dict()), where, kind)

    def tensors(self, weights: Tensors, masking: Masking | None) -> tuple[str, Tensors]:
        return WEIGHTS, {}

    def restore(self, stored: Stored, source: Any) -> Any:
        return Cast(source, self.precision)


@dataclass(frozen=True)
class Int8:
    """The weights of entry `of`, which computes itself, in eight bits, with the activations of the same layers: another
    net as far as numbers go. Stored are the spans of these alone, which calibration saw; in memory it is a copy."""

    of: str
    spans: StoredSpans
    kind = "int8"

    @property
    def name(self) -> str:
        """What such an entry is called: full@int8."""
        return f"{self.of}@int8"

    def may_follow(self, source: Weights) -> bool:
        return not isinstance(source, Reuse | Rounded)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "of": self.of, "spans": {name: list(span) for name, span in self.spans.items()}}

    def require_fits(self, model: Any, source: Any, where: object) -> None:
        """Raise ModelError unless the model is one of the source's shapes, with just these layers in eight bits."""
        if spans_of(model) != dict(self.spans):
            got, expected = f"a {type(model).__name__} of other ranges", f"the model of {self.of!r} in int8, by these"
            raise ModelError(got=got, expected=expected, where=where, do="make the entry with bank.with_int8")
        kind = type(eager(model)).__name__
        require_same_shapes(shapes_of(eager(source).state_dict()), shapes_of(eager(model).state_dict()), where, kind)

    def tensors(self, weights: Tensors, masking: Masking | None) -> tuple[str, Tensors]:
        return WEIGHTS, {}

    def restore(self, stored: Stored, source: Any) -> Any:
        return quantised(source, self.spans, stored.weights_file)


Rounded = Half | Int8
"""What computes with another entry's weights in fewer bits."""
Weights = Own | Cut | Twin | Reuse | Half | Int8
_KINDS: dict[str, type[Weights]] = {kind.kind: kind for kind in (Own, Cut, Twin, Reuse, Half, Int8)}
_RANKS: dict[type, int] = {Own: 0, Twin: 1, Cut: 1, Half: 2, Int8: 2, Reuse: 3}
"""Whatever follows from another is of a higher rank."""


_REUSE = re.compile(r"(?P<of>.+)~(?P<cut>\d{1,4}|out)(?P<plus>\+?)")


def reuse_named(name: str) -> Reuse | None:
    """The reuse that an entry of this name is: what `Reuse.name` says, read back; None for other names."""
    found = _REUSE.fullmatch(name)
    if found is None:
        return None
    cut: Place = OUT if found["cut"] == OUT else int(found["cut"])
    return Reuse(found["of"], cut, 1 if found["plus"] else 0)


def require_sources(weights: Mapping[str, Weights], where: object) -> None:
    """Raise ModelError unless whatever follows from another entry's weights follows from one that has its own, and what
    reuses features takes those of an entry that computes them."""
    for name, link in weights.items():
        if link.of is not None and not (link.of in weights and link.may_follow(weights[link.of])):
            if isinstance(link, Reuse):
                got, expected = f"the features of {shown(link.of)}", "an entry that computes its own"
                raise ModelError(
                    got=f"{got} for {shown(name)}", expected=expected, where=where, do="reuse those of one"
                )
            raise ModelError(
                got=f"the weights of {shown(link.of)} for {shown(name)}",
                expected="an entry with weights of its own, for another entry",
                where=where,
                do="share the weights of such an entry",
            )


def sources_first(weights: Mapping[str, Weights]) -> list[str]:
    """The names, each after the one that it follows from."""
    return sorted(weights, key=lambda name: _RANKS[type(weights[name])])


# --------------------------------------------------------------------------------------------------------------- entry


class Graphs(dict[Runtime, Any]):
    """What was made of an entry to run it, by runtime: left behind by what is copied or pickled."""

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()


@dataclass(frozen=True)
class Entry:
    """A denoiser of a bank.

    `model`: a diffusers model that runs as it is, its mask applied; `weights`: how they follow; `masking`: which of
    them follow an N:M pattern (their MACs count by it); `runtime`: how its calls run here; `graphs`: of its weights as
    they are, made by `runtime.ready`.
    """

    model: Any
    weights: Weights = Own()
    masking: Masking | None = None
    runtime: Runtime = EAGER
    graphs: Graphs = field(default_factory=Graphs, compare=False, repr=False)

    def __repr__(self) -> str:
        """One line, where a model prints hundreds."""
        count = sum(one.numel() for one in self.model.parameters())
        own = "own weights" if self.weights.of is None else f"{self.weights.kind} of {self.weights.of}"
        if isinstance(self.weights, Reuse):
            own += f" at cut {self.weights.cut}, order {self.weights.order}"
        masked = "" if self.masking is None else f"masked {self.masking.pattern}, "
        return f"Entry({type(self.model).__name__} of {count:,} parameters, {own}, {masked}{self.runtime})"

    @classmethod
    def of(cls, given: Entry | torch.nn.Module) -> Entry:
        """A bare model is an entry with weights of its own that runs as it is."""
        return given if isinstance(given, Entry) else cls(given, runtime=Runtime(layout_of(given)))

    def put(self, layout: Layout) -> Entry:
        """The entry in a memory layout, into which its model is moved. A model without convolutions has but one."""
        self.model.to(memory_format=LAYOUTS[layout])
        self.graphs.clear()
        return self.seen()

    def seen(self) -> Entry:
        """The entry with the memory layout that its model is in."""
        return replace(self, runtime=replace(self.runtime, layout=layout_of(self.model)))

    def require_sound(self, source: Any, where: object) -> None:
        """Raise ModelError for a mask that fits no weights, for weights that do not follow from the `source`'s, and for
        a model with a LoRA or an IP-Adapter in it."""
        require_plain(eager(self.model).state_dict(), where)
        if self.masking and isinstance(self.weights, Reuse | Rounded):
            got, expected = "a mask", f"none beside that of {self.weights.of!r}, from which it follows"
            raise ModelError(got=got, expected=expected, where=where, do="take it of a masked entry")
        if self.masking:
            self.masking.require_fits(eager(self.model), where)
        self.weights.require_fits(self.model, source, where)

    @property
    def stored_bytes(self) -> int:
        """What its tensors take as stored."""
        _, tensors = self.weights.tensors(eager(self.model).state_dict(), self.masking)
        return sum(value.nbytes for value in tensors.values())

    def write(self, folder: Path) -> None:
        """Write config.json, entry.json and the tensors of its own, if it has any, into a new folder; what reuses
        features or is in fewer bits has an entry.json alone."""
        model = eager(self.model)
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        record: dict[str, Any] = {"format": 1, "weights": self.weights.to_json()}
        if self.masking:
            record["masking"] = {"pattern": str(self.masking.pattern), "names": list(self.masking.names)}
        folder.mkdir()
        if not isinstance(self.weights, Reuse | Rounded):
            told = {"_class_name": type(model).__name__, **config}
            (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n")
        (folder / "entry.json").write_text(json.dumps(record) + "\n")
        file, tensors = self.weights.tensors(model.state_dict(), self.masking)
        if tensors:
            whole = {key: value.contiguous().cpu() for key, value in tensors.items()}
            save_file(whole, folder / file, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Mask:
    """What entry.json says of a mask."""

    pattern: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Record:
    """What entry.json says."""

    weights: dict[str, Any]
    masking: Mask | None = None
    format: Annotated[int, Bounds(1, 1)] = 1


@dataclass(frozen=True)
class Stored:
    """An entry's folder, read but for its tensors; `weights_file`, `masking_file`: which files said so."""

    folder: Path
    weights: Weights
    masking: Masking | None
    weights_file: Path
    masking_file: Path

    def empty(self) -> Any:
        """The model of its config.json on the meta device, which the mask fits. Raises ModelError."""
        model = empty_model(read_config(self.folder), where=self.folder)
        if self.masking:
            self.masking.require_fits(model, self.masking_file)
        return model

    def restore(self, entries: Mapping[str, Entry]) -> Entry:
        """The entry; `entries` holds the one that it follows from. Raises ModelError for broken files."""
        source = None if self.weights.of is None else entries[self.weights.of].model
        return Entry(self.weights.restore(self, source), self.weights, self.masking)


def read_entry(folder: Path) -> Stored:
    """What an entry's folder says. Raises ModelError."""
    file = folder / "entry.json"
    record = read_record(file, _Record, what="an entry.json", do=_DO, error=ModelError)
    kind = record.weights.get("kind")
    if not (isinstance(kind, str) and kind in _KINDS):
        raise ModelError(
            got=f"weights of kind {shown(kind)}", expected=f"one of {', '.join(_KINDS)}", where=file, do=_DO
        )
    fields = {name: value for name, value in record.weights.items() if name != "kind"}
    weights = build(_KINDS[kind], fields, "weights.", file, error=ModelError, do=_DO)
    return Stored(folder, weights, masking_of(record.masking, file), file, file)


def masking_of(mask: Mask | None, file: Path) -> Masking | None:
    """The mask that a file tells of. Raises ModelError."""
    try:
        return Masking(Pattern.parse(mask.pattern), mask.names) if mask else None
    except RecipeError as error:  # which speaks of a recipe
        raise ModelError(got=error.got, expected=error.expected, where=file, do="save it again") from error
