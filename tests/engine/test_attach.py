"""A plan under stock pipelines: with nothing to save it is stock diffusers bit for bit, and what it saves is exact."""

from __future__ import annotations

import contextlib
import copy
import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ModelMixin,
    PNDMScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from PIL import Image

import pipelines
from banks import slim_bank
from halfstep import Bank, Correction, Entry, Guide, Price, StepPlan, attach, attached, detach, plan_for
from halfstep.core.errors import HalfstepError, ModelError, PlanError
from halfstep.engine.attach import Attached
from halfstep.engine.entry import Cut, Twin
from halfstep.engine.pipelines import denoiser_of
from halfstep.engine.profiling import count_macs, example_inputs, reused_macs
from halfstep.engine.sampling import plan_for as sampler_plan
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.methods.slimmable import Supernet
from halfstep.nets.architectures import ARCHITECTURES
from halfstep.nets.denoiser import copy_of, corrected, corrected_as, eager
from halfstep.nets.masks import Masking, Pattern, mask_all
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
SLIM = ["ddpm", "stable_diffusion", "img2img", "inpaint", "sdxl", "ldm"]
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
    prices = {one: Price(1) for one in {"full", *(name for call in phrase for name in call.split("|"))} - {""}}
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


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_a_flow_has_samplers_of_other_classes_than_its_own(scheduler):
    pipe, other = pipelines.sd3(), pipelines.sd3()
    other.scheduler = scheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    with attached(pipe, plan_of(pipe, sampler=other.scheduler)):
        np.testing.assert_array_equal(draw(pipe, "sd3"), draw(other, "sd3"))
    refused(pipe, plan_of(pipelines.stable_diffusion()), match="PNDMScheduler of another process")
    with pytest.raises(PlanError, match="another process"):
        plan_of(pipe, sampler=scheduler())


@pytest.mark.parametrize(
    "phrase, row", [(["full", "full~0+"], 1), (["full~0"], 0), (["full|", "full", "full|full~0+"], 2)]
)
def test_rows_that_reuse_what_was_never_computed_are_refused_when_the_plan_is_made(phrase, row):
    pipe = pipelines.stable_diffusion()
    with pytest.raises(PlanError, match=f"in row {row}, with .* before it") as error:
        plan_for(
            pipe, STEPS, phrases=[phrase], guidance=3.0, prices=dict.fromkeys(["full", "full~0", "full~0+"], Price(1))
        )
    assert "\n" not in str(error.value)


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
        if net.config.get("out_channels") == 2 * found.shape[1]:  # a variance, which these pipelines leave out
            found = torch.cat([found, torch.zeros_like(found)], dim=1)
        return pipelines.Output(sample=found) if named else (found,)

    net.forward = call
    try:
        yield
    finally:
        net.forward = plain


def two_stage(pipe, name, cut, first=0, **changes):
    """Stock pictures where every other call of the network, or of either branch where guidance makes two, runs from a
    cut on: an evaluation without plan, memo or wrapper."""
    net, kept, calls = denoiser_of(pipe)[1], {}, iter(range(10_000))
    branches = 2 if name == "flux" else 1

    def forward(plain, given):
        call = next(calls)
        turn, branch = first + call // branches, call % branches
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
    plan = plan_of(pipe, name, phrase=["full"])
    unguided = plan.with_guidance(7.5).with_entries(["full|"] * len(plan.rows))
    for skipping in (plan.with_guides([Guide("full", 1.0)] * len(plan.rows)), unguided):
        with attached(pipe, skipping):
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


@pytest.mark.parametrize("cut", [0, "out"])
def test_a_cheaper_unconditional_branch_runs_its_half_alone(cut):
    """Rows: both halves whole; then the conditional half whole and the other one from its own features."""
    pipe, name, left = pipelines.stable_diffusion(), "stable_diffusion", {}
    net = pipe.unet

    def split(given):
        given = dict(given)
        return given.pop("sample"), given.pop("timestep"), given

    def how(turn, plain, own, other, both):
        if turn % 2:
            sample, timestep, cond = split(other)
            found = left["out"] if cut == "out" else shallow(net, sample, timestep, cond, cut, left["cut"])
            return [plain(own), found]
        if cut == "out":
            left["out"], mine = plain(both).chunk(2)
            return [mine, left["out"]]
        sample, timestep, cond = split(both)
        found, kept = tapped(net, sample, timestep, cond, [cut])
        left["cut"] = kept[cut].chunk(2)[0]
        return list(found.chunk(2))[::-1]

    if cut == 0 and not can_be_cut(name):
        pytest.skip("no cuts")
    with torch.no_grad():
        wanted = guided_as(pipe, name, how, guidance_scale=4.0)
    plan = plan_of(pipe, name)
    cheap = f"full~{cut}"
    plan = replace(plan, prices={**plan.prices, cheap: Price(1)})
    guides = [Guide("full", 4.0), Guide(cheap, 4.0)] * 3
    with attached(pipe, plan.with_guides(guides[: len(plan.rows)])):
        np.testing.assert_array_equal(draw(pipe, name, guidance_scale=2.0), wanted)


def test_both_halves_reuse_their_own_features_in_one_call():
    pipe, name = pipelines.stable_diffusion(), "stable_diffusion"
    plan = plan_of(pipe, name, phrase=["full", "full~out", "full~out"])
    with attached(pipe, plan):
        wanted = draw(pipe, name, guidance_scale=4.0)
    guides = [Guide(row.entry, 4.0) for row in plan.rows]
    with attached(pipe, plan.with_guides(guides)):
        np.testing.assert_array_equal(draw(pipe, name, guidance_scale=4.0), wanted)


def test_a_correction_is_of_what_the_network_predicts():
    pipe, name = pipelines.ddpm(), "ddpm"

    def forward(plain, given):
        found = plain(given)
        return corrected(found, 0.9, 0.05) if float(given["timestep"]) == times[1] else found

    plan = plan_of(pipe, name)
    times = [row.timestep for row in plan.rows]
    with called_as(pipe, forward):
        wanted = draw(pipe, name)
    with attached(pipe, plan.with_corrections([Correction(), Correction(0.9, 0.05), *[Correction()] * 3])):
        np.testing.assert_array_equal(draw(pipe, name), wanted)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_correction_under_flow_matching_is_of_the_noise_in_the_velocity(name):
    """Oracle: the corrected velocity put in by hand, at the noise level that the timestep says."""
    pipe = made(name)
    over = 1 if name == "flux" else 1000

    def forward(plain, given):
        found, s = plain(given), given["timestep"].reshape(-1)[0] / over
        return corrected_as("flow_prediction", found, given["hidden_states"], 1 - s, 0.9, 0.05)

    plan = plan_of(pipe, name)
    with called_as(pipe, forward):
        wanted = draw(pipe, name)
    with attached(pipe, plan.with_corrections([Correction(0.9, 0.05)] * len(plan.rows))):
        np.testing.assert_allclose(draw(pipe, name), wanted, atol=1e-5)


# ------------------------------------------------------------------------------------------- what pipelines bring along


def with_lora(pipe, folder):
    """The pipeline with a LoRA of its denoiser, loaded from a file as users do."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = copy.deepcopy(pipe.unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    pipe.save_lora_weights(folder, unet_lora_layers=weights)
    pipe.load_lora_weights(folder, adapter_name="shoes")
    return pipe


@pytest.mark.slow
def test_a_lora_stays_with_its_scale_and_its_verbs(tmp_path):
    name, scale = "stable_diffusion", {"cross_attention_kwargs": {"scale": 0.5}}
    without = draw(pipelines.stable_diffusion(), name)
    torch.manual_seed(3)
    stock = with_lora(pipelines.stable_diffusion(), tmp_path)
    torch.manual_seed(3)
    pipe = with_lora(pipelines.stable_diffusion(), tmp_path)
    whole, half = draw(stock, name), draw(stock, name, **scale)
    assert np.abs(whole - without).max() > 1e-4 and np.abs(half - whole).max() > 1e-4
    with attached(pipe, plan_of(pipe, name)):
        np.testing.assert_array_equal(draw(pipe, name), whole)
        np.testing.assert_array_equal(draw(pipe, name, **scale), half)
        pipe.fuse_lora(lora_scale=0.5)
        stock.fuse_lora(lora_scale=0.5)
        np.testing.assert_array_equal(draw(pipe, name), draw(stock, name))
        pipe.unfuse_lora()
        pipe.disable_lora()
        np.testing.assert_allclose(draw(pipe, name), without, atol=1e-5)
    pipe.unload_lora_weights()
    np.testing.assert_allclose(draw(pipe, name), without, atol=1e-5)


def test_a_lora_counts_in_reuse_too(tmp_path):
    if not can_be_cut("stable_diffusion"):
        pytest.skip("no cuts")
    name, scale = "stable_diffusion", {"cross_attention_kwargs": {"scale": 0.5}}
    pipe = with_lora(pipelines.stable_diffusion(), tmp_path)
    wanted = two_stage(pipe, name, 0, **scale)
    with attached(pipe, plan_of(pipe, name, phrase=["full", "full~0"])):
        np.testing.assert_array_equal(draw(pipe, name, **scale), wanted)
        assert np.abs(draw(pipe, name) - wanted).max() > 1e-5


def test_a_lora_can_be_loaded_while_a_plan_is_attached(tmp_path):
    name = "stable_diffusion"
    torch.manual_seed(3)
    wanted = draw(with_lora(pipelines.stable_diffusion(), tmp_path), name)
    pipe = pipelines.stable_diffusion()
    with attached(pipe, plan_of(pipe, name)):
        pipe.load_lora_weights(tmp_path, adapter_name="shoes")
        np.testing.assert_array_equal(draw(pipe, name), wanted)
    np.testing.assert_array_equal(draw(pipe, name), wanted)


def test_an_ip_adapter_stays_and_its_images_are_halved_with_the_batch():
    pipe, name = pipelines.stable_diffusion(), "stable_diffusion"
    without = draw(pipe, name, guidance_scale=4.0)
    pipe.unet._load_ip_adapter_weights([pipelines.ip_adapter(pipe.unet)])
    images = {"ip_adapter_image_embeds": [torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(2))]}
    wanted, plan = draw(pipe, name, guidance_scale=4.0, **images), plan_of(pipe, name)
    assert np.abs(wanted - without).max() > 1e-4
    with attached(pipe, plan):
        np.testing.assert_array_equal(draw(pipe, name, guidance_scale=4.0, **images), wanted)
        pipe.set_ip_adapter_scale(0.0)
        assert np.abs(draw(pipe, name, guidance_scale=4.0, **images) - wanted).max() > 1e-4
        pipe.set_ip_adapter_scale(1.0)
    with attached(pipe, plan.with_guides([Guide("full", 1.0)] * len(plan.rows))):
        found = draw(pipe, name, guidance_scale=4.0, **images)
    halves = {"ip_adapter_image_embeds": [images["ip_adapter_image_embeds"][0][1:]]}
    np.testing.assert_array_equal(found, draw(pipe, name, guidance_scale=1.0, **halves))


def test_offloading_moves_to_what_stands_in_the_pipeline():
    pipe, name = pipelines.stable_diffusion(), "stable_diffusion"
    wanted, net = draw(pipe, name), pipe.unet
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(net, "_hf_hook")
    attach(pipe, plan_of(pipe, name))
    assert hasattr(pipe.unet, "_hf_hook") and not hasattr(net, "_hf_hook")
    for _ in range(2):  # after each call pipelines hook their parts anew
        np.testing.assert_array_equal(draw(pipe, name), wanted)
    detach(pipe)
    assert pipe.unet is net and hasattr(net, "_hf_hook")
    np.testing.assert_array_equal(draw(pipe, name), wanted)


def test_what_pipelines_ask_of_their_denoiser_is_its_own(tmp_path):
    pipe = pipelines.stable_diffusion()
    net = pipe.unet
    attach(pipe, plan_of(pipe))
    assert isinstance(pipe.unet, UNet2DConditionModel) and isinstance(pipe.unet, ModelMixin)
    assert pipe.unet.config is net.config and pipe.unet.dtype == net.dtype and pipe.unet.device == net.device
    assert list(pipe.unet.state_dict()) == list(net.state_dict())
    assert [id(p) for p in pipe.unet.parameters()] == [id(p) for p in net.parameters()]
    assert dict(pipe.config)["unet"] == ("diffusers", "UNet2DConditionModel")
    pipe.save_pretrained(tmp_path / "pipe")
    again = type(pipe).from_pretrained(tmp_path / "pipe", local_files_only=True)
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), net.parameters(), strict=True))
    pipe.to(torch.bfloat16)
    assert net.dtype == torch.bfloat16
    assert draw(pipe, "stable_diffusion").dtype == np.float32


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_half_precision_finds_its_rows(name):
    pipe = made(name).to(torch.bfloat16)
    wanted, plan = draw(pipe, name), plan_of(pipe, name)
    with attached(pipe, plan):
        np.testing.assert_array_equal(draw(pipe, name), wanted)


def test_a_float16_pipeline_stays_one_on_the_cpu_too():
    name = "stable_diffusion"
    pipe = made(name).to(torch.float16)
    stock, wanted = draw(pipe, name), two_stage(pipe, name, 0)
    with attached(pipe, plan_of(pipe, name)):
        np.testing.assert_array_equal(draw(pipe, name), stock)
    reused = plan_for(pipe, STEPS, phrases=[["full", "full~0"]])  # priced here, in its own precision
    assert reused.prices == plan_for(made(name), STEPS, phrases=[["full", "full~0"]]).prices
    with attached(pipe, reused):
        np.testing.assert_array_equal(draw(pipe, name), wanted)
        assert pipe.unet.dtype == torch.float16 and np.isfinite(wanted).all()


def test_hooks_of_accelerate_run_before_a_part_of_a_network_does():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    pipe, name = pipelines.ddpm(), "ddpm"
    hook, plan = Counting(), plan_of(pipe, name, phrase=["full", "full~0"])
    add_hook_to_module(pipe.unet, hook)
    wanted = two_stage(pipe, name, 0)
    hook.calls = 0
    with attached(pipe, plan):
        np.testing.assert_array_equal(draw(pipe, name), wanted)
        assert hook.calls == STEPS
        add_hook_to_module(pipe.unet, outer := Counting())  # as enable_model_cpu_offload does
        np.testing.assert_array_equal(draw(pipe, name), wanted)
        assert outer.calls == STEPS
        remove_hook_from_module(pipe.unet)


# --------------------------------------------------------------------------------------------------------- trajectories


def calls_of(pipe, steps=STEPS, seed=0, start=0):
    """A hand-written loop: the prediction of every step, on the pipeline's own scheduler."""
    pipe.scheduler.set_timesteps(steps)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    for t in pipe.scheduler.timesteps[start:]:
        with torch.no_grad():
            found = pipe.unet(noise, t, return_dict=False)[0]
        yield found


def test_interleaved_pipelines_and_images_of_a_batch_do_not_mix():
    pipe, other = pipelines.ddpm(), pipelines.ddpm()
    other.unet = pipe.unet  # one network under two pipelines
    plan = plan_of(pipe, phrase=["full", "full~0", "full~out"])
    attach(pipe, plan), attach(other, plan)
    alone = [list(calls_of(pipe, seed=0)), list(calls_of(other, seed=1))]
    turns = list(zip(calls_of(pipe, seed=0), calls_of(other, seed=1), strict=True))
    for (first, second), *each in zip(turns, *alone, strict=True):
        assert torch.equal(first, each[0]) and torch.equal(second, each[1])


def test_a_call_that_begins_anew_knows_nothing_of_the_one_before():
    pipe = pipelines.ddpm()
    attach(pipe, plan_of(pipe, phrase=["full", "full~0", "full~0"]))
    wanted = list(calls_of(pipe, seed=0))
    aborted = calls_of(pipe, seed=1)
    next(aborted), next(aborted)  # and never to its end
    assert all(torch.equal(a, b) for a, b in zip(calls_of(pipe, seed=0), wanted, strict=True))
    late = list(calls_of(pipe, seed=0, start=2))  # row 2 would reuse what row 0 left: it computes
    assert torch.equal(late[0], next(iter_plain(2)))
    assert pipe.unet.director._runs == {}  # nothing is held when a call is over


def iter_plain(start):
    """What the network itself predicts in `calls_of`."""
    plain = pipelines.ddpm()
    plain.scheduler.set_timesteps(STEPS)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in plain.scheduler.timesteps[start:]:
        with torch.no_grad():
            found = plain.unet(noise, t, return_dict=False)[0]
        yield found


def test_a_batch_of_another_size_begins_anew():
    pipe = pipelines.ddpm()
    attach(pipe, plan_of(pipe, phrase=["full", "full~out", "full~out"]))
    pipe.scheduler.set_timesteps(STEPS)
    noise = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        pipe.unet(noise, pipe.scheduler.timesteps[0])
        one = pipe.unet(noise[:1], pipe.scheduler.timesteps[1]).sample
        assert torch.equal(one, pipelines.ddpm().unet(noise[:1], pipe.scheduler.timesteps[1]).sample)


# ------------------------------------------------------------------------------------------------------------ from disk


def bank_of(net, folder):
    """A bank over a pipeline's denoiser: half its width, and a mask of its weights, read from disk."""
    supernet = Supernet(copy_of(net), (1.0, 0.5))
    names = tuple(name for name in net.state_dict() if name.endswith(("conv2.weight", "to_q.weight")))
    masked = copy_of(net)
    masked.load_state_dict(mask_all(net.state_dict(), names, Pattern(2, 4)))
    bank = Bank(
        {
            "full": copy_of(net), "w0.50": Entry(supernet.subnet(0.5), Cut("full", supernet.slices[0.5])),
            "2:4": Entry(masked, Twin("full"), Masking(Pattern(2, 4), names)),
        }, "full", "epsilon",
    )  # fmt: skip
    bank.save_pretrained(folder)
    return Bank.from_pretrained(folder)


@pytest.mark.parametrize("name", [one if one == "ddpm" else pytest.param(one, marks=pytest.mark.slow) for one in SLIM])
def test_widths_and_masks_of_a_bank_are_its_entries_called_by_hand(name, tmp_path):
    pipe, entries = made(name), ["full", "w0.50", "2:4", "w0.50", "full"]
    bank = bank_of(denoiser_of(pipe)[1], tmp_path / "bank")
    plan = plan_of(pipe, name)
    plan = replace(plan, prices={one: Price(1) for one in bank}).with_entries([*entries, "full"][: len(plan.rows)])
    turns = iter(plan.entries[FIRST.get(name, 0) :])
    with called_as(pipe, lambda plain, given: bank[next(turns)](**given, return_dict=False)[0]):
        wanted = draw(pipe, name)
    assert np.abs(draw(pipe, name) - wanted).max() > 1e-4
    plan.save(tmp_path / "plan.json")
    for given in ((plan, bank), (tmp_path,), (tmp_path / "plan.json",)):
        with attached(pipe, *given):
            np.testing.assert_array_equal(draw(pipe, name), wanted)
    with torch.no_grad():
        next(denoiser_of(pipe)[1].parameters()).add_(1)
    refused(pipe, tmp_path, match="other weights", error=ModelError)
    refused(pipe, plan, match="weights of their own: w0.50, 2:4")


def test_a_controlnet_adds_to_the_whole_width_alone(tmp_path):
    pipe, name = made("controlnet"), "controlnet"
    bank, plan = bank_of(pipe.unet, tmp_path / "bank"), plan_of(pipe)
    plan = replace(plan, prices={one: Price(1) for one in bank})
    refused(pipe, plan.with_entries(["w0.50"] * len(plan.rows)), bank, match=r"w0\.50.*controlnet")
    with called_as(pipe, lambda plain, given: bank["2:4"](**given, return_dict=False)[0]):
        wanted = draw(pipe, name)
    with attached(pipe, plan.with_entries(["2:4"] * len(plan.rows)), bank):
        np.testing.assert_array_equal(draw(pipe, name), wanted)


def test_a_run_folder_is_its_plan_with_the_bank_of_its_pipeline(tmp_path):
    bank = slim_bank()
    plan = sampler_plan(bank, DDIMScheduler(), 4).with_entries(["full", "w0.50", "w0.25", "full"])
    StepAwarePipeline(bank, plan).save_pretrained(tmp_path / "pipeline")
    plan.save(tmp_path / "plan.json")
    pipe = pipelines.quiet(DDPMPipeline(copy_of(bank["full"]), DDIMScheduler()))
    found = []
    for given in (tmp_path, tmp_path / "pipeline"):
        with attached(pipe, given), torch.no_grad():
            found.append(
                pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np").images
            )
    with attached(pipe, plan, bank):
        wanted = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np").images
    np.testing.assert_array_equal(found, [wanted, wanted])


# -------------------------------------------------------------------------------------------------------------- refused


def refused(pipe, *what, match, error=PlanError):
    before = dict(pipe.components)
    with pytest.raises(error, match=match) as caught:
        attach(pipe, *what)
    assert dict(pipe.components) == before and "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused_and_the_pipeline_stays_what_it_was(tmp_path):
    pipe, ddpm = pipelines.stable_diffusion(), pipelines.ddpm()
    plan = plan_of(pipe)
    refused(ddpm, plan, match="another process")  # other betas
    refused(pipelines.sd3(), plan, match="FlowMatchEulerDiscreteScheduler")
    refused(pipe, plan_of(pipelines.sd3(), "sd3"), match="FlowMatch")
    bare = replace(plan, prices={**plan.prices, "w0.50": Price(1)})
    refused(pipe, bare.with_entries(["w0.50"] * len(plan.rows)), match=r"weights of their own: w0\.50")
    unfed = replace(plan, prices={**plan.prices, "full~out": Price(1)}).with_entries(["full~out"] * len(plan.rows))
    refused(pipe, unfed, match="row 0")
    refused(ddpm, plan_of(ddpm).with_guides([Guide("full", 2.0)] * STEPS), match="guides for a DDPMPipeline")
    flux = pipelines.flux()
    refused(flux, plan_of(flux, "flux").with_guides([Guide("full", 2.0)] * STEPS), match="guides for a FluxPipeline")
    refused(pipe, tmp_path, match="plan.json", error=HalfstepError)
    attach(pipe, plan)
    refused(pipe, plan, match="has a plan")
    with pytest.raises(PlanError, match="has a plan"):
        plan_for(pipe, 5)
    detach(pipe)
    with pytest.raises(PlanError, match="without a plan"):
        detach(pipe)


def test_samplers_that_a_loop_does_not_scale_or_call_as_they_ask_are_refused():
    for name, sampler in (("ddpm", HeunDiscreteScheduler), ("dit", EulerDiscreteScheduler)):
        with pytest.raises(PlanError, match="begins with unit noise"):
            plan_of(made(name), sampler=sampler(beta_start=1e-4, beta_end=0.02))
    with pytest.raises(PlanError, match="takes generator"):
        plan_of(made("ddpm"), sampler=PNDMScheduler(skip_prk_steps=True))
    pipe = made("stable_diffusion")
    attach(pipe, plan_of(pipe, sampler=EulerDiscreteScheduler.from_config(pipe.scheduler.config)))
    pipe.scheduler.set_timesteps(STEPS)
    with pytest.raises(PlanError, match="not scaled for its noise level"):  # a loop of one's own
        pipe.unet(torch.zeros(1, 4, 16, 16), pipe.scheduler.timesteps[0], torch.zeros(1, 77, 16))


@pytest.mark.slow
def test_a_compiled_network_stays_compiled():
    pipe, name = pipelines.stable_diffusion(), "stable_diffusion"
    inner, plans = pipe.unet, [plan_of(pipe, phrase=phrase) for phrase in (["full"], ["full", "full~0"])]
    wanted = []
    for plan in plans:
        with attached(pipe, plan):
            wanted.append(draw(pipe, name))
    pipe.unet = compiled = torch.compile(inner, backend="eager")
    for plan, one in zip(plans, wanted, strict=True):
        with attached(pipe, plan):
            np.testing.assert_array_equal(draw(pipe, name), one)
    assert pipe.unet is compiled


def test_a_denoiser_that_is_not_known_is_refused_by_name():
    pipe = pipelines.ddpm()
    pipe.unet = torch.nn.Conv2d(3, 3, 1)
    for call in (lambda: attach(pipe, plan_of(pipelines.ddpm())), lambda: detach(pipe), lambda: plan_for(pipe, 5)):
        with pytest.raises(ModelError, match=r"unet Conv2d, expected a UNet2DModel.*FluxTransformer2DModel"):
            call()


def test_calls_that_do_not_fit_the_plan_are_refused():
    pipe, name = pipelines.stable_diffusion(), "stable_diffusion"
    guided = plan_of(pipe).with_guides([Guide("full", 3.0)] * (STEPS + 1))  # PNDM has a row more
    with attached(pipe, plan_of(pipe)):
        with pytest.raises(PlanError, match="num_inference_steps=7, expected 5"):
            draw(pipe, name, num_inference_steps=7)
        plans_own, pipe.scheduler = pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config)
        with pytest.raises(PlanError, match="another DDIMScheduler"):
            draw(pipe, name)
        pipe.scheduler = plans_own
    with attached(pipe, guided), pytest.raises(PlanError, match="without guidance"):
        draw(pipe, name, guidance_scale=1.0)
    ldm = pipelines.ldm()
    guided = plan_of(ldm).with_guides([Guide("full", 3.0)] * STEPS)
    with attached(ldm, guided), pytest.raises(PlanError, match="without guidance"):
        draw(ldm, "ldm", guidance_scale=1.0)
    flux = pipelines.flux()
    with attached(flux, plan_of(flux, "flux")), pytest.raises(PlanError, match=r"timestep .* at the size"):
        draw(flux, "flux", height=64)
    sd3 = pipelines.sd3()
    plan = plan_of(sd3, "sd3").with_guides([Guide("full", 7.0)] * STEPS)
    skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.9}
    with attached(sd3, plan), pytest.raises(PlanError, match="a second call at row"):
        draw(sd3, "sd3", **skipping)


# ------------------------------------------------------------------------------------------------------------- plan_for


def test_phrases_are_laid_one_after_the_other_the_last_again_and_again():
    pipe = pipelines.ddpm()
    plan = plan_for(pipe, 8, phrases=[["full"] * 3, ["full", "full~0", "full~0"]])
    assert plan.entries == ("full", "full", "full", "full", "full~0", "full~0", "full", "full~0")
    assert plan.prices["full"].macs > plan.prices["full~0"].macs > 0
    assert StepPlan.from_json(plan.to_json()) == plan
    for phrases in ([], [["full"], []]):
        with pytest.raises(PlanError, match="empty phrase"):
            plan_for(pipe, 5, phrases=phrases)
    with pytest.raises(PlanError, match=r"w0\.50"):
        plan_for(pipe, 5, phrases=[["full", "w0.50"]])
    with pytest.raises(ModelError, match="cut 9"):
        plan_for(pipe, 5, phrases=[["full", "full~9"]])
    with pytest.raises(PlanError, match="another process"):
        plan_for(pipe, 5, sampler=DDIMScheduler(beta_end=0.03))
    with pytest.raises(PlanError, match="guides for a DDPMPipeline"):
        plan_for(pipe, 5, guidance=2.0)


def test_phrases_say_how_rows_are_guided():
    pipe = pipelines.sdxl()
    plan = plan_for(pipe, 5, phrases=[["full", "full|full~0"], ["full|"]], guidance=4.0)
    full, shallow_one = plan.prices["full"].macs, plan.prices["full~0"].macs
    assert plan.guides == (Guide("full", 4.0), Guide("full~0", 4.0), None, None, None)
    assert plan.macs == 6 * full + shallow_one and 0 < shallow_one < full


def test_a_plan_for_short_prompts_costs_what_short_prompts_cost():
    long, short = (pipelines.stable_diffusion() for _ in range(2))
    short.tokenizer.model_max_length = 8
    counted = {}
    for pipe, length in ((long, 77), (short, 8)):
        phrases = [["full", "full~0"]]
        plan = plan_for(pipe, 4, phrases=phrases)
        counted[length] = plan.prices["full"].macs
        assert counted[length] == count_macs(pipe.unet, inputs=example_inputs(pipe.unet, tokens=length))
        assert plan.prices["full~0"].macs == reused_macs(pipe.unet, 0, tokens=length)
    assert counted[8] < counted[77]


# ---------------------------------------------------------------------------------------------------------- the page

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"


def test_the_support_matrix_says_what_is_tested_here():
    told = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `"):
            name, *cells = (cell.strip(" `") for cell in line.strip("|").split("|"))
            told[name] = cells[:4]  # the fifth: `tests/app/test_prompted.py`
    tested = {}
    for name in CALLS:
        reuse, guided = (("✓" if holds else "–") for holds in (can_be_cut(name), name in GUIDED))
        entries = "✓" if name in SLIM else "masks" if name == "controlnet" else "–"
        tested[type(made(name)).__name__] = ["✓", reuse, guided, entries]
    assert told == tested


def test_the_first_page_runs_as_it_stands(tmp_path):
    stock = pipelines.stable_diffusion()
    stock.save_pretrained(tmp_path)
    code = PAGE.read_text().split("```python\n")[1].split("```")[0]
    names = {"folder": tmp_path}
    exec(code, names)
    assert len(names["images"]) == 1
    assert names["plan"].macs == 40 * names["plan"].prices["full"].macs  # 15 pairs and 10 halves
