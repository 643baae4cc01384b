"""What the training loop costs over a bare PyTorch loop that does the same work; the target is at most 3 %.

    python benchmarks/train_overhead.py [--steps 60] [--repeats 5]
    python benchmarks/train_overhead.py --r 0.1      # and what the penalty of regularised score matching costs

One process, one device, the same U-Net, batch and precision. The two loops take turns of a few steps, A B, B A, A B …;
each pair of turns gives one ratio, so that a machine that slows down or is shared hurts both sides alike.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from rich.console import Console
from rich.table import Table

from halfstep.core.process import Process
from halfstep.core.recipe import RegularSpec, TrainSpec
from halfstep.data.images import Images
from halfstep.methods.regularized import regular_objective
from halfstep.training.train import Diffusion, TrainState, train, use_bf16

TARGET = 0.03


def random_images(count: int, size: int) -> Images:
    """Pixels of no meaning: only their shape costs time."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 1, size, size), dtype=np.uint8)
    return Images(name="random", pixels=pixels, labels=None, classes=(), fingerprint="0" * 16)


def unet(size: int) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
    )


def halfstep_loop(
    model: UNet2DModel, images: Images, spec: TrainSpec, accelerator: Accelerator, r: float = 0.0
) -> Iterator[float]:
    """Yields the mean loss of every `spec.log_every` steps; r: weight of the penalty, 0 for the plain objective."""
    diffusion = Diffusion(Process())
    levels = diffusion.scheduler.alphas_cumprod
    objective = regular_objective(model, diffusion.draw, RegularSpec(r=r), levels, "epsilon")
    for record in train(TrainState.new(model, spec), images, spec, objective, accelerator):
        yield record.loss


def bare_loop(model: UNet2DModel, images: Images, spec: TrainSpec, device: torch.device) -> Iterator[float]:
    """The same work as a script would write it: no seeds per step, no epochs, no schedule, no generator of losses."""
    pixels = torch.from_numpy(images.pixels)
    alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay, fused=True)
    average = EMAModel(parameters, decay=spec.ema_decay, foreach=True)
    bf16 = use_bf16(spec, device)
    model.train()
    total = torch.zeros((), device=device)
    for step in range(1, spec.steps + 1):
        index = torch.randint(0, len(pixels), (spec.batch,))
        clean = pixels[index].to(device, non_blocking=True).float().div_(127.5).sub_(1.0)
        noise = torch.randn_like(clean)
        timestep = torch.randint(0, 1000, (spec.batch,), device=device)
        bar = alphas_cumprod[timestep][:, None, None, None]
        noisy = bar.sqrt() * clean + (1 - bar).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = F.mse_loss(model(noisy, timestep).sample.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, spec.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.step(parameters)
        total += loss.detach()
        if step % spec.log_every == 0:
            yield total.item() / spec.log_every
            total.zero_()


def seconds(turn: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """Wall time of one turn, and its loss."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss = turn()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="steps of each loop in a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--turn", type=int, default=4, help="steps of a loop before the other one's turn")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--r", type=float, default=0.0, help="a third loop, under the penalty of this weight")
    parser.add_argument("--precision", choices=["auto", "no", "bf16"], default="auto")
    args = parser.parse_args()
    if min(args.steps, args.repeats, args.turn, args.batch) < 1 or args.steps < args.turn:
        parser.error("--steps, --repeats, --turn and --batch are at least 1, and --steps at least --turn")

    accelerator = Accelerator()
    device, images = accelerator.device, random_images(4096, args.size)
    turns = args.repeats * (args.steps // args.turn)
    spec = TrainSpec(
        steps=(turns + 1) * args.turn,
        batch=args.batch,
        precision=args.precision,
        log_every=args.turn,
        warmup=0,
        schedule="constant",
    )
    ours, bare = unet(args.size).to(device), unet(args.size).to(device)
    loops = {
        "halfstep": halfstep_loop(ours, images, spec, accelerator),
        "bare PyTorch": bare_loop(bare, images, spec, device),
    }
    if args.r:
        third = unet(args.size).to(device)
        loops[f"halfstep, r = {args.r:g}"] = halfstep_loop(third, images, spec, accelerator, args.r)
    times: dict[str, list[float]] = {name: [] for name in loops}
    losses = {name: next(loop) for name, loop in loops.items()}  # the warm-up: one turn that does not count
    for k in range(turns):
        for name in list(loops) if k % 2 == 0 else reversed(list(loops)):
            took, losses[name] = seconds(partial(next, loops[name]), device)
            times[name].append(1e3 * took / args.turn)

    precision = "bf16 autocast" if use_bf16(spec, device) else "float32"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    parameters = sum(p.numel() for p in ours.parameters())
    table = Table(
        title="Training step, wall time",
        caption=f"{where}, {precision}, threads: {torch.get_num_threads()}, batch {args.batch} at "
        f"{args.size}×{args.size}, {parameters / 1e6:.2f} M parameters, {turns} pairs of turns of {args.turn} steps, "
        f"torch {torch.__version__}",
    )
    for column in ("loop", "median ms a step", "quartiles", "last loss"):
        table.add_column(column, justify="left" if column == "loop" else "right")
    for name, values in times.items():
        low, high = quartiles(values)
        table.add_row(name, f"{statistics.median(values):.2f}", f"{low:.2f} … {high:.2f}", f"{losses[name]:.3f}")
    console = Console()
    console.print(table)
    over = told(console, "halfstep", "bare PyTorch", times)
    console.print(f"target at most {100 * TARGET:.0f} % over: {'met' if over <= TARGET else 'missed'}")
    if args.r:
        told(console, f"halfstep, r = {args.r:g}", "halfstep", times)


def told(console: Console, ours: str, theirs: str, times: dict[str, list[float]]) -> float:
    """Print the median of the paired ratios of two loops' turns, and return what it is above 1."""
    ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
    (low, high), over = quartiles(ratios), statistics.median(ratios) - 1
    console.print(f"{ours} / {theirs}: median of paired ratios {1 + over:.3f} (quartiles {low:.3f} … {high:.3f})")
    return over


def quartiles(values: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)


if __name__ == "__main__":
    main()
