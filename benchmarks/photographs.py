"""Noisy photographs in colour, restored by a continuous net and by plain nets of its size (the Missing U's second use).

    python benchmarks/photographs.py --data folder:cifar10/train --test folder:cifar10/test

Trains what is missing, resumable: the continuous net (two levels, order 2, one solver step), a plain U-Net of as many
parameters and MACs, and one of as many parameters on three levels; each from scratch on the same batches. Test pictures
with noise of 0.05, 0.1 and 0.2 (of [0, 1]) are restored in four calls, beside classical denoisers; differences are
paired over pictures. Work in runs/photographs/, the table to benchmarks/photographs.md, pictures beside it in docs/.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fashion import file_name, paired
from halfstep.app import verbs
from halfstep.app.terminal import RichWatch
from halfstep.core import disk
from halfstep.core.recipe import ContinuousSpec, ModelSpec, Recipe
from halfstep.core.recipes import named
from halfstep.data.images import load_images
from halfstep.data.pictures import picture_grid
from halfstep.engine.profiling import count_macs
from halfstep.measure.restore import CLASSICAL, Denoiser, Restored, Tiles, compare_denoisers, restore_picture
from halfstep.nets.denoiser import predictor
from halfstep.nets.models import load_denoiser
from halfstep.report.page import Table, markdown, rich_table

NETS: dict[str, ContinuousSpec | ModelSpec] = {
    "plain, same parameters and MACs": ModelSpec(channels=(28, 28), attention=(False,) * 2, head_dim=28, groups=4),
    "plain, three levels": ModelSpec(channels=(24,) * 3, attention=(False,) * 3, head_dim=24),
    "continuous, order 2": ContinuousSpec(base=12, levels=2, order=2, head_dim=16, steps=(1,), teacher=0.0),
}
EDITS = ("data.size=32", "data.flip=true", "train.steps=1000", "train.batch=32", "train.lr=1e-3", "train.warmup=100")
SIGMAS, STEPS, SHOWN = (0.05, 0.1, 0.2), 4, 12


def trained(name: str, data: str, work: Path, recipe: Recipe, watch: RichWatch) -> Any:
    out, spec = work / file_name(name), NETS[name]
    if isinstance(spec, ModelSpec):
        return load_denoiser(verbs.train(data, out, replace(recipe, model=spec), watch=watch))[0]
    return verbs.make("continuous", None, data, out, replace(recipe, continuous=spec), watch=watch).bank["continuous@1"]


def kept_in(kept: dict[str, list[torch.Tensor]], _: int, name: str, picture: torch.Tensor) -> None:
    kept[name].append(picture)


def rows_of(records: list[Restored], nets: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each method; its PSNR beside the first's, picture by picture."""
    rows: list[tuple[str, ...]] = []
    first = torch.tensor(records[0].psnrs_db)
    for one in records:
        size = ("", "")
        if net := nets.get(one.name):
            size = (f"{net.num_parameters() / 1e3:,.0f} k", f"{count_macs(net) / 1e6:.1f}")
        more = "–" if one is records[0] else paired(torch.tensor(one.psnrs_db) - first, 2)
        told = (f"{one.psnr_db:.2f}", more, f"{one.ssim:.3f}", f"{one.ms:.0f}")
        rows.append((f"{one.sigma:g} ({one.noisy_psnr_db:.1f} dB)", one.name, *size, *told))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="folder:cifar10/train")
    parser.add_argument("--test", default="folder:cifar10/test")
    parser.add_argument("--images", type=int, default=128, help="test pictures")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/photographs"))
    args = parser.parse_args()
    watch, recipe = RichWatch(), named("default").edit(EDITS)
    nets = {name: trained(name, args.data, args.work, recipe, watch) for name in NETS}
    if args.train_only:
        return
    images = load_images(args.test, size=32, channels=3)
    order = torch.randperm(args.images, generator=torch.Generator().manual_seed(0))  # what is shown is of every class
    chosen = torch.linspace(0, len(images) - 1, args.images).long()[order]
    pictures = [images.batch(slice(int(k), int(k) + 1))[0] / 2 + 0.5 for k in chosen]
    tiles = Tiles(size=32, channels=3)
    methods: dict[str, Denoiser] = {
        name: partial(restore_picture, predictor(net), process=recipe.noise, tiles=tiles, steps=STEPS)
        for name, net in nets.items()
    }
    rows, shown = [], pictures[:SHOWN]
    for sigma in SIGMAS:
        kept: dict[str, list[torch.Tensor]] = {name: [] for name in ("noisy", *methods, *CLASSICAL)}
        keep = partial(kept_in, kept)
        records = compare_denoisers(methods | CLASSICAL, pictures, sigma, 0, shown=keep)
        rows += rows_of(records, nets)
        shown += [one.clamp(0, 1) for what in ("noisy", *NETS) for one in kept[what][:SHOWN]]
    note = f"{args.images} test pictures, {STEPS} calls of a net; more: paired with the first row, 95 % interval."
    columns = ("noise", "method", "parameters", "MMACs", "PSNR dB", "more", "SSIM", "ms a picture")
    table = Table(title="Noisy photographs in colour", columns=columns, rows=tuple(rows), note=note)
    Path(__file__).with_suffix(".md").write_text(f"# {table.title}\n\n{markdown(table)}\n")
    Console().print(rich_table(table))
    grid = picture_grid(torch.stack(shown).mul(255).round().byte().numpy(), columns=SHOWN)
    disk.write_png(Path(__file__).parents[1] / "docs" / "photographs.png", grid)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
