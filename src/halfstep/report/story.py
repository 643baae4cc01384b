"""Tell a finished run as a report, from what lies in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from halfstep.core import disk
from halfstep.core.errors import RunError
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import Recipe, RunRecord
from halfstep.core.results import (
    Comparison,
    FreeRecord,
    read_comparison,
    read_costs,
    read_spectra,
)
from halfstep.data.arrays import read_arrays
from halfstep.data.pictures import picture_grid
from halfstep.measure.films import Film, read_films
from halfstep.measure.restore import Restored
from halfstep.report.charts import (
    correction_curves,
    done_after,
    grid_curve,
    heatmap,
    pareto,
    spectra_curve,
    time_pareto,
    told_strip,
    training_curves,
)
from halfstep.report.page import Beside, Grid, Report, write_report
from halfstep.report.palette import amount
from halfstep.report.reels import Reel, Track
from halfstep.report.tables import costs_table, more_table, restored_table, spectra_table, steps_table, time_table
from halfstep.report.words import headline, numbers, to_decide
from halfstep.search.damage import ErrorTable
from halfstep.search.scores import SEARCHED, read_scores

MAX_PICTURES = 1 << 28
"""Bytes of pictures that a report is told from: the largest of ours has a few megabytes."""


def tell(out: Path) -> Path:
    """Write report.html and samples.png of a finished run that was measured, from what lies in its folder.

    Returns the report's path. Raises RunError when a file of the run is missing.
    """
    out, again = Path(out), "repeat the command that began the run, which finishes it"
    record = read_comparison(out / "quality.json", again)
    run = RunRecord.load(out)
    costs = read_costs(out / "cost.json", again)
    table = ErrorTable.load(out / "errors.json") if (out / "errors.json").exists() else None  # `compress` searches none
    plan = StepPlan.load(out / "plan.json")
    pictures = _pictures(out / "pictures.npz", again)
    scored = read_scores(out)
    searched = [one for one in scored if one.stage in SEARCHED and one.stage != "reference"] if table else []
    if run.recipe is None:
        raise RunError(got="a run without a recipe", expected="one that was measured", where=out, do=again)
    films = _films(out / "films.npz", again)
    told = films[1] if films else ()
    report = Report(
        title="Halfstep report",
        summary=headline(record, plan),
        warnings=record.about.warnings,
        todo=to_decide(record),
        numbers=numbers(record),
        facts=_facts(run.inputs, run.recipe, record, len(searched), table),
        parts=(
            _same_noise(record, pictures, told),
            time_table(record),
            time_pareto(record, free=_free(out)),
            *([told_strip(plan, record, costs)] if plan.nets != (plan.reference,) or not plan.corrected else []),
            *([_reel(record, plan, films[0], told)] if films else []),
            more_table(record),
            pareto(record, searched, run.recipe.search.images),
            *steps_table(scored, run.recipe.search.final_images),
            costs_table(costs, plan.reference),
            *correction_curves(plan),
            *([heatmap(table)] if table else []),
            *grid_curve(out),
            *training_curves(out),
            *(Grid(title=name, images=images, columns=8) for name, images in pictures.items()),
        ),
        files={name: what for name, what in FILES.items() if (out / name).exists()},
    )
    side = picture_grid(np.concatenate([pictures["reference"][:16], pictures["plan"][:16]]), columns=16)
    disk.write_png(out / "samples.png", side)
    return write_report(report, out)


def _same_noise(record: Comparison, pictures: Mapping[str, np.ndarray], told: tuple[str, ...]) -> Beside:
    """The first pictures of what is run today, of the best free and of the plan."""
    about, plans = record.about, record.plans
    called = {about.reference: "today", **({about.free: "best free"} if about.free else {}), "plan": "the plan"}
    called[about.reference] = "today"
    rows = {
        f"{said}, {amount(plans[name].wall_ms / about.batch)} ms an image": pictures[name][:8]
        for name, said in called.items()
        if name in pictures and name in plans
    }
    least = min(map(len, rows.values()))
    note = "In each column the same noise. The numbers below are of many more pictures than these."
    same = {name: images[:least] for name, images in rows.items()}
    return Beside(title="The same noise", rows=same, pictured=told, note=note)


def _films(file: Path, do: str) -> tuple[dict[str, Film], tuple[str, ...]] | None:
    """The films of a run and what they are of; None of runs of before, which kept none. Raises RunError."""
    return read_films(file, do) if file.exists() else None


def _reel(record: Comparison, plan: StepPlan, films: Mapping[str, Film], told: tuple[str, ...]) -> Reel:
    about = record.about
    names = {"reference": (about.reference, "today"), "free": (about.free, "best free"), "plan": ("plan", "the plan")}
    tracks = [
        _track(said, films[role], record.plans[name].wall_ms / about.batch, plan if role == "plan" else None)
        for role, (name, said) in names.items()
        if role in films and name in record.plans
    ]
    note = (
        f"The same {len(tracks[0].frames[0])} noises under each plan, as its sampler holds them after each call. The "
        f"clock is that of one image in a batch of {about.batch}: the time that was measured, shared out by what each "
        "call costs."
    )
    return Reel(title="From noise to picture", tracks=tuple(tracks), pictured=told, note=note)


def _track(name: str, film: Film, ms: float, plan: StepPlan | None) -> Track:
    """A film by the clock: `ms` is the whole trajectory's, of an image; without its `plan` all rows cost the same."""
    known = plan is not None and len(plan.rows) == film.of
    done = [0.0, *(done_after(plan) if plan and known else [(row + 1) / film.of for row in range(film.of)])]
    moments = zip(film.rows, film.ran, film.timesteps, strict=True)
    said = [
        "noise" if row < 0 else f"call {row + 1} of {film.of}: {str(ran)[:80]} at {timestep:.4g}"
        for row, ran, timestep in moments
    ]
    return Track(
        name=name, frames=film.frames, ms=tuple(float(ms * done[row + 1]) for row in film.rows), told=tuple(said)
    )


def _free(out: Path) -> FreeRecord | None:
    """What is free, where it was looked for. Raises RunError."""
    if not (out / "free.json").is_file():
        return None
    record: FreeRecord = disk.read_record(out / "free.json", FreeRecord, what="stock samplers", do="run again")
    return record


def _pictures(file: Path, do: str) -> dict[str, np.ndarray]:
    """The pictures of a run by the plan that drew them, uint8 [N, C, S, S]. Raises RunError."""
    what = "pictures of the reference and of the plan, uint8 [N, C, S, S]"
    found = read_arrays(file, MAX_PICTURES, what=what, do=do)
    shapes = {array.shape[1:] if array.dtype == np.uint8 and len(array) else () for array in found.values()}
    (shape, *others) = shapes or {()}
    if others or len(shape) != 3 or shape[0] not in (1, 3) or not {"reference", "plan"} <= set(found):
        told = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in found.items())
        raise RunError(got=told or "none", expected=what, where=file, do=do)
    return found


def tell_restored(out: Path, records: Sequence[Restored], shown: Mapping[str, np.ndarray]) -> Path:
    """Write report.html of `halfstep denoise`: the table, where originals are known, and pictures uint8 [C, H, W]."""
    report = Report(
        title="Denoised pictures",
        summary="What every method made of the same noisy pictures. Single files lie in the folders beside this page.",
        facts={},
        parts=(
            *([restored_table(records)] if records else []),
            *(Grid(title=name, images=image[None], columns=1) for name, image in shown.items()),
        ),
    )
    return write_report(report, out)


def tell_spectra(out: Path) -> Path:
    """Write report.html of what `halfstep spectrum` measured: one picture per timestep, all models in each.

    Raises RunError for a spectrum.json that is missing or holds something else.
    """
    record = read_spectra(out / "spectrum.json")
    report = Report(
        title="Power spectra",
        summary="A model that loses detail has less power at high frequencies than the linear bound allows.",
        facts={"data": record.data},
        parts=(
            spectra_table(record),
            *(spectra_curve(timestep, models) for timestep, models in record.timesteps.items()),
        ),
    )
    return write_report(report, out)


FILES = {
    "pipeline/": "the cheaper diffusers pipeline: StepAwarePipeline.from_pretrained",
    "plan.json": "what runs at each step",
    "quality.json": "every number of this page",
    "cost.json": "parameters, MACs, latency and memory of the bank",
    "errors.json": "the error table",
    "scores.jsonl": "every plan that was measured",
    "pictures.npz": "the first pictures of each plan",
    "films.npz": "how the first few of them came about",
    "free.json": "the stock samplers that were measured",
    "search.jsonl": "every plan that was measured",
}


def _facts(
    inputs: Mapping[str, str], recipe: Recipe, record: Comparison, searched: int, table: ErrorTable | None
) -> dict[str, str]:
    about, search = record.about, {}
    if table:
        search["search"] = (
            f"{searched} plans of {recipe.search.images} images each, and an error table on {table.images} trajectories"
        )
    return {
        "model": inputs.get("model", ""),
        "data": f"{inputs.get('data', '')}, fingerprint {about.data}",
        "goal": inputs.get("goal", inputs.get("verb", "")),
        "recipe": f"{recipe.name}, seed {recipe.seed}, {recipe.train.steps} training steps",
        **search,
        "time of the last call": f"{record.seconds or 0:.0f} s",
        **{key: str(value) for key, value in about.machine.items()},
    }
