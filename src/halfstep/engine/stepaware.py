"""A diffusers pipeline that runs a plan, with the arguments that users of diffusers know, and its folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from halfstep.core.disk import read_json, write_atomic
from halfstep.core.errors import PlanError
from halfstep.core.plan import Price, StepPlan
from halfstep.core.process import Process
from halfstep.core.sums import require_whole, write_sums
from halfstep.data.classes import numbers_of, read_classes, write_classes
from halfstep.data.prompts import NOTHING, Prompter
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import cond_for
from halfstep.engine.networks import require_fed
from halfstep.engine.samplers import rehearse
from halfstep.engine.sampling import build_scheduler, image_generators, start_noise, to_images, trajectory
from halfstep.nets.denoiser import Cond, class_count, cond_of, cond_to, flattened, sample_shape
from halfstep.nets.models import load_vae
from halfstep.nets.prompting import copy_text_encoder, load_prompter
from halfstep.nets.weights import require_safetensors

Texts = str | Sequence[str]
Generators = torch.Generator | list[torch.Generator]


class StepAwarePipeline(DiffusionPipeline):
    """A diffusers pipeline that runs a `StepPlan` over a `Bank`.

    `pipe(batch_size=4, seed=0).images` gives PIL images, of a model of text `pipe("a red shoe")`; image k depends on
    the seed and k alone. `encoder`: a pipeline folder that has the text encoder, or names it. `save_pretrained` writes
    `model_index.json`, `scheduler/`, `bank/…`, `plan.json` and the text encoder; weights are safetensors.
    Raises PlanError when the plan names entries that the bank lacks, or reuses features before any are left.
    """

    def __init__(self, bank: Bank, plan: StepPlan, encoder: str | Path | None = None):
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
        self.plan, self.encoder = plan, encoder

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
        prompt: Texts | None = None,
        batch_size: int = 1,
        class_labels: str | int | Sequence[str | int] | torch.Tensor | None = None,
        seed: int = 0,
        generator: Generators | None = None,
        plan: StepPlan | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        negative_prompt: Texts | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        callback_on_step_end: Callable[[Any, int, float, dict], dict | None] | None = None,
    ) -> ImagePipelineOutput | Any:  # a tuple without `return_dict`
        """Draw `batch_size` images, or of each `prompt` (of a model of text) `num_images_per_prompt`.

        `negative_prompt`: what guidance leads away from, one for all or one for each prompt (default: nothing).
        `guidance_scale`: in place of the weight of the plan's guided rows, where all have one. `class_labels`: one
        class for all of them or one for each, by name or number (default: the classes in turn). `generator`, one or
        one per image, takes the place of `seed`; `plan` replaces the pipeline's own. `output_type`: "pil", "np"
        ([B,H,W,C] in [0, 1]) or "pt" ([B,C,H,W] in [0, 1]). `callback_on_step_end`: called after every step as
        (pipeline, step, timestep, {"latents": sample}). Raises PlanError, and DataError for prompts that are none.
        """
        plan = _rescaled(plan or self.plan, guidance_scale)
        bank, cond = self._asked_for(prompt, negative_prompt, num_images_per_prompt, batch_size, class_labels)
        count = batch_size if prompt is None else len(next(flattened(cond))[1])
        noise, generators = _noise(bank, count, seed, generator)
        with self.progress_bar(total=len(plan.rows)) as bar:
            for step in trajectory(bank, plan, noise, generators, cond):
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step.row, plan.rows[step.row].timestep, {"latents": step.after})
                image = step.after
                bar.update()
        images: Any = to_images(bank, image) / 2 + 0.5
        if output_type != "pt":
            images = images.cpu().float().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _asked_for(
        self, prompt: Texts | None, negative: Texts | None, each: int, count: int, classes: Any
    ) -> tuple[Bank, Cond]:
        """The bank and the condition of the images. Raises PlanError for what does not go together."""
        if min(count, each) < 1:
            where = "batch_size" if count < 1 else "num_images_per_prompt"
            raise PlanError(got=min(count, each), expected="1 or more", where=where, do="ask for at least one image")
        if prompt is None:
            if negative is not None:
                raise PlanError(got="no prompt", expected="one", where="negative_prompt", do="give a prompt too")
            return self.bank, cond_for(self.bank, 0, count) if classes is None else self._asked(classes, count)
        if isinstance(prompt, int):  # as the number of images was given before there were prompts
            raise PlanError(got=prompt, expected="a text", where="prompt", do=f"write batch_size={prompt}")
        texts = [text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(each)]
        cond = cond_to(self._prompter.condition(texts), self.bank.device, self.bank.dtype)
        if negative is None:
            return self.bank, cond
        away = [negative] if isinstance(negative, str) else [text for text in negative for _ in range(each)]
        if len(away) not in (1, len(texts)):
            raise PlanError(
                got=f"{len(away)} negative prompts",
                expected=f"one, or {len(texts)}",
                where="negative_prompt",
                do="give one for each prompt",
            )
        null = self._prompter.condition([text or NOTHING for text in away])
        return self.bank.with_null(null, self.bank.guidance), cond

    @cached_property
    def _prompter(self) -> Prompter:
        """Of the prompts. Raises PlanError for a pipeline that takes none, ModelError for one without its encoder."""
        if self.bank.null is None or self.encoder is None:
            got, expected = "a prompt", "a pipeline of text, with its text encoder"
            raise PlanError(got=got, expected=expected, where="prompt", do="leave it out, or load the pipeline whole")
        return load_prompter(self.encoder, self.bank[self.bank.reference], self.bank.vae).to(self.bank.device)

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
        if self.encoder is not None and self.bank.null is not None:
            copy_text_encoder(self.encoder, folder)
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
        pipe = cls(*read_beside(bank, load_vae(folder, checked=True)))
        return pipe if torch_dtype is None else pipe.to(torch_dtype)


def read_beside(bank: Bank, vae: Any) -> tuple[Bank, StepPlan, Path | None]:
    """What a pipeline is made of, by a bank that was read from its folder: the whole bank, the plan, and the folder
    where it has a text encoder. Raises RunError, ModelError or PlanError as `StepAwarePipeline.from_pretrained`."""
    if bank.folder is None:
        got, expected = "a bank that was read from no folder", "one of a pipeline's folder"
        raise PlanError(got=got, expected=expected, where="bank", do="load it with StepAwarePipeline.from_pretrained")
    folder = bank.folder.parent
    bank = bank.with_vae(vae, read_classes(folder, class_count(bank.config)))
    plan = _with_prices_of(bank, StepPlan.load(folder / "plan.json"), folder / "plan.json")
    return bank, plan, None if bank.null is None else folder


def _rescaled(plan: StepPlan, weight: float | None) -> StepPlan:
    """A plan whose guided rows have another weight. Raises PlanError where they have several, or none is guided."""
    weights = {guide.weight for guide in plan.guides if guide is not None}
    if weight is None or weights == {weight}:
        return plan
    if len(weights) != 1:
        told = "no guided rows" if not weights else f"rows guided by {', '.join(f'{w:g}' for w in sorted(weights))}"
        got, do = f"{weight:g} for a plan with {told}", "leave it out, or draw by another plan"
        raise PlanError(got=got, expected="one weight in all guided rows", where="guidance_scale", do=do)
    return plan.with_guides([guide and guide._replace(weight=weight) for guide in plan.guides])


def _noise(
    bank: Bank, count: int, seed: int, generator: Generators | None
) -> tuple[torch.Tensor, list[torch.Generator]]:
    """The noise of so many images, and what draws more of it. Raises PlanError for another number of generators."""
    generator = image_generators(seed, 0, count) if generator is None else generator
    if not isinstance(generator, list):
        noise = torch.randn(sample_shape(bank.config, count), generator=generator, device=generator.device)
        return noise.to(bank.device, bank.dtype), [generator]
    if len(generator) != count:
        got = f"{len(generator)} generators"
        raise PlanError(got=got, expected=f"{count}", where="generator", do="give one per image")
    return start_noise(bank, generator), generator


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
        warnings.warn(f"{where}: MACs of other networks, counted anew: {told}", stacklevel=4)
    prices = {name: _as_counted(price, counted.get(name, price)) for name, price in plan.prices.items()}
    return replace(plan, prices=prices, fixed=_as_counted(plan.fixed, fixed))


def _as_counted(said: Price, counted: Price) -> Price:
    """What was said, time included, where its MACs are right."""
    return said if said.macs == counted.macs else counted
