"""Oracles: diffusers' own DDIM and DDPM pipelines, straight loops over its schedulers, static narrow networks."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from halfstep.bank import Bank
from halfstep.errors import HalfstepError, PlanError
from halfstep.plan import Row
from halfstep.recipe import SampleSpec
from halfstep.sampling import (
    SCHEDULERS,
    StepAwarePipeline,
    fewer_steps,
    image_generators,
    reference_plan,
    sample_images,
)


def net(seed: int, width: int, **changes) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(width, width),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        **changes,
    ).eval()


def bank_of(**changes) -> Bank:
    return Bank({"full": net(0, 16, **changes), "slim": net(1, 8, **changes)}, "full", "epsilon")


def plan_of(bank, scheduler="ddim", steps=5):
    return reference_plan(
        bank, DDPMScheduler().config, SampleSpec(scheduler=scheduler, steps=steps), {"full": 4, "slim": 1}
    )


def pipeline(bank, plan):
    pipe = StepAwarePipeline(bank, plan)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_the_reference_everywhere_equals_the_stock_pipeline(kind):
    bank = bank_of()
    mine = pipeline(bank, plan_of(bank, kind, 7))(3, generator=image_generators(4, 0, 3), output_type="np").images
    cls, scheduler = (DDIMPipeline, DDIMScheduler) if kind == "ddim" else (DDPMPipeline, DDPMScheduler)
    stock = cls(bank["full"], scheduler())
    stock.set_progress_bar_config(disable=True)
    theirs = stock(3, generator=image_generators(4, 0, 3), num_inference_steps=7, output_type="np").images
    assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("kind", SCHEDULERS)
@torch.no_grad()
def test_any_scheduler_equals_a_straight_loop_over_it(kind):
    bank, generators = bank_of(), image_generators(1, 0, 2)
    plan = plan_of(bank, kind, 6)
    mine = pipeline(bank, plan)(2, generator=image_generators(1, 0, 2), output_type="pt").images
    scheduler = getattr(diffusers, plan.scheduler).from_config(dict(plan.scheduler_config))
    scheduler.set_timesteps(6)
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators]) * scheduler.init_noise_sigma
    options = {"generator": generators} if kind in ("ddpm", "ddim", "euler", "dpmsolver++") else {}
    for t in scheduler.timesteps:
        prediction = bank["full"](scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(prediction, t, x, **options).prev_sample
    assert torch.equal(mine, (x / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("kind", ["ddim", "ddpm", "heun"])
def test_a_narrow_plan_equals_the_static_narrow_net(kind):
    bank = bank_of()
    plan = plan_of(bank, kind)
    mixed = pipeline(bank, plan.uniform("slim"))(2, seed=3, output_type="pt").images
    alone = Bank({"slim": bank["slim"]}, "slim", "epsilon")
    static = reference_plan(alone, DDPMScheduler().config, SampleSpec(scheduler=kind, steps=5), {"slim": 1})
    assert torch.equal(mixed, pipeline(alone, static)(2, seed=3, output_type="pt").images)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_an_image_depends_on_its_seed_and_number_alone(kind):
    bank = bank_of().double()  # untrained networks amplify the last bit of float32
    plan = plan_of(bank, kind).with_entries(["full", "slim"] * (len(plan_of(bank, kind).rows) // 2) + ["slim"])
    whole = torch.cat(list(sample_images(bank, plan, 7, seed=9, batch=7)))
    for batch in (1, 3):
        parts = torch.cat(list(sample_images(bank, plan, 7, seed=9, batch=batch)))
        assert torch.allclose(parts, whole, atol=1e-5)
    later = torch.cat(list(sample_images(bank, plan, 2, seed=9, batch=2, first=5)))
    assert torch.allclose(later, whole[5:], atol=1e-5)


def test_heun_has_a_row_for_each_evaluation_and_each_row_runs_its_entry():
    bank = bank_of()
    plan = plan_of(bank, "heun", 5)
    assert len(plan.rows) == 9
    entries = ["full", "slim", "slim", "full", "slim", "full", "full", "slim", "slim"]
    called = []
    for name in bank:
        bank[name].register_forward_hook(lambda *_, name=name: called.append(name))
    pipeline(bank, plan.with_entries(entries))(1)
    assert called == entries


def test_class_labels_reach_the_network():
    bank = bank_of(num_class_embeds=4)
    pipe = pipeline(bank, plan_of(bank))
    images = pipe(4, seed=0, output_type="pt").images
    assert torch.equal(images, pipe(4, class_labels=[0, 1, 2, 3], seed=0, output_type="pt").images)
    assert not torch.equal(images, pipe(4, class_labels=[3, 3, 3, 3], seed=0, output_type="pt").images)


def test_a_saved_pipeline_gives_the_same_images(tmp_path):
    bank = bank_of()
    pipe = pipeline(bank, plan_of(bank).with_entries(["slim", "slim", "full", "slim", "full"]))
    pipe.save_pretrained(tmp_path / "p")
    again = StepAwarePipeline.from_pretrained(tmp_path / "p")
    again.set_progress_bar_config(disable=True)
    assert again.plan == pipe.plan
    first = pipe(2, output_type="pt").images
    assert torch.equal(first, again(2, output_type="pt").images)
    assert torch.equal(first, pipe(2, output_type="pt").images)  # a fresh scheduler for every trajectory
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    assert index["_class_name"] == "StepAwarePipeline" and (tmp_path / "p" / "scheduler").is_dir()


def test_a_pipeline_moves_like_any_other():
    bank = bank_of()
    pipe = pipeline(bank, plan_of(bank)).to(torch.float64)
    assert pipe.bank.dtype == torch.float64 and set(pipe.components) == {"bank", "scheduler"}
    assert pipe(2, output_type="pt").images.dtype == torch.float64


def test_output_types():
    bank = bank_of()
    pipe = pipeline(bank, plan_of(bank))
    assert pipe(2).images[0].size == (8, 8)
    array = pipe(2, output_type="np").images
    assert array.shape == (2, 8, 8, 1) and array.min() >= 0 and array.max() <= 1
    assert pipe(2, output_type="pt", return_dict=False)[0].shape == (2, 1, 8, 8)


def test_fewer_steps_is_a_plan_of_the_same_sampler():
    bank = bank_of()
    plan = fewer_steps(plan_of(bank, steps=8), 3)
    assert len(plan.rows) == 3 and set(plan.entries) == {"full"}
    assert torch.equal(
        torch.cat(list(sample_images(bank, plan, 2, seed=0))),
        torch.cat(list(sample_images(bank, plan_of(bank, steps=3), 2, seed=0))),
    )


def test_plans_that_do_not_fit_are_refused(tmp_path):
    bank = bank_of()
    plan = plan_of(bank)
    from dataclasses import replace

    wrong = [
        replace(plan, rows=(Row(5.0, "full"), *plan.rows[1:])),
        replace(plan, rows=plan.rows[:-1]),
        replace(plan, scheduler="UNet2DModel"),
        replace(plan, scheduler="NoSuchScheduler"),
        replace(plan, entry_macs={**plan.entry_macs, "w9": 1}, rows=(Row(plan.rows[0].timestep, "w9"), *plan.rows[1:])),
    ]
    for bad in wrong:
        with pytest.raises(PlanError) as error:
            pipeline(bank, bad)
        assert "\n" not in str(error.value)
    with pytest.raises(PlanError):
        pipeline(bank, plan)(2, generator=image_generators(0, 0, 3))
    with pytest.raises(HalfstepError):
        StepAwarePipeline.from_pretrained(tmp_path)
