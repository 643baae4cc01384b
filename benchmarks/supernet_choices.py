"""Which way of training the supernet is best: one table over distillation, channel sorting and concat slicing.

    python benchmarks/supernet_choices.py --model DIR --data idx:/usr/share/datasets/fashion-mnist --steps 250

Every variant starts from the same dense model and sees the same images; the loss is measured on the same 2,048 held-out
images, timesteps and noise for all, before and after training, for every width.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from halfstep.bank import load_denoiser
from halfstep.data import load_images
from halfstep.recipe import NoiseSpec, SlimSpec, TrainSpec
from halfstep.slimmable import Supernet, copy_of, sandwich_objective, sort_channels
from halfstep.train import Batch, Diffusion, TrainState, predictor, train

VARIANTS = {
    "sorted, aligned, no distillation (paper's loss)": SlimSpec(distill="none"),
    "distil from the widest": SlimSpec(distill="widest"),
    "distil from the dense teacher": SlimSpec(distill="dense"),
    "not sorted": SlimSpec(distill="none", sort=False),
    "leading concat slices (released code)": SlimSpec(distill="none", concat="leading"),
    "shared timestep and noise": SlimSpec(distill="none", shared_noise=True),
}


@torch.no_grad()
def held_out_losses(supernet: Supernet, diffusion: Diffusion, clean: torch.Tensor) -> list[float]:
    """Plain denoising loss of every width on the same draws."""
    supernet.model.eval()
    losses = []
    for width in supernet.widths:
        torch.manual_seed(99)
        parts = [diffusion.loss(supernet.predict(width), Batch(part, None)) for part in clean.split(256)]
        losses.append(float(torch.stack(parts).mean()))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, default=Path("runs/supernet_choices.json"))
    args = parser.parse_args()
    dense, noise = load_denoiser(args.model)
    size, channels = dense.config.sample_size, dense.config.in_channels
    images = load_images(args.data, size=size, channels=channels)
    test = load_images(args.data, size=size, channels=channels, split="test")
    clean = test.subset(min(2048, len(test))).batch(slice(0, 2048))
    diffusion = Diffusion(NoiseSpec(timesteps=noise["num_train_timesteps"], prediction=noise["prediction_type"]))
    spec = TrainSpec(steps=args.steps, batch=args.batch, lr=args.lr, warmup=50, ema_decay=0.99, log_every=100)
    rows = {}
    for name, slim in VARIANTS.items():
        net = sort_channels(dense) if slim.sort else copy_of(dense)
        supernet = Supernet(net, slim.widths, slim.concat)
        before = held_out_losses(supernet, diffusion, clean)
        teacher = predictor(dense) if slim.distill == "dense" else None
        state = TrainState.new(net, replace(spec))
        for _ in train(state, images, spec, sandwich_objective(supernet, diffusion.draw, slim, teacher), Accelerator()):
            pass
        net.load_state_dict(state.average())
        rows[name] = {"before": before, "after": held_out_losses(supernet, diffusion, clean)}
        print(name, [f"{x:.4f}" for x in before], "->", [f"{x:.4f}" for x in rows[name]["after"]], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"widths": supernet.widths, "steps": args.steps, "rows": rows}, indent=2))
    table = Table(title=f"Held-out denoising loss by width after {args.steps} steps of batch {args.batch}")
    table.add_column("variant")
    for width in supernet.widths:
        table.add_column(f"w{width:.2f} (before)", justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{a:.4f} ({b:.3f})" for a, b in zip(row["after"], row["before"], strict=True)))
    Console().print(table)


if __name__ == "__main__":
    main()
