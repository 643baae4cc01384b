"""Damaged files by the hundred, from seeds: every door either refuses in one line, or loads what was there.

The oracle is the undamaged folder: what loads after a change is bit for bit what loaded before (weights, configs, plan,
step), or, in folders that carry no digest (made by other programs), something whole that can be used. Another
exception, a hang, memory without bound, or a file written elsewhere is a failure. A failure names its subject and seed:
`HALFSTEP_CASE=bank:1234 pytest tests/test_mutations.py -k one` repeats it alone.

A few seconds of it run by default and a minute in CI (`-m slow`); `make drills` runs it for as long as HALFSTEP_DRILLS
says, in seconds.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import struct
import tarfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline
from PIL import Image

from caged import Hung, caged, limits
from halfstep.app import verbs
from halfstep.core.errors import HalfstepError
from halfstep.core.plan import Correction, StepPlan
from halfstep.core.recipe import Recipe, TrainSpec
from halfstep.core.sums import write_sums
from halfstep.core.watch import Watch
from halfstep.data.images import load_images
from halfstep.data.latents import encode_images
from halfstep.engine.bank import Bank
from halfstep.engine.entry import Cut, Entry
from halfstep.engine.sampling import build_scheduler, plan_for, reference_plan
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.measure.features import FeatureNet, raw_pixels
from halfstep.measure.quality import reference_stats
from halfstep.methods.slimmable import Supernet
from halfstep.nets.masks import Masking, Pattern, mask_all
from halfstep.nets.models import load_denoiser, load_vae
from halfstep.training.train import TrainState
from mutate import damage
from tiny import recipes, unet

net = partial(unet, attention_head_dim=8)
EDITS = """
model.channels=8,16 model.groups=4 model.head_dim=8 data.size=8 data.channels=1 train.steps=2 train.batch=4
train.warmup=0 train.save_every=1 train.log_every=1 slim.widths=0.5 sample.steps=4 sample.batch=8 search.images=8
search.error_images=4 search.fit=2 search.population=4 search.generations=1 search.genes=2 search.finalists=1
search.final_images=8 eval.images=8 eval.features=digits eval.bootstrap=4 eval.free=false
shrink.images=8 shrink.final_images=8 shrink.parts=1 shrink.scales=0.98,1.02 shrink.thresholds=0.01
"""
tiny = recipes(EDITS)


def digest(*parts: Any) -> str:
    """One text for modules (every tensor's name, type, shape and bytes), tensors and plain values."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            config = {k: v for k, v in dict(getattr(part, "config", {})).items() if not k.startswith("_")}
            found.update(json.dumps(config, sort_keys=True, default=str).encode())
            part = part.state_dict()
        if isinstance(part, dict) and any(isinstance(v, torch.Tensor) for v in part.values()):
            for name, value in sorted(part.items()):
                found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                found.update(value.detach().cpu().flatten().clone().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, np.ndarray):
            found.update(f"{part.dtype} {part.shape}".encode() + part.tobytes())
        else:
            found.update(repr(part).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


@dataclass(frozen=True)
class Subject:
    """Something on disk. `open` raises HalfstepError or returns what it means; `sealed`: any other meaning is a fault,
    for a digest guards it (of the files that `open_files` names only the others do)."""

    build: Callable[[Path], object]
    open: Callable[[Path], str]
    sealed: bool = True
    unsealed: tuple[str, ...] = ()  # files whose other valid values are as good: nothing says what they were
    files: tuple[str, ...] = ()  # only these are damaged
    share: float = 1.0  # of the cases of other subjects; slow ones have less
    patience: float = 1.0  # of the seconds that a case may take
    shipped: bool = False  # by somebody who wrote digests that fit the damage


# ---------------------------------------------------------------------------------------------------------- subjects


def build_stock(folder: Path) -> None:
    """As `halfstep train` writes it: sealed."""
    verbs.train("digits", folder, tiny())


def open_stock(folder: Path) -> str:
    model, *rest = load_denoiser(folder)
    vae = load_vae(folder)
    return digest(model, vae or "", repr(rest))


def build_foreign(folder: Path) -> None:
    DDPMPipeline(net(), DDPMScheduler()).save_pretrained(folder)


def use(folder: Path) -> str:
    """A foreign model has nothing to compare with: it must be whole, and work."""
    model, *rest = load_denoiser(folder)
    vae = load_vae(folder)
    assert all(bool(v.isfinite().all()) for v in model.state_dict().values()), "weights that are not finite"
    bank = Bank({"full": model}, "full", kind_of(rest[0]), vae=vae)
    plan = reference_plan(bank, rest[0], tiny().sample, {"full": 1})
    side = model.config.sample_size
    size = (side, side) if isinstance(side, int) else side
    with torch.no_grad():
        model(torch.zeros(1, model.config.in_channels, *size), 1, **labels_of(model))
    build_scheduler(plan)
    return open_stock(folder)


def kind_of(noise: Any) -> str:
    return noise["prediction_type"] if isinstance(noise, dict) else noise.prediction_type


def labels_of(model: Any) -> dict[str, torch.Tensor]:
    return {"class_labels": torch.zeros(1, dtype=torch.long)} if model.config.num_class_embeds else {}


def build_vae(folder: Path) -> None:
    torch.manual_seed(3)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=2,
        norm_num_groups=4,
        sample_size=8,
    )
    bank = Bank({"full": net(size=4, colours=2)}, "full", "epsilon", vae=vae.eval())
    save_pipeline(bank, folder)


def build_foreign_vae(folder: Path) -> None:
    build_vae(folder / "ours")
    vae = load_vae(folder / "ours")
    shutil.rmtree(folder / "ours")
    LDMPipeline(vae, net(size=4, colours=2), DDIMScheduler()).save_pretrained(folder)


def save_pipeline(bank: Bank, folder: Path) -> None:
    StepAwarePipeline(bank, plan_for(bank, DDIMScheduler(), 3, dict.fromkeys(bank, 10))).save_pretrained(folder)


def build_bank(folder: Path) -> None:
    """Shared slices, a masked entry with weights of its own and one that shares them."""
    supernet, sparse = Supernet(net(1), (1.0, 0.5)), net(2)
    entries = {"full": Entry(net(0)), "w1.00": Entry(supernet.subnet(1.0))}
    entries["w0.50"] = Entry(supernet.subnet(0.5), Cut("w1.00", supernet.slices[0.5]))
    names = tuple(n for n, p in sparse.named_parameters() if p.ndim == 4 and p.shape[1] % 4 == 0)
    masking = Masking(Pattern(2, 4), names)
    sparse.load_state_dict(masked_weights(sparse, masking))
    entries["2:4"] = Entry(sparse, masking=masking)
    save_pipeline(Bank(entries, "full", "epsilon"), folder)


def build_before(folder: Path) -> None:
    """The same as format 1 had it, with slices.json and mask.json."""
    shutil.copytree(Path(__file__).parents[1] / "data" / "pipeline_format1", folder, dirs_exist_ok=True)


def masked_weights(model: torch.nn.Module, masking: Masking) -> dict[str, torch.Tensor]:
    return mask_all(model.state_dict(), masking.names, masking.pattern)


def open_pipeline(folder: Path) -> str:
    pipe = StepAwarePipeline.from_pretrained(folder)
    bank = pipe.bank
    parts = [(name, digest(bank[name])) for name in bank]
    rest = (bank.reference, bank.prediction_type, json.dumps(pipe.plan.to_json(), sort_keys=True))
    scheduler = json.dumps(dict(pipe.scheduler.config), sort_keys=True, default=str)
    return digest(parts, rest, scheduler, bank.vae if bank.vae is not None else "")


def use_pipeline(folder: Path) -> str:
    """A pipeline whose digests fit whatever it holds must be whole, and draw."""
    pipe = StepAwarePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert all(bool(v.isfinite().all()) for v in pipe.bank.state_dict().values()), "weights that are not finite"
    pictures = pipe(batch_size=1, output_type="np").images
    assert np.isfinite(pictures).all() and pictures.shape[0] == 1
    for name in pipe.bank:
        pipe(batch_size=1, output_type="pt", plan=pipe.plan.uniform(name))
    return open_pipeline(folder)


def open_bank(folder: Path) -> str:
    bank = Bank.from_pretrained(folder / "bank")
    return digest([(name, digest(bank[name])) for name in bank], bank.reference, bank.prediction_type)


def build_plan(folder: Path) -> None:
    bank = Bank({"full": net(), "w0.50": net(1)}, "full", "epsilon")
    plan = plan_for(bank, DDIMScheduler(), 4, {"full": 10, "w0.50": 4}).with_entries(["full", "w0.50"] * 2)
    plan.with_corrections([Correction(0.98, 0.01)] * 4).save(folder / "plan.json")


def open_plan(folder: Path) -> str:
    plan = StepPlan.load(folder / "plan.json")
    again = StepPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan, "a plan that does not survive its own JSON"
    assert 0 < plan.share < float("inf") and str(plan) and hash(plan) == hash(again)
    build_scheduler(plan)
    return digest(plan.to_json())


def build_recipe(folder: Path) -> None:
    (folder / "recipe.json").write_text(json.dumps(tiny().to_json()))


def open_recipe(folder: Path) -> str:
    from halfstep.core.disk import read_json

    recipe = Recipe.from_json(read_json(folder / "recipe.json", what="a recipe", do="mend it"))
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    return digest(recipe)


STAMP = "the recipe of this state"


def build_state(folder: Path) -> None:
    model = net()
    state = TrainState.new(model, TrainSpec())
    for _ in range(2):
        loss = model(torch.randn(2, 1, 8, 8), 5).sample.square().mean()
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.ema.step(model.parameters())
        state.step += 1
    state.save(folder / "train.safetensors", STAMP)


def open_state(folder: Path) -> str:
    state = TrainState.new(net(5), TrainSpec())
    state.load(folder / "train.safetensors", STAMP)
    return digest(state.tensors(), state.step, state.ema.optimization_step)


def build_features(folder: Path) -> None:
    torch.manual_seed(0)
    FeatureNet(channels=1, size=8, width=4, n_classes=3, n_features=4).save(folder)


def open_features(folder: Path) -> str:
    features = FeatureNet.load(folder)
    assert features.name.isprintable() and len(features.name) < 500
    return digest(features, features.config)


def pictures(n: int = 6, side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side), dtype=np.uint8)


def build_folder(folder: Path) -> None:
    for i, one in enumerate(pictures()):
        place = folder / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        kind = ("png", "jpg", "bmp", "tif", "webp")[i % 5]
        Image.fromarray(one).convert("L" if i % 2 else "RGB").save(place / f"{i}.{kind}")


def build_npz(folder: Path) -> None:
    np.savez_compressed(folder / "data.npz", images=pictures(), labels=np.arange(6) % 2)


def build_idx(folder: Path) -> None:
    images = struct.pack(">IIII", 0x803, 6, 8, 8) + pictures().tobytes()
    (folder / "train-images-idx3-ubyte").write_bytes(images)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(struct.pack(">II", 0x801, 6) + bytes((0, 1, 2, 0, 1, 2)))
    )


def build_tar(folder: Path) -> None:
    build_folder(folder / "packed")
    with tarfile.open(folder / "data.tar.gz", "w:gz") as tar:
        tar.add(folder / "packed", "packed")
    shutil.rmtree(folder / "packed")


def build_parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = []
    for one in pictures():
        coded = io.BytesIO()
        Image.fromarray(one).save(coded, "PNG")
        rows.append({"bytes": coded.getvalue(), "path": None})
    table = pyarrow.table({"image": rows, "label": [0, 1, 0, 1, 0, 1], "note": ["a"] * 6})
    parquet.write_table(table, folder / "train-00000-of-00001.parquet")


def open_parquet(folder: Path) -> str:
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder.parent / "tables"
    return opener("hub:{}")(folder)


def opener(source: str) -> Callable[[Path], str]:
    def opened(folder: Path) -> str:
        images = load_images(source.format(folder), size=8, cache=folder.parent / "cache")
        shape = images.pixels.shape
        assert images.pixels.dtype == np.uint8 and shape[1] in (1, 3) and shape[2:] == (8, 8) and shape[0] >= 1
        if images.labels is not None:
            assert images.labels.shape == shape[:1]
            assert images.labels.min() >= 0 and images.labels.max() < len(images.classes)
        return digest(np.asarray(images.pixels), images.labels, images.classes)

    return opened


def build_cache(folder: Path) -> None:
    load_images("digits", cache=folder)


def open_cache(folder: Path) -> str:
    images = load_images("digits", cache=folder)
    return digest(np.asarray(images.pixels), np.asarray(images.labels), images.classes, images.fingerprint)


def build_latents(folder: Path) -> None:
    build_vae(folder / "model")
    (folder / "cache").mkdir()
    open_latents(folder)


def open_latents(folder: Path) -> str:
    vae = load_vae(folder / "model")
    with cache_at(folder / "cache"):
        latents = encode_images(vae, load_images("digits").subset(8))
        torch.manual_seed(0)
        return digest(np.asarray(latents.moments), latents.fingerprint, latents.batch(slice(0, 4)).numpy())


@contextlib.contextmanager
def cache_at(folder: Path) -> Iterator[None]:
    before = os.environ.get("HALFSTEP_CACHE")
    os.environ["HALFSTEP_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("HALFSTEP_CACHE")
        if before is not None:
            os.environ["HALFSTEP_CACHE"] = before


def build_reference(folder: Path) -> None:
    open_reference(folder)


def open_reference(folder: Path) -> str:
    images = load_images("digits").subset(64)
    found = reference_stats(raw_pixels(images), images, cache=folder)
    return digest(*(v if isinstance(v, np.ndarray) else repr(v) for v in vars(found).values()))


class Stop(Watch):
    """Interrupts a run at a step, as Ctrl-C does."""

    def __init__(self, step: int):
        self.step = step

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Any]:
        def told(done: float, note: str = "") -> None:
            if name.startswith("train") and done >= self.step and note:
                raise KeyboardInterrupt

        yield told


def build_half(folder: Path) -> None:
    """A training that was stopped at its first step."""
    with contextlib.suppress(KeyboardInterrupt):
        verbs.train("digits", folder, tiny(), watch=Stop(2))
    assert (folder / "state" / "train.safetensors").is_file() and not (folder / "pipeline").exists()


def open_half(folder: Path) -> str:
    return open_stock(verbs.train("digits", folder, tiny()))


def beside(folder: Path) -> str:
    """A dense model for the verbs that start from one: made once beside the subjects, never damaged."""
    place = Path(os.environ["HALFSTEP_DENSE"])
    if not place.exists():
        DDPMPipeline(net(4), DDPMScheduler()).save_pretrained(place)
    return str(place)


def build_half_slim(folder: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        verbs.make("slimmable", beside(folder), "digits", folder, tiny(), watch=Stop(2))


def open_half_slim(folder: Path) -> str:
    verbs.make("slimmable", beside(folder), "digits", folder, tiny())
    return open_pipeline(folder / "pipeline")


def build_optimized(folder: Path) -> None:
    verbs.optimize(beside(folder), "digits", folder, tiny(), budget=0.8)


def build_searched(folder: Path) -> None:
    build_optimized(folder)
    for name in ("quality.json", "plan.json", "pictures.npz", "report.html"):
        (folder / name).unlink()
    shutil.rmtree(folder / "pipeline")
    shutil.rmtree(folder / "figures")


def open_searched(folder: Path) -> str:
    verbs.optimize(beside(folder), "digits", folder, tiny(), budget=0.8)
    return open_pipeline(folder / "pipeline")


def build_shrunk(folder: Path) -> None:
    verbs.shrink(beside(folder), "digits", folder, tiny())
    for name in ("quality.json", "plan.json", "pictures.npz", "report.html"):
        (folder / name).unlink()
    shutil.rmtree(folder / "pipeline")
    shutil.rmtree(folder / "figures")


def open_shrunk(folder: Path) -> str:
    verbs.shrink(beside(folder), "digits", folder, tiny())
    return open_pipeline(folder / "pipeline")


def open_report(folder: Path) -> str:
    text = verbs.report(folder).read_text(encoding="utf-8")
    assert "<html" in text.lower() and len(text) < 50 << 20
    return digest(re.sub(r'src="data:[^"]*"', "", text))


RECORDS = ("scores.jsonl", "errors.json", "log.jsonl", "state/layouts.json")
QUICK = {
    "bank": Subject(build_bank, open_pipeline, share=2),
    "bank alone": Subject(build_bank, open_bank),
    "bank of before": Subject(build_before, open_pipeline),
    "bank of before, shipped": Subject(build_before, use_pipeline, sealed=False, shipped=True, share=0.5),
    "foreign": Subject(build_foreign, use, sealed=False, share=2),
    "vae": Subject(build_vae, open_pipeline),
    "foreign vae": Subject(build_foreign_vae, use, sealed=False),
    "bank, shipped": Subject(build_bank, use_pipeline, sealed=False, shipped=True, share=0.5),
    "vae, shipped": Subject(build_vae, use_pipeline, sealed=False, shipped=True, share=0.5),
    "plan": Subject(build_plan, open_plan, sealed=False, share=2),
    "recipe": Subject(build_recipe, open_recipe, sealed=False),
    "state": Subject(build_state, open_state, share=2),
    "features": Subject(build_features, open_features),
    "pictures": Subject(build_folder, opener("folder:{}"), sealed=False),
    "npz": Subject(build_npz, opener("npz:{}/data.npz"), sealed=False, share=2),
    "idx": Subject(build_idx, opener("idx:{}"), sealed=False),
    "tar": Subject(build_tar, opener("tar:{}/data.tar.gz"), sealed=False),
    "parquet": Subject(build_parquet, open_parquet, sealed=False, share=0.5, patience=2),
    "cache": Subject(build_cache, open_cache),
    "latents": Subject(build_latents, open_latents, files=("cache/latents/*",)),
    "reference": Subject(build_reference, open_reference),
}
RUNS = {
    "train": Subject(build_stock, lambda folder: open_stock(verbs.train("digits", folder, tiny()))),
    "train, stopped": Subject(build_half, open_half, share=0.4),
    "slimmable, stopped": Subject(build_half_slim, open_half_slim, share=0.3),
    "optimize, stopped": Subject(build_searched, open_searched, unsealed=RECORDS, share=0.1, patience=6),
    "shrink, stopped": Subject(build_shrunk, open_shrunk, unsealed=RECORDS, share=0.1, patience=6),
    "report": Subject(build_optimized, open_report, sealed=False, share=0.2, patience=3),
}
SUBJECTS = QUICK | RUNS


# ------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Outcome:
    """`kind`: refused, same, other, or one of the faults: crashed, changed, hung, killed, escaped, long."""

    kind: str
    seed: int
    change: str
    told: str = ""

    @property
    def bad(self) -> bool:
        return self.kind not in ("refused", "same", "other")


def case(name: str, seed: int, pristine: Path, room: Path, meaning: str) -> Outcome:
    """One damaged copy of a subject, opened, and how it ended."""
    subject, rng = SUBJECTS[name], random.Random(f"{name}:{seed}")
    top = room / "case"
    folder = top / "a" / "b" / "c" / "it"
    shutil.rmtree(top, ignore_errors=True)
    folder.parent.mkdir(parents=True)
    shutil.copytree(pristine, folder)
    only = [str(f.relative_to(folder)) for pattern in subject.files for f in sorted(folder.glob(pattern))]
    change = damage(rng, folder, only or None)
    if subject.shipped and folder.is_dir():
        with contextlib.suppress(OSError):  # a link to itself has no digest
            write_sums(folder)
    sealed = subject.sealed and not change.startswith(subject.unsealed or ("\0",))
    try:
        with limits(subject.patience):
            found = subject.open(folder)
        kind, told = ("same", "") if found == meaning else ("changed" if sealed else "other", "")
    except HalfstepError as error:
        told = str(error)
        one_line = told.isprintable() and len(told) < 1500
        kind = "refused" if one_line else "long"
        told = told[:200] + repr(told)[-100:] if not one_line else told
    except Hung:
        kind, told = "hung", "".join(traceback.format_exc().splitlines(True)[-8:])
    except BaseException as error:
        lines = [line.strip() for line in traceback.format_exc().splitlines() if "halfstep/" in line][-2:]
        kind, told = "crashed", f"{type(error).__name__}: {str(error)[:160]} ({'; '.join(lines)})"
    for level in (room, top, top / "a", top / "a" / "b"):
        if stray := sorted(set(os.listdir(level)) - {"case", "a", "b", "c", "cache", "tables", "pristine"}):
            kind, told = "escaped", f"{stray} in {level}"
    return Outcome(kind, seed, change, told)


def run_cases(name: str, seeds: Sequence[int], pristine: Path, room: Path, meaning: str) -> list[Outcome]:
    """All cases in a child, which goes on after a death."""
    found = caged(seeds, lambda seed: vars(case(name, seed, pristine, room, meaning)))
    killed = [Outcome("killed", seed, "HALFSTEP_CASE tells") for seed in seeds]
    return [Outcome(**one) if one else died for one, died in zip(found, killed, strict=True)]


# -------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Callable[[str], tuple[Path, Path, str]]:
    """Subjects by name, each built once: its folder, a room beside it, and what it means."""
    home = tmp_path_factory.mktemp("mutations")
    known: dict[str, tuple[Path, Path, str]] = {}
    os.environ["HALFSTEP_DENSE"] = str(home / "dense")

    def of(name: str) -> tuple[Path, Path, str]:
        if name not in known:
            room = home / re.sub(r"\W+", "-", name)
            folder = room / "pristine"
            folder.mkdir(parents=True)
            SUBJECTS[name].build(folder)
            again = room / "again"
            meanings = []
            for _ in range(2):  # opening may write: it is asked of copies
                shutil.copytree(folder, again / "it")
                meanings.append(SUBJECTS[name].open(again / "it"))
                shutil.rmtree(again)
            assert meanings[0] == meanings[1], "an undamaged subject means the same twice"
            known[name] = folder, room, meanings[0]
        return known[name]

    return of


def check(name: str, seeds: Sequence[int], pristine: Callable[[str], tuple[Path, Path, str]]) -> list[Outcome]:
    outcomes = run_cases(name, seeds, *pristine(name))
    report(name, outcomes)
    failed = [o for o in outcomes if o.bad]
    told = "\n".join(f"{name}:{o.seed}  {o.kind}  [{o.change}]  {o.told}" for o in failed)
    assert not failed, f"{len(failed)} of {len(outcomes)} damaged copies of {name!r}\n{told}"
    return outcomes


def report(name: str, outcomes: Sequence[Outcome]) -> None:
    """Where HALFSTEP_TALLY names a file, the outcomes are appended there as JSON lines."""
    if file := os.environ.get("HALFSTEP_TALLY"):
        with open(file, "a") as out:
            out.writelines(json.dumps({"subject": name, **vars(o)}) + "\n" for o in outcomes)


def count(name: str, full: int) -> range:
    return range(max(1, round(full * SUBJECTS[name].share)))


SMOKE = (
    "bank",
    "bank, shipped",
    "foreign",
    "plan",
    "recipe",
    "state",
    "features",
    "npz",
    "tar",
    "latents",
    "reference",
)


@pytest.mark.parametrize("name", SMOKE)
def test_damaged_files_are_refused_or_mean_what_they_meant(name, pristine):
    check(name, count(name, 4), pristine)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_more_damaged_files(name, pristine):
    seeds = count(name, 20)
    check(name, range(1000, 1000 + len(seeds)), pristine)


@pytest.mark.skipif("HALFSTEP_DRILLS" not in os.environ, reason="make drills")
def test_damaged_files_for_a_while(pristine):
    """Every subject in turns, with seeds that never came before, for HALFSTEP_DRILLS seconds."""
    seconds = float(os.environ["HALFSTEP_DRILLS"])
    start, seed, failed, tally = time.time(), int(os.environ.get("HALFSTEP_SEED", "10000")), [], Counter()
    only = os.environ.get("HALFSTEP_SUBJECTS", "").split(";") if os.environ.get("HALFSTEP_SUBJECTS") else SUBJECTS
    while time.time() - start < seconds:
        for name in only:
            seeds = range(seed, seed + max(1, round(20 * SUBJECTS[name].share)))
            outcomes = run_cases(name, seeds, *pristine(name))
            report(name, outcomes)
            tally += Counter((name, o.kind) for o in outcomes)
            failed += [(name, o) for o in outcomes if o.bad]
        seed += 40
    print(*(f"{name:<22} {kind:<8} {n:>6}" for (name, kind), n in sorted(tally.items())), sep="\n")
    told = "\n".join(f"{name}:{o.seed}  {o.kind}  [{o.change}]  {o.told}" for name, o in failed)
    assert not failed, f"{len(failed)} of {sum(tally.values())}\n{told}"


@pytest.mark.skipif("HALFSTEP_CASE" not in os.environ, reason="names a case that failed, e.g. bank:1234")
def test_one_case(pristine):
    name, _, seed = os.environ["HALFSTEP_CASE"].rpartition(":")
    check(name, [int(seed)], pristine)
