"""Recipe: everything a run depends on, as one frozen value with a JSON record and typed `--set` edits.

Each field says its type, its range, its meaning and its default in one place; `halfstep recipe` prints them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from halfstep.core.disk import read_json
from halfstep.core.errors import HalfstepError, RecipeError, RunError
from halfstep.core.process import Process, Share
from halfstep.core.seeds import MAX_SEED
from halfstep.core.typed import Bounds, Leaf, build, hints_of, leaves, nearest, parse, require_typed, shown

MOST, MOST_IN_A_BATCH, MOST_IN_A_LIST, MOST_LETTERS = 10**9, 1 << 16, 64, 4096
"""Whole numbers, images in a batch, items of a list, letters: a recipe with more is a slip of the fingers."""

Count = Annotated[int, Bounds(1, MOST)]
Whole = Annotated[int, Bounds(0, MOST)]
Images = Annotated[int, Bounds(2, MOST)]
Batch = Annotated[int, Bounds(1, MOST_IN_A_BATCH)]
Workers = Annotated[int, Bounds(0, 64)]
Positive = Annotated[float, Bounds(0, None, above=True)]
Weight = Annotated[float, Bounds(0)]
Shift = Annotated[float, Bounds(0, 1e3)]
Text = Annotated[str, Bounds(0, MOST_LETTERS)]
SamplerName = Literal["own", "ddim", "ddpm", "dpmsolver++", "unipc", "deis", "heun", "euler", "pndm"]
Order = Literal[0, 1, 2, 3]
Spacing = Literal["own", "leading", "trailing", "linspace", "karras", "lambdas"]
RuntimeName = Literal["eager", "auto", "compile", "onnx", "openvino"]
PrecisionName = Literal["bf16", "fp16", "int8"]
FEW, SOME = Bounds(0, MOST_IN_A_LIST), Bounds(1, MOST_IN_A_LIST)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A denoiser to train from scratch."""

    kind: Annotated[Literal["unet", "uvit"], "a UNet2DModel, or a UViT2DModel"] = "unet"
    channels: Annotated[tuple[Count, ...], SOME, "of each level; a U-ViT has one number"] = (64, 128)
    layers: Annotated[Count, "of each level; a U-ViT's blocks"] = 1
    attention: Annotated[tuple[bool, ...], FEW, "whether each level of a U-Net attends"] = (False, False)
    head_dim: Annotated[Count, "channels of an attention head"] = 32
    groups: Annotated[Count, "of the group normalisation"] = 8
    dropout: Annotated[Share, "share of activations dropped in training"] = 0.0
    patch: Annotated[Count, "pixels of a U-ViT's patch, along one side"] = 2
    class_conditional: Annotated[bool, "learn the classes of the data"] = False
    config: Annotated[Text, "a diffusers config.json instead of all this"] = ""
    vae: Annotated[Text, "folder of an AutoencoderKL (or of a pipeline with one), to work on its latents"] = ""


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """How images are decoded."""

    size: Annotated[Count | None, "pixels along one side; none: as they are, or as the model takes them"] = None
    channels: Annotated[Count | None, "1 or 3; none: as they are, or as the model takes them"] = None
    flip: Annotated[bool, "mirror at random in training"] = False
    prompts: Annotated[str, "a file of prompts, one a line; empty: the captions of the images, for models of text"] = ""
    stream: Annotated[
        Whole, "pictures that a training shuffles within, decoded as they come; 0: all are decoded to the disk, once"
    ] = 0
    workers: Annotated[Workers | None, "processes that decode; none: one for each core"] = None


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """The training loop."""

    steps: Annotated[Count, "training steps"] = 4000
    batch: Annotated[Batch, "images of a training step, of all processes together"] = 128
    lr: Annotated[Positive, "learning rate at its highest"] = 1e-3
    warmup: Annotated[Whole, "steps over which the learning rate grows"] = 200
    schedule: Annotated[Literal["cosine", "constant"], "of the learning rate, after the warm-up"] = "cosine"
    weight_decay: Annotated[Weight, "of AdamW"] = 0.0
    clip_norm: Annotated[Weight, "largest norm of the gradient; 0: any"] = 1.0
    ema_decay: Annotated[Share, "of the moving average of the weights, which is what is kept"] = 0.999
    precision: Annotated[Literal["auto", "no", "bf16"], "auto: bf16 where the device has fast bf16"] = "auto"
    log_every: Annotated[Count, "steps between two records of the loss"] = 20
    save_every: Annotated[Count, "steps between two states to resume from"] = 250
    sample_every: Annotated[Whole, "steps between two previews; 0: none"] = 1000
    dropped: Annotated[Share, "share of captions that are dropped, so that a model of text can be guided"] = 0.1
    tracker: Annotated[Literal["", "tensorboard", "wandb", "trackio", "aim"], "that is told the losses too"] = ""
    accumulate: Annotated[Count, "parts that a process computes a step in, one after another: less memory"] = 1
    checkpointing: Annotated[bool, "compute activations again in the backward pass: less memory, more time"] = False
    sharded: Annotated[bool, "each process keeps a part of the optimizer's moments alone"] = False


STEADIER = ("lr", "clip_norm", "precision", "warmup", "schedule")
"""Fields of TrainSpec with which a diverged training may go on: they say how to step, not what a state holds."""
SAME_STEP = ("accumulate", "checkpointing", "sharded")
"""Fields of TrainSpec that say how a step is computed: what comes out is the same but for rounding."""


@dataclass(frozen=True, kw_only=True)
class SlimSpec:
    """DDSM's supernet. The dense model stays in the bank as "full", whatever the widths are."""

    widths: Annotated[
        tuple[Annotated[float, Bounds(0, 1, above=True)], ...],
        SOME,
        "shares of the channels, all different; without 1 the supernet is cut to the widest of them",
    ] = (1.0, 0.75, 0.5, 0.25)
    sandwich: Annotated[int, Bounds(2, MOST), "widths a step: widest, narrowest and the rest at random"] = 3
    concat: Annotated[
        Literal["aligned", "leading"],
        "aligned: slice each segment of a concatenated input; leading: the released code's prefix",
    ] = "aligned"
    sort: Annotated[bool, "order the pretrained channels by importance (the full width's function is kept)"] = True
    distill: Annotated[
        Literal["none", "widest", "dense"],
        "regress to the noise (the paper), the narrower to the widest net, or all to the dense teacher",
    ] = "dense"
    shared_noise: Annotated[bool, "one draw of timestep and noise for all widths of a step"] = False
    patterns: Annotated[
        tuple[Text, ...], FEW, "masks every width is trained for, one drawn for each loss, e.g. dense,2:4"
    ] = ("dense",)


@dataclass(frozen=True, kw_only=True)
class SparseSpec:
    """SparseDM's masks and their fine-tuning."""

    pattern: Annotated[Text, "N:M, keep N of every M weights along a layer's input"] = "2:4"
    also: Annotated[tuple[Text, ...], FEW, "further patterns of schedule switch; dense is one too"] = ()
    schedule: Annotated[
        Literal["fixed", "s31", "s7", "switch"],
        "fixed: the paper's algorithm B; s31, s7: its A; switch: one pattern drawn at every step",
    ] = "fixed"
    final_share: Annotated[Share, "share of the steps for the last stage of A (0.2: the released equal parts)"] = 0.5
    layers: Annotated[
        Literal["default", "paper", "all"],
        "default: dense input, output, embeddings and small layers; paper: the long skips too; all: whole groups",
    ] = "default"
    include: Annotated[tuple[Text, ...], FEW, "globs of layer names, e.g. *.attn.*"] = ("*",)
    least: Annotated[Whole, "weights below which a layer is small"] = 1024
    decay: Annotated[Weight, "the pull on dropped weights (lambda; 0: plain straight-through)"] = 2e-4
    decoupled: Annotated[bool, "pull after the optimizer's step"] = False
    teacher: Annotated[Weight, "weight of the dense teacher (eta)"] = 0.1
    frozen: Annotated[bool, "masks chosen once (the ASP control)"] = False
    permute: Annotated[bool, "order the inner channels first so that masks keep more"] = False

    @property
    def pulls(self) -> bool:
        """Whether dropped weights are pulled: a frozen mask has nothing to choose again, a switch no one mask."""
        return self.decay > 0 and not self.frozen and self.schedule != "switch"


@dataclass(frozen=True, kw_only=True)
class SpectralSpec:
    """Spectral Diffusion's student and its distillation. `spatial` and `freq` 0: trained on the noise alone."""

    reduction: Annotated[Positive, "how many times fewer MACs than the teacher"] = 8.0
    wavelet: Annotated[bool, "gated wavelet resampling; false: plain convolutions (the control)"] = True
    start: Annotated[
        Literal["fresh", "teacher"], "weights of a student: fresh, or the teacher's most important channels"
    ] = "fresh"
    gate: Annotated[Literal["channel", "scalar"], "one gate for each band and channel, or for each band"] = "channel"
    spatial: Annotated[Weight, "weight of the distillation term of pixels"] = 0.1
    freq: Annotated[Weight, "weight of the distillation term of the spectrum"] = 0.1
    alpha: Annotated[float, "exponent of the clean spectrum in the second term"] = -1.0
    ramp: Annotated[Share, "share of the steps over which the second term grows to its weight"] = 0.05


@dataclass(frozen=True, kw_only=True)
class ContinuousSpec:
    """The Missing U's continuous U-Net and its training."""

    base: Annotated[
        Whole, "channels of the stem, half the first level's; 0: a quarter of the teacher's parameters, 16 without one"
    ] = 0
    levels: Annotated[Whole, "halvings; 0: as many as the size allows, at most 4"] = 0
    attention: Annotated[bool, "in the deepest level and back"] = True
    head_dim: Annotated[Count, "channels of an attention head"] = 32
    order: Annotated[Literal[1, 2], "2: positions and velocities"] = 1
    mode: Annotated[Literal["paper", "released"], "released: without the timestep, as the released code"] = "paper"
    steps: Annotated[tuple[Count, ...], SOME, "solver steps, each a bank entry; one is drawn a training step"] = (
        1,
        2,
        4,
    )
    teacher: Annotated[Weight, "weight of the distillation from a dense model, where there is one"] = 0.5
    checkpoint: Annotated[bool, "recompute activations for the gradient: a third of the memory, 15-33 % slower"] = False


@dataclass(frozen=True, kw_only=True)
class RegularSpec:
    """The penalty of regularised score matching.

    `penalty`: "out_l1", the mean magnitude of the predicted noise; "out_l1_sq", its square for each sample;
    "score_l1", the same in score units (stronger at small timesteps); "scale", one scale for all samples: the largest
    of the batch; "param_l1", the mean magnitude of the weights.
    """

    penalty: Annotated[
        Literal["out_l1", "out_l1_sq", "score_l1", "scale", "param_l1"],
        "magnitude of the noise, its square, the score's, one scale of a batch, or the weights' magnitude",
    ] = "out_l1"
    r: Annotated[Weight, "weight of the penalty; 0: plain training"] = 0.1
    grid: Annotated[
        tuple[Positive, ...], SOME, "weights that compress regularized tries, beside the plain training"
    ] = (0.01, 0.03, 0.1, 0.3)
    basis: Annotated[Literal["pixel", "wavelet"], "coordinates of the prediction: pixels, or one Haar level"] = "pixel"
    center: Annotated[bool, "penalise score + x, exactly sparse on coordinates that are N(0, 1)"] = False


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """The sampler. A layout chosen by a timing may let two runs differ in their last digits."""

    scheduler: Annotated[
        SamplerName, "a diffusers scheduler; own: the model's, with DDIM in place of DDPM, which needs all its steps"
    ] = "own"
    spacing: Annotated[
        Spacing, "which timesteps, or noise levels (karras, lambdas: even log-SNR); own: as the scheduler has it"
    ] = "own"
    order: Annotated[Order, "of a solver that has several; 0: its own"] = 0
    shift: Annotated[Shift, "of flow matching's noise levels; 0: the process's own"] = 0.0
    steps: Annotated[Count, "sampling steps, at most the timesteps of the training"] = 50
    guidance: Annotated[
        float, "weight of classifier-free guidance by the model itself, as its pipeline's guidance_scale; 1: none"
    ] = 1.0
    variance: Annotated[Literal["posterior", "beta"], "what ddpm adds: the posterior's, or beta"] = "posterior"
    batch: Annotated[Batch, "images of a sampling batch; changes the speed, not the images"] = 256
    timed: Annotated[Batch, "images of a batch that is timed, and that a budget in milliseconds is for"] = 64
    layout: Annotated[
        Literal["auto", "contiguous", "channels_last"], "the entries' memory layout; auto: the faster one by a timing"
    ] = "auto"
    runtime: Annotated[
        RuntimeName, "what runs the entries' calls, which keeps their numbers; auto: the fastest by a timing"
    ] = "eager"


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """Error table, frontier, NSGA-II and the final round."""

    method: Annotated[Literal["frontier", "nsga2", "both"], "what proposes plans"] = "both"
    table: Annotated[
        Literal["damage", "local"],
        "errors that the frontier adds up: the measured damage to the final images, or each row's own error",
    ] = "damage"
    images: Annotated[Images, "images of a candidate, four for each feature or more"] = 1024
    error_images: Annotated[Count, "trajectories of the error table; its damages are paired, a few dozen do"] = 64
    fit: Annotated[Whole, "measured plans that the additive surrogate is fitted to; 0: none"] = 32
    population: Annotated[Count, "of NSGA-II"] = 8
    generations: Annotated[Count, "of NSGA-II, the initial population is the first"] = 2
    crossover: Annotated[Share, "probability of a crossover"] = 0.9
    mutation: Annotated[Literal["intended", "released"], "released: DDSM's, which never acts"] = "intended"
    rate: Annotated[Share, "probability of a gene's mutation; 0: one gene a plan"] = 0.0
    objective: Annotated[
        Literal["budget", "scalar"],
        "the plan returned: the best score within the budget, or DDSM's least score + trade * share of MACs",
    ] = "budget"
    trade: Annotated[Weight, "what all of the reference's MACs are worth, of objective scalar"] = 6.0
    init: Annotated[
        Literal["frontier", "uniform", "random"], "NSGA-II's first plans: the frontier's, uniform + random, or random"
    ] = "frontier"
    genes: Annotated[Count, "stretches of rows that share one entry, at most"] = 6
    race: Annotated[Count, "images of every sampler in the first round of a race; four times as many in the last"] = 16
    arms: Annotated[Count, "samplers with their steps whose rows are searched, for each budget"] = 4
    finalists: Annotated[Whole, "best plans measured again on fresh images, beside the dearest uniform one"] = 3
    converged: Annotated[Images, "converged pictures that are the data where a user brings none"] = 2048
    reuse: Annotated[tuple[Text, ...], FEW, "cuts at which features may be reused, by number, or out"] = ()
    precisions: Annotated[
        tuple[PrecisionName, ...],
        FEW,
        "precisions in which every entry is there too, as full@bf16; int8 by ONNX Runtime or OpenVINO",
    ] = ()
    final_images: Annotated[Images, "fresh images of a finalist"] = 4096


@dataclass(frozen=True, kw_only=True)
class ShrinkSpec:
    """Training-free corrections of the predicted noise; a walk from 1 and from 0 measures a few of each grid."""

    scales: Annotated[tuple[Positive, ...], FEW, "the grid of scales"] = (
        *(0.7, 0.76, 0.8, 0.84, 0.88, 0.91, 0.94, 0.96),
        *(0.98, 0.99, 1.01, 1.02, 1.04, 1.07),
    )
    thresholds: Annotated[tuple[Weight, ...], FEW, "the grid of soft thresholds"] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.28)
    parts: Annotated[Count, "stretches of rows that get their own correction"] = 4
    rounds: Annotated[Whole, "how often all stretches are gone through"] = 1
    images: Annotated[Images, "images of a candidate"] = 1024
    final_images: Annotated[Images, "fresh images of the last choice"] = 4096


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """The final measurement. `tolerance` is a share of the reference's distance; where that is within its floor (what
    perfect draws score by chance), of a hundredth of the data's spread."""

    images: Annotated[Images, "images of a plan; four for each feature or more, or nothing is decided"] = 4096
    features: Annotated[
        Text,
        "own (a classifier of the data), fashion, digits, file:DIR, imagenet, inception:FILE, dinov2, pixels (none)",
    ] = "own"
    repeats: Annotated[Count, "timed trajectories of each plan, in turns"] = 5
    free: Annotated[bool, "look for the best stock sampler of the reference, and hold the plan against it too"] = True
    feature_steps: Annotated[Count, "training steps of the own classifier"] = 1500
    bootstrap: Annotated[Count, "resamples of an interval"] = 500
    tolerance: Annotated[Share, "the loss that counts as held"] = 0.05


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of one run.

    Sections are frozen dataclasses; variants by `dataclasses.replace` or `edit`.
    """

    name: Annotated[Text, "of the recipe that this one began as"] = "default"
    seed: Annotated[int, Bounds(0, MAX_SEED), "of everything that is drawn"] = 0
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
        require_typed(self, do="change it with --set")
        _require_texts(self)
        _require_widths(self)
        _require_steps(self)
        _require_levels(self.model)

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
        theirs = {leaf.name: leaf.value for leaf in leaves(other)}
        return [leaf.name for leaf in leaves(self) if leaf.value != theirs[leaf.name]]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """recipe.json of a run folder: the recipe (None: the verb has none), what the command named, and the machine.

    `inputs`: the verb, paths and goal as they were given, and the fingerprints of what lay there, "model_content" and
    "data_content"; runs of before 2026-11-26 have none. `diverged`: the settings under which its training diverged
    before it went on with steadier ones, e.g. [{"train.lr": 30.0}].
    `read`: what was read, in words (see `engine/reading.py`).
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
        file, do = folder / "recipe.json", "choose another --out"
        record = read_json(file, what="the record of a run", do=do)
        return build(cls, renewed(record), "", file, error=RunError, do=do)

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether a folder is a run's."""
        try:
            return (folder / "recipe.json").is_file() and bool(cls.load(folder))
        except HalfstepError:
            return False

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


DROPPED = ("search.step_counts", "search.shrink")
"""Fields of records of before 2026-11-27 that say nothing any more: steps and corrections are always searched."""
RENAMED = {"search.weights": "search.table"}
"""Fields of the recipe by their names in records of before 2026-11-27, and what they are called now."""
REVALUED = {
    "search.table": {"influence": "damage", "uniform": "local"},
    "search.objective": {"pareto": "budget"},  # it returned the best within the budget too
}
"""Values by what those records call them."""


def renewed(record: Any) -> Any:
    """A run's record as it would be written today: renamed fields and values of its recipe by their present names."""
    recipe = record.get("recipe") if isinstance(record, Mapping) else None
    if not isinstance(recipe, Mapping):
        return record
    recipe = {name: dict(part) if isinstance(part, Mapping) else part for name, part in recipe.items()}
    for old, new in RENAMED.items():
        section, name = old.split(".")
        if isinstance(part := recipe.get(section), dict) and name in part:
            value = part.pop(name)
            part.setdefault(new.split(".")[1], value)
    for path in DROPPED:
        section, name = path.split(".")
        if isinstance(part := recipe.get(section), dict):
            part.pop(name, None)
    for path, values in REVALUED.items():
        section, name = path.split(".")
        if isinstance(part := recipe.get(section), dict) and isinstance(part.get(name), str):
            part[name] = values.get(part[name], part[name])
    return {**record, "recipe": recipe}


def field_names() -> list[str]:
    """Every editable name, e.g. "train.steps"."""
    return [leaf.name for leaf in leaves(Recipe())]


def settings(recipe: Recipe) -> dict[str, tuple[str, list[Leaf]]]:
    """Every field of a recipe by its section: the first line of what is said about the section, and its fields."""
    found: dict[str, tuple[str, list[Leaf]]] = {}
    for leaf in leaves(recipe):
        section = leaf.name.rpartition(".")[0]
        about = type(getattr(recipe, section) if section else recipe).__doc__ or ""
        found.setdefault(section, (" ".join(about.split("\n\n")[0].split()), []))[1].append(leaf)
    return found


def _hint(path: str) -> Any:
    """The hint of the field at a dotted path."""
    if path not in field_names():
        raise RecipeError(
            got=repr(path),
            expected="a field of the recipe",
            where="--set",
            do=f"did you mean {nearest(path, field_names())}?",
        )
    hint: Any = Recipe
    for part in path.split("."):
        hint = hints_of(hint)[part]
    return hint


def _require_texts(recipe: Recipe) -> None:
    for leaf in leaves(recipe):
        for value in leaf.value if isinstance(leaf.value, tuple) else (leaf.value,):
            if isinstance(value, str) and "\0" in value:
                do = "change it with --set"
                raise RecipeError(got=shown(value), expected="a text without NUL", where=leaf.name, do=do)


def _require_widths(recipe: Recipe) -> None:
    widths = recipe.slim.widths
    if len(set(widths)) != len(widths):
        raise RecipeError(
            got=widths,
            expected="different widths in (0, 1]",
            where="slim.widths",
            do="write e.g. --set slim.widths=1,0.75,0.5,0.25",
        )


def _require_steps(recipe: Recipe) -> None:
    """No sampler has more steps than the training has timesteps."""
    most = recipe.noise.timesteps
    if recipe.sample.steps > most:
        raise RecipeError(
            got=recipe.sample.steps,
            expected=f"at most {most}, the timesteps of the training",
            where="sample.steps",
            do="take fewer steps",
        )


def _require_levels(model: ModelSpec) -> None:
    if model.kind == "unet" and len(model.attention) != len(model.channels):
        raise RecipeError(
            got=f"{len(model.attention)} flags",
            expected=f"one for each of the {len(model.channels)} levels",
            where="model.attention",
            do="write e.g. --set model.attention=false,true",
        )
