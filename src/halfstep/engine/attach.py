"""Put a plan under any diffusers pipeline: its loop stays its own, its denoiser looks up what to run at each step.

    attach(pipe, "RUN")
    pipe("a red shoe", num_inference_steps=20).images
    detach(pipe)

What a pipeline brings is left alone: LoRA, ControlNet, IP-Adapter, img2img, inpainting, negative prompts, precision,
offloading, callbacks. Which pipelines, and what of a plan each can run: `docs/pipelines.md`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import nn

from halfstep.core.errors import ModelError, PlanError
from halfstep.core.plan import StepPlan
from halfstep.engine.bank import Bank
from halfstep.engine.calls import Call, require_rows_fed
from halfstep.engine.director import Director, has_variance
from halfstep.engine.entry import Reuse
from halfstep.engine.pipelines import (
    DROPS_VARIANCE,
    conditional_half,
    denoiser_of,
    own_reuse,
    says_guidance,
    scheduler_for,
)
from halfstep.engine.samplers import prediction_type
from halfstep.nets.denoiser import eager
from halfstep.nets.reuse import require_cut

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
"""What a correction knows how to correct."""


@dataclass
class Prediction(BaseOutput):
    """What a denoiser puts out, where it is asked for by name."""

    sample: torch.Tensor


def attach(pipe: Any, plan: StepPlan | str | Path, bank: Bank | None = None) -> Any:
    """Put a plan under a diffusers pipeline, and return the pipeline: from now on its calls run the plan.

    plan: a `StepPlan`, or where one is: a run folder, a pipeline folder, a plan.json.
    bank: of entries other than the pipeline's own denoiser, which is the plan's reference, and its reuse; by default
    the one beside the plan, read only if it is needed.

    The pipeline has to be called with `num_inference_steps=plan.sampler.steps`; its scheduler becomes the plan's. A
    call that begins inside of the trajectory (img2img, inpainting) runs the plan from there; a row that reuses features
    of rows before that computes its source. What rows leave for later ones is kept for one call of the pipeline, as one
    tensor for all images, and nothing about it is decided by numbers in it.

    Guidance. A plan without guides, whose `guidance` is 1, leaves it to the pipeline: every row runs both halves of its
    batch. Another plan says it for every row, and the call's guidance_scale only has to be above 1: a row with
    `Guide(entry, w)` runs the unconditional half by that entry and gives guide + w * (own - guide), in one call where
    both entries are the same; a row without a guide, or with weight 1, is unguided and runs the conditional half alone.
    Both halves then get the same prediction, so that the pipeline's own formula, whatever its scale, gives just that:
    with equal weights, bit for bit what the pipeline gives; guidance_rescale has nothing to rescale. A row's correction
    is of what comes out: of the guided prediction, or without guides of either half, before the pipeline guides.

    Cost beside the networks: once per call of the pipeline the timesteps are read, and with guides whether the halves
    of its batch are the same samples. Where the pipeline passes no view of the scheduler's timesteps (Flux, which
    divides them) one number is read per step. On a GPU each of these waits for it.

    Raises ModelError for a denoiser that is not known or cannot be cut there, PlanError for a pipeline that has a plan
    already, whose scheduler is of another process, or whose guidance is not known, where the plan has guides, for
    entries without weights and for weights that are not the pipeline's; nothing is changed then.
    """
    role, net = denoiser_of(pipe)
    if type(net) is Attached:
        got, expected = "a pipeline that has a plan", "one that has none"
        raise PlanError(got=got, expected=expected, where="attach", do="detach(pipe) first")
    plan, folder = _read(plan)
    scheduler = scheduler_for(pipe, plan.sampler)
    models, links = _networks(net, plan, folder, bank)
    require_rows_fed(plan.rows, links)
    half = conditional_half(pipe) if says_guidance(plan) else None
    _require_takes_residuals(pipe, models, net)
    _require_one_prediction(pipe, plan, net)
    _require_corrects(plan, scheduler, net)
    runner = Attached(net, Director(plan, models, links, scheduler, half), pipe)
    _swap(pipe, role, runner, scheduler)
    return pipe


def detach(pipe: Any) -> Any:
    """Give a pipeline back its own denoiser and scheduler, the same objects, and return it. Raises PlanError for a
    pipeline without a plan."""
    role, net = denoiser_of(pipe)
    if type(net) is not Attached:
        raise PlanError(got="a pipeline without a plan", expected="one with", where="detach", do="attach one first")
    _swap(pipe, role, net.inner, net.before)
    return pipe


@contextlib.contextmanager
def attached(pipe: Any, plan: StepPlan | str | Path, bank: Bank | None = None) -> Iterator[Any]:
    """The pipeline with a plan, for the length of a with block. Arguments and errors as `attach`."""
    attach(pipe, plan, bank)
    try:
        yield pipe
    finally:
        detach(pipe)


def _swap(pipe: Any, role: str, net: Any, scheduler: Any) -> None:
    """Give the pipeline another denoiser and scheduler. Offloading hooks move to what stands there now."""
    offloaded = bool(getattr(pipe, "_all_hooks", ()))
    if offloaded:
        pipe.remove_all_hooks()
    setattr(pipe, role, net)
    pipe.scheduler = scheduler
    if offloaded:  # as pipelines do themselves after every call
        pipe.enable_model_cpu_offload(device=pipe._offload_device)


# ------------------------------------------------------------------------------------------------- what a plan is given


def _read(plan: StepPlan | str | Path) -> tuple[StepPlan, Path | None]:
    """The plan, and the folder that it was in."""
    if isinstance(plan, StepPlan):
        return plan, None
    place = Path(plan)
    file = place if place.is_file() else place / "plan.json"
    return StepPlan.load(file), file.parent


def _networks(
    net: Any, plan: StepPlan, folder: Path | None, bank: Bank | None
) -> tuple[dict[str, Any], dict[str, Reuse]]:
    """The models that run alone, by entry, and the entries that reuse features. Raises PlanError and ModelError."""
    own = plan.reference
    links: dict[str, Reuse] = {}
    with contextlib.suppress(PlanError):
        links = {name: own_reuse(name, net, own) for name in plan.nets if name != own}
        return {own: net}, links
    if bank is None:
        bank = _bank_beside(folder, net, plan)
    for name in plan.nets:
        if name not in bank:
            raise PlanError(
                got=f"entry {name!r}", expected=f"one of {', '.join(bank)}", where="plan", do="bring its bank"
            )
    _require_same_model(net, bank, own)
    found = {name: bank.entries[name].weights for name in plan.nets}
    links = {name: one for name, one in found.items() if isinstance(one, Reuse)}
    for name, one in links.items():
        require_cut(net if one.of == own else bank[one.of], one.cut, f"entry {name!r}")
    names = {own, *(name for name in plan.nets if name not in links), *(one.of for one in links.values())}
    return {name: net if name == own else bank[name] for name in names}, links


def _bank_beside(folder: Path | None, net: Any, plan: StepPlan) -> Bank:
    """The bank in a run's or a pipeline's folder, in the net's precision, where the net is."""
    places = [] if folder is None else [folder / "pipeline" / "bank", folder / "bank"]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        others = [name for name in plan.nets if name != plan.reference and f"{plan.reference}~" not in name]
        raise PlanError(
            got=f"entries with weights of their own: {', '.join(others)}",
            expected=f"{plan.reference!r}, the pipeline's own denoiser, and its reuse",
            where=folder or "plan",
            do="give the bank that has them",
        )
    return Bank.from_pretrained(found, torch_dtype=net.dtype).to(net.device)


def _require_same_model(net: Any, bank: Bank, own: str) -> None:
    """Raise ModelError unless the pipeline's denoiser is the bank's reference, weight for weight."""
    theirs, ours = eager(bank[own]).state_dict(), eager(net).state_dict()
    same = theirs.keys() == ours.keys() and all(
        value.shape == ours[name].shape
        and value.dtype == ours[name].dtype
        and torch.equal(value.to(ours[name].device), ours[name])
        for name, value in theirs.items()
    )
    if own != bank.reference or not same:
        raise ModelError(
            got="a pipeline whose denoiser has other weights (or a LoRA, or another precision)",
            expected=f"those of the bank's {bank.reference!r}, from which its other entries follow",
            where="attach",
            do="attach it to the pipeline that the run was made of, or a plan of 'full' and its reuse alone",
        )


def _require_takes_residuals(pipe: Any, models: Mapping[str, Any], net: Any) -> None:
    """Raise PlanError where what a ControlNet or a T2I-Adapter adds inside the network fits no entry's channels."""
    added = [name for name in ("controlnet", "adapter") if pipe.components.get(name) is not None]
    sizes = net.config.get("block_out_channels")
    other = [
        name
        for name, model in models.items()
        if list(model.config.get("block_out_channels") or ()) != list(sizes or ())
    ]
    if added and other:
        raise PlanError(
            got=f"{', '.join(other)} beside a {added[0]}, which adds to {sizes} channels",
            expected="entries of the network's own width",
            where="attach",
            do="leave narrower entries out of the plan",
        )


def _require_one_prediction(pipe: Any, plan: StepPlan, net: Any) -> None:
    """Raise PlanError for a network with a learned variance whose pipeline uses it: only the plain call has one."""
    names = {cls.__name__ for cls in type(pipe).__mro__}
    plain = len(plan.nets) == 1 and not plan.corrected and not says_guidance(plan)
    if has_variance(net) and not plain and not names & set(DROPS_VARIANCE):
        raise PlanError(
            got=f"reuse, guides or corrections for a {type(pipe).__name__}, which uses a learned variance",
            expected=f"plain rows, or one of {', '.join(DROPS_VARIANCE)}",
            where="plan",
            do="attach a plan of 'full' alone",
        )


def _require_corrects(plan: StepPlan, scheduler: Any, net: Any) -> None:
    """Raise PlanError where the plan corrects predictions that no correction is known for."""
    kind = prediction_type(scheduler)
    if plan.corrected and kind not in PREDICTIONS:
        raise PlanError(
            got=f"corrections of {kind}",
            expected=" or ".join(PREDICTIONS),
            where="plan",
            do="leave the corrections out of the plan",
        )


# --------------------------------------------------------------------------------------------------------- the wrapper


class Attached(nn.Module):
    """Stands in a pipeline in the place of its denoiser, `inner`: the same parts and parameters, the same attributes
    and methods, the same class to `isinstance`; only its call asks the plan what to run. `before`: the scheduler that
    the pipeline had."""

    def __init__(self, inner: Any, director: Director, pipe: Any):
        super().__init__()
        shared = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        self.__dict__.update({name: inner.__dict__[name] for name in shared})
        self.__dict__.update(inner=inner, __module__=type(inner).__module__, training=inner.training)
        self.__dict__.update(director=director, before=pipe.scheduler, _pipe=weakref.ref(pipe))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What a pipeline asks for before it loads, scales and fuses a LoRA; `type(...)` says what it is."""
        return type(self.__dict__["inner"])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("_hf_hook", "_old_forward"):  # accelerate's, who hooks the one or the other
                raise
            return getattr(self.__dict__["inner"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call, named = Call.of(self.inner, args, kwargs)
        found = self.director(self._pipe(), call)
        if found is None:
            return self.inner(*args, **kwargs)
        return Prediction(sample=found) if named else (found,)

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Calls inside are of one branch of guidance, which has a memo of its own."""
        director, before = self.director, self.director.branch
        director.branch = name
        own = getattr(self.inner, "cache_context", None)
        try:
            with own(name) if own is not None else contextlib.nullcontext():
                yield
        finally:
            director.branch = before

    def to(self, *args: Any, **kwargs: Any) -> Any:
        for model in self.director.models.values():
            model.to(*args, **kwargs)
        return self
