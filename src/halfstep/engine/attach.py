"""Put a plan under any diffusers pipeline: its loop stays its own, its denoiser looks up what to run at each step.

    attach(pipe, "RUN")
    pipe("a red shoe", num_inference_steps=20).images
    detach(pipe)

What a pipeline brings is left alone: LoRA, ControlNet, IP-Adapter, img2img, inpainting, negative prompts, precision,
offloading, callbacks. Which pipelines, and what of a plan each can run: `docs/pipelines.md`.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import nn

from halfstep.core.errors import ModelError, PlanError
from halfstep.core.plan import Row, StepPlan
from halfstep.engine.bank import Bank
from halfstep.engine.calls import (
    Call,
    Part,
    Run,
    guide_rows,
    joined,
    parted,
    parts_of,
    position,
    require_rows_fed,
)
from halfstep.engine.entry import Reuse
from halfstep.engine.pipelines import (
    DROPS_VARIANCE,
    TIMES_1000,
    conditional_half,
    denoiser_of,
    family_name,
    own_reuse,
    says_guidance,
    scheduler_for,
)
from halfstep.engine.samplers import prediction_type
from halfstep.engine.sampling import guided, levels_of
from halfstep.nets.denoiser import Memo, Predict, corrected_as, eager
from halfstep.nets.reuse import Forwards, leaving, require_cut, taking

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
    runner = Attached(net, _Director(plan, models, links, scheduler, half), pipe)
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


def _has_variance(net: Any) -> bool:
    """Whether the network puts out a learned variance beside its prediction."""
    return net.config.get("out_channels") == 2 * net.config["in_channels"]


def _require_one_prediction(pipe: Any, plan: StepPlan, net: Any) -> None:
    """Raise PlanError for a network with a learned variance whose pipeline uses it: only the plain call has one."""
    names = {cls.__name__ for cls in type(pipe).__mro__}
    plain = len(plan.nets) == 1 and not plan.corrected and not says_guidance(plan)
    if _has_variance(net) and not plain and not names & set(DROPS_VARIANCE):
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


# ------------------------------------------------------------------------------------------------------------ the rows


class _Director:
    """Says what each call of a pipeline's denoiser runs, by the place of its timestep in the plan."""

    def __init__(
        self,
        plan: StepPlan,
        models: Mapping[str, Any],
        links: Mapping[str, Reuse],
        scheduler: Any,
        half: int | None,
    ):
        self.plan, self.models, self.links = plan, models, links
        self.scheduler, self.half = scheduler, half
        self.net = models[plan.reference]
        self.variance = _has_variance(self.net)
        self.branch = ""
        self._times: torch.Tensor | None = None
        self._passed: dict[torch.dtype, list[float]] = {}
        self._runs: dict[str, Run] = {}

    def __call__(self, pipe: Any, call: Call) -> torch.Tensor | None:
        """The prediction of a call; None where the network's own call, as it came, is all there is to it."""
        run, i = self._place(pipe, call)
        row, part = self.plan.rows[i], run.own[i]
        simple = self.half is None and not row.corrected and not part.leaves and part.entry not in self.links
        if simple and part.entry == self.plan.reference:
            return None
        found = self._predict(part, row, call, run.memo) if self.half is None else self._guided(run, i, call)
        if row.corrected:
            found = self._corrected(found, call, i)
        if i == len(self.plan.rows) - 1:
            del self._runs[self.branch]  # with what it holds
        return torch.cat([found, torch.zeros_like(found)], dim=1) if self.variance else found  # which is not used

    # ------------------------------------------------------------------------------------------------- where a call is

    def _place(self, pipe: Any, call: Call) -> tuple[Run, int]:
        """The trajectory of a call, and its row."""
        if pipe is not None and pipe.scheduler is not self.scheduler:
            raise _refused(
                f"another {type(pipe.scheduler).__name__}", "the plan's scheduler", "detach before you set one"
            )
        if self.scheduler.timesteps is not self._times:  # set anew: a call of the pipeline begins
            self._require_rows()
            self._times, self._runs, self._passed = self.scheduler.timesteps, {}, {}
        run = self._runs.get(self.branch)
        i = position(self._times, call.timestep, self._as_passed(call), run.last + 1 if run else 0)
        if i is None or not 0 <= i < len(self.plan.rows):
            raise _refused("a timestep that the plan has not", "the scheduler's own", "leave timesteps as they are")
        if run is not None and i == run.last and (self.links or self.half is not None):
            got, expected = (
                f"a second call at row {i} (t {self.plan.rows[i].timestep:g})",
                "one, where rows reuse or guide",
            )
            raise _refused(got, expected, "attach a plan of 'full' alone, or leave such guidance out")
        if not getattr(self.scheduler, "is_scale_input_called", True):
            got, expected = "a sample that was not scaled", f"a loop that calls {type(self.scheduler).__name__}'s own"
            raise _refused(f"{got} for its noise level", f"{expected} scale_model_input", "take another sampler")
        if run is None or call.sample.shape != run.shape or i not in (run.last, run.last + 1):
            run = self._runs[self.branch] = self._begin(pipe, call, i)
        run.last = i
        return run, i

    def _begin(self, pipe: Any, call: Call, start: int) -> Run:
        """A new trajectory from row `start` on."""
        rows = dict(enumerate(self.plan.rows))
        rows = {i: row for i, row in rows.items() if i >= start}
        own = parts_of(rows, self.links)
        other = parts_of(guide_rows(rows), self.links)
        if self.half is None:
            return Run(call.sample.shape, False, own, {})
        doubled = _is_doubled(pipe, call.sample)
        if not doubled:
            got, expected = "a call without guidance", "one with, as the plan has guides"
            raise _refused(got, expected, "pass a guidance_scale above 1, or attach a plan without guides")
        return Run(call.sample.shape, True, own, other)

    def _require_rows(self) -> None:
        """Raise PlanError unless the scheduler's timesteps are those of the plan's rows."""
        times, rows, steps = self.scheduler.timesteps.tolist(), self.plan.rows, self.plan.sampler.steps
        asked = self.scheduler.num_inference_steps
        if len(times) != len(rows):
            raise _refused(
                f"num_inference_steps={asked}", f"{steps}, as the plan has", f"pass num_inference_steps={steps}"
            )
        for i, (t, row) in enumerate(zip(times, rows, strict=True)):
            if not math.isclose(t, row.timestep, rel_tol=1e-5, abs_tol=1e-4):
                do = f"pass num_inference_steps={steps} and no timesteps, at the size that the plan is for"
                raise _refused(f"timestep {t:g} in row {i}", f"{row.timestep:g}, as the plan has", do)

    def _as_passed(self, call: Call) -> list[float]:
        """The plan's timesteps as the pipeline passes them: in the call's precision, divided for Flux."""
        dtype = call.timestep.dtype if isinstance(call.timestep, torch.Tensor) else torch.float32
        if dtype not in self._passed:
            assert self._times is not None
            times = self._times.cpu().to(dtype)
            times = times / 1000 if family_name(self.net) in TIMES_1000 else times
            self._passed[dtype] = times.tolist()
        return self._passed[dtype]

    # ---------------------------------------------------------------------------------------------- what it comes to

    def _predict(self, part: Part, row: Row, call: Call, memo: Memo) -> torch.Tensor:
        """What one entry predicts of a call, without the variance beside it."""
        found = self._called(part, row, call, memo)
        return found[:, : self.net.config["in_channels"]] if self.variance else found

    def _called(self, part: Part, row: Row, call: Call, memo: Memo) -> torch.Tensor:
        link = self.links.get(part.entry)
        if link is not None:
            model = self.models[link.of]
            predict: Predict = taking(Forwards.of(model), link.of, link.cut, link.order, row.timestep)
        else:
            model = self.models[part.entry]
            if not part.leaves:
                return model(**call.given, return_dict=False)[0]
            predict = leaving(Forwards.of(model), part.entry, part.leaves, row.timestep)
        return _where_it_runs(model, predict, call, memo)

    def _guided(self, run: Run, i: int, call: Call) -> torch.Tensor:
        """The prediction of both halves of a doubled batch, the same one, by the row's own guide."""
        row, own, other = self.plan.rows[i], run.own[i], run.other.get(i)
        halves = call.halves()
        mine, theirs = halves[self.half or 0], halves[1 - (self.half or 0)]
        if other is None or row.guide is None:
            found = self._predict(own, row, mine, run.memo)
        elif own.entry == other.entry and (both := self._both(run)) is not None:
            part = Part(own.entry, own.leaves | other.leaves)
            pair = self._predict(part, row, call, both).chunk(2)
            memos = parted(both)
            run.memo, run.other_memo = memos[self.half or 0], memos[1 - (self.half or 0)]
            found = guided(pair[self.half or 0], pair[1 - (self.half or 0)], row.guide.weight)
        else:
            own_part = self._predict(own, row, mine, run.memo)
            found = guided(own_part, self._predict(other, row, theirs, run.other_memo), row.guide.weight)
        return torch.cat([found, found])

    def _both(self, run: Run) -> Memo | None:
        """The memo of the doubled batch."""
        return joined(run.memo, run.other_memo) if self.half == 0 else joined(run.other_memo, run.memo)

    def _corrected(self, found: torch.Tensor, call: Call, i: int) -> torch.Tensor:
        """The prediction with its row's correction."""
        kind, times = prediction_type(self.scheduler), self.scheduler.timesteps
        sample = call.sample[:, : found.shape[1]]  # inpainting nets take a mask and a picture beside it
        levels = times if kind == "epsilon" else levels_of(self.scheduler)  # which no noise asks for
        return corrected_as(kind, found, sample, levels[i], *self.plan.rows[i].correction)


def _is_doubled(pipe: Any, sample: torch.Tensor) -> bool:
    """Whether the pipeline guides in this call: its batch is the same samples twice, and it does not say otherwise."""
    said = getattr(pipe, "do_classifier_free_guidance", None)
    if said is False or len(sample) % 2:
        return False
    first, second = sample.chunk(2)
    return torch.equal(first, second)


def _where_it_runs(model: Any, predict: Predict, call: Call, memo: Memo) -> torch.Tensor:
    """Run a part of a model as its own call would be run: where accelerate's hook puts it."""
    hook = getattr(eager(model), "_hf_hook", None)
    if hook is None:
        return predict(call.sample, call.timestep, call.cond, memo)
    (sample, timestep), cond = hook.pre_forward(model, call.sample, call.timestep, **call.cond)
    return hook.post_forward(model, predict(sample, timestep, cond, memo))


def _refused(got: str, expected: str, do: str) -> PlanError:
    return PlanError(got=got, expected=expected, where="the pipeline's call", do=do)


# --------------------------------------------------------------------------------------------------------- the wrapper


class Attached(nn.Module):
    """Stands in a pipeline in the place of its denoiser, `inner`: the same parts and parameters, the same attributes
    and methods, the same class to `isinstance`; only its call asks the plan what to run. `before`: the scheduler that
    the pipeline had."""

    def __init__(self, inner: Any, director: _Director, pipe: Any):
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
