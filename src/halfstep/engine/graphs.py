"""ONNX graphs of a bank's calls: a whole pass, one that also gives its features at cuts, and the rest from a cut on.

torch.onnx's own exporter over `torch.export`, in float32, with a batch axis of any size where the net allows it. A
graph takes "sample", "timestep" [B] float32, the conditions by the path of their names ("class_labels",
"added_cond_kwargs.time_ids"), and of a reuse entry "features". It gives "prediction", without a learned variance
beside it, and "cut0", "cut1" … for the cuts at which it leaves features. A forecast of features (`reuse.forecast`) is
arithmetic on what the graphs give, and in none of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.data.latents import decode
from halfstep.engine.entry import Entry, Reuse
from halfstep.nets.architectures import example_of, shape_of
from halfstep.nets.denoiser import Memo, eager, flattened, nested, predictor
from halfstep.nets.reuse import OUT, Place, shallow, tapped

SAMPLE, TIMESTEP, FEATURES, PREDICTION = "sample", "timestep", "features", "prediction"
NEEDED = ("onnx", "onnxscript", "onnxruntime")
"""What the extra "onnx" installs."""
_TRACED = 3
"""Samples that a call is traced with: no other size in a net is likely to be the same, and be taken for the batch."""


@dataclass(frozen=True)
class Graph:
    """A graph with its weights. `inputs`, `outputs`: their names in order; `batch`: the only batch that it takes, None
    where any will do."""

    program: Any = field(repr=False)
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batch: int | None

    @property
    def content(self) -> bytes:
        """The .onnx file, weights within: what onnxruntime's InferenceSession takes. Of less than 2 GB."""
        written = io.BytesIO()
        self.program.save(written)
        return written.getvalue()

    def save(self, file: Path) -> None:
        """Write the .onnx file; weights of 2 GB and more go into a file beside it."""
        self.program.save(file)


def graph_of(entry: Entry, leaves: Sequence[Place] = (), tokens: int | None = None, batch: int = _TRACED) -> Graph:
    """The graph of an entry's call.

    leaves: cuts at which a whole pass also gives its features ("out" is its prediction, and no output of its own).
    tokens: how long a text is, for a model of text.  batch: what to trace with where the net fixes it, 2 or more.
    Raises ModelError, which names the layer or the operator, for a net that cannot be exported; for weights that are
    not float32, an entry that computes nothing (its source's whole prediction), and where the extra is not installed.
    """
    require_extra(NEEDED, "onnx", "an ONNX graph")
    model, link = eager(entry.model), entry.weights
    takes = link.cut if isinstance(link, Reuse) else None
    where = type(model).__name__
    if takes == OUT:
        got, expected = "an entry that repeats a prediction", "one that computes something"
        raise ModelError(got=got, expected=expected, where=where, do="take the prediction of the row before")
    odd = {str(p.dtype).removeprefix("torch.") for p in model.parameters()} - {"float32"}
    if odd:
        got = f"weights in {', '.join(sorted(odd))}"
        raise ModelError(got=got, expected="float32", where=where, do="take a plan of float32 entries")
    cuts = tuple(cut for cut in leaves if cut != OUT)
    with torch.no_grad(), _quiet():
        call, inputs, names = _traced_with(model, cuts, takes, tokens, batch)
        program = _translated(_captured(call, inputs, where), where)
    program.optimize()
    outputs = (PREDICTION, *(f"cut{cut}" for cut in cuts))
    return Graph(program, *_named(program, names, outputs))


def decoder_graph(vae: Any, shape: Sequence[int]) -> Graph:
    """The graph that decodes samples [B, *shape], "sample", to "images" in about [-1, 1]. Raises ModelError."""
    require_extra(NEEDED, "onnx", "an ONNX graph")
    names, where = (SAMPLE,), type(vae).__name__
    with torch.no_grad(), _quiet():
        inputs = (torch.zeros(_TRACED, *shape, device=next(vae.parameters()).device),)
        program = _translated(_captured(_Decoded(vae), inputs, where), where)
    program.optimize()
    return Graph(program, *_named(program, names, ("images",)))


class _Decoded(nn.Module):
    """A VAE's decoder with its scale, as `_Call` is called."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        return decode(self.model, given[0])


class _Call(nn.Module):
    """A call as a function of tensors alone: sample, timestep, the conditions by these names, and features."""

    def __init__(self, model: nn.Module, conditions: Sequence[str], cuts: Sequence[Place], takes: Place | None):
        super().__init__()
        self.model, self.conditions, self.cuts, self.takes = model, conditions, cuts, takes

    def forward(self, *given: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        sample, timestep, *rest = given
        cond = nested(dict(zip(self.conditions, rest, strict=False)))  # features come after them
        if self.takes is not None:
            return shallow(self.model, sample, timestep, cond, self.takes, rest[-1])
        if self.cuts:
            prediction, found = tapped(self.model, sample, timestep, cond, self.cuts)
            return prediction, *(found[cut] for cut in self.cuts)
        return predictor(self.model)(sample, timestep, cond, Memo())


def _traced_with(
    model: nn.Module, cuts: Sequence[Place], takes: Place | None, tokens: int | None, batch: int
) -> tuple[_Call, tuple[torch.Tensor, ...], tuple[str, ...]]:
    """The call, what it is traced with, and the names of that."""
    place = next(model.parameters()).device
    cond = {name: value.to(place) for name, value in flattened(example_of(model, batch, tokens))}
    sample = torch.zeros(shape_of(model, batch), device=place)
    timestep = torch.full((batch,), 1.0, device=place)
    inputs = (sample, timestep, *cond.values())
    names: tuple[str, ...] = (SAMPLE, TIMESTEP, *cond)
    if takes is not None:
        features = tapped(model, sample, timestep, nested(cond), [takes])[1][takes]
        inputs, names = (*inputs, features), (*names, FEATURES)
    return _Call(model, tuple(cond), cuts, takes).eval(), inputs, names


def _captured(call: _Call | _Decoded, inputs: tuple[torch.Tensor, ...], where: str) -> Any:
    """The call as torch.export has it, for any batch if the net allows it. Raises ModelError, which names the layer."""
    any_batch = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    try:
        return torch.export.export(call, inputs, dynamic_shapes=(any_batch,), strict=False)
    except Exception:
        try:
            fresh = tuple(one.clone() for one in inputs)  # the others are marked as of any batch
            return torch.export.export(call, fresh, strict=False)
        except Exception as error:  # whatever a net's code may raise that is not made to be traced
            raise _not_exported(_layer_of(error, call.model), error, where) from error


def _translated(program: Any, where: str) -> Any:
    """The same in ONNX's operators. Raises ModelError, which names the operator that has none and its layer."""
    try:
        return torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
    except torch.onnx.OnnxExporterError as error:
        causes = _causes(error)
        told = next((m for e in causes if (m := re.search(r"target=torch\.ops\.([\w.]+)\]", str(e)))), None)
        name = told[1].split(".")[1] if told else "an operator"  # the kind of an operator may differ in the two graphs
        layer = next((_path_of(node) for node in program.graph.nodes if name in str(node.target)), "")
        raise _not_exported(f"{name} in layer {layer}" if layer else name, causes[-1], where) from error


def _named(program: Any, names: Sequence[str], outputs: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...], Any]:
    """Name a program's inputs and outputs; their names, and the batch if there is but one."""
    graph = program.model.graph
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name
    batch = graph.inputs[0].shape[0]
    return tuple(names), tuple(outputs), batch if isinstance(batch, int) else None


# ------------------------------------------------------------------------------------------------------------ refusals


def require_extra(packages: Sequence[str], extra: str, what: str) -> None:
    """Raise ModelError, which names the extra, unless all these packages are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        do = f'pip install "halfstep[{extra}]"'
        raise ModelError(got=f"no {' and no '.join(missing)}", expected="it installed", where=what, do=do)


def _not_exported(what: str, error: BaseException, where: str) -> ModelError:
    told = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ModelError(
        got=f"{what}, which does not export ({told})",
        expected="layers that ONNX has operators for",
        where=where,
        do="run the entry in PyTorch",
    )


def _causes(error: BaseException) -> list[BaseException]:
    """An exception and what it is from, the first of all last."""
    found = [error]
    while found[-1].__cause__ is not None:
        found.append(found[-1].__cause__)
    return found


def _layer_of(error: BaseException, model: nn.Module) -> str:
    """The innermost layer of the model whose forward an exception came out of."""
    paths = {id(module): path for path, module in model.named_modules()}
    layer, trace = "", error.__traceback__
    while trace is not None:
        layer = paths.get(id(trace.tb_frame.f_locals.get("self")), "") or layer
        trace = trace.tb_next
    return f"layer {layer}" if layer else "a call"


def _path_of(node: Any) -> str:
    """The layer that a node of torch.export's graph is of."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return stack[-1].removeprefix("model.") if stack else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says on its way of itself and of packages that are not there."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
