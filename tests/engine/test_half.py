"""Entries in half precision: torch's own cast is the oracle of their numbers, the folder's bytes of what is stored."""

from __future__ import annotations

import json

import pytest
import torch

from halfstep.core.errors import ModelError
from halfstep.core.plan import StepPlan
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec
from halfstep.engine.bank import Bank, calls_of
from halfstep.engine.entry import Entry, Half
from halfstep.engine.pricing import PriceBook
from halfstep.engine.profiling import count_macs, example_inputs
from halfstep.engine.sampling import denoise, image_generators, reference_plan, start_noise
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.nets.denoiser import Memo, predictor
from halfstep.nets.precision import Cast
from halfstep.nets.reuse import shallow, tapped
from tiny import cond_for_net, text_unet, unet

BF16 = torch.bfloat16


def bank_of() -> Bank:
    return Bank({"full": unet(0, (8, 16)), "slim": unet(1, (4, 8))}, "full", "epsilon").with_casts(["bf16"])


def plan_over(bank: Bank, *entries: str) -> StepPlan:
    plan = reference_plan(bank, Process(), SampleSpec(scheduler="ddim", steps=len(entries)))
    return plan.with_entries(list(entries))


def drawn(bank: Bank, plan: StepPlan, batch: int = 2) -> torch.Tensor:
    generators = image_generators(0, 0, batch)
    return denoise(bank, plan, start_noise(bank, generators), generators)


@pytest.mark.parametrize("made", [unet, text_unet])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cast_predicts_what_the_net_does_in_that_precision(made, batch):
    net = made(3)
    half = made(3).to(BF16)
    sample, cond = torch.randn(batch, 1, 8, 8), cond_for_net(net, batch)
    mine = predictor(Cast(net, "bf16"))(sample, torch.tensor(500), cond, Memo())
    cast = {name: one.to(BF16) if one.is_floating_point() else one for name, one in cond.items()}
    theirs = predictor(half)(sample.to(BF16), torch.tensor(500), cast, Memo())
    assert mine.dtype == torch.float32 and torch.equal(mine, theirs.float())
    whole = predictor(net)(sample, torch.tensor(500), cond, Memo())
    assert 0 < (mine - whole).norm() / whole.norm() < 0.05, "eight bits of a number"


def test_its_cuts_are_those_of_the_net_in_that_precision():
    cast, sample, t = Cast(unet(0, (8, 16)), "bf16"), torch.randn(2, 1, 8, 8), torch.tensor(300)
    whole = predictor(cast)(sample, t, {}, Memo())
    prediction, kept = tapped(cast, sample, t, {}, [0, "out"])
    assert torch.equal(prediction, whole) and torch.equal(kept["out"], whole)
    assert kept[0].dtype == torch.float32 and torch.equal(shallow(cast, sample, t, {}, 0, kept[0]), whole)


def test_a_plan_of_both_precisions_is_drawn_row_by_row():
    bank = bank_of().with_reuse([0], [0])
    ends = drawn(bank, plan_over(bank, "full", "full@bf16", "slim@bf16", "full@bf16", "full@bf16~0", "full"))
    by_hand = Bank({"full": bank["full"], "slim": bank["slim"]}, "full", "epsilon")
    whole = drawn(by_hand, plan_over(by_hand, "full", "full", "slim", "full", "full", "full"))
    assert ends.dtype == torch.float32 and 0 < (ends - whole).norm() / whole.norm() < 0.5
    alone = plan_over(bank, "full", "full", "slim")
    assert torch.equal(drawn(bank, alone), drawn(by_hand, alone)), "rows in float32 are untouched"


def test_it_costs_its_sources_macs_and_a_time_of_its_own():
    bank = bank_of().with_reuse([0], [0])
    prices = bank.prices()
    assert prices["full@bf16"].macs == prices["full"].macs == count_macs(unet(0, (8, 16)))
    assert prices["full@bf16~0"] == prices["full~0"]
    book = PriceBook(bank, 2)
    assert all(price.us > 0 for price in book.prices.values())
    assert calls_of(bank, 2)["full@bf16"]().dtype == torch.float32
    priced = book.priced(plan_over(bank, "full", "full@bf16"))
    assert priced.whole.us == pytest.approx(
        sum(book.prices[name].us for name in ("full", "full@bf16")) + book.fixed(priced).us
    )
    assert bank.costs(repeats=1)["full@bf16"].dtype == "bfloat16"


def test_nothing_is_stored_twice_and_it_comes_back(tmp_path):
    bank = bank_of()
    plan = plan_over(bank, "full", "full@bf16", "slim@bf16")
    StepAwarePipeline(bank, plan).save_pretrained(tmp_path / "pipe")
    folder = tmp_path / "pipe" / "bank" / "full@bf16"
    assert [file.name for file in folder.iterdir()] == ["entry.json"]
    assert json.loads((folder / "entry.json").read_text())["weights"] == {
        "kind": "cast",
        "of": "full",
        "precision": "bf16",
    }
    again = StepAwarePipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(drawn(again.bank, again.plan), drawn(bank, plan))
    assert again.bank.fingerprint("full@bf16") == bank.fingerprint("full@bf16") != bank.fingerprint("full")
    assert "full@bf16" in str(again.plan), "a plan prints it"


def test_moving_a_bank_leaves_its_precision():
    bank = bank_of()
    assert bank.dtype == torch.float32
    bank.to(torch.float64)
    assert bank.dtype == torch.float64 and {p.dtype for p in bank["full@bf16"].parameters()} == {BF16}
    bank.set_layouts({"full@bf16": "channels_last"})
    inputs = example_inputs(bank["full@bf16"], 2, dtype=bank.dtype)
    assert predictor(bank["full@bf16"])(*inputs, Memo()).dtype == torch.float64
    assert bank.layouts()["full@bf16"] == "channels_last"


def test_a_cast_is_no_reference_and_is_cast_once():
    with pytest.raises(ModelError, match="one of full, slim"):
        Bank(bank_of().entries, "full@bf16", "epsilon")
    assert bank_of().with_casts(["bf16"]).names == bank_of().names
    more = {"twice": Entry(Cast(bank_of()["full"], "bf16"), Half("full@bf16", "bf16"))}
    with pytest.raises(ModelError, match="the weights of 'full@bf16' for 'twice'"):
        Bank({**bank_of().entries, **more}, "full", "epsilon")


def test_a_folder_of_another_precision_is_refused(tmp_path):
    bank_of().save_pretrained(tmp_path / "bank")
    file = tmp_path / "bank" / "full@bf16" / "entry.json"
    file.write_text(file.read_text().replace('"bf16"', '"int3"'))
    with pytest.raises(ModelError, match=r"int3.*bf16"):
        Bank.from_pretrained(tmp_path / "bank")
    with pytest.raises(ModelError, match="a UNet2DModel, expected the model of 'full' in bf16"):
        Bank({"full": unet(0), "half": Entry(unet(0), Half("full", "bf16"))}, "full", "epsilon")
