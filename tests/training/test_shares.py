"""A step shared out against the same step in one piece, and real processes against one: states, records, refusals."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.optim import ZeroRedundancyOptimizer

from halfstep.core.errors import ModelError, RecipeError, RunError
from halfstep.core.machine import UNWRAPPED, require_plain_launch
from halfstep.core.process import Process
from halfstep.core.recipe import SlimSpec, TrainSpec
from halfstep.core.share import Share, shares_of
from halfstep.data.images import Images, load_images
from halfstep.data.latents import Latents
from halfstep.methods.slimmable import Supernet, sandwich_objective
from halfstep.nets.denoiser import Memo, predictor
from halfstep.training.train import (
    Batch,
    Diffusion,
    TrainState,
    batch_of,
    dense_objective,
    require_trainable,
    same_training,
    stamp,
    train,
)
from tiny import text_unet, unet, uvit

SPEC = TrainSpec(steps=3, batch=8, lr=0.05, warmup=0, schedule="constant", precision="no", log_every=1, clip_norm=0.0)


@pytest.fixture(scope="module", autouse=True)
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALFSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


def state_of(spec: TrainSpec = SPEC, *, adam: bool = False, **changes) -> TrainState:
    """A small net; plain gradient descent, for Adam would blow the rounding of a gradient near 0 up to a step."""
    state = TrainState.new(unet(5, (16, 32), attention_head_dim=8, **changes), spec)
    if not adam:
        state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)
    return state


def curve(state: TrainState, spec: TrainSpec, images: Images, *, slim: bool = False) -> torch.Tensor:
    """Train, and return the losses and the gradients' norms, [steps, 2]."""
    diffusion = Diffusion(Process())
    objective = dense_objective(state.model, diffusion)
    if slim:
        widths = SlimSpec(widths=(1.0, 0.75, 0.5), distill="none")
        objective = sandwich_objective(Supernet(state.model, widths.widths), diffusion.draw, widths)
    records = list(train(state, images, spec, objective, Accelerator(cpu=True), seed=3, flip=True))
    return torch.tensor([[one.loss, one.grad_norm] for one in records], dtype=torch.float64)


def close(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], rtol=2e-4, atol=2e-6, msg=name)


# ---- shares --------------------------------------------------------------------------------------------------------


@given(processes=st.integers(1, 7), parts=st.integers(1, 5), count=st.integers(1, 6))
def test_shares_of_all_processes_hold_every_image_once_in_order(processes: int, parts: int, count: int):
    batch = processes * parts * count
    found = [share for rank in range(processes) for share in shares_of(batch, parts, processes, rank)]
    if found == [None]:
        assert batch == count
        return
    assert [k for one in found for k in one.of(list(range(batch)))] == list(range(batch))
    assert {(one.count, one.whole) for one in found} == {(count, batch)}


@pytest.mark.parametrize(("batch", "near"), [(7, 6), (3, 6)])
def test_images_that_do_not_divide_are_refused_with_the_nearest_number_that_does(batch: int, near: int):
    with pytest.raises(RecipeError, match=rf"train.batch: got {batch} images.*multiple of 6.*train.batch={near}"):
        shares_of(batch, 3, 2, 1)


@pytest.mark.parametrize("slim", [False, True])
@pytest.mark.parametrize("classes", [None, 10])
def test_a_step_in_parts_is_the_step_in_one_piece(slim: bool, classes: int | None):
    images, whole = load_images("digits"), state_of(num_class_embeds=classes)
    alone = curve(whole, SPEC, images, slim=slim)
    parted = state_of(num_class_embeds=classes)
    torch.testing.assert_close(
        curve(parted, replace(SPEC, accumulate=4), images, slim=slim), alone, rtol=1e-4, atol=1e-6
    )
    close(parted.tensors(), whole.tensors())
    assert alone[:, 0].diff().abs().min() > 1e-4  # or every step is the same one


def test_latents_of_a_share_are_the_steps_own():
    moments = torch.randn(6, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).abs().half().numpy()
    latents = Latents(
        name="some", moments=moments, labels=None, classes=(), fingerprint="0" * 16, shift=0.1, scaling=2.0
    )
    index = torch.tensor([4, 0, 5, 2])
    whole = latents.batch(index, generator=torch.Generator().manual_seed(7))
    parts = [
        latents.batch(share.of(index), generator=torch.Generator().manual_seed(7), share=share)
        for share in (Share(0, 2, 4), Share(2, 2, 4))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_a_net_with_dropout_gets_the_same_noise_and_drops_otherwise_in_every_share():
    seen: dict[int, list[torch.Tensor]] = {}
    for parts in (1, 2):
        state = state_of(dropout=0.5)
        predict, diffusion = predictor(state.model), Diffusion(Process())

        def objective(batch: Batch, parts=parts, predict=predict, diffusion=diffusion):
            noisy, timestep, target = diffusion.draw(batch.clean, batch.generator, batch.share)
            seen.setdefault(parts, []).append(target)
            yield (predict(noisy, timestep, {}, Memo()) - target).square().mean()

        spec = replace(SPEC, steps=1, accumulate=parts)
        list(train(state, load_images("digits"), spec, objective, Accelerator(cpu=True)))
    assert torch.equal(torch.cat(seen[2]), torch.cat(seen[1]))


# ---- stamps --------------------------------------------------------------------------------------------------------


def stamp_of(batch: int, *more: object, lr: float = 1.0) -> str:
    return stamp({"batch": batch, "steps": 5, "lr": lr}, "noise", "model", (), 0, "data", "dense", *more)


def test_a_state_is_of_the_same_training_whatever_the_images_of_a_step_and_the_processes_of_before():
    assert same_training(stamp_of(8), stamp_of(8)) and same_training(stamp_of(8), stamp_of(16))
    assert same_training(stamp_of(4, 2), stamp_of(8)) and batch_of(stamp_of(4, 2)) == batch_of(stamp_of(8)) == 8
    assert not same_training(stamp_of(8, lr=2.0), stamp_of(8)) and not same_training("", stamp_of(8))
    assert not same_training("{}", "[]") and batch_of("[1]") is None


# ---- activation checkpointing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: unet(attend=True), uvit, text_unet], ids=["unet", "uvit", "text"])
def test_activations_made_again_give_the_same_gradients_bit_for_bit(make):
    grads, calls = [], []
    for checkpointing in (False, True):
        net = make().train()
        require_trainable(net, replace(SPEC, checkpointing=checkpointing))
        ran = [0]
        for part in net.modules():
            part.register_forward_hook(lambda *_, ran=ran: ran.__setitem__(0, ran[0] + 1))
        torch.manual_seed(0)
        cond = {"encoder_hidden_states": torch.randn(2, 5, 12)} if hasattr(net.config, "cross_attention_dim") else {}
        predictor(net)(torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), cond, Memo()).square().mean().backward()
        grads.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        calls.append(ran[0])
    assert calls[0] < calls[1]
    assert grads[0].keys() == grads[1].keys() and all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_what_cannot_make_its_activations_again_is_refused_by_name():
    spec = replace(SPEC, checkpointing=True)
    with pytest.raises(ModelError, match=r"slices or masks.*accumulate"):
        require_trainable(unet(), spec, cut=True)
    net = unet()
    type(net)._supports_gradient_checkpointing, before = False, type(net)._supports_gradient_checkpointing
    try:
        with pytest.raises(ModelError, match="UNet2DModel, which keeps its activations"):
            require_trainable(net, spec)
    finally:
        type(net)._supports_gradient_checkpointing = before


# ---- what a launcher may say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNWRAPPED)
def test_what_accelerate_would_do_to_models_it_wraps_is_refused_by_name(monkeypatch, name: str):
    for other, (off, *_) in UNWRAPPED.items():
        monkeypatch.setenv(other, off)
    require_plain_launch()
    monkeypatch.setenv(name, "16")
    with pytest.raises(RunError, match=f"{name}=16.*leave it out"):
        require_plain_launch()


# ---- real processes ------------------------------------------------------------------------------------------------


def train_as_rank(folder: Path) -> None:
    """Everything that two processes are compared with one in, so that they are started once."""
    torch.set_num_threads(1)
    accelerator, images = Accelerator(cpu=True), load_images("digits")
    assert accelerator.num_processes == 2
    for name, spec, more in cases():
        adam = "adam" in name
        state = state_of(spec, adam=adam)
        found = {"curve": curve(state, spec, images, **more)}
        if name == "adam sharded":
            assert isinstance(state.optimizer, ZeroRedundancyOptimizer)
            found["held"] = torch.tensor(len(state.optimizer.optim.state))
            found |= resumed_sharded(folder, spec, images)
        state.gather()
        if not adam or accelerator.is_main_process:
            found |= state.tensors()
        save_file(found, folder / f"{name}.{accelerator.process_index}.safetensors")
    accelerator.end_training()


def resumed_sharded(folder: Path, spec: TrainSpec, images: Images) -> dict[str, torch.Tensor]:
    """The weights of a training that was left after two steps, and gone on with from its state."""
    file, first = folder / "state.safetensors", state_of(spec, adam=True)
    list(
        train(
            first,
            images,
            replace(spec, steps=2),
            dense_objective(first.model, Diffusion(Process())),
            Accelerator(cpu=True),
            seed=3,
            flip=True,
        )
    )
    first.gather()
    if Accelerator(cpu=True).is_main_process:
        first.save(file, "mine")
    Accelerator(cpu=True).wait_for_everyone()
    again = state_of(spec, adam=True)
    again.load(file, "mine")
    curve(again, spec, images)
    return {f"resumed.{name}": value for name, value in again.model.state_dict().items()}


def cases() -> list[tuple[str, TrainSpec, dict]]:
    adam = replace(SPEC, lr=1e-3, clip_norm=1.0)
    return [
        ("dense", SPEC, {}),
        ("dense in parts", replace(SPEC, accumulate=2), {}),
        ("slim", SPEC, {"slim": True}),
        ("adam", adam, {}),
        ("adam sharded", replace(adam, sharded=True), {}),
    ]


@pytest.fixture(scope="module")
def ranks(setting, tmp_path_factory) -> Path:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    paths = [str(p) for p in Path(__file__).parents[:2]]
    text = f"import sys; from pathlib import Path; sys.path[:0] = {paths}\nimport test_shares\n"
    (folder / "script.py").write_text(text + "test_shares.train_as_rank(Path(sys.argv[1]))\n")
    command = [sys.executable, folder / "script.py", folder]
    started = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [one.wait(timeout=120) for one in started] == [0, 0]
    finally:
        for one in started:
            one.kill()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "spec", "more"), cases()[:3], ids=[case[0] for case in cases()[:3]])
def test_two_processes_have_the_curve_and_the_weights_of_one_with_the_same_images(ranks, name, spec, more):
    both = [load_file(ranks / f"{name}.{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])
    alone = state_of()
    torch.testing.assert_close(
        both[0].pop("curve"), curve(alone, SPEC, load_images("digits"), **more), rtol=1e-4, atol=1e-6
    )
    close(both[0], alone.tensors())


@pytest.mark.slow
def test_sharded_moments_change_no_bit_and_come_back(ranks):
    plain, sharded = (load_file(ranks / f"{name}.0.safetensors") for name in ("adam", "adam sharded"))
    held = sharded.pop("held"), load_file(ranks / "adam sharded.1.safetensors")["held"]
    slots = {name.split(".")[1] for name in plain if name.startswith("optimizer.")}
    assert min(held) > 0 and sum(map(int, held)) == len(slots)
    resumed = {name[8:]: sharded.pop(name) for name in list(sharded) if name.startswith("resumed.")}
    assert plain.keys() == sharded.keys() and all(torch.equal(plain[name], sharded[name]) for name in plain)
    assert all(torch.equal(value, plain[f"model.{name}"]) for name, value in resumed.items())
