"""DDSM: one U-Net whose narrower versions share its weights, trained together by the sandwich rule.

Paper: Denoising Diffusion Step-aware Models, Yang et al., ICLR 2024, arXiv 2310.03337; slimmable networks and the
sandwich rule come from arXiv 1812.08928 and 1903.05134.

Implemented: the supernet (leading slices of every layer, group count held for all widths, time MLP slimmed too) and
its training (widest + narrowest + random widths between, losses summed, own timesteps and noise each). The search for a
width per step is in `search/driver.py`, since it does not care what its entries are.

What differs, and why:
- Layers are not rewritten. A width is a plain, narrower model of the same class whose parameters are slices of the full
  one's (`nets/architectures.py`), run by `torch.func.functional_call`: gradients reach the shared weights, stock
  diffusers loads what comes out, and a narrow step costs what a narrow model costs. Any `UNet2DModel`
  config works; the same file says which other classes have widths.
- Inputs that are concatenations are sliced segment by segment (`concat="aligned"`): the slim net's skip half uses the
  weights that the full net uses for its skip. The released code takes the leading columns of the whole concatenation,
  which the full net uses for the hidden half; `concat="leading"` does that.
- The paper's time table stays at full size in front of the slim time MLP. A plain narrow U-Net has a narrower
  sinusoid, so its first time layer takes the columns of the *nearest frequencies* (exact for widths 1/2, 1/4, …).
- Widths that give no whole groups are refused instead of rounded.
- Optional, not in the paper: sorting the pretrained channels by importance first (`sort_channels`), and distillation
  from the widest or the dense net (`distill`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from halfstep.core.recipe import Recipe, SlimSpec
from halfstep.engine.bank import Bank
from halfstep.engine.entry import Cut, Entry, Own, Twin
from halfstep.engine.subject import Subject
from halfstep.methods.sparse import Masked
from halfstep.nets.architectures import (
    architecture_of,
    constants,
    narrowed,
    require,
    skeleton,
    slices_for,
    sort_channels,
)
from halfstep.nets.denoiser import Draw, Memo, Predict, copy_of, predictor
from halfstep.nets.masks import Masking, Pattern, mask_all
from halfstep.nets.slices import Slices, cut_all
from halfstep.nets.weights import require_plain
from halfstep.training.draft import Draft, teacher_of
from halfstep.training.train import Batch, Diffusion, Objective, TrainState

Through = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
"""What is done to a width's weights before they are used, e.g. masking."""


def width_name(width: float) -> str:
    """The bank name of a width: 0.5 -> "w0.50"."""
    return f"w{width:.2f}"


# ----------------------------------------------------------------------------------------------------------- supernet


class Supernet:
    """A U-Net with its widths. The weights live in `model`; nothing is written onto modules.

    `predict(width)` runs a width on the shared weights (differentiable); `subnet(width)` copies them out as a plain
    model of its class. `own` is the width of `model` itself, in the units of `widths` (see `supernet_of`). Raises
    ModelError for a model that cannot be slimmed and for widths without whole channel groups.
    """

    def __init__(self, model: Any, widths: Sequence[float], concat: str = "aligned", own: float = 1.0):
        family = architecture_of(model)
        require(family, "slim")
        require_plain(model.state_dict(), "Supernet")
        self.model, self.family, self.own = model, family, own
        self.widths = tuple(sorted(widths, reverse=True))
        self.slices: dict[float, Slices] = {}
        self._skeletons: dict[float, Any] = {}
        self._constants: dict[float, Mapping[str, torch.Tensor]] = {}
        for width in self.widths:
            if width != own:
                self.slices[width] = slices_for(family, model.config, width / own, concat)
                narrow = narrowed(family, model.config, width / own)
                self._skeletons[width], self._constants[width] = skeleton(family, narrow), constants(family, narrow)

    def predict(self, width: float, through: Through | None = None) -> Predict:
        """The network at `width` as a function, its weights passed `through`."""
        if width == self.own and through is None:
            return predictor(self.model)
        net = self.model if width == self.own else self._skeletons[width]

        def weights() -> Mapping[str, torch.Tensor]:
            net.train(self.model.training)
            found = self.model.state_dict(keep_vars=True)
            found = found if width == self.own else cut_all(found, self.slices[width])
            fixed = {name: one.to(self.model.device) for name, one in self._constants.get(width, {}).items()}
            return {**(through(found) if through else found), **fixed}

        return predictor(net, weights)

    def subnet(self, width: float, through: Through | None = None) -> Any:
        """A plain diffusers model that computes what the supernet computes at `width`, with weights of its own."""
        weights = self.model.state_dict()
        config = dict(self.model.config)
        if width != self.own:
            weights = cut_all(weights, self.slices[width])
            config = narrowed(self.family, config, width / self.own)
        weights = through(weights) if through else weights
        model: Any = self.family.kind.from_config(config)
        model.load_state_dict({name: value.clone() for name, value in weights.items()})
        return model.to(self.model.device).eval()


def supernet_of(dense: Any, spec: SlimSpec) -> Supernet:
    """The untrained supernet of a dense model, which stays as it is: its channels sorted, cut to the widest width.

    A plan's bank holds the dense model beside the supernet, so that `spec.widths` may leave 1.0 out: no step of the
    training is then spent on a second net of that size. Raises ModelError for widths without whole channel groups.
    """
    require(architecture_of(dense), "slim")
    require_plain(dense.state_dict(), "Supernet")
    net = sort_channels(dense) if spec.sort else copy_of(dense)
    widest = max(spec.widths)
    if widest != 1.0:
        Supernet(net, spec.widths, spec.concat)  # its error speaks of the user's widths
        net = Supernet(net, (1.0, widest), spec.concat).subnet(widest)
    return Supernet(net, spec.widths, spec.concat, own=widest)


def sandwich_objective(
    supernet: Supernet,
    draw: Draw,
    spec: SlimSpec,
    teacher: Predict | None = None,
    through: Sequence[Through | None] = (None,),
) -> Objective:
    """The losses of one sandwich step: widest, narrowest, then `spec.sandwich - 2` widths between.

    L = L(widest) + L(narrowest) + sum over j of L(w_j), w_j ~ Uniform(between), L(w) = |eps_w(x_t, t) - eps|^2.

    Each loss draws its own timestep and noise on the same images unless `spec.shared_noise`. With `spec.distill` the
    widths regress to a prediction instead of the target: the narrower ones to the widest net's, or all to `teacher`'s.
    Each loss draws one of `through`, what is done to its weights.
    """
    widest, narrowest, *between = supernet.widths[0], supernet.widths[-1], *supernet.widths[1:-1]
    if spec.distill == "widest":
        teacher = supernet.predict(widest)
    taught = {"none": (), "widest": supernet.widths[1:], "dense": supernet.widths}[spec.distill]

    def objective(batch: Batch) -> Iterator[torch.Tensor]:
        widths = [widest] + ([narrowest] if narrowest != widest else [])
        if between:
            widths += [
                between[int(i)] for i in torch.randint(len(between), (spec.sandwich - 2,), generator=batch.choices)
            ]
        drawn, lesson = draw(batch.clean, batch.generator, batch.share), None
        for i, width in enumerate(widths):
            if i and not spec.shared_noise:
                drawn = draw(batch.clean, batch.generator, batch.share)
            noisy, timestep, target = drawn
            if teacher is not None and width in taught:
                if lesson is None or not spec.shared_noise:
                    with torch.no_grad():
                        lesson = teacher(noisy, timestep, batch.cond, Memo()).float()
                target = lesson
            which = torch.randint(len(through), (), generator=batch.choices) if len(through) > 1 else 0
            change = through[int(which)]
            yield F.mse_loss(supernet.predict(width, change)(noisy, timestep, batch.cond, Memo()).float(), target)

    return objective


# -------------------------------------------------------------------------------------------- from a subject to a draft


def draft(subject: Subject, recipe: Recipe) -> Draft:
    """The supernet of a dense denoiser, to be trained. Its bank: "full", the dense denoiser as it came, and the widths
    "w1.00" …, each under every mask of `slim.patterns`. Raises for widths and patterns that fit no layer."""
    supernet = supernet_of(subject.dense, recipe.slim)
    maskings = maskings_of(supernet, recipe)

    def bank_of(net: Any) -> Bank:
        twin = Supernet(net, supernet.widths, recipe.slim.concat, supernet.own)
        return subject.bank_of(entries_of(subject.dense, twin, maskings), "full")

    def objective(_: TrainState) -> Objective:
        teacher = predictor(teacher_of(subject)) if recipe.slim.distill == "dense" else None
        through = [through_mask(masking) for masking in maskings]
        return sandwich_objective(supernet, Diffusion(recipe.noise).draw, recipe.slim, teacher, through)

    return Draft(
        method="slimmable",
        tag="supernet",
        net=supernet.model,
        cut=True,
        bank_of=bank_of,
        objective=objective,
        main=entry_name(supernet.widths[-1], [None, *filter(None, maskings)][-1]),  # the last of `entries_of`
    )


def entry_name(width: float, masking: Masking | None = None) -> str:
    """The bank name of a width, under a mask where there is one: "w0.50+2:4"."""
    return f"{width_name(width)}+{masking.pattern}" if masking else width_name(width)


def entries_of(dense: Any, supernet: Supernet, maskings: Sequence[Masking | None] = (None,)) -> dict[str, Entry]:
    """The entries of a supernet: the dense reference "full", and every width as a cut of the widest one's weights.

    With masks, every width has an entry for every pattern, "w0.50+2:4", whose weights are shared too.
    """
    entries = {"full": Entry(dense)}
    own = width_name(supernet.own)
    for width in supernet.widths:
        for masking in [None, *filter(None, maskings)]:
            name = entry_name(width, masking)
            if masking is None and None not in maskings and width != supernet.own:
                continue  # the widest stays as the place of the weights, though it was not trained without a mask
            weights = Own() if name == own else Twin(own) if width == supernet.own else Cut(own, supernet.slices[width])
            entries[name] = Entry(supernet.subnet(width, through_mask(masking)), weights, masking)
    return entries


def maskings_of(supernet: Supernet, recipe: Recipe) -> list[Masking | None]:
    """The masks of `slim.patterns`, on the layers that have whole groups at every width; None is dense."""
    patterns = [None if text == "dense" else Pattern.parse(text) for text in recipe.slim.patterns]
    masked = tuple(pattern for pattern in patterns if pattern)
    if not masked:
        return [None]
    narrow = [Masked(supernet.subnet(width), masked, recipe.sparse).names for width in supernet.widths]
    names = tuple(name for name in narrow[0] if all(name in names for names in narrow))
    return [Masking(pattern, names) if pattern else None for pattern in patterns]


def through_mask(masking: Masking | None) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None:
    """What a mask does to weights."""
    return None if masking is None else partial(mask_all, names=masking.names, pattern=masking.pattern)
