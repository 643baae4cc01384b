"""What a denoiser costs: parameters, multiply-accumulates (MACs), milliseconds, memory.

1 MAC = 2 FLOPs. Milliseconds may be compared only within one run, in turns: see `interleave`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from halfstep.core.errors import HalfstepError, ModelError
from halfstep.core.machine import cpu_name
from halfstep.core.results import Cost
from halfstep.data.latents import decode
from halfstep.nets.architectures import example_of, shape_of
from halfstep.nets.denoiser import Cond, Memo, cond_to, eager, predictor, sample_shape
from halfstep.nets.reuse import OUT, Place, Reused

Layout = Literal["contiguous", "channels_last"]
"""How the weights of convolutions lie in memory."""

TIMED_BATCH = 64
"""Images per call in everything that a run times: the choice of layouts, entries' costs and whole trajectories."""


class Inputs(NamedTuple):
    """What one call of a denoiser takes, but for its memo: sample [B,C,H,W], timestep [B], condition."""

    sample: Tensor
    timestep: Tensor
    cond: Cond


def example_inputs(
    model: nn.Module,
    batch: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    tokens: int | None = None,
) -> Inputs:
    """What one call of a diffusers denoiser takes, read from its config.

    `sample` [B, in_channels, H, W] (of FLUX packed tokens [B, L, C]), standard normal: always the same numbers, and the
    global generators are left alone; `timestep` [B] of ones; the condition that its family takes, a text of `tokens`
    tokens where it takes one (`Architecture.example`). `device` and `dtype` are the model's own where not given.
    Raises ModelError where the config lacks the shape, or the model needs other inputs.
    """
    model = eager(model)
    where = type(model).__name__
    config: Any = getattr(model, "config", None)
    channels = getattr(config, "in_channels", None)
    if channels is None:
        expected = "a diffusers config with sample_size and in_channels"
        raise ModelError(got="no in_channels", expected=expected, where=where, do="set them in the config")
    own_device, own_dtype = _home(model)
    device, dtype = device or own_device, dtype or own_dtype
    random = torch.Generator().manual_seed(0)
    called = model.model if isinstance(model, Reused) else model
    sample = torch.randn(shape_of(called, batch), generator=random).to(device, dtype)
    timestep = torch.ones(batch, dtype=torch.long, device=device)  # not zero: Fourier embeddings take its logarithm
    inputs = Inputs(sample, timestep, cond_to(example_of(called, batch, tokens), device, dtype))
    _check_inputs(model, inputs)
    return inputs


def count_params(model: nn.Module) -> int:
    """Parameters, those that are shared counted once; buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def held_mib(*models: nn.Module) -> float:
    """MiB that the models' parameters and buffers hold in memory, what several share counted once."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(held.values()) / 2**20


def count_macs(
    model: nn.Module,
    *,
    inputs: Inputs | None = None,
    densities: Mapping[str, float] | None = None,
) -> int:
    """MACs per image of one forward call: convolutions, linear layers and matmuls, attention's own included.

    Attention's two products (scores, weighted sum) are counted alike on every device and with every attention kernel.
    Tables that count layers only leave them out: google/ddpm-cifar10-32 has 6.222 G here and 6.054 G in such a table,
    which is `conv` + `linear` of `macs_by_kind`. Not counted: norms, activations, element-wise work. Zeros count as any
    weight, but for the layers in `densities` (path -> share of its MACs that counts).

    `inputs`: of the call that is counted; the count is divided by their batch.
    Nothing is computed and no weight is copied: a twin of the model is counted on the meta device. Where a forward
    needs real numbers, the model itself runs once, with its eval mode restored. Raises ModelError as `example_inputs`.
    """
    counts, batch = _count(eager(model), inputs)
    left_out = sum((1 - share) * sum(counts.get(name, {}).values()) for name, share in (densities or {}).items())
    return round((sum(counts[""].values()) - left_out) / 2 / batch)


def reused_macs(
    model: nn.Module, cut: Place, densities: Mapping[str, float] | None = None, tokens: int | None = None
) -> int:
    """MACs per image of a shallow pass at a cut, counted as `count_macs` counts, on the meta device; 0 at cut "out".

    `densities`: by the model's own paths; `tokens`: as in `example_inputs`. Raises ModelError for a cut that the model
    does not have.
    """
    if cut == OUT:
        return 0
    twin, inputs = _meta_twin(eager(model)), _inputs_to(example_inputs(model, tokens=tokens), "meta")
    inner = {f"model.{name}": share for name, share in (densities or {}).items()}
    return count_macs(Reused(twin, cut, 0, *inputs), inputs=inputs, densities=inner)


def macs_by_kind(model: nn.Module, *, inputs: Inputs | None = None) -> dict[str, int]:
    """MACs per image by kind: `conv`, `linear` (inside nn.Linear) and `matmul` (every other product: attention's).

    The kind of a product comes from the module it ran in, for torch runs a linear layer as mm, addmm or bmm, whichever
    fits the memory layout. Inputs and errors as in `count_macs`.
    """
    model = eager(model)
    counts, batch = _count(model, inputs)
    linear_names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    total = sum(counts[""].values())
    conv = sum(flops for operator, flops in counts[""].items() if "conv" in str(operator))
    linear = sum(sum(counts.get(name, {}).values()) for name in linear_names)
    kinds = {"conv": conv, "linear": linear, "matmul": total - conv - linear}
    return {kind: flops // 2 // batch for kind, flops in kinds.items()}


def macs_by_module(model: nn.Module, *, inputs: Inputs | None = None) -> dict[str, int]:
    """MACs per image by the model's outermost parts, in module order; the values sum to `count_macs`.

    Keys are module paths: `conv_in`, `down_blocks.0`, `mid_block`. A list of modules is never called itself, so its
    members stand for it. What the model's forward multiplies outside of any part is `(own)`. Parts without MACs are
    left out. Inputs and errors as in `count_macs`.
    """
    model = eager(model)
    counts, batch = _count(model, inputs)
    parts: dict[str, int] = {}
    for name, _ in model.named_modules():
        inside_a_part = any(name.startswith(f"{part}.") for part in parts)
        if name and name in counts and not inside_a_part:
            parts[name] = sum(counts[name].values()) // 2 // batch
    own = sum(counts[""].values()) // 2 // batch - sum(parts.values())
    return {name: macs for name, macs in {**parts, "(own)": own}.items() if macs}


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 10,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of every call, `repeats` each, taken in turns (A B C A B C ...).

    In turns, so that a machine that warms up, throttles or gets busy slows all of them alike. An accelerator is waited
    for before and after each call. `clock`: seconds. Raises HalfstepError where `repeats` < 1 or `warmup` < 0.
    """
    if repeats < 1 or warmup < 0:
        got, expected = f"repeats={repeats}, warmup={warmup}", "repeats >= 1 and warmup >= 0"
        raise HalfstepError(got=got, expected=expected, where="interleave", do="ask for at least one timed call")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            _wait()
            start = clock()
            call()
            _wait()
            if turn >= warmup:
                times[name].append(1e3 * (clock() - start))
    return times


def call_times(
    models: Mapping[str, nn.Module],
    *,
    batch: int = 1,
    repeats: int = 10,
    warmup: int = 2,
    tokens: int | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of one call of each denoiser where it lives, in turns, in eval mode without gradients."""
    calls = {
        name: functools.partial(predictor(model), *example_inputs(model, batch, tokens=tokens), Memo())
        for name, model in models.items()
    }
    with _measuring(*models.values()):
        return interleave(calls, repeats=repeats, warmup=warmup)


def latency(
    models: Mapping[str, nn.Module],
    *,
    batch: int = 1,
    repeats: int = 10,
    warmup: int = 2,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    tokens: int | None = None,
) -> dict[str, Cost]:
    """What one call of each denoiser costs here, timed in turns in eval mode without gradients.

    `batch`: images per call; latency and memory are per call, MACs per image. `device`, `dtype`: where to measure; a
    model that lives elsewhere is measured as a copy, and stays what it was. `tokens`: as in `example_inputs`. The
    spread is None for one repeat. Raises ModelError as `example_inputs`, and for a compiled model that would have to
    move.
    """
    here = {name: _moved(model, device, dtype) for name, model in models.items()}
    inputs = {name: example_inputs(model, batch, tokens=tokens) for name, model in here.items()}
    calls = {name: functools.partial(predictor(model), *inputs[name], Memo()) for name, model in here.items()}
    times = call_times(here, batch=batch, repeats=repeats, warmup=warmup, tokens=tokens)
    with _measuring(*here.values()):
        peaks = {name: peak_mib(call, device=_home(here[name])[0]) for name, call in calls.items()}
    return {name: _cost(model, times[name], peaks[name], inputs[name]) for name, model in here.items()}


def peak_mib(call: Callable[[], object], *, device: torch.device | str | None = None) -> float | None:
    """Most MiB that one call holds at once beyond what was held before; its result counts.

    `device`: CUDA where there is one, else the CPU. Other devices: None. On a CPU the peak is that of torch's own
    allocator, from the profiler's record of every allocation: tensors, and not what oneDNN takes for scratch.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if kind == "cuda":
        return _peak_mib_cuda(call, device)
    return _peak_mib_cpu(call) if kind == "cpu" else None


def layout_of(model: nn.Module) -> Layout:
    """The memory layout of a model's convolutions: "channels_last" or "contiguous" (also without any)."""
    kernels = (p for p in model.parameters() if p.ndim == 4 and min(p.shape[1], max(p.shape[2:])) > 1)
    first = next(kernels, None)  # a kernel of one channel or one pixel is both at once
    return "contiguous" if first is None or first.is_contiguous() else "channels_last"


def in_latency(times: list[float]) -> dict[str, Any]:
    """What a `Cost` tells of the milliseconds of calls."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (0.0, 0.0, 0.0)
    spread = (high - low) / 2 if len(times) > 1 else None
    return {"latency_ms": statistics.median(times), "latency_spread_ms": spread}


def _cost(model: nn.Module, times: list[float], peak: float | None, inputs: Inputs) -> Cost:
    device, dtype = _home(model)
    return Cost(
        macs=count_macs(model, inputs=inputs),
        params=count_params(model),
        **in_latency(times),
        peak_mib=peak,
        batch=len(inputs.sample),
        device=_device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        layout=layout_of(model),
        backend="compile" if _is_compiled(model) else "eager",
    )


def _count(model: nn.Module, inputs: Inputs | None) -> tuple[dict[str, dict[object, int]], int]:
    """FLOPs by module path ("" is the whole model) and operator, and the batch that they are for."""
    inputs = example_inputs(model) if inputs is None else inputs
    try:
        twin = _meta_twin(model)
        flops = _flops(twin, _inputs_to(inputs, "meta"))
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ):  # the forward needs real numbers; if it is wrong, the real run says how
        flops = _flops(model, _inputs_to(inputs, _home(model)[0]))
    return flops, len(inputs.sample)


def _inputs_to(inputs: Inputs, device: torch.device | str) -> Inputs:
    return Inputs(inputs.sample.to(device), inputs.timestep.to(device), cond_to(inputs.cond, device))


def _attention_flops(query: list[int], key: list[int], value: list[int], *_: object, **__: object) -> int:
    """FLOPs of scores and weighted sum, from the shapes [B, heads, tokens, head size]."""
    batch, heads, tokens, size = query
    return 2 * batch * heads * tokens * key[2] * (size + value[3])


# On a CPU, attention runs as an operator that torch's counter does not know and would count as nothing; on the meta
# device the same call falls apart into two batched matmuls, which it counts. This row makes every device agree.
_ATTENTION_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _flops(model: nn.Module, inputs: Inputs) -> dict[str, dict[object, int]]:
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # nn.MultiheadAttention's fast path is one opaque operator, which would count as nothing.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _measuring(model), counter:
            predictor(model)(*inputs, Memo())
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    root = type(model).__name__
    found = {name: dict(flops) for name, flops in counter.get_flop_counts().items()}
    inner = {name.removeprefix(f"{root}."): flops for name, flops in found.items() if name.startswith(f"{root}.")}
    return {**inner, "": found.get("Global", {})}


def _meta_twin(model: nn.Module) -> nn.Module:
    """A copy of the model without its numbers.

    Not rebuilt from the config, which a pruned or edited model no longer obeys.
    """
    tensors = [*model.parameters(), *model.buffers()]
    # deepcopy takes what the memo already holds, so no weight is copied. Forward hooks travel along.
    return copy.deepcopy(model, {id(tensor): tensor.detach().to("meta") for tensor in tensors})


@contextlib.contextmanager
def _measuring(*models: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, each module's own mode restored after.

    no_grad as in diffusers' pipelines, not inference_mode: what a model caches in there could not be trained with.
    """
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _peak_mib_cuda(call: Callable[[], object], device: torch.device | str | None) -> float:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _peak_mib_cpu(call: Callable[[], object]) -> float:
    # Else the profiler prints two lines per use to stderr; read at its first use, and the user's own setting wins.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result  # only now, so that it was held to the end
    with tempfile.TemporaryDirectory() as folder:
        # The exported trace is the public way to the single allocations; device type 0 is the CPU.
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = [e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == 0]
    live: dict[object, int] = {}  # only what the call allocated: it may also free what was there before
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            live[address] = size
            held += size
        else:
            held -= live.pop(address, 0)
        peak = max(peak, held)
    return peak / 2**20


def _check_inputs(model: nn.Module, inputs: Inputs) -> None:
    """Raise ModelError unless forward can be called with exactly these."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(inputs.sample, timestep=inputs.timestep, **inputs.cond)
    except TypeError:
        got, expected = (
            f"forward({', '.join(signature.parameters)})",
            f"forward({', '.join(('sample', 'timestep', *inputs.cond))})",
        )
        do = "use a denoiser of that form, or give `inputs` where they can be given"
        raise ModelError(got=got, expected=expected, where=type(model).__name__, do=do) from None


def _moved(model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    own_device, own_dtype = _home(model)
    wanted, dtype = torch.device(device or own_device), dtype or own_dtype
    same_device = wanted.type == own_device.type and wanted.index in (None, own_device.index)
    if same_device and dtype == own_dtype:
        return model
    if _is_compiled(model):
        got, expected = f"a compiled model, {own_dtype} on {own_device}", f"{dtype} on {wanted}"
        raise ModelError(got=got, expected=expected, where=type(eager(model)).__name__, do="move it, then compile it")
    return copy.deepcopy(model).to(wanted, dtype)


def _is_compiled(model: nn.Module) -> bool:
    return eager(model) is not model or getattr(model, "_compiled_call_impl", None) is not None


def _home(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the first floating-point parameter; CPU and float32 for a model without one."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name() if device.type == "cpu" else ""
    return f"{device.type}: {name}" if name else device.type


class _Decoder(torch.nn.Module):
    """`decode` in the form of a denoiser, for what counts those."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (decode(self.vae, sample),)


_COUNTED: WeakKeyDictionary[torch.nn.Module, dict[tuple[int, ...], int]] = WeakKeyDictionary()


def decode_macs(vae: Any, config: Any) -> int:
    """MACs of decoding one sample of a denoiser with this config, counted as `count_macs` counts; each VAE is
    counted once."""
    shape, known = sample_shape(config), _COUNTED.setdefault(vae, {})
    if shape not in known:
        inputs = Inputs(torch.zeros(shape, dtype=vae.dtype), torch.zeros(1), {})
        known[shape] = count_macs(_Decoder(vae), inputs=inputs)
    return known[shape]
