"""Oracles: stock diffusers saving and loading, byte counts on disk, files broken on purpose."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st

from banks import FORMATS, WEIGHTS, edit_link, edit_record, in_format, net, slim_bank, weights_of
from halfstep.core.errors import HalfstepError, ModelError, PlanError
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec, SparseSpec
from halfstep.core.sums import require_whole
from halfstep.engine import entry as entry_module
from halfstep.engine.bank import Bank, calls_of
from halfstep.engine.entry import Cut, Entry, Own, Twin
from halfstep.engine.layouts import fastest_layouts, settle_layouts
from halfstep.engine.sampling import reference_plan
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.methods.slimmable import Supernet
from halfstep.methods.sparse import sparsify
from halfstep.nets.continuous import ContinuousUNet2DModel, with_solver
from halfstep.nets.denoiser import copy_of
from halfstep.nets.masks import Masking, Pattern, mask_all
from halfstep.nets.slices import cut_all


def test_a_bank_round_trips_bit_exactly_with_shared_weights_stored_once(tmp_path):
    bank = slim_bank()
    bank.save_pretrained(tmp_path / "bank")
    stored = sorted(p.parent.name for p in (tmp_path / "bank").rglob("*.safetensors"))
    assert stored == ["full", "w1.00"]
    held = sum(p.stat().st_size for p in (tmp_path / "bank").rglob("*.safetensors"))
    weights = sum(p.numel() * p.element_size() for name in stored for p in bank[name].parameters())
    assert weights <= held < 1.1 * weights + 50_000  # tensors, and the headers of two files
    again = Bank.from_pretrained(tmp_path / "bank")
    assert again.names == bank.names and again.reference == "full" and again.prediction_type == "epsilon"
    assert not again.training and weights_of(again) == weights_of(bank)
    for name in bank:
        for key, value in bank[name].config.items():
            assert key.startswith("_") or json.dumps(again[name].config[key]) == json.dumps(value)
        for (key, a), b in zip(bank[name].state_dict().items(), again[name].state_dict().values(), strict=True):
            assert torch.equal(a, b), (name, key)
        x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
        with torch.no_grad():
            assert torch.equal(bank[name](x, t).sample, again[name](x, t).sample)


def test_what_was_loaded_saves_to_the_same_bytes(tmp_path):
    slim_bank().save_pretrained(tmp_path / "one")
    Bank.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and len(one) == 11  # bank.json; four config.json and entry.json; two weights


def test_a_shared_entry_follows_the_weights_of_its_source(tmp_path):
    bank = slim_bank()
    bank.save_pretrained(tmp_path / "bank")
    again = Bank.from_pretrained(tmp_path / "bank")
    source = again["w1.00"].state_dict()
    cuts = {name: link for name, link in weights_of(again).items() if isinstance(link, Cut)}
    assert cuts.keys() == {"w0.50", "w0.25"}
    for name, link in cuts.items():
        for key, value in cut_all(source, link.slices).items():
            assert torch.equal(again[name].state_dict()[key], value), (name, key)


def test_a_bank_is_a_read_only_mapping_of_names(tmp_path):
    bank = slim_bank()
    assert list(bank) == ["full", "w1.00", "w0.50", "w0.25"] and len(bank) == 4
    assert "w0.50" in bank and "w0.33" not in bank
    more = bank.with_entry("twin", net(5), "epsilon")
    assert "twin" in more and "twin" not in bank and more["full"] is bank["full"]
    assert weights_of(more) == weights_of(bank) | {"twin": Own()}
    more.save_pretrained(tmp_path / "bank")
    assert Bank.from_pretrained(tmp_path / "bank").names == more.names


@pytest.mark.parametrize(
    ("other", "kind", "word"),
    [
        (net(size=16), "epsilon", "sample_size"),
        (net(colours=3), "epsilon", "in_channels"),
        (net(num_class_embeds=10), "epsilon", "num_class_embeds"),
        (net(class_embed_type="timestep"), "epsilon", "class_embed_type"),
        (net(2), "v_prediction", "prediction type"),
    ],
)
def test_entries_that_cannot_stand_in_are_refused(other, kind, word):
    with pytest.raises(ModelError) as error:
        slim_bank().with_entry("other", other, kind)
    assert word in str(error.value) and "\n" not in str(error.value)
    if kind == "epsilon":
        with pytest.raises(ModelError, match=word):
            Bank({"full": net(), "other": other}, "full", "epsilon")


def test_an_entry_with_other_output_channels_is_refused():
    other = net(out_channels=2)
    with pytest.raises(ModelError, match="out_channels"):
        slim_bank().with_entry("other", other, "epsilon")


def test_a_loaded_bank_of_oblong_images_takes_a_new_entry(tmp_path):
    oblong = [net(seed, size=(8, 16)) for seed in (0, 1)]
    Bank({"full": oblong[0]}, "full", "epsilon").save_pretrained(tmp_path / "bank")
    assert "twin" in Bank.from_pretrained(tmp_path / "bank").with_entry("twin", oblong[1], "epsilon")


PLAIN = ["full", "w0.50", "w0.50+2:4", "2:4", "2:4 one-shot", "continuous@1", "r=0.1", "r=1e-05", "off", "spectral"]
PLAIN += ["full~2", "full@bf16", "plain, distilled", "x", "Z9", "a" * 80]
ODD = ["", ".", "..", "../x", "a/../../x", "/tmp/x", "a\\b", "C:/x", ".hidden", "ends.", "ends ", " x", "a\0b", "a\nb"]
ODD += ["\xfc", "x" * 81, "bank.json", "Bank.JSON", "~root", "-x", "a*", "a|b", 'a"b', "a<b", None, 3, ("full",)]


def test_plain_names_are_kept(tmp_path):
    bank = Bank({name: net() for name in PLAIN}, "full", "epsilon")
    bank.save_pretrained(tmp_path / "bank")
    assert Bank.from_pretrained(tmp_path / "bank").names == tuple(PLAIN)


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_names_that_make_no_folder_of_their_own_are_refused_by_a_bank(name):
    with pytest.raises(ModelError, match="entr") as error:
        Bank({"full": net(), name: net()}, "full", "epsilon")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("pair", [("2:4", "2of4"), ("full", "Full"), ("2:4 a", "2OF4 A")], ids=str)
def test_entries_of_one_folder_are_refused(pair):
    with pytest.raises(ModelError, match="one name for the folder"):
        Bank({name: net() for name in pair}, pair[0], "epsilon")


def test_a_bank_holds_few_entries():
    with pytest.raises(ModelError, match="at most 256"):
        Bank({f"e{i}": torch.nn.Module() for i in range(257)}, "e0", "epsilon")


@pytest.mark.parametrize("name", ["../../../../stolen", "{outside}", "..", "x/../../../outside"])
def test_a_shipped_pipeline_reads_and_writes_nothing_outside(name, tmp_path):
    """bank.json's names were joined to the folder unchecked: an entry was read, and a save wrote, wherever it said."""
    folder = tmp_path / "a" / "b" / "pipeline"
    slim_bank().save_pretrained(folder / "bank")
    outside = tmp_path / "outside"
    net(5).save_pretrained(outside)  # what would be read
    name = name.format(outside=outside)
    edit_record(folder / "bank" / "bank.json", lambda r: {**r, "entries": [*r["entries"], name]})
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(ModelError, match="an entry named"):
        Bank.from_pretrained(folder / "bank")
    with pytest.raises(ModelError, match="an entry named"):
        Bank({"full": net(), name: net()}, "full", "epsilon").save_pretrained(folder / "bank")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_unknown_names_are_refused_with_the_known_ones():
    bank = slim_bank()
    for ask in (lambda: bank["w0.33"], lambda: Bank({"full": net(), "w1.00": net()}, "dense", "epsilon")):
        with pytest.raises(ModelError) as error:
            ask()
        assert "full" in str(error.value) and "w1.00" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("nth", [1, 2])
def test_a_failed_save_leaves_the_old_bank_untouched(nth, tmp_path, monkeypatch):
    bank = slim_bank()
    bank.save_pretrained(tmp_path / "bank")
    before = {p: p.read_bytes() for p in (tmp_path / "bank").rglob("*") if p.is_file()}
    write, calls = entry_module.save_file, []

    def full_disk(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            raise OSError(28, "No space left on device")
        return write(*args, **kwargs)

    other = Bank({"full": net(7), "twin": net(8)}, "full", "epsilon")
    monkeypatch.setattr(entry_module, "save_file", full_disk)
    with pytest.raises(HalfstepError, match="full disk"):
        other.save_pretrained(tmp_path / "bank")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    again = Bank.from_pretrained(tmp_path / "bank")
    assert again.names == bank.names and torch.equal(again["full"].conv_in.weight, bank["full"].conv_in.weight)


def test_saving_over_a_bank_replaces_it_whole(tmp_path):
    slim_bank().save_pretrained(tmp_path / "bank")
    Bank({"alone": net(7)}, "alone", "epsilon").save_pretrained(tmp_path / "bank")
    assert sorted(p.name for p in (tmp_path / "bank").iterdir()) == ["alone", "bank.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["bank"]


def test_a_half_precision_entry_in_a_float_bank_is_refused():
    with pytest.raises(ModelError, match=r"float16.*float32"):
        slim_bank().with_entry("half", net(5).half(), "epsilon")


def test_a_compiled_entry_saves_as_what_it_wraps(tmp_path):
    plain = net(3)
    Bank({"full": torch.compile(plain)}, "full", "epsilon").save_pretrained(tmp_path / "compiled")
    Bank({"full": plain}, "full", "epsilon").save_pretrained(tmp_path / "plain")
    for file in (tmp_path / "plain").rglob("*.*"):
        assert (tmp_path / "compiled" / file.relative_to(tmp_path / "plain")).read_bytes() == file.read_bytes()
    assert torch.equal(Bank.from_pretrained(tmp_path / "compiled")["full"].conv_in.weight, plain.conv_in.weight)


def test_an_entry_that_takes_anothers_place_brings_its_own_weights(tmp_path):
    """with_entry kept the old entry's link: the new one was saved as slices of a net it has nothing to do with."""
    slim_bank().with_entry("w0.50", net(9), "epsilon").save_pretrained(tmp_path / "bank")
    assert torch.equal(Bank.from_pretrained(tmp_path / "bank")["w0.50"].conv_in.weight, net(9).conv_in.weight)


BROKEN_BANKS = {
    "no bank.json": lambda f: (f / "bank.json").unlink(),
    "bank.json cut": lambda f: (f / "bank.json").write_text('{"entries": ["fu'),
    "bank.json is a list": lambda f: (f / "bank.json").write_text("[]"),
    "no entries": lambda f: edit_record(f / "bank.json", lambda r: {k: v for k, v in r.items() if k != "entries"}),
    "no reference": lambda f: edit_record(f / "bank.json", lambda r: {k: v for k, v in r.items() if k != "reference"}),
    "entries are a number": lambda f: edit_record(f / "bank.json", lambda r: {**r, "entries": 3}),
    "an unknown reference": lambda f: edit_record(f / "bank.json", lambda r: {**r, "reference": "nobody"}),
    "an entry without a folder": lambda f: shutil.rmtree(f / "w0.25"),
    "a source without a folder": lambda f: shutil.rmtree(f / "w1.00"),
    "a source without weights": lambda f: (f / "w1.00" / WEIGHTS).unlink(),
    "slices cut": lambda f: [p.write_text('{"of": "w1') for p in (f / "w0.50").glob("[es]*.json")],
    "slices of some weights only": edit_link(lambda r: {**r, "slices": dict(list(r["slices"].items())[:3])}),
    "slices beyond the weights": edit_link(
        lambda r: {**r, "slices": {k: [[[900, 5]] for _ in v] for k, v in r["slices"].items()}}
    ),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("how", BROKEN_BANKS)
def test_broken_banks_are_refused_in_one_line_that_names_them(how, form, tmp_path):
    slim_bank().save_pretrained(tmp_path / "bank")
    BROKEN_BANKS[how](in_format(form, tmp_path / "bank"))
    with pytest.raises(HalfstepError) as error:
        Bank.from_pretrained(tmp_path / "bank")
    assert "bank" in str(error.value) and "\n" not in str(error.value)


def test_layouts_change_strides_and_not_results():
    bank = slim_bank()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    before = {name: bank[name](x, t).sample for name in bank}
    layouts = fastest_layouts(bank, batch=2, repeats=1)
    assert layouts.keys() == set(bank) and set(layouts.values()) <= {"contiguous", "channels_last"}
    bank.set_layouts({"full": "channels_last", "w0.50": "channels_last"})
    assert not bank["full"].mid_block.resnets[0].conv1.weight.is_contiguous()
    assert bank["w1.00"].mid_block.resnets[0].conv1.weight.is_contiguous()
    for name in bank:
        assert torch.allclose(bank[name](x, t).sample, before[name], atol=1e-5)
    bank.set_layouts(dict.fromkeys(bank, "contiguous"))
    assert bank["full"].mid_block.resnets[0].conv1.weight.is_contiguous()


def test_entries_in_one_memory_have_one_layout_together():
    net = ContinuousUNet2DModel(sample_size=8, in_channels=1, out_channels=1, levels=1, base_channels=4)
    bank = Bank({f"ode@{n}": with_solver(net, n) for n in (1, 2)} | {"other": copy_of(net)}, "ode@1", "epsilon")
    found = fastest_layouts(bank, batch=2, repeats=1)
    assert list(found) == list(bank) and found["ode@1"] == found["ode@2"]
    bank.set_layouts({"ode@2": "channels_last"})
    assert bank.layouts() == {"ode@1": "channels_last", "ode@2": "channels_last", "other": "contiguous"}
    with pytest.raises(ModelError, match="one layout"):
        bank.set_layouts({"ode@1": "contiguous", "ode@2": "channels_last"})
    with pytest.raises(ModelError, match="channels_first"):
        bank.set_layouts({"other": "channels_first"})


def test_entries_are_read_only():
    with pytest.raises(TypeError):
        slim_bank().entries["w0.50"] = Entry(net())


def test_a_vae_and_classes_make_another_bank():
    bank, vae = Bank({"full": net(colours=2, num_class_embeds=2)}, "full", "epsilon"), AutoencoderKL()
    more = bank.with_vae(vae, ["cat", "dog"])
    assert more.vae is vae and more.classes == ("cat", "dog") and more["full"] is bank["full"]
    assert bank.vae is None and bank.classes == ()


# --- any bank ---------------------------------------------------------------------------------------------------------

WIDTHS = (1.0, 0.5)
SUPERNETS = {seed: Supernet(net(seed, channels=(8, 8)), WIDTHS) for seed in (1, 2)}


@st.composite
def trees(draw) -> dict[str, Entry]:
    """Entries with weights of their own, and cuts and twins of these, any of them under a mask."""
    entries: dict[str, Entry] = {}
    seeds = draw(st.lists(st.sampled_from((1, 2)), min_size=1, max_size=2, unique=True))
    for i in range(len(seeds) + draw(st.integers(0, 3))):
        supernet = SUPERNETS[seeds[i] if i < len(seeds) else (seed := draw(st.sampled_from(seeds)))]
        width = draw(st.sampled_from(WIDTHS)) if i >= len(seeds) else 1.0
        pattern = draw(st.sampled_from((None, "1:4", "2:4", "1:2")))
        names = () if pattern is None else sparsify(supernet.subnet(width), pattern, SparseSpec(least=1)).names
        masking = Masking(Pattern.parse(pattern), names) if names else None
        if i < len(seeds):
            link, source = Own(), supernet.subnet(1.0).state_dict()
        else:
            of = f"own{seed}"
            link = Twin(of) if width == 1.0 else Cut(of, supernet.slices[width])
            source = entries[of].model.state_dict()
        weights = source if width == 1.0 else cut_all(source, supernet.slices[width])
        model = supernet.subnet(width)
        model.load_state_dict(mask_all(weights, masking.names, masking.pattern) if masking else weights)
        entries[f"own{seeds[i]}" if i < len(seeds) else f"e{i}"] = Entry(model, link, masking)
    order = draw(st.permutations(list(entries)))  # links may come before what they follow from
    return {name: entries[name] for name in order}


@settings(max_examples=10, deadline=None)
@given(trees(), st.sampled_from(FORMATS))
def test_any_bank_round_trips_bit_exactly(tmp_path_factory, entries, form):
    bank = Bank(entries, next(name for name in entries if name.startswith("own")), "epsilon")
    folder = tmp_path_factory.mktemp("bank") / "bank"
    bank.save_pretrained(folder)
    again = Bank.from_pretrained(in_format(form, folder))
    assert again.names == bank.names and weights_of(again) == weights_of(bank)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    for name in bank:
        assert again.entries[name].masking == bank.entries[name].masking
        for a, b in zip(bank[name].state_dict().values(), again[name].state_dict().values(), strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            one, two = bank[name](x, t).sample, again[name](x, t).sample
        packed = any(bank.entries[of].masking for of in (name, bank.entries[name].weights.of) if of)
        # unpacked 1x1 kernels have other strides, and so may the last bit of what they give
        assert torch.allclose(one, two, atol=2e-6) if packed else torch.equal(one, two)
    held = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    counted = sum(entry.stored_bytes for entry in bank.entries.values())
    assert counted <= held < counted + 20_000 * len(bank)  # headers


@settings(max_examples=10, deadline=None)
@given(trees(), st.data())
def test_links_to_unknown_or_linked_entries_are_refused_in_any_bank(entries, data):
    name = data.draw(st.sampled_from(list(entries)))
    linked_ones = [other for other, entry in entries.items() if entry.weights.of is not None]
    of = data.draw(st.sampled_from([*linked_ones, name, "nobody"]))
    entries[name] = replace(entries[name], weights=Twin(of))
    with pytest.raises(ModelError, match="weights of its own"):
        Bank(entries, next(other for other in entries if other.startswith("own")), "epsilon")


# --- what was written before ------------------------------------------------------------------------------------------

BEFORE = Path(__file__).parents[1] / "data" / "pipeline_format1"


def digest_of(model) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def test_a_pipeline_of_format_1_loads_draws_and_is_saved_anew_as_it_was(tmp_path):
    """Oracle: the weights' digests and the pictures that the version which wrote it drew."""
    kept = json.loads(BEFORE.with_suffix(".json").read_text())["weights"]
    drawn = np.load(BEFORE.with_suffix(".npz"))["images"]
    kinds = {"full": Own, "w0.50": Cut, "full+2:4": Twin, "w0.50+2:4": Cut, "2:4": Own}
    for folder in (BEFORE, tmp_path / "anew"):
        assert require_whole(folder)  # by its SHA256SUMS
        pipe = StepAwarePipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        assert {name: type(link) for name, link in weights_of(pipe.bank).items()} == kinds
        assert {name: digest_of(pipe.bank[name]) for name in pipe.bank} == kept
        images = pipe(batch_size=2, seed=0, output_type="np").images
        assert np.allclose(images, drawn, atol=1e-6)
        if folder == BEFORE:
            pipe.save_pretrained(tmp_path / "anew")
    names = {p.relative_to(tmp_path / "anew" / "bank").as_posix() for p in (tmp_path / "anew" / "bank").rglob("*.json")}
    assert names == {"bank.json"} | {f"{e.replace(':', 'of')}/{f}.json" for e in kinds for f in ("config", "entry")}


def test_a_bank_is_told_in_a_line_for_each_entry():
    bank = slim_bank()
    told = repr(bank).splitlines()
    assert [row.split(":")[0].strip() for row in told[1:]] == list(bank.names) and max(map(len, told)) <= 120
    for name, row in zip(bank, told[1:], strict=True):
        assert f"{sum(p.numel() for p in bank[name].parameters()):,} parameters" in row
        assert repr(bank.entries[name]) in row
    assert "masked 2:4" in repr(Entry(net(), masking=Masking(Pattern(2, 4), ("conv_in.weight",))))


def test_a_layout_for_what_is_no_entry_is_refused():
    with pytest.raises(ModelError, match="w9"):
        slim_bank().set_layouts({"w9": "contiguous"})


def test_no_images_are_refused_by_name():
    bank = slim_bank()
    pipe = StepAwarePipeline(bank, reference_plan(bank, Process(), SampleSpec(steps=2)))
    with pytest.raises(PlanError, match="batch_size: got 0"):
        pipe(batch_size=0)


# --- entries that reuse features --------------------------------------------------------------------------------------


def test_what_reuses_features_is_told_apart_by_content_and_follows_its_sources_weights():
    bank = slim_bank().with_reuse([0, 1, "out"], [0, 1])
    prints = {name: bank.fingerprint(name) for name in bank}
    assert len(set(prints.values())) == len(bank)
    assert all(prints[name] == slim_bank().fingerprint(name) for name in slim_bank())
    with torch.no_grad():
        bank["full"].conv_in.weight += 1
    again = Bank(bank.entries, "full", "epsilon")
    changed = {name for name in bank if again.fingerprint(name) != prints[name]}
    assert changed == {name for name in bank if name.split("~")[0] == "full"}


def test_what_reuses_features_lies_in_memory_as_its_source(tmp_path):
    bank = slim_bank()
    bank.set_layouts({"full": "channels_last"})
    bank = bank.with_reuse([0], [0])
    assert bank.in_one_memory() == [[name, f"{name}~0"] for name in slim_bank()]
    assert bank.layouts()["full~0"] == "channels_last" and bank.layouts()["w0.50~0"] == "contiguous"
    own = Bank({**bank.entries, "full~0": Entry(bank["full"], bank.entries["full~0"].weights)}, "full", "epsilon")
    assert own.layouts()["full~0"] == "channels_last"
    bank.set_layouts({"full": "contiguous"})
    assert bank.layouts()["full~0"] == "contiguous"
    found = fastest_layouts(bank, 1, repeats=1)
    assert set(found) == set(bank) and all(found[name] == found[f"{name}~0"] for name in bank.computed)
    settle_layouts(slim_bank(), tmp_path / "layouts.json", "auto")  # a run of before there was reuse goes on
    before = (tmp_path / "layouts.json").read_bytes()
    settle_layouts(bank, tmp_path / "layouts.json", "auto")
    assert (tmp_path / "layouts.json").read_bytes() == before


def test_costs_and_calls_of_a_bank_have_every_entry_and_leave_its_modes_alone():
    bank = slim_bank().with_reuse([0, "out"], [0, 1])
    costs = bank.costs(batch=3, repeats=2)
    assert list(costs) == list(bank) and all(costs[n].macs == p.macs for n, p in bank.prices().items())
    assert costs["full~0"].stored_mib == 0 and costs["full~0"].batch == 3
    calls = calls_of(bank, 3)
    assert list(calls) == list(bank)
    found = {name: call() for name, call in calls.items()}
    assert all(one.shape == (3, 1, 8, 8) and not one.requires_grad for one in found.values())
    for name in bank.computed:  # features of the same input: what the source itself predicts
        for more in ("0", "0+", "out", "out+"):
            assert torch.equal(found[f"{name}~{more}"], found[name]), more


def test_a_bank_with_reuse_counts_no_price_again():
    bank = slim_bank()
    before = bank.prices()
    more = bank.with_reuse([0])
    assert more._prices == before and {**more.prices(), **before} == more.prices()
    other = more.with_entry("w0.50~0", net(7), "epsilon")  # a net of its own takes the name
    assert "w0.50~0" in other.computed and other.prices()["w0.50~0"] == other.prices()["full"]
