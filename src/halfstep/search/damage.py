"""The error table: how far the final images move when one stretch of the rows alone runs another entry.

Source: HarmoniCa (arXiv 2410.01723), which weighs a step by what swapping it alone does to the final image; here it is
how far that moves the final image, paired by noise: tens of images rank the swaps, where a difference of two distances
to the data needs thousands (benchmarks/error_table.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfstep.core.disk import read_json, write_json
from halfstep.core.errors import RunError
from halfstep.core.plan import StepPlan, call_of
from halfstep.core.typed import build
from halfstep.engine.bank import Bank
from halfstep.engine.conditions import Conditions, cond_for
from halfstep.engine.networks import networks_of
from halfstep.engine.samplers import model_input, noise_scale
from halfstep.engine.sampling import (
    build_scheduler,
    image_generators,
    last,
    predicted,
    start_noise,
    to_images,
    trajectory,
)
from halfstep.measure.drawer import Drawer
from halfstep.nets.content import fingerprint
from halfstep.nets.denoiser import Memo
from halfstep.search.scores import ScoreBook
from halfstep.search.space import Space

Measure = Callable[[torch.Tensor, torch.Tensor], float]
"""How far images are from their twins of the same noise, both [N,C,H,W] in [-1, 1] (decoded where the bank works on
latents): (twins in the reference's run, images) -> 0 or more."""

MEASURE_AGAIN = "delete it to measure again"


@dataclass(frozen=True)
class ErrorTable:
    """`local` [T, E]: mean squared distance of each entry's prediction from the reference's, at each row of the
    reference's own trajectories; `damage` [K, E]: how far the final images move when one gene alone runs the entry.

    A damage is blind to the way: an entry that makes pictures better, or only other ones as good, moves them too. The
    plans that are measured against the data (`fit_costs`) are there to see that. `measure`: what a damage is.
    """

    timesteps: tuple[float, ...]
    entries: tuple[str, ...]
    local: np.ndarray
    damage: np.ndarray
    images: int
    measure: str = "moved features"

    def costs(self, table: str, rows: Sequence[int]) -> np.ndarray:
        """The additive error model [K, E]: the measured "damage", or the "local" errors."""
        if table == "damage":
            return self.damage
        return np.add.reduceat(self.local, np.cumsum([0, *rows[:-1]]), axis=0)

    def to_json(self) -> dict[str, Any]:
        return {
            "timesteps": list(self.timesteps),
            "entries": list(self.entries),
            "local": self.local.tolist(),
            "damage": self.damage.tolist(),
            "images": self.images,
            "measure": self.measure,
        }

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and of genes."""
        return len(self.local), len(self.damage)

    @classmethod
    def load(cls, file: Path) -> ErrorTable:
        """Read errors.json. Raises RunError."""
        return cls.from_json(read_json(file, what="an error table", do=MEASURE_AGAIN), where=file)

    @classmethod
    def from_json(cls, record: Mapping[str, Any], *, where: object = "errors.json") -> ErrorTable:
        """Rebuild a table; those of before the paired measure say "change of distance".

        Raises RunError for what is none, and for numbers that are not one for each of its rows and entries.
        """
        one = build(_Table, record, "", where, error=RunError, do=MEASURE_AGAIN)
        sizes = [(len(table), {len(row) for row in table}) for table in (one.local, one.damage)]
        if sizes[0][0] != len(one.timesteps) or any(found != {len(one.entries)} for _, found in sizes):
            raise RunError(
                got="tables of uneven sizes",
                expected=f"a number for each of {len(one.entries)} entries in every row",
                where=where,
                do=MEASURE_AGAIN,
            )
        return cls(one.timesteps, one.entries, np.array(one.local), np.array(one.damage), one.images, one.measure)


@dataclass(frozen=True, kw_only=True)
class _Table:
    """errors.json."""

    timesteps: tuple[float, ...]
    entries: tuple[str, ...]
    local: tuple[tuple[float, ...], ...]
    damage: tuple[tuple[float, ...], ...]
    images: int
    measure: str = "change of distance"


@torch.inference_mode()
def error_table(
    bank: Bank,
    plan: StepPlan,
    space: Space,
    measure: Measure,
    *,
    images: int,
    seed: int,
    batch: int = 256,
    conditions: Conditions | None = None,
) -> Iterator[tuple[int, int, ErrorTable | None]]:
    """Measure the table on `images` trajectories of the plan's own sampler; yields (done, total, None), then the table.

    Each gene is swapped alone: the reference runs up to it, the entry inside it, the reference after it.
    `conditions`: as in `sample_images`.
    """
    swaps = [(k, e) for k in range(len(space.rows)) for e in range(len(space.entries)) if e != space.reference]
    starts = np.cumsum([0, *space.rows])
    total, done = len(swaps) * -(-images // batch), 0
    local = np.zeros((len(plan.rows), len(space.entries)))
    finals: dict[tuple[int, int], list[torch.Tensor]] = {swap: [] for swap in [*swaps, (0, space.reference)]}
    for first in range(0, images, batch):
        n = min(batch, images - first)
        walk = _ReferenceWalk(bank, plan, space, seed, first, n, conditions)
        local += walk.local * n / images
        finals[0, space.reference].append(walk.final)
        for k, e in swaps:
            row_entries = [plan.reference] * len(plan.rows)
            row_entries[starts[k] : starts[k + 1]] = space.phrase(e, space.rows[k])
            finals[k, e].append(walk.resume(int(starts[k]), plan.with_entries(row_entries)))
            done += 1
            yield done, total, None
    base = torch.cat(finals[0, space.reference])
    damage = np.zeros((len(space.rows), len(space.entries)))
    for k, e in swaps:
        damage[k, e] = measure(base, torch.cat(finals[k, e]))
    timesteps = tuple(row.timestep for row in plan.rows)
    yield total, total, ErrorTable(timesteps, space.entries, local, damage, images)


class _ReferenceWalk:
    """One batch of reference trajectories, with what is needed to leave them at the start of any gene."""

    def __init__(
        self, bank: Bank, plan: StepPlan, space: Space, seed: int, first: int, n: int, conditions: Conditions | None
    ):
        self.bank, self.seed, self.first = bank, seed, first
        self.generators = image_generators(seed, first, n)
        self.cond = cond_for(bank, first, n, conditions)
        self.saved: dict[int, tuple[torch.Tensor, Any, list[torch.Tensor]]] = {}
        self.local = np.zeros((len(plan.rows), len(space.entries)))
        starts = {int(s) for s in np.cumsum([0, *space.rows[:-1]])}
        scheduler = build_scheduler(plan, bank.device)
        sample = start_noise(bank, self.generators) * noise_scale(scheduler)
        others = [(e, plan.uniform(space.entries[e])) for e in space.alone if e != space.reference]
        called = [(e, other.rows, networks_of(bank, other)) for e, other in others]
        before, states = copy.deepcopy(scheduler), [g.get_state() for g in self.generators]
        for step in trajectory(bank, plan.uniform(), sample, self.generators, self.cond, scheduler=scheduler):
            if step.row in starts:
                self.saved[step.row] = (step.sample.clone(), copy.deepcopy(before), states)
            t = scheduler.timesteps[step.row]
            inputs = model_input(before, step.sample, t)
            for e, rows, networks in called:
                gap = predicted(networks[step.row], rows[step.row], inputs, t, self.cond, Memo())[1] - step.used
                self.local[step.row, e] = gap.square().mean().item()
            sample = step.after
            before, states = copy.deepcopy(scheduler), [g.get_state() for g in self.generators]
        self.final = to_images(bank, sample)

    def resume(self, row: int, plan: StepPlan) -> torch.Tensor:
        """Leave the reference trajectory at `row` and follow `plan` from there."""
        sample, scheduler, states = self.saved[row]
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)
        left = trajectory(
            self.bank, plan, sample.clone(), self.generators, self.cond, start=row, scheduler=copy.deepcopy(scheduler)
        )
        return to_images(self.bank, last(left))


# ---------------------------------------------------------------------------------------------------------- many tables


def kept_tables(
    book: ScoreBook, plans: Sequence[StepPlan], spaces: Sequence[Space], images: int, seed: int
) -> Iterator[ErrorTable]:
    """The error table of each plan's sampler in its space, one after another; kept in the run folder by the content of
    plan and entries, and measured side by side where the book has an executor."""
    files = [_file(book, plan, space, images, seed) for plan, space in zip(plans, spaces, strict=True)]
    missing = [k for k, file in enumerate(files) if not file.is_file()]
    run = map if book.executor is None else book.executor.map
    work = partial(measured_table, book.judge.drawer, images, seed)
    fresh = run(work, [plans[k] for k in missing], [spaces[k] for k in missing])
    for k, file in enumerate(files):
        if k in missing:
            write_json(file, next(fresh).to_json())
        yield ErrorTable.load(file)


def _file(book: ScoreBook, plan: StepPlan, space: Space, images: int, seed: int) -> Path:
    bank = book.judge.bank
    weights = [bank.fingerprint(call_of(name, 1.0)[0]) for name in space.entries]
    content = {"rows": space.rows, "images": images, "seed": seed}
    content |= {"calls": space.entries} if bank.guidance != 1 else {}
    return book.file.parent / "tables" / f"{fingerprint(plan.digest, weights, content)}.json"


def measured_table(drawer: Drawer, images: int, seed: int, plan: StepPlan, space: Space) -> ErrorTable:
    """The error table of a plan's sampler in a space."""
    *_, (_, _, found) = error_table(
        drawer.bank,
        plan,
        space,
        drawer.moved,
        images=images,
        seed=seed,
        batch=drawer.batch,
        conditions=drawer.conditions,
    )
    assert found is not None
    return found
