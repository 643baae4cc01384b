"""What each call of a pipeline's denoiser runs under a plan: its row by its timestep, and whose memo it has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from halfstep.core.errors import PlanError
from halfstep.core.plan import StepPlan
from halfstep.engine.calls import Call, Run, guide_rows, joined, parted, parts_of, position
from halfstep.engine.entry import Reuse
from halfstep.engine.networks import Part
from halfstep.engine.pipelines import TIMES_1000, family_name
from halfstep.engine.samplers import prediction_type
from halfstep.engine.sampling import guided, levels_of
from halfstep.nets.denoiser import Memo, Predict, corrected_as, eager
from halfstep.nets.reuse import Forwards


def has_variance(net: Any) -> bool:
    """Whether the network puts out a learned variance beside its prediction."""
    return net.config.get("out_channels") == 2 * net.config["in_channels"]


class Director:
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
        self.variance = has_variance(self.net)
        self.branch = ""
        self._times: torch.Tensor | None = None
        self._passed: dict[torch.dtype, list[float]] = {}
        self._runs: dict[str, Run] = {}

    def __call__(self, pipe: Any, call: Call) -> torch.Tensor | None:
        """The prediction of a call; None where the network's own call, as it came, is all there is to it."""
        run, i = self._place(pipe, call)
        row, part = self.plan.rows[i], run.own[i]
        simple = self.half is None and not row.corrected and not part.leaves and part.link is None
        if simple and part.entry == self.plan.reference:
            return None
        found = self._predict(part, call, run.memo) if self.half is None else self._guided(run, i, call)
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
        own = parts_of(rows, self._forwards, self.links)
        other = parts_of(guide_rows(rows), self._forwards, self.links)
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

    def _forwards(self, name: str) -> Forwards:
        return Forwards.of(self.models[name])

    def _predict(self, part: Part, call: Call, memo: Memo) -> torch.Tensor:
        """What one entry predicts of a call, without the variance beside it."""
        model = self.models[part.runs]
        if part.link is None and not part.leaves:
            found = model(**call.given, return_dict=False)[0]
        else:
            found = _where_it_runs(model, part.predict(), call, memo)
        return found[:, : self.net.config["in_channels"]] if self.variance else found

    def _guided(self, run: Run, i: int, call: Call) -> torch.Tensor:
        """The prediction of both halves of a doubled batch, the same one, by the row's own guide."""
        row, own, other = self.plan.rows[i], run.own[i], run.other.get(i)
        halves = call.halves()
        mine, theirs = halves[self.half or 0], halves[1 - (self.half or 0)]
        if other is None or row.guide is None:
            found = self._predict(own, mine, run.memo)
        elif own.entry == other.entry and (both := self._both(run)) is not None:
            part = replace(own, leaves=own.leaves | other.leaves)
            pair = self._predict(part, call, both).chunk(2)
            memos = parted(both)
            run.memo, run.other_memo = memos[self.half or 0], memos[1 - (self.half or 0)]
            found = guided(pair[self.half or 0], pair[1 - (self.half or 0)], row.guide.weight)
        else:
            own_part = self._predict(own, mine, run.memo)
            found = guided(own_part, self._predict(other, theirs, run.other_memo), row.guide.weight)
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
