"""Recipe: everything a run depends on, as one frozen value with a JSON record and typed `--set` edits."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from halfstep.disk import read_record
from halfstep.errors import HalfstepError, RecipeError
from halfstep.process import Process
from halfstep.typed import build, leaves, nearest, parse, shown


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A denoiser to train from scratch: a `UNet2DModel`, or with `kind` "uvit" a `UViT2DModel` (one number in
    `channels`, `layers` blocks, patches of `patch` pixels). `config` names a diffusers config.json instead. `vae`: the
    folder of an AutoencoderKL (or of a pipeline with one) on whose latents the denoiser works."""

    kind: Literal["unet", "uvit"] = "unet"
    channels: tuple[int, ...] = (64, 128)
    layers: int = 1
    attention: tuple[bool, ...] = (False, False)
    head_dim: int = 32
    groups: int = 8
    dropout: float = 0.0
    patch: int = 2
    class_conditional: bool = False
    config: str = ""
    vae: str = ""


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """How images are decoded: `size` in pixels and `channels` (1 or 3) as they are when None; random mirror flips."""

    size: int | None = None
    channels: int | None = None
    flip: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """The training loop. `batch` is per process; `precision` "auto" takes bf16 where the device has fast bf16."""

    steps: int = 4000
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 200
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    precision: Literal["auto", "no", "bf16"] = "auto"
    log_every: int = 20
    save_every: int = 250
    sample_every: int = 1000
    tracker: Literal["", "tensorboard", "wandb", "trackio", "aim"] = ""


@dataclass(frozen=True, kw_only=True)
class SlimSpec:
    """DDSM's supernet. `sandwich` is the n of the sandwich rule: widest, narrowest and n - 2 random widths a step.

    `widths`: without 1.0 the supernet is cut to the widest of them; the dense model stays in the bank as "full" anyway.
    `concat`: "aligned" slices each segment of a concatenated input, "leading" is the released code's prefix.
    `sort`: order the pretrained channels by importance first (the function at full width is kept).
    `distill`: what the nets regress to: the noise ("none", the paper), or the narrower ones to the widest net's
    prediction, or all to the dense teacher's.
    `shared_noise`: one draw of timestep and noise for all widths of a step instead of one each.
    `patterns`: masks that every width is trained for, one drawn for each loss, e.g. `dense,2:4` (DDSM x SparseDM; the
    layers are chosen by `sparse`).
    """

    widths: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    sandwich: int = 3
    concat: Literal["aligned", "leading"] = "aligned"
    sort: bool = True
    distill: Literal["none", "widest", "dense"] = "dense"
    shared_noise: bool = False
    patterns: tuple[str, ...] = ("dense",)


@dataclass(frozen=True, kw_only=True)
class SparseSpec:
    """SparseDM's masks and their fine-tuning.

    `pattern`: N:M, keep N of every M weights along a layer's input; `also`: further ones of `schedule` "switch", which
    draws one at every step ("dense" is one too). "fixed" is algorithm B of the paper, "s31" and "s7" are A.
    `final_share`: share of the steps for the last stage of A (0.2: the released equal parts).
    `layers`: "default" leaves input, output, embeddings and layers below `least` weights dense; "paper" the long skips
    too; "all" masks what has whole groups. `include`: globs of layer names, e.g. `*.attn.*`.
    `decay`: the pull on dropped weights (lambda; 0: plain straight-through), `decoupled`: after the optimizer's step.
    `teacher`: weight of the dense teacher (eta). `frozen`: masks chosen once (the ASP control).
    `permute`: order the inner channels first so that masks keep more.
    """

    pattern: str = "2:4"
    also: tuple[str, ...] = ()
    schedule: Literal["fixed", "s31", "s7", "switch"] = "fixed"
    final_share: float = 0.5
    layers: Literal["default", "paper", "all"] = "default"
    include: tuple[str, ...] = ("*",)
    least: int = 1024
    decay: float = 2e-4
    decoupled: bool = False
    teacher: float = 0.1
    frozen: bool = False
    permute: bool = False

    @property
    def pulls(self) -> bool:
        """Whether dropped weights are pulled: a frozen mask has nothing to choose again, a switch no one mask."""
        return self.decay > 0 and not self.frozen and self.schedule != "switch"


@dataclass(frozen=True, kw_only=True)
class SpectralSpec:
    """Spectral Diffusion's student and its distillation.

    `reduction`: how many times fewer MACs than the teacher; `wavelet`: gated wavelet resampling, or plain convolutions
    (the control); `gate`: one gate per band and "channel", or "scalar" ones. `spatial`, `freq`: weights of the two
    distillation terms (0 and 0: trained on the noise alone); `alpha`: exponent of the clean spectrum in the second;
    `ramp`: share of the steps over which it grows to its weight.
    """

    reduction: float = 8.0
    wavelet: bool = True
    gate: Literal["channel", "scalar"] = "channel"
    spatial: float = 0.1
    freq: float = 0.1
    alpha: float = -1.0
    ramp: float = 0.05


@dataclass(frozen=True, kw_only=True)
class ContinuousSpec:
    """The Missing U's continuous U-Net and its training.

    `base`: channels of the stem (the first level has twice as many); 0: as many as leave a quarter of the teacher's
    parameters, as the paper has it, and 16 without a teacher. `levels`: halvings, 0 for as many as the size
    allows, at most 4; `attention`: in the deepest level and back; `order`: 2 for positions and velocities; `mode`:
    "released" leaves the timestep out, as the released code. `steps`: solver steps, each a bank entry; one of them is
    drawn in every training step. `teacher`: weight of the distillation from a dense model, where there is one.
    `checkpoint`: compute activations again for the gradient: a third of the memory, 15 to 33 % more time.
    """

    base: int = 0
    levels: int = 0
    attention: bool = True
    head_dim: int = 32
    order: Literal[1, 2] = 1
    mode: Literal["paper", "released"] = "paper"
    steps: tuple[int, ...] = (1, 2, 4)
    teacher: float = 0.5
    checkpoint: bool = False


@dataclass(frozen=True, kw_only=True)
class RegularSpec:
    """The penalty of regularised score matching.

    `penalty`: "out_l1", the mean magnitude of the predicted noise; "out_l1_sq", its square for each sample;
    "score_l1", the same in score units (stronger at small timesteps); "scale", one scale for all samples: the largest
    of the batch; "param_l1", the mean magnitude of the weights. `r`: its weight; 0 is plain training. `grid`: the
    weights that `halfstep compress regularized` tries. `basis`: the coordinates of the prediction, pixels or one level
    of the Haar transform. `center`: penalise score + x, which is exactly sparse on coordinates that are N(0, 1).
    """

    penalty: Literal["out_l1", "out_l1_sq", "score_l1", "scale", "param_l1"] = "out_l1"
    r: float = 0.1
    grid: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    basis: Literal["pixel", "wavelet"] = "pixel"
    center: bool = False


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """The sampler: a diffusers scheduler by its short name, and the number of steps. `variance`: what ancestral
    sampling ("ddpm") adds at a step, the posterior's variance or beta, 1 - alpha. `layout`: the entries' memory layout;
    "auto" takes the faster one by a timing, so that two runs may differ in their last digits."""

    scheduler: Literal["ddim", "ddpm", "dpmsolver++", "heun", "euler"] = "ddim"
    steps: int = 50
    variance: Literal["posterior", "beta"] = "posterior"
    batch: int = 256
    layout: Literal["auto", "contiguous", "channels_last"] = "auto"


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """Error table, frontier and NSGA-II.

    `images`: images per candidate, four per feature or more; `error_images`: trajectories of the error table, whose
    paired damages need no more than a few dozen. `weights`: how an error at a step is weighted. `fit`: measured plans
    that the additive surrogate is fitted to (0: none).
    `objective`: "budget" minimises quality under the budget, "scalar" is DDSM's quality + lambda * MACs share,
    "pareto" keeps both. `mutation` "released" is DDSM's code, whose mutation never acts; `rate` 0 means 1 / genes.
    `finalists`: the best plans (and the dearest uniform one) are measured again on `final_images` fresh images, and the
    best of them is chosen; 0: none. `step_counts`: other numbers of sampling steps to search for the same budget;
    `shrink`: let every one of these plans be corrected by `ShrinkSpec` too, before the best is chosen on fresh images.
    `init`: "frontier" starts from the frontier's plans, "uniform" is DDSM's (uniform plans + random), or "random".
    """

    method: Literal["frontier", "nsga2", "both"] = "both"
    weights: Literal["influence", "uniform"] = "influence"
    images: int = 1024
    error_images: int = 64
    fit: int = 32
    population: int = 8
    generations: int = 2
    crossover: float = 0.9
    mutation: Literal["intended", "released"] = "intended"
    rate: float = 0.0
    objective: Literal["budget", "scalar", "pareto"] = "budget"
    trade: float = 6.0
    init: Literal["frontier", "uniform", "random"] = "frontier"
    genes: int = 50
    finalists: int = 3
    step_counts: tuple[int, ...] = ()
    shrink: bool = False
    final_images: int = 4096


@dataclass(frozen=True, kw_only=True)
class ShrinkSpec:
    """Training-free corrections of the predicted noise: the grids of `scales` and soft `thresholds`, of which a walk
    from 1 and from 0 measures a few, how many stretches (`parts`) of rows get their own, how often all of them are gone
    through (`rounds`), and images per measurement."""

    scales: tuple[float, ...] = (0.7, 0.76, 0.8, 0.84, 0.88, 0.91, 0.94, 0.96, 0.98, 0.99, 1.01, 1.02, 1.04, 1.07)
    thresholds: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.28)
    parts: int = 4
    rounds: int = 1
    images: int = 1024
    final_images: int = 4096


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """The final measurement. `features`: "own" (a classifier trained on the data), "digits", "file:DIR",
    "inception:FILE", "dinov2" or, for tiny pictures, "pixels" (no network). `tolerance`: the loss, as a share of the
    reference's distance, that counts as held; where that is within its floor (what perfect draws score by chance), as a
    share of a hundredth of the data's spread. `images`: four per feature or more, or nothing is decided."""

    images: int = 4096
    features: str = "own"
    feature_steps: int = 1500
    bootstrap: int = 500
    tolerance: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of one run. Sections are frozen dataclasses; variants by `dataclasses.replace` or `edit`."""

    name: str = "default"
    seed: int = 0
    model: ModelSpec = field(default_factory=ModelSpec)
    noise: Process = field(default_factory=Process)
    data: DataSpec = field(default_factory=DataSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    slim: SlimSpec = field(default_factory=SlimSpec)
    sparse: SparseSpec = field(default_factory=SparseSpec)
    spectral: SpectralSpec = field(default_factory=SpectralSpec)
    continuous: ContinuousSpec = field(default_factory=ContinuousSpec)
    regular: RegularSpec = field(default_factory=RegularSpec)
    sample: SampleSpec = field(default_factory=SampleSpec)
    search: SearchSpec = field(default_factory=SearchSpec)
    shrink: ShrinkSpec = field(default_factory=ShrinkSpec)
    eval: EvalSpec = field(default_factory=EvalSpec)

    def __post_init__(self) -> None:
        _check(self)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any], *, where: object = "recipe.json") -> Recipe:
        """Rebuild a recipe. Raises RecipeError for an unknown field or a value of another type."""
        return build(cls, record, "", where)

    def edit(self, edits: Iterable[str]) -> Recipe:
        """A copy with `name=value` edits, e.g. `train.steps=2000`; a name is the dotted path of a field.

        Raises RecipeError with the nearest name for an unknown one, and for a value that does not parse.
        """
        record = self.to_json()
        for text in edits:
            path, equals, value = text.partition("=")
            if not equals:
                raise RecipeError(got=text, expected="name=value", where="--set", do="write e.g. train.steps=2000")
            hint = _hint(path.strip())
            *sections, name = path.strip().split(".")
            target = record
            for section in sections:
                target = target[section]
            target[name] = parse(value.strip(), hint, path)
        return Recipe.from_json(record, where="--set")

    def differences(self, other: Recipe) -> list[str]:
        """The names of the fields in which two recipes differ, e.g. ["train.steps"]."""
        mine, theirs = dict(leaves(self)), dict(leaves(other))
        return [name for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """recipe.json of a run folder: the recipe (None: the verb has none), what the command named, and the machine.

    `inputs`: the verb, paths and goal as they were given, and the fingerprints of what lay there, "model_content" and
    "data_content"; runs of before 2026-11-26 have none. `diverged`: the settings under which its training diverged
    before it went on with steadier ones, e.g. [{"train.lr": 30.0}].
    `read`: what was read, in words (see `reading`).
    """

    inputs: dict[str, str]
    recipe: Recipe | None = None
    read: tuple[str, ...] = ()
    machine: dict[str, Any] = field(default_factory=dict)
    diverged: list[dict[str, Any]] = field(default_factory=list)
    format: Literal[1] = 1

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Read it. Raises RunError when it is missing or no such record, RecipeError for a recipe that cannot be."""
        file = folder / "recipe.json"
        return read_record(file, cls, what="the record of a run", do="choose another --out")

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether a folder is a run's."""
        try:
            return (folder / "recipe.json").is_file() and bool(cls.load(folder))
        except HalfstepError:
            return False

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def field_names() -> list[str]:
    """Every editable name, e.g. "train.steps"."""
    return [name for name, _ in leaves(Recipe())]


def _hint(path: str) -> Any:
    """The type of the field at a dotted path."""
    if path not in field_names():
        raise RecipeError(
            got=repr(path),
            expected="a field of the recipe",
            where="--set",
            do=f"did you mean {nearest(path, field_names())}?",
        )
    cls: Any = Recipe
    for part in path.split("."):
        cls = typing.get_type_hints(cls)[part]
    return cls


_POSITIVE = [
    "model.layers",
    "model.patch",
    "model.head_dim",
    "model.groups",
    "noise.timesteps",
    "train.steps",
    "train.batch",
    "train.lr",
    "train.log_every",
    "train.save_every",
    "sample.steps",
    "sample.batch",
    "search.images",
    "search.error_images",
    "search.population",
    "search.generations",
    "search.genes",
    "search.final_images",
    "shrink.parts",
    "shrink.images",
    "shrink.final_images",
    "eval.images",
    "eval.feature_steps",
    "eval.bootstrap",
    "spectral.reduction",
    "continuous.head_dim",
]
_NOT_NEGATIVE = [
    "seed",
    "train.warmup",
    "train.weight_decay",
    "train.clip_norm",
    "train.sample_every",
    "search.fit",
    "search.finalists",
    "shrink.rounds",
    "search.trade",
    "sparse.decay",
    "sparse.teacher",
    "sparse.least",
    "continuous.base",
    "continuous.levels",
    "continuous.teacher",
    "regular.r",
    "spectral.spatial",
    "spectral.freq",
]
_BATCHES = ["train.batch", "sample.batch"]
MAX_SEED, MOST, MOST_IN_A_BATCH, MOST_IN_A_LIST, MOST_LETTERS = 2**63 - 1, 10**9, 1 << 16, 64, 4096
"""Seeds, whole numbers, images in a batch, items of a list, letters: a recipe with more is a slip of the fingers."""
_SHARES = [
    "train.ema_decay",
    "model.dropout",
    "noise.beta_start",
    "noise.beta_end",
    "search.crossover",
    "search.rate",
    "eval.tolerance",
    "sparse.final_share",
    "spectral.ramp",
]


def _numbers(value: object) -> list[int]:
    return [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, int)]


def _check(recipe: Recipe) -> None:
    values = dict(leaves(recipe))
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(got=value, expected="a finite number", where=name, do="change it with --set")
        if isinstance(value, str) and ("\0" in value or len(value) > MOST_LETTERS):
            expected = f"a text of at most {MOST_LETTERS} letters without NUL"
            raise RecipeError(got=shown(value), expected=expected, where=name, do="change it with --set")
        if name != "seed" and any(n > MOST for n in _numbers(value)):
            raise RecipeError(got=value, expected=f"at most {MOST:,}", where=name, do="change it with --set")
        if isinstance(value, tuple) and len(value) > MOST_IN_A_LIST:
            raise RecipeError(
                got=f"{len(value)} items", expected=f"at most {MOST_IN_A_LIST}", where=name, do="change it with --set"
            )
    for name in _BATCHES:
        if values[name] > MOST_IN_A_BATCH:
            raise RecipeError(
                got=values[name], expected=f"at most {MOST_IN_A_BATCH:,}", where=name, do="change it with --set"
            )
    for name in _POSITIVE:
        if not values[name] > 0:
            raise RecipeError(got=values[name], expected="a number above 0", where=name, do="change it with --set")
    for name in _NOT_NEGATIVE:
        if values[name] < 0:
            raise RecipeError(got=values[name], expected="0 or more", where=name, do="change it with --set")
    if values["seed"] > MAX_SEED:
        raise RecipeError(got=values["seed"], expected="below 2**63", where="seed", do="change it with --set")
    for name in _SHARES:
        if not 0 <= values[name] <= 1:
            raise RecipeError(got=values[name], expected="a number in [0, 1]", where=name, do="change it with --set")
    widths = recipe.slim.widths
    if not widths or not all(0 < w <= 1 for w in widths) or len(set(widths)) != len(widths):
        raise RecipeError(
            got=widths,
            expected="different widths in (0, 1]",
            where="slim.widths",
            do="write e.g. --set slim.widths=1,0.75,0.5,0.25",
        )
    if not recipe.continuous.steps or min(recipe.continuous.steps) < 1:
        raise RecipeError(
            got=recipe.continuous.steps,
            expected="whole numbers above 0",
            where="continuous.steps",
            do="write e.g. --set continuous.steps=1,2,4",
        )
    if min(recipe.regular.grid, default=0.0) <= 0:
        raise RecipeError(
            got=recipe.regular.grid,
            expected="numbers above 0; the plain training is always beside them",
            where="regular.grid",
            do="write e.g. --set regular.grid=0.01,0.1",
        )
    if min(recipe.shrink.scales, default=1.0) <= 0 or min(recipe.shrink.thresholds, default=0.0) < 0:
        raise RecipeError(
            got=f"{recipe.shrink.scales} and {recipe.shrink.thresholds}",
            expected="scales above 0, thresholds of 0 or more",
            where="shrink",
            do="write e.g. --set shrink.scales=0.94,0.97",
        )
    if recipe.sample.steps > recipe.noise.timesteps:
        raise RecipeError(
            got=recipe.sample.steps,
            expected=f"at most {recipe.noise.timesteps}, the timesteps of the training",
            where="sample.steps",
            do="take fewer steps",
        )
    if not all(1 <= steps <= recipe.noise.timesteps for steps in recipe.search.step_counts):
        raise RecipeError(
            got=recipe.search.step_counts,
            expected=f"whole numbers from 1 to {recipe.noise.timesteps}",
            where="search.step_counts",
            do="write e.g. --set search.step_counts=10,30",
        )
    if recipe.slim.sandwich < 2:
        raise RecipeError(
            got=recipe.slim.sandwich, expected="2 or more", where="slim.sandwich", do="use 3, as the paper"
        )
    for name in ("eval.images", "search.images", "search.final_images", "shrink.images", "shrink.final_images"):
        if values[name] < 2:
            raise RecipeError(got=values[name], expected="2 images or more", where=name, do="change it with --set")
    if not recipe.model.channels or min(recipe.model.channels) < 1:
        raise RecipeError(
            got=recipe.model.channels,
            expected="channels above 0, one number for each level",
            where="model.channels",
            do="write e.g. --set model.channels=64,128",
        )
    if recipe.model.kind == "unet" and len(recipe.model.attention) != len(recipe.model.channels):
        raise RecipeError(
            got=f"{len(recipe.model.attention)} flags",
            expected=f"one for each of the {len(recipe.model.channels)} levels",
            where="model.attention",
            do="write e.g. --set model.attention=false,true",
        )
