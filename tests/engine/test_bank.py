"""Oracles: stock diffusers saving and loading, byte counts on disk, files broken on purpose."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from halfstep.core.errors import HalfstepError, ModelError
from halfstep.core.recipe import SparseSpec
from halfstep.core.sums import require_whole
from halfstep.engine import entry as entry_module
from halfstep.engine.bank import Bank
from halfstep.engine.entry import EAGER, Cut, Entry, Own, Runtime, Twin
from halfstep.engine.layouts import fastest_layouts
from halfstep.engine.sampling import StepAwarePipeline
from halfstep.methods.slimmable import Supernet, width_name
from halfstep.methods.sparse import sparsify
from halfstep.nets.continuous import ContinuousUNet2DModel, with_solver
from halfstep.nets.denoiser import copy_of
from halfstep.nets.masks import Masking, Pattern, mask_all
from halfstep.nets.models import load_denoiser
from halfstep.nets.slices import cut_all
from tiny import unet

net = partial(unet, channels=(16, 16))


def slim_bank() -> Bank:
    supernet = Supernet(net(1), (1.0, 0.5, 0.25))
    entries = {"full": net(0), "w1.00": Entry(supernet.subnet(1.0))}
    entries |= {width_name(w): Entry(supernet.subnet(w), Cut("w1.00", s)) for w, s in supernet.slices.items()}
    return Bank(entries, "full", "epsilon")


def weights_of(bank: Bank) -> dict:
    return {name: entry.weights for name, entry in bank.entries.items()}


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


def test_an_entry_with_its_own_weights_is_a_stock_diffusers_folder(tmp_path):
    slim_bank().save_pretrained(tmp_path / "bank")
    model = UNet2DModel.from_pretrained(tmp_path / "bank" / "w1.00")
    assert torch.equal(model.conv_in.weight, net(1).conv_in.weight)


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


def test_a_denoiser_comes_from_a_pipeline_a_model_folder_or_a_run(tmp_path):
    model, scheduler = net(3), DDPMScheduler(prediction_type="v_prediction")
    DDPMPipeline(model, scheduler).save_pretrained(tmp_path / "run" / "pipeline")
    model.save_pretrained(tmp_path / "bare")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    for place, kind in (
        ("run", "v_prediction"),
        ("run/pipeline", "v_prediction"),
        ("run/pipeline/unet", "v_prediction"),
        ("bare", "epsilon"),
    ):
        for source in (tmp_path / place, str(tmp_path / place)):
            loaded, noise = load_denoiser(source)
            with torch.no_grad():
                assert torch.equal(loaded(x, t).sample, model(x, t).sample)
            assert noise["prediction_type"] == kind and not loaded.training


def test_half_precision_weights_are_loaded_as_float32(tmp_path):
    net(3).half().save_pretrained(tmp_path / "half")
    loaded, _ = load_denoiser(tmp_path / "half")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.conv_in.weight, net(3).conv_in.weight.half().float())


WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def cut_file(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


def foreign(folder):
    empty(folder)
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2).save_pretrained(folder)


BROKEN = {
    "missing": shutil.rmtree,
    "empty": empty,
    "foreign class": foreign,
    "class of no library": lambda f: edit_config(f, _class_name="os.system"),
    "no class": lambda f: edit_config(f, _class_name=None),
    "weights without the tail": lambda f: cut_file(f, -1000),
    "weights without a whole header": lambda f: cut_file(f, 100),
    "empty weights": lambda f: cut_file(f, 0),
    "weights of another shape": lambda f: edit_config(f, block_out_channels=[32, 32]),
    "weights of another depth": lambda f: edit_config(f, layers_per_block=2),
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "pickled weights only": lambda f: (f / WEIGHTS).rename(f / "diffusion_pytorch_model.bin"),
    "config that is no JSON": lambda f: (f / "config.json").write_text("{ not json"),
    "config that is binary": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
    "config that is a list": lambda f: (f / "config.json").write_text("[]"),
    "config that is a folder": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
    "no config": lambda f: (f / "config.json").unlink(),
    "groups that do not divide": lambda f: edit_config(f, norm_num_groups=7),
    "no groups": lambda f: edit_config(f, norm_num_groups=0),
    "unknown blocks": lambda f: edit_config(f, down_block_types=["Nope", "Nope"]),
    "channels that are no list": lambda f: edit_config(f, block_out_channels="wide"),
}


@pytest.mark.parametrize("place", ["model", "pipeline"])
@pytest.mark.parametrize("how", BROKEN)
def test_broken_model_folders_are_refused_in_one_line_that_names_them(how, place, tmp_path):
    whole = tmp_path / "whole"
    if place == "pipeline":
        DDPMPipeline(net(), DDPMScheduler()).save_pretrained(whole)
        inner = whole / "unet"
        if how == "missing":
            BROKEN[how](whole)
        else:
            BROKEN[how](inner)
    else:
        net().save_pretrained(whole)
        BROKEN[how](whole)
    with pytest.raises(ModelError) as error:
        load_denoiser(whole)
    assert str(whole) in str(error.value) and "\n" not in str(error.value)


def test_a_pickle_is_named_and_never_opened(tmp_path):
    net().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / WEIGHTS).unlink()
    trap = b"cos\nsystem\n(S'touch " + str(tmp_path / "sprung").encode() + b"'\ntR."
    (tmp_path / "m" / "diffusion_pytorch_model.bin").write_bytes(trap)
    with pytest.raises(ModelError, match="pickle"):
        load_denoiser(tmp_path / "m")
    assert not (tmp_path / "sprung").exists()


def test_a_file_is_not_a_model_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError) as error:
        load_denoiser(tmp_path / "model.safetensors")
    assert str(tmp_path / "model.safetensors") in str(error.value)


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


def as_before(bank):
    """The saved bank as format 1 had it: slices.json and mask.json in the place of entry.json."""
    edit_record(bank / "bank.json", lambda r: {**r, "format": 1})
    for file in bank.glob("*/entry.json"):
        record = json.loads(file.read_text())
        file.unlink()
        if record["weights"]["kind"] != "own":
            link = {"of": record["weights"]["of"], "slices": record["weights"].get("slices")}
            file.with_name("slices.json").write_text(json.dumps(link))
        if "masking" in record:
            file.with_name("mask.json").write_text(json.dumps(record["masking"]))


FORMATS = [1, 2]


def in_format(number, bank):
    if number == 1:
        as_before(bank)
    return bank


def edit_link(edit):
    """A change of what says that w0.50 follows from the widest."""

    def change(folder):
        if (folder / "bank.json").read_text().find('"format": 1') > 0:
            edit_record(folder / "w0.50" / "slices.json", edit)
        else:
            edit_record(folder / "w0.50" / "entry.json", lambda r: {**r, "weights": {**edit(r["weights"])}})

    return change


def linked(source):
    """w0.50 follows from another entry than the widest."""
    return edit_link(lambda r: {**r, "of": source})


def with_slices(edit):
    def change(record):
        return {**record, "slices": {name: edit(name, dims) for name, dims in record["slices"].items()}}

    return edit_link(change)


HARMED_LINKS = {
    "slices of themselves": linked("w0.50"),
    "slices of slices": linked("w0.25"),
    "slices of an unknown entry": linked("nobody"),
    "slices of a path": linked("../w1.00"),
    "slices of a number": linked(3),
    "slices of nothing": edit_link(lambda _: {}),
    "empty slices": with_slices(lambda _, dims: [[] for _ in dims]),
    "pieces of no length": with_slices(lambda _, dims: [[[0, 0]] for _ in dims]),
    "pieces before the start": with_slices(lambda _, dims: [[[-8, 8]] for _ in dims]),
    "pieces beyond the end": with_slices(lambda _, dims: [[[12, 8]] for _ in dims]),
    "a piece a million times": with_slices(lambda n, dims: [[[0, 1]] * 10**5] if n == "conv_in.bias" else dims),
    "one piece twice": with_slices(lambda n, dims: [[[0, 8], [0, 16]]] if n == "conv_in.bias" else dims),
    "pieces of text": with_slices(lambda _, dims: "all"),
    "too few dimensions": with_slices(lambda _, dims: dims[:-1]),
    "a foreign field": edit_link(lambda r: {**r, "script": "x"}),
    "names that are numbers": lambda f: edit_record(f / "bank.json", lambda r: {**r, "entries": [1, 2, 3]}),
    "one name as a text": lambda f: edit_record(f / "bank.json", lambda r: {**r, "entries": "full"}),
    "a format of later": lambda f: edit_record(f / "bank.json", lambda r: {**r, "format": 3}),
    "an empty record": lambda f: (f / "bank.json").write_text("{}"),
    "a record nested deep": lambda f: (f / "bank.json").write_text("[" * 100_000),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("how", HARMED_LINKS)
def test_what_follows_from_no_stored_weights_is_refused_in_one_line(how, form, tmp_path):
    slim_bank().save_pretrained(tmp_path / "bank")
    HARMED_LINKS[how](in_format(form, tmp_path / "bank"))
    with pytest.raises(ModelError) as error:
        Bank.from_pretrained(tmp_path / "bank")
    assert str(tmp_path / "bank") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["w0.50", "nobody", "w0.25"])
def test_a_bank_in_memory_takes_no_such_links_either(source):
    bank = slim_bank()
    with pytest.raises(ModelError, match="weights of its own"):
        bank.with_entry("w0.50", Entry(bank["w0.50"], Twin(source)), "epsilon")


def test_a_bank_in_memory_takes_no_weights_of_other_shapes():
    bank = slim_bank()
    for link in (Twin("w1.00"), Cut("w1.00", bank.entries["w0.25"].weights.slices)):
        with pytest.raises(ModelError, match=r"w0\.50.*shape"):
            bank.with_entry("w0.50", Entry(bank["w0.50"], link), "epsilon")


def edit_record(file, edit):
    record = json.loads(file.read_text())
    file.write_text(json.dumps(edit(record)))


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


HARMED_ENTRIES = {
    "none": lambda f: f.unlink(),
    "an empty one": lambda f: f.write_text("{}"),
    "a list": lambda f: f.write_text("[]"),
    "no kind": lambda f: edit_record(f, lambda r: {**r, "weights": {}}),
    "an unknown kind": lambda f: edit_record(f, lambda r: {**r, "weights": {"kind": "lora"}}),
    "a kind that is a list": lambda f: edit_record(f, lambda r: {**r, "weights": {"kind": ["own"]}}),
    "weights that are a text": lambda f: edit_record(f, lambda r: {**r, "weights": "own"}),
    "weights of its own, of another": lambda f: edit_record(f, lambda r: {**r, "weights": {"kind": "own", "of": "x"}}),
    "a twin of nobody": lambda f: edit_record(f, lambda r: {**r, "weights": {"kind": "twin"}}),
    "a twin with slices": lambda f: edit_record(
        f, lambda r: {**r, "weights": {"kind": "twin", "of": "w1.00", "slices": {}}}
    ),
    "a twin of other shapes": lambda f: edit_record(f, lambda r: {**r, "weights": {"kind": "twin", "of": "full"}}),
    "a cut without slices": lambda f: edit_record(f, lambda r: {**r, "weights": {"kind": "cut", "of": "w1.00"}}),
    "a foreign field": lambda f: edit_record(f, lambda r: {**r, "script": "x"}),
    "a format of later": lambda f: edit_record(f, lambda r: {**r, "format": 2}),
}


@pytest.mark.parametrize("how", HARMED_ENTRIES)
def test_an_entry_json_that_is_none_is_refused_in_one_line_that_names_it(how, tmp_path):
    slim_bank().save_pretrained(tmp_path / "bank")
    file = tmp_path / "bank" / "w0.50" / "entry.json"
    HARMED_ENTRIES[how](file)
    with pytest.raises(ModelError) as error:
        Bank.from_pretrained(tmp_path / "bank")
    assert str(file) in str(error.value) and "\n" not in str(error.value)


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


# --- masked entries ---------------------------------------------------------------------------------------------------


def masked_bank(shared: bool) -> Bank:
    """The reference, and the same net behind a 2:4 mask: with weights of its own, or sharing the reference's."""
    net_, spec = net(0), SparseSpec(least=1)
    sparse = sparsify(net_, "2:4", spec)
    link, masking = Twin("full") if shared else Own(), Masking(Pattern(2, 4), sparse.names)
    return Bank({"full": net_, "2:4": Entry(sparse.bake(Pattern(2, 4)), link, masking)}, "full", "epsilon")


@pytest.mark.parametrize("shared", [False, True])
def test_masked_entries_round_trip_packed_or_as_a_mask_of_another_entry(tmp_path, shared):
    bank = masked_bank(shared)
    bank.save_pretrained(tmp_path / "bank")
    stored = sorted(p.name for p in (tmp_path / "bank").rglob("*.safetensors"))
    assert stored == ["diffusion_pytorch_model.safetensors"] + ([] if shared else ["packed.safetensors"])
    assert not [p for p in (tmp_path / "bank").rglob("*") if ":" in p.name]  # a name that Windows refuses
    again = Bank.from_pretrained(tmp_path / "bank")
    assert again.names == bank.names and weights_of(again) == weights_of(bank)
    for name in bank:
        assert again.entries[name].masking == bank.entries[name].masking
        for a, b in zip(bank[name].parameters(), again[name].parameters(), strict=True):
            assert torch.equal(a, b)


def test_masked_weights_take_fewer_bytes_and_count_fewer_macs(tmp_path):
    bank = masked_bank(shared=False).half()
    bank.save_pretrained(tmp_path / "bank")
    dense, packed = sorted(p.stat().st_size for p in (tmp_path / "bank").rglob("*.safetensors"))[::-1]
    masked = sum(bank["2:4"].state_dict()[name].numel() for name in bank.entries["2:4"].masking.names)
    assert dense - packed == pytest.approx(2 * masked * (1 - 0.5625), abs=8000)  # the header has more names
    layers = bank.entries["2:4"].masking.layers()
    macs = {name: price.macs for name, price in bank.prices().items()}
    inside = sum(_macs_of(bank["2:4"], layer) for layer in layers)
    assert macs["full"] - macs["2:4"] == inside / 2


def _macs_of(model, layer: str) -> int:
    """MACs of one layer, from the size of what it puts out in a real forward."""
    seen = []
    module = model.float().get_submodule(layer)
    handle = module.register_forward_hook(
        lambda _m, _i, out: seen.append(out[0].numel() // out.shape[1 if out.dim() == 4 else -1])
    )
    model(torch.zeros(1, 1, 8, 8), 1)
    handle.remove()
    return seen[0] * module.weight.numel()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("harm", ["cut", "pattern", "names", "missing", "whole numbers", "not finite", "one more"])
def test_harmed_packed_entries_are_refused_in_one_line(tmp_path, harm, form):
    masked_bank(shared=False).save_pretrained(tmp_path / "bank")
    folder = in_format(form, tmp_path / "bank") / "2of4"
    file = folder / "packed.safetensors"
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "missing":
        file.unlink()
    elif harm == "whole numbers":
        stored = load_file(file)
        save_file(stored | {"conv_out.bias": stored["conv_out.bias"].int()}, file)
    elif harm == "not finite":
        stored = load_file(file)
        save_file(stored | {"conv_out.bias": stored["conv_out.bias"] * float("nan")}, file)
    elif harm == "one more":
        save_file(load_file(file) | {"more": torch.zeros(2)}, file)
    elif harm == "pattern":
        edit_mask(tmp_path / "bank", lambda r: {**r, "pattern": "1:4"})
    else:
        edit_mask(tmp_path / "bank", lambda r: {**r, "names": ["conv_out.weight"]})
    with pytest.raises(HalfstepError) as caught:
        Bank.from_pretrained(tmp_path / "bank")
    assert "2of4" in str(caught.value) and "\n" not in str(caught.value)


def edit_mask(bank, edit):
    if (bank / "2of4" / "mask.json").exists():
        edit_record(bank / "2of4" / "mask.json", edit)
    else:
        edit_record(bank / "2of4" / "entry.json", lambda r: {**r, "masking": edit(r["masking"])})


HARMED_MASKS = {
    "unknown names": {"pattern": "2:4", "names": ["nothing.weight"]},
    "a bias": {"pattern": "2:4", "names": ["conv_in.bias"]},
    "a layer without whole groups": {"pattern": "2:4", "names": ["conv_in.weight"]},
    "numbers": {"pattern": "2:4", "names": [1, 2]},
    "a text": {"pattern": "2:4", "names": "mid_block"},
    "no pattern": {"names": []},
    "no names": {"pattern": "2:4", "names": []},
    "no such pattern": {"pattern": "5:4", "names": []},
    "a pattern of numbers": {"pattern": 2, "names": []},
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("how", HARMED_MASKS)
def test_a_mask_that_fits_no_weights_is_refused(how, shared, form, tmp_path):
    """Over unknown names it was no mask: the entry ran dense under the name of a sparse one."""
    masked_bank(shared).save_pretrained(tmp_path / "bank")
    edit_mask(in_format(form, tmp_path / "bank"), lambda _: HARMED_MASKS[how])
    with pytest.raises(ModelError) as error:
        Bank.from_pretrained(tmp_path / "bank")
    assert ("mask.json", "entry.json")[form - 1] in str(error.value) and "\n" not in str(error.value)


def test_a_bank_in_memory_takes_no_such_mask_either():
    with pytest.raises(ModelError, match=r"nothing\.weight"):
        Bank({"full": Entry(net(), masking=Masking(Pattern(2, 4), ("nothing.weight",)))}, "full", "epsilon")


# --- how an entry runs ------------------------------------------------------------------------------------------------


def kernel_of(model) -> torch.Tensor:
    return model.mid_block.resnets[0].conv1.weight


def test_an_entrys_runtime_is_its_memory_layout_and_stays_in_memory(tmp_path):
    bank = Bank({"a": Entry(net(0), runtime=Runtime("channels_last")), "b": net(1)}, "a", "epsilon")
    assert not kernel_of(bank["a"]).is_contiguous() and kernel_of(bank["b"]).is_contiguous()
    bank.set_layouts({"a": "contiguous", "b": "channels_last"})
    assert [entry.runtime for entry in bank.entries.values()] == [EAGER, Runtime("channels_last")]
    more = Bank({**bank.entries, "c": bank["b"]}, "a", "epsilon")  # a bare model runs as it is
    assert more.layouts() == {"a": "contiguous", "b": "channels_last", "c": "channels_last"}
    bank.save_pretrained(tmp_path / "bank")
    assert set(Bank.from_pretrained(tmp_path / "bank").layouts().values()) == {"contiguous"}


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
