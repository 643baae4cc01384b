"""A colour model of CIFAR-10 by class, 32x32: trained here, kept in fp16, and measured.

    python benchmarks/cifar.py train --data folder:cifar10/train      # resumable
    python benchmarks/cifar.py export                                 # benchmarks/models/cifar32-dense, fp16
    python benchmarks/cifar.py supernet --data folder:cifar10/train   # three widths of it, resumable
    python benchmarks/cifar.py measure --data folder:cifar10/train --model runs/cifar/supernet    # benchmarks/cifar.md

`folder:` holds one folder for each class. `train --model benchmarks/models/cifar32-dense --work runs/cifar-on` trains
on from what is committed. Measured: the Fréchet distance by ImageNet's features and by a classifier trained on the
data, corrected for bias, beside its floor, under DDIM and under a sampler that is free. Work in runs/cifar/.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DDPMPipeline
from rich.console import Console

from fashion import MODELS
from halfstep.app import verbs
from halfstep.app.measurement import judge_for
from halfstep.app.subject import open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core import disk
from halfstep.core.recipe import SampleSpec
from halfstep.core.recipes import named
from halfstep.data.pictures import picture_grid
from halfstep.engine.sampling import reference_plan
from halfstep.measure.quality import Distances, difference
from halfstep.report.page import Table, markdown, rich_table
from halfstep.report.words import change_cell

RECIPE = named("default").edit(
    [
        *("data.size=32", "data.flip=true", "model.channels=32,64,128", "model.attention=false,false,true"),
        *("model.class_conditional=true", "noise.beta_schedule=squaredcos_cap_v2"),
        *("train.steps=7000", "train.batch=64", "train.lr=8e-4", "train.save_every=200", "train.sample_every=1000"),
    ]
)
SAMPLERS = {
    "DDIM, 20 steps": SampleSpec(steps=20),
    "UniPC 2, 10 steps": SampleSpec(scheduler="unipc", steps=10),
}
KEPT = MODELS / "cifar32-dense"
NARROWER = RECIPE.edit(["train.steps=4500", "train.lr=1e-3", "slim.widths=0.75,0.5", "slim.shared_noise=true"])


def export(work: Path) -> None:
    """The trained pipeline with weights of half precision, and its classes."""
    source = work / "dense" / "pipeline"
    pipe = DDPMPipeline.from_pretrained(source, torch_dtype=torch.float16)

    def write(folder: Path) -> None:
        pipe.save_pretrained(folder)
        for file in (folder / "model_index.json", folder / "unet" / "config.json"):  # where it lay is nobody's matter
            told = json.loads(file.read_text())
            disk.write_json(file, {name: value for name, value in told.items() if name != "_name_or_path"})
        shutil.copy(source / "classes.json", folder)

    disk.write_atomic(KEPT, write)


def measure(model: str, args: argparse.Namespace, watch: RichWatch) -> None:
    """A row for each sampler, entry and kind of features, changes paired with the dense net under that sampler; and
    pictures of the same noise, a grid for each sampler and entry."""
    rows = []
    for kind in args.features:
        recipe = replace(RECIPE, eval=replace(RECIPE.eval, features=kind))
        subject = open_subject(model, args.data, recipe, watch=watch)
        bank = subject.stand_ins
        judge = judge_for(bank, subject, args.work / "measured" / kind, watch)
        least = judge.floor(args.images).high
        for name in args.samplers:
            plan = reference_plan(bank, subject.process, SAMPLERS[name], bank.prices())
            found: dict[str, Distances] = {}
            for entry in bank:
                drawn, pictures = judge.features(plan.uniform(entry), args.images, 0, 64)
                one = found[entry] = judge.distances(drawn, 0, 200)
                change = difference(found[bank.reference], one, judge.reference, least)
                low, high = one.interval
                beside = change_cell(change) if entry != bank.reference else "–"
                share = f"{plan.uniform(entry).macs / plan.macs:.0%}"
                rows.append((name, entry, share, kind, f"{one.value:.2f} [{low:.2f}, {high:.2f}]", beside))
                title = f"{name} {entry}".replace(",", "").replace(" ", "-")
                disk.write_png(args.work / f"{title}.png", picture_grid(pictures, columns=16))
                watch.say(" ".join(rows[-1]))
    note = (
        f"{args.images} pictures against {len(subject.images)} real ones, classes as often as in the data; floor "
        f"{least:.2f}; 95 % intervals over pictures."
    )
    columns = ("sampler", "entry", "MACs", "features", "FD", "change")
    table = Table(title="CIFAR-10 by class, 32x32", columns=columns, rows=tuple(rows), note=note)
    Path(__file__).with_suffix(".md").write_text(f"# {table.title}\n\n{markdown(table)}\n")
    Console().print(rich_table(table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "export", "supernet", "measure"))
    parser.add_argument("--data", default="folder:cifar10/train")
    parser.add_argument("--model", help="train: on from this model; supernet, measure: this one")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--features", nargs="*", default=["own", "imagenet"])
    parser.add_argument("--samplers", nargs="*", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--work", type=Path, default=Path("runs/cifar"))
    parser.add_argument("--set", action="append", default=[], help="train: edit the recipe, as halfstep's --set")
    args = parser.parse_args()
    watch = RichWatch()
    if args.stage == "train":
        verbs.train(args.data, args.work / "dense", RECIPE.edit(args.set), model=args.model, watch=watch)
    elif args.stage == "supernet":
        recipe = NARROWER.edit(args.set)
        verbs.make("slimmable", args.model or str(KEPT), args.data, args.work / "supernet", recipe, watch=watch)
    elif args.stage == "export":
        export(args.work)
    else:
        measure(args.model or str(KEPT), args, watch)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
