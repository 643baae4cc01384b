"""Draft and its training: from a method's untrained net to a bank in a run folder, resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from halfstep.core.folder import open_run
from halfstep.core.machine import this_process
from halfstep.core.recipe import Recipe
from halfstep.core.watch import SILENT, Watch
from halfstep.engine.bank import Bank
from halfstep.engine.device import default_device
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.engine.subject import Subject
from halfstep.nets.denoiser import copy_of
from halfstep.training.loop import preview_of, run_loop
from halfstep.training.train import Objective, TrainState, require_trainable


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A method that is ready to train: whatever it refuses is refused, and nothing is written yet.

    `method`: its name; `tag`: what states and log records call its training. `net`: what is trained; `kept`: the
    `model` inside of it, where more is trained than is kept. `cut`: its losses run it on slices or masks of its
    weights. `bank_of`: the kept net -> the method's bank.
    `objective`: the losses, made when the training begins. `main`: the entry that a report is about; `beside`: entries
    of untrained controls, made of the bank when it is measured. `told`: what was decided about the net, in lines.
    """

    method: str
    tag: str
    net: Any
    bank_of: Callable[[Any], Bank]
    objective: Callable[[TrainState], Objective]
    main: str
    kept: Any = None
    cut: bool = False
    beside: Callable[[Bank], Mapping[str, Any]] = lambda bank: {}
    told: tuple[str, ...] = ()

    @property
    def product(self) -> Any:
        """The net that goes into the bank."""
        return self.net if self.kept is None else self.kept

    def bank(self) -> Bank:
        """The bank as it would be without training: its entries and what they cost."""
        return self.bank_of(self.product)


def teacher_of(subject: Subject) -> Any:
    """The dense denoiser as a teacher, on the device of the training."""
    return subject.dense.to(default_device()).requires_grad_(False)


def trained(draft: Draft, subject: Subject, recipe: Recipe, out: Path, watch: Watch = SILENT) -> StepAwarePipeline:
    """The pipeline of a draft's trained bank under the reference's plan, in out/pipeline; trained there, unless an
    earlier call did."""
    out = Path(out)
    require_trainable(draft.product, recipe.train, cut=draft.cut)
    inputs = {"verb": f"compress {draft.method}", "model": subject.source, "data": subject.data}
    open_run(out, recipe, inputs, subject.content, watch, subject.read(draft.product))
    done = out / "pipeline"
    if not (done / "model_index.json").is_file():
        for line in draft.told:
            watch.say(line)
        bank = _train(draft, subject, recipe, out, watch)
        plan = replace(subject, bank=bank, recipe=recipe).reference()
        if this_process().is_main_process:
            StepAwarePipeline(bank, plan, subject.encoder).save_pretrained(done)
        this_process().wait_for_everyone()
    return StepAwarePipeline.from_pretrained(done)


def _train(draft: Draft, subject: Subject, recipe: Recipe, out: Path, watch: Watch) -> Bank:
    """The bank of the averaged weights."""
    images = subject.lessons(watch)
    state = TrainState.new(draft.net, recipe.train)
    net, prefix = draft.product, "" if draft.kept is None else "model."

    def kept(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}

    def preview(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        twin = copy_of(net)
        twin.load_state_dict(kept(weights))
        bank = draft.bank_of(twin)
        bank.to(str(twin.device))
        return preview_of(bank, subject.process, recipe, subject.conditions, 16)

    run_loop(out, state, images, recipe, draft.objective(state), draft.tag, watch, preview)
    net.load_state_dict(kept(state.average()))
    bank = draft.bank_of(net.cpu())
    bank.cpu()
    return bank
