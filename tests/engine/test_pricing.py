"""Prices in microseconds, by a clock that the networks set forward: sums by hand, no speed of any machine."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL

from halfstep.core.errors import HalfstepError, PlanError
from halfstep.core.plan import Correction, Guide, Price
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec
from halfstep.core.watch import Watch
from halfstep.engine.bank import Bank
from halfstep.engine.pricing import PriceBook, Setting, drawing, predicted_ms, timed_prices, typical
from halfstep.engine.profiling import interleave
from halfstep.engine.sampling import reference_plan
from tiny import unet

BATCH = 4
COSTS = {"full": 0.008, "slim": 0.002, "decode": 0.5}
"""Seconds of a call."""


class Hand:
    """A clock that stands still but for what a call of each network costs, and how often each was called."""

    def __init__(self, bank: Bank):
        self.now, self.calls = 0.0, dict.fromkeys(COSTS, 0)
        for name in bank:
            bank[name].register_forward_hook(partial(self.tick, name))
        if bank.vae is not None:
            bank.vae.decoder.register_forward_hook(partial(self.tick, "decode"))

    def tick(self, name, *_) -> None:
        self.now += COSTS[name]
        self.calls[name] += 1

    def __call__(self) -> float:
        return self.now


class Listening(Watch):
    def __init__(self):
        self.said = []

    def say(self, text: str) -> None:
        self.said.append(text)


def bank_of(latent: bool = False, **changes) -> Bank:
    torch.manual_seed(0)
    vae = (
        AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=1, sample_size=8) if latent else None
    )
    bank = Bank({"full": unet(0, (8, 16)), "slim": unet(1, (4, 8))}, "full", "epsilon", vae, **changes)
    bank.prices()  # counted before anybody looks at the clock
    bank.fixed()
    return bank


def plan_of(bank: Bank, scheduler: str = "ddim", steps: int = 5):
    return reference_plan(bank, Process(), SampleSpec(scheduler=scheduler, steps=steps), bank.prices())


def test_a_call_is_priced_in_microseconds_of_an_image_beside_its_macs():
    bank = bank_of()
    macs = {name: price.macs for name, price in bank.prices().items()}
    found = timed_prices(bank, BATCH, clock=Hand(bank))
    assert found == {"full": Price(macs["full"], 2000), "slim": Price(macs["slim"], 500)}


def test_a_typical_time_is_the_mean_without_both_ends():
    assert typical([5.0]) == 5 and typical([1.0, 3.0]) == 2 and typical([1.0, 100.0, 3.0]) == 3
    assert typical([*range(20)]) == 9.5 and typical([0.0, *[4.0] * 8, 1000.0]) == 4


def test_entries_that_reuse_features_are_timed_as_what_is_left_to_compute():
    bank = bank_of().with_reuse([0])
    hand = Hand(Bank({name: bank[name] for name in bank.computed}, "full", "epsilon"))
    found = timed_prices(bank, BATCH, clock=hand)
    assert list(found) == list(bank) and all(price.us is not None for price in found.values())
    assert found["full"].us == 2000 and found["full~0"].macs == bank.prices()["full~0"].macs


KINDS = {
    "DDIM": ("ddim", {}),
    "Heun": ("heun", {}),
    "PNDM": ("pndm", {}),
    "guided": ("dpmsolver++", {"guide": Guide("slim", 1.5)}),
    "guided and corrected": ("ddpm", {"guide": Guide("full", 1.5), "correction": Correction(0.9, 0.1)}),
}


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_calls_and_the_fixed_part_add_up_to_what_a_trajectory_takes(kind, latent):
    bank = bank_of(latent)
    scheduler, changes = KINDS[kind]
    plan = plan_of(bank, scheduler)
    plan = plan.with_entries([("full", "slim")[row % 3 > 0] for row in range(len(plan.rows))])
    plan = replace(plan, rows=tuple(replace(row, **changes) for row in plan.rows))
    hand = Hand(bank)
    book = PriceBook(bank, BATCH, clock=hand)
    priced = book.priced(plan)
    [measured] = {
        round(ms, 6)
        for ms in interleave({"it": partial(drawing, bank, plan, BATCH)}, repeats=2, warmup=1, clock=hand)["it"]
    }
    by_hand = 1e3 * (sum(COSTS[name] for name in plan.called) + COSTS["decode"] * latent)
    assert predicted_ms(priced, BATCH) == pytest.approx(measured) == pytest.approx(by_hand)
    assert priced.fixed == Price(bank.fixed().macs, 1e6 * COSTS["decode"] * latent / BATCH)
    assert priced.macs == plan.macs and priced.rows == plan.rows


def test_a_trajectory_without_its_calls_calls_no_network():
    bank = bank_of()
    hand = Hand(bank)
    book = PriceBook(bank, BATCH, clock=hand)
    before = dict(hand.calls)
    book.fixed(plan_of(bank))
    assert hand.calls == before and before["full"] == before["slim"] > 1


def test_decoding_is_timed_once_for_all_samplers():
    bank = bank_of(latent=True)
    hand = Hand(bank)
    book = PriceBook(bank, BATCH, clock=hand)
    plans = [plan_of(bank, name, steps) for name in ("ddim", "dpmsolver++") for steps in (4, 5, 6)]
    fixed = {book.fixed(plan).us for plan in plans}
    assert hand.calls["decode"] == 6 and fixed == {1e6 * COSTS["decode"] / BATCH}


def test_prices_are_measured_once_and_kept(tmp_path):
    bank, file = bank_of(), tmp_path / "prices.json"
    hand, watch = Hand(bank), Listening()
    first = PriceBook(bank, BATCH, file, watch=watch, clock=hand)
    plan = plan_of(bank)
    priced = first.priced(plan)
    calls = dict(hand.calls)
    again = PriceBook(bank, BATCH, file, watch=watch, clock=lambda: pytest.fail("a clock was looked at"))
    assert again.priced(plan) == priced and hand.calls == calls and watch.said == []
    assert again.priced(plan.uniform("slim")).fixed == priced.fixed  # it hangs on the sampler, not on the entries
    record = json.loads(file.read_text())
    assert record["prices"]["full"]["us"] == 2000 and list(record["setting"]) == [
        *("device", "cpu", "threads", "dtype", "batch", "torch", "layouts", "runtimes")
    ]
    assert any("DDIM, 5 steps" in key for key in record["fixed"])


def test_another_sampler_has_a_fixed_part_of_its_own():
    bank = bank_of()
    keys = {
        PriceBook.key(plan)
        for steps in (5, 6)
        for scheduler in ("ddim", "heun")
        for plan in (plan_of(bank, scheduler, steps),)
    }
    plan = plan_of(bank)
    keys |= {PriceBook.key(plan.with_corrections([Correction(0.9, 0.0)] * count + [Correction()] * (5 - count)))
             for count in (1, 5)}  # fmt: skip
    keys.add(PriceBook.key(plan.with_guides([Guide("slim", 2.0)] * 5)))
    assert len(keys) == 7


CHANGES = {
    "threads": ("threads", 77),
    "cpu": ("cpu", "Another CPU @ 9 GHz"),
    "device": ("device", "cuda: a card"),
    "dtype": ("dtype", "float16"),
    "batch": ("batch", 9),
    "torch": ("torch", "1.0.0"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_in_another_setting_prices_are_measured_again_and_it_is_said_why(what, tmp_path):
    bank, file = bank_of(), tmp_path / "prices.json"
    hand, watch = Hand(bank), Listening()
    PriceBook(bank, BATCH, file, clock=hand).fixed(plan_of(bank))
    record = json.loads(file.read_text())
    name, value = CHANGES[what]
    now = record["setting"][name]
    record["setting"][name], record["prices"]["full"]["us"] = value, 1.0
    file.write_text(json.dumps(record))
    book = PriceBook(bank, BATCH, file, watch=watch, clock=hand)
    assert watch.said == [f"prices are measured again: {name} {now}, not {value}"]
    assert book.prices["full"].us == 2000 and json.loads(file.read_text())["fixed"] == {}
    assert book.setting == Setting.of(bank, BATCH)


def test_layouts_precision_and_networks_that_are_others_are_seen(tmp_path):
    bank, file, watch = bank_of(), tmp_path / "prices.json", Listening()
    open_again = partial(PriceBook, batch=BATCH, file=file, watch=watch)
    PriceBook(bank, BATCH, file)
    bank.set_runtimes({"slim": "compile"}, [])  # graphs of no batch: all of them run eagerly
    open_again(bank)
    bank.set_runtimes({"slim": "eager"}, [])
    open_again(bank)
    assert [line.rpartition(": ")[2] for line in watch.said] == ["runtime of slim compile", "runtime of slim eager"]
    watch.said.clear()
    bank.set_layouts({"slim": "channels_last"})
    open_again(bank)
    more = bank.with_entry("more", unet(2, (4, 4)), "epsilon")
    open_again(more)
    open_again(bank)  # what is no longer there is not missed
    open_again(Bank({"full": unet(0, (8, 16)), "slim": unet(1, (8, 8))}, "full", "epsilon"))
    open_again(bank_of().double())
    told = [text.removeprefix("prices are measured again: ") for text in watch.said]
    assert told[:2] == ["layout of slim channels_last", "no price of more"]
    assert told[2] == "layout of slim contiguous; another network is slim"
    assert "dtype float64, not float32" in told[3] and len(told) == 4


def test_a_file_of_something_else_and_a_plan_without_times_are_refused(tmp_path):
    bank, file = bank_of(), tmp_path / "prices.json"
    file.write_text('{"prices": {}}')
    with pytest.raises(HalfstepError, match=r"prices\.json"):
        PriceBook(bank, BATCH, file)
    with pytest.raises(PlanError, match="a plan without times"):
        predicted_ms(plan_of(bank), BATCH)
