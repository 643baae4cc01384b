"""Sparse kernels: run a baked 2:4 denoiser on a GPU that skips its zeros, layer by layer where that is faster.

torch core's semi-structured tensors multiply a 2:4 matrix at up to twice the dense rate on NVIDIA GPUs from Ampere on;
how much of it is left depends on the layer's shape and on the rows that it sees. So every layer is timed both ways and
keeps the dense kernel where the sparse one is no faster: the result is never slower than dense. Processors have no such
kernel: there, masks save bytes and multiply-accumulates on paper, and no time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.engine.profiling import example_inputs, interleave
from halfstep.nets.denoiser import Memo, predictor
from halfstep.nets.masks import Masking, Pattern

SHAPES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (16, 128)}
"""Output and input features must be multiples of these, for both of torch's back-ends."""


@dataclass(frozen=True)
class LayerKernel:
    """Which kernel a masked layer runs, and why. `rows`: rows of the matrix product in one call at the timed batch."""

    layer: str
    shape: tuple[int, ...]
    rows: int
    kernel: str
    why: str
    dense_ms: float | None = None
    sparse_ms: float | None = None


class GemmConv2d(nn.Module):
    """A convolution as one matrix product: [B, C, H, W] -> [B, O, H', W'].

    `weight` [O, taps * C], taps outermost, so that groups of neighbouring columns are channels at one tap.
    """

    def __init__(self, weight: torch.Tensor, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), conv.bias
        self.kernel, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, *size = x.shape
        taps = self.kernel[0] * self.kernel[1]
        out = [
            (n + 2 * p - k) // s + 1
            for n, p, k, s in zip(size, _pair(self.padding), self.kernel, self.stride, strict=True)
        ]
        if taps == 1 and self.stride == (1, 1):
            columns = x.movedim(1, -1).reshape(-1, channels)
        else:
            found = F.unfold(x, self.kernel, padding=_pair(self.padding), stride=self.stride)
            found = found.view(batch, channels, taps, -1).permute(0, 3, 2, 1)
            columns = found.reshape(-1, taps * channels)
        return F.linear(columns, self.weight, self.bias).view(batch, *out, -1).movedim(-1, 1)


def _pair(value: int | str | Sequence[int]) -> tuple[int, int]:
    assert not isinstance(value, str), "misfit() leaves these out"
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def gemm_matrix(conv: nn.Conv2d) -> torch.Tensor:
    """A convolution's weight as the matrix of `GemmConv2d`."""
    return conv.weight.detach().permute(0, 2, 3, 1).reshape(len(conv.weight), -1).contiguous()


def misfit(layer: nn.Module, dtype: torch.dtype) -> str:
    """Why a layer cannot run the semi-structured kernel; empty when it can."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1 or layer.dilation != (1, 1) or isinstance(layer.padding, str):
            return "a grouped, dilated or auto-padded convolution"
        rows, columns = len(layer.weight), layer.weight[0].numel()
    elif isinstance(layer, nn.Linear):
        rows, columns = layer.weight.shape
    else:
        return f"a {type(layer).__name__}"
    least = SHAPES[dtype]
    if rows % least[0] or columns % least[1]:
        return f"{rows} x {columns} is no multiple of {least[0]} x {least[1]}"
    return ""


@torch.no_grad()
def use_semi_structured(model: nn.Module, masking: Masking, *, batch: int = 64) -> tuple[LayerKernel, ...]:
    """Give every masked layer the faster kernel, in place; returns what each got and why.

    `model`: baked with `masking`, on a CUDA device, in fp16 or bf16. `batch`: images of the call that is timed.
    Raises ModelError without CUDA, for another dtype, and for a pattern other than 2:4.
    """
    parameter = next(model.parameters())
    require_supported(parameter.device, parameter.dtype, masking.pattern)
    seen = _inputs_of(model, masking, batch)
    found = []
    for name in masking.layers():
        layer = model.get_submodule(name)
        shape, x = tuple(layer.weight.shape), seen[name]  # type: ignore[arg-type]
        rows = x.numel() // x.shape[1 if isinstance(layer, nn.Conv2d) else -1]
        if why := misfit(layer, parameter.dtype):
            found.append(LayerKernel(name, shape, rows, "dense", why))
            continue
        sparse = _sparse_twin(layer)
        calls = {"dense": functools.partial(layer, x), "sparse": functools.partial(sparse, x)}
        times = interleave(calls, repeats=20, warmup=5)
        dense_ms, sparse_ms = (sorted(times[kind])[10] for kind in ("dense", "sparse"))
        faster = sparse_ms < dense_ms
        if faster:
            _replace(model, name, sparse)
        kernel, why = ("semi_structured", "faster here") if faster else ("dense", "the sparse kernel is slower here")
        found.append(LayerKernel(name, shape, rows, kernel, why, dense_ms, sparse_ms))
    return tuple(found)


def require_supported(device: torch.device, dtype: torch.dtype, pattern: Pattern) -> None:
    """Raise ModelError where torch's semi-structured kernels cannot run."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise ModelError(
            got=f"device {device}",
            expected="an NVIDIA GPU from Ampere on",
            where="kernel semi_structured",
            do="leave the kernel out: masks still save bytes; for time on a CPU use compress slimmable",
        )
    if dtype not in SHAPES:
        raise ModelError(
            got=str(dtype).removeprefix("torch."),
            expected="float16 or bfloat16",
            where="kernel semi_structured",
            do="convert the model first, e.g. model.bfloat16()",
        )
    if pattern != Pattern(2, 4):
        raise ModelError(
            got=f"pattern {pattern}", expected="2:4", where="kernel semi_structured", do="train with --pattern 2:4"
        )


def _inputs_of(model: nn.Module, masking: Masking, batch: int) -> dict[str, torch.Tensor]:
    """What every masked layer is given in one real call."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, _layer: nn.Module, given: tuple[torch.Tensor, ...], _out: object) -> None:
        seen.setdefault(name, given[0])

    handles = [
        model.get_submodule(name).register_forward_hook(functools.partial(keep, name)) for name in masking.layers()
    ]
    try:
        predictor(model)(*example_inputs(model, batch), Memo())
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _sparse_twin(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return GemmConv2d(torch.sparse.to_sparse_semi_structured(gemm_matrix(layer)), layer)
    twin = nn.Linear(1, 1, bias=False, device="meta")
    twin.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)  # type: ignore[operator]
    twin.bias = layer.bias  # type: ignore[assignment]
    return twin


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, layer)
