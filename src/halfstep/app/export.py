"""Write a plan so that it runs elsewhere: graphs, the sampler as numbers, and what draws with them, in one folder.

`runner/halfstep_run.py` reads the folder, with numpy and onnxruntime alone: what program.json says is its to keep.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from halfstep import __version__
from halfstep.app.subject import open_subject
from halfstep.core import disk
from halfstep.core.errors import ModelError, RunError
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import Recipe
from halfstep.core.sums import write_sums
from halfstep.core.watch import SILENT, Watch
from halfstep.engine.bank import Bank
from halfstep.engine.compiled import Table, compiled
from halfstep.engine.entry import Reuse
from halfstep.engine.graphs import Graph, decoder_graph, graph_of, require_extra
from halfstep.engine.networks import Part, row_parts
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.nets.architectures import example_of
from halfstep.nets.denoiser import class_count, flattened, sample_shape
from halfstep.nets.reuse import OUT, Place

Target = Literal["onnx", "openvino", "diffusers"]
FORMAT = 1
"""Of program.json; the runner refuses others."""


def export(model: str, to: Target, out: Path, recipe: Recipe, *, own_plan: bool = True, watch: Watch = SILENT) -> Path:
    """Write a model's plan into a new folder: as graphs for the runner, or as a pipeline folder of diffusers' making.

    model: whatever `open_subject` takes; without a plan of its own (or not `own_plan`) the recipe's sampler runs its
    reference in every row.  Whole or not at all. Raises RunError for a folder that is there, ModelError for a net that
    does not export and a missing extra, PlanError for a sampler that is no table of numbers.
    """
    out = Path(out)
    if out.exists():
        raise RunError(got="a folder that is there", expected="a new one", where=out, do="choose another --out")
    if to == "openvino":
        require_extra(("openvino",), "openvino", "a graph of OpenVINO")
    subject = open_subject(model, None, recipe, watch=watch)
    bank, plan = subject.stand_ins, subject.plan
    if plan is None or not own_plan:
        plan = subject.reference()
    if to == "diffusers":
        StepAwarePipeline(bank, plan, subject.encoder).save_pretrained(out)
        return out
    disk.require_writable(out.parent)
    disk.write_atomic(out, lambda folder: write_program(folder, bank, plan, to, watch))
    return out


def write_program(folder: Path, bank: Bank, plan: StepPlan, to: Target = "onnx", watch: Watch = SILENT) -> None:
    """Write a new folder that the runner draws from. Raises as `export` does."""
    table, parts = compiled(plan), row_parts(bank, plan)
    folder.mkdir()
    graphs = _graphs(bank, [part for row in parts for part in row if part is not None], watch)
    decoder = None
    if bank.vae is not None:
        decoder = "decoder"
        graphs[decoder] = decoder_graph(bank.vae, sample_shape(bank.config)[1:])
    told = {name: _written(graph, folder, name, to) for name, graph in graphs.items()}
    if bank.null is not None:
        null: dict[str, Any] = {name: value.numpy() for name, value in flattened(bank.null)}
        np.savez(folder / "null.npz", **null)
    plan.save(folder / "plan.json")
    program = {
        "format": FORMAT,
        "runtime": "onnxruntime" if to == "onnx" else to,
        "made_with": _versions(to),
        "sample": list(sample_shape(bank.config)[1:]),
        "conditions": [name for name, _ in flattened(example_of(bank[bank.reference], 1, bank.tokens))],
        "class_count": class_count(bank.config),
        "classes": list(bank.classes),
        "decoder": decoder,
        "graphs": told,
        **_sampler(table, plan, parts),
    }
    (folder / "program.json").write_text(json.dumps(program, indent=1, allow_nan=False) + "\n")
    write_sums(folder)


def _graphs(bank: Bank, parts: list[Part], watch: Watch) -> dict[str, Graph]:
    """A graph for every entry and cut that is called, by name, with all the features that any row takes of it."""
    leaves: dict[str, set[Place]] = {}
    for part in parts:
        if (name := _name_of(part)) is not None:
            leaves.setdefault(name, set()).update(cut for cut in part.leaves if cut != OUT)
    entries = {_name_of(part): bank.entries[part.entry] for part in parts}
    found = {}
    with watch.stage("export", len(leaves)) as told:
        for name, cuts in leaves.items():
            found[name] = graph_of(entries[name], sorted(cuts, key=str), bank.tokens)
            _require_any_batch(found[name], f"entry {name!r}")
            told(len(found))
    return found


def _require_any_batch(graph: Graph, where: str) -> None:
    """Raise ModelError for a graph of one batch, where the runner draws as many pictures as it is asked for."""
    if graph.batch is not None:
        got, expected = "a net whose code fixes the batch that it is traced with", "one that takes any"
        raise ModelError(got=got, expected=expected, where=where, do="export --to diffusers")


def _name_of(part: Part) -> str | None:
    """The name of the graph that a call runs; None: it repeats a prediction. A forecast's is that of order 0."""
    if part.link is None:
        return part.entry
    return None if part.link.cut == OUT else Reuse(part.link.of, part.link.cut).name


def _written(graph: Graph, folder: Path, name: str, to: Target) -> dict[str, Any]:
    """Write a graph's file; what program.json says of it."""
    file = folder / f"{name}.onnx"
    graph.save(file)
    if to == "openvino":
        import openvino

        converted = openvino.convert_model(file)
        openvino.save_model(converted, file.with_suffix(".xml"), compress_to_fp16=False)
        file.unlink()
        file = file.with_suffix(".xml")
    return {"file": file.name, "inputs": graph.inputs, "outputs": graph.outputs, "batch": graph.batch}


def _sampler(table: Table, plan: StepPlan, parts: list[tuple[Part, Part | None]]) -> Mapping[str, Any]:
    """The sampler's numbers, each row with what it calls."""
    said = table.to_json()
    for row, (own, guide), step in zip(plan.rows, parts, said["steps"], strict=True):
        weight = None if row.guide is None else row.guide.weight
        step |= {"own": _call(own), "guide": None if guide is None else _call(guide), "weight": weight}
    return {"sampler": plan.sampler.told, "noise_scale": table.noise_scale, "limit": table.limit, "rows": said["steps"]}


def _call(part: Part) -> dict[str, Any]:
    link = part.link
    return {
        "graph": _name_of(part),
        "source": part.source,
        "leaves": sorted(map(str, part.leaves)),
        "takes": None if link is None else str(link.cut),
        "order": 0 if link is None else link.order,
    }


def _versions(to: Target) -> dict[str, str]:
    names = ["torch", "diffusers", "onnx", "onnxscript", *(["openvino"] if to == "openvino" else [])]
    return {"halfstep": __version__, **{name: importlib.metadata.version(name) for name in names}}
