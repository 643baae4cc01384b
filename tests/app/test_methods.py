"""The table of methods: a draft is whole before it is trained. Oracles: the dense net's own MACs, the file system."""

from __future__ import annotations

import pytest
from diffusers import DDPMPipeline, DDPMScheduler

from halfstep.app import verbs
from halfstep.app.subject import open_subject
from halfstep.engine.profiling import count_macs
from tiny import recipes, unet

tiny = recipes("slim.widths=1,0.5 sparse.least=1 spectral.reduction=2 continuous.base=4 continuous.head_dim=4")


@pytest.mark.parametrize("method", verbs.METHODS)
def test_an_untrained_draft_has_its_main_entry_and_a_price_for_every_entry(method, tmp_path, monkeypatch):
    monkeypatch.setenv("HALFSTEP_CACHE", str(tmp_path / "cache"))
    DDPMPipeline(unet(), DDPMScheduler()).save_pretrained(tmp_path / "model")
    subject = open_subject(str(tmp_path / "model"), "digits", tiny())
    before = sorted(tmp_path.rglob("*"))
    draft = verbs.METHODS[method](subject, subject.recipe)
    bank = draft.bank()
    assert draft.method == method and draft.main in bank
    prices = bank.prices()
    assert list(prices) == list(bank) and all(price.macs > 0 for price in prices.values())
    assert prices[bank.reference].macs == count_macs(subject.dense)
    assert not set(draft.beside(bank)) & set(bank)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written by a draft


@pytest.mark.parametrize("patterns", ["dense", "dense,2:4", "2:4,dense", "2:4"])
def test_a_supernets_report_is_about_its_last_entry_the_narrowest(patterns, tmp_path):
    DDPMPipeline(unet(), DDPMScheduler()).save_pretrained(tmp_path / "model")
    subject = open_subject(str(tmp_path / "model"), "digits", tiny(f"slim.patterns={patterns}"))
    draft = verbs.METHODS["slimmable"](subject, subject.recipe)
    assert draft.main == list(draft.bank())[-1]
