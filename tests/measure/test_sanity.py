"""What a reference must not be; oracles: pictures made by hand, the bundled model with its output pushed to white."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from halfstep.core.recipe import Recipe, SampleSpec
from halfstep.core.watch import Watch
from halfstep.data.images import load_images
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import reference_plan
from halfstep.measure import sanity
from halfstep.measure.judge import Judge, measure_plans
from halfstep.measure.pretrained import load_features
from halfstep.nets.models import load_denoiser


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return load_images("digits", size=8, channels=1, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def bundled():
    dense, noise, *_ = load_denoiser("digits")
    return dense, noise


def judge_of(net, images, kind: str = "epsilon") -> Judge:
    return Judge(Bank({"full": net}, "full", kind), images, load_features("digits"), cache=None, batch=64)


def plan_of(judge: Judge, noise, scheduler: str = "ddim", steps: int = 3):
    return reference_plan(judge.bank, noise, SampleSpec(scheduler=scheduler, steps=steps))


class Heard(Watch):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_pictures_at_black_and_white_are_found_beside_the_real_images_own_share():
    draw = np.random.default_rng(0)
    photo, drawing = (
        draw.integers(20, 235, (4, 3, 8, 8), np.uint8),
        draw.choice([0, 255], (4, 1, 8, 8)).astype(np.uint8),
    )
    white = np.full((4, 3, 8, 8), 255, np.uint8)
    assert sanity.at_limits(white) == 1 and sanity.at_limits(photo) == 0
    assert "100%" in sanity.flat(white, photo) and "0%" in sanity.flat(white, photo)
    assert sanity.flat(photo, photo) is None and sanity.flat(photo, drawing) is None
    assert sanity.flat(drawing, drawing) is None and sanity.flat(drawing, photo) is not None


def test_far_is_many_times_the_control_and_more_than_anybody_sees():
    assert sanity.far_from(3.7, 67.0, 1.5, 20) is not None
    assert sanity.far_from(3.7, 5.0, 1.5, 20) is None and sanity.far_from(0.02, 0.3, 1.5, 20) is None


def test_the_control_is_ddim_with_as_many_calls_of_the_same_net(bundled, images):
    judge = judge_of(bundled[0], images)
    assert sanity.control_plan(judge.bank, plan_of(judge, bundled[1])) is None
    heun = plan_of(judge, bundled[1], "heun", 3)
    control = sanity.control_plan(judge.bank, heun)
    assert (control.sampler.name, len(control.rows), control.macs) == ("DDIMScheduler", 5, heun.macs)
    assert set(control.entries) == {"full"}


def test_a_sampler_that_ddim_leaves_far_behind_is_a_broken_reference(bundled, images):
    judge = judge_of(bundled[0], images)
    heun = plan_of(judge, bundled[1], "heun", 3)
    good, fine = judge.features(sanity.control_plan(judge.bank, heun), 64, 0, 16)
    assert judge.broken(heun, good, fine, 0) is None
    assert "DDIM" in judge.broken(heun, good + 0.8 * good.std(0), fine, 0)


@pytest.mark.parametrize(("kind", "told"), [("sample", "black or white"), ("epsilon", "one constant picture")])
def test_nothing_is_held_beside_flat_pictures_and_it_is_said(bundled, images, kind, told):
    net = copy.deepcopy(bundled[0])
    with torch.no_grad():
        net.conv_out.bias -= 40.0
    judge, heard = judge_of(net, images, kind), Heard()
    plan = plan_of(judge, bundled[1] | {"prediction_type": kind})
    recipe = Recipe().edit(["eval.images=32", "eval.bootstrap=20"])
    found = measure_plans(judge, {"reference": plan, "plan": plan}, recipe, repeats=1, batch=2, watch=heard)
    row, about = found.record.plans["plan"], found.record.about
    assert (row.verdict, row.held, row.decided_by) == ("broken reference", False, None)
    assert told in about.warnings[0] and any(told in line for line in heard.lines)
    json.dumps(found.record.to_json(), allow_nan=False)


def test_too_few_images_for_the_features_are_said_and_decide_nothing_even_of_the_plan_itself(bundled, images):
    judge, heard = judge_of(bundled[0], images), Heard()
    plan = plan_of(judge, bundled[1])
    recipe = Recipe().edit(["eval.images=32", "eval.bootstrap=20"])
    found = measure_plans(judge, {"reference": plan, "plan": plan}, recipe, repeats=1, batch=2, watch=heard)
    row = found.record.plans["plan"]
    assert (row.verdict, row.held, row.decided_by) == ("not decided", False, 256)
    assert heard.lines == [f"warning: {judge.too_few(32, 'eval.images')}"] and "256 or more" in heard.lines[0]
    assert judge.too_few(256, "eval.images") is None


def test_a_tolerated_loss_is_a_share_of_the_distance_without_what_chance_adds(bundled, images):
    judge = judge_of(bundled[0], images)
    floor, scale = judge.floor(512), judge.reference.scale
    far = floor.raw + 10 * floor.high
    assert judge.tolerated(0.1, far, 512) == pytest.approx(far + 0.1 * (far - floor.raw))
    assert judge.tolerated(0.1, floor.raw, 512) == pytest.approx(floor.raw + 0.1 * scale)
