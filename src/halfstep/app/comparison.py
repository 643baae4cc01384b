"""`compare`: any number of pipelines, ours or stock, side by side on the same noise, all held against the first."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from halfstep.app.estimate import Drawing, announce
from halfstep.app.measurement import drawings_of, judge_for, require_measurable
from halfstep.app.subject import Opened, contents_of, images_of, open_model, open_subject
from halfstep.app.workers import lead
from halfstep.core import disk
from halfstep.core.bundled import BUNDLED
from halfstep.core.errors import HalfstepError, ModelError, PlanError
from halfstep.core.folder import open_run
from halfstep.core.lock import releasing, require_free
from halfstep.core.machine import alone
from halfstep.core.plan import StepPlan
from halfstep.core.process import Process
from halfstep.core.recipe import Recipe, SamplerName
from halfstep.core.results import Compared, Fidelity, HeldOut, Pipeline, read_compared
from halfstep.core.seeds import Stage, own_random, stage_seed
from halfstep.core.typed import nearest, shown
from halfstep.core.watch import SILENT, Told, Watch
from halfstep.data.arrays import save_arrays
from halfstep.data.classes import listed
from halfstep.data.latents import shape_for
from halfstep.engine.bank import Bank, calls_of
from halfstep.engine.entry import Reuse, Rounded
from halfstep.engine.profiling import count_params, held_mib, peak_mib
from halfstep.engine.sampling import sample_images
from halfstep.engine.subject import Subject
from halfstep.engine.text import takes_text
from halfstep.measure.features import extract, slices_of
from halfstep.measure.fidelity import Converged, converged_plan, fidelities_of, stochastic
from halfstep.measure.judge import KEEP, Judge, Measured, measure_judged
from halfstep.measure.nearest import Near, nearest_images
from halfstep.nets.content import fingerprint
from halfstep.nets.denoiser import class_count, sample_shape
from halfstep.nets.hub import SCHEME
from halfstep.report.compared import csv_of, tell_compared

FAITHFUL = 32
"""Pictures that fidelity is taken of."""
SHOWN = 16
"""First pictures of each pipeline that the page shows, and whose nearest images of the data are looked for."""
HELD_OUT = 1000
"""Real images, at most, that say how near to the data a picture may be: a fair picture is nearer than all of them once
in a thousand times."""
MOST_NAME = 60


@releasing
@own_random
@alone
def compare(
    pipelines: Sequence[str], data: str, out: Path, recipe: Recipe, *, dtype: str = "float32", watch: Watch = SILENT
) -> Compared:
    """Measure pipelines side by side: what they cost, how good they are beside the first, how true to it, and whether
    they repeat images of the data. Writes compare.json, compare.csv and report.html; resumes when called again.

    `pipelines`: folders as `open_subject` takes them, each with NAME= before it and @SAMPLER:STEPS behind it where that
    is wanted. The same number is the same noise in all of them. `dtype`: in what precision they run, as torch names it.
    Raises ModelError for what is no pipeline and for those that draw different things, PlanError for a sampler that is
    none and for two of one name, HeldError for a run folder that is still written.
    """
    begun = time.time()
    entrants = _entrants([_asked(one) for one in pipelines], data, recipe, watch)
    first, subjects = entrants[0].subject, [one.subject for one in entrants]
    recipe = replace(first.recipe, sample=recipe.sample)
    require_measurable(first.images, recipe)
    inputs = {"verb": "compare", "model": ", ".join(map(str, pipelines)), "data": data, "dtype": dtype}
    read = list(dict.fromkeys(line for subject in subjects for line in subject.read()))
    out = open_run(out, recipe, inputs, contents_of(subjects), watch, read)
    if (out / "compare.json").is_file():
        tell_compared(out)
        return read_compared(out / "compare.json")
    judges = _judges(entrants, out, dtype, watch)
    for one in entrants:
        watch.say(f"{one.name}: {one.plan.sampler.told}, {len(one.plan.called)} calls")
    _draw(entrants, judges, recipe, watch)
    measured = measure_judged({one.name: (judges[one.source], one.plan) for one in entrants}, recipe, watch=watch)
    near, held_out = _near(measured, judges[entrants[0].source], first, watch)
    told = _Beside(_fidelities(entrants, judges, recipe, out, watch), near, held_out)
    rows = {one.name: _row(one, judges[one.source].bank, recipe.sample.timed, told) for one in entrants}
    record = replace(measured.record, seconds=round(time.time() - begun, 1))
    found = Compared(comparison=record, pipelines=rows, held_out=held_out, images=len(first.images))
    _write(found, measured.pictures, first, out)
    return found


def _write(found: Compared, pictures: Mapping[str, np.ndarray], subject: Subject, out: Path) -> None:
    """The pictures and the numbers, last of all compare.json, by which a call sees that nothing is left to measure; and
    the report on them."""
    pixels = subject.images.pixels
    kept: dict[str, np.ndarray] = {}
    for k, (name, row) in enumerate(found.pipelines.items()):  # by number: a name may be no name of a file
        kept[f"pictures-{k}"] = pictures[name][:SHOWN]
        kept[f"nearest-{k}"] = np.asarray(pixels[np.array(row.near_to)])
    disk.write_atomic(out / "pictures.npz", lambda path: save_arrays(path, kept))
    disk.write_text(out / "compare.csv", csv_of(found))
    disk.write_json(out / "compare.json", found.to_json())
    tell_compared(out)
    shutil.rmtree(out / "state" / "drawn", ignore_errors=True)


# ----------------------------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Asked:
    """A pipeline as it was asked for: its name, given or made of the rest; its folder; edits that say its sampler."""

    name: str
    given: bool
    source: str
    edits: tuple[str, ...]


@dataclass(frozen=True)
class Entrant:
    """A pipeline that is compared: what it runs, and the subject whose bank runs it."""

    name: str
    subject: Subject
    plan: StepPlan

    @property
    def source(self) -> str:
        return self.subject.source


def _asked(text: str) -> Asked:
    """NAME=FOLDER@SAMPLER:STEPS, of which the folder alone is needed. Raises PlanError for a sampler that is none."""
    name, _, rest = text.partition("=")
    given = bool(rest) and "/" not in name and not _is_there(text)
    source, edits, said = _sampler_of(rest if given else text)
    if not given:
        folder = Path(source)
        name = (folder.parent if folder.name == "pipeline" and folder.parent.name else folder).name or source
        name = (f"{name}@{said}" if said else name)[:MOST_NAME]
    if not name.strip() or len(name) > MOST_NAME or not name.isprintable():
        got, expected = f"the name {shown(name)}", f"1 to {MOST_NAME} printable characters"
        raise PlanError(got=got, expected=expected, where=shown(text), do="write NAME=FOLDER")
    return Asked(name, given, source, edits)


def _is_there(text: str) -> bool:
    return text in BUNDLED or Path(text).is_dir()


def _sampler_of(text: str) -> tuple[str, tuple[str, ...], str]:
    """A folder, the edits of a recipe that say the sampler behind it, and that as it was written."""
    source, at, said = text.rpartition("@")
    word, colon, steps = said.partition(":")
    if not at or "/" in said or _is_there(text):
        return text, (), ""
    if word not in get_args(SamplerName):
        if source.startswith(SCHEME):  # a revision of the hub
            return text, (), ""
        known = get_args(SamplerName)
        do = f"did you mean {nearest(word, known)}?"
        raise PlanError(got=f"sampler {shown(word)}", expected=f"one of {', '.join(known)}", where=shown(text), do=do)
    return source, (f"sample.scheduler={word}", *([f"sample.steps={steps}"] if colon else [])), said


def _entrants(asked: Sequence[Asked], data: str, recipe: Recipe, watch: Watch) -> list[Entrant]:
    """The pipelines, opened once each, under their names. Raises as `compare`."""
    if not asked:
        raise ModelError(got="no pipeline", expected="at least one", where="compare", do="name their folders")
    for one in asked:
        _require_finished(one.source)
    names = _names_of(asked)
    models = {one.source: open_model(one.source) for one in asked}
    _require_alike(models)
    found = []
    for name, one in zip(names, asked, strict=True):
        subject = open_subject(one.source, data, recipe.edit(one.edits), opened=models[one.source], watch=watch)
        own = subject.plan if not one.edits else None
        found.append(Entrant(name, subject, own or subject.reference()))
    return found


def _require_finished(source: str) -> None:
    """Raise HeldError for a run, or a pipeline in one, that another process works in."""
    folder = Path(source)
    for place in (folder, folder.parent) if folder.name == "pipeline" else (folder,):
        require_free(place)


def _names_of(asked: Sequence[Asked]) -> list[str]:
    """The names, numbered where several would be one. Raises PlanError for two that were given."""
    given = [one.name for one in asked if one.given]
    if twice := next((name for name in given if given.count(name) > 1), None):
        got = f"two pipelines {shown(twice)}"
        raise PlanError(got=got, expected="different names", where="compare", do="rename one")
    names: list[str] = []
    for one in asked:
        taken = {*names, *given} if not one.given else set()
        tries = (one.name if k == 1 else f"{one.name} ({k})" for k in range(1, len(asked) + 2))
        names.append(next(name for name in tries if name not in taken))
    return names


def _require_alike(models: Mapping[str, Opened]) -> None:
    """Raise ModelError for models that draw other things than the first: nothing could be held against it."""
    kinds = {source: _drawn_by(opened.bank) for source, opened in models.items()}
    first, *others = kinds
    strange = [source for source in others if kinds[source] != kinds[first]]
    if strange:
        raise ModelError(
            got="; ".join(f"{source}: {kinds[source]}" for source in strange),
            expected=f"{kinds[first]}, as {first}",
            where="compare",
            do="compare pipelines that draw the same thing",
        )


def _drawn_by(bank: Bank) -> str:
    """What a bank draws, from what noise and under what conditions, in words."""
    channels, size = shape_for(bank.config, bank.vae)
    latent = "" if bank.vae is None else f" from latents {list(sample_shape(bank.config)[1:])}"
    count = class_count(bank.config)
    known = f" ({listed(bank.classes)})" if bank.classes else ""
    under = f"of {count} classes{known}" if count else "of text" if takes_text(bank) else "without conditions"
    return f"{channels} channel{'s' * (channels > 1)} at {size}x{size}{latent} {under}"


# ----------------------------------------------------------------------------------------- what is drawn and measured


def _judges(entrants: Sequence[Entrant], out: Path, dtype: str, watch: Watch) -> dict[str, Judge]:
    """A judge for every folder, all with the same images and features; each keeps what it draws by content."""
    found: dict[str, Judge] = {}
    for one in entrants:
        if one.source not in found:
            bank, key = one.subject.stand_ins.to(getattr(torch, dtype)), one.subject.content["model_content"]
            judge = judge_for(bank, one.subject, out, watch, settled=out / "state" / key)
            judge.kept = out / "state" / "drawn" / key
            found[one.source] = judge
    return found


def _draw(entrants: Sequence[Entrant], judges: Mapping[str, Judge], recipe: Recipe, watch: Watch) -> None:
    """Draw what is not drawn yet, batch by batch, each kept as it is done."""
    seed, count = stage_seed(recipe.seed, Stage.REPORT), recipe.eval.images
    plans = {source: [one.plan for one in entrants if one.source == source] for source in judges}
    work = {source: judge.parts(plans[source], count, seed, KEEP) for source, judge in judges.items()}
    for source, judge in judges.items():
        announce(watch, judge.bank, drawings_of(plans[source], recipe), batch=judge.batch)
    done = 0
    with watch.stage("draw", sum(len(parts.names) for parts in work.values())) as told:
        for source, parts in work.items():
            lead(parts, partial(_add, told, done), judges[source].bank)
            done += len(parts.names)


def _add(told: Told, before: int, done: int) -> None:
    told(before + done)


@dataclass(frozen=True)
class _Beside:
    """What is known of the pipelines beside cost, time and distance."""

    fidelity: Mapping[str, tuple[Fidelity | None, str]]
    near: Mapping[str, Near]
    held_out: HeldOut


def _row(one: Entrant, bank: Bank, batch: int, told: _Beside) -> Pipeline:
    fidelity, target = told.fidelity[one.name]
    near, nets = told.near[one.name], [bank.entries[name] for name in one.plan.nets]
    models = list(dict.fromkeys(entry.model for entry in nets))
    # what reuses features or is in fewer bits has the parameters of its source
    links = [entry.weights for entry in nets]
    names = [
        link.of if isinstance(link, Reuse | Rounded) else name for name, link in zip(one.plan.nets, links, strict=True)
    ]
    kept = bank.only((bank.reference, *one.plan.nets))
    return Pipeline(
        source=one.source,
        what=f"{one.plan.sampler.told}; {_runs(one.plan)}",
        params=sum(count_params(model) for model in dict.fromkeys(bank.entries[name].model for name in names)),
        stored_mib=_stored_mib(bank, one.plan),
        held_mib=held_mib(*models, *([] if bank.vae is None else [bank.vae])),
        peak_mib=_peak(kept, one.plan, batch),
        fidelity=fidelity,
        target=target,
        near=tuple(near.distance.tolist()),
        near_to=tuple(near.number.tolist()),
        copies=tuple(np.flatnonzero(near.distance < told.held_out.least).tolist()),
    )


def _stored_mib(bank: Bank, plan: StepPlan) -> float:
    """MiB on disk of the entries that a plan calls and of what their weights follow from."""
    names, more = set[str](), set(plan.nets)
    while more:
        names |= more
        more = {of for name in more if (of := bank.entries[name].weights.of) is not None} - names
    return sum(bank.entries[name].stored_bytes for name in names) / 2**20


def _runs(plan: StepPlan) -> str:
    """Which entries a plan calls, and how often."""
    called = plan.called
    counts = {name: called.count(name) for name in plan.nets}
    if len(counts) == 1:
        return f"{next(iter(counts))!r} in every call"
    return ", ".join(f"{count} of {name!r}" for name, count in counts.items())


def _peak(bank: Bank, plan: StepPlan, batch: int) -> float | None:
    """The most MiB that a call of the plan holds beyond its weights; None where that is not known."""
    calls, found = calls_of(bank, batch), []
    for name in plan.nets:
        calls[name]()  # what the first call makes once is not what each holds
        found.append(peak_mib(calls[name], device=bank.device))
    return None if None in found else max(filter(None, found), default=0.0)


# ----------------------------------------------------------------------------------------- how true to the first


def _fidelities(
    entrants: Sequence[Entrant], judges: Mapping[str, Judge], recipe: Recipe, out: Path, watch: Watch
) -> dict[str, tuple[Fidelity | None, str]]:
    """How far pictures of every pipeline are from their target, and in words what that is: for a pipeline of the first
    one's network the converged pictures, where that network leads the same noise; for one of another network, which
    leads elsewhere, the first one's own pictures."""
    first, seed, count = entrants[0], stage_seed(recipe.seed, Stage.REPORT), min(FAITHFUL, recipe.eval.images)
    judge = judges[first.source]
    fine = converged_plan(judge.bank, first.subject.process, prices=judge.bank.prices())
    announce(watch, judge.bank, [Drawing(images=count, plan=fine)], batch=judge.batch)
    with watch.stage("fidelity", len(entrants) + 1) as told:
        converged = Converged(
            judge.bank,
            fine,
            count=count,
            seed=seed,
            batch=judge.batch,
            conditions=judge.conditions,
            cache=out / "state",
        )
        told(1, "converged")
        drawn: dict[str, np.ndarray] = {}
        found: dict[str, tuple[Fidelity | None, str]] = {}
        for k, one in enumerate(entrants):
            drawn[one.name] = _drawn(judges[one.source], one.plan, count, seed)
            if _net_of(one) == _net_of(first):
                twins, target = np.asarray(converged.pictures), f"the converged pictures of {first.name}"
            else:
                twins, target = drawn[first.name], f"{first.name}'s own pictures"
            if twins is drawn[first.name] and stochastic(first.plan.sampler):
                found[one.name] = None, f"none: {first.name} draws noise on its way, and its network is another one"
            else:
                pair, draws = fingerprint(target, converged.target), int(stochastic(one.plan.sampler))
                apart = fidelities_of(drawn[one.name], twins, judge.extractor, target=pair, seed=seed, draws=draws)
                found[one.name] = apart.mean(), target
            told(k + 2, one.name)
    return found


def _drawn(judge: Judge, plan: StepPlan, count: int, seed: int) -> np.ndarray:
    """The first pictures of a plan, float32 [count, C, H, W] in [-1, 1]."""
    batches = sample_images(judge.bank, plan, count, seed=seed, batch=judge.batch, conditions=judge.conditions)
    return np.concatenate([images.float().cpu().numpy() for images in batches])


def _net_of(one: Entrant) -> str:
    """Changes with the network that a pipeline's plan stands in for, its process and its guidance: with all that its
    converged pictures hang on."""
    bank, process = one.subject.stand_ins, one.subject.process
    own = Process()  # what says how samplers clip and space makes no difference to where they converge
    plain = replace(
        process,
        **{name: getattr(own, name) for name in ("clip_sample", "clip_sample_range", "thresholding")},
        **{name: getattr(own, name) for name in ("dynamic_thresholding_ratio", "sample_max_value")},
        **{name: getattr(own, name) for name in ("timestep_spacing", "steps_offset", "set_alpha_to_one")},
    )
    return fingerprint(bank.fingerprint(bank.reference), plain, bank.guidance)


# ----------------------------------------------------------------------------------------- what was memorised


def _near(measured: Measured, judge: Judge, subject: Subject, watch: Watch) -> tuple[dict[str, Near], HeldOut]:
    """The images of the data that each pipeline's first pictures are nearest to, in the judge's features; and how near
    real images are that were held out."""
    images, extractor = subject.images, judge.extractor
    firsts = {name: pictures[:SHOWN] for name, pictures in measured.pictures.items()}
    pictures = torch.from_numpy(np.concatenate(list(firsts.values()))).float().div(127.5).sub(1)
    what, real, own = _real(subject, watch)
    seen = np.concatenate([extract(extractor, pictures.split(256)), extract(extractor, real)])
    own = np.concatenate([np.full(len(pictures), -1), own])
    with watch.stage("nearest images", len(images)) as told:
        found = nearest_images(extractor, seen, images, own=own, told=lambda done: told(done))
    near, begin = {}, 0
    for name, its in firsts.items():
        rows = slice(begin, begin + len(its))
        near[name], begin = Near(found.distance[rows], found.number[rows]), rows.stop
    theirs = found.distance[begin:]
    least, median = float(theirs.min()), float(np.median(theirs))
    return near, HeldOut(what=what, n=len(theirs), least=least, median=median)


def _real(subject: Subject, watch: Watch) -> tuple[str, list[torch.Tensor], np.ndarray]:
    """Real images that say how near is near, in words and in batches, and which of the data each is, -1 for none: some
    of the test split; of data without one some of its own, each held out of what it is compared with."""
    images = subject.images
    test = None
    with suppress(HalfstepError):
        test = images_of(subject.recipe, subject.data, watch, "test")
    chosen = images if test is None or test.fingerprint == images.fingerprint else test
    index = np.random.default_rng(0).permutation(len(chosen))[:HELD_OUT]
    batches = [chosen.batch(index[rows]) for rows in slices_of(len(index))]
    if chosen is images:
        return f"{len(index):,} images of the data, each without itself (there is no test split)", batches, index
    return f"{len(index):,} images of the test split", batches, np.full(len(index), -1)
