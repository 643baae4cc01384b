"""Run a plan: a diffusers pipeline whose denoiser may change at every step."""

from __future__ import annotations

import json
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from halfstep.core.disk import read_json, write_atomic
from halfstep.core.errors import ModelError, PlanError
from halfstep.core.plan import Price, Row, Sampler, StepPlan
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec
from halfstep.core.sums import require_whole, write_sums
from halfstep.data.classes import numbers_of, read_classes, write_classes
from halfstep.data.latents import decode
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions, cond_for
from halfstep.engine.networks import RowCall, networks_of, require_fed
from halfstep.engine.samplers import plain_config, rehearse, sampler_of, scheduler_of, step_options, with_timesteps
from halfstep.nets.denoiser import (
    Cond,
    Memo,
    class_count,
    cond_of,
    corrected_as,
    require_same_shape,
    sample_shape,
)
from halfstep.nets.models import load_vae
from halfstep.nets.weights import require_safetensors

Prices = Mapping[str, Price | int]
"""Of one call of each entry, per image; a number alone is its MACs."""


def plan_for(bank: Bank, scheduler: SchedulerMixin, steps: int, prices: Prices | None = None) -> StepPlan:
    """The plan that runs the bank's reference, guided as the bank says, at every step of a diffusers scheduler.

    `prices`: in place of the bank's own, which take a tenth of a second each to count; nothing is fixed then.
    Raises PlanError for a scheduler that no plan may name (see `samplers`), whose settings do not go together, or that
    takes another prediction than the bank gives; ModelError for a bank that predicts more than one picture.
    """
    require_same_shape(bank.config, f"bank entry {bank.reference!r}")
    name = type(scheduler).__name__
    config = plain_config(scheduler)
    process = Process.of({**config, "_class_name": name}, where=name, error=PlanError)
    if process.prediction != bank.prediction_type:
        raise PlanError(
            got=f"a scheduler for {process.prediction}",
            expected=f"{bank.prediction_type}, as the bank predicts",
            where=name,
            do=f"set its prediction_type to {bank.prediction_type!r}",
        )
    fresh = with_timesteps(scheduler_of(name, config, name), steps)
    rehearse(fresh)
    plan = StepPlan(
        rows=tuple(Row(float(t), bank.reference) for t in fresh.timesteps),
        sampler=Sampler(name, config, steps),
        reference=bank.reference,
        prices=_prices(bank.prices() if prices is None else prices),
        fixed=bank.fixed() if prices is None else Price(0),
    )
    return plan.with_guidance(bank.guidance)


def _prices(given: Prices) -> dict[str, Price]:
    return {name: one if isinstance(one, Price) else Price(one) for name, one in given.items()}


def reference_plan(
    bank: Bank,
    noise: Process | Mapping[str, Any],
    sample: SampleSpec,
    prices: Prices | None = None,
    own: Mapping[str, Any] | None = None,
) -> StepPlan:
    """The reference plan of a recipe's sampler; `noise`: the process of the model's training, or its config; `prices`
    as in `plan_for`; `own`: the scheduler config that the model came with (`noise`, where that is one)."""
    if own is None and not isinstance(noise, Process):
        own = noise
    return plan_for(bank, sampler_of(Process.of(noise), sample, own), sample.steps, prices)


def fewer_steps(plan: StepPlan, steps: int) -> StepPlan:
    """The reference in every row of the same sampler with another number of steps."""
    scheduler = with_timesteps(scheduler_of(plan.sampler.name, plan.sampler.config), steps)
    rows = tuple(Row(float(t), plan.reference) for t in scheduler.timesteps)
    return replace(plan, rows=rows, sampler=replace(plan.sampler, steps=steps)).uniform()


def build_scheduler(plan: StepPlan, device: torch.device | str = "cpu") -> SchedulerMixin:
    """A fresh scheduler for one trajectory, its timesteps set. Raises PlanError when they are not the plan's."""
    sampler = plan.sampler
    scheduler = with_timesteps(scheduler_of(sampler.name, sampler.config), sampler.steps, device)
    own = [float(t) for t in scheduler.timesteps]
    for i, row in enumerate(plan.rows):
        if i >= len(own) or not abs(own[i] - row.timestep) <= 1e-3:
            raise PlanError(
                got=f"timestep {row.timestep:g} in row {i}",
                expected=f"{own[i]:g}" if i < len(own) else f"{len(own)} rows",
                where=f"plan for {sampler.name} with {sampler.steps} steps",
                do="make the plan with the same scheduler and number of steps",
            )
    if len(own) != len(plan.rows):
        raise PlanError(
            got=f"{len(plan.rows)} rows",
            expected=f"{len(own)}",
            where=f"plan for {sampler.name}",
            do="give one per call",
        )
    return scheduler


def image_generators(seed: int, start: int, count: int) -> list[torch.Generator]:
    """One generator per image: image k depends on (seed, k) alone, not on the batch it is drawn in."""
    return [torch.Generator().manual_seed((seed * 1_000_003 + start + i) % 2**63) for i in range(count)]


@dataclass(frozen=True, slots=True)
class Step:
    """What one row did: `sample` [B,C,H,W] before the call, as the scheduler holds it, the network's own `prediction`
    of the same shape, neither guided nor corrected, that as it was `used`, and the sample `after` the row."""

    row: int
    sample: torch.Tensor
    prediction: torch.Tensor
    used: torch.Tensor
    after: torch.Tensor


def trajectory(
    bank: Bank,
    plan: StepPlan,
    sample: torch.Tensor,
    generators: Sequence[torch.Generator],
    cond: Cond | None = None,
    *,
    start: int = 0,
    scheduler: SchedulerMixin | None = None,
) -> Iterator[Step]:
    """One trajectory from noise [B,C,H,W] (unit variance, before the scheduler's scaling) to an image in about [-1, 1].

    With `start` and a `scheduler` that was stopped there, a trajectory is continued from row `start`: `sample` is then
    the scheduler's own. Raises PlanError, before the first step, for a plan that is not the scheduler's, and for a row
    that reuses features which no row from `start` on has left before it.
    """
    networks = networks_of(bank, plan, start)
    if scheduler is None:
        scheduler = build_scheduler(plan, sample.device)
        sample = sample * scheduler.init_noise_sigma
    return walk(networks, plan.rows, scheduler, sample, generators, cond, start)


@torch.inference_mode()  # around each row, not around what its caller does between two of them
def walk(
    networks: Sequence[RowCall],
    rows: Sequence[Row],
    scheduler: Any,
    sample: torch.Tensor,
    generators: Sequence[torch.Generator] = (),
    cond: Cond | None = None,
    start: int = 0,
) -> Iterator[Step]:
    """The one sampling loop: row after row a call, its guide's, its correction, and the scheduler's step.

    networks: by row, what it calls, its guide with it.  scheduler: its timesteps are those of the rows; it
    stands at row `start`.
    """
    kind, timesteps, cond, memo = scheduler.config.prediction_type, scheduler.timesteps, cond or {}, Memo()
    options = step_options(scheduler, generators)
    levels = levels_of(scheduler) if kind != "epsilon" and any(row.corrected for row in rows) else timesteps
    for i in range(start, len(rows)):
        row, t = rows[i], timesteps[i]
        inputs = scheduler.scale_model_input(sample, t)
        inputs = inputs.flatten().view(inputs.shape)  # plain strides: else one entry's layout rules the next one's
        found, used = predicted(networks[i], row, inputs, t, cond, memo)
        if row.corrected:
            used = corrected_as(kind, used, inputs, levels[i], *row.correction)
        after = scheduler.step(used, t, sample, return_dict=False, **options)[0]
        yield Step(i, sample, found, used, after)
        sample = after


def last(steps: Iterator[Step]) -> torch.Tensor:
    """Run a trajectory to its end and return its final sample."""
    [end] = deque(steps, maxlen=1)
    return end.after


def denoise(
    bank: Bank, plan: StepPlan, noise: torch.Tensor, generators: Sequence[torch.Generator], cond: Cond | None = None
) -> torch.Tensor:
    """The image at the end of a whole `trajectory`."""
    return last(trajectory(bank, plan, noise, generators, cond))


def predicted(
    call: RowCall, row: Row, sample: torch.Tensor, timestep: torch.Tensor, cond: Cond, memo: Memo
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a row's entry predicts of the scheduler's scaled sample, and that as its guide leaves it."""
    found, other = call(sample, timestep, cond, memo)
    return found, found if row.guide is None or other is None else guided(found, other, row.guide.weight)


def guided(own: torch.Tensor, guide: torch.Tensor, weight: float) -> torch.Tensor:
    """A prediction led away from a worse one of the same input and conditions, all of one shape; weight 1 is unguided.

    Autoguidance (arXiv 2406.02507) with D_1 the own net and D_0 its guide: D_w = w D_1 + (1 - w) D_0. The same in
    noise, v and clean sample, which are affine in one another at one input and timestep.
    """
    return guide + weight * (own - guide)  # w D_1 + (1 - w) D_0


def levels_of(scheduler: Any) -> torch.Tensor:
    """alphas_cumprod at every call, [rows]: what the network's input is mixed by, once the scheduler has scaled it."""
    if hasattr(scheduler, "sigmas"):  # of float timesteps too
        return 1 / (1 + scheduler.sigmas[: len(scheduler.timesteps)].square())
    return scheduler.alphas_cumprod[scheduler.timesteps.cpu().long()]


def start_noise(bank: Bank, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Unit noise [B,C,H,W], one image per generator, drawn on the generator's own device; `image_generators` are on the
    CPU, so that devices agree."""
    shape = sample_shape(bank.config)
    noise = [torch.randn(shape, generator=g, device=g.device).to(bank.device) for g in generators]
    return torch.cat(noise).to(bank.dtype)


def sample_images(
    bank: Bank,
    plan: StepPlan,
    count: int,
    *,
    seed: int,
    batch: int = 256,
    conditions: Conditions | None = None,
    first: int = 0,
) -> Iterator[torch.Tensor]:
    """Images first … first + count - 1 of a seed, as batches in [-1, 1] (clamped), decoded where they are latents.

    `conditions`: which image is drawn under what (default: the classes in turn).
    """
    for begin in range(first, first + count, batch):
        n = min(batch, first + count - begin)
        generators = image_generators(seed, begin, n)
        noise = start_noise(bank, generators)
        yield to_images(bank, denoise(bank, plan, noise, generators, cond_for(bank, begin, n, conditions)))


def to_images(bank: Bank, sample: torch.Tensor) -> torch.Tensor:
    """What `denoise` gives, decoded where the bank works on latents, clamped to [-1, 1].

    Raises ModelError for pictures that are not finite, which would be stored as black ones.
    """
    images = sample if bank.vae is None else decode(bank.vae, sample)
    if not bool(images.isfinite().all()):
        raise ModelError(
            got="pictures that are not finite",
            expected="numbers",
            where="sampling",
            do="try another sampler or float32; if neither helps, the weights are broken",
        )
    return images.clamp(-1, 1)


class StepAwarePipeline(DiffusionPipeline):
    """A diffusers pipeline that runs a `StepPlan` over a `Bank`.

    `pipe(batch_size=4, seed=0).images` gives PIL images; image k depends on the seed and k alone. `save_pretrained`
    writes `model_index.json`, `scheduler/`, `bank/…` and `plan.json`; weights are safetensors.
    Raises PlanError when the plan names entries that the bank lacks, or reuses features before any are left.
    """

    def __init__(self, bank: Bank, plan: StepPlan):
        super().__init__()
        for name in (plan.reference, *plan.nets):
            if name not in bank:
                raise PlanError(
                    got=f"entry {name!r}", expected=f"one of {', '.join(bank)}", where="plan", do="use the bank's names"
                )
        require_fed(bank, plan)
        scheduler = build_scheduler(plan)
        rehearse(scheduler)
        self.register_modules(bank=bank, scheduler=scheduler)
        self.plan = plan

    @property
    def components(self) -> dict[str, Any]:
        """What `to` moves and what the folder holds."""
        return {"bank": self.bank, "scheduler": self.scheduler}  # the bank holds the VAE

    @property
    def process(self) -> Process:
        """The process that the bank was trained under, as the plan's sampler carries it."""
        return Process.of(
            self.plan.sampler.scheduler_config, where="the plan's scheduler", latent=self.bank.vae is not None
        )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: str | int | Sequence[str | int] | torch.Tensor | None = None,
        seed: int = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        plan: StepPlan | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw `batch_size` images. `class_labels`: one class for all of them or one for each, by name or number
        (default: the classes in turn). `generator` (one, or one per image) takes the place of `seed`; `plan` replaces
        the pipeline's own. `output_type`: "pil", "np" ([B,H,W,C] in [0, 1]) or "pt" ([B,C,H,W] in [0, 1])."""
        bank, plan = self.bank, plan or self.plan
        if batch_size < 1:
            raise PlanError(got=batch_size, expected="1 or more", where="batch_size", do="ask for at least one image")
        cond = cond_for(bank, 0, batch_size) if class_labels is None else self._asked(class_labels, batch_size)
        if generator is None:
            generator = image_generators(seed, 0, batch_size)
        if isinstance(generator, list):
            if len(generator) != batch_size:
                raise PlanError(
                    got=f"{len(generator)} generators",
                    expected=f"{batch_size}",
                    where="generator",
                    do="give one per image",
                )
            noise, generators = start_noise(bank, generator), generator
        else:
            shape = sample_shape(bank.config, batch_size)
            noise = torch.randn(shape, generator=generator, device=generator.device).to(bank.device, bank.dtype)
            generators = [generator]
        with self.progress_bar(total=len(plan.rows)) as bar:
            for step in trajectory(bank, plan, noise, generators, cond):
                image = step.after
                bar.update()
        image = to_images(bank, image) / 2 + 0.5
        images: Any = image
        if output_type != "pt":
            images = image.cpu().float().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _asked(self, asked: str | int | Sequence[str | int] | torch.Tensor, count: int) -> Cond:
        """The condition on the classes asked for. Raises PlanError."""
        given = asked.tolist() if isinstance(asked, torch.Tensor) else asked
        each = [given] * count if isinstance(given, str | int) else list(given)
        if len(each) != count:
            raise PlanError(
                got=f"{len(each)} classes", expected=f"one, or {count}", where="class_labels", do="give one per image"
            )
        numbers = numbers_of(each, class_count(self.bank.config), self.bank.classes)
        return cond_of(torch.tensor(numbers, device=self.bank.device))

    def save_pretrained(self, save_directory: str | Path, *, safe_serialization: bool = True) -> None:
        """Write the pipeline folder, whole or not at all, with the digests of its files."""
        require_safetensors(safe_serialization, "safe_serialization")
        write_atomic(Path(save_directory), self._write)

    def _write(self, folder: Path) -> None:
        folder.mkdir()
        self.bank.save_pretrained(folder / "bank")
        self.scheduler.save_pretrained(folder / "scheduler")
        self.plan.save(folder / "plan.json")
        index = {
            "_class_name": "StepAwarePipeline",
            "_diffusers_version": diffusers.__version__,
            "bank": ["halfstep.engine.bank", "Bank"],
            "scheduler": ["diffusers", self.plan.sampler.name],
        }
        if self.bank.vae is not None:
            self.bank.vae.save_pretrained(folder / "vae")
            index["vae"] = ["diffusers", type(self.bank.vae).__name__]
        write_classes(folder, self.bank.classes)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        write_sums(folder)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        use_safetensors: bool | None = True,
        local_files_only: bool = True,
    ) -> StepAwarePipeline:
        """Read a pipeline folder, in float32 or `torch_dtype`; nothing is ever fetched.

        MACs that the plan claims and the bank does not have are corrected, with a warning; one is given too for a
        folder of before files had digests. Raises RunError, ModelError or PlanError for what is missing, cut, foreign
        or changed since it was written.
        """
        require_safetensors(use_safetensors, "use_safetensors")
        folder = Path(pretrained_model_name_or_path)
        index = read_json(folder / "model_index.json", what="a pipeline", do="give the pipeline/ folder of a run")
        if index.get("_class_name") != "StepAwarePipeline":
            raise PlanError(
                got=f"a {index.get('_class_name')}",
                expected="a StepAwarePipeline",
                where=folder,
                do="load it with diffusers, or make a step-aware one with halfstep optimize",
            )
        if not require_whole(folder):
            warnings.warn(
                f"{folder} was written before files had digests, and is believed as it is; "
                f"`halfstep verify {folder} --accept` writes them",
                stacklevel=2,
            )
        bank = Bank.from_pretrained(folder / "bank", checked=True)
        bank = bank.with_vae(load_vae(folder, checked=True), read_classes(folder, class_count(bank.config)))
        plan = _with_prices_of(bank, StepPlan.load(folder / "plan.json"), folder / "plan.json")
        pipe = cls(bank, plan)
        return pipe if torch_dtype is None else pipe.to(torch_dtype)


def _with_prices_of(bank: Bank, plan: StepPlan, where: Path) -> StepPlan:
    """The plan with the MACs that the bank's entries and its VAE have. What they cost is nothing that a file can
    decide; one of before fixed parts were told may lack its own."""
    counted = {name: price for name, price in bank.prices().items() if name in plan.prices}
    pairs = [(name, plan.prices[name].macs, price.macs) for name, price in counted.items()]
    fixed = bank.fixed()
    pairs.append(("the fixed part", plan.fixed.macs or fixed.macs, fixed.macs))
    wrong = [f"{name} {said:,} ({found:,})" for name, said, found in pairs if said != found]
    if wrong:
        told = ", ".join(wrong[:3])
        warnings.warn(f"{where}: MACs of other networks, counted anew: {told}", stacklevel=3)
    prices = {name: _as_counted(price, counted.get(name, price)) for name, price in plan.prices.items()}
    return replace(plan, prices=prices, fixed=_as_counted(plan.fixed, fixed))


def _as_counted(said: Price, counted: Price) -> Price:
    """What was said, time included, where its MACs are right."""
    return said if said.macs == counted.macs else counted
