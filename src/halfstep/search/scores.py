"""Scores: what was measured of which plan, known by content and kept in one file as it is measured."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from halfstep.core import disk
from halfstep.core.errors import RunError
from halfstep.core.folder import SCORES_BEFORE
from halfstep.core.plan import NONE, Correction, Guide, StepPlan
from halfstep.core.typed import shown, typed
from halfstep.core.watch import SILENT, Told, Watch
from halfstep.data.arrays import open_cached, write_cached
from halfstep.engine.bank import Bank
from halfstep.measure.judge import Judge
from halfstep.nets.content import fingerprint

FILE = "scores.jsonl"
SEARCHED = ("reference", "free", "fit", "bisect", "frontier", "nsga2")
"""The stages of a search whose scores are on the same noise; the others: "final", "corrections", "final corrections",
"steps" and "penalty"; "fidelity" is of another measure (`arms.Twins`)."""


@dataclass(frozen=True)
class Stretch:
    """So many neighbouring rows of a plan that run one entry, under one correction and one guide."""

    rows: int
    entry: str
    correction: Correction = NONE
    guide: Guide | None = None

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {"rows": self.rows, "entry": self.entry}
        if self.correction != NONE:
            record["correction"] = self.correction._asdict()
        if self.guide is not None:
            record["guide"] = self.guide._asdict()
        return record


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One measured plan: a line of scores.jsonl.

    `stage`: what asked for it. `digest`: of its rows, its sampler and the weights of its entries. `macs`: per image of
    the trajectory; `share`: of the same sampler's with the reference in every row. `score`: the Fréchet distance of
    `images` pictures of `seed`'s noise as measured, lower is better. `steps`: its sampler's. `plan`: its rows, in
    stretches of equal ones.
    """

    stage: str
    digest: str
    macs: int
    share: float
    score: float
    images: int
    seed: int
    steps: int
    corrected: bool
    plan: tuple[Stretch, ...]
    format: Literal[1] = 1

    @property
    def key(self) -> tuple[str, int, int]:
        """What a score hangs on, besides the features and the pictures of the data, which are one in a run."""
        return self.digest, self.images, self.seed

    @property
    def name(self) -> str:
        """The plan among the best ones of every number of steps."""
        return f"{self.steps} steps, {'corrected' if self.corrected else 'plain'}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"plan": [one.to_json() for one in self.plan]}

    def __str__(self) -> str:
        return f"score {self.score:.3g} at {self.share:.0%}"


Seen = Callable[[Scored], None]
"""Who is told of a score as it comes in."""


def unseen(one: Scored) -> None:
    """Nobody is told."""


def counted(told: Told, most: float = math.inf) -> Seen:
    """Tells a stage of every score, and how many came in; never of more than `most`, where the total is a guess."""
    done = itertools.count(1)
    return lambda one: told(min(next(done), most), str(one))


def digest_in(bank: Bank, plan: StepPlan) -> str:
    """16 hex digits of what a plan draws by a bank's networks: its rows, its sampler, the weights that it names."""
    return fingerprint(plan.digest, [bank.fingerprint(name) for name in sorted(plan.nets)])


class ScoreBook:
    """All scores of a run folder, those of earlier calls too. `executor`: where many plans are measured at once."""

    def __init__(self, judge: Judge, file: Path, executor: Executor | None = None):
        self.judge, self.file, self.executor = judge, Path(file), executor
        self.known = {one.key: one for one in disk.read_records(self.file, Scored)}

    def on(self, images: int, seed: int) -> Scores:
        """The scores on so many pictures of one seed's noise."""
        return Scores(self, images, seed)

    def digest(self, plan: StepPlan) -> str:
        """16 hex digits of what a plan draws: its rows, its sampler, and the weights of the entries that it names."""
        return digest_in(self.judge.bank, plan)

    def features(self, plan: StepPlan, images: int, seed: int) -> np.ndarray:
        """Features [images, F] of a plan's pictures of a seed, kept in the run folder: drawn once."""
        file = self.file.parent / "state" / "features" / f"{self.digest(plan)}-{images}-{seed}.npy"
        shape = (images, self.judge.extractor.n_features)
        found = open_cached(file, shape, "<f4")
        if found is None:
            found, _ = self.judge.features(plan, images, seed, executor=self.executor)
            write_cached(file, shape, "<f4", [found])
        return np.asarray(found, dtype=np.float64)

    def note(self, plan: StepPlan, stage: str, score: float, images: int, seed: int) -> None:
        """Keep a score that was measured elsewhere, unless it is known."""
        scores = self.on(images, seed)
        one = scores.scored(stage, self.digest(plan), plan, score)
        if one.key not in self.known:
            self.keep(one)

    def keep(self, one: Scored) -> None:
        """Write a score, and know it from now on."""
        disk.append_record(self.file, one.to_json())
        self.known[one.key] = one


class Scores:
    """From plan to score on common noise: `images` pictures of `seed`, the same noise for every plan.

    What the book knows is not measured again. `asked`: by digest, in the order in which it was asked for.
    """

    def __init__(self, book: ScoreBook, images: int, seed: int):
        self.book, self.images, self.seed = book, images, seed
        self.asked: dict[str, Scored] = {}

    def __call__(self, plan: StepPlan, stage: str, *, seen: Seen = unseen) -> float:
        return self.many([plan], stage, seen=seen)[0]

    def many(
        self, plans: Sequence[StepPlan], stage: str, executor: Executor | None = None, *, seen: Seen = unseen
    ) -> list[float]:
        """The plans' scores, in their order; equal plans are measured once.

        Each score is written as it comes in, so that a kill loses only what is in flight. `executor`: measures them
        side by side (the book's by default; None: one by one, here). `seen` is told of each, but once.
        """
        digests = [self.book.digest(plan) for plan in plans]
        wanted = dict(zip(digests, plans, strict=True))
        fresh = {digest: plan for digest, plan in wanted.items() if self._key(digest) not in self.book.known}
        for digest in (one for one in wanted if one not in fresh):
            self._seen(digest, seen)
        for digest, score in self._measured(fresh, executor or self.book.executor):
            self.book.keep(self.scored(stage, digest, fresh[digest], score))
            self._seen(digest, seen)
        self.asked |= {digest: self.book.known[self._key(digest)] for digest in wanted if digest not in self.asked}
        return [self.asked[digest].score for digest in digests]

    def _key(self, digest: str) -> tuple[str, int, int]:
        return digest, self.images, self.seed

    def _seen(self, digest: str, seen: Seen) -> None:
        if digest not in self.asked:
            seen(self.book.known[self._key(digest)])

    def _measured(self, plans: dict[str, StepPlan], executor: Executor | None) -> Iterator[tuple[str, float]]:
        """The digests and scores of plans, in their order, so that the file does not hang on who is faster."""
        judge = self.book.judge
        every = {digest: judge.ask(plan, self.images, self.seed, executor) for digest, plan in plans.items()}
        for digest, score in every.items():  # all are asked for before one is waited for
            yield digest, score()

    def scored(self, stage: str, digest: str, plan: StepPlan, score: float) -> Scored:
        kinds = itertools.groupby(plan.rows, key=lambda row: (row.entry, row.correction, row.guide))
        return Scored(
            stage=stage,
            digest=digest,
            macs=plan.macs,
            share=plan.share,
            score=score,
            images=self.images,
            seed=self.seed,
            steps=plan.sampler.steps,
            corrected=plan.corrected,
            plan=tuple(Stretch(len(list(rows)), *kind) for kind, rows in kinds),
        )


def open_scores(judge: Judge, folder: Path, watch: Watch = SILENT, executor: Executor | None = None) -> ScoreBook:
    """The scores of a run folder, in folder/scores.jsonl.

    Those that a version of before kept under other names do not tell which weights they are of: it is said that they
    are measured again. Raises RunError for a file that is damaged.
    """
    folder, file = Path(folder), Path(folder) / FILE
    if not file.exists() and any(any(folder.glob(pattern)) for pattern in SCORES_BEFORE):
        watch.say(f"{folder}: what was measured before does not tell of which weights it is: measured again")
    return ScoreBook(judge, file, executor)


# ------------------------------------------------------------------------------------------------- folders of before


def read_scores(folder: Path) -> list[Scored]:
    """Every measured plan of a run folder, also of one that was finished before there was scores.jsonl: that tells
    neither MACs nor noise of the plans of a search, 0 here, and only its plans and the best of every number of steps.

    Raises RunError for a file that is damaged.
    """
    if (folder / FILE).exists():
        return disk.read_records(folder / FILE, Scored)
    return [*_searched_before(folder / "search.jsonl"), *_finals_before(folder / "finals.json")]


@dataclass(frozen=True, kw_only=True)
class _Searched:
    """A line of search.jsonl. `images`: generated so far."""

    stage: str
    genes: tuple[int, ...]
    share: float
    score: float
    images: int


@dataclass(frozen=True, kw_only=True)
class _Final:
    """What finals.json tells of "20 steps, plain"."""

    score: float
    macs: int


def _searched_before(file: Path) -> Iterator[Scored]:
    for one in disk.read_records(file, _Searched):
        yield _scored_before(one.stage, one.score, share=one.share)


def _finals_before(file: Path) -> Iterator[Scored]:
    if not file.is_file():
        return
    do = "run again"
    record = disk.read_json(file, what="scores", do=do)
    for name, one in typed(record, dict[str, _Final], "", file, RunError, do).items():
        told = re.fullmatch(r"(\d{1,6}) steps, (plain|corrected)", name)
        if not told:
            raise RunError(got=f"the name {shown(name)}", expected='one like "20 steps, plain"', where=file, do=do)
        steps, corrected = int(told[1]), told[2] == "corrected"
        yield _scored_before("steps", one.score, macs=one.macs, steps=steps, corrected=corrected)


def _scored_before(
    stage: str, score: float, *, share: float = 0.0, macs: int = 0, steps: int = 0, corrected: bool = False
) -> Scored:
    return Scored(
        stage=stage,
        digest="",
        macs=macs,
        share=share,
        score=score,
        images=0,
        seed=0,
        steps=steps,
        corrected=corrected,
        plan=(),
    )
