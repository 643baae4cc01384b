"""A training on pictures that stay where they lie: the same however they are decoded, and exact after a kill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from halfstep.core.process import Process
from halfstep.core.recipe import TrainSpec
from halfstep.data.images import Images, load_images
from halfstep.data.latents import Latents
from halfstep.data.order import BufferedOrder
from halfstep.engine.text import Captioned
from halfstep.training.train import Diffusion, TrainState, dense_objective, train
from painted import pictures, png, tarred
from tiny import unet

SPEC = TrainSpec(steps=12, batch=8, warmup=0, precision="no", log_every=1)


@pytest.fixture
def source(tmp_path: Path, own_cache: Path) -> str:
    for k in range(3):
        shard = {}
        for j, picture in enumerate(pictures(20, 8, 8)):
            shard |= {f"{k}{j:02d}.png": png(picture), f"{k}{j:02d}.cls": str(j % 3).encode()}
        tarred(tmp_path / f"{k}.tar", shard)
    return f"tar:{tmp_path}"


def trained(images: Images, *, stops: tuple[int, ...] = (), file: Path = Path()) -> torch.Tensor:
    """The weights after SPEC, in one go or begun anew from a file after each of the steps `stops`."""
    for stop in (*stops, SPEC.steps):
        model, one = unet(5, num_class_embeds=3), Accelerator(cpu=True)
        state, objective = TrainState.new(model, SPEC), dense_objective(model, Diffusion(Process()))
        if file.is_file():
            state.load(file, "streamed")
        records = train(state, images, SPEC, objective, one, flip=True)
        for record in records:
            if record.step == stop and stop < SPEC.steps:
                state.save(file, "streamed")
                records.close()
                break
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_same_weights_by_any_number_of_workers_and_from_a_state(source: str, tmp_path: Path) -> None:
    wanted = trained(load_images(source, stream=32, workers=0))
    assert torch.equal(trained(load_images(source, stream=32, workers=2)), wanted)
    killed = trained(load_images(source, stream=32, workers=1), stops=(3, 8), file=tmp_path / "state.safetensors")
    assert torch.equal(killed, wanted)
    assert not torch.equal(trained(load_images(source, stream=16, workers=0)), wanted)  # another order


def test_what_is_trained_on_are_the_pictures_of_the_buffers_order(source: str) -> None:
    images, order = load_images(source, stream=32, workers=0), BufferedOrder(60, 4, 32)
    wanted, met = load_images(source), []

    def objective(batch):
        met.append((batch.clean, batch.cond["class_labels"]))
        yield (model(batch.clean, 0, **batch.cond).sample ** 2).mean()

    model = unet(5, num_class_embeds=3)
    list(train(TrainState.new(model, SPEC), images, SPEC, objective, Accelerator(cpu=True), seed=4))
    index = order.take(0, 12 * 8)
    assert torch.equal(torch.cat([clean for clean, _ in met]), wanted.batch(index))
    assert torch.equal(torch.cat([label for _, label in met]), wanted.batch_labels(index))


def test_captions_come_with_their_pictures(source: str) -> None:
    table = {"encoder_hidden_states": torch.arange(61.0)[:, None, None]}
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    asked = [torch.tensor([59, 0, 3]), torch.tensor([7, 7, 30])]
    found = []
    for images in (load_images(source, stream=16, workers=1), load_images(source)):
        captioned = Captioned(images=images, table=table, order=order, nothing=60, dropped=0.4, fingerprint="0")
        choices = torch.Generator().manual_seed(1)
        coming = list(captioned.coming(iter(asked)))
        found.append([(seen.batch(at), seen.batch_cond(at, choices)["encoder_hidden_states"]) for at, seen in coming])
    for (one, told), (other, wanted) in zip(*found, strict=True):
        assert torch.equal(one, other) and torch.equal(told, wanted)
    assert any((told == 60).any() for _, told in found[0])  # dropped


def test_latents_are_met_in_the_order_of_all() -> None:
    moments = np.zeros((4, 2, 1, 2, 2), np.float16)
    latents = Latents(name="x", moments=moments, labels=None, classes=(), fingerprint="0", shift=0.0, scaling=1.0)
    assert latents.buffer == 0 and [at.tolist() for at, _ in latents.coming([torch.tensor([3, 1])])] == [[3, 1]]
