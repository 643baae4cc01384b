"""What 2:4 kernels bring on this GPU: single layers of many shapes, and whole U-ViTs, dense against sparse in bf16.

    python benchmarks/sparse_kernels.py            # writes benchmarks/sparse_kernels.md

Layers: milliseconds of x @ W^T for W [out, in] and a number of rows, dense and semi-structured, taken in turns. Models:
one call of the baked model, dense and after `kernels.use_semi_structured`, which keeps the dense kernel for every layer
where the sparse one is no faster, eager and compiled. Without a GPU the table says so.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import copy
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console

from fashion import markdown
from halfstep.engine.kernels import use_semi_structured
from halfstep.engine.profiling import example_inputs, interleave
from halfstep.methods.sparse import sparsify
from halfstep.nets.denoiser import Memo, predictor
from halfstep.nets.masks import Masking, Pattern, masked
from halfstep.nets.uvit import UViT2DModel
from halfstep.report.page import Table, rich_table

TWO_FOUR = Pattern(2, 4)
LAYERS = [(512, 512), (1536, 512), (2048, 512), (1024, 1024), (4096, 1024), (2048, 2048), (8192, 2048), (8192, 8192)]
ROWS = (257 * 16, 257 * 64, 257 * 256)
MODELS = {"U-ViT-S/2": (512, 12, 8, 256), "U-ViT-L/2": (1024, 20, 16, 128), "hidden 2048": (2048, 8, 32, 64)}
"""(embed_dim, depth, num_heads, batch)"""


def median(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]


def layer_rows() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for out, inside in LAYERS:
        weight = masked(torch.randn(out, inside, device="cuda"), TWO_FOUR).bfloat16()
        sparse = torch.sparse.to_sparse_semi_structured(weight)
        for count in ROWS:
            x = torch.randn(count, inside, device="cuda", dtype=torch.bfloat16)
            calls = {"dense": lambda x=x, w=weight: F.linear(x, w), "sparse": lambda x=x, w=sparse: F.linear(x, w)}
            times = {name: median(found) for name, found in interleave(calls, repeats=30, warmup=10).items()}
            ratio = times["dense"] / times["sparse"]
            rows.append(
                (f"{out} x {inside}", f"{count:,}", f"{times['dense']:.3f}", f"{times['sparse']:.3f}", f"{ratio:.2f}")
            )
    return rows


@torch.no_grad()
def model_rows() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, (dim, depth, heads, batch) in MODELS.items():
        model = UViT2DModel(embed_dim=dim, depth=depth, num_heads=heads).cuda().bfloat16().eval()
        net = sparsify(model)
        dense = net.bake(TWO_FOUR)
        sparse = copy.deepcopy(dense)
        table = use_semi_structured(sparse, Masking(TWO_FOUR, net.names), batch=batch)
        used = sum(row.kernel == "semi_structured" for row in table)
        inputs = example_inputs(dense, batch)
        for backend in ("eager", "compiled"):
            nets = [torch.compile(m) if backend == "compiled" else m for m in (dense, sparse)]
            calls = {
                kind: partial(predictor(m), *inputs, Memo()) for kind, m in zip(("dense", "sparse"), nets, strict=True)
            }
            times = {kind: median(found) for kind, found in interleave(calls, repeats=20, warmup=5).items()}
            ratio = times["dense"] / times["sparse"]
            what = f"{name}, batch {batch}, {backend}"
            rows.append(
                (what, f"{used} of {len(table)}", f"{times['dense']:.2f}", f"{times['sparse']:.2f}", f"{ratio:.2f}")
            )
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: not measured here"
    note = f"bf16, torch {torch.__version__}, {where}; medians of calls taken in turns."
    empty = [("not measured here", "", "", "", "")]
    tables = [
        Table(
            title="Linear layers",
            columns=("out x in", "rows", "dense ms", "2:4 ms", "speed-up"),
            rows=tuple(layer_rows() if torch.cuda.is_available() else empty),
            note=note,
        ),
        Table(
            title="Whole models",
            columns=("model", "layers on the sparse kernel", "dense ms", "2:4 ms", "speed-up"),
            rows=tuple(model_rows() if torch.cuda.is_available() else empty),
            note=note,
        ),
    ]
    for table in tables:
        Console().print(rich_table(table))
    text = "\n\n".join(markdown(table) for table in tables)
    Path(__file__).with_suffix(".md").write_text(f"# 2:4 kernels\n\n{text}\n")


if __name__ == "__main__":
    main()
