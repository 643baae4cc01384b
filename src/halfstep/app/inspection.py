"""The verbs that look at denoisers closely: `spectrum`, which frequencies they lose, and `denoise`, real pictures."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from halfstep.app.estimate import Drawing, announce
from halfstep.app.subject import contents_of, open_model, open_subject
from halfstep.core import disk
from halfstep.core.errors import DataError, ModelError, PlanError
from halfstep.core.folder import open_run
from halfstep.core.lock import releasing
from halfstep.core.machine import alone
from halfstep.core.recipe import Recipe
from halfstep.core.seeds import own_random
from halfstep.core.watch import SILENT, Watch
from halfstep.data.classes import listed, numbers_of
from halfstep.data.pictures import picture, read_picture, to_uint8
from halfstep.engine.bank import Bank
from halfstep.engine.device import default_device
from halfstep.engine.layouts import fastest_layouts
from halfstep.engine.pricing import Setting
from halfstep.engine.reading import about_bank
from halfstep.engine.runtime import Tried
from halfstep.engine.runtimes import Trials, tried_runtimes
from halfstep.engine.subject import Subject
from halfstep.measure.restore import (
    CLASSICAL,
    Denoiser,
    Restored,
    Tiles,
    compare_denoisers,
    matching_timestep,
    require_channels,
    require_scorable,
    restore_picture,
    timesteps_from,
)
from halfstep.measure.spectrum import spectra
from halfstep.nets.content import fingerprint
from halfstep.nets.denoiser import class_count, cond_of, cond_to, predictor
from halfstep.report.story import tell_restored, tell_spectra

Spectra = dict[str, dict[str, list[float]]]
"""Of every entry of a model, by its name: lines by kind."""


@releasing
@own_random
@alone
def spectrum(
    models: Sequence[str],
    data: str,
    out: Path,
    *,
    timesteps: Sequence[int] = (20, 100, 300, 600),
    images: int = 256,
    watch: Watch = SILENT,
) -> Path:
    """Power spectra of each model's clean estimate beside the data's and the best linear denoiser's, by timestep.

    Every entry of a step-aware pipeline is a model; one that is there already (the teacher of two runs) is left out.
    Writes out/spectrum.json and out/report.html, whose path it returns. Raises DataError for images that do not fit.
    """
    subjects = [open_subject(model, data, Recipe(), watch=watch) for model in models]
    for subject in subjects:
        _require_timesteps(subject, timesteps)
    inputs = {"verb": "spectrum", "model": ", ".join(map(str, models)), "data": data, "images": str(images)}
    inputs["timesteps"] = ", ".join(map(str, timesteps))
    read = dict.fromkeys(line for subject in subjects for line in subject.read())
    out = open_run(out, None, inputs, contents_of(subjects), watch, list(read))
    lines: dict[str, dict[str, Any]] = {}
    for subject in subjects:
        for entry, timestep, record in _spectra_of(subject, timesteps, images, watch):
            drawn = lines.setdefault(str(timestep), {})
            if record not in drawn.values():
                drawn[subject.source if len(subject.stand_ins) == 1 else f"{subject.source} {entry}"] = record
    disk.write_json(out / "spectrum.json", {"data": data, "images": images, "timesteps": lines})
    return tell_spectra(out)


def _require_timesteps(subject: Subject, timesteps: Sequence[int]) -> None:
    last = int((subject.process.scheduler().alphas_cumprod > 0).sum()) - 1  # at zero SNR there is nothing to estimate
    for timestep in timesteps:
        if not 0 <= timestep <= last:
            raise PlanError(got=timestep, expected=f"0 to {last}", where="--timestep", do="choose one of these")


def _spectra_of(
    subject: Subject, timesteps: Sequence[int], images: int, watch: Watch
) -> Iterator[tuple[str, int, dict[str, list[float]]]]:
    """(entry, timestep, lines by kind) of a subject's bank on its first images."""
    bank, found, device = subject.stand_ins, subject.encoded(watch), default_device()
    chosen = slice(0, min(images, len(found)))
    draws = torch.Generator().manual_seed(0)  # latents are drawn: the same ones for every model
    clean = found.batch(chosen, generator=draws).to(device)
    cond = cond_to(cond_of(found.batch_labels(chosen) if class_count(bank.config) else None), device)
    bank.to(device)
    macs = [bank.prices()[entry].macs for entry in bank.computed]
    announce(watch, bank, [Drawing(images=len(clean) * len(timesteps), macs=one) for one in macs], doing="look at")
    alphas, bins = subject.process.scheduler().alphas_cumprod, max(4, found.size // 2)
    for entry, timestep in itertools.product(bank.computed, timesteps):
        call = predictor(bank[entry])
        rings = spectra(call, clean, timestep, alphas, bank.prediction_type, bins=bins, cond=cond)
        yield entry, timestep, {name: line.tolist() for name, line in rings.items()}


def runtimes(
    model: str, batches: Sequence[int], *, repeats: int = 10, dtype: str = "float32", watch: Watch = SILENT
) -> Trials:
    """Every runtime that is installed here, for every entry of a model that computes itself, at each of these batches,
    in the faster memory layout; each entry's timed in turns. `dtype`: in what precision, as torch names it."""
    bank = open_model(model).bank
    watch.say(about_bank(model, bank))
    bank.to(default_device(), getattr(torch, dtype))
    bank.set_layouts(fastest_layouts(bank, max(batches)))
    found: dict[str, dict[int, list[Tried]]] = {name: {} for name in bank.computed}
    with watch.stage("runtimes", len(batches) * len(found)) as told:
        for i, (batch, name) in enumerate(itertools.product(batches, found)):
            found[name][batch] = tried_runtimes(bank, name, batch, repeats=repeats)[1]
            told(i + 1, f"{name} at batch {batch}")
    return Trials(tried=found, setting=Setting.of(bank, max(batches)))


SIDE_BY_SIDE = 8
"""So many pictures are shown in the report of `denoise`; more would make a page that no one scrolls through."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What lies over pictures that are denoised: its standard deviation `level`, on pictures in [0, 1]. Unless the
    pictures have it already (`there`), it is added to them first, from `seed`."""

    level: float
    there: bool = False
    seed: int = 0


@releasing
@own_random
@alone
def denoise(
    models: Sequence[str],
    pictures: Sequence[Path],
    out: Path,
    noise: Noise,
    *,
    steps: Sequence[int] = (1,),
    classes: Sequence[str | int] = (),
    watch: Watch = SILENT,
) -> list[Restored]:
    """Denoise real pictures with every model (every entry of a step-aware pipeline), each with so many steps.

    Where the noise is added, classical denoisers and PSNR and SSIM stand beside; pictures that have it already are only
    restored. Writes out/<picture>/<method>.png, out/denoise.json and report.html with the first pictures side by side.
    `classes`: what class-conditional models take the pictures for, by name or number; with several every picture is
    restored as each of them. Raises DataError for pictures that cannot be read or do not fit, PlanError for a class
    that a model does not know, and for none where it needs one.
    """
    subjects = [open_subject(model, None, Recipe(), watch=watch) for model in models]
    if classes and not any(class_count(subject.stand_ins.config) for subject in subjects):
        numbers_of(classes, 0)  # refuses them
    methods, counts = _methods(subjects, noise.level, steps, classes)
    clean = [torch.from_numpy(read_picture(Path(file)).copy()).float() / 255 for file in pictures]
    names = _names_of(pictures)
    for given, subject in itertools.product(clean, subjects):
        require_channels(given, subject.stand_ins.config["in_channels"])
    for given in clean if not noise.there else ():
        require_scorable(given)
    inputs = {"verb": "denoise", "model": ", ".join(map(str, models)), "data": ", ".join(map(str, pictures))}
    inputs |= {"noise": str(noise.level), "noisy": str(noise.there), "seed": str(noise.seed)}
    inputs["steps"] = ", ".join(map(str, steps))
    inputs["classes"] = ", ".join(map(str, classes))
    pixels = fingerprint(*(hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in clean))
    read = [_about_pictures(pictures, clean), *(line for subject in subjects for line in subject.read())]
    out = open_run(out, None, inputs, contents_of(subjects) | {"data_content": pixels}, watch, read)
    total = len(pictures) * (len(methods) + (0 if noise.there else len(CLASSICAL) + 1))
    with watch.stage("denoise", total) as told:
        kept = _Kept(out, names, told)
        if noise.there:
            for (k, given), (name, call) in itertools.product(enumerate(clean), methods.items()):
                kept(k, name, call(given, noise.level))
            tell_restored(out, (), kept.shown)
            return []
        records = compare_denoisers(methods | CLASSICAL, clean, noise.level, noise.seed, steps=counts, shown=kept)
    disk.write_json(out / "denoise.json", [record.to_json() for record in records])
    tell_restored(out, records, kept.shown)
    return records


class _Kept:
    """Writes every picture as it is restored; `shown`: the first ones, uint8 [C,H,W] by name, for the report."""

    def __init__(self, out: Path, names: Sequence[str], told: Callable[[int, str], None]):
        self.out, self.names, self.told = out, names, told
        self.shown: dict[str, Any] = {}
        self.done = 0

    def __call__(self, k: int, method: str, image: torch.Tensor) -> None:
        pixels = to_uint8(2 * image[None] - 1)[0]
        file = f"{method.replace(', ', '-').replace(' ', '-')}.png"
        disk.write_png(self.out / self.names[k] / file, picture(pixels))
        if k < SIDE_BY_SIDE:
            self.shown[f"{self.names[k]}: {method}"] = pixels
        self.done += 1
        self.told(self.done, method)


def _names_of(pictures: Sequence[Path]) -> list[str]:
    """The folder of every picture's results. Raises DataError for two of one name."""
    names = [Path(file).stem for file in pictures]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(got=f"two pictures {twice!r}", expected="different names", where="denoise", do="rename one")
    return names


def _about_pictures(files: Sequence[Path], images: Sequence[torch.Tensor]) -> str:
    sizes = (f"{Path(file).name} {one.shape[2]}x{one.shape[1]}" for file, one in zip(files, images, strict=True))
    return f"{len(images)} picture{'s' * (len(images) > 1)}: {listed(sizes)}"


def _methods(
    subjects: Sequence[Subject], noise: float, steps: Sequence[int], classes: Sequence[str | int]
) -> tuple[dict[str, Denoiser], dict[str, int]]:
    """What every entry of every model restores pictures with, by name, and how many steps each takes."""
    methods: dict[str, Denoiser] = {}
    counts: dict[str, int] = {}
    for subject in subjects:
        start = matching_timestep(noise, subject.process.scheduler().alphas_cumprod)
        prefix = f"{Path(subject.source).name} " if len(subjects) > 1 else ""
        for entry, call in _restorers(subject, classes).items():
            for count in steps:
                timesteps_from(start, count)  # refuses more than there are
                name = f"{prefix}{entry}, {count} step{'s' * (count > 1)}"
                methods[name], counts[name] = partial(call, steps=count), count
    return methods, counts


def _restorers(subject: Subject, classes: Sequence[str | int]) -> Mapping[str, Callable[..., torch.Tensor]]:
    """What every entry of a model's folder restores pictures with, as each class, but for the number of steps."""
    bank = subject.stand_ins
    if subject.vae is not None:
        raise ModelError(got="a latent model", expected="one on pixels", where=subject.source, do="bring a pixel model")
    bank.to(default_device())
    tiles = Tiles(size=bank.config["sample_size"], channels=bank.config["in_channels"])
    conds = {"": cond_of(None)}
    if class_count(bank.config):
        asked = zip(classes, _numbers(bank, classes, subject.source), strict=True)
        conds = {f" as {one}": cond_of(torch.tensor([number], device=bank.device)) for one, number in asked}
    known: dict[str, Any] = {"process": subject.process, "tiles": tiles, "device": bank.device}
    return {
        entry + told: partial(restore_picture, predictor(bank[entry]), cond=cond, **known)
        for entry in bank.computed
        for told, cond in conds.items()
    }


def _numbers(bank: Bank, classes: Sequence[str | int], source: str) -> list[int]:
    """The classes asked for. Raises PlanError for none: a picture restored as any class would be drawn towards it."""
    count = class_count(bank.config)
    if not classes:
        raise PlanError(
            got="no class",
            expected=f"the pictures' class: {listed(bank.classes or map(str, range(count)))}",
            where=source,
            do="add --class NAME; repeat it to compare several",
        )
    return numbers_of(classes, count, bank.classes)
