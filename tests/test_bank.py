"""Oracles: stock diffusers saving and loading, byte counts on disk, files broken on purpose."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel

from halfstep import bank as bank_module
from halfstep.bank import Bank, Shared, load_denoiser
from halfstep.errors import HalfstepError, ModelError
from halfstep.slimmable import Supernet, width_name


def net(seed=0, size=8, channels=1, width=16, **changes) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(width, width),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        **changes,
    ).eval()


def slim_bank() -> Bank:
    supernet = Supernet(net(1), (1.0, 0.5, 0.25))
    entries = {"full": net(0)} | {width_name(w): supernet.subnet(w) for w in supernet.widths}
    shared = {width_name(w): Shared("w1.00", s) for w, s in supernet.slices.items()}
    return Bank(entries, "full", "epsilon", shared)


def test_a_bank_round_trips_bit_exactly_with_shared_weights_stored_once(tmp_path):
    bank = slim_bank()
    bank.save_pretrained(tmp_path / "bank")
    stored = sorted(p.parent.name for p in (tmp_path / "bank").rglob("*.safetensors"))
    assert stored == ["full", "w1.00"]
    again = Bank.from_pretrained(tmp_path / "bank")
    assert again.names == bank.names and again.reference == "full" and again.prediction_type == "epsilon"
    for name in bank:
        for (key, a), b in zip(bank[name].state_dict().items(), again[name].state_dict().values(), strict=True):
            assert torch.equal(a, b), (name, key)


def test_an_entry_with_its_own_weights_is_a_stock_diffusers_folder(tmp_path):
    slim_bank().save_pretrained(tmp_path / "bank")
    model = UNet2DModel.from_pretrained(tmp_path / "bank" / "w1.00")
    assert torch.equal(model.conv_in.weight, net(1).conv_in.weight)


@pytest.mark.parametrize(
    ("other", "kind", "word"),
    [
        (net(size=16), "epsilon", "sample_size"),
        (net(channels=3), "epsilon", "in_channels"),
        (net(num_class_embeds=10), "epsilon", "num_class_embeds"),
        (net(2), "v_prediction", "prediction type"),
    ],
)
def test_entries_that_cannot_stand_in_are_refused(other, kind, word):
    with pytest.raises(ModelError) as error:
        slim_bank().with_entry("other", other, kind)
    assert word in str(error.value) and "\n" not in str(error.value)


def test_unknown_names_are_refused():
    with pytest.raises(ModelError):
        slim_bank()["w0.33"]
    with pytest.raises(ModelError):
        Bank({"full": net()}, "dense", "epsilon")


def test_a_denoiser_comes_from_a_pipeline_a_model_folder_or_a_run(tmp_path):
    model, scheduler = net(3), DDPMScheduler(prediction_type="v_prediction")
    DDPMPipeline(model, scheduler).save_pretrained(tmp_path / "run" / "pipeline")
    model.save_pretrained(tmp_path / "bare")
    for place, kind in (("run", "v_prediction"), ("run/pipeline", "v_prediction"), ("bare", "epsilon")):
        loaded, noise = load_denoiser(tmp_path / place)
        assert torch.equal(loaded.conv_in.weight, model.conv_in.weight)
        assert noise["prediction_type"] == kind


def broken_folders(tmp_path):
    good = tmp_path / "good"
    net().save_pretrained(good)

    def copy(name):
        folder = tmp_path / name
        net().save_pretrained(folder)
        return folder

    yield tmp_path / "missing"
    (tmp_path / "empty").mkdir()
    yield tmp_path / "empty"
    foreign = tmp_path / "foreign"
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2).save_pretrained(foreign)
    yield foreign
    cut = copy("cut")
    file = cut / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    yield cut
    other = copy("other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "block_out_channels": [32, 32]}))
    yield other
    text = copy("text")
    (text / "config.json").write_text("{ not json")
    yield text
    pickled = copy("pickled")
    (pickled / "diffusion_pytorch_model.safetensors").rename(pickled / "diffusion_pytorch_model.bin")
    yield pickled
    unbuildable = copy("unbuildable")
    (unbuildable / "config.json").write_text(json.dumps({**config, "norm_num_groups": 7}))
    yield unbuildable


def test_broken_model_folders_are_refused_in_one_line_that_names_them(tmp_path):
    for folder in broken_folders(tmp_path):
        with pytest.raises(HalfstepError) as error:
            load_denoiser(folder)
        assert folder.name in str(error.value) and "\n" not in str(error.value)


def test_a_failed_save_leaves_the_old_bank_untouched(tmp_path, monkeypatch):
    bank = slim_bank()
    bank.save_pretrained(tmp_path / "bank")
    before = {p: p.read_bytes() for p in (tmp_path / "bank").rglob("*") if p.is_file()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bank_module, "save_file", full_disk)
    with pytest.raises(HalfstepError, match="full disk"):
        bank.save_pretrained(tmp_path / "bank")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_broken_banks_are_refused(tmp_path):
    bank = slim_bank()
    bank.save_pretrained(tmp_path / "bank")
    record = json.loads((tmp_path / "bank" / "bank.json").read_text())
    (tmp_path / "bank" / "bank.json").write_text(json.dumps({k: v for k, v in record.items() if k != "entries"}))
    with pytest.raises(HalfstepError):
        Bank.from_pretrained(tmp_path / "bank")
    (tmp_path / "bank" / "bank.json").unlink()
    with pytest.raises(HalfstepError):
        Bank.from_pretrained(tmp_path / "bank")
