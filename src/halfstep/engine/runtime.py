"""How an entry's call runs on this machine: ways that keep its numbers but for their rounding, and which is fastest.

What changes numbers is an entry of its own (`entry.Half`, `entry.Int8`). Which way is faster hangs on the entry, the
batch, the processor and the versions: never assumed, always measured (`fastest`), and what strays too far from PyTorch
as it is, or is slower here, is dropped with its number.
"""

from __future__ import annotations

import copy
import importlib.util
import time
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from halfstep.core.errors import HalfstepError, ModelError
from halfstep.engine.entry import LAYOUTS, Backend, Entry, Int8, Runtime
from halfstep.engine.graphs import NEEDED
from halfstep.engine.profiling import example_inputs, interleave
from halfstep.engine.sessions import Exported
from halfstep.nets.denoiser import Cond, Memo, changed, eager, per_sample
from halfstep.nets.reuse import OUT, Forwards, Place

TOLERANCE = 1e-3
"""Norm of the difference from the eager prediction, as a share of that one's norm, above which a way is dropped."""

TOLERANCE_INT8 = 0.1
"""The same of an entry in eight bits. A number on the edge of a step falls to either side by its last bit, and after a
few layers the rounding errors of two ways are two draws: they differ by as much as both do from float32, 0.8 to 1.5 %
at 32x32."""

TIMESTEPS = (1.0, 250.0, 500.0, 999.0)
"""At which a way is held against the eager call: both ends of the usual trainings, and between."""

PACKAGES: Mapping[Backend, tuple[str, ...]] = {"onnx": NEEDED, "openvino": (*NEEDED, "openvino")}
"""What a backend needs beside PyTorch; the extra that installs it has the backend's name."""


def backends_for(entry: Entry) -> list[Backend]:
    """What may run an entry where it is, as far as it is installed; eager is always the first. Graphs for other engines
    are of float32."""
    weight = next(entry.model.parameters())
    if weight.device.type == "cuda":
        return ["eager", "compile", "cudagraph"]
    exported = weight.device.type == "cpu" and weight.dtype == torch.float32
    return ["eager", "compile", *(backend for backend in PACKAGES if exported and installed(backend))]


def installed(backend: Backend) -> bool:
    """Whether what a backend needs beside PyTorch is there."""
    return all(importlib.util.find_spec(package) is not None for package in PACKAGES.get(backend, ()))


def ready(entry: Entry, runtime: Runtime | None = None) -> Forwards:
    """An entry's calls by a runtime (its own, where none is given); `plain` is the `Predict` of a whole call. Graphs
    are made at their first call, and kept with the entry. Raises ModelError for a backend that is not installed or does
    not run where the model is, and at that first call for a net that it cannot take."""
    runtime = runtime or entry.runtime
    if runtime.backend == "eager" and runtime.layout == entry.runtime.layout:
        return Forwards.of(entry.model)
    if runtime not in entry.graphs:
        _require_runs(runtime.backend, entry)
        entry.graphs[runtime] = _made(entry.model, runtime, entry.runtime.layout)
    return entry.graphs[runtime]


def _made(model: Any, runtime: Runtime, layout: str) -> Forwards:
    if runtime.layout != layout:
        model = copy.deepcopy(model).to(memory_format=LAYOUTS[runtime.layout])
    match runtime.backend:
        case "compile" | "cudagraph":
            return _Compiled(model, runtime).forwards
        case "onnx" | "openvino":
            return Exported(model, runtime).forwards
    return Forwards.of(model)


def _require_runs(backend: Backend, entry: Entry) -> None:
    """Raise ModelError for a backend that is not installed, or does not run the entry where it is."""
    if not installed(backend):
        raise ModelError(
            got=f"runtime {backend!r} without {' or '.join(PACKAGES[backend])}",
            expected="all of them",
            where="runtime",
            do=f"pip install 'halfstep[{backend}]'",
        )
    if backend not in backends_for(entry):
        weight = next(entry.model.parameters())
        raise ModelError(
            got=f"runtime {backend!r} for {weight.dtype} on {weight.device.type}".replace("torch.", ""),
            expected=f"one of {', '.join(backends_for(entry))}",
            where="runtime",
            do="name one that runs it",
        )


# ------------------------------------------------------------------------------------------------------- torch.compile


class _Compiled:
    """A net by torch.compile: one graph for the plain call, for each set of cuts that are tapped and for each cut that
    is gone on from, of static shapes: for batches of `runtime.batches`, others run eagerly.

    A timestep is a tensor [B] of float32 whatever the sampler's are: numbers would be compiled in, and one of another
    type would be another graph. On a CPU weights are compiled in, packed (inductor's `freezing`).
    """

    def __init__(self, model: Any, runtime: Runtime):
        self.model, self.name = eager(model), type(eager(model)).__name__
        self.net, self.batches = Forwards.of(self.model), frozenset(runtime.batches)
        self.replayed = runtime.backend == "cudagraph"
        on_cpu = next(model.parameters()).device.type == "cpu"
        self.how: dict[str, Any] = {"options": {"freezing": True}} if on_cpu else {}
        self.how |= {"mode": "reduce-overhead"} if self.replayed else {}
        self.graphs: dict[object, Callable[..., Any]] = {}

    @property
    def forwards(self) -> Forwards:
        return Forwards(self.plain, self.tapped, self.shallow)

    def plain(self, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, memo: Memo) -> torch.Tensor:
        if len(sample) not in self.batches:
            return self.net.plain(sample, timestep, cond, memo)
        return self._run("the plain call", _plain, sample, timestep, cond)

    def tapped(
        self, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, cuts: Collection[Place]
    ) -> tuple[torch.Tensor, dict[Place, torch.Tensor]]:
        inner = tuple(sorted(cut for cut in cuts if cut != OUT))
        if len(sample) not in self.batches:
            return self.net.tapped(sample, timestep, cond, cuts)
        if not inner:
            prediction, kept = self.plain(sample, timestep, cond, Memo()), {}
        else:
            prediction, kept = self._run(f"the call tapped at {inner}", _tapped, sample, timestep, cond, inner)
        return prediction, {**kept, OUT: prediction} if OUT in cuts else kept

    def shallow(
        self, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, cut: Place, features: torch.Tensor
    ) -> torch.Tensor:
        if cut == OUT or len(sample) not in self.batches:
            return self.net.shallow(sample, timestep, cond, cut, features)
        return self._run(f"the call from cut {cut}", _shallow, sample, timestep, cond, cut, features)

    def _run(
        self, told: str, function: Any, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, *more: Any
    ) -> Any:
        if told not in self.graphs:
            self.graphs[told] = torch.compile(_of_its_own(function), fullgraph=True, dynamic=False, **self.how)
        call = self.graphs[told]
        try:
            with torch.inference_mode():
                times = per_sample(timestep, len(sample)).to(sample.device, torch.float32, copy=True).contiguous()
                given = [_inferred(one) for one in (sample, times, cond, *more)]
                if not self.replayed:
                    return call(self.net, *given)
                torch.compiler.cudagraph_mark_step_begin()
                return changed(call(self.net, *given), torch.clone)  # the next replay writes over it
        except torch._dynamo.exc.TorchDynamoException as error:
            raise _not_compiled(self.name, told, error) from error


def _plain(net: Forwards, sample: torch.Tensor, times: torch.Tensor, cond: Cond) -> torch.Tensor:
    return net.plain(sample, times, cond, {})


def _tapped(net: Forwards, sample: torch.Tensor, times: torch.Tensor, cond: Cond, cuts: tuple[int, ...]) -> Any:
    return net.tapped(sample, times, cond, cuts)


def _shallow(
    net: Forwards, sample: torch.Tensor, times: torch.Tensor, cond: Cond, cut: int, features: torch.Tensor
) -> torch.Tensor:
    return net.shallow(sample, times, cond, cut, features)


def _of_its_own(function: Any) -> Any:
    """The function with a code object of its own: dynamo keeps graphs by code object, at most eight of each, and every
    entry of a bank has several."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _inferred(value: Any) -> Any:
    """As tensors of inference mode, as all but a trajectory's first are: the others would need a graph of their own."""
    return changed(value, lambda one: one if one.is_inference() else one.clone())


def _not_compiled(name: str, told: str, error: Exception) -> ModelError:
    """What dynamo or inductor say, in a line that names the line of the net where there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    places = [i for i, line in enumerate(lines) if line.startswith("File ")]
    where = f" at {' '.join(lines[places[-1] : places[-1] + 2])}" if places else ""
    return ModelError(
        got=f"{told} of a {name}{where}: {lines[0] if lines else type(error).__name__}",
        expected="a net that torch.compile takes as one graph",
        where="runtime",
        do="take --runtime eager, or auto, which falls back to it",
    )


# ----------------------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A runtime that was tried: the median milliseconds of a call, how far it is from eager (see `TOLERANCE`), and why
    it was dropped, "" where it was not."""

    backend: Backend
    ms: float | None = None
    error: float | None = None
    dropped: str = ""

    def __str__(self) -> str:
        told = [self.backend, *([] if self.ms is None else [f"{self.ms:.3g} ms"])]
        return " ".join(told) + (f" ({self.dropped})" if self.dropped else "")


def fastest(
    entry: Entry,
    candidates: Sequence[Runtime],
    batch: int,
    *,
    tokens: int | None = None,
    repeats: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Runtime, list[Tried]]:
    """The candidate that an entry's whole call of `batch` images runs fastest by, timed in turns beside the eager one
    in the entry's own layout, which is taken where none is faster; and what became of each, in order."""
    inputs = example_inputs(entry.model, batch, tokens=tokens)
    base = replace(entry.runtime, backend="eager")
    found: dict[Runtime, Tried] = {base: Tried(backend="eager", error=0.0)}
    for one in candidates:
        if one not in found:
            found[one] = held(entry, one, inputs)
    standing = [one for one, told in found.items() if not told.dropped]
    calls = {
        str(i): partial(ready(entry, one).plain, inputs.sample, inputs.timestep[0], inputs.cond, Memo())
        for i, one in enumerate(standing)
    }
    with torch.inference_mode():
        times = interleave(calls, repeats=repeats, clock=clock)
    took = {one: median(times[str(i)]) for i, one in enumerate(standing)}
    best = min(standing, key=lambda one: took[one])
    for one in standing:
        slower = "" if one in (best, base) or took[one] < took[base] else "slower here"
        found[one] = replace(found[one], ms=took[one], dropped=slower)
    for one in found:
        if one != best:
            entry.graphs.pop(one, None)
    return best, list(found.values())


def held(entry: Entry, runtime: Runtime, inputs: Any) -> Tried:
    """A runtime held against the eager call in the entry's own layout, not timed; dropped where it fails or strays.

    inputs: as `example_inputs` gives them.
    """
    try:
        error = strayed(ready(entry, runtime), ready(entry, replace(entry.runtime, backend="eager")), inputs)
    except HalfstepError as refused:
        return Tried(backend=runtime.backend, dropped=str(refused))
    most = TOLERANCE_INT8 if isinstance(entry.weights, Int8) else TOLERANCE
    if not error <= most:  # not a number either
        told = f"its prediction is {error:.2g} of eager's norm away, more than {most:g}"
        return Tried(backend=runtime.backend, error=error, dropped=told)
    return Tried(backend=runtime.backend, error=error)


def strayed(one: Forwards, other: Forwards, inputs: Any) -> float:
    """The norm of the difference of two predictions as a share of the other's norm, the largest of `TIMESTEPS`."""
    shares = []
    with torch.inference_mode():
        for t in TIMESTEPS:
            timestep = torch.tensor(t, device=inputs.sample.device)
            found = one.plain(inputs.sample, timestep, inputs.cond, Memo()).double()
            wanted = other.plain(inputs.sample, timestep, inputs.cond, Memo()).double()
            norm = wanted.norm().clamp(min=torch.finfo(torch.float32).tiny)  # a fresh net may predict zeros
            shares.append(float((found - wanted).norm() / norm))
    return max(shares)
