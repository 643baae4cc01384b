"""Nets pruned by others' rules, fine-tuned as long as our supernet was: Diff-Pruning by Torch-Pruning.

    pip install --no-deps torch-pruning==1.6.1
    python benchmarks/peers_pruned.py --size 32 --removed 0.75 --steps 6000    # 25 minutes of one core with AMX
    python benchmarks/peers_pruned.py --size 32 --removed 0.5 --steps 3000     # 20 minutes of one core with AMX

Diff-Pruning (arXiv 2305.10924) weighs a channel by the first-order change of the denoising loss, added up over the
timesteps from 0 on until the loss is below a twentieth of its largest, as its released settings for DDPM do; DepGraph
(arXiv 2301.12900) says which channels go together. Every layer gives up one share of its channels, which is how both
are run by default, where that comes within two points of the MACs that are wanted, else one ranking over all layers
chooses. Fine-tuning is Halfstep's plain training of a dense net: the loss, batch, rate and average of the supernet's
recipe. It resumes; work in runs/pruned<size>-<removed>/, the net in benchmarks/models/fashion<size>-pruned<removed>/.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import load_file, save_file

from fashion import DATA, MODELS
from halfstep.app.subject import open_subject
from halfstep.app.terminal import RichWatch
from halfstep.core import disk
from halfstep.core.recipes import named
from halfstep.engine.bank import Bank
from halfstep.engine.profiling import count_macs
from halfstep.engine.subject import Subject
from halfstep.nets.denoiser import copy_of
from halfstep.nets.models import load_model
from halfstep.training.loop import preview_of, run_loop
from halfstep.training.train import Diffusion, TrainState, dense_objective

THRESHOLD = 0.05
"""Timesteps count until the loss is below this part of its largest (Diff-Pruning's for DDPM)."""
NEAR = 0.02


def folder_of(size: int, removed: float) -> Path:
    return MODELS / f"fashion{size}-pruned{removed * 100:.0f}"


def add_gradients(net: Any, subject: Subject, batch: int = 32, stride: int = 4) -> int:
    """Add up the gradients of the denoising loss over timesteps, other pictures at each; returns the last of them."""
    scheduler, generator = Diffusion(subject.process).scheduler, torch.Generator().manual_seed(0)
    largest = 0.0
    for step in range(0, scheduler.config.num_train_timesteps, stride):
        timestep, clean = torch.full((batch,), step), subject.images.batch(slice(step * batch, (step + 1) * batch))
        noise = torch.randn(clean.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(net(scheduler.add_noise(clean, noise, timestep), timestep).sample.float(), noise)
        loss.backward()
        largest = max(largest, loss.item())
        if loss.item() < THRESHOLD * largest:
            break
    return step


def cut(net: Any, ratio: float, across: bool) -> Any:
    """A copy of a net with gradients, without `ratio` of the channels of every layer, or of all layers together."""
    import torch_pruning

    twin = copy.deepcopy(net)
    for mine, theirs in zip(twin.parameters(), net.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    attention = [one for one in twin.modules() if isinstance(one, Attention)]
    size = net.config.sample_size
    torch_pruning.pruner.BasePruner(
        twin,
        {"sample": torch.zeros(1, net.config.in_channels, size, size), "timestep": torch.zeros(1, dtype=torch.long)},
        importance=torch_pruning.importance.TaylorImportance(multivariable=True),
        pruning_ratio=ratio,
        global_pruning=across,
        num_heads={layer: one.heads for one in attention for layer in (one.to_q, one.to_k, one.to_v)},
        ignored_layers=[twin.conv_out],
    ).step()
    twin.zero_grad()
    return settled(twin)


def pruned(net: Any, removed: float) -> tuple[Any, str]:
    """The net with gradients after `removed` of its MACs went, and how: the most that leaves no less."""
    whole, told = count_macs(net), {False: "of every layer", True: "of all layers together"}
    for across in (False, True):
        low, high = 0.0, 0.95  # shares of channels: what they leave of the MACs falls
        for _ in range(10):
            middle = (low + high) / 2
            left = count_macs(cut(net, middle, across)) / whole
            low, high = (middle, high) if left > 1 - removed + 0.005 else (low, middle)
        found = cut(net, high, across)
        if abs(count_macs(found) / whole - (1 - removed)) <= NEAR:
            break
    return found, f"{high:.3f} of the channels {told[across]}, {count_macs(found) / whole:.3f} of the MACs"


def settled(net: Any) -> Any:
    """The net with what its layers say of their channels as their weights have it: diffusers asserts it."""
    for one in net.modules():
        if isinstance(one, Downsample2D | Upsample2D):
            one.channels, one.out_channels = one.conv.weight.shape[1], one.conv.weight.shape[0]
    return net


def save_pruned(net: Any, folder: Path, record: dict[str, Any]) -> None:
    """In half precision, beside the dense net's config, which no longer says its widths, and how it was made."""

    def write(into: Path) -> None:
        into.mkdir()
        (into / "pruned.json").write_text(json.dumps(record, indent=2) + "\n")
        weights = {name: value.half().contiguous() for name, value in net.state_dict().items()}
        save_file(weights, into / "weights.safetensors")

    disk.write_atomic(folder, write)


def load_pruned(size: int, removed: float) -> Any:
    """The net of `save_pruned`: the dense one, its weights replaced by smaller ones."""
    net = load_model(MODELS / f"fashion{size}-dense" / "unet")
    for name, value in load_file(folder_of(size, removed) / "weights.safetensors").items():
        path, leaf = name.rsplit(".", 1)
        setattr(net.get_submodule(path), leaf, torch.nn.Parameter(value.float()))
    return settled(net).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=(16, 32), default=32)
    parser.add_argument("--removed", type=float, default=0.5, help="share of the MACs")
    parser.add_argument("--steps", type=int, default=6000, help="as many as the supernet had")
    args = parser.parse_args()
    watch, work = RichWatch(), Path(f"runs/pruned{args.size}-{args.removed * 100:.0f}")
    work.mkdir(parents=True, exist_ok=True)
    recipe = named(f"fashion{args.size}").edit([f"train.steps={args.steps}", "train.save_every=100"])
    subject = open_subject(str(MODELS / f"fashion{args.size}-dense"), DATA, recipe, watch=watch)
    dense = copy_of(subject.dense)
    last = add_gradients(dense, subject)
    net, told = pruned(dense, args.removed)
    watch.say(f"{told}; gradients of timesteps up to {last}")

    def preview(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        twin = copy.deepcopy(net)
        twin.load_state_dict(weights)
        return preview_of(Bank({"full": twin}, "full", subject.process.prediction), subject.process, recipe)

    state = TrainState.new(net, subject.recipe.train)
    objective = dense_objective(net, Diffusion(subject.process))
    run_loop(work, state, subject.lessons(watch), subject.recipe, objective, "pruned", watch, preview)
    net.load_state_dict(state.average())
    record = {
        "by": "Torch-Pruning 1.6.1, Diff-Pruning's criterion",
        "cut": told,
        "timesteps": f"every fourth up to {last}",
    }
    save_pruned(net, folder_of(args.size, args.removed), record | {"steps": args.steps})


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    main()
