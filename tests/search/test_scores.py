"""Scores by content. Oracles: the judge's own numbers, one by one; literal lines of files of before."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.core.errors import RunError
from halfstep.core.plan import NONE, Correction, Guide, StepPlan
from halfstep.data.images import Images
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import fewer_steps, plan_for
from halfstep.measure.features import extractor_of, feature_net_for, raw_pixels
from halfstep.measure.judge import Judge
from halfstep.search.scores import Stretch, counted, open_scores, read_scores
from tiny import unet

net = partial(unet, channels=(4,), norm_num_groups=2, attention_head_dim=2)


def bank_of(*seeds: int) -> Bank:
    return Bank({f"net{k}": net(seed) for k, seed in enumerate(seeds)}, "net0", "epsilon")


BANK = bank_of(0, 1)
PLAN = plan_for(BANK, DDIMScheduler(), 4)
PLANS = [PLAN.with_entries([f"net{k >> i & 1}" for i in range(4)]) for k in range(16)]


class Told:
    """A judge whose score of a plan is known, and who was asked what; one of its plans it may break at."""

    def __init__(self, bank: Bank = BANK, broken: StepPlan | None = None):
        self.bank, self.broken, self.asked, self.lock = bank, broken, [], threading.Lock()

    def true(self, plan: StepPlan, count: int, seed: int) -> float:
        """Any number that hangs on all of what a picture hangs on."""
        rows = sum((i + 1) * len(row.entry + "x" * int(row.entry[-1])) for i, row in enumerate(plan.rows))
        return rows + 100 * plan.sampler.steps + count / 7 + seed / 3

    def ask(self, plan, count, seed, executor):
        if executor is None:
            return lambda: self.score(plan, count, seed)
        return executor.submit(self.score, plan, count, seed).result

    def score(self, plan: StepPlan, count: int, seed: int) -> float:
        with self.lock:
            self.asked.append((plan, count, seed))
        if plan is self.broken:
            raise RuntimeError("broken")
        return self.true(plan, count, seed)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_many_scores_are_those_of_each_in_order_and_twins_are_measured_once(side_by_side, tmp_path):
    judge = Told()
    scores, asked = open_scores(judge, tmp_path).on(8, 3), [*PLANS, *PLANS[3:6], PLANS[0]]
    with ThreadPoolExecutor(4) as pool:
        found = scores.many(asked, "fit", pool if side_by_side else None)
    assert found == [judge.true(plan, 8, 3) for plan in asked]
    assert len(judge.asked) == len(PLANS) == len(scores.asked)
    alone = open_scores(Told(), tmp_path / "alone").on(8, 3)
    assert [alone(plan, "fit") for plan in asked] == found
    assert {one.key: one for one in read_scores(tmp_path)} == {one.key: one for one in read_scores(tmp_path / "alone")}


def test_a_book_s_own_executor_measures(tmp_path):
    threads = set()
    judge = Told()
    judge.score = lambda plan, count, seed: threads.add(threading.current_thread().name) or 1.0
    with ThreadPoolExecutor(2, thread_name_prefix="pool") as pool:
        open_scores(judge, tmp_path, executor=pool).on(8, 3).many(PLANS[:3], "fit")
    assert threads and all(name.startswith("pool") for name in threads)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_came_in_before_a_break_is_kept_and_not_measured_again(workers, tmp_path):
    judge = Told(broken=PLANS[5])
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="broken"):
        open_scores(judge, tmp_path).on(8, 3).many(PLANS, "fit", pool if workers else None)
    kept = read_scores(tmp_path)
    again = Told()
    found = open_scores(again, tmp_path).on(8, 3).many(PLANS, "fit")
    assert found == [judge.true(plan, 8, 3) for plan in PLANS]
    assert len(again.asked) == len(PLANS) - len(kept)
    assert len(kept) == 5


@pytest.mark.slow
def test_a_class_conditional_judge_measures_in_other_processes(tmp_path):
    """Oracle: the same judge, here."""
    bank = Bank({name: net(k, num_class_embeds=3) for k, name in enumerate(("net0", "net1"))}, "net0", "epsilon")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
    labels = np.arange(12, dtype=np.int64) % 3
    pictures = Images(name="toy", pixels=pixels, labels=labels, classes=("a", "b", "c"), fingerprint="toy")
    judge = Judge(bank, pictures, raw_pixels(pictures), cache=None, batch=4)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        found = open_scores(judge, tmp_path / "pool").on(6, 3).many(PLANS[:3], "fit", pool)
    assert found == pytest.approx(open_scores(judge, tmp_path / "here").on(6, 3).many(PLANS[:3], "fit"), rel=1e-5)
    own = extractor_of(feature_net_for(pictures).eval())
    again = pickle.loads(pickle.dumps(own))
    assert torch.equal(again.fn(pictures.batch(slice(0, 2))), own.fn(pictures.batch(slice(0, 2))))


def test_a_score_hangs_on_rows_sampler_weights_images_and_seed_and_on_nothing_else(tmp_path):
    judge = Told()
    open_scores(judge, tmp_path).on(8, 3)(PLANS[1], "fit")

    def measures(plan: StepPlan, images: int = 8, seed: int = 3, bank: Bank = BANK) -> bool:
        other = Told(bank)
        open_scores(other, tmp_path).on(images, seed)(plan, "again")
        return bool(other.asked)

    assert not measures(PLANS[1].replacing(PLAN))  # what a plan is told to replace draws nothing
    assert not measures(PLANS[1], bank=bank_of(0, 1)) and not measures(PLANS[1], bank=bank_of(0, 1, 2))
    assert measures(PLANS[2]) and measures(fewer_steps(PLAN, 3))
    assert measures(PLANS[1].with_corrections([Correction(0.9)] * 4))
    assert measures(PLANS[1].with_guides([Guide("net1", 2.0)] * 4))
    assert measures(PLANS[1], images=9) and measures(PLANS[1], seed=4)
    assert measures(PLANS[1], bank=bank_of(0, 2)) and measures(PLANS[1], bank=bank_of(2, 1))
    open_scores(judge, tmp_path).on(8, 3)(PLAN, "fit")
    assert not measures(PLAN, bank=bank_of(0, 5))  # it names the first net only


def test_a_bank_that_was_saved_and_moved_has_the_scores_of_before(tmp_path):
    open_scores(Told(), tmp_path / "run").on(8, 3)(PLANS[1], "fit")
    BANK.save_pretrained(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = Told(Bank.from_pretrained(tmp_path / "there"))
    open_scores(moved, tmp_path / "run").on(8, 3)(PLANS[1], "again")
    assert not moved.asked


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_the_smallest_change_of_any_weight_is_measured_again(tmp_path_factory, data):
    run, bank = tmp_path_factory.mktemp("run"), bank_of(0, 1)
    open_scores(Told(), run).on(8, 3)(PLANS[1], "fit")
    weights = bank[data.draw(st.sampled_from(sorted(bank)))].state_dict()
    weight = weights[data.draw(st.sampled_from(sorted(weights)))].view(-1)
    place = data.draw(st.integers(0, weight.numel() - 1))
    weight[place] = torch.nextafter(weight[place], torch.tensor(9.0))
    judge = Told(bank)
    open_scores(judge, run).on(8, 3)(PLANS[1], "again")
    assert len(judge.asked) == 1


def test_a_score_is_told_with_all_that_a_reader_wants_to_know_of_it(tmp_path):
    plan = PLANS[1].with_corrections([NONE, NONE, Correction(0.9, 0.1), Correction(0.9, 0.1)])
    plan = plan.with_guides([None, Guide("net1", 2.0), None, None])
    told: list = []
    scores = open_scores(Told(), tmp_path).on(8, 3)
    for _ in range(2):
        scores(plan, "corrections", seen=counted(lambda done, note="": told.append((done, note))))
    (one,) = read_scores(tmp_path)
    corrected = Stretch(2, "net0", Correction(0.9, 0.1))
    assert one.plan == (Stretch(1, "net1"), Stretch(1, "net0", guide=Guide("net1", 2.0)), corrected)
    assert (one.stage, one.steps, one.corrected, one.images, one.seed) == ("corrections", 4, True, 8, 3)
    assert (one.macs, one.share) == (plan.macs, plan.share) and one.name == "4 steps, corrected"
    assert told == [(1, f"score {one.score:.3g} at 125%")]  # once; a call more than the reference's four
    line = json.loads((tmp_path / "scores.jsonl").read_text())
    assert line["format"] == 1 and line["plan"] == [
        {"rows": 1, "entry": "net1"},
        {"rows": 1, "entry": "net0", "guide": {"entry": "net1", "weight": 2.0}},
        {"rows": 2, "entry": "net0", "correction": {"scale": 0.9, "threshold": 0.1}},
    ]


def test_a_line_of_a_later_format_is_refused_and_named(tmp_path):
    open_scores(Told(), tmp_path).on(8, 3)(PLAN, "fit")
    file = tmp_path / "scores.jsonl"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(RunError, match="line 1: format"):
        read_scores(tmp_path)


BEFORE = """\
{"stage": "reference", "genes": [0, 0, 0], "share": 1.0, "score": 6.177927267417431, "images": 64}
{"stage": "fit", "genes": [1, 3, 1], "share": 0.3941878625613565, "score": 51.862989116096514, "images": 128}
"""
FINALS_BEFORE = '{"6 steps, plain": {"score": 17.5, "macs": 496}, "4 steps, corrected": {"score": 8.25, "macs": 430}}'


def test_folders_of_before_are_read(tmp_path):
    (tmp_path / "search.jsonl").write_text(BEFORE)
    (tmp_path / "finals.json").write_text(FINALS_BEFORE)
    searched, finals = read_scores(tmp_path)[:2], read_scores(tmp_path)[2:]
    assert [(one.stage, one.share) for one in searched] == [("reference", 1.0), ("fit", 0.3941878625613565)]
    assert [(one.name, one.score, one.macs) for one in finals] == [
        ("6 steps, plain", 17.5, 496),
        ("4 steps, corrected", 8.25, 430),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("finals.json", '{"six steps, plain": {"score": 17.5, "macs": 496}}'),
        ("finals.json", '{"6 steps, plain": {"score": "a", "macs": 496}}'),
        ("finals.json", "[]"),
        ("search.jsonl", '{"stage": "fit"}\n'),
        ("scores.jsonl", '{"stage": "fit"}\n'),
    ],
)
def test_damaged_files_are_refused_by_name(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=name):
        read_scores(tmp_path)


def test_a_search_of_before_is_measured_again_and_it_is_said_once(tmp_path):
    said: list[str] = []
    watch = SimpleNamespace(say=said.append)
    open_scores(Told(), tmp_path, watch)
    assert not said
    (tmp_path / "shrink.jsonl").write_text("")
    judge = Told()
    open_scores(judge, tmp_path, watch).on(8, 3)(PLAN, "fit")
    assert len(said) == 1 and "measured again" in said[0] and str(tmp_path) in said[0] and judge.asked
    open_scores(judge, tmp_path, watch)
    assert len(said) == 1


def test_a_bank_tells_its_entries_by_weights_and_prediction():
    one = BANK.fingerprint("net0")
    assert one == bank_of(0, 7).fingerprint("net0") != BANK.fingerprint("net1")
    assert one != Bank({"net0": net(0)}, "net0", "sample").fingerprint("net0")
    half = bank_of(0)
    assert half.fingerprint("net0") == one != half.half().fingerprint("net0")
