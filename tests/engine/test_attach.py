"""A plan under stock pipelines: with nothing to save it is stock diffusers bit for bit, and what it saves is exact."""

from __future__ import annotations

import contextlib
import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from PIL import Image

import pipelines
from halfstep import Guide, Price, attach, attached, detach, plan_for
from halfstep.engine.attach import Attached
from halfstep.engine.pipelines import denoiser_of
from halfstep.nets.architectures import ARCHITECTURES
from halfstep.nets.denoiser import eager
from halfstep.nets.reuse import shallow, tapped

STEPS = 5
PICTURE = Image.fromarray((np.arange(32 * 32 * 3).reshape(32, 32, 3) % 255).astype("uint8"))
MASK = Image.fromarray(((np.arange(32 * 32).reshape(32, 32) % 32 > 15) * 255).astype("uint8"))
TEXT = {"prompt": ["a red shoe", "a bag"], "height": 32, "width": 32}
CALLS = {
    "stable_diffusion": TEXT,
    "img2img": {"prompt": ["a red shoe", "a bag"], "image": [PICTURE, PICTURE], "strength": 0.6},
    "inpaint": {**TEXT, "image": PICTURE, "mask_image": MASK, "strength": 1.0},
    "controlnet": {**TEXT, "image": [PICTURE, PICTURE]},
    "sdxl": {**TEXT, "negative_prompt": ["blue", "green"]},
    "dit": {"class_labels": [3, 7]},
    "pixart": {**TEXT, "height": 16, "width": 16, "use_resolution_binning": False, "clean_caption": False},
    "sd3": TEXT,
    "flux": {**TEXT, "negative_prompt": ["blue", "green"], "true_cfg_scale": 3.0},
    "ddpm": {"batch_size": 2},
    "ldm": {**TEXT, "guidance_scale": 3.0},
}
FIRST = {"img2img": 2}
"""The row at which a call begins: strength 0.6 of 5 steps leaves out two."""
GUIDED = [name for name in CALLS if name not in ("flux", "ddpm")]


def draw(pipe, name, **changes):
    """What a pipeline draws, [B, H, W, C]."""
    options = {"num_inference_steps": STEPS, "output_type": "np", "generator": torch.Generator().manual_seed(1)}
    with torch.no_grad():
        return np.asarray(pipe(**(CALLS[name] | options | changes)).images)


def made(name):
    return getattr(pipelines, name)()


def size_of(name):
    return {key: CALLS[name][key] for key in ("height", "width") if key in CALLS[name]}


def plan_of(pipe, name="", steps=STEPS, phrase=("full",), **options):
    prices = {one: Price(1) for one in {"full", *phrase}}
    return plan_for(pipe, steps, phrases=[phrase], prices=prices, **options, **(size_of(name) if name else {}))


def can_be_cut(name):
    row = ARCHITECTURES.get(type(eager(denoiser_of(made(name))[1])).__name__)
    return row is not None and row.cuts is not None


# ------------------------------------------------------------------------------------------------------ nothing to save


@pytest.mark.parametrize("name", CALLS)
def test_full_rows_are_stock_bit_for_bit_and_detaching_restores_the_same_objects(name):
    pipe = made(name)
    stock, before = draw(pipe, name), (dict(pipe.components), dict(pipe.config))
    attach(pipe, plan_of(pipe, name))
    assert type(denoiser_of(pipe)[1]) is Attached
    np.testing.assert_array_equal(draw(pipe, name), stock)
    np.testing.assert_array_equal(draw(pipe, name), stock)  # a second call begins anew
    detach(pipe)
    assert (dict(pipe.components), dict(pipe.config)) == before
    np.testing.assert_array_equal(draw(pipe, name), stock)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_a_plans_sampler_takes_the_place_of_the_pipelines(scheduler):
    pipe, other = pipelines.stable_diffusion(), pipelines.stable_diffusion()
    other.scheduler = scheduler.from_config(other.scheduler.config)
    plan = plan_of(pipe, sampler=other.scheduler)
    with attached(pipe, plan):
        assert type(pipe.scheduler) is scheduler
        np.testing.assert_array_equal(draw(pipe, "stable_diffusion"), draw(other, "stable_diffusion"))


# ---------------------------------------------------------------------------------------------------------------- reuse


@contextlib.contextmanager
def called_as(pipe, forward):
    """The pipeline with another call of its denoiser: forward(plain, arguments by name) -> prediction."""
    _, net = denoiser_of(pipe)
    plain, signature = net.forward, inspect.signature(type(net).forward)

    def call(*args, **kwargs):
        given = signature.bind(None, *args, **kwargs).arguments
        named = given.pop("return_dict", True)
        given = {key: value for key, value in given.items() if value is not None and key != "self"}
        found = forward(lambda said: plain(**said, return_dict=False)[0], given)
        return pipelines.Output(sample=found) if named else (found,)

    net.forward = call
    try:
        yield
    finally:
        net.forward = plain


def two_stage(pipe, name, cut, first=0, **changes):
    """Stock pictures where every other call of the network, or of either branch where guidance makes two, runs from a
    cut on: an evaluation without plan, memo or wrapper."""
    net, kept, times = denoiser_of(pipe)[1], {}, []

    def forward(plain, given):
        now = float(given["timestep"].flatten()[0])
        branch = "second" if times and times[-1] == now else "first"
        times.append(now)
        turn = first + len(set(times)) - 1
        sample = next(iter(given.values()))
        cond = {key: value for key, value in list(given.items())[1:] if key != "timestep"}
        if turn % 2 and branch in kept:
            return kept[branch] if cut == "out" else shallow(net, sample, given["timestep"], cond, cut, kept[branch])
        if cut == "out":
            kept[branch] = plain(given)
            return kept[branch]
        found, left = tapped(net, sample, given["timestep"], cond, [cut])
        kept[branch] = left[cut]
        return found

    with called_as(pipe, forward):
        return draw(pipe, name, **changes)


@pytest.mark.parametrize("cut", [0, "out"])
@pytest.mark.parametrize("name", [name for name in CALLS if can_be_cut(name)])
def test_reuse_equals_an_explicit_evaluation_in_two_stages(name, cut):
    pipe = made(name)
    wanted = two_stage(pipe, name, cut, first=FIRST.get(name, 0))
    with attached(pipe, plan_of(pipe, name, phrase=["full", f"full~{cut}"])):
        np.testing.assert_array_equal(draw(pipe, name), wanted)
    assert np.abs(draw(pipe, name) - wanted).max() > 1e-4  # it did something


# ------------------------------------------------------------------------------------------------------------- guidance


def guided_as(pipe, name, how, **changes):
    """Stock pictures where the halves of a doubled batch are what `how(turn, call of the conditional half, call of the
    unconditional half)` gives, in the order conditional, unconditional."""
    own, turns = pipelines.CONDITIONAL_FIRST.get(name, 1), iter(range(10_000))

    def forward(plain, given):
        batch = len(next(iter(given.values())))
        halves = [{key: pipelines.half_of(value, batch, half) for key, value in given.items()} for half in (0, 1)]
        pair = how(next(turns), plain, halves[own], halves[1 - own], given)
        return torch.cat(pair if own == 0 else pair[::-1])

    with called_as(pipe, forward):
        return draw(pipe, name, **changes)


@pytest.mark.parametrize("name", GUIDED)
def test_a_skipped_guide_is_stock_without_guidance_on_those_steps(name):
    pipe, first = made(name), FIRST.get(name, 0)

    def how(turn, plain, own, other, both):
        if turn in (1, 2):
            return [plain(own)] * 2
        halves = plain(both).chunk(2)
        return list(halves if pipelines.CONDITIONAL_FIRST.get(name, 1) == 0 else halves[::-1])

    wanted = guided_as(pipe, name, how, guidance_scale=3.0)
    plan = plan_of(pipe, name)
    guides = [Guide("full", 3.0)] * len(plan.rows)
    guides[first + 1], guides[first + 2] = None, Guide("full", 1.0)
    with attached(pipe, plan.with_guides(guides)):
        np.testing.assert_array_equal(draw(pipe, name, guidance_scale=3.0), wanted)
        np.testing.assert_array_equal(draw(pipe, name, guidance_scale=7.5), wanted)  # the plan's weights count
    assert np.abs(draw(pipe, name, guidance_scale=3.0) - wanted).max() > 1e-4


def test_skipping_every_guide_is_the_pipeline_called_without_guidance():
    pipe, name = pipelines.stable_diffusion(), "stable_diffusion"
    wanted = draw(pipe, name, guidance_scale=1.0)
    plan = plan_of(pipe, name)
    with attached(pipe, plan.with_guides([Guide("full", 1.0)] * len(plan.rows))):
        np.testing.assert_array_equal(draw(pipe, name, guidance_scale=7.5), wanted)


def test_guidance_off_from_a_callback_on_is_what_a_plan_skips():
    """Diffusers' own recipe for guidance on an interval: a callback that ends it and halves the prompts."""
    pipe, name = pipelines.img2img(), "img2img"

    def end(pipe, i, t, tensors):
        if i == 0:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    callback = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    wanted = draw(pipe, name, guidance_scale=5.0, **callback)
    plan = plan_of(pipe, name)
    with attached(pipe, plan.with_guides([Guide("full", 5.0)] * 3 + [None] * 2)):
        np.testing.assert_array_equal(draw(pipe, name, guidance_scale=5.0), wanted)
    with attached(pipe, plan):  # callbacks stay what they are
        np.testing.assert_array_equal(draw(pipe, name, guidance_scale=5.0, **callback), wanted)
