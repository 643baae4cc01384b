"""The command line as a user meets it: exit codes, one-line errors, untouched folders; oracle: the file system."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel

from halfstep.cli import main

VERBS = ("demo", "train", "optimize", "search", "sample", "evaluate", "profile", "report", "features")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    folder = tmp_path_factory.mktemp("dense") / "model"
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(folder)
    return folder


def run(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["halfstep", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr()
    return int(stop.value.code or 0), told.out, told.err


def refused(monkeypatch, capsys, *words: object) -> str:
    code, _, err = run(monkeypatch, capsys, *words)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert "got " in lines[0] and "expected " in lines[0]
    return lines[0]


@pytest.mark.parametrize("verb", [*VERBS, "compress slimmable"])
def test_every_command_helps_with_an_example(verb, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, *verb.split(), "--help")
    assert code == 0 and "Example" in out


def test_the_root_lists_every_command(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "--help")
    assert code == 0 and all(verb in out for verb in (*VERBS, "compress"))


def test_profile_prints_json(dense, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "profile", "--model", dense, "--repeats", 1, "--json")
    record = json.loads(out)
    assert code == 0 and record["full"]["macs"] > 0 and record["full"]["params"] > 0


def optimize(model, out, *more, data="digits"):
    return ("optimize", "--model", model, "--data", data, "--out", out, *more)


def shrink(model, out, *more, data="digits"):
    return ("shrink", "--model", model, "--data", data, "--out", out, *more)


def test_bad_inputs_are_one_line_and_leave_nothing_behind(dense, tmp_path, monkeypatch, capsys):
    foreign = tmp_path / "foreign"
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2).save_pretrained(foreign)
    empty = tmp_path / "empty"
    empty.mkdir()
    half = ("--budget", 0.5)
    cases = {
        "missing model": optimize(tmp_path / "none", tmp_path / "o", *half),
        "no model": optimize(empty, tmp_path / "o", *half),
        "no denoiser": optimize(foreign, tmp_path / "o", *half),
        "missing data": optimize(dense, tmp_path / "o", *half, data=f"folder:{tmp_path / 'none'}"),
        "unknown data": optimize(dense, tmp_path / "o", *half, data="paintings"),
        "other size": optimize(dense, tmp_path / "o", *half, "--set", "data.size=16"),
        "other channels": optimize(dense, tmp_path / "o", *half, "--set", "data.channels=3"),
        "no whole groups": optimize(dense, tmp_path / "o", *half, "--set", "slim.widths=1,0.3"),
        "no goal": optimize(dense, tmp_path / "o"),
        "two goals": optimize(dense, tmp_path / "o", *half, "--max-loss", 0.1),
        "budget 0": optimize(dense, tmp_path / "o", "--budget", 0),
        "budget 1.5": optimize(dense, tmp_path / "o", "--budget", 1.5),
        "negative loss": optimize(dense, tmp_path / "o", "--max-loss", -0.1),
        "unknown recipe": optimize(dense, tmp_path / "o", *half, "--recipe", "digit"),
        "wrong type": optimize(dense, tmp_path / "o", *half, "--set", "train.steps=many"),
        "sample a model": ("sample", "--model", dense, "--out", tmp_path / "o"),
        "shrink: missing data": shrink(dense, tmp_path / "o", data=f"folder:{tmp_path / 'none'}"),
        "shrink: other size": shrink(dense, tmp_path / "o", "--set", "data.size=16"),
        "shrink: more steps than trained": shrink(dense, tmp_path / "o", "--steps", 1001),
        "grid: missing data": ("compress", "regularized", "--data", f"folder:{tmp_path}/none", "--out", tmp_path / "o"),
        "report of nothing": ("report", "--out", tmp_path / "o"),
    }
    for name, words in cases.items():
        refused(monkeypatch, capsys, *words)
        assert not (tmp_path / "o").exists(), name


def test_an_unknown_field_names_the_nearest(dense, tmp_path, monkeypatch, capsys):
    line = refused(monkeypatch, capsys, *optimize(dense, tmp_path / "o", "--budget", 0.5, "--set", "train.step=3"))
    assert "train.steps" in line


def test_a_cut_model_file_is_named(dense, tmp_path, monkeypatch, capsys):
    cut = tmp_path / "cut"
    UNet2DModel.from_pretrained(dense / "unet").save_pretrained(cut)
    file = cut / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert file.name in refused(monkeypatch, capsys, *optimize(cut, tmp_path / "o", "--budget", 0.5))


def test_output_folders_that_cannot_serve_are_refused_and_untouched(dense, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    for out in (file, file / "below", full):
        refused(monkeypatch, capsys, "train", "--data", "digits", "--out", out, "--set", "train.steps=1")
    assert file.read_text() == "mine" and [p.name for p in full.iterdir()] == ["thesis.txt"]


def test_a_run_of_another_recipe_is_refused_and_untouched(tmp_path, monkeypatch, capsys):
    small = ("--set", "model.channels=8,8", "--set", "model.groups=4", "--set", "model.head_dim=4")
    words = ("train", "--data", "digits", "--out", tmp_path / "o", *small, "--set", "train.sample_every=0")
    monkeypatch.setattr(sys, "argv", ["halfstep", *map(str, words), "--set", "train.steps=2"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    before = {p: p.read_bytes() for p in (tmp_path / "o").rglob("*") if p.is_file()}
    line = refused(monkeypatch, capsys, *words, "--set", "train.steps=3")
    assert "train.steps" in line
    assert {p: p.read_bytes() for p in (tmp_path / "o").rglob("*") if p.is_file()} == before


def test_a_real_process_exits_with_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "halfstep.cli", "profile", "--model", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
