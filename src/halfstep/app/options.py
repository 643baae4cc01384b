"""The options that verbs have in common: each declared once, with one meaning, all brought to a verb in one value."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, get_args

import typer

from halfstep.app.terminal import RichWatch
from halfstep.core.errors import RecipeError
from halfstep.core.machine import launched
from halfstep.core.recipe import MOST_IN_A_BATCH, Recipe, RuntimeName, SamplerName, Spacing, settings
from halfstep.core.recipes import RECIPES, named, usual
from halfstep.core.seeds import MAX_SEED
from halfstep.core.typed import nearest, shown

FIELDS = {
    "steps": "sample.steps",
    "scheduler": "sample.scheduler",
    "spacing": "sample.spacing",
    "order": "sample.order",
    "seed": "seed",
    "batch": "sample.batch",
    "prompts": "data.prompts",
    "guidance": "sample.guidance",
    "runtime": "sample.runtime",
}
"""The common options that are fields of the recipe."""

MOST_PROCESSES = 1024
"""Processes of one machine; more is a slip."""

_RECIPE, _COMMON = "Recipe", "Common settings"


def one_of(hint: Any) -> dict[str, Any]:
    """An option of a few words, a `Literal` of the recipe's: another one is an error with the nearest of them."""
    words = get_args(hint)

    def chosen(text: str) -> str:
        if text not in words:
            told = f"got {shown(text)}, expected one of {', '.join(words)}; did you mean {nearest(text, words)}?"
            raise typer.BadParameter(told)
        return text

    return {"parser": chosen, "metavar": f"[{'|'.join(words)}]", **completed(lambda: words)}


def completed(words: Callable[[], Iterable[str]]) -> dict[str, Any]:
    """What makes an option complete to these words, which are asked for when the shell asks."""

    def begin_with(incomplete: str) -> list[str]:
        return [word for word in words() if word.startswith(incomplete)]

    return {"autocompletion": begin_with}


def _fields() -> Iterable[str]:
    """Every field of a recipe, as `--set` begins."""
    return (leaf.name for _, leaves in settings(Recipe()).values() for leaf in leaves)


@dataclass(frozen=True, kw_only=True)
class Common:
    """What the common options of a command said; its verb has those that `common` names, the others are as here."""

    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            help=f"A named recipe: {', '.join(RECIPES)}. `halfstep recipe` shows them.",
            **completed(lambda: RECIPES),
            rich_help_panel=_RECIPE,
        ),
    ] = ""
    edits: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Edit a field of the recipe, e.g. `--set train.steps=2000`, the training steps; may be repeated. "
            "`halfstep recipe` lists all fields.",
            show_default=False,
            **completed(_fields),
            rich_help_panel=_RECIPE,
        ),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Sampling steps (`sample.steps`).", min=1, rich_help_panel=_COMMON),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            help="The sampler (`sample.scheduler`); `own` is the model's, DDIM in place of DDPM.",
            **one_of(SamplerName),
            rich_help_panel=_COMMON,
        ),
    ] = None
    spacing: Annotated[
        str | None,
        typer.Option(
            "--spacing",
            help="The sampler's timesteps (`sample.spacing`): evenly spaced ones, or noise levels after Karras or at "
            "even log-SNR (`lambdas`), where it has them.",
            **one_of(Spacing),
            rich_help_panel=_COMMON,
        ),
    ] = None
    order: Annotated[
        int | None,
        typer.Option(
            "--order",
            help="The order of dpmsolver++, unipc or deis (`sample.order`); 0: its own, 2.",
            min=0,
            max=3,
            rich_help_panel=_COMMON,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            help="Seed of everything that is drawn (`seed`); 0 where nothing else is said.",
            min=0,
            max=MAX_SEED,
            rich_help_panel=_COMMON,
        ),
    ] = None
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            help="Images of a batch that is drawn and timed (`sample.batch`, `sample.timed`); not what they are.",
            min=1,
            max=MOST_IN_A_BATCH,
            rich_help_panel=_COMMON,
        ),
    ] = None
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            help="A file of prompts, one a line (`data.prompts`), for a model of text; without, the images' captions.",
            rich_help_panel=_COMMON,
        ),
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance",
            help="Weight of classifier-free guidance (`sample.guidance`), a pipeline's `guidance_scale`; 1: none.",
            rich_help_panel=_COMMON,
        ),
    ] = None
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            help="What runs the networks (`sample.runtime`): PyTorch as it is, torch.compile, ONNX Runtime, OpenVINO; "
            "`auto`: the fastest here for each, by a timing that takes minutes.",
            **one_of(RuntimeName),
            rich_help_panel=_COMMON,
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            "--device", help="Where to run, e.g. `cpu` or `cuda:1`; default: a GPU if any.", rich_help_panel=_COMMON
        ),
    ] = ""
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="Precision of the networks that run.", rich_help_panel=_COMMON),
    ] = "float32"
    ray: Annotated[
        str,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Draw and measure on a Ray cluster: `local` (all processors of this machine), `auto` (the one that "
            "runs here), `HOST:PORT` or `ray://HOST:PORT`.",
            rich_help_panel=_COMMON,
        ),
    ] = ""
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            help="Processes of this machine that do it together; the images are the same for any number.",
            min=1,
            max=MOST_PROCESSES,
            rich_help_panel=_COMMON,
        ),
    ] = None
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="No progress: results, warnings and errors alone.", rich_help_panel=_COMMON),
    ] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False

    @property
    def says_sampler(self) -> bool:
        """Whether any option says how to sample."""
        return any(one is not None for one in (self.steps, self.scheduler, self.spacing, self.order))

    def recipe_for(self, data: str, *, dense: bool = False, **fields: Any) -> Recipe:
        """The named recipe with its edits; without a name, the bundled data's own recipe or the default.

        `fields`: what a verb's own options said, by the recipe's name with _ for its dot, e.g. `sparse_pattern`; None
        says nothing. Raises RecipeError for an option and a `--set` of the same field that say different things.
        """
        name = self.recipe or usual(data, dense=dense)
        given = {f"--{option}": (field, getattr(self, option)) for option, field in FIELDS.items()}
        given |= {f"--{path.split('_')[1]}": (path.replace("_", ".", 1), value) for path, value in fields.items()}
        edits = list(self.edits or [])
        for option, (field, value) in given.items():
            if value is not None:
                _require_agreeing(option, field, str(value), edits)
                edits.append(f"{field}={value}")
        if self.batch is not None and not any(edit.partition("=")[0].strip() == "sample.timed" for edit in edits):
            edits.append(f"sample.timed={self.batch}")
        return named(name).edit(edits)


def _require_agreeing(option: str, field: str, value: str, edits: list[str]) -> None:
    for path, _, other in (edit.partition("=") for edit in edits):
        if path.strip() == field and other.strip() != value:
            raise RecipeError(
                got=f"{option} {value} and --set {field}={other.strip()}",
                expected="one of them: they are the same field",
                where=option,
                do="leave one out",
            )


Verb = TypeVar("Verb", bound=Callable[..., None])


def _in_processes(asked: Common) -> None:
    """Run the command in several processes that train together, and end; in one of these, go on."""
    from halfstep.app.launch import launch, require_as_launched

    count = asked.processes or 1
    require_as_launched(count)
    if launched() == 1:
        raise typer.Exit(launch(count, asked.device))


def common(*names: str, trains: bool = False) -> Callable[[Verb], Verb]:
    """Give a verb with a parameter `common` these of `Common`'s options, on the command line and in its help.

    `--quiet` every verb has. With `--device` everything that the verb does runs there; with `--ray` what can be done
    side by side does; one that `trains` runs with `--processes` in several.
    """
    known = inspect.signature(Common, eval_str=True).parameters
    assert set(names) <= {item.name for item in fields(Common)}
    names = (*names, "quiet")

    def with_options(verb: Verb) -> Verb:
        own = inspect.signature(verb, eval_str=True)

        @functools.wraps(verb)
        def command(**given: Any) -> None:
            asked = Common(**{name: given.pop(name) for name in names})
            RichWatch.quiet = asked.quiet
            if trains and (asked.processes or 1) > 1:  # the launcher says where they run
                _in_processes(asked)
            elif asked.device:
                from halfstep.engine.device import use_device

                use_device(asked.device)
            if asked.ray:
                from halfstep.engine.cluster import use_cluster

                use_cluster(asked.ray, RichWatch())
            if asked.processes and not trains:
                from halfstep.app.workers import use_processes

                use_processes(asked.processes)
            verb(**given, common=asked)

        kept = [one for name, one in own.parameters.items() if name != "common"]
        command.__signature__ = own.replace(parameters=[*kept, *(known[name] for name in names)])  # type: ignore[attr-defined]
        return command  # type: ignore[return-value]

    return with_options
