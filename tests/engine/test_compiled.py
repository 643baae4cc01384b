"""A sampler as numbers. Oracle: the sampling loop over diffusers' own scheduler, with a network that is not linear."""

from __future__ import annotations

import inspect
from dataclasses import replace

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.core.errors import PlanError
from halfstep.core.plan import NONE, Correction, Price, Row, Sampler, StepPlan
from halfstep.core.process import BETA_SCHEDULERS, FLOW_SCHEDULERS, Process
from halfstep.engine.compiled import TOLERANCE, compiled, replay
from halfstep.engine.networks import alone
from halfstep.engine.samplers import REFUSED, families, noise_scale, plain_config, sampler_of, with_timesteps
from halfstep.engine.sampling import build_scheduler, walk

BETAS = {"beta_start": 1e-4, "beta_end": 0.02}
SHAPE = (1, 2, 4, 4)
NAMES = sorted({*BETA_SCHEDULERS, *FLOW_SCHEDULERS} - {*REFUSED})


def plan_by(scheduler, steps):
    times = with_timesteps(scheduler, steps).timesteps
    sampler = Sampler(type(scheduler).__name__, plain_config(scheduler), steps)
    return StepPlan(rows=tuple(Row(float(t), "full") for t in times), sampler=sampler, reference="full",
                    prices={"full": Price(1)})  # fmt: skip


def net(sample, timestep):
    """Not linear, of the size of noise, different at every timestep."""
    return torch.tanh(sample.roll(1, -1) + timestep.float() / 1000) + 0.3 * sample / (1 + sample.abs().max())


def require_replayed(plan):
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler = build_scheduler(plan)
    times = scheduler.timesteps
    calls = [alone(lambda sample, t, cond, memo: net(sample, t))] * len(plan.rows)
    own, ours = (torch.Generator().manual_seed(1) for _ in range(2))
    steps = list(walk(calls, plan.rows, scheduler, start * noise_scale(scheduler), [own]))
    found = replay(
        compiled(plan),
        start,
        lambda i, x: net(x, times[i]),
        lambda: torch.randn(SHAPE, generator=ours, dtype=torch.float64),
    )
    for step, sample in zip(steps, found, strict=True):
        assert (sample - step.after).abs().max() <= TOLERANCE * step.after.abs().max().clamp(min=1)
    assert torch.equal(own.get_state(), ours.get_state())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 3, 11])
def test_every_scheduler_that_a_plan_may_name(name, prediction, steps):
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    config = {k: v for k, v in {**BETAS, "prediction_type": prediction, "clip_sample": False}.items() if k in known}
    try:
        plan = plan_by(kind(**config), steps)
        build_scheduler(plan)
        compiled(plan)
    except PlanError as error:
        assert any(word in str(error) for word in ("refuses", "leaves the numbers")), error  # so do pipelines
        return
    require_replayed(plan)


@given(
    st.sampled_from(families(Process())),
    st.integers(2, 30),
    st.sampled_from(["epsilon", "v_prediction", "sample"]),
    st.booleans(),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_plan_of_the_stock_samplers_with_corrections(family, steps, prediction, clips, data):
    process = replace(Process(), prediction=prediction, clip_sample=clips)
    try:
        plan = plan_by(sampler_of(process, family), steps)
        compiled(plan)
    except PlanError:
        return
    one = st.builds(Correction, st.floats(0.7, 1.3), st.floats(0, 0.2)) | st.just(NONE)
    require_replayed(plan.with_corrections([data.draw(one) for _ in plan.rows]))


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_flow_matching_with_corrections(name, steps):
    config = {"shift": 3.0}
    if FLOW_SCHEDULERS[name] == "flow_shift":
        config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    plan = plan_by(getattr(diffusers, name)(**config), steps)
    require_replayed(plan.with_corrections([Correction(1.1, 0.05)] * len(plan.rows)))


def test_noise_of_stochastic_samplers_and_clipped_estimates_are_terms():
    ddpm = compiled(plan_by(diffusers.DDPMScheduler(clip_sample=True), 5))
    assert [step.draws for step in ddpm.steps] == [1, 1, 1, 1, 0] and ddpm.limit == 1
    ddim = compiled(plan_by(diffusers.DDIMScheduler(clip_sample=False), 5))
    assert all(step.estimate is None and step.draws == 0 for step in ddim.steps)
    t, s = diffusers.DDIMScheduler().alphas_cumprod[[800, 600]].double()
    by_hand = (s / t).sqrt(), (1 - s).sqrt() - (s * (1 - t) / t).sqrt()  # DDIM's own formula, eta 0
    [(row, sample)], [(_, prediction)] = ddim.steps[0].samples, ddim.steps[0].predictions
    assert row == 0 and [sample, prediction] == pytest.approx([float(x) for x in by_hand], rel=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        (diffusers.DDIMScheduler(thresholding=True), "dynamic thresholding"),
        (diffusers.DPMSolverMultistepScheduler(thresholding=True), "dynamic thresholding"),
        (diffusers.TCDScheduler(clip_sample=True), "clipped estimates"),
    ],
)
def test_what_is_no_sum_is_refused(scheduler, told):
    with pytest.raises(PlanError, match=f"{told}.*{type(scheduler).__name__}"):
        compiled(plan_by(scheduler, 4))
