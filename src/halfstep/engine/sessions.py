"""A net by ONNX Runtime or OpenVINO, in float32: a graph for the whole call, for each set of cuts that are tapped, and
for each that is gone on from (`graphs.graph_of`), of batches of any size where the net allows it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from halfstep.engine.entry import Entry, Own, Reuse, Runtime
from halfstep.engine.graphs import FEATURES, PREDICTION, SAMPLE, TIMESTEP, Graph, graph_of
from halfstep.nets.denoiser import Cond, Memo, flattened, per_sample
from halfstep.nets.reuse import OUT, Forwards, Place

Session = Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]]
"""Inputs by name -> outputs in the graph's order."""


class Exported:
    """The calls of a net by a session of ONNX Runtime or of OpenVINO for each of its graphs, made at its first call
    with as many threads as torch has then; where a graph takes one batch alone, others run eagerly."""

    def __init__(self, model: Any, runtime: Runtime):
        self.model, self.net = model, Forwards.of(model)
        self.made = onnx_session if runtime.backend == "onnx" else openvino_session
        self.size = max((2, *runtime.batches))
        self.sessions: dict[object, tuple[Graph, Session]] = {}

    @property
    def forwards(self) -> Forwards:
        return Forwards(self.plain, self.tapped, self.shallow)

    def plain(self, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, memo: Memo) -> torch.Tensor:
        graph, session = self._session(cond, (), None)
        if graph.batch not in (None, len(sample)):
            return self.net.plain(sample, timestep, cond, memo)
        return self._run(graph, session, sample, timestep, cond)[PREDICTION]

    def tapped(
        self, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, cuts: Collection[Place]
    ) -> tuple[torch.Tensor, dict[Place, torch.Tensor]]:
        inner = tuple(sorted(cut for cut in cuts if cut != OUT))
        graph, session = self._session(cond, inner, None)
        if graph.batch not in (None, len(sample)):
            return self.net.tapped(sample, timestep, cond, cuts)
        found = self._run(graph, session, sample, timestep, cond)
        kept: dict[Place, torch.Tensor] = {cut: found[f"cut{cut}"] for cut in inner}
        return found[PREDICTION], {**kept, OUT: found[PREDICTION]} if OUT in cuts else kept

    def shallow(
        self, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, cut: Place, features: torch.Tensor
    ) -> torch.Tensor:
        if cut == OUT:
            return features
        graph, session = self._session(cond, (), cut)
        if graph.batch not in (None, len(sample)):
            return self.net.shallow(sample, timestep, cond, cut, features)
        return self._run(graph, session, sample, timestep, cond, features)[PREDICTION]

    def _session(self, cond: Cond, leaves: tuple[Place, ...], takes: Place | None) -> tuple[Graph, Session]:
        text = cond.get("encoder_hidden_states")
        tokens = None if text is None else text.shape[-2]
        key = leaves, takes, tokens, torch.get_num_threads()
        if key not in self.sessions:
            entry = Entry(self.model, Own() if takes is None else Reuse("it", takes))
            graph = graph_of(entry, leaves, tokens, self.size)
            self.sessions[key] = graph, self.made(graph.content, torch.get_num_threads())
        return self.sessions[key]

    def _run(
        self, graph: Graph, session: Session, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond,
        features: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        times = per_sample(timestep, len(sample)).float()
        given = {SAMPLE: sample, TIMESTEP: times, **dict(flattened(cond))}
        given |= {} if features is None else {FEATURES: features}
        found = session({name: given[name].contiguous().numpy() for name in graph.inputs})
        return {name: torch.from_numpy(one) for name, one in zip(graph.outputs, found, strict=True)}


def onnx_session(content: bytes, threads: int) -> Session:
    """A graph by ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda given: session.run(None, dict(given))


def openvino_session(content: bytes, threads: int) -> Session:
    """A graph by OpenVINO on the CPU, in float32, which it leaves by itself where the processor has bfloat16."""
    import openvino

    core = openvino.Core()
    how = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = core.compile_model(core.read_model(content), "CPU", how).create_infer_request()

    taken = {name for port in request.model_inputs for name in port.names}  # it drops what its model makes no use of

    def run(given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        request.infer({name: one for name, one in given.items() if name in taken}, share_inputs=True)
        return [np.array(one.data) for one in request.output_tensors]  # its own memory is written again by the next

    return run
