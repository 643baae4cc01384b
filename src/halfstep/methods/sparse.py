"""SparseDM: N:M sparse denoisers, fine-tuned with a sparse-refined straight-through estimator and the dense teacher.

Paper: SparseDM: Toward Sparse Efficient Diffusion Models, Wang et al., ICME 2025, arXiv 2404.10445; the estimator is
SR-STE of Zhou et al., ICLR 2021, arXiv 2102.04010.

Implemented: masks recomputed from the dense weights at every forward, gradients straight through, the pull of dropped
weights towards zero (`decay`); algorithm B, a fixed pattern with the dense teacher (`schedule="fixed"`, eta = 0.1), and
algorithm A, growing sparsity (`"s31"`, `"s7"`); any N:M at inference; the controls one-shot, plain STE, frozen masks.

What differs, and why:
- Layers are not replaced. Masked weights are handed to the model by `torch.func.functional_call`, so that off is the
  dense model itself, bit for bit, and what is saved is a plain diffusers model.
- The pull is a loss term, decay / 2 * |dropped weights|^2, whose gradient is the paper's decay * (1 - mask) * W. The
  released code adds it to the scaled gradient, where fp16 loss scaling divides it by 65,536; as a loss it is scaled and
  unscaled like the others. `decoupled` applies it after the optimizer's step instead, as AdamW does its decay.
- Growing sparsity keeps one network and one optimizer; the moving average starts again with each pattern (the released
  script goes on training the network of the first stage).
- `schedule="switch"` is not in the paper: every step draws one of the patterns, without the pull, so that one set of
  weights serves them all, dense included.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.core.recipe import Recipe, SparseSpec
from halfstep.engine.bank import Bank
from halfstep.engine.entry import Entry, Own, Twin
from halfstep.engine.subject import Subject
from halfstep.nets.architectures import Parts, architecture_of, require
from halfstep.nets.denoiser import Draw, Memo, Predict, copy_of, predictor
from halfstep.nets.masks import Masking, Pattern, keep_mask, mask_all
from halfstep.training.draft import Draft, teacher_of
from halfstep.training.train import Batch, Diffusion, Objective, TrainState

STAGES = {"s31": ("31:32", "15:16", "7:8", "3:4", "2:4"), "s7": ("7:8", "6:8", "5:8", "4:8", "2:4")}
"""The two growing schedules of the released scripts, from dense to sparse."""


# -------------------------------------------------------------------------------------------- which layers are masked


@dataclass(frozen=True)
class Choice:
    """What was decided about one layer, and why."""

    layer: str
    shape: tuple[int, ...]
    masked: bool
    why: str


def choose(model: nn.Module, spec: SparseSpec, patterns: Sequence[Pattern]) -> tuple[Choice, ...]:
    """Decide for every convolution and linear layer whether it is masked.

    Raises ModelError when no layer is left, and for a layer that `spec.include` names in full and that has no whole
    groups of M inputs.
    """
    parts, found = architecture_of(model).parts, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            shape = tuple(module.weight.shape)
            why = _why_dense(name, module, parts, spec, patterns)
            found.append(Choice(name, shape, not why, why or "masked"))
    if not any(choice.masked for choice in found):
        first = found[0] if found else None
        raise ModelError(
            got=f"no layer to mask ({len(found)} layers; {first.layer}: {first.why})" if first else "no layers",
            expected=f"layers whose inputs are multiples of {', '.join(str(p.m) for p in patterns)}",
            where="sparse",
            do="choose another pattern, or change --set sparse.include or sparse.layers",
        )
    return tuple(found)


def _why_dense(
    name: str, layer: nn.Conv2d | nn.Linear, parts: Parts, spec: SparseSpec, patterns: Sequence[Pattern]
) -> str:
    """Why a layer stays dense; empty when it is masked."""
    shape = tuple(layer.weight.shape)
    if not _matches(name, spec.include):
        return "not included"
    misfits = [str(p) for p in patterns if not p.fits(shape)]
    if misfits and name in spec.include:
        raise ModelError(
            got=f"{shape[1]} inputs of {name}",
            expected=f"a multiple of M for {misfits[0]}",
            where="sparse.include",
            do="leave that layer out or choose another pattern",
        )
    if misfits:
        return f"its {shape[1]} inputs are no multiple of M for {misfits[0]}"
    if spec.layers == "all" or name in spec.include:
        return ""
    if _matches(name, parts.ends):
        return "input or output layer"
    if _matches(name, parts.time):
        return "time or class embedding"
    if layer.weight.numel() < spec.least:
        return f"fewer than {spec.least} weights"
    if spec.layers == "paper" and _matches(name, parts.skips):
        return "long skip, left dense in the paper"
    return ""


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


# ------------------------------------------------------------------------------------------------------------- switch


class Masked:
    """A denoiser with a switch: `predict(pattern)` runs it masked, `predict(None)` is the dense model itself.

    `patterns`: those that will be asked for; every masked layer has whole groups for all of them. `names`: the masked
    parameters; `choices`: what was decided about every layer. Nothing is written onto the model.
    """

    def __init__(self, model: Any, patterns: Sequence[Pattern], spec: SparseSpec):
        self.model, self.patterns = model, tuple(patterns)
        self.choices = choose(model, spec, self.patterns)
        self.names = tuple(f"{choice.layer}.weight" for choice in self.choices if choice.masked)

    def predict(self, pattern: Pattern | None) -> Predict:
        """The net as a function; differentiable, masks made anew from the present weights."""
        masked = None if pattern is None else lambda: mask_all(self._weights(), self.names, pattern)
        return predictor(self.model, masked)

    def pull(self, pattern: Pattern) -> torch.Tensor:
        """Half the squared size of the dropped weights: its gradient is (1 - mask) * W."""
        weights = self._weights()
        parts = [(w * ~keep_mask(w, pattern)).square().sum() for w in map(weights.__getitem__, self.names)]
        return 0.5 * torch.stack(parts).sum()

    def told(self) -> list[str]:
        """What was chosen and why, in a few lines."""
        weights = self._weights()
        kept = sum(weights[name].numel() for name in self.names)
        lines = [f"masked: {len(self.names)} of {len(self.choices)} layers, {kept:,} weights"]
        for why in dict.fromkeys(choice.why for choice in self.choices if not choice.masked):
            layers = [choice.layer for choice in self.choices if choice.why == why]
            lines.append(
                f"dense: {', '.join(layers[:3])}{f' and {len(layers) - 3} more' if layers[3:] else ''} ({why})"
            )
        return lines

    def bake(self, pattern: Pattern | None) -> Any:
        """A plain model of the same class with the masked weights, zeros included."""
        model = type(self.model).from_config(dict(self.model.config))
        model.load_state_dict(mask_all(self.model.state_dict(), self.names, pattern))
        first = next(self.model.parameters())
        return nn.Module.to(model, first.device, first.dtype).eval()  # diffusers' own `to` warns of every new dtype

    def _weights(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_parameters())


def sparsify(model: Any, pattern: str = "2:4", spec: SparseSpec | None = None) -> Masked:
    """Put a switchable N:M mask on a diffusers model, e.g. `sparsify(unet, "2:4").bake(Pattern(2, 4))`."""
    return Masked(model, (Pattern.parse(pattern),), spec or SparseSpec(pattern=pattern))


# -------------------------------------------------------------------------------------------------------- permutation


@torch.no_grad()
def permute(model: nn.Module, names: Sequence[str], pattern: Pattern, rounds: int = 40) -> None:
    """Order the channels of free order, in place, so that the masks of `names` keep more magnitude (as NVIDIA's ASP).

    The dense function stays the same. Channels are swapped between two groups of M wherever that keeps more; channels
    of one norm group or head stay together. Raises ModelError for a net without known channels of free order.
    """
    weights = dict(model.named_parameters())
    chosen = {id(weights[name]) for name in names}
    for free in require(architecture_of(model), "free")(model):
        read = [w for w in free.readers if id(w) in chosen]
        size = len(free.score) // free.sets
        if read and free.block == 1 and size % pattern.m == 0 and size >= 2 * pattern.m:
            rows = torch.cat([w.movedim(1, -1).flatten(0, -2) for w in read]).abs()
            free.apply(_keeping_order(rows, free.sets, pattern, rounds))


def _keeping_order(rows: torch.Tensor, sets: int, pattern: Pattern, rounds: int) -> torch.Tensor:
    """An order of the columns of `rows` [R, n] that keeps more, by swaps between random pairs of groups of one set."""
    n, m = rows.shape[1], pattern.m
    generator = torch.Generator().manual_seed(0)
    order = torch.arange(n)
    per_set = n // sets // m  # groups of M in a set
    swaps = [(a, b) for a in range(m) for b in range(m)]
    for _ in range(rounds):
        shuffled = torch.stack([torch.randperm(per_set, generator=generator) + s * per_set for s in range(sets)])
        half = per_set // 2
        left, right = shuffled[:, :half].flatten(), shuffled[:, half : 2 * half].flatten()
        groups = order.view(-1, m)
        pairs = torch.cat([groups[left], groups[right]], dim=1)  # [P, 2M] column numbers
        options = [pairs]
        for a, b in swaps:
            swapped = pairs.clone()
            swapped[:, a], swapped[:, m + b] = pairs[:, m + b], pairs[:, a]
            options.append(swapped)
        kept = torch.stack([_kept(rows, option, pattern) for option in options])  # [1 + M*M, P]
        best = torch.stack(options)[kept.argmax(0), torch.arange(len(left))]
        groups[left], groups[right] = best[:, :m], best[:, m:]
    return order.to(rows.device)


def _kept(rows: torch.Tensor, pairs: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Magnitude that the pattern keeps in each pair of groups, [P]."""
    found = rows[:, pairs.to(rows.device)].unflatten(-1, (2, pattern.m))  # [R, P, 2, M]
    return found.topk(pattern.n, dim=-1).values.sum(dim=(0, 2, 3)).cpu()


# ----------------------------------------------------------------------------------------------------------- training


def pattern_at(step: int, steps: int, spec: SparseSpec) -> Pattern | None:
    """The pattern of a training step under a fixed or growing schedule.

    The last stage gets `spec.final_share` of the steps (0.2 is the released equal division of five), the earlier ones
    equal parts of the rest.
    """
    stages = STAGES.get(spec.schedule)
    if stages is None:
        return Pattern.parse(spec.pattern)
    before = round(steps * (1 - spec.final_share))
    stage = min(step * (len(stages) - 1) // max(before, 1), len(stages) - 2) if step < before else len(stages) - 1
    return Pattern.parse(stages[stage])


def patterns_of(spec: SparseSpec) -> tuple[Pattern | None, ...]:
    """All patterns that a recipe trains for; None is dense."""
    texts = STAGES.get(spec.schedule) or (spec.pattern, *spec.also)
    return tuple(None if text == "dense" else Pattern.parse(text) for text in dict.fromkeys(texts))


def sparse_objective(
    net: Masked,
    draw: Draw,
    spec: SparseSpec,
    steps: int,
    teacher: Predict | None = None,
    on_new_pattern: Callable[[], None] | None = None,
) -> Objective:
    """The losses of one step: noise + `spec.teacher` * teacher, then the pull on dropped weights.

    L = |s - eps|^2 + eta |s - teacher|^2 + lambda / 2 |(1 - m) W|^2, s run with m W for W: the last term's gradient is
    SR-STE's lambda (1 - m) W, and that of s reaches all of W straight through the mask m.

    Draws (noisy sample, timestep, target) by `draw`. `teacher` is always dense and gets no gradient. `on_new_pattern`
    is called before the first step of every pattern but the first (the moving average starts again there).
    """
    choices = patterns_of(spec)

    def objective(batch: Batch) -> Iterator[torch.Tensor]:
        if spec.schedule == "switch":
            pattern = choices[int(torch.randint(len(choices), (), generator=batch.choices))]
        else:
            pattern = pattern_at(batch.step, steps, spec)
            if batch.step and on_new_pattern and pattern != pattern_at(batch.step - 1, steps, spec):
                on_new_pattern()
        noisy, timestep, target = draw(batch.clean, batch.generator, batch.share)
        found = net.predict(pattern)(noisy, timestep, batch.cond, Memo()).float()
        loss = F.mse_loss(found, target)
        if teacher is not None and spec.teacher:
            with torch.no_grad():
                lesson = teacher(noisy, timestep, batch.cond, Memo()).float()
            loss = loss + spec.teacher * F.mse_loss(found, lesson)
        yield loss
        if pattern is not None and spec.pulls and not spec.decoupled:
            yield spec.decay * net.pull(pattern)

    return objective


def decoupled_pull(net: Masked, spec: SparseSpec, pattern_now: Callable[[], Pattern | None]) -> Callable[..., None]:
    """A hook for after the optimizer's step: W <- W - lr * decay * (1 - mask) * W."""

    @torch.no_grad()
    def after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
        pattern, rate = pattern_now(), optimizer.param_groups[0]["lr"]
        if pattern is not None:
            weights = dict(net.model.named_parameters())
            for name in net.names:
                weights[name].mul_(1 - rate * spec.decay * ~keep_mask(weights[name], pattern))

    return after_step


class Frozen(Masked):
    """The control without recovery (ASP): masks chosen once, from the weights as they are now, and kept."""

    def __init__(self, model: Any, pattern: Pattern, spec: SparseSpec):
        super().__init__(model, (pattern,), spec)
        weights = self._weights()
        self.masks: Mapping[str, torch.Tensor] = {name: keep_mask(weights[name], pattern) for name in self.names}
        with torch.no_grad():
            for name, mask in self.masks.items():
                weights[name].mul_(mask)

    def predict(self, pattern: Pattern | None) -> Predict:
        masks = self.masks
        return predictor(self.model, lambda: {n: w * masks[n] if n in masks else w for n, w in self._weights().items()})


# -------------------------------------------------------------------------------------------- from a subject to a draft


def draft(subject: Subject, recipe: Recipe) -> Draft:
    """The dense denoiser behind its masks, to be fine-tuned. Its bank: "full", the dense denoiser as it came, and every
    pattern by its name, e.g. "2:4". With several patterns one set of weights serves them all; "off" is that set without
    a mask. Beside it stands one-shot masking of the same weights. Raises for patterns and filters that fit no layer."""
    spec, steps = recipe.sparse, recipe.train.steps
    net = sparse_net(subject.dense, spec)

    def bank_of(trained: Any) -> Bank:
        return subject.bank_of(entries_of(subject.dense, Masked(trained, net.patterns, spec)), "full")

    def objective(state: TrainState) -> Objective:
        if spec.pulls and spec.decoupled:
            hook = decoupled_pull(net, spec, lambda: pattern_at(state.step, steps, spec))
            state.optimizer.register_step_post_hook(hook)
        teacher = predictor(teacher_of(subject)) if spec.teacher else None
        return sparse_objective(net, Diffusion(recipe.noise).draw, spec, steps, teacher, state.restart_average)

    def beside(bank: Bank) -> dict[str, Entry]:
        one_shot = sparse_net(subject.dense, replace(spec, frozen=False))
        masks = {pattern: bank.entries[str(pattern)].masking for pattern in one_shot.patterns}
        return {f"{p} one-shot": Entry(one_shot.bake(p), masking=masking) for p, masking in masks.items()}

    main = str(net.patterns[-1 if spec.schedule in STAGES else 0])
    return Draft(
        method="sparse",
        tag="sparse",
        net=net.model,
        cut=True,
        bank_of=bank_of,
        objective=objective,
        main=main,
        beside=beside,
        told=tuple(net.told()),
    )


def entries_of(dense: Any, net: Masked) -> dict[str, Entry]:
    """The entries of a masked net: "full", every pattern, and for several patterns "off", whose weights they share."""
    several = len(net.patterns) > 1
    entries = {"full": Entry(dense)} | ({"off": Entry(net.bake(None))} if several else {})
    for pattern in net.patterns:
        weights = Twin("off") if several else Own()
        entries[str(pattern)] = Entry(net.bake(pattern), weights, Masking(pattern, net.names))
    return entries


def sparse_net(dense: Any, spec: SparseSpec) -> Masked:
    """The net to fine-tune: a copy of the dense one behind its masks. Raises for patterns and filters that fit none."""
    patterns, net = tuple(p for p in patterns_of(spec) if p), copy_of(dense)
    if spec.permute:
        permute(net, Masked(net, patterns, spec).names, patterns[-1])
    return Frozen(net, patterns[0], spec) if spec.frozen else Masked(net, patterns, spec)
