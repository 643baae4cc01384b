"""What is told before work begins; oracles: arithmetic on given prices, and the clock for a bank that is timed."""

from __future__ import annotations

import time

import pytest
import torch

from halfstep.app import estimate as module
from halfstep.app.estimate import LEAST_SECONDS, TIMING_SECONDS, Drawing, Training, announce, estimate
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec
from halfstep.core.watch import Watch
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import reference_plan, sample_images
from tiny import unet


class Heard(Watch):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def bank_of() -> Bank:
    return Bank({"full": unet(), "small": unet()}, "full", "epsilon")


US = {"full": 1000.0, "small": 100.0}


def test_totals_are_the_sums_of_all_stages():
    bank = bank_of()
    plan = reference_plan(bank, Process(), SampleSpec(steps=5))
    mixed = plan.with_entries(["full", "small", "small", "small", "full"])
    full = bank.prices()["full"].macs
    found = estimate(bank, [Drawing(images=100, plan=plan), Drawing(images=10, plan=mixed)], us=US)
    assert (found.images, found.calls, found.stages) == (110, 550, 2)
    assert found.seconds == pytest.approx((100 * 5 * 1000 + 10 * (2 * 1000 + 3 * 100)) / 1e6)
    by_macs = estimate(bank, [Drawing(images=100, macs=5 * full)], us=US)
    assert by_macs.calls == 500 and by_macs.seconds == pytest.approx(0.5)
    trained = estimate(bank, [Training(steps=20, batch=8, trained=("small",), teachers=("full",))], us=US)
    assert trained.seconds == pytest.approx(20 * 8 * (3 * 100 + 1000) / 1e6) and trained.images == 0


def test_a_line_says_the_work_and_the_time_and_short_work_none():
    bank, heard = bank_of(), Heard()
    plan = reference_plan(bank, Process(), SampleSpec(steps=5))
    slow = {"full": 1e6, "small": 1e6}
    work = [Training(steps=6000, batch=64, trained=("small",)), Drawing(images=1000, plan=plan)]
    announce(heard, bank, [*work, Drawing(images=1000, plan=plan)], us=slow)
    threads = torch.get_num_threads()
    where = f"on this machine ({threads} thread{'s' * (threads > 1)})"
    assert heard.said == [
        f"will train 6,000 steps of 64 images and draw 2,000 images in 2 stages: about 13 days {where}"
    ]
    announce(heard, bank, [Drawing(images=60000, plan=plan)], us={"full": 30.0}, doing="look at")
    assert heard.said[1] == f"will look at 60,000 images: about 9 s {where}"
    announce(heard, bank, [Drawing(images=10_000, plan=plan)], us={"full": LEAST_SECONDS / 50_001 * 1e6})
    assert len(heard.said) == 2


def test_what_the_macs_say_is_a_moment_is_not_timed(monkeypatch):
    monkeypatch.setattr(module, "_timed", lambda *_: pytest.fail("was timed"))
    bank, heard = bank_of(), Heard()
    announce(heard, bank, [Drawing(images=4, plan=reference_plan(bank, Process(), SampleSpec(steps=5)))])
    assert heard.said == []


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(5.2, "5 s"), (43, "45 s"), (89, "90 s"), (185, "3 min"), (5990, "100 min"), (9000, "2.5 h"), (4e5, "5 days")],
)
def test_time_is_told_no_finer_than_it_is_guessed(seconds, said):
    assert module._span(seconds) == said


def test_a_bank_without_times_is_timed_in_a_moment_and_the_guess_is_of_the_right_size():
    bank = bank_of()
    plan = reference_plan(bank, Process(), SampleSpec(steps=20))
    list(sample_images(bank, plan, 8, seed=0, batch=64))
    guesses, took = [], []
    for _ in range(3):
        begun = time.perf_counter()
        guesses.append(estimate(bank, [Drawing(images=64, plan=plan)], batch=64).seconds)
        assert time.perf_counter() - begun < 3 * TIMING_SECONDS + 2
        begun = time.perf_counter()
        list(sample_images(bank, plan, 64, seed=0, batch=64))
        took.append(time.perf_counter() - begun)
    assert sorted(took)[1] / 6 < sorted(guesses)[1] < 6 * sorted(took)[1]  # beside whatever else the machine does


def test_reused_passes_are_priced_by_their_share_of_their_entry_s():
    bank = bank_of().with_reuse([1])
    prices = bank.prices()
    found = module._timed(bank, ["full", "full~1"], 4)
    assert found["full~1"] / found["full"] == pytest.approx(prices["full~1"].macs / prices["full"].macs)
