"""The command line: a thin face over `run`. Errors of the user are one line and exit code 2."""

from __future__ import annotations

import errno
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import typer.core

import halfstep.threads  # noqa: F401  (for its effect: before torch, which the verbs import)
from halfstep.errors import HalfstepError, RunError
from halfstep.recipe import MAX_SEED, MOST_IN_A_BATCH, Recipe
from halfstep.recipes import RECIPES, named
from halfstep.terminal import RichWatch, accept_any_text, console, line, notes

RESUMED = ("demo", "train", "compress", "optimize", "search", "shrink")
"""The verbs that go on from where they were when the command is repeated; the others begin anew."""


class Verbs(typer.core.TyperGroup):
    """The root of the command line; Ctrl-C says how to go on, which typer would swallow."""

    def invoke(self, ctx: Any) -> Any:
        try:
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
    "Start with `halfstep demo`, then `halfstep optimize --model DIR --data folder:DIR --budget 0.5 --out RUN`.",
)
compress_app = typer.Typer(
    no_args_is_help=True, help="Make cheaper denoisers that can stand in for yours: one METHOD each."
)
app.add_typer(compress_app, name="compress")

Model = Annotated[str, typer.Option("--model", help="A diffusers model or pipeline folder, or `digits` (bundled).")]
Data = Annotated[
    str,
    typer.Option("--data", help="`digits`, `idx:DIR`, `folder:DIR`, `npz:FILE`, `tar:FILE` or `hub:NAME`."),
]
Out = Annotated[Path, typer.Option("--out", help="The run folder: made if absent, resumed if it is this run's.")]
RecipeName = Annotated[str, typer.Option("--recipe", help=f"A named recipe: {', '.join(RECIPES)}.")]
Edits = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Edit a field of the recipe, e.g. `--set train.steps=2000`; may be repeated.", show_default=False
    ),
]
Budget = Annotated[float | None, typer.Option(help="Share of the reference's MACs that the plan may use, in (0, 1].")]
MaxLoss = Annotated[
    float | None, typer.Option("--max-loss", help="Instead of a budget: how much the score may rise, e.g. 0.05.")
]
Classes = Annotated[
    list[str] | None,
    typer.Option(
        "--class", help="A class by name or number, of a class-conditional model; may be repeated.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def recipe_for(name: str, data: str, edits: list[str] | None, *, dense: bool = False) -> Recipe:
    """The named recipe with its edits; without a name, the bundled data's own recipe or the default."""
    if not name:
        name = "default" if data != "digits" else "digits-dense" if dense else "digits"
    return named(name).edit(edits or [])


def show(result: Any, as_json: bool, table: Callable[[], Any]) -> None:
    """Print a result as JSON, or as what `table` returns."""
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        console.print(table())


def show_run(out: Path, page: Path, *, plan: bool = False) -> None:
    """The table of a finished run, its plan where that is the result, and the place of its report."""
    from halfstep import story
    from halfstep.page import rich_table
    from halfstep.plan import StepPlan
    from halfstep.results import read_comparison

    record = read_comparison(out / "quality.json")
    console.print(rich_table(story.plans_table(record, brief=True)))
    if plan:
        chosen = StepPlan.load(out / "plan.json")
        line(f"{chosen}\n{story.summary(record, chosen)}")
    line(f"report: {page}")


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    budget: Budget = 0.5,
    edits: Edits = None,
) -> None:
    """The main job on the bundled digits and model: about 6 minutes on 2 CPU cores.

    Example: `halfstep demo --out runs/demo`
    """
    optimize(model="digits", data="digits", out=out, budget=budget, max_loss=None, recipe="digits", edits=edits)


@app.command()
def train(
    data: Data,
    out: Out,
    model: Annotated[
        str | None, typer.Option("--model", help="Train on from this folder instead of from scratch.")
    ] = None,
    recipe: RecipeName = "",
    edits: Edits = None,
) -> None:
    """Train a dense denoiser; writes a stock diffusers DDPMPipeline to OUT/pipeline.

    Killed or stopped runs resume when the command is repeated.

    Example: `halfstep train --data folder:photos --out runs/dense --set data.size=32 --set train.steps=20000`
    """
    from halfstep import run

    done = run.train(data, out, recipe_for(recipe, data, edits, dense=True), model=model, watch=RichWatch())
    line(f"pipeline: {done}\nsamples:  {out / 'samples.png'}")


@compress_app.command()
def slimmable(model: Model, data: Data, out: Out, recipe: RecipeName = "", edits: Edits = None) -> None:
    """DDSM: a supernet whose narrower widths share its weights; writes a bank of widths to OUT/pipeline.

    Example: `halfstep compress slimmable --model runs/dense --data folder:photos --out runs/slim`
    """
    from halfstep import compress

    done = compress.slimmable(model, data, out, recipe_for(recipe, data, edits), watch=RichWatch())
    line(f"pipeline: {done}\nsamples (a row for each entry, the dense net first): {out / 'samples.png'}")


@compress_app.command()
def sparse(
    model: Model,
    data: Data,
    out: Out,
    pattern: Annotated[str, typer.Option(help="N:M, keep N of every M weights along a layer's input.")] = "2:4",
    recipe: RecipeName = "",
    edits: Edits = None,
) -> None:
    """SparseDM: fine-tune under N:M masks, with the dense model as the teacher; evaluates and writes a report too.

    Masks save multiply-accumulates on paper and bytes on disk; time only where a sparse kernel runs (see `profile`).

    Example: `halfstep compress sparse --model runs/dense --data folder:photos --pattern 2:4 --out runs/sparse`
    """
    from halfstep import methods

    settings = recipe_for(recipe, data, [*(edits or []), f"sparse.pattern={pattern}"])
    show_run(out, methods.sparse(model, data, out, settings, watch=RichWatch()))


@compress_app.command()
def spectral(
    teacher: Annotated[str, typer.Option("--teacher", help="The dense model: a diffusers folder, or `digits`.")],
    data: Data,
    out: Out,
    reduction: Annotated[float, typer.Option(help="How many times fewer MACs than the teacher.")] = 8.0,
    recipe: RecipeName = "",
    edits: Edits = None,
) -> None:
    """Spectral Diffusion: a slim wavelet-gated student, distilled by spectrum; evaluates and writes a report too.

    `halfstep search --model OUT` then mixes student and teacher step by step.

    Example: `halfstep compress spectral --teacher runs/dense --data folder:photos --reduction 8 --out runs/slim`
    """
    from halfstep import methods

    settings = recipe_for(recipe, data, [*(edits or []), f"spectral.reduction={reduction}"])
    show_run(out, methods.spectral(teacher, data, out, settings, watch=RichWatch()))


@compress_app.command()
def continuous(
    data: Data,
    out: Out,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="A dense model to learn from as well, and to be compared with.")
    ] = None,
    recipe: RecipeName = "",
    edits: Edits = None,
) -> None:
    """The Missing U: a continuous U-Net whose solver steps are chosen at sampling; evaluates and writes a report too.

    One set of weights becomes the entries continuous@1, @2 and @4; `halfstep search --model OUT` mixes them by step.

    Example: `halfstep compress continuous --data folder:photos --out runs/ode --set continuous.base=16`
    """
    from halfstep import methods

    settings = recipe_for(recipe, data, edits, dense=teacher is None)
    show_run(out, methods.continuous(data, out, settings, teacher=teacher, watch=RichWatch()))


@compress_app.command()
def regularized(
    data: Data,
    out: Out,
    model: Annotated[
        str | None, typer.Option("--model", help="Train on from this model instead of from scratch.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps for which the weight is chosen.", min=1)] = 50,
    recipe: RecipeName = "",
    edits: Edits = None,
) -> None:
    """Regularised score matching: trains a grid of penalty weights and keeps the best, beside its two controls.

    The controls, one scale and one threshold for a plainly trained model, need no training: see `halfstep shrink`.

    Example: `halfstep compress regularized --data folder:photos --steps 50 --set sample.scheduler=ddpm --out runs/reg`
    """
    from halfstep import methods

    settings = recipe_for(recipe, data, [*(edits or []), f"sample.steps={steps}"], dense=model is None)
    show_run(out, methods.regularized(data, out, settings, model=model, watch=RichWatch()))


@app.command()
def optimize(
    model: Model,
    data: Data,
    out: Out,
    budget: Budget = None,
    max_loss: MaxLoss = None,
    recipe: RecipeName = "",
    edits: Edits = None,
) -> None:
    """Your model and images in; a cheaper pipeline, its plan and a report out.

    Profiles the model, fine-tunes a supernet from it, searches which width runs at which step, and measures the result
    beside the reference. Killed or stopped runs resume when the command is repeated.

    Example: `halfstep optimize --model runs/dense --data folder:photos --budget 0.5 --out runs/half`
    """
    from halfstep import run

    settings = recipe_for(recipe, data, edits)
    page = run.optimize(model, data, out, settings, budget=budget, max_loss=max_loss, watch=RichWatch())
    show_run(out, page, plan=True)


@app.command()
def search(
    model: Model,
    data: Data,
    out: Out,
    budget: Budget = None,
    max_loss: MaxLoss = None,
    recipe: RecipeName = "",
    edits: Edits = None,
    as_json: AsJson = False,
) -> None:
    """Search a plan for a bank that `compress` wrote, for a budget or a tolerated loss.

    With `--set search.step_counts=20,10` other numbers of steps compete for the same budget, and with
    `--set search.shrink=true` every plan's corrected twin (see `halfstep shrink`).

    Example: `halfstep search --model runs/slim --data folder:photos --budget 0.4 --out runs/plan40`
    """
    from halfstep import run

    settings = recipe_for(recipe, data, edits)
    found = run.search(model, data, out, settings, budget=budget, max_loss=max_loss, watch=RichWatch())
    show(found.plan.to_json(), as_json, lambda: str(found.plan))


@app.command()
def sample(
    model: Model,
    out: Out,
    count: Annotated[int, typer.Option(help="How many images.", min=1, max=1_000_000)] = 16,
    seed: Annotated[int, typer.Option(help="Image k depends on the seed and k alone.", min=0, max=MAX_SEED)] = 0,
    batch: Annotated[
        int, typer.Option(help="Images per batch; changes the speed, not the images.", min=1, max=MOST_IN_A_BATCH)
    ] = 64,
    classes: Classes = None,
) -> None:
    """Draw images with a step-aware pipeline: one PNG each, and grid.png.

    A class-conditional model draws the classes of `--class` in turn, or all that it has.

    Example: `halfstep sample --model runs/half --count 64 --out pictures`
    """
    from halfstep import run

    grid = run.sample(model, out, count=count, seed=seed, batch=batch, classes=classes or (), watch=RichWatch())
    line(f"images: {out}\ngrid:   {grid}")


@app.command()
def evaluate(
    model: Model, data: Data, out: Out, recipe: RecipeName = "", edits: Edits = None, as_json: AsJson = False
) -> None:
    """Measure a pipeline's plan beside its reference: Fréchet distance, KID, precision, recall, each with an interval.

    Example: `halfstep evaluate --model runs/half --data folder:photos --out runs/check --set eval.images=10000`
    """
    from halfstep import run, story
    from halfstep.page import rich_table

    record = run.evaluate(model, data, out, recipe_for(recipe, data, edits), watch=RichWatch())
    show(record.to_json(), as_json, lambda: rich_table(story.plans_table(record, brief=True)))


@app.command()
def profile(
    model: Model,
    batch: Annotated[int, typer.Option(help="Batch size of the latency.", min=1, max=MOST_IN_A_BATCH)] = 1,
    repeats: Annotated[int, typer.Option(help="Timed calls per entry.", min=1, max=10_000)] = 10,
    device: Annotated[
        str, typer.Option(help="Where to measure, e.g. `cpu` or `cuda:1`; default: where everything else runs.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Parameters, MACs, latency and memory of a denoiser, or of every entry of a step-aware pipeline.

    Example: `halfstep profile --model digits --batch 64`
    """
    from halfstep import run
    from halfstep.page import rich_table
    from halfstep.story import costs_table

    costs = run.profile(model, batch=batch, repeats=repeats, device=device, watch=RichWatch())
    record = {name: cost.to_json() for name, cost in costs.items()}
    show(record, as_json, lambda: rich_table(costs_table(costs, next(iter(costs)))))


@app.command()
def spectrum(
    models: Annotated[list[str], typer.Option("--model", help="A denoiser or pipeline; repeat it to compare several.")],
    data: Data,
    out: Out,
    timesteps: Annotated[
        list[int] | None, typer.Option("--timestep", help="Noise level, 0 to 999; may be repeated.", show_default=False)
    ] = None,
    images: Annotated[int, typer.Option(help="Images to average over.", min=1)] = 256,
) -> None:
    """Which frequencies a denoiser loses: power spectra of its clean estimate, the data and the best linear denoiser.

    Writes OUT/spectrum.json and OUT/report.html with one picture per timestep.

    Example: `halfstep spectrum --model runs/dense --model runs/small --data folder:photos --out runs/spectrum`
    """
    from halfstep import run

    page = run.spectrum(models, data, out, timesteps=timesteps or (20, 100, 300, 600), images=images, watch=RichWatch())
    line(f"report: {page}")


@app.command()
def denoise(
    models: Annotated[list[str], typer.Option("--model", help="A denoiser or pipeline; repeat it to compare several.")],
    images: Annotated[list[Path], typer.Option("--image", help="A picture file of any size; may be repeated.")],
    out: Out,
    noise: Annotated[float, typer.Option(help="Standard deviation of the noise, on pictures from 0 to 1.")] = 0.1,
    steps: Annotated[
        list[int] | None, typer.Option("--steps", help="Model calls per tile (default 1); may be repeated.", min=1)
    ] = None,
    noisy: Annotated[bool, typer.Option("--noisy", help="The pictures are noisy already: only restore them.")] = False,
    seed: Annotated[int, typer.Option(help="Of the added noise.", min=0, max=MAX_SEED)] = 0,
    classes: Classes = None,
    as_json: AsJson = False,
) -> None:
    """Denoise real pictures with a diffusion model, beside classical denoisers: PSNR, SSIM, time per picture.

    One step gives the highest PSNR, several sharper pictures. Pictures larger than the model are done in tiles.
    A class-conditional model needs the pictures' class.

    Example: `halfstep denoise --model runs/ode --noise 0.1 --image photo.png --steps 1 --steps 5 --out runs/denoised`
    """
    from halfstep import run
    from halfstep.page import rich_table
    from halfstep.story import restored_table

    found = run.denoise(
        models,
        images,
        out,
        noise=noise,
        steps=steps or (1,),
        noisy=noisy,
        seed=seed,
        classes=classes or (),
        watch=RichWatch(),
    )
    if found:
        show([record.to_json() for record in found], as_json, lambda: rich_table(restored_table(found)))
    if not as_json:
        line(f"pictures: {out}, side by side in {out / 'report.html'}")


@app.command()
def shrink(
    model: Model,
    data: Data,
    out: Out,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; default: the pipeline's own plan, or the recipe's.", min=1)
    ] = None,
    recipe: RecipeName = "",
    edits: Edits = None,
) -> None:
    """Better pictures in few steps without training: scale and threshold the predicted noise, row by row.

    Walks along a grid of scales and one of thresholds for all rows, then tries stretches of rows, by the distance to
    your images; the last choice is made on fresh seeds, and may be to correct nothing. Any sampler: `--set
    sample.scheduler=ddpm`.

    Example: `halfstep shrink --model runs/dense --data folder:photos --steps 20 --out runs/shrunk`
    """
    from halfstep import run

    settings = recipe_for(recipe, data, edits)
    show_run(out, run.shrink(model, data, out, settings, steps=steps, watch=RichWatch()), plan=True)


@app.command()
def report(out: Annotated[Path, typer.Option("--out", help="The folder of a finished optimize run.")]) -> None:
    """Write the report of a finished run again (after an update of Halfstep, say).

    Example: `halfstep report --out runs/half`
    """
    from halfstep import run

    line(f"report: {run.report(out)}")


@app.command()
def features(data: Data, out: Out, recipe: RecipeName = "", edits: Edits = None) -> None:
    """Train the feature classifier that Fréchet distances on your data rest on.

    Example: `halfstep features --data folder:photos --out runs/features --set eval.feature_steps=3000`
    """
    from halfstep import measured

    line(f"features: {measured.features(data, out, recipe_for(recipe, data, edits), watch=RichWatch())}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A pipeline folder, or a run folder with all that is in it.")],
    accept: Annotated[
        bool, typer.Option("--accept", help="Record what lies there now as right: after an edit of your own.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Whether a pipeline's or a run's files are those that were written; exit code 2 where one changed or is missing.

    Every pipeline carries the digests of its files (SHA256SUMS, for `sha256sum -c` too), every training state its own.

    Example: `halfstep verify runs/half`
    """
    from collections import Counter

    from halfstep import verify as verifying
    from halfstep.page import Table, rich_table
    from halfstep.sums import State

    found = verifying.verify(folder, accept=accept)
    rows = tuple((one.file, one.state) for one in found)
    count = Counter(one.state for one in found)
    told = ", ".join(f"{count[state]} {state}" for state in get_args(State) if count[state])
    note = f"{told}; recorded as they are now" if accept else told
    table = Table(title=str(folder), columns=("file", "state"), rows=rows, note=note)
    show([{"file": one.file, "state": one.state} for one in found], as_json, lambda: rich_table(table))
    if (count["changed"] or count["missing"]) and not accept:
        raise typer.Exit(2)


def main() -> None:
    """Run the command line; a user's error becomes one line on standard error and exit code 2, Ctrl-C exit code 130."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = lambda message, *_: line(f"note: {message}", to=notes, style="yellow")
    accept_any_text()
    try:
        app()
    except HalfstepError as error:
        line(f"error: {error}", to=notes, style="red")
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # which even a question about a path raises; every door asks some
            raise
        told = RunError(got="a name too long for a file", expected="a path", where=error.filename, do="check it")
        line(f"error: {told}", to=notes, style="red")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
