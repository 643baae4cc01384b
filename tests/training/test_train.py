"""The training loop against an uninterrupted run, closed forms, autograd on the summed loss and a plain recursion."""

from __future__ import annotations

import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from halfstep.core.errors import DivergedError, RunError
from halfstep.core.process import Process
from halfstep.core.recipe import TrainSpec
from halfstep.data.images import Images, load_images
from halfstep.nets.denoiser import Memo, cond_of, predictor
from halfstep.training.train import (
    Batch,
    Diffusion,
    Objective,
    ShuffledOrder,
    TrainRecord,
    TrainState,
    _mix,
    dense_objective,
    learning_rate,
    stamp,
    train,
)
from tiny import unet

SPEC = TrainSpec(steps=4, batch=8, lr=1e-3, warmup=2, ema_decay=0.9, precision="no", log_every=1)
KILLED = replace(SPEC, steps=90, log_every=3)


def tiny(**changes) -> UNet2DModel:
    """The same 40k parameters every time."""
    return unet(5, attention_head_dim=8, **changes)


def run(state: TrainState, images: Images, spec: TrainSpec, objective: Objective, **more: object) -> list[TrainRecord]:
    return list(train(state, images, spec, objective, Accelerator(cpu=True), **more))


def train_to_be_killed(file: Path) -> TrainState:
    """Resume from `file` or start, save at every record, tell the steps on stdout."""
    torch.set_num_threads(1)
    model = tiny(dropout=0.2, num_class_embeds=10)
    state, images = TrainState.new(model, KILLED), load_images("digits")
    if file.is_file():
        state.load(file, "killed")
    objective = dense_objective(model, Diffusion(Process()))
    for record in train(state, images, KILLED, objective, Accelerator(cpu=True), seed=3, flip=True):
        state.save(file, "killed")
        print(record.step, flush=True)
    return state


@pytest.fixture(scope="module", autouse=True)
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALFSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        load_images("digits")
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def digits() -> Images:
    return load_images("digits")


@pytest.fixture
def started(digits: Images) -> TrainState:
    """A state after four steps."""
    model = tiny()
    state = TrainState.new(model, SPEC)
    run(state, digits, SPEC, dense_objective(model, Diffusion(Process())))
    return state


def script(folder: Path, call: str) -> Path:
    text = f"import sys; from pathlib import Path; sys.path[:0] = {[str(p) for p in Path(__file__).parents[:2]]}\n"
    file = folder / "script.py"
    file.write_text(f"{text}import test_train\ntest_train.{call}(Path(sys.argv[1]))\n")
    return file


# ---- resume --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_training_killed_twice_ends_bit_for_bit_as_the_uninterrupted_one(tmp_path: Path):
    file, starter = tmp_path / "state" / "train.safetensors", script(tmp_path, "train_to_be_killed")
    last = 0
    for after, delay in ((9, 0.013), (30, 0.037)):  # seconds into whatever happens then: a step or a save
        child = subprocess.Popen([sys.executable, starter, file], stdout=subprocess.PIPE, text=True)
        try:
            for line in child.stdout:
                if int(line) >= after:
                    break
            time.sleep(delay)
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate()
        assert child.returncode == -signal.SIGKILL, "the training was over before it was killed"
        left = TrainState.new(tiny(dropout=0.2, num_class_embeds=10), KILLED)
        left.load(file, "killed")
        assert last < after <= left.step < KILLED.steps
        last = left.step
    resumed, whole = train_to_be_killed(file), train_to_be_killed(tmp_path / "other" / "train.safetensors")
    mine, theirs = resumed.tensors(), whole.tensors()
    assert mine.keys() == theirs.keys() and any(".exp_avg_sq" in name for name in mine)
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert resumed.step == whole.step == resumed.ema.optimization_step == whole.ema.optimization_step == KILLED.steps


def test_a_state_comes_back_as_it_was_saved_and_leaves_no_other_file(started: TrainState, tmp_path: Path):
    for _ in range(2):  # the second one replaces the first
        started.save(tmp_path / "train.safetensors", "mine")
    assert [p.name for p in tmp_path.iterdir()] == ["train.safetensors"]
    with torch.no_grad():
        other = tiny()
        for parameter in other.parameters():
            parameter.add_(1)
    state = TrainState.new(other, SPEC)
    state.load(tmp_path / "train.safetensors", "mine")
    mine, theirs = state.tensors(), started.tensors()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert state.step == started.step == 4


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_cut_state_is_refused_in_one_line_and_changes_nothing(started: TrainState, tmp_path: Path, share: float):
    file = tmp_path / "train.safetensors"
    started.save(file, "mine")
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    state = TrainState.new(tiny(), SPEC)
    before = {name: value.clone() for name, value in state.tensors().items()}
    with pytest.raises(RunError, match="unreadable file") as caught:
        state.load(file, "mine")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert state.step == 0 and all(torch.equal(value, before[name]) for name, value in state.tensors().items())


def test_a_state_of_another_stamp_is_refused_in_one_line(started: TrainState, tmp_path: Path):
    file = tmp_path / "train.safetensors"
    started.save(file, stamp(SPEC, 1))
    with pytest.raises(RunError, match="another recipe") as caught:
        TrainState.new(tiny(), SPEC).load(file, stamp(SPEC, 2))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def damaged(file: Path, **changes: object) -> None:
    """A state written again with other metadata, by their names, or other tensors, by a function `tensors`."""
    with safe_open(file, framework="pt") as opened:
        meta = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    change = changes.pop("tensors", None)
    if change is not None:
        change(tensors)
    meta = {name: value for name, value in (meta | changes).items() if value is not None}
    save_file(tensors, file, metadata=meta)


def _with(tensors: dict, name: str, value: torch.Tensor) -> None:
    tensors[name] = value


DAMAGES: dict[str, tuple[dict, str]] = {
    "step -5": ({"step": "-5"}, "step '-5'"),
    "no step": ({"step": None}, "step None"),
    "step of words": ({"step": "four"}, "step 'four'"),
    "long step": ({"step": "9" * 5000}, "step '999"),
    "past the end": ({"step": "99"}, "expected a whole number from 0 to 40"),
    "other step": ({"step": "3"}, "bytes that changed"),
    "changed": ({"tensors": lambda t: t["ema.0"].mul_(1.001)}, "bytes that changed"),
    "NaN": ({"digest": None, "tensors": lambda t: t["ema.0"].fill_(float("nan"))}, "NaN or infinity in ema.0"),
    "shape": ({"tensors": lambda t: _with(t, "ema.0", t["ema.0"][:1].clone())}, "got ema.0"),
    "type": ({"tensors": lambda t: _with(t, "ema.0", t["ema.0"].double())}, "got ema.0 torch.float64"),
    "more": ({"tensors": lambda t: _with(t, "optimizer.9999.step", torch.zeros(()))}, "got optimizer.9999.step"),
    "fewer": ({"tensors": lambda t: t.pop("ema.1")}, "got ema.1 missing"),
    "half a slot": ({"tensors": lambda t: t.pop("optimizer.0.exp_avg")}, "got optimizer.0.exp_avg missing"),
}


@pytest.mark.parametrize(("changes", "message"), DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_state_is_refused_in_one_line_that_says_what_to_delete(started, tmp_path, changes, message):
    file = tmp_path / "train.safetensors"
    started.save(file, "mine")
    damaged(file, **changes)
    state = TrainState.new(tiny(), SPEC)
    before = {name: value.clone() for name, value in state.tensors().items()}
    with pytest.raises(RunError) as caught:
        state.load(file, "mine", 40)
    told = str(caught.value)
    assert message in told and str(file) in told and "delete that file" in told and "\n" not in told
    assert state.step == 0 and all(torch.equal(value, before[name]) for name, value in state.tensors().items())


def test_a_state_of_before_has_no_digest_and_is_believed(started: TrainState, tmp_path: Path):
    file = tmp_path / "train.safetensors"
    started.save(file, "mine")
    assert TrainState.new(tiny(), SPEC).load(file, "mine") is True
    damaged(file, digest=None)
    state = TrainState.new(tiny(), SPEC)
    assert state.load(file, "mine") is False and state.step == started.step


def test_a_missing_state_is_a_run_error(tmp_path: Path):
    with pytest.raises(RunError, match="no such file"):
        TrainState.new(tiny(), SPEC).load(tmp_path / "none.safetensors", "mine")


def test_a_full_disk_is_a_run_error_and_keeps_the_old_state(started: TrainState, tmp_path: Path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        started.save(small / "train.safetensors", "old")  # about 0.7 MB; a second one does not fit beside it
        with pytest.raises(RunError, match="full disk"):
            started.save(small / "train.safetensors", "new")
        assert [p.name for p in small.iterdir()] == ["train.safetensors"]
        TrainState.new(tiny(), SPEC).load(small / "train.safetensors", "old")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_stamps_are_equal_exactly_when_the_settings_are():
    assert stamp(SPEC, Process(), 1) == stamp(replace(SPEC), Process(), 1)
    assert len({stamp(SPEC, 1), stamp(replace(SPEC, lr=2e-3), 1), stamp(SPEC, 2), stamp(SPEC, 1, "tag")}) == 4


# ---- the loss ------------------------------------------------------------------------------------------------------


def alphas_cumprod(noise: Process) -> torch.Tensor:
    """DDPM's product of 1 - beta, in float64; the cosine one is eq. 17 of arXiv 2102.09672."""
    steps, start, end = noise.timesteps, noise.beta_start, noise.beta_end
    if noise.beta_schedule == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    elif noise.beta_schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    else:
        angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
        bar = angle.cos() ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    return (1 - betas).cumprod(0)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_dense_loss_is_the_hand_written_one(digits: Images, prediction: str, schedule: str):
    noise = Process(prediction=prediction, beta_schedule=schedule, timesteps=200, beta_end=0.05)
    model, clean, seen = tiny(num_class_embeds=10), digits.batch(slice(0, 64)), {}

    def spy(_: torch.nn.Module, args: tuple, named: dict, output: object) -> None:
        seen.update(noisy=args[0], timestep=args[1], labels=named["class_labels"], prediction=output[0])

    model.register_forward_hook(spy, with_kwargs=True)
    labels = digits.batch_labels(slice(0, 64))
    (loss,) = dense_objective(model, Diffusion(noise))(Batch(clean, cond_of(labels)))
    bar = alphas_cumprod(noise)[seen["timestep"]][:, None, None, None]
    epsilon = (seen["noisy"].double() - bar.sqrt() * clean) / (1 - bar).sqrt()
    velocity = bar.sqrt() * epsilon - (1 - bar).sqrt() * clean
    target = {"epsilon": epsilon, "v_prediction": velocity, "sample": clean.double()}[prediction]
    expected = (seen["prediction"].double() - target).square().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0.0)
    assert seen["labels"] is labels
    assert abs(float(epsilon.mean())) < 0.08 and abs(float(epsilon.std()) - 1) < 0.06  # 4096 normal numbers


def test_timesteps_are_drawn_evenly_from_the_first_to_the_last():
    torch.manual_seed(0)
    _, timestep, _ = Diffusion(Process(timesteps=10)).draw(torch.zeros(20_000, 1, 1, 1))
    counts = timestep.bincount(minlength=10)
    assert len(counts) == 10 and (counts - 2000).abs().max() < 5 * math.sqrt(20_000 * 0.1 * 0.9)


def test_labels_reach_only_models_that_take_them(digits: Images):
    for classes in (None, 10):
        seen, state = [], TrainState.new(tiny(num_class_embeds=classes), SPEC)

        def objective(batch: Batch, state: TrainState = state, seen: list = seen) -> Iterator[torch.Tensor]:
            seen.append(batch)
            yield predictor(state.model)(batch.clean, torch.zeros(8), batch.cond, Memo()).square().mean()

        run(state, digits, replace(SPEC, steps=1), objective)
        if classes is None:
            assert seen[0].cond == {}
        else:
            wanted = digits.batch_labels(ShuffledOrder(len(digits), 0).take(0, 8))
            assert torch.equal(seen[0].cond["class_labels"], wanted)


# ---- one step ------------------------------------------------------------------------------------------------------


def three_losses(model: torch.nn.Module, seen: list[torch.Tensor]) -> Objective:
    predict = predictor(model)

    def objective(batch: Batch) -> Iterator[torch.Tensor]:
        seen.append(batch.clean)
        for scale, step in ((1.0, 10), (0.5, 200), (3.0, 900)):
            timestep = torch.full((len(batch.clean),), step)
            yield scale * F.mse_loss(predict(batch.clean, timestep, {}, Memo()), 1 - batch.clean)

    return objective


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
def test_the_losses_of_a_step_add_up_to_the_clipped_gradient_of_their_sum(digits: Images, clip: float):
    model, twin, seen = tiny(), tiny(), []
    spec = replace(SPEC, steps=1, clip_norm=clip)
    state = TrainState.new(model, spec)
    (record,) = run(state, digits, spec, three_losses(model, seen))
    total = sum(three_losses(twin, [])(Batch(seen[0], {})))
    gradients = torch.autograd.grad(total, list(twin.parameters()))
    norm = torch.sqrt(sum(g.double().square().sum() for g in gradients))
    scale = min(1.0, clip / float(norm)) if clip else 1.0
    assert record.grad_norm == pytest.approx(float(norm), rel=1e-4)  # before clipping
    assert record.loss == pytest.approx(total.item(), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        slots = state.optimizer.state[parameter]  # Adam's first moment after one step: (1 - 0.9) of what it was given
        torch.testing.assert_close(slots["exp_avg"] / 0.1, scale * gradient, rtol=1e-3, atol=1e-6 * scale)
        assert slots["step"] == 1
        assert parameter.grad is None


def test_optimizer_and_average_move_once_a_step_however_many_losses_it_has(digits: Images):
    model = tiny()
    state = TrainState.new(model, SPEC)
    records = run(state, digits, SPEC, three_losses(model, []))
    assert [r.step for r in records] == [1, 2, 3, 4]
    assert state.step == state.ema.optimization_step == 4
    assert {int(slots["step"]) for slots in state.optimizer.state.values()} == {4}
    assert [r.lr for r in records] == [learning_rate(step, SPEC) for step in range(4)]


def test_records_come_at_every_log_step_and_at_the_last_with_the_mean_loss_between(digits: Images):
    def losses(log_every: int) -> dict[int, float]:
        model, spec = tiny(), replace(SPEC, steps=7, log_every=log_every)
        records = run(TrainState.new(model, spec), digits, spec, dense_objective(model, Diffusion(Process())))
        return {r.step: r.loss for r in records}

    each = losses(1)
    expected = {3: sum(each[k] for k in (1, 2, 3)) / 3, 6: sum(each[k] for k in (4, 5, 6)) / 3, 7: each[7]}
    assert losses(3) == pytest.approx(expected, rel=1e-5)


def test_the_average_is_the_recursion_with_diffusers_warm_up(digits: Images):
    model, spec = tiny(), replace(SPEC, steps=8, lr=1e-2, ema_decay=0.3)
    state = TrainState.new(model, spec)
    shadow = {name: value.double() for name, value in model.named_parameters()}
    decays = []
    for record in train(state, digits, spec, dense_objective(model, Diffusion(Process())), Accelerator(cpu=True)):
        done = record.step - 1
        decays.append(min(0.3, (1 + done) / (10 + done)) if done else 0.0)
        shadow = {n: decays[-1] * shadow[n] + (1 - decays[-1]) * w.detach() for n, w in model.named_parameters()}
    average = state.average()
    assert decays[0] == 0.0 and decays[1] == 2 / 11 and decays[-1] == 0.3  # start, warm-up and plateau were all met
    assert average.keys() == model.state_dict().keys()
    for name, value in shadow.items():
        torch.testing.assert_close(average[name].double(), value, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(average["conv_in.weight"], model.conv_in.weight, atol=1e-5)


@given(steps=st.integers(1, 500), warmup=st.integers(0, 600), lr=st.floats(1e-6, 1.0))
def test_the_rate_warms_up_linearly_then_falls_as_half_a_cosine_or_stays(steps: int, warmup: int, lr: float):
    spec = TrainSpec(steps=steps, warmup=warmup, lr=lr)
    constant = replace(spec, schedule="constant")
    for step in range(min(warmup, steps)):
        assert learning_rate(step, spec) == learning_rate(step, constant) == pytest.approx(lr * (step + 1) / warmup)
    for step in range(warmup, steps):
        share = (step - warmup) / (steps - warmup)
        assert learning_rate(step, constant) == lr
        assert learning_rate(step, spec) == pytest.approx(lr * math.cos(share * math.pi / 2) ** 2)
    if warmup < steps:
        assert learning_rate(warmup, spec) == lr and learning_rate(steps, spec) == pytest.approx(0, abs=1e-12 * lr)


# ---- the order of images -------------------------------------------------------------------------------------------


@given(n=st.integers(1, 40), batch=st.integers(1, 97), seed=st.integers(-5, 2**63), epochs=st.integers(1, 4))
def test_every_image_comes_exactly_once_an_epoch_however_batches_cross_epochs(n, batch, seed, epochs):
    order, taken = ShuffledOrder(n, seed), []
    while sum(map(len, taken)) < n * epochs:
        taken.append(order.take(batch * len(taken), batch))
        assert len(taken[-1]) == batch
    for epoch in torch.cat(taken)[: n * epochs].split(n):
        assert epoch.sort().values.tolist() == list(range(n))


@given(start=st.integers(0, 300), count=st.integers(1, 100), seed=st.integers(0, 50))
def test_the_order_depends_on_seed_and_position_alone(start: int, count: int, seed: int):
    order = ShuffledOrder(31, seed)
    order.take(17, 200)  # whatever was asked before
    whole = ShuffledOrder(31, seed).take(0, start + count)
    assert torch.equal(order.take(start, count), whole[start:])


def test_epochs_and_seeds_shuffle_differently():
    first, second = ShuffledOrder(50, 0).take(0, 100).split(50)
    other = ShuffledOrder(50, 1).take(0, 50)
    assert not torch.equal(first, second) and not torch.equal(first, other)


# ---- whole trainings -----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_short_training_on_digits_lowers_the_loss(digits: Images):
    model, spec = tiny(), replace(SPEC, steps=150, batch=64, lr=4e-3, warmup=10, log_every=1)
    records = run(TrainState.new(model, spec), digits, spec, dense_objective(model, Diffusion(Process())))
    assert records[0].loss > 0.9
    assert sum(r.loss for r in records[-30:]) / 30 < 0.35


def test_bf16_trains_finite_weights_that_stay_float32_and_differ_from_those_of_float32(digits: Images):
    trained: dict[str, TrainState] = {}
    for precision in ("no", "bf16"):
        model, spec = tiny(), replace(SPEC, steps=6, precision=precision)
        trained[precision] = TrainState.new(model, spec)
        records = run(trained[precision], digits, spec, dense_objective(model, Diffusion(Process())))
        assert all(math.isfinite(r.loss) and math.isfinite(r.grad_norm) for r in records)
    exact, coarse = (trained[precision].tensors() for precision in ("no", "bf16"))
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in coarse.values())
    gap = max(float((exact[name] - coarse[name]).abs().max()) for name in exact if name.startswith("model."))
    assert 0 < gap < 6 * 2 * SPEC.lr  # autocast was on; Adam moves a weight by about the rate at most


def test_mirrored_images_are_trained_on_when_asked(digits: Images):
    seen: dict[bool, torch.Tensor] = {}
    for flip in (False, True):
        model = tiny()

        def objective(batch: Batch, flip: bool = flip, model: UNet2DModel = model) -> Iterator[torch.Tensor]:
            seen[flip] = batch.clean
            yield predictor(model)(batch.clean, torch.zeros(len(batch.clean)), {}, Memo()).square().mean()

        run(TrainState.new(model, SPEC), digits, replace(SPEC, steps=1, batch=64), objective, flip=flip)
    plain = (seen[True] == seen[False]).flatten(1).all(1)
    mirrored = (seen[True] == seen[False].flip(-1)).flatten(1).all(1)
    assert (plain | mirrored).all() and 16 < int(mirrored.sum()) < 48


# ---- divergence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("at", [5, 9, 10])  # between two records, and right before one
def test_a_loss_or_gradient_that_is_not_finite_stops_the_training_before_the_next_record(digits, bad, at):
    model = tiny()
    state, plain = TrainState.new(model, SPEC), dense_objective(model, Diffusion(Process()))

    def objective(batch: Batch) -> Iterator[torch.Tensor]:
        yield from plain(batch)
        if batch.step == at - 1:  # the root's slope at 0 is infinite, its value is not
            zero = next(model.parameters()).sum() * 0
            yield zero / 0 if bad == "loss" else zero.sqrt()

    spec, seen = replace(SPEC, steps=20, log_every=5), []
    with pytest.raises(DivergedError, match=r"that is not finite.* train.lr below") as caught:
        for record in train(state, digits, spec, objective, Accelerator(cpu=True)):
            seen.append(record.step)
            assert all(value.isfinite().all() for value in state.tensors().values())
    assert seen == [step for step in (5, 10, 15, 20) if step < at]
    spread = bad == "gradient" and at % 5  # by then the loss of a later step told of it
    assert f"got a {'loss' if spread else bad} that" in str(caught.value)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_leaves_the_callers_random_numbers_alone_and_draws_what_a_seeded_torch_draws(digits, dropout):
    """Oracle: a straight step under torch.manual_seed of the step's seed."""
    model = tiny()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = dropout
    spec, diffusion = replace(SPEC, steps=1), Diffusion(Process())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_mix(0, 0, 0))
        clean = digits.batch(ShuffledOrder(len(digits), 0).take(0, spec.batch))
        with torch.no_grad():
            wanted = diffusion.loss(predictor(model.train()), Batch(clean, {}))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    (record,) = run(TrainState.new(model, spec), digits, spec, dense_objective(model, diffusion))
    assert record.loss == pytest.approx(float(wanted), abs=1e-6)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert np.array_equal(np.random.get_state()[1], states[1])
