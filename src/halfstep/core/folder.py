"""A run folder: looked at before it is touched, held by one process, of one recipe, one model and one data set."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from halfstep.core import disk, lock
from halfstep.core.errors import RecipeError, RunError
from halfstep.core.machine import machine, this_process
from halfstep.core.recipe import SAME_STEP, STEADIER, Recipe, RunRecord, field_names
from halfstep.core.typed import leaves
from halfstep.core.watch import SILENT, Watch

_PLANS = ("name", "search.", "shrink.")
_LATER = (*_PLANS, "eval.")
IGNORED = {
    "train": ("sample.", *_LATER),
    "features": tuple(
        name for name in field_names() if not name.startswith("data.") and name not in ("seed", "eval.feature_steps")
    ),
    "compress slimmable": _PLANS,  # this and the next three end in a report, which hangs on eval
    "compress sparse": _PLANS,
    "compress spectral": _PLANS,
    "compress continuous": _PLANS,
    "compress regularized": (*_LATER, "regular.grid"),  # one r of the grid
    "search": ("noise.",),  # these take the process of the model, whose content the record knows
    "evaluate": ("noise.",),
    "compare": ("noise.",),
    "shrink": ("noise.",),
}
"""Fields that make no difference to what a verb writes: they may change between two calls for one run folder."""
ALWAYS_IGNORED = tuple(f"train.{name}" for name in SAME_STEP)

_RESULTS = ("quality.json", "compare.json", "compare.csv", "pictures.npz", "films.npz", "report.html", "figures")
SCORES_BEFORE = ("search.jsonl", "finals.json*", "shrink*.jsonl")
"""Where scores stood before there was scores.jsonl."""
_SEARCHED = ("errors.json", "scores.jsonl", *SCORES_BEFORE, "grid.json", "steps-*", "features")
MEASURED = {
    "eval.images": _RESULTS,
    "eval.bootstrap": _RESULTS,
    "eval.tolerance": _RESULTS,
    "eval.features": (*_RESULTS, *_SEARCHED),  # a search measures with them
    "eval.feature_steps": (*_RESULTS, *_SEARCHED),
}
"""The settings of a measurement, and the files that hang on each: nothing that was trained does."""

CONTENT = ("model_content", "data_content")
"""Names of the fingerprints among a run's inputs."""

OTHERWISE = ("shrink", "spectrum", "denoise")
"""Verbs whose runs of before 2026-11-27 took the fingerprint of a model in another way: they cannot be gone on with."""

DIVERGED = Path("state") / "diverged.json"
"""Stands in a run folder whose training ended in a loss that was not finite, until it goes on."""


def open_run(
    out: Path,
    recipe: Recipe | None,
    inputs: Mapping[str, str],
    contents: Mapping[str, str],
    watch: Watch = SILENT,
    read: Sequence[str] = (),
) -> Path:
    """Make or re-enter a run folder, and hold its lock (see `lock.hold`). Nothing is touched before it is ours.

    `recipe`: None for a verb that has none. `contents`: fingerprints of the model and of the data, by the names of
    CONTENT. `read`: what was read, in words: said, unless the run around this one said it, and recorded. Of several
    processes of one training the first opens it and the others wait. A run that has nothing but its record may be begun
    anew with another recipe. Where settings of the last measurement changed, what hangs on them is set aside, to be
    measured again.
    Raises RunError when the folder is not writable, holds other files or another run, or other weights or pictures lie
    behind the same names now, or when another process works in it.
    """
    if recipe is not None:
        require_tracker(recipe.train.tracker)
    out, one = Path(out), this_process()
    if one.is_main_process:
        inputs, read = {**inputs, **contents}, tuple(read)
        known = RunRecord.load(out.parent).read if lock.holds(out.parent) else ()
        for line in [line for line in read if line not in known]:
            watch.say(line)
        where = machine() | ({"processes": one.num_processes} if one.num_processes > 1 else {})
        _open(out, RunRecord(inputs=inputs, recipe=recipe, read=read, machine=where), watch)
    one.wait_for_everyone()
    if not (out / "recipe.json").is_file():
        got, expected = "a folder that the first process sees and this one does not", "one that all machines share"
        raise RunError(got=got, expected=expected, where=out, do="choose another --out")
    return out


def open_or_join(
    out: Path,
    recipe: Recipe | None,
    inputs: Mapping[str, str],
    contents: Mapping[str, str],
    watch: Watch = SILENT,
    read: Sequence[str] = (),
) -> bool:
    """As `open_run`, True; or False where another process works in the folder at just this, which can be joined.

    Raises HeldError, or RunError that names the difference, where the other works at something else.
    """
    for _ in range(PATIENCE):
        try:
            open_run(out, recipe, inputs, contents, watch, read)
            return True
        except lock.HeldError:
            if (Path(out) / "recipe.json").is_file():
                break
            time.sleep(1.0)  # it is about to write it
    old, asked = RunRecord.load(Path(out)), RunRecord(inputs={**inputs, **contents}, recipe=recipe)
    _resumed(Path(out), asked, watch)
    if changed := _changed(old, asked):
        raise RunError(
            got=f"a run of another recipe ({', '.join(changed[:4])}), which another process works at",
            expected="the same, to help it",
            where=out,
            do="choose another --out, or wait until it ends",
        )
    return False


PATIENCE = 10
"""Seconds that a process which took a folder has to write what it does there."""


def _open(out: Path, asked: RunRecord, watch: Watch) -> None:
    _require_ours(out)
    fresh = not (out / "recipe.json").exists()
    if fresh:
        disk.require_writable(out)
    lock.hold(out)
    fresh = fresh or not _has_begun(out)
    known = None if fresh else _resumed(out, asked, watch)
    if known is None:
        disk.write_json(out / "recipe.json", asked.to_json())
        disk.recover(out)  # of a call that was killed in that very write
        return
    disk.require_writable(out)
    disk.recover(out)
    old = RunRecord.load(out)
    again = [name for name in _changed(old, asked) if name in MEASURED]
    if again:
        _set_aside(out, again, watch)
    if known != old:
        disk.write_json(out / "recipe.json", known.to_json())


def _has_begun(out: Path) -> bool:
    """Whether there is more in a run folder, and in those inside, than the record of what was asked."""
    files = (path for path in out.rglob("*") if not path.name.startswith("."))
    return any(path.is_file() and path.name != "recipe.json" for path in files)


def _changed(old: RunRecord, asked: RunRecord) -> list[str]:
    """The fields of the recipe that make a difference to what the verb writes, and have another value than before."""
    if not (old.recipe and asked.recipe):
        return [] if old.recipe is asked.recipe is None else ["recipe"]
    ignored = ("data.workers", *IGNORED.get(asked.inputs["verb"], ()), *ALWAYS_IGNORED)
    return [name for name in old.recipe.differences(asked.recipe) if not name.startswith(ignored)]


def _set_aside(out: Path, changed: Sequence[str], watch: Watch) -> None:
    """Move what hangs on the changed settings of the measurement into a folder of its own, out/earlier-1 and so on."""
    patterns = {pattern for name in changed for pattern in MEASURED[name]}
    found = sorted({path for pattern in patterns for path in out.glob(pattern)})
    if found:
        place = next(place for n in itertools.count(1) if not (place := out / f"earlier-{n}").exists())
        place.mkdir()
        for path in found:
            path.rename(place / path.name)
        watch.say(f"{', '.join(changed)} changed: measured again; what was measured before is in {place}")


_NOBODYS = (".lock", ".holder.json", ".DS_Store", ".gitignore", ".gitkeep")
"""Names in a folder that is empty all the same: of our lock, and of what systems and git leave anywhere."""


def _require_ours(out: Path) -> None:
    """Raise RunError for a folder that is neither empty nor of a run: it is not even probed."""
    with disk.plain_os_errors(out):
        names = [path.name for path in out.iterdir()] if out.exists() else []
    if "recipe.json" in names:
        RunRecord.load(out)
    elif others := sorted(name for name in names if name not in _NOBODYS and not disk.is_left(name)):
        raise RunError(
            got=f"a folder with other files ({', '.join(others[:3])}{', …' if len(others) > 3 else ''})",
            expected="an empty or a run folder",
            where=out,
            do="choose another --out",
        )


def _resumed(out: Path, asked: RunRecord, watch: Watch) -> RunRecord:
    """The record with which the run in `out` goes on. Raises RunError where it is another one than is asked for, in
    more than how it is measured."""
    old = RunRecord.load(out)
    free = () if asked.inputs["verb"] == "features" else tuple(MEASURED)  # there the network is the result
    changed = [name for name in _changed(old, asked) if name not in free]
    inputs = {"dtype": "float32"} | old.inputs  # of before 2026-11-27, when there was no choice
    changed += [k for k, v in asked.inputs.items() if k not in CONTENT and inputs.get(k) != v]
    if "verb" in changed:
        raise RunError(
            got=f"a run of {old.inputs.get('verb', 'another verb')}",
            expected=f"an empty folder, or a run of {asked.inputs['verb']}",
            where=out,
            do="choose another --out",
        )
    steadier = bool(changed) and _may_be_steadier(out, changed)
    here, there = this_process().num_processes, old.machine.get("processes", 1)
    rebatched = changed == ["train.batch"] and here != there and _is_training(out)
    if changed and not steadier and not rebatched:
        raise RunError(
            got=f"a run of another recipe ({', '.join(changed[:4])} {'differ' if len(changed) > 1 else 'differs'})",
            expected="the same recipe, to resume",
            where=out,
            do="choose another --out, or repeat the old settings",
        )
    for name in CONTENT:
        if old.inputs.get(name, asked.inputs.get(name)) != asked.inputs.get(name):
            what = name.removesuffix("_content")
            before = what == "model" and asked.inputs["verb"] in OTHERWISE
            raise RunError(
                got=f"another {what} behind {asked.inputs[what]!r} than when this run began"
                + (", or a run of before 2026-11-27, which knew the model otherwise" if before else ""),
                expected=f"the same {what}, by content",
                where=out,
                do=f"choose another --out, or bring the old {what} back",
            )
    if not set(CONTENT) & set(old.inputs) and set(CONTENT) & set(asked.inputs):
        watch.say(f"{out} was begun before runs knew their model and data by content: what lies there now is believed")
    if steadier and old.recipe:
        wild = {leaf.name: leaf.value for leaf in leaves(old.recipe) if leaf.name in changed}
        old = replace(old, diverged=[*old.diverged, wild])
    if rebatched and old.recipe:  # said when its state is read, which knows the step
        told = f"steps had {old.recipe.train.batch} images until {here} processes went on with what {there} had begun"
        old = replace(old, read=(*old.read, told), machine={**old.machine, "processes": here})
    recipe = asked.recipe if _changed(old, asked) else old.recipe
    return replace(old, inputs=asked.inputs, recipe=recipe)


def _is_training(out: Path) -> bool:
    """Whether a training in the folder, the one of the run or of its supernet, was begun and not ended."""
    places = (out, out / "supernet")
    return any((one / "state" / "train.safetensors").is_file() and not (one / "pipeline").exists() for one in places)


def _may_be_steadier(out: Path, changed: Sequence[str]) -> bool:
    """Whether a training in the folder diverged, and nothing changed but what may help it."""
    diverged = any((place / DIVERGED).is_file() for place in (out, *out.iterdir()))
    return diverged and set(changed) <= {f"train.{name}" for name in STEADIER}


def require_tracker(name: str) -> None:
    """Refuse a tracker that is not installed; accelerate would only warn and train on without it."""
    from accelerate.tracking import get_available_trackers

    known = [str(tracker) for tracker in get_available_trackers()]
    if name and name not in known:
        raise RecipeError(
            got=f"{name}, which is not installed here",
            expected=f"one of {', '.join(known)}" if known else "an installed tracker",
            where="train.tracker",
            do=f"pip install {name}, or leave it out: log.jsonl is written anyway",
        )
