"""The command line: a thin face over the verbs. Errors of the user are one line and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import typer
import typer.core

import halfstep.core.threads  # noqa: F401  (for its effect: before torch, which the verbs import)
from halfstep import __version__
from halfstep.app.options import Common, common, completed
from halfstep.app.terminal import RichWatch, accept_any_text, console, line, notes, settings_table
from halfstep.core.bundled import BUNDLED
from halfstep.core.errors import HalfstepError, RunError
from halfstep.core.machine import apart, is_done, launched, require_alone
from halfstep.core.recipe import Recipe, RunRecord, RuntimeName, settings
from halfstep.core.recipes import RECIPES, named

TOGETHER = ("train", "compress", "optimize", "sample", "evaluate")
"""The verbs that a launcher of several processes may run."""
RESUMED = ("demo", "train", "compress", "optimize", "search", "tune", "shrink", "compare")
"""The verbs that go on from where they were when the command is repeated; the others begin anew."""


UsageError: Any = typer.BadParameter.__base__
"""What typer raises for words that no option or verb takes; it has no public name of its own."""


@contextmanager
def one_line() -> Iterator[None]:
    """Words that no option or verb takes are an error of one line, where typer would draw a box of five."""
    try:
        yield
    except UsageError as error:
        if not (told := error.format_message().removesuffix(".").replace("Value error, ", "")):
            raise  # a command without a word after it, which gets its help
        command = error.ctx.command_path if error.ctx else "halfstep"
        line(f"error: {told}; see {command} --help", to=notes, style="red")
        raise typer.Exit(2) from None


class Verbs(typer.core.TyperGroup):
    """The root of the command line; Ctrl-C says how to go on, which typer would swallow."""

    def make_context(self, *args: Any, **more: Any) -> Any:
        with one_line():
            return super().make_context(*args, **more)

    def invoke(self, ctx: Any) -> Any:
        try:
            with one_line():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            do = "; repeat the command to go on from there" if ctx.invoked_subcommand in RESUMED else ""
            line(f"stopped{do}", to=notes, style="yellow")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Make a diffusion model cheap to run, and prove that its pictures held.\n\n"
    "Start with `halfstep demo`, then `halfstep optimize --model DIR --data folder:DIR --budget 0.5 --out RUN`.\n\n"
    "Exit codes: 0, done; 2, refused, with what to do in one line; 130, stopped by Ctrl-C. Completion of your shell: "
    "`halfstep --install-completion`.",
)
compress_app = typer.Typer(
    no_args_is_help=True, help="Make cheaper denoisers that can stand in for yours: one METHOD each."
)
app.add_typer(compress_app, name="compress")

# Typer's script for zsh, autoloaded by the first Tab of a shell, registers itself for the next Tab and offers nothing
# (pallets/click#2344 is the same fault); a file that is being autoloaded completes at once. Typer has no public door: a
# release that keeps its scripts elsewhere costs zsh its first Tab again, and no more.
with suppress(ImportError, KeyError):
    from typer._completion_shared import _completion_scripts

    _completion_scripts["zsh"] += '\n[[ $zsh_eval_context[-1] == loadautofunc ]] && %(complete_func)s "$@"\n'

SCHEMES = ("idx:", "folder:", "npz:", "tar:", "parquet:", "hub:")
"""What `--data` begins with, where it is nothing bundled."""

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="A diffusers model or pipeline folder, `hub:NAME`, `fashion` or `digits`.",
        **completed(lambda: BUNDLED),
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        **completed(lambda: (*BUNDLED, *SCHEMES)),
        help="`fashion`, `digits` (bundled), `idx:DIR`, `folder:DIR`, `npz:FILE`, `tar:FILES`, `parquet:FILES` or "
        "`hub:NAME`.",
    ),
]
Out = Annotated[Path, typer.Option("--out", help="The run folder: made if absent, resumed if it is this run's.")]
MaybeModel = Annotated[
    str | None, typer.Option("--model", help="Begin from this model; without one, from the images alone.")
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="AMOUNT",
        help="What the plan may cost: `0.5` or `50%` of the reference's MACs, `0.3t` of its measured time, `120ms` or "
        "`1.5s` for one batch (`--batch`), `1.2GMACs` for one image (k, M, G, T).",
    ),
]
MaxLoss = Annotated[
    float | None, typer.Option("--max-loss", help="Instead of a budget: how much the score may rise, e.g. 0.05.")
]
Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--class", help="A class by name or number, of a class-conditional model; may be repeated.", show_default=False
    ),
]
TRAINED = ("recipe", "edits", "seed", "device", "processes")
"""Common options of what trains; its steps are the recipe's `train.steps`."""
SAMPLED = (
    *("recipe", "edits", "steps", "scheduler", "spacing", "order", "seed", "batch"),
    *("prompts", "guidance", "runtime", "device"),
)
"""Common options of what samples."""
SEARCHED = (*SAMPLED, "ray")
"""Common options of what searches."""


def told_version(asked: bool) -> None:
    """Print the version and end."""
    if asked:
        line(f"halfstep {__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=told_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before a command."""
    if ctx.invoked_subcommand not in TOGETHER:
        require_alone(f"halfstep {ctx.invoked_subcommand}")
    elif ctx.invoked_subcommand in ("sample", "evaluate"):
        apart()


def show(result: Any, as_json: bool, table: Callable[[], Any]) -> None:
    """Print a result as JSON, or as what `table` returns."""
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        console.print(table())


def places(as_json: bool, **found: Path) -> None:
    """Print where results are, each on a line after what it is; or the same as JSON."""
    if as_json:
        show({name: str(place) for name, place in found.items()}, True, str)
        return
    for name, place in found.items():
        line(f"{name + ':':<{1 + max(map(len, found))}} {place}")


def show_run(out: Path, page: Path, as_json: bool, *, plan: bool = False) -> None:
    """The table of a finished run, its plan where that is the result, and the place of its report; or all as JSON."""
    from halfstep.core.plan import StepPlan
    from halfstep.core.results import read_comparison
    from halfstep.report import tables, words
    from halfstep.report.page import rich_table

    if is_done():  # the first process shows it
        return
    record = read_comparison(out / "quality.json")
    chosen = StepPlan.load(out / "plan.json") if plan else None
    if as_json:
        told = {"report": str(page), "quality": record.to_json()}
        show(told | ({"plan": chosen.to_json()} if chosen else {}), True, str)
        return
    console.print(rich_table(tables.plans_table(record, brief=True)))
    if chosen:
        line(f"{chosen}\n{words.summary(record, chosen)}")
    line(f"report: {page}")


@app.command()
@common("edits", "seed", "device", "as_json")
def demo(common: Common, out: Out = Path("runs/demo"), budget: Budget = "0.1t") -> None:
    """The joint search on the bundled Fashion-MNIST model and its bank, at most 5 minutes on 2 CPU cores.

    A plan for a tenth of the time of what a stock pipeline does (DDIM, 50 steps), beside the best stock sampler.

    Example: `halfstep demo --out runs/demo`
    """
    from halfstep.app import verbs

    recipe = common.recipe_for("fashion")
    page = verbs.tune("fashion", "fashion", out, recipe, budget=budget, watch=RichWatch())
    show_run(out, page, common.as_json, plan=True)


@app.command()
@common(*TRAINED, "as_json", trains=True)
def train(data: Data, out: Out, common: Common, model: MaybeModel = None) -> None:
    """Train a dense denoiser; writes a stock diffusers DDPMPipeline to OUT/pipeline.

    The training steps are `--set train.steps=N`. Killed or stopped runs resume when the command is repeated.

    Example: `halfstep train --data folder:photos --out runs/dense --set data.size=32 --set train.steps=20000`
    """
    from halfstep.app import verbs

    done = verbs.train(data, out, common.recipe_for(data, dense=True), model=model, watch=RichWatch())
    if not is_done():
        places(common.as_json, pipeline=done, samples=out / "samples.png")


def compress(method: str, model: str | None, data: str, out: Path, recipe: Recipe, as_json: bool) -> None:
    """Compress by a method, and show what was measured."""
    from halfstep.app import verbs

    show_run(out, verbs.compress(method, model, data, out, recipe, watch=RichWatch()), as_json)


@compress_app.command()
@common(*SAMPLED, "processes", "as_json", trains=True)
def slimmable(model: Model, data: Data, out: Out, common: Common) -> None:
    """DDSM: a supernet whose narrower widths share its weights; evaluates every width and writes a report too.

    `halfstep search --model OUT` then mixes the widths step by step.

    Example: `halfstep compress slimmable --model runs/dense --data folder:photos --out runs/slim`
    """
    compress("slimmable", model, data, out, common.recipe_for(data), common.as_json)


@compress_app.command()
@common(*SAMPLED, "processes", "as_json", trains=True)
def sparse(
    model: Model,
    data: Data,
    out: Out,
    common: Common,
    pattern: Annotated[
        str | None, typer.Option(help="N:M, keep N of every M weights along a layer's input; default: 2:4.")
    ] = None,
) -> None:
    """SparseDM: fine-tune under N:M masks, with the dense model as the teacher; evaluates and writes a report too.

    Masks save multiply-accumulates on paper and bytes on disk; time only where a sparse kernel runs (see `profile`).

    Example: `halfstep compress sparse --model runs/dense --data folder:photos --pattern 2:4 --out runs/sparse`
    """
    recipe = common.recipe_for(data, sparse_pattern=pattern)
    compress("sparse", model, data, out, recipe, common.as_json)


@compress_app.command()
@common(*SAMPLED, "processes", "as_json", trains=True)
def spectral(
    model: Model,
    data: Data,
    out: Out,
    common: Common,
    reduction: Annotated[
        float | None, typer.Option(help="How many times fewer MACs than the model, its teacher; default: 8.")
    ] = None,
) -> None:
    """Spectral Diffusion: a slim wavelet-gated student, distilled by spectrum; evaluates and writes a report too.

    `halfstep search --model OUT` then mixes student and teacher step by step.

    Example: `halfstep compress spectral --model runs/dense --data folder:photos --reduction 8 --out runs/slim`
    """
    recipe = common.recipe_for(data, spectral_reduction=reduction)
    compress("spectral", model, data, out, recipe, common.as_json)


@compress_app.command()
@common(*SAMPLED, "processes", "as_json", trains=True)
def continuous(
    data: Data,
    out: Out,
    common: Common,
    model: Annotated[
        str | None, typer.Option("--model", help="A dense model to learn from as well, and to be compared with.")
    ] = None,
) -> None:
    """The Missing U: a continuous U-Net whose solver steps are chosen at sampling; evaluates and writes a report too.

    One set of weights becomes the entries continuous@1, @2 and @4; `halfstep search --model OUT` mixes them by step.

    Example: `halfstep compress continuous --data folder:photos --out runs/ode --set continuous.base=16`
    """
    recipe = common.recipe_for(data, dense=model is None)
    compress("continuous", model, data, out, recipe, common.as_json)


@compress_app.command()
@common(*SAMPLED, "processes", "as_json", trains=True)
def regularized(data: Data, out: Out, common: Common, model: MaybeModel = None) -> None:
    """Regularised score matching: trains a grid of penalty weights and keeps the best, beside its two controls.

    The best for the sampler and its `--steps`.

    The controls, one scale and one threshold for a plainly trained model, need no training: see `halfstep shrink`.

    Example: `halfstep compress regularized --data folder:photos --steps 50 --scheduler ddpm --out runs/reg`
    """
    recipe = common.recipe_for(data, dense=model is None)
    compress("regularized", model, data, out, recipe, common.as_json)


@app.command()
@common(*SEARCHED, "processes", "as_json", trains=True)
def optimize(
    model: Model, data: Data, out: Out, common: Common, budget: Budget = None, max_loss: MaxLoss = None
) -> None:
    """Your model and images in; a cheaper pipeline, its plan and a report out.

    Profiles the model, fine-tunes a supernet from it, searches which width runs at which step, and measures the result
    beside the reference. Killed or stopped runs resume when the command is repeated.

    Example: `halfstep optimize --model runs/dense --data folder:photos --budget 0.5 --out runs/half`
    """
    from halfstep.app import verbs

    recipe = common.recipe_for(data)
    page = verbs.optimize(model, data, out, recipe, budget=budget, max_loss=max_loss, watch=RichWatch())
    show_run(out, page, common.as_json, plan=True)


@app.command()
@common(*SEARCHED, "as_json")
def search(model: Model, data: Data, out: Out, common: Common, budget: Budget = None, max_loss: MaxLoss = None) -> None:
    """Search a plan for a bank that `compress` wrote, for a budget or a tolerated loss.

    Sampler, steps and spacing are searched with what runs in every row. A budget is a share of the MACs of what you run
    today (0.4), of its time (0.1t), milliseconds of a batch (120ms) or MACs of an image (300MMACs).

    Example: `halfstep search --model runs/slim --data folder:photos --budget 0.1t --out runs/plan10`
    """
    from halfstep.app import verbs

    recipe = common.recipe_for(data)
    plan = verbs.search(model, data, out, recipe, budget=budget, max_loss=max_loss, watch=RichWatch())
    show(plan.to_json(), common.as_json, lambda: str(plan))


@app.command()
@common(*SEARCHED, "as_json")
def tune(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "--pipeline",
            help="A diffusers model or pipeline, `hub:NAME`, `fashion`.",
            **completed(lambda: BUNDLED),
        ),
    ],
    out: Out,
    common: Common,
    data: Annotated[
        str | None, typer.Option("--data", help="Images to hold the pictures against; default: the model's own.")
    ] = None,
    budget: Budget = None,
    max_loss: MaxLoss = None,
) -> None:
    """The fastest plan without training: minutes, not hours.

    Searches sampler, steps, spacing, features reused between steps, corrections, and the stand-ins that the model
    brings, and measures the plan beside what you run today and the best stock sampler. Without a budget: the cheapest
    plan that is no worse than today's. Without images the model's own converged pictures are the data. Of a pipeline of
    text, prompts or images with captions say what is drawn; `halfstep.attach(pipe, "RUN")` then runs the plan under it.

    Example: `halfstep tune --model runs/dense --out runs/tuned`

    Example: `halfstep tune --pipeline PIPE --prompts prompts.txt --guidance 5 --out runs/tuned`
    """
    from halfstep.app import verbs

    recipe = common.recipe_for(data or "")
    page = verbs.tune(model, data, out, recipe, budget=budget, max_loss=max_loss, watch=RichWatch())
    show_run(out, page, common.as_json, plan=True)


@app.command()
@common(*SAMPLED, "dtype", "processes", "as_json")
def sample(
    model: Model,
    out: Out,
    common: Common,
    count: Annotated[int, typer.Option(help="How many images.", min=1, max=1_000_000)] = 16,
    classes: Classes = None,
) -> None:
    """Draw images: one PNG each, and grid.png. Image k depends on the seed and k alone.

    A step-aware pipeline runs its own plan. `--scheduler` and `--steps` say the sampler of a dense model, or one under
    which a pipeline's reference runs in place of its plan.
    A class-conditional model draws the classes of `--class` in turn, or all that it has.

    Example: `halfstep sample --model runs/half --count 64 --out pictures`
    """
    from halfstep.app import verbs

    grid = verbs.sample(
        model,
        out,
        common.recipe_for(""),
        count=count,
        classes=classes or (),
        own_plan=not common.says_sampler,
        dtype=common.dtype,
        watch=RichWatch(),
    )
    places(common.as_json, images=out, grid=grid)


@app.command()
@common(*(name for name in SAMPLED if name not in ("seed", "batch", "device")), "as_json")
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, a pipeline or a model, as `--model` takes it.")],
    common: Common,
    out: Annotated[Path, typer.Option("--out", help="A folder that is not there yet.")],
    to: Annotated[
        Literal["onnx", "openvino", "diffusers"],
        typer.Option("--to", help="Graphs for `halfstep-run`, or a pipeline's folder."),
    ] = "onnx",
) -> None:
    """Write a plan so that it runs without PyTorch: a graph for each network that it calls, the sampler as numbers.

    `pip install halfstep-run` (numpy and onnxruntime alone) then draws: `halfstep-run DIR --count 16 --out pictures`.
    A model without a plan is exported under `--scheduler` and `--steps`.

    Example: `halfstep export runs/plan10 --to onnx --out exported`
    """
    from halfstep.app.export import export as write

    own = not common.says_sampler
    write(run, to, out, common.recipe_for(""), own_plan=own, watch=RichWatch())
    places(common.as_json, exported=out)


@app.command()
@common("prompts", "device")
def studio(
    common: Common,
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN…", help="Runs, pipelines or models; default: `fashion`.")
    ] = None,
    port: Annotated[int, typer.Option(help="Where it listens, on this machine alone.", min=1, max=65535)] = 7860,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where pipelines are saved; default: RUN/studio, or runs/studio.")
    ] = None,
) -> None:
    """Look at plans in a browser: by price, beside the reference, edited row by row, as a film.

    A run that is still being written shows what is there. Needs `pip install 'halfstep[studio]'`.

    Example: `halfstep studio runs/half`
    """
    from halfstep.app.serving import require_free, require_studio, served

    require_studio()
    require_free(port)
    from halfstep.app.exploring import explore

    recipe, names = common.recipe_for(""), list(dict.fromkeys(runs or ["fashion"]))
    with served({name: explore(name, recipe, out, RichWatch()) for name in names}, port) as (address, wait):
        line(f"studio: {address} (Ctrl-C ends it)")
        wait()


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    to: Annotated[str, typer.Option("--to", metavar="OWNER/NAME", help="What it is called on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; without, for you alone.")] = False,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Write what would be sent there, and send nothing.")
    ] = None,
) -> None:
    """Send a run's pipeline to the Hugging Face hub, with a model card made from its report.

    Example: `halfstep push runs/half --to me/half --folder card`
    """
    from halfstep.app.card import push as send

    line(f"pushed: {send(run, to, private=not public, folder=folder)}")


@app.command()
@common("recipe", "edits", "seed", "batch", "runtime", "device", "ray", "dtype", "processes", "as_json")
def evaluate(model: Model, data: Data, out: Out, common: Common) -> None:
    """Measure a pipeline's plan beside its reference: Fréchet distance, KID, precision, recall, each with an interval.

    The plan says the sampler and the steps; for a dense model the recipe does, and it is measured alone.

    Example: `halfstep evaluate --model runs/half --data folder:photos --out runs/check --set eval.images=10000`
    """
    from halfstep.app import verbs
    from halfstep.report import tables
    from halfstep.report.page import rich_table

    record = verbs.evaluate(model, data, out, common.recipe_for(data), dtype=common.dtype, watch=RichWatch())
    show(record.to_json(), common.as_json, lambda: rich_table(tables.plans_table(record, brief=True)))


@app.command()
@common("recipe", "edits", "seed", "batch", "prompts", "guidance", "runtime", "device", "dtype", "as_json")
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Runs, pipelines, models as `--model` takes them. `RUN@SAMPLER:STEPS` runs the dense network under "
            "that sampler in place of its plan, `NAME=RUN` says what it is called.",
        ),
    ],
    data: Data,
    out: Out,
    common: Common,
) -> None:
    """Pipelines side by side, ours or stock, on the same noise, in turns on this machine, held against the first.

    Parameters, bytes, MACs, milliseconds at batch 1 and at `--batch`, memory; quality with intervals and the verdict
    beside the first; how true pictures are to the first one's, and the nearest image of your data to some of them, to
    see what was memorised. OUT has report.html with the frontier and the pictures, compare.csv and compare.json.
    All must draw pictures of one size under the same conditions. `--set eval.images=N` says how many are drawn.

    Example: `halfstep compare dense@ddim:50 dense@unipc:6 ours=runs/half --data folder:photos --out runs/side`
    """
    from halfstep.app.comparison import compare as measure
    from halfstep.report.compared import quality_table
    from halfstep.report.page import rich_table

    record = measure(runs, data, out, common.recipe_for(data), dtype=common.dtype, watch=RichWatch())
    show(record.to_json(), common.as_json, lambda: rich_table(quality_table(record, brief=True)))
    if not common.as_json:
        line(f"report: {out / 'report.html'}\ntable:  {out / 'compare.csv'}")


@app.command()
@common("batch", "runtime", "device", "dtype", "as_json")
def profile(
    model: Model,
    common: Common,
    repeats: Annotated[int, typer.Option(help="Timed calls per entry.", min=1, max=10_000)] = 10,
) -> None:
    """Parameters, MACs, latency and memory of a denoiser, or of every entry of a step-aware pipeline.

    The latency is of one call with `--batch` images (default: 1). With `--runtime auto` the
    table is that of every runtime that is installed, at batch 1 and at `--batch`; compiling takes up to minutes.

    Example: `halfstep profile --model digits --batch 64`
    """
    from halfstep.app import inspection, verbs
    from halfstep.report.page import rich_table
    from halfstep.report.tables import costs_table, runtimes_table

    batch, watch, asked = common.batch or 1, RichWatch(), cast(RuntimeName, common.runtime or "eager")
    if asked == "auto":
        found = inspection.runtimes(model, sorted({1, batch}), repeats=repeats, dtype=common.dtype, watch=watch)
        show(found.to_json(), common.as_json, lambda: rich_table(runtimes_table(found)))
        return
    costs = verbs.profile(model, batch=batch, repeats=repeats, dtype=common.dtype, runtime=asked, watch=watch)
    record = {name: cost.to_json() for name, cost in costs.items()}
    show(record, common.as_json, lambda: rich_table(costs_table(costs, next(iter(costs)))))


@app.command()
@common("device", "as_json")
def spectrum(
    models: Annotated[list[str], typer.Option("--model", help="A denoiser or pipeline; repeat it to compare several.")],
    data: Data,
    out: Out,
    common: Common,
    timesteps: Annotated[
        list[int] | None, typer.Option("--timestep", help="Noise level, 0 to 999; may be repeated.", show_default=False)
    ] = None,
    images: Annotated[int, typer.Option(help="Images to average over.", min=1)] = 256,
) -> None:
    """Which frequencies a denoiser loses: power spectra of its clean estimate, the data and the best linear denoiser.

    Writes OUT/spectrum.json and OUT/report.html with one picture per timestep.

    Example: `halfstep spectrum --model runs/dense --model runs/small --data folder:photos --out runs/spectrum`
    """
    from halfstep.app import inspection

    asked = timesteps or (20, 100, 300, 600)
    page = inspection.spectrum(models, data, out, timesteps=asked, images=images, watch=RichWatch())
    places(common.as_json, report=page)


@app.command()
@common("seed", "device", "as_json")
def denoise(
    models: Annotated[list[str], typer.Option("--model", help="A denoiser or pipeline; repeat it to compare several.")],
    images: Annotated[list[Path], typer.Option("--image", help="A picture file of any size; may be repeated.")],
    out: Out,
    common: Common,
    noise: Annotated[float, typer.Option(help="Standard deviation of the noise, on pictures from 0 to 1.")] = 0.1,
    steps: Annotated[
        list[int] | None, typer.Option("--steps", help="Sampling steps of a tile (default 1); may be repeated.", min=1)
    ] = None,
    noisy: Annotated[bool, typer.Option("--noisy", help="The pictures are noisy already: only restore them.")] = False,
    classes: Classes = None,
) -> None:
    """Denoise real pictures with a diffusion model, beside classical denoisers: PSNR, SSIM, time per picture.

    One step gives the highest PSNR, several sharper pictures. Pictures larger than the model are done in tiles.
    A class-conditional model needs the pictures' class.

    Example: `halfstep denoise --model runs/ode --noise 0.1 --image photo.png --steps 1 --steps 5 --out runs/denoised`
    """
    from halfstep.app import inspection
    from halfstep.report.page import rich_table
    from halfstep.report.tables import restored_table

    found = inspection.denoise(
        models,
        images,
        out,
        inspection.Noise(level=noise, there=noisy, seed=common.seed or 0),
        steps=steps or (1,),
        classes=classes or (),
        watch=RichWatch(),
    )
    if found:
        show([record.to_json() for record in found], common.as_json, lambda: rich_table(restored_table(found)))
    if not common.as_json:
        line(f"pictures: {out}, side by side in {out / 'report.html'}")


@app.command()
@common(*SAMPLED, "as_json")
def shrink(model: Model, data: Data, out: Out, common: Common) -> None:
    """Better pictures in few steps without training: scale and threshold the predicted noise, row by row.

    Walks along a grid of scales and one of thresholds for all rows, then tries stretches of rows, by the distance to
    your images; the last choice is made on fresh seeds, and may be to correct nothing. A pipeline's own plan is
    corrected, unless `--steps` or `--scheduler` says another.

    Example: `halfstep shrink --model runs/dense --data folder:photos --steps 20 --out runs/shrunk`
    """
    from halfstep.app import verbs

    recipe = common.recipe_for(data)
    steps = recipe.sample.steps if common.says_sampler else None
    page = verbs.shrink(model, data, out, recipe, steps=steps, watch=RichWatch())
    show_run(out, page, common.as_json, plan=True)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")]) -> None:
    """Write the report of a finished run again (after an update of Halfstep, say).

    A run of optimize, tune, compress, shrink, spectrum or compare.

    Example: `halfstep report runs/half`
    """
    from halfstep.app import verbs

    line(f"report: {verbs.report(folder)}")


@app.command()
@common(*TRAINED[:-1], "as_json")
def features(data: Data, out: Out, common: Common) -> None:
    """Train the feature classifier that Fréchet distances on your data rest on.

    Example: `halfstep features --data folder:photos --out runs/features --set eval.feature_steps=3000`
    """
    from halfstep.app import measurement

    done = measurement.features(data, out, common.recipe_for(data), watch=RichWatch())
    places(common.as_json, features=done)


@app.command("recipe")
@common("edits", "as_json")
def show_recipe(
    common: Common,
    name: Annotated[str, typer.Argument(metavar="[NAME|RUN]", help="A named recipe, or the folder of a run.")] = "",
) -> None:
    """Every field of a recipe: its value, what it may be, and what it means; or what a run used and read.

    Without a name: the recipes that there are, and the default one. Fields that differ from it are marked.

    Example: `halfstep recipe fashion16 --set sample.steps=10`, `halfstep recipe runs/half`
    """
    run = None
    if name not in RECIPES and Path(name, "recipe.json").is_file():
        run = RunRecord.load(Path(name))
    elif name not in RECIPES and Path(name).is_dir() and name:
        raise RunError(got="no recipe.json", expected="the folder of a run", where=name, do="give what a verb wrote")
    recipe = run.recipe if run else named(name or "default", where="the recipe")
    recipe = recipe and recipe.edit(common.edits or [])
    known = {} if name else {one: " ".join((make.__doc__ or "").split()) for one, make in RECIPES.items()}
    if common.as_json:
        show(_recipe_record(recipe, run, known), True, lambda: None)
        return
    for one, about in known.items():
        line(f"{one}: {about}")
    if run:
        for given in (*(f"{key}: {value}" for key, value in run.inputs.items()), *run.read):
            line(given)
    if recipe:
        console.print(settings_table(settings(recipe), set(recipe.differences(named("default")))))


def _recipe_record(recipe: Recipe | None, run: RunRecord | None, known: dict[str, str]) -> dict[str, Any]:
    usual = named("default")
    theirs = {leaf.name: leaf.value for _, leaves in settings(usual).values() for leaf in leaves}
    return {
        "recipes": known,
        "inputs": run.inputs if run else {},
        "read": list(run.read) if run else [],
        "fields": [
            {
                "name": leaf.name,
                "value": leaf.value,
                "default": theirs[leaf.name],
                "allowed": leaf.allowed,
                "meaning": leaf.meaning,
            }
            for _, leaves in (settings(recipe) if recipe else {}).values()
            for leaf in leaves
        ],
    }


@app.command()
@common("as_json")
def verify(
    folder: Annotated[Path, typer.Argument(help="A pipeline folder, or a run folder with all that is in it.")],
    common: Common,
    accept: Annotated[
        bool, typer.Option("--accept", help="Record what lies there now as right: after an edit of your own.")
    ] = False,
) -> None:
    """Whether a pipeline's or a run's files are those that were written; exit code 2 where one changed or is missing.

    Every pipeline carries the digests of its files (SHA256SUMS, for `sha256sum -c` too), every training state its own.

    Example: `halfstep verify runs/half`
    """
    from collections import Counter

    from halfstep.app import verify as verifying
    from halfstep.core.sums import State
    from halfstep.report.page import Table, rich_table

    found = verifying.verify(folder, accept=accept)
    rows = tuple((one.file, one.state) for one in found)
    count = Counter(one.state for one in found)
    told = ", ".join(f"{count[state]} {state}" for state in get_args(State) if count[state])
    note = f"{told}; recorded as they are now" if accept else told
    table = Table(title=str(folder), columns=("file", "state"), rows=rows, note=note)
    show([{"file": one.file, "state": one.state} for one in found], common.as_json, lambda: rich_table(table))
    if (count["changed"] or count["missing"]) and not accept:
        raise typer.Exit(2)


def main() -> None:
    """Run the command line; a user's error becomes one line on standard error and exit code 2, Ctrl-C exit code 130."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = lambda message, *_: line(f"note: {message}", to=notes, style="yellow")
    accept_any_text()
    try:
        app(prog_name="halfstep")
    except HalfstepError as error:
        which = f"process {os.environ.get('RANK')}: " if launched() > 1 and os.environ.get("RANK") != "0" else ""
        line(f"error: {which}{error}", to=notes, style="red")
        raise SystemExit(2) from None
    except (OSError, ValueError) as error:  # even a question about a path raises these; every door asks some
        where = getattr(error, "filename", None)
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            told = RunError(got="a name too long for a file", expected="a path", where=where, do="check it")
        elif "null byte" in str(error):
            told = RunError(got="a name with a NUL in it", expected="a path", where="an option", do="check it")
        else:
            raise
        line(f"error: {told}", to=notes, style="red")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
