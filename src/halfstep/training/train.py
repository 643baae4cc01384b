"""The one training loop: a generator that yields records, on accelerate, with EMA and bit-exact resume.

Everything random in step k is drawn from a seed made of (seed, k), so a state needs no random-number state: a run that
was killed and resumed draws what the uninterrupted run draws. Of several processes each draws the numbers of the whole
step and takes those of its images (`core/share.py`): the step is the same however many compute it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.models.embeddings import LabelEmbedding
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch.distributed.optim import ZeroRedundancyOptimizer

from halfstep.core.disk import write_atomic
from halfstep.core.errors import DivergedError, ModelError, RunError
from halfstep.core.machine import this_process
from halfstep.core.process import Process
from halfstep.core.recipe import TrainSpec
from halfstep.core.share import Share, shares_of
from halfstep.core.typed import shown
from halfstep.data.images import Images
from halfstep.data.latents import Latents
from halfstep.data.order import BufferedOrder
from halfstep.engine.text import Captioned
from halfstep.nets.content import digest_tensors
from halfstep.nets.denoiser import Cond, Memo, Predict, class_count, cond_of, cond_to, predictor
from halfstep.nets.weights import open_weights


@dataclass(frozen=True)
class TrainRecord:
    """What one logged step tells: mean loss since the last record, learning rate, gradient norm before clipping."""

    step: int
    loss: float
    lr: float
    grad_norm: float


@dataclass(frozen=True, kw_only=True)
class Logged:
    """A line of log.jsonl: which training, and what a `TrainRecord` tells."""

    tag: str
    step: int
    loss: float
    lr: float
    grad_norm: float


@dataclass(frozen=True)
class Batch:
    """clean: float32 [B,C,H,W] in [-1, 1]; cond: theirs; step: the number of the step, from 0.

    All that is random in a step is drawn from `generator`, on the device of the training, and what is chosen by the
    Python side from `choices`, on the CPU (the same one where the training is there): a choice must not wait for a GPU.
    Outside of a training they are torch's own. `share`: where these are not all images of the step, which of them; what
    is drawn for each image is drawn for all of them, and what is chosen once is then the same in every process.
    """

    clean: torch.Tensor
    cond: Cond
    step: int = 0
    generator: torch.Generator = torch.default_generator
    choices: torch.Generator = torch.default_generator
    share: Share | None = None


Taught = Images | Latents | Captioned
"""What a net is trained on."""

Objective = Callable[[Batch], Iterator[torch.Tensor]]
"""Yields the losses of one step. Each is differentiated as soon as it is yielded, so that only one graph lives at a
time; the gradients add up, which is the gradient of the summed losses."""


class Diffusion:
    """The forward process and its regression loss (DDPM, arXiv 2006.11239, eq. 14; any prediction type; of flow
    matching that of arXiv 2209.03003, eq. 1, at its timesteps with their shift).

    Raises RecipeError for betas that leave no signal.
    """

    def __init__(self, process: Process):
        process.check()
        self.process = process

    @functools.cached_property
    def scheduler(self) -> DDPMScheduler:
        """The process as diffusers' training scheduler. Raises RecipeError for flow matching, which has none."""
        return self.process.scheduler()

    def draw(
        self,
        clean: torch.Tensor,
        generator: torch.Generator = torch.default_generator,
        share: Share | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw timesteps and noise; return (noisy sample, timestep, target), the target by prediction type. `share`:
        which images of a step these are, for all of which it is drawn."""
        drawn: dict[str, Any] = {"generator": generator, "device": generator.device}
        count, steps = share.whole if share else len(clean), self.process.timesteps
        noise = torch.randn((count, *clean.shape[1:]), dtype=clean.dtype, **drawn)
        timestep = torch.randint(0, steps, (count,), **drawn)
        if share:
            noise, timestep = share.of(noise), share.of(timestep)
        noise, timestep = noise.to(clean.device), timestep.to(clean.device)
        if self.process.is_flow:
            return self._flow(clean, noise, (timestep + 1) / steps)
        noisy = self.scheduler.add_noise(clean, noise, timestep)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                target = noise
            case "v_prediction":
                target = self.scheduler.get_velocity(clean, noise, timestep)
            case _:
                target = clean
        return noisy, timestep, target

    def _flow(
        self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same of flow matching, at even noise levels [B] in (0, 1], which the process shifts."""
        shift = self.process.shift
        level = shift * level / (1 + (shift - 1) * level)
        part = level.reshape(-1, *[1] * (clean.ndim - 1)).to(clean.dtype)
        return (1 - part) * clean + part * noise, level * self.process.timesteps, noise - clean

    def loss(self, predict: Predict, batch: Batch) -> torch.Tensor:
        noisy, timestep, target = self.draw(batch.clean, batch.generator, batch.share)
        return F.mse_loss(predict(noisy, timestep, batch.cond, Memo()).float(), target)


def dense_objective(model: torch.nn.Module, diffusion: Diffusion) -> Objective:
    """One plain denoising loss per step."""
    predict = predictor(model)

    def objective(batch: Batch) -> Iterator[torch.Tensor]:
        yield diffusion.loss(predict, batch)

    return objective


STATE = "a training state as it was written"
AGAIN = "delete that file to train again from the start"


def _require_like(found: Mapping[str, Any], wanted: Mapping[str, Any], file: Path) -> None:
    """Raise RunError unless every tensor is wanted and as wanted, and none is missing; slots come all or none."""
    slots = {name.rsplit(".", 1)[0] for name in found if name.startswith("optimizer.")}
    need = [name for name in wanted if not name.startswith("optimizer.") or name.rsplit(".", 1)[0] in slots]
    for name in [*need, *found]:
        if found.get(name) != wanted.get(name):
            here, there = (f"{name} {one.get(name, 'missing')}" for one in (found, wanted))
            raise RunError(got=here, expected=f"{there}, as the recipe's model", where=file, do=AGAIN)


def _count(text: str | None, name: str, file: Path, most: int | None) -> int:
    """A count of steps from the metadata. Raises RunError for none, a negative one, and one above `most`."""
    number = int(text) if text and text.isascii() and text.isdecimal() and len(text) < 16 else -1
    if number < 0 or (most is not None and number > most):
        limit = "" if most is None else f" to {most}"
        raise RunError(got=f"{name} {shown(text)}", expected=f"a whole number from 0{limit}", where=file, do=AGAIN)
    return number


@dataclass
class TrainState:
    """What a step changes: the model's weights, their moving average, the optimizer and the step count."""

    model: torch.nn.Module
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    step: int = 0

    @classmethod
    def new(cls, model: torch.nn.Module, spec: TrainSpec) -> TrainState:
        """The state of the first step. With `spec.sharded` each of several processes keeps a part of the optimizer's
        moments alone."""
        ema = EMAModel(model.parameters(), decay=spec.ema_decay, foreach=True)
        how: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay}
        one = this_process() if spec.sharded else None
        if one is None or one.num_processes == 1:
            return cls(model, ema, torch.optim.AdamW(model.parameters(), fused=True, **how))
        model.to(one.device)  # it sends the weights from where they are now
        on_cpu = (
            one.device.type == "cpu"
        )  # what a state brings back has step counts on the CPU, which fused CUDA refuses
        sharded = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, fused=on_cpu, **how)
        return cls(model, ema, sharded)

    def gather(self) -> None:
        """Bring the optimizer's moments to the first process where they are sharded, for `tensors`; every process has
        to call it."""
        if isinstance(self.optimizer, ZeroRedundancyOptimizer):
            self.optimizer.consolidate_state_dict(to=0)

    def to(self, device: torch.device) -> None:
        """Move everything that a step touches; the optimizer follows its parameters."""
        self.model.to(device)
        self.ema.to(device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name; scalars of the optimizer included."""
        found = self._weights()
        for i, slots in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{i}.{slot}": value for slot, value in slots.items()}
        return found

    def _weights(self) -> dict[str, torch.Tensor]:
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        return found | {f"ema.{i}": value for i, value in enumerate(self.ema.shadow_params)}

    def save(self, file: Path, stamp: str) -> None:
        """Write the whole state as one safetensors file; `stamp` names the recipe it belongs to.

        A digest of every bit goes into its metadata, which `load` compares.
        """
        tensors = {name: value.detach().contiguous().cpu() for name, value in self.tensors().items()}
        meta = {"step": str(self.step), "ema_step": str(self.ema.optimization_step), "stamp": stamp}
        meta["digest"] = digest_tensors(tensors, *meta.values())
        write_atomic(file, lambda path: save_file(tensors, path, metadata=meta))

    def load(self, file: Path, stamp: str, steps: int | None = None) -> bool:
        """Continue from `file`, at most at step `steps`. False: it is of before 2026-11-26 and has no digest.

        Raises RunError, and changes nothing, when it is cut off, belongs to another recipe, has other tensors or
        shapes than this state, holds NaN or infinity, or is not what was written.
        """
        wanted = self._wanted()
        with open_weights(file, what="a training state", do=AGAIN, error=RunError) as opened:
            meta = opened.metadata() or {}
            if not same_training(meta.get("stamp", ""), stamp):
                raise RunError(
                    got="the state of another recipe", expected="the same recipe", where=file, do="choose another --out"
                )
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            _require_like(shapes, {name: tuple(value.shape) for name, value in wanted.items()}, file)
            tensors = {name: opened.get_tensor(name) for name in shapes}
        _require_like({n: v.dtype for n, v in tensors.items()}, {n: v.dtype for n, v in wanted.items()}, file)
        step, ema_step = (_count(meta.get(name), name, file, steps) for name in ("step", "ema_step"))
        stored = meta.pop("digest", None)
        if stored not in (None, digest_tensors(tensors, meta["step"], meta["ema_step"], meta["stamp"])):
            raise RunError(got="bytes that changed after they were written", expected=STATE, where=file, do=AGAIN)
        broken = [n for n, v in tensors.items() if v.is_floating_point() and not bool(v.isfinite().all())]
        if broken:
            raise RunError(got=f"NaN or infinity in {broken[0]}", expected=STATE, where=file, do=AGAIN)
        self._take(tensors)
        self.step, self.ema.optimization_step = step, ema_step
        return stored is not None

    def _wanted(self) -> dict[str, torch.Tensor]:
        """A tensor like every one that a state may hold; only weights that were trained have optimizer slots."""
        found = self._weights()
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for i, weight in enumerate(weights):
            found |= {f"optimizer.{i}.{slot}": weight for slot in ("exp_avg", "exp_avg_sq")}
            found[f"optimizer.{i}.step"] = torch.zeros(())
        return found

    def _take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.model.load_state_dict({n[6:]: v for n, v in tensors.items() if n.startswith("model.")})
        for i, shadow in enumerate(self.ema.shadow_params):
            shadow.copy_(tensors[f"ema.{i}"])
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, slot = name.split(".")
                slots.setdefault(int(index), {})[slot] = value
        groups = torch.optim.Optimizer.state_dict(self.optimizer)[
            "param_groups"
        ]  # a sharded one has none of its own yet
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})

    def advance(self, rate: float) -> None:
        """One step along the gradients at a learning rate; they are gone then."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.model.parameters())
        self.step += 1

    def restart_average(self) -> None:
        """Let the moving average begin again at the present weights."""
        for shadow, parameter in zip(self.ema.shadow_params, self.model.parameters(), strict=True):
            shadow.copy_(parameter.detach())
        self.ema.optimization_step = 0

    def average(self) -> dict[str, torch.Tensor]:
        """The state dict of the moving average (parameters averaged, buffers as they are)."""
        weights = dict(self.model.state_dict())
        names = [name for name, _ in self.model.named_parameters()]
        return weights | dict(zip(names, self.ema.shadow_params, strict=True))


def my_shares(spec: TrainSpec) -> Sequence[Share | None]:
    """What this process computes of every step. Raises RecipeError where the images do not divide among all of them."""
    one = this_process()
    return shares_of(spec.batch, spec.accumulate, one.num_processes, one.process_index)


def require_trainable(net: Any, spec: TrainSpec, *, cut: bool = False) -> None:
    """Let a net compute its activations twice where the recipe says so. Raises ModelError where it keeps them.

    cut: the losses run it on other weights than its own, which are gone when its activations would be made again.
    """
    if not spec.checkpointing:
        return
    where, do = "train.checkpointing", "leave it out; train.accumulate saves memory too"
    kind = type(net).__name__
    if cut:
        got, expected = "a training on slices or masks of the weights", "one on the weights themselves"
        raise ModelError(got=got, expected=expected, where=where, do=do)
    if not getattr(net, "_supports_gradient_checkpointing", False):
        raise ModelError(got=f"a {kind}, which keeps its activations", expected="a net that can", where=where, do=do)
    net.enable_gradient_checkpointing()


def learning_rate(step: int, spec: TrainSpec) -> float:
    """Linear warm-up over `spec.warmup` steps, then cosine to zero or constant. `step` counts from 0."""
    if step < spec.warmup:
        return spec.lr * (step + 1) / spec.warmup
    if spec.schedule == "constant":
        return spec.lr
    progress = (step - spec.warmup) / max(1, spec.steps - spec.warmup)
    return spec.lr * 0.5 * (1 + math.cos(math.pi * progress))


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 autocast pays for training here: CPUs with AMX (a step in 39 % of the time) or with AVX-512 bf16
    (60 %), recent GPUs."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def use_bf16(spec: TrainSpec, device: torch.device) -> bool:
    """Whether the recipe's precision means bf16 autocast on this device."""
    return spec.precision == "bf16" or (spec.precision == "auto" and fast_bf16(device))


def train(
    state: TrainState,
    images: Images | Latents | Captioned,
    spec: TrainSpec,
    objective: Objective,
    accelerator: Accelerator,
    *,
    seed: int = 0,
    flip: bool = False,
) -> Iterator[TrainRecord]:
    """Train from `state.step` to `spec.steps`; yields a record every `spec.log_every` steps and at the last.

    The state is changed in place and is whole whenever a record is yielded. Raises DivergedError in place of a record
    when a loss or a gradient since the one before was not finite, so that what is saved at a record is sound. Models
    are not wrapped: with several processes the gradients are averaged once per step, which also holds for losses that
    use slices of the weights. A process computes its share of the step's images, in `spec.accumulate` parts.
    """
    device, world = accelerator.device, accelerator.num_processes
    shares = my_shares(spec)
    lessons = Lessons(images, seed, spec.batch, flip, _wants_labels(state.model), _drops(state.model))
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    state.model.train()
    bf16, since = use_bf16(spec, device), 0
    losses, norms = torch.zeros((), device=device), torch.zeros((), device=device)  # read at a record: it costs a wait
    coming = lessons.coming(range(state.step, spec.steps), shares)
    for step in range(state.step, spec.steps):
        for share in shares:
            with lessons.batch(step, share, *next(coming), device) as batch:
                for loss in _autocast(objective(batch), device, bf16):
                    if len(shares) > 1:
                        loss = loss / len(shares)
                    accelerator.backward(loss)
                    losses += loss.detach()
        if world > 1:
            _average_gradients(parameters, accelerator)
        norm = torch.nn.utils.clip_grad_norm_(parameters, spec.clip_norm or math.inf)
        norms += norm
        rate = learning_rate(step, spec)
        state.advance(rate)
        since += 1
        if state.step % spec.log_every == 0 or state.step == spec.steps:
            losses = accelerator.reduce(losses, "mean") if world > 1 else losses
            _require_finite(losses.item(), norms.item(), state.step, spec, bf16)
            yield TrainRecord(state.step, losses.item() / since, rate, float(norm))
            losses.zero_()
            norms.zero_()
            since = 0


def _average_gradients(parameters: Sequence[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """The mean of every gradient over the processes, in one message. Which weights have one follows from the losses,
    whose choices are the same in every process."""
    given = [p for p in parameters if p.grad is not None]
    mean = accelerator.reduce(torch.cat([p.grad.flatten() for p in given if p.grad is not None]), "mean")
    for p, part in zip(given, mean.split([p.numel() for p in given]), strict=True):
        p.grad = part.view_as(p)


@dataclass(frozen=True)
class Lessons:
    """What the steps of a training are made of: `count` images each, in the order of a seed, mirrored at random where
    `flip` says so, with their classes where the model takes some (`labelled`). `drops`: the model draws dropout."""

    images: Taught
    seed: int
    count: int
    flip: bool
    labelled: bool
    drops: bool

    def coming(self, steps: Iterable[int], shares: Sequence[Share | None]) -> Iterator[tuple[torch.Tensor, Taught]]:
        """For every share of every step its index and the images that it is of, decoded ahead where they have to be."""
        n, buffer = len(self.images), self.images.buffer
        order = BufferedOrder(n, self.seed, buffer) if buffer else ShuffledOrder(n, self.seed)
        places = ((step * self.count, share or Share(0, self.count, self.count)) for step in steps for share in shares)
        return self.images.coming(order.take(begin + share.first, share.count) for begin, share in places)

    @contextlib.contextmanager
    def batch(
        self, step: int, share: Share | None, index: torch.Tensor, seen: Taught, device: torch.device
    ) -> Iterator[Batch]:
        """A step's images, or a share of them, with its random numbers for as long as it is worked on."""
        with _random(self.seed, step, device, share, self.drops) as (choices, generator):
            flips = torch.rand(self.count, generator=choices) < 0.5 if self.flip else None
            flips = share.of(flips) if share and flips is not None else flips
            cond = _cond_of(seen, index, self.labelled, choices, share)
            clean = seen.batch(index, flip=flips, generator=choices, share=share).to(device, non_blocking=True)
            yield Batch(clean, cond_to(cond, device), step, generator, choices, share)


@contextlib.contextmanager
def _random(
    seed: int, step: int, device: torch.device, share: Share | None, drops: bool
) -> Iterator[tuple[torch.Generator, torch.Generator]]:
    """The random numbers of one step, on the CPU and on the device; torch's global ones stay as they are.

    Dropout can only draw from the global ones: with it those are seeded for the step, and then put back. Where a step
    is shared out, what is dropped is not what one process would drop: a layer draws for the images that it is given.
    """
    number = _mix(seed, step, 0)
    with contextlib.ExitStack() as stack:
        if drops:
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else ()))
            torch.manual_seed(number if share is None else _mix(seed, step, 1, share.first))
        if drops and share is None:
            on_gpu = device.type == "cuda"
            here = torch.cuda.default_generators[device.index or 0] if on_gpu else torch.default_generator
            yield torch.default_generator, here
            return
        choices = torch.Generator().manual_seed(number)
        yield choices, choices if device.type == "cpu" else torch.Generator(device).manual_seed(number)


def _require_finite(loss: float, norm: float, step: int, spec: TrainSpec, bf16: bool) -> None:
    """Raise DivergedError unless the sums of losses and of gradient norms up to a step are finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    ways = [f"train.lr below {spec.lr:g}"]
    ways += ["train.clip_norm=1"] if not spec.clip_norm else []
    ways += ["train.precision=no"] if bf16 else []
    what = "a gradient" if math.isfinite(loss) else "a loss"
    raise DivergedError(
        got=f"{what} that is not finite, in the last {spec.log_every} steps",
        expected="finite numbers",
        where=f"training at step {step}",
        do=f"repeat the command with --set {' or '.join(ways)}; it goes on from the last saved state",
    )


def _autocast(losses: Iterator[torch.Tensor], device: torch.device, bf16: bool) -> Iterator[torch.Tensor]:
    """Compute each loss under autocast, and hand it out for its backward pass outside of it."""
    while True:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = next(losses, None)
        if loss is None:
            return
        yield loss


class ShuffledOrder:
    """Positions 0, 1, 2, … of an endless shuffled pass over n images; each epoch has its own permutation."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed, self._epoch, self._permutation = n, seed, -1, torch.empty(0, dtype=torch.long)

    def take(self, start: int, count: int) -> torch.Tensor:
        """The image indices at positions start … start + count - 1, int64 [count]."""
        parts = []
        while count:
            epoch, offset = divmod(start, self.n)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(_mix(self.seed, epoch, 7919))
                self._epoch, self._permutation = epoch, torch.randperm(self.n, generator=generator)
            part = self._permutation[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)


def _drops(model: torch.nn.Module) -> bool:
    """Whether a training of the model draws dropout."""
    kinds = torch.nn.modules.dropout._DropoutNd, LabelEmbedding
    return any(getattr(m, "p", getattr(m, "dropout_prob", 0)) > 0 for m in model.modules() if isinstance(m, kinds))


def _cond_of(
    images: Images | Latents | Captioned,
    index: torch.Tensor,
    labelled: bool,
    choices: torch.Generator,
    share: Share | None,
) -> Cond:
    """What these images are conditional on."""
    if isinstance(images, Captioned):
        return images.batch_cond(index, choices, share)
    return cond_of(images.batch_labels(index) if labelled else None)


def _wants_labels(model: torch.nn.Module) -> bool:
    config: Any = model.config
    return class_count(config) > 0


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several small numbers (an FNV-like hash; any fixed mixing does)."""
    value = 1469598103934665603
    for number in numbers:
        value = ((value ^ (number & (2**63 - 1))) * 1099511628211) % 2**63
    return value


def stamp(*parts: object) -> str:
    """A text that is equal exactly when a state may be resumed."""
    return json.dumps(parts, sort_keys=True, default=repr)


def same_training(stored: str, asked: str) -> bool:
    """Whether a state with one stamp may be gone on with under another: all but the images of a step is equal."""
    return stored == asked or ((one := _parts(stored)) is not None and one[0] == (_parts(asked) or [None])[0])


def batch_of(stored: str) -> int | None:
    """How many images a step had under a stamp; None where it does not say."""
    found = _parts(stored)
    return None if found is None else found[1]


def _parts(text: str) -> tuple[Any, int] | None:
    """A stamp of a run (see `loop`) without the images of a step, and these. Until 2026-11-27 each process had so many,
    and how many processes there were stood at its end."""
    try:
        spec, *others = json.loads(text)
        batch = spec.pop("batch")
        return ([spec, *others], batch) if len(others) < 7 else ([spec, *others[:-1]], batch * others[-1])
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
