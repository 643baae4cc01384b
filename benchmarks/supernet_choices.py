"""Which way of training the supernet is best: one table over distillation, channel sorting and concat slicing.

    python benchmarks/supernet_choices.py --model DIR --data idx:/usr/share/datasets/fashion-mnist --steps 250

Every variant starts from the same dense model and sees the same images; the loss is measured on the same 2,048 held-out
images, timesteps and noise for all, before and after training, for every width.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from halfstep.core.process import Process
from halfstep.core.recipe import SlimSpec, TrainSpec
from halfstep.data.images import load_images
from halfstep.methods.slimmable import Supernet, sandwich_objective, supernet_of
from halfstep.nets.denoiser import predictor
from halfstep.nets.models import load_denoiser
from halfstep.training.train import Batch, Diffusion, TrainState, train

VARIANTS = {
    "sorted, aligned, no distillation (paper's loss)": SlimSpec(distill="none"),
    "distil from the widest": SlimSpec(distill="widest"),
    "distil from the dense teacher": SlimSpec(distill="dense"),
    "the same, shared timestep and noise": SlimSpec(distill="dense", shared_noise=True),
    "the same, without width 1": SlimSpec(distill="dense", shared_noise=True, widths=(0.75, 0.5, 0.25)),
    "own noise, without width 1": SlimSpec(distill="dense", widths=(0.75, 0.5, 0.25)),
    "not sorted": SlimSpec(distill="none", sort=False),
    "leading concat slices (released code)": SlimSpec(distill="none", concat="leading"),
    "shared timestep and noise": SlimSpec(distill="none", shared_noise=True),
}


class Measured(TypedDict):
    """A variant's held-out losses by width, before and after training, and the seconds that it took."""

    before: list[float]
    after: list[float]
    seconds: float
    widths: tuple[float, ...]


@torch.no_grad()
def held_out_losses(supernet: Supernet, diffusion: Diffusion, clean: torch.Tensor) -> list[float]:
    """Plain denoising loss of every width on the same draws."""
    supernet.model.eval()
    losses = []
    for width in supernet.widths:
        torch.manual_seed(99)
        parts = [diffusion.loss(supernet.predict(width), Batch(part, {})) for part in clean.split(256)]
        losses.append(float(torch.stack(parts).mean()))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--only", default="", help="only variants whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("runs/supernet_choices.json"))
    args = parser.parse_args()
    dense, noise = load_denoiser(args.model)
    size, channels = dense.config.sample_size, dense.config.in_channels
    images = load_images(args.data, size=size, channels=channels)
    test = load_images(args.data, size=size, channels=channels, split="test")
    clean = test.subset(min(2048, len(test))).batch(slice(0, 2048))
    diffusion = Diffusion(Process.of(noise))
    spec = TrainSpec(steps=args.steps, batch=args.batch, lr=args.lr, warmup=50, ema_decay=0.99, log_every=100)
    rows: dict[str, Measured] = {}
    for name, slim in VARIANTS.items():
        if args.only not in name:
            continue
        supernet = supernet_of(dense, slim)
        net = supernet.model
        before = held_out_losses(supernet, diffusion, clean)
        teacher = predictor(dense) if slim.distill == "dense" else None
        state = TrainState.new(net, replace(spec))
        begun = time.perf_counter()
        for _ in train(state, images, spec, sandwich_objective(supernet, diffusion.draw, slim, teacher), Accelerator()):
            pass
        seconds = time.perf_counter() - begun
        net.load_state_dict(state.average())
        after = held_out_losses(supernet, diffusion, clean)
        rows[name] = {"before": before, "after": after, "seconds": seconds, "widths": supernet.widths}
        print(f"{name}: {[f'{x:.4f}' for x in after]} in {seconds:.0f} s", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"steps": args.steps, "rows": rows}, indent=2))
    table = Table(title=f"Held-out denoising loss by width after {args.steps} steps of batch {args.batch}")
    table.add_column("variant")
    widths = SlimSpec().widths
    for width in widths:
        table.add_column(f"w{width:.2f} (before)", justify="right")
    table.add_column("s a step", justify="right")
    for name, row in rows.items():
        losses = dict(zip(row["widths"], zip(row["after"], row["before"], strict=True), strict=True))
        cells = [f"{losses[w][0]:.4f} ({losses[w][1]:.3f})" if w in losses else "—" for w in widths]
        table.add_row(name, *cells, f"{row['seconds'] / args.steps:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
