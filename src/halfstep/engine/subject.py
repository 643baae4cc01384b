"""Subject: what a verb works on, opened once: a model's bank, process and plan, and the images as it takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from halfstep.core.errors import DataError, ModelError
from halfstep.core.plan import StepPlan
from halfstep.core.process import Process
from halfstep.core.recipe import Recipe
from halfstep.core.watch import SILENT, Watch
from halfstep.data.images import Images
from halfstep.data.latents import Latents, encode_images
from halfstep.data.prompts import Prompter
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions
from halfstep.engine.device import default_device
from halfstep.engine.entry import Entry, Int8, Reuse
from halfstep.engine.reading import about_bank, about_images, about_model
from halfstep.engine.samplers import about_own, own_class, settled
from halfstep.engine.sampling import reference_plan
from halfstep.engine.text import Captioned, captioned
from halfstep.nets.content import fingerprint
from halfstep.nets.denoiser import class_count
from halfstep.nets.fit import Fitted, names_of


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and images that are whole and fit each other: who holds one need not look at what a user named again.

    `source`, `data`: the model and the images as they were named ("" without). `bank`: of one entry, "full", where the
    model is a dense denoiser; None where a model is yet to be trained from the images. `plan`: a step-aware pipeline's
    own. `process`: the forward process of the model's training. `vae`, `classes`: what decodes its samples and the
    names of its classes, where it has them. `fitted`: the images as the model takes them; None for a verb without.
    `recipe`: with what follows from the model: its process, the images' size and channels. `scheduler`: the config of
    the scheduler that the model came with, for a recipe whose sampler is "own". `conditions`: what images are drawn
    under, of a model that is conditional on text. `prompter`: what encodes its prompts.
    """

    source: str
    data: str
    bank: Bank | None
    plan: StepPlan | None
    process: Process
    vae: Any
    classes: tuple[str, ...]
    fitted: Fitted | None
    recipe: Recipe
    scheduler: Mapping[str, Any] | None = None
    conditions: Conditions | None = None
    prompter: Prompter | None = None

    def __repr__(self) -> str:
        """What was read, in words: a model and a recipe print hundreds of lines."""
        bank = "" if self.bank is None else f": {', '.join(self.bank)}"
        return f"Subject({self.source!r}, {self.data!r}{bank}; {'; '.join(self.read()) or 'images alone'})"

    @property
    def dense(self) -> Any:
        """The denoiser that a training starts from, the bank's reference; None for images alone."""
        return None if self.bank is None else self.bank[self.bank.reference]

    @property
    def encoder(self) -> str | None:
        """The pipeline folder that has its text encoder; None for a model that takes no text."""
        return self.source if self.conditions is not None else None

    @property
    def stand_ins(self) -> Bank:
        """The bank, for verbs that cannot do without a model. Raises ModelError where there is none."""
        if self.bank is None:
            raise ModelError(got="no model", expected="one", where="--model", do="name one, or `fashion`")
        return self.bank

    @property
    def images(self) -> Images:
        """The images that fit the model. Raises DataError where there are none."""
        if self.fitted is None:
            raise DataError(got="no images", expected="some", where="--data", do="name them, e.g. folder:DIR")
        return self.fitted.images

    def encoded(self, watch: Watch = SILENT) -> Images | Latents:
        """What a denoiser is trained on: the images, or their latents where it comes with a VAE (encoded once, on the
        first call anywhere, into the cache)."""
        if self.vae is None:
            return self.images
        found = encode_images(self.vae.to(default_device()), self.images, watch=watch)
        self.vae.cpu()
        return found

    def lessons(self, watch: Watch = SILENT) -> Images | Latents | Captioned:
        """What a denoiser is trained on: `encoded`, of a model of text with the images' captions. Raises DataError
        where images have none."""
        seen = self.encoded(watch)
        null = self.stand_ins.null if self.prompter is not None else None
        if self.prompter is None or null is None:
            return seen
        return captioned(seen, self.prompter, null, self.data, self.recipe.train.dropped)

    def reference(self, bank: Bank | None = None) -> StepPlan:
        """The reference, of the model's bank or of another for its samples, in every row of the recipe's sampler."""
        bank = self.stand_ins if bank is None else bank
        return reference_plan(bank, self.process, self.recipe.sample, own=self.scheduler)

    def bank_of(self, entries: Mapping[str, Any], reference: str) -> Bank:
        """A bank of other entries for the same samples: with this process's prediction, this VAE, and the names of the
        classes, which are the images' own where the model's folder has none."""
        classes = self.classes_of(Entry.of(entries[reference]).model.config)
        beside = {} if self.bank is None else self.bank.beside
        return Bank(entries, reference, self.process.prediction, **beside | {"vae": self.vae, "classes": classes})

    def classes_of(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of the classes of a model with this config that was trained on the images."""
        return names_of(config, self.images, self.classes)

    @cached_property
    def content(self) -> dict[str, str]:
        """The fingerprints of the model and of the images, which a run records, by the names of `folder.CONTENT`."""
        found = {} if self.fitted is None else {"data_content": self.images.fingerprint}
        if self.conditions is not None:
            found["data_content"] = fingerprint(found.get("data_content", ""), self.conditions.content)
        if self.plan is not None:
            bank = self.stand_ins
            links = [entry.weights for entry in bank.entries.values()]
            reused = [link.to_json() for link in links if isinstance(link, Reuse | Int8)]  # what no weight tells of
            models = [bank[name] for name in bank.computed]
            found["model_content"] = fingerprint(*models, self.vae, self.plan.to_content(), *reused)
        elif self.bank is not None:
            found["model_content"] = fingerprint(self.dense, self.process, self.vae, self.classes, *self._own_content())
        elif self.vae is not None:
            found["model_content"] = fingerprint(self.vae)
        return found

    def _own_content(self) -> tuple[Mapping[str, Any], ...]:
        """The model's own sampler, where it is run and the process does not say it all."""
        own = self.scheduler
        if own is None or settled(self.process, self.recipe.sample, own).scheduler != "own":
            return ()
        return ({**own, "class": own_class(own)},)  # a fingerprint leaves out what diffusers notes under "_class_name"

    def read(self, fresh: Any = None) -> tuple[str, ...]:
        """What was read, in words: the images, the model. `fresh`: the net to train, where there is no model."""
        told = () if self.fitted is None else (about_images(self.fitted),)
        if self.bank is not None:
            own = f"; {about_own(self.scheduler, self.recipe.sample.scheduler)}" if self.scheduler else ""
            return (*told, about_bank(self.source, self.bank, self.process) + own)
        if fresh is None:
            return told
        classes = self.classes_of(fresh.config) if class_count(fresh.config) else ()
        return (*told, about_model(None, fresh, self.process, self.vae, classes))
