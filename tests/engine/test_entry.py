"""Entries on disk and in memory. Oracles: stock diffusers, a hand count, byte counts, files broken on purpose."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from banks import FORMATS, edit_link, edit_record, in_format, net, slim_bank, weights_of
from halfstep.core.errors import HalfstepError, ModelError
from halfstep.core.recipe import SparseSpec
from halfstep.engine.bank import Bank
from halfstep.engine.entry import EAGER, Cut, Entry, Own, Reuse, Runtime, Twin
from halfstep.methods.sparse import sparsify
from halfstep.nets.masks import Masking, Pattern


def test_an_entry_with_its_own_weights_is_a_stock_diffusers_folder(tmp_path):
    slim_bank().save_pretrained(tmp_path / "bank")
    model = UNet2DModel.from_pretrained(tmp_path / "bank" / "w1.00")
    assert torch.equal(model.conv_in.weight, net(1).conv_in.weight)


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


# --- entries that reuse features --------------------------------------------------------------------------------------


def reusing_bank() -> Bank:
    """A narrower width, a mask on the dense net's weights, and the features of all three."""
    bank, masked = slim_bank(), masked_bank(shared=True).entries["2:4"]
    return bank.with_entry("2:4", masked, "epsilon").with_reuse([0, 2, "out"], [0, 1])


def test_reuse_entries_store_nothing_and_take_their_sources_nets_again(tmp_path):
    bank = reusing_bank()
    bank.save_pretrained(tmp_path / "bank")
    links = {name: link for name, link in weights_of(bank).items() if isinstance(link, Reuse)}
    assert len(links) == 5 * 6 and {link.of for link in links.values()} == set(bank.computed)
    for name in links:
        [file] = (tmp_path / "bank" / name.replace(":", "of")).iterdir()
        assert file.name == "entry.json" and bank.entries[name].stored_bytes == 0
    again = Bank.from_pretrained(tmp_path / "bank")
    assert again.names == bank.names and weights_of(again) == weights_of(bank)
    assert all(again.entries[name].model is again[link.of] for name, link in links.items())


HARMED_REUSE = {
    "a cut of later": lambda r: {**r, "cut": 9},
    "a cut before the first": lambda r: {**r, "cut": -1},
    "a cut by another name": lambda r: {**r, "cut": "middle"},
    "a cut that is true": lambda r: {**r, "cut": True},
    "no cut": lambda r: {k: v for k, v in r.items() if k != "cut"},
    "order 2": lambda r: {**r, "order": 2},
    "order true": lambda r: {**r, "order": True},
    "features of reused features": lambda r: {**r, "of": "w0.50~2"},
    "features of its own": lambda r: {**r, "of": "w0.50~0"},
    "features of nobody": lambda r: {**r, "of": "../full"},
    "a foreign field": lambda r: {**r, "age": 3},
}


@pytest.mark.parametrize("how", HARMED_REUSE)
def test_a_reuse_entry_that_is_none_is_refused_in_one_line(how, tmp_path):
    reusing_bank().save_pretrained(tmp_path / "bank")
    file = tmp_path / "bank" / "w0.50~0" / "entry.json"
    edit_record(file, lambda r: {**r, "weights": HARMED_REUSE[how](r["weights"])})
    with pytest.raises(ModelError) as error:
        Bank.from_pretrained(tmp_path / "bank")
    assert "w0.50~0" in str(error.value) and "\n" not in str(error.value)


def test_no_weights_follow_from_reused_features(tmp_path):
    reusing_bank().save_pretrained(tmp_path / "bank")
    file = tmp_path / "bank" / "w0.25" / "entry.json"
    edit_record(file, lambda r: {**r, "weights": {**r["weights"], "of": "w1.00~0"}})
    with pytest.raises(ModelError, match=r"weights of 'w1\.00~0' for 'w0\.25'"):
        Bank.from_pretrained(tmp_path / "bank")


def test_a_reuse_entry_has_no_mask_of_its_own(tmp_path):
    reusing_bank().save_pretrained(tmp_path / "bank")
    mask = {"pattern": "2:4", "names": ["conv_in.weight"]}
    edit_record(tmp_path / "bank" / "full~0" / "entry.json", lambda r: {**r, "masking": mask})
    with pytest.raises(ModelError, match=r"full~0.*a mask.*that of 'full'"):
        Bank.from_pretrained(tmp_path / "bank")


def test_reuse_costs_what_is_left_to_compute_masks_and_widths_included():
    """Oracle: MACs of every layer that a real pass runs, from the sizes of what it puts out."""
    bank = reusing_bank()
    macs = {name: price.macs for name, price in bank.prices().items()}
    for name, entry in bank.entries.items():
        if not isinstance(entry.weights, Reuse):
            continue
        masking = bank.entries[entry.weights.of].masking
        share = {} if masking is None else masking.layers()
        wanted = sum(count * share.get(layer, 1) for layer, count in _layers_of(bank.call(name, 1)).items())
        assert macs[name] == pytest.approx(wanted, abs=1), name
    assert macs["full~0"] < macs["full~2"] < macs["full"] and macs["full~out"] == 0
    assert macs["2:4~2"] < macs["full~2"] == macs["full~2+"]


def _layers_of(call) -> dict[str, int]:
    """MACs of every convolution and linear layer by path in the net, in a real call of one image. The last cut, which
    runs attention, is not among those asked for."""
    found: dict[str, int] = {}
    handles = []
    for path, module in call.model.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):

            def note(m, _i, out, path=path):
                found[path] = out[0].numel() // out.shape[1 if out.dim() == 4 else -1] * m.weight.numel()

            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        call(torch.zeros(1, 1, 8, 8), torch.tensor([1]))
    for handle in handles:
        handle.remove()
    return found
