"""Spectral Diffusion: a slim student of a U-Net, distilled with errors weighted by the spectrum of the clean image.

Paper: Diffusion Probabilistic Model Made Slim, Yang et al., CVPR 2023, arXiv 2211.17106. Its net is in
`nets/wavelet.py`, its analysis of the optimal linear denoiser in `measure/spectrum.py`.

Implemented: the distillation loss: noise + 0.1 spatial + 0.1 frequency, where an error at frequency f weighs
|clean spectrum at f|^alpha with alpha = -1.

What differs, and why:
- Optional, not in the paper: a student that begins as a width of the teacher (its channels sorted by
  importance, the leading ones kept), with fresh gates where the resampling convolutions were (`start`).
- What the sources leave open in the loss is chosen so that its weights have a size-free meaning: orthonormal transform,
  means instead of sums, weights of mean 1 clamped at 50, a floor under the clean magnitude.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.core.recipe import Recipe, SpectralSpec
from halfstep.core.seeds import seeded
from halfstep.engine.bank import Bank
from halfstep.engine.profiling import count_macs
from halfstep.engine.subject import Subject
from halfstep.nets.architectures import architecture_of, leading_slices, narrowed, require
from halfstep.nets.denoiser import Draw, Memo, cond_of, predictor
from halfstep.training.draft import Draft, teacher_of
from halfstep.training.train import Batch, Diffusion, Objective, TrainState


def spectral_weights(clean: torch.Tensor, size: tuple[int, int], alpha: float, most: float = 50.0) -> torch.Tensor:
    """The weight of every frequency, from the clean images [B,C,H,W] resized to `size` by area: [B, 1, h, w].

    w(f) = |X_0(f)|^alpha, X_0 the transform of the clean images; with a floor under the magnitude, divided by its mean
    over the frequencies, at most `most`.
    """
    resized = F.adaptive_avg_pool2d(clean.float(), size)
    magnitude = torch.fft.fft2(resized, norm="ortho").abs().mean(1, keepdim=True)
    floor = 1e-2 * magnitude.mean((2, 3), keepdim=True) + 1e-8
    weights = (magnitude + floor) ** alpha
    return (weights / weights.mean((2, 3), keepdim=True)).clamp(max=most)


def frequency_loss(theirs: torch.Tensor, ours: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean weighted squared modulus of the difference's orthonormal transform; [B,C,h,w] twice, weights [B,1,h,w].

    L_freq = |w^(1/2) (X_teacher - X_student)|^2 for one level, X the transform of what it puts out.
    """
    difference = torch.fft.fft2((theirs - ours).float(), norm="ortho")
    return (weights * (difference.real.square() + difference.imag.square())).mean()


def levels_of(model: Any) -> list[nn.Module]:
    """The modules whose outputs are compared: the last ResNet block of every level of both paths, and the middle."""
    return require(architecture_of(model), "levels")(model)


class Pupil(nn.Module):
    """A student and, for the training only, a learned 1x1 convolution for each compared level (to teacher channels).

    `teacher`: a `UNet2DModel` or `SpectralUNet2DModel` with as many levels of the same sizes; it gets no gradient.
    Raises ModelError for nets without levels, and when these do not match.
    """

    def __init__(self, student: Any, teacher: Any):
        super().__init__()
        self.model, self.config = student, student.config
        ours, theirs = _level_shapes(student), _level_shapes(teacher)
        if [shape[2:] for shape in ours] != [shape[2:] for shape in theirs]:
            raise ModelError(
                got=f"levels of sizes {[shape[-1] for shape in ours]}",
                expected=f"the teacher's, {[shape[-1] for shape in theirs]}",
                where="spectral distillation",
                do="take a teacher with as many levels and the same image size",
            )
        pairs = zip(ours, theirs, strict=True)
        self.align = nn.ModuleList(nn.Conv2d(mine[1], other[1], 1) for mine, other in pairs)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def _level_shapes(model: Any) -> list[torch.Size]:
    with Levels(model) as levels, torch.no_grad():
        config = model.config
        sample = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size)
        step = torch.ones((), dtype=torch.long)
        cond = cond_of(None if config.num_class_embeds is None else torch.zeros(1, dtype=torch.long))
        predictor(model)(sample, step, cond, Memo())
        return [value.shape for value in levels.seen]


class Levels:
    """Collects, inside a `with`, what the compared modules of a model put out, in the order in which they run."""

    def __init__(self, model: Any):
        self.model = model
        self.seen: list[torch.Tensor] = []

    def __enter__(self) -> Levels:
        keep = lambda _module, _given, out: self.seen.append(out)  # noqa: E731
        self._handles = [module.register_forward_hook(keep) for module in levels_of(self.model)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def spectral_objective(
    pupil: Pupil,
    teacher: nn.Module,
    draw: Draw,
    spec: SpectralSpec,
    steps: int,
) -> Objective:
    """noise + spatial * sum of squared feature differences + freq * the same by frequency, weighted.

    L = |s - eps|^2 + spatial sum_i |F_i - A_i S_i|^2 + freq sum_i L_freq(F_i, A_i S_i): F_i and S_i what teacher and
    student put out at level i and at the end, A_i the student's alignment (none at the end).

    Teacher and student see the same noisy images, timesteps and conditions. The frequency term grows from 0 over the
    first `spec.ramp` of the steps.
    """
    ours, taught = predictor(pupil.model), predictor(teacher)

    def objective(batch: Batch) -> Iterator[torch.Tensor]:
        noisy, timestep, target = draw(batch.clean, batch.generator, batch.share)
        with Levels(pupil.model) as mine:
            found = ours(noisy, timestep, batch.cond, Memo()).float()
        loss = F.mse_loss(found, target)
        freq = spec.freq * min(1.0, (batch.step + 1) / max(1.0, spec.ramp * steps))
        if spec.spatial or spec.freq:
            with torch.no_grad(), Levels(teacher) as theirs:
                lesson = taught(noisy, timestep, batch.cond, Memo()).float()
            pairs = [
                (other.detach().float(), align(one).float())
                for one, other, align in zip(mine.seen, theirs.seen, pupil.align, strict=True)
            ]
            for other, one in [*pairs, (lesson, found)]:
                loss = loss + spec.spatial * F.mse_loss(one, other)
                if spec.freq:
                    weights = spectral_weights(batch.clean, (one.shape[2], one.shape[3]), spec.alpha)
                    loss = loss + freq * frequency_loss(other, one, weights)
        yield loss

    return objective


def student_configs(teacher: Mapping[str, Any], unit: int = 4) -> list[dict[str, Any]]:
    """Configs of slimmer U-Nets of a teacher's layout, widest first; the caller takes the first that is cheap enough.

    Channels are multiples of `unit`, which is also the number of norm groups where it divides them.
    """
    layout = ("sample_size", "in_channels", "out_channels", "layers_per_block", "down_block_types", "up_block_types")
    kept = {key: teacher[key] for key in (*layout, "num_class_embeds")}
    full = teacher["block_out_channels"]
    found: list[dict[str, Any]] = []
    for base in range(max(full), 0, -1):
        scale = base / max(full)
        channels = tuple(max(unit, unit * round(c * scale / unit)) for c in full)
        config = kept | {"block_out_channels": channels, "norm_num_groups": unit, "dropout": 0.0}
        config["attention_head_dim"] = min(teacher.get("attention_head_dim") or 8, min(channels))
        if not found or found[-1] != config:
            found.append(config)
    return found


# -------------------------------------------------------------------------------------------- from a subject to a draft


def draft(subject: Subject, recipe: Recipe) -> Draft:
    """A slim wavelet-gated student of the dense denoiser, to be distilled. Its bank: "full", the teacher as it came,
    and "spectral". Raises ModelError for a teacher or a reduction that no student is built for."""
    with seeded(recipe.seed):
        student = student_of(subject.dense, recipe.spectral)
        pupil = Pupil(student, subject.dense)

    def bank_of(net: Any) -> Bank:
        return subject.bank_of({"full": subject.dense, "spectral": net}, "full")

    def objective(_: TrainState) -> Objective:
        draw = Diffusion(recipe.noise).draw
        return spectral_objective(pupil, teacher_of(subject), draw, recipe.spectral, recipe.train.steps)

    channels = tuple(student.config.block_out_channels)
    told = f"student: channels {channels}, {count_macs(student) / 1e6:,.1f} MMACs"
    return Draft(
        method="spectral",
        tag="spectral",
        net=pupil,
        bank_of=bank_of,
        objective=objective,
        main="spectral",
        kept=student,
        told=(told,),
    )


def student_of(dense: Any, spec: SpectralSpec) -> Any:
    """The widest student of the teacher's layout that has `spec.reduction` times fewer MACs. Raises ModelError."""
    family = architecture_of(dense)
    gated = require(family, "gated")
    kind, more = (gated, {"gate": spec.gate}) if spec.wavelet else (family.kind, {})
    begun = spec.start == "teacher"
    configs = _narrowed_configs(dense, kind) if begun else student_configs(dense.config)
    target, macs = count_macs(dense) / spec.reduction, count_macs(dense)
    for config in configs:
        with torch.device("meta"):
            macs = count_macs(kind(**config, **more))
        if macs <= target:
            student = kind(**config, **more)
            return _begun(student, dense, config) if begun else student
    raise ModelError(
        got=f"a reduction of {spec.reduction:g}",
        expected=f"at most {count_macs(dense) / macs:.1f} for this teacher",
        where="spectral.reduction",
        do="ask for less, or bring a wider teacher",
    )


def _narrowed_configs(teacher: Any, kind: type) -> Iterator[dict[str, Any]]:
    """Configs of the teacher's own widths, widest first, as far as `kind` takes them. Raises ModelError for a teacher
    with a setting that `kind` has not, which its channels would be wrong under."""
    family, known = architecture_of(teacher), set(inspect.signature(kind).parameters)
    full = teacher.config["block_out_channels"]
    usual = {name: one.default for name, one in inspect.signature(family.kind).parameters.items()}
    named = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    idle = {"num_train_timesteps"} if named.get("time_embedding_type") != "learned" else set()
    foreign = [name for name in named if name not in known | idle and named[name] != usual.get(name)]
    if foreign:
        got = f"a teacher with {foreign[0]} {named[foreign[0]]!r}"
        do = "write --set spectral.start=fresh, or spectral.wavelet=false"
        raise ModelError(got=got, expected=f"{usual.get(foreign[0])!r}", where="spectral.start=teacher", do=do)
    for channels in range(max(full) - 1, 0, -1):
        try:
            config = narrowed(family, teacher.config, channels / max(full))
        except ModelError:  # no whole groups of channels
            continue
        yield {name: value for name, value in config.items() if name in known}


def _begun(student: Any, teacher: Any, config: Mapping[str, Any]) -> Any:
    """The student with the teacher's most important channels; what the teacher has not (gates) stays fresh."""
    width = max(config["block_out_channels"]) / max(teacher.config["block_out_channels"])
    kept = leading_slices(teacher, width)
    net = student.net if hasattr(student, "net") else student
    own = net.state_dict()
    net.load_state_dict({name: kept.get(name, value) for name, value in own.items()})
    return student
