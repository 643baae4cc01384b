"""Rows that reuse features. Oracles: straight loops over diffusers' schedulers, drawing one by one, the plain plan."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.core.errors import ModelError, PlanError
from halfstep.core.plan import Guide, StepPlan
from halfstep.core.process import BETA_SCHEDULERS
from halfstep.core.recipe import SampleSpec
from halfstep.engine.bank import Bank
from halfstep.engine.entry import Entry, Reuse, Twin
from halfstep.engine.networks import networks_of, require_fed
from halfstep.engine.samplers import REFUSED, SCHEDULERS, scheduler_of
from halfstep.engine.sampling import (
    build_scheduler,
    denoise,
    guided,
    image_generators,
    plan_for,
    reference_plan,
    sample_images,
    start_noise,
    trajectory,
)
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.nets.denoiser import Memo
from halfstep.nets.reuse import OUT, forecast, shallow, tapped
from tiny import ode_unet, unet, uvit, wavelet_unet

NETS = {
    "UNet2DModel": partial(unet, channels=(8, 16), layers_per_block=2),
    "UViT2DModel": partial(uvit, depth=4),
    "SpectralUNet2DModel": wavelet_unet,
}


def bank_of(net=NETS["UNet2DModel"], cuts=(0, 1, OUT), **changes) -> Bank:
    entries = {"full": net(0, **changes), "slim": net(1, **changes)}
    for model in entries.values():
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return Bank(entries, "full", "epsilon").with_reuse(cuts, (0, 1))


def plan_of(bank: Bank, entries: str, scheduler: str = "ddim") -> StepPlan:
    """Rows by name, with spaces between them."""
    names = entries.split()
    steps = (len(names) + 1) // 2 if scheduler == "heun" else len(names)
    plan = reference_plan(bank, DDPMScheduler().config, SampleSpec(scheduler=scheduler, steps=steps), prices(bank))
    return plan.with_entries(names)


def prices(bank: Bank) -> dict[str, int]:
    return dict.fromkeys(bank, 4)


def by_hand(bank: Bank, plan: StepPlan, noise: torch.Tensor, generators) -> torch.Tensor:
    """The trajectory, with all features of all rows kept and those looked up that a row asks for."""
    scheduler = build_scheduler(plan)
    sample, kept = noise * scheduler.init_noise_sigma, {}

    def called(name, inputs, t):
        link = bank.entries[name].weights
        if not isinstance(link, Reuse):
            found, features = tapped(bank[name], inputs, t, {}, [0, 1, OUT])
            for cut, one in features.items():  # one of each timestep, the newest
                kept[name, cut] = {**kept.get((name, cut), {}), float(t): one}
            return found
        known = sorted(kept[link.of, link.cut].items(), reverse=True)  # timesteps fall
        return shallow(bank[link.of], inputs, t, {}, link.cut, forecast(known, float(t), link.order))

    for row, t in zip(plan.rows, scheduler.timesteps, strict=True):
        inputs = scheduler.scale_model_input(sample, t)
        found = called(row.entry, inputs, t)
        if row.guide:
            found = guided(found, called(row.guide.entry, inputs, t), row.guide.weight)
        options = {"generator": generators} if "generator" in scheduler.step.__code__.co_varnames else {}
        sample = scheduler.step(found, t, sample, return_dict=False, **options)[0]
    return sample


def drawn(bank: Bank, plan: StepPlan, count: int = 2, seed: int = 0) -> torch.Tensor:
    generators = image_generators(seed, 0, count)
    return denoise(bank, plan, start_noise(bank, generators), generators)


PLANS = {
    "one cut": "full full~0 full~0 full full~0 full",
    "a forecast": "full full full~1+ full~1+ full full~1+",
    "a forecast over an uneven gap": "full slim full full~0+ full full~0 full~0+",
    "two cuts of one row": "full full~1 full~0 full~out full full~0",
    "two sources": "full slim full~0 slim~1 full~0 slim~out slim~0",
    "outputs": "full full~out full full~out+ full~out+ slim",
    "taken late": "full slim slim slim full~0 full",
}


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++", "heun"])
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_a_plan_that_reuses_features_is_the_straight_loop_that_keeps_them_all(name, scheduler):
    bank, rows = bank_of(), PLANS[name]
    odd = len(rows.split()) % 2  # Heun's rows are
    plan = plan_of(bank, rows if odd or scheduler != "heun" else f"{rows} full", scheduler)
    generators = image_generators(0, 0, 2)
    wanted = by_hand(bank, plan, start_noise(bank, generators), image_generators(0, 0, 2))
    assert torch.allclose(drawn(bank, plan), wanted, atol=1e-4)
    assert not torch.allclose(wanted, drawn(bank, plan.uniform()), atol=1e-3)


@pytest.mark.parametrize("net", NETS)
@torch.no_grad()
def test_every_family_that_can_be_cut_runs_in_a_plan(net):
    bank = bank_of(NETS[net])
    plan = plan_of(bank, "full full~1 full full~0+ slim slim~0")
    generators = image_generators(0, 0, 2)
    wanted = by_hand(bank, plan, start_noise(bank, generators), generators)
    assert torch.allclose(drawn(bank, plan), wanted, atol=1e-4)


@torch.no_grad()
def test_a_guide_leaves_features_and_takes_them():
    bank = bank_of()
    plan = plan_of(bank, "full full~0 full full~0+ slim~1")
    plan = plan.with_guides([Guide(name, 1.5) for name in ("slim", "slim~0", "full~0", "slim", "full")])
    generators = image_generators(0, 0, 2)
    wanted = by_hand(bank, plan, start_noise(bank, generators), generators)
    assert torch.allclose(drawn(bank, plan), wanted, atol=1e-4)


GUIDED = {  # rows, and what guides each: an entry under the null condition, or - for none
    "one net": ("full full full slim", "full full - full"),
    "reuse of both branches, in one call": ("full full~0 full full~0+", "full full~0 full full~0+"),
    "a branch that skips rows": ("full full~0 full~1 full full~0", "full - full~1 full full~0"),
    "features of other timesteps": ("full full full~0+ full full~0", "full - full~0 - full~0"),
    "a cheaper guide": ("full full~0 full full~0 slim", "slim slim slim~1 full slim~1"),
}


@pytest.mark.parametrize("name", GUIDED)
@torch.no_grad()
def test_guides_run_under_the_null_condition_with_features_of_their_own(name):
    """Oracle: the straight loop, both branches apart: null + w (own - null), arXiv 2207.12598, equation 6."""
    null, labels = {"class_labels": torch.tensor([3])}, torch.tensor([1, 2])
    bank = bank_of(num_class_embeds=4).with_null(null)
    plan = plan_of(bank, GUIDED[name][0])
    plan = plan.with_guides([None if one == "-" else Guide(one, 2.5) for one in GUIDED[name][1].split()])
    generators = image_generators(0, 0, 2)
    noise = start_noise(bank, generators)
    scheduler = build_scheduler(plan)
    sample, kept = noise * scheduler.init_noise_sigma, ({}, {})

    def called(name, branch, inputs, t):
        cond = {"class_labels": torch.tensor([3, 3]) if branch else labels}
        link = bank.entries[name].weights
        if not isinstance(link, Reuse):
            found, features = tapped(bank[name], inputs, t, cond, [0, 1])
            for cut, one in features.items():
                kept[branch][name, cut] = {**kept[branch].get((name, cut), {}), float(t): one}
            return found
        known = sorted(kept[branch][link.of, link.cut].items(), reverse=True)
        return shallow(bank[link.of], inputs, t, cond, link.cut, forecast(known, float(t), link.order))

    for row, t in zip(plan.rows, scheduler.timesteps, strict=True):
        found = called(row.entry, 0, sample, t)
        if row.guide:
            other = called(row.guide.entry, 1, sample, t)
            found = other + 2.5 * (found - other)
        sample = scheduler.step(found, t, sample, return_dict=False)[0]
    assert torch.allclose(denoise(bank, plan, noise, generators, {"class_labels": labels}), sample, atol=1e-4)


def test_a_guide_takes_no_features_of_own_calls_where_it_has_a_condition_of_its_own():
    bank = bank_of(num_class_embeds=4).with_null({"class_labels": torch.tensor([3])})
    plan = plan_of(bank, "full full full").with_guides([None, Guide("full~0", 2.0), None])
    with pytest.raises(PlanError, match="full~0"):
        require_fed(bank, plan)


def test_the_null_condition_is_stored_with_the_bank(tmp_path):
    null = {"encoder_hidden_states": torch.randn(1, 3, 4), "added_cond_kwargs": {"time_ids": torch.ones(1, 6)}}
    bank = bank_of().with_null(null)
    bank.save_pretrained(tmp_path / "bank")
    found = Bank.from_pretrained(tmp_path / "bank", checked=True).null
    assert torch.equal(found["encoder_hidden_states"], null["encoder_hidden_states"])
    assert torch.equal(found["added_cond_kwargs"]["time_ids"], torch.ones(1, 6))
    assert bank.fingerprint("full") != bank.with_null(None).fingerprint("full")
    (tmp_path / "bank" / "null.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match="null"):
        Bank.from_pretrained(tmp_path / "bank", checked=True)


def test_pictures_do_not_hang_on_the_batch_they_are_drawn_in():
    bank = bank_of()
    plan = plan_of(bank, "full full full~0+ full~1 full~out full~0")
    whole, parts = (torch.cat(list(sample_images(bank, plan, 5, seed=3, batch=n))) for n in (5, 2))
    assert torch.allclose(whole, parts, atol=1e-4)


def test_two_trajectories_in_turns_do_not_mix():
    bank = bank_of()
    plans = [
        plan_of(bank, "full full full~0+ full~1 full full~out"),
        plan_of(bank, "full full~0 full full~1+ full full"),
    ]
    starts = [start_noise(bank, image_generators(seed, 0, 2)) for seed in (1, 2)]
    walks = [trajectory(bank, plan, x, image_generators(0, 0, 2)) for plan, x in zip(plans, starts, strict=True)]
    pairs = list(zip(*walks, strict=True))
    for k, plan in enumerate(plans):
        alone = list(trajectory(bank, plan, starts[k], image_generators(0, 0, 2)))
        assert all(torch.equal(pair[k].after, one.after) for pair, one in zip(pairs, alone, strict=True))


@pytest.mark.parametrize("kind", sorted(set(BETA_SCHEDULERS) - set(REFUSED)))
def test_no_scheduler_writes_into_what_is_kept(kind):
    """Reused with no change of what is predicted: a row's own output, kept whole, is what the row predicted."""
    bank, fresh = bank_of(), scheduler_of(kind, DDPMScheduler().config)
    plan = plan_for(bank, fresh, 8, prices(bank))
    plan = plan.with_entries(["full", *["full~out"] * (len(plan.rows) - 1)])
    steps = trajectory(bank, plan, start_noise(bank, image_generators(0, 0, 1)), image_generators(0, 0, 1))
    first = next(steps).prediction.clone()
    assert all(torch.equal(step.prediction, first) for step in steps)


# --- who leaves what --------------------------------------------------------------------------------------------------


def test_only_rows_whose_features_are_wanted_leave_any():
    bank = bank_of()
    plan = plan_of(bank, "full full full full~0+ slim full full~1 full full")
    sample, t, left = torch.randn(1, 1, 8, 8), torch.tensor(500), []
    for one, row in zip(networks_of(bank, plan), plan.rows, strict=True):
        if row.entry == "full":
            memo: Memo = {}
            one(sample, t, {}, memo)
            left.append([cut for _, cut in memo])
    assert left == [[], ["0"], ["0"], ["1"], [], []]


@torch.no_grad()
def test_of_two_rows_at_one_timestep_the_newer_leaves_the_features():
    """Heun calls twice at every timestep but the first and the last."""
    bank = bank_of()
    plan = plan_of(bank, "full full full full~0+ full full~0+ full~0+", "heun")
    assert plan.rows[1].timestep == plan.rows[2].timestep != plan.rows[0].timestep
    networks, sample = networks_of(bank, plan), torch.randn(1, 1, 8, 8)
    memo: Memo = {}
    left = []
    for i in range(3):
        networks[i](sample + i, torch.tensor(plan.rows[i].timestep), {}, memo)
        left.append([time for time, _ in memo.get(("full", "0"), ())])
    times = [row.timestep for row in plan.rows]
    assert left == [[times[0]], [times[0]], [times[0], times[2]]]  # row 1 is not asked for its features


UNFED = {
    "nothing before": "full~0 full full full",
    "one row where two are needed": "full full~0+ full full",
    "another entry before": "slim full~0 full full",
    "a reuse row is none": "full full~0 full~1+ full",
    "far behind": "slim slim~0 full slim~0+ full~0+",
}


@pytest.mark.parametrize("how", UNFED)
def test_a_row_that_reuses_before_its_source_has_run_is_refused_at_every_door(how):
    bank = bank_of()
    plan = plan_of(bank, UNFED[how])
    noise = start_noise(bank, image_generators(0, 0, 1))
    pipe = StepAwarePipeline(bank, plan.uniform())
    doors = (
        lambda: require_fed(bank, plan),
        lambda: trajectory(bank, plan, noise, image_generators(0, 0, 1)),
        lambda: next(sample_images(bank, plan, 1, seed=0)),
        lambda: StepAwarePipeline(bank, plan),
        lambda: pipe(plan=plan),
    )
    for door in doors:
        with pytest.raises(PlanError) as error:
            door()
        assert "~" in str(error.value) and "before it" in str(error.value) and "\n" not in str(error.value)


def test_a_trajectory_that_goes_on_from_a_row_has_nothing_of_before():
    bank = bank_of()
    plan = plan_of(bank, "full full~0 full full~0 full")
    scheduler, noise = build_scheduler(plan), start_noise(bank, image_generators(0, 0, 1))
    list(trajectory(bank, plan, noise, [], start=2, scheduler=scheduler))
    with pytest.raises(PlanError, match=r"full~0.*row 1, with no rows"):
        trajectory(bank, plan, noise, [], start=1, scheduler=build_scheduler(plan))


names = st.sampled_from(["full", "slim", "full~0", "full~1+", "slim~out+", "full~out"])


@settings(max_examples=60, deadline=None)
@given(st.lists(names, min_size=1, max_size=8))
def test_a_plan_runs_or_is_refused_by_the_count_of_rows_before(rows):
    """Oracle: a count."""
    plan = plan_of(BANK, " ".join(rows))
    fed = True
    for i, name in enumerate(rows):
        link = BANK.entries[name].weights
        fed &= not isinstance(link, Reuse) or rows[:i].count(link.of) > link.order
    if fed:
        require_fed(BANK, plan)
        assert drawn(BANK, plan, 1).isfinite().all()
    else:
        with pytest.raises(PlanError):
            drawn(BANK, plan, 1)


BANK = bank_of()


# --- entries ----------------------------------------------------------------------------------------------------------


def test_with_reuse_adds_what_each_net_can_and_says_what_it_cannot():
    said = []
    watch = type("W", (), {"say": staticmethod(said.append)})()
    bank = Bank({"full": unet(0), "ode": ode_unet(), "deep": unet(1, layers_per_block=2)}, "full", "epsilon")
    found = bank.with_reuse([0, 5, OUT], [0, 1], watch)
    added = [name for name in found if name not in bank]
    assert added == [
        "full~0", "full~0+", "full~out", "full~out+", "ode~out", "ode~out+",
        "deep~0", "deep~0+", "deep~5", "deep~5+", "deep~out", "deep~out+",
    ]  # fmt: skip
    assert len(said) == 3 and "cut 5, expected 0 to 3" in said[0] and all("has no cuts" in one for one in said[1:])
    assert found.computed == tuple(bank) and list(found.with_reuse([0, 5, OUT], [0, 1], watch)) == list(found)
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in bank.parameters())
    assert len(found.state_dict()) == len(bank.state_dict())


def test_an_entry_that_reuses_features_is_no_model_of_its_own():
    bank = bank_of()
    with pytest.raises(ModelError, match=r"full~0.*'full' left.*full, slim.*in a plan"):
        bank["full~0"]
    with pytest.raises(ModelError, match="reference"):
        Bank(bank.entries, "full~0", "epsilon")
    with pytest.raises(ModelError, match=r"a model of its own.*that of 'full'"):
        bank.with_entry("x", Entry(unet(3), Reuse("full", 0)), "epsilon")
    with pytest.raises(ModelError, match="features of 'full~0'"):
        bank.with_entry("x", Entry(bank["full"], Reuse("full~0", 0)), "epsilon")
    with pytest.raises(ModelError, match="cut 6, expected 0 to 5"):
        bank.with_entry("x", Entry(bank["full"], Reuse("full", 6)), "epsilon")
    with pytest.raises(ModelError, match="order 2"):
        bank.with_entry("x", Entry(bank["full"], Reuse("full", 0, 2)), "epsilon")
    with pytest.raises(ModelError, match="weights of 'full~0'"):
        bank.with_entry("x", Entry(bank["full"], Twin("full~0")), "epsilon")


def test_a_pipeline_that_reuses_features_is_saved_and_read_as_it_was(tmp_path):
    bank = bank_of()
    plan = replace(plan_of(bank, "full full~0 full full~1+ slim slim~out"), prices=bank.prices())
    pipe = StepAwarePipeline(bank, plan)
    pipe.save_pretrained(tmp_path / "p")
    assert [p.name for p in (tmp_path / "p" / "bank" / "full~1+").iterdir()] == ["entry.json"]
    again = StepAwarePipeline.from_pretrained(tmp_path / "p")
    assert list(again.bank) == list(bank) and again.plan == plan
    assert all(again.bank.entries[n].weights == bank.entries[n].weights for n in bank)
    assert torch.equal(drawn(again.bank, again.plan), drawn(bank, plan))
    half = StepAwarePipeline.from_pretrained(tmp_path / "p", torch_dtype=torch.bfloat16)
    assert half.bank.entries["full~0"].model is half.bank["full"] and half.bank.dtype == torch.bfloat16


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_of_a_recipe_takes_a_plan_that_reuses(name):
    plan = reference_plan(BANK, DDPMScheduler().config, SampleSpec(scheduler=name, steps=7), prices(BANK))
    rows = itertools.cycle(["full", "full", "full~0+", "full~1", "full~out+", "full", "full~0"])
    assert drawn(BANK, plan.with_entries(list(itertools.islice(rows, len(plan.rows))))).isfinite().all()
