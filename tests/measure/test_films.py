"""Films. Oracles: the loop's own steps, pictures that the same seed draws, a plan's prices, what went into a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from halfstep.core.errors import RunError
from halfstep.core.plan import Price
from halfstep.core.process import Process
from halfstep.data.latents import decode
from halfstep.data.pictures import to_uint8
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions, cond_for
from halfstep.engine.sampling import image_generators, plan_for, sample_images, start_noise, to_images, trajectory
from halfstep.measure.films import DECODED, FRAMES, SIDE, _smaller, film, pictured, read_films, save_films
from tiny import tiny_vae, unet

PROCESS, PRICES = Process(clip_sample=False), {"full": Price(8, 30.0), "w0.50": Price(2, 10.0)}


def bank_of(**config) -> Bank:
    return Bank({"full": unet(0, **config), "w0.50": unet(1, **config)}, "full", "epsilon")


def plan_of(bank: Bank, kind=DDIMScheduler, steps: int = 4):
    return plan_for(bank, kind.from_config(PROCESS.config()), steps, PRICES)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_frames_are_the_noise_and_what_the_loop_yields_and_the_last_the_pictures_of_the_seed(kind):
    bank = bank_of()
    plan = plan_of(bank, kind).with_entries(["full", "w0.50", "w0.50", "full"])
    found = film(bank, plan, seed=3, conditions=None, count=2)
    assert found.frames.shape == (5, 2, 1, 8, 8) and found.rows.tolist() == [-1, 0, 1, 2, 3] and found.of == 4
    assert found.ran.tolist() == ["", "full", "w0.50", "w0.50", "full"]
    assert found.timesteps.tolist() == [plan.rows[0].timestep, *(row.timestep for row in plan.rows)]
    for k in range(2):
        generators = image_generators(3, k, 1)
        noise = start_noise(bank, generators)
        samples = [noise, *(step.after for step in trajectory(bank, plan, noise, generators))]
        for frame, sample in zip(found.frames[:, k], samples, strict=True):
            scale = max(1.0, float(sample.std()))
            assert np.array_equal(frame, to_uint8(sample if sample is samples[-1] else sample / scale)[0])
    drawn = np.concatenate([to_uint8(images) for images in sample_images(bank, plan, 2, seed=3)])
    assert np.abs(found.frames[-1].astype(int) - drawn).max() <= 1  # drawn as a batch, which rounds otherwise


def test_a_long_trajectory_is_thinned_evenly_and_has_its_end():
    bank = bank_of()
    plan = plan_for(bank, DDIMScheduler.from_config(PROCESS.config()), 100, {"full": 8, "w0.50": 2})
    found = film(bank, plan, seed=0, conditions=None, count=1)
    assert len(found.frames) == FRAMES and found.rows[-1] == 99
    assert set(np.diff(found.rows)) <= {4, 5}


def test_latents_are_decoded_and_what_is_not_finite_on_the_way_is_shown_all_the_same():
    vae, classes = tiny_vae(), ("cat", "dog")
    bank = Bank({"full": unet(0, size=4, colours=2, num_class_embeds=2)}, "full", "epsilon", vae=vae, classes=classes)
    plan = plan_for(bank, DDIMScheduler.from_config(PROCESS.config()), 12, {"full": 8})
    conditions = Conditions.of_classes([1, 0])
    found = film(bank, plan, seed=3, conditions=conditions, count=2)
    assert len(found.frames) == DECODED and found.frames.shape[2:] == (1, 8, 8)
    generators = image_generators(3, 1, 1)
    noise = start_noise(bank, generators)
    steps = list(trajectory(bank, plan, noise, generators, cond_for(bank, 1, 1, conditions)))
    scale = noise.std().clamp(min=1)
    with torch.no_grad():
        assert np.array_equal(found.frames[0, 1], to_uint8(decode(vae, noise / scale))[0])
        assert np.array_equal(found.frames[-1, 1], to_uint8(to_images(bank, steps[-1].after))[0])
    assert pictured(bank, conditions, 3) == ("dog", "cat", "dog")


def test_what_pictures_are_of_is_their_prompt_their_class_or_nothing():
    prompts = Conditions({}, (1, 0), ("a cat", "a dog"))
    assert pictured(bank_of(), prompts, 3) == ("a dog", "a cat", "a dog")
    assert pictured(bank_of(), None, 2) == ("", "")
    assert pictured(bank_of(num_class_embeds=2), None, 3) == ("class 0", "class 1", "class 0")


def test_large_frames_are_kept_smaller_by_the_mean_of_whole_blocks():
    picture = np.random.default_rng(0).integers(0, 256, (3, 4 * SIDE, 4 * SIDE), dtype=np.uint8)
    found = _smaller(picture)
    assert found.shape == (3, SIDE, SIDE)
    assert found[2, 5, 7] == round(picture[2, 20:24, 28:32].mean())
    assert _smaller(picture[:, :SIDE, :50]) is not None and _smaller(picture[:, :SIDE, :50]).shape == (3, SIDE, 50)


def test_films_are_read_as_they_were_written_or_refused_in_one_line(tmp_path: Path):
    bank, file = bank_of(), tmp_path / "films.npz"
    one = film(bank, plan_of(bank), seed=3, conditions=None, count=2)
    save_films(file, {"reference": one, "plan": one}, ["a cat", ""])
    films, told = read_films(file, "run again")
    assert list(films) == ["reference", "plan"] and told == ("a cat", "")
    for name in ("frames", "rows", "timesteps", "ran"):
        assert np.array_equal(getattr(films["plan"], name), getattr(one, name))
    with np.load(file) as whole:
        arrays = dict(whole)
    bad = {
        "plan|frames": one.frames.astype(float),
        "plan|rows": one.rows[::-1],
        "plan|of": np.array([9]),
        "plan|timesteps": one.timesteps[:2],
        "pictured": np.array(["x"]),
        "other": np.zeros(3),
        "plan|ran": np.arange(5),
    }
    for name, value in bad.items():
        np.savez(file, **(arrays | {name: value}))
        refused(file)
    np.savez(file, **{name: value for name, value in arrays.items() if name != "plan|of"})
    refused(file)
    file.write_bytes(b"")
    refused(file)


def refused(file: Path) -> None:
    with pytest.raises(RunError) as caught:
        read_films(file, "run again")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
