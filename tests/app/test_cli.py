"""The command line as a user meets it: exit codes, one-line errors, untouched folders; oracle: the file system."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from halfstep import __version__
from halfstep.app import cli
from halfstep.app.cli import app, main
from halfstep.app.options import FIELDS, Common
from halfstep.core.errors import RecipeError
from halfstep.core.recipe import Recipe, RunRecord, SampleSpec
from halfstep.core.recipes import RECIPES, named
from halfstep.data.pictures import to_uint8
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import reference_plan, sample_images
from halfstep.engine.stepaware import StepAwarePipeline
from tiny import unet

VERBS = ("demo", "train", "optimize", "search", "tune", "sample", "export", "push", "evaluate", "profile",
         "report", "features", "recipe", "compare")  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    DDPMPipeline(unet(), DDPMScheduler()).save_pretrained(folder)
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


def test_export_refuses_in_one_line_and_leaves_nothing(dense, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    for words, told in (
        (("export", tmp_path / "nowhere"), "nowhere"),
        (("export", dense, "--out", tmp_path / "there"), "a folder that is there"),
    ):
        line = refused(monkeypatch, capsys, *words, *(() if "--out" in words else ("--out", tmp_path / "out")))
        assert told in line
    assert [one.name for one in tmp_path.iterdir()] == ["there"]


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
        "an empty model": optimize("", tmp_path / "o", *half),
        "no goal": optimize(dense, tmp_path / "o"),
        "two goals": optimize(dense, tmp_path / "o", *half, "--max-loss", 0.1),
        "budget 0": optimize(dense, tmp_path / "o", "--budget", 0),
        "budget 1.5": optimize(dense, tmp_path / "o", "--budget", 1.5),
        "negative loss": optimize(dense, tmp_path / "o", "--max-loss", -0.1),
        "unknown recipe": optimize(dense, tmp_path / "o", *half, "--recipe", "digit"),
        "wrong type": optimize(dense, tmp_path / "o", *half, "--set", "train.steps=many"),
        "shrink: missing data": shrink(dense, tmp_path / "o", data=f"folder:{tmp_path / 'none'}"),
        "shrink: other size": shrink(dense, tmp_path / "o", "--set", "data.size=16"),
        "shrink: more steps than trained": shrink(dense, tmp_path / "o", "--steps", 1001),
        "grid: missing data": ("compress", "regularized", "--data", f"folder:{tmp_path}/none", "--out", tmp_path / "o"),
        "report of nothing": ("report", tmp_path / "o"),
    }
    for name, words in cases.items():
        refused(monkeypatch, capsys, *words)
        assert not (tmp_path / "o").exists(), name


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--foo", "No such option: --foo; see halfstep --help"),
        ("12345", "No such command '12345'; see halfstep --help"),
        ("compress slimable", "Did you mean 'slimmable'?; see halfstep compress --help"),
        ("train --steps 5", "No such option: --steps"),
        ("optimize --model digits", "Missing option '--data'; see halfstep optimize --help"),
        ("sample --model digits --out o --steps 0", "'--steps'"),
        ("sample --model digits --out o --scheduler foo", "got 'foo', expected one of own, ddim"),
        ("denoise --model digits --image a.png --out o --steps many", "'--steps'"),
    ],
)
def test_words_that_no_verb_takes_are_one_line_too(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, *words.split())
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and told in err
    assert not list(tmp_path.iterdir())


def test_a_report_is_of_the_verbs_that_write_one(bank, tmp_path, monkeypatch, capsys):
    drawn, seen = tmp_path / "drawn", tmp_path / "seen"
    assert run(monkeypatch, capsys, "sample", "--model", bank, "--out", drawn, "--count", 1)[0] == 0
    assert "got a run of sample, expected one of optimize" in refused(monkeypatch, capsys, "report", drawn)
    looked = ("spectrum", "--model", bank, "--data", "digits", "--out", seen, "--images", 4, "--timestep", 20)
    assert run(monkeypatch, capsys, *looked)[0] == 0
    before = (seen / "report.html").read_bytes()
    (seen / "report.html").unlink()
    assert run(monkeypatch, capsys, "report", seen)[0] == 0
    assert (seen / "report.html").read_bytes() == before
    assert "got a run of sample, expected an empty folder, or a run of spectrum" in refused(
        monkeypatch, capsys, *looked[:5], "--out", drawn
    )


def test_an_unknown_field_names_the_nearest(dense, tmp_path, monkeypatch, capsys):
    line = refused(monkeypatch, capsys, *optimize(dense, tmp_path / "o", "--budget", 0.5, "--set", "train.step=3"))
    assert "train.steps" in line


@pytest.mark.parametrize(
    "asked, word",
    {
        "--scheduler dimm": "did you mean ddim?",
        "--scheduler DPMSolver": "did you mean dpmsolver++?",
        "--spacing karas": "did you mean karras?",
        "--spacing karras": "trailing",  # of the model's own, which runs DDIM
        "--scheduler euler --order 2": "no choice of orders",
        "--set sample.spacing=lamdas": "did you mean lambdas?",
    }.items(),
)
def test_samplers_that_are_none_are_one_line_with_the_nearest(asked, word, dense, tmp_path, monkeypatch, capsys):
    out = tmp_path / "o"
    assert word in refused(monkeypatch, capsys, "sample", "--model", dense, "--out", out, *asked.split())
    assert not out.exists()


@pytest.mark.parametrize(
    "budget, word", {"12 mss": "did you mean ms?", "0": "above 0", "nan": "a unit", "2": "(0, 1]"}.items()
)
def test_a_budget_that_is_none_is_one_line(budget, word, dense, tmp_path, monkeypatch, capsys):
    assert word in refused(monkeypatch, capsys, *optimize(dense, tmp_path / "o", "--budget", budget))
    assert not (tmp_path / "o").exists()


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
    command = [sys.executable, "-m", "halfstep.app.cli", "profile", "--model", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


# ---- the common options ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bank(dense, tmp_path_factory) -> Path:
    """A step-aware pipeline of one entry, two steps."""
    net = UNet2DModel.from_pretrained(dense / "unet")
    found = Bank({"full": net}, "full", "epsilon")
    plan = reference_plan(found, DDPMScheduler().config, SampleSpec(steps=2))
    folder = tmp_path_factory.mktemp("bank") / "pipeline"
    StepAwarePipeline(found, plan).save_pretrained(folder)
    return folder


def commands() -> dict[str, Any]:
    root: Any = typer.main.get_command(app)
    found = dict(root.commands)
    return found | {f"compress {name}": one for name, one in found.pop("compress").commands.items()}


def test_an_option_means_one_thing_wherever_it_is_taken():
    shared = "--seed --batch --device --dtype --scheduler --recipe --set --json".split()  # noqa: SIM905
    helps: dict[str, set[str]] = {}
    for verb, command in commands().items():
        for one in command.params:
            if one.opts[0] in shared:
                helps.setdefault(one.opts[0], set()).add(str(one.help))
            if one.opts[0] == "--steps":
                assert str(one.help).startswith("Sampling steps"), verb
            assert one.opts[0] != "--teacher"
    assert len(helps) == 8 and all(len(told) == 1 for told in helps.values())


def test_no_verb_takes_more_than_eight_parameters():
    for node in ast.walk(ast.parse(inspect.getsource(cli))):
        if isinstance(node, ast.FunctionDef):
            assert len(node.args.args) + len(node.args.kwonlyargs) <= 8, node.name


def test_common_options_are_edits_of_the_recipe():
    asked = Common(recipe="fashion16", edits=["train.steps=7"], steps=5, scheduler="euler", seed=3, batch=9)
    edits = ["train.steps=7", "sample.steps=5", "sample.scheduler=euler", "seed=3", "sample.batch=9", "sample.timed=9"]
    assert asked.recipe_for("digits") == named("fashion16").edit(edits)
    assert [Common().recipe_for(data).name for data in ("digits", "folder:x")] == ["digits", "default"]
    assert Common().recipe_for("digits", dense=True) == named("digits-dense")
    assert Common().recipe_for("fashion") == named("fashion")
    assert Common().recipe_for("fashion", dense=True) == named("fashion16-dense")
    assert Common().recipe_for("x", sparse_pattern="1:4").sparse.pattern == "1:4"
    assert Common(edits=["sparse.pattern=1:4"]).recipe_for("x", sparse_pattern=None).sparse.pattern == "1:4"


@pytest.mark.parametrize("option", FIELDS)
def test_an_option_and_another_edit_of_its_field_are_refused_by_name(option):
    words = {
        "scheduler": ("ddim", "ddpm"),
        "spacing": ("karras", "trailing"),
        "order": (2, 1),
        "runtime": ("auto", "compile"),
    }
    value, other = words.get(option, (2, 3))
    assert Common(edits=[f"{FIELDS[option]}={value}"], **{option: value}).recipe_for("x") is not None
    with pytest.raises(RecipeError, match=f"--{option} {value} and --set {FIELDS[option]}={other}"):
        Common(edits=[f" {FIELDS[option]} = {other}"], **{option: value}).recipe_for("x")


def test_a_verbs_own_option_and_another_edit_of_its_field_are_refused(dense, tmp_path, monkeypatch, capsys):
    words = ("compress", "sparse", "--model", dense, "--data", "digits", "--out", tmp_path / "o", "--pattern", "2:4")
    assert "--pattern 2:4 and --set" in refused(monkeypatch, capsys, *words, "--set", "sparse.pattern=1:4")


def test_every_result_can_be_had_as_json_and_without_progress(bank, tmp_path, monkeypatch, capsys):
    with_json = [verb for verb, one in commands().items() if any("--json" in option.opts for option in one.params)]
    assert set(commands()) - set(with_json) <= {"push", "report", "studio"}  # a word, a page
    words = ("sample", "--model", bank, "--count", 2, "--out", tmp_path / "o", "--json", "--quiet")
    code, out, err = run(monkeypatch, capsys, *words)
    assert json.loads(out) == {"images": str(tmp_path / "o"), "grid": str(tmp_path / "o" / "grid.png")}
    assert (code, err) == (0, "")
    assert run(monkeypatch, capsys, *words[:-2], "--device", "cpu")[2]  # and with it where it is not asked for


def test_a_device_that_is_not_there_is_refused_by_name_wherever_it_is_taken(bank, tmp_path, monkeypatch, capsys):
    needed = {"--model": bank, "--data": "digits", "--out": tmp_path / "o", "--image": tmp_path / "x.png", "runs": bank}
    for verb, command in commands().items():
        if any("--device" in one.opts for one in command.params):
            asked = [one.opts[0] for one in command.params if one.required]
            given = [word for name in asked for word in (name, needed[name]) if word != "runs"]
            for device in ("cuda:63", "meta", "gpu please"):
                line = refused(monkeypatch, capsys, *verb.split(), *given, "--device", device)
                assert line.startswith("error: --device: got") and device in line
    assert not (tmp_path / "o").exists()


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / f"{k:06d}.png")) for k in range(3)])


def test_pictures_are_those_of_the_pipeline_in_that_precision(bank, tmp_path, monkeypatch, capsys):
    for dtype in ("float32", "bfloat16", "float16"):
        words = ("sample", "--model", bank, "--count", 3, "--seed", 4, "--device", "cpu", "--dtype", dtype)
        assert run(monkeypatch, capsys, *words, "--out", tmp_path / dtype)[0] == 0
        pipe = StepAwarePipeline.from_pretrained(bank, torch_dtype=getattr(torch, dtype))
        (expected,) = sample_images(pipe.bank, pipe.plan, 3, seed=4, batch=64)
        assert np.array_equal(pictures(tmp_path / dtype), to_uint8(expected)[:, 0])
    words = ("sample", "--model", bank, "--count", 3, "--seed", 4, "--out", tmp_path / "bfloat16")
    assert "dtype" in refused(monkeypatch, capsys, *words)  # float32, into the folder of the others


def test_what_is_measured_says_in_which_precision(bank, tmp_path, monkeypatch, capsys):
    words = ("profile", "--model", bank, "--repeats", 1, "--batch", 2, "--dtype", "bfloat16", "--json")
    cost = json.loads(run(monkeypatch, capsys, *words)[1])["full"]
    assert (cost["dtype"], cost["batch"]) == ("bfloat16", 2)
    words = ("evaluate", "--model", bank, "--data", "digits", "--out", tmp_path / "o", "--dtype", "bfloat16", "--json")
    small = ("--set", "eval.images=64", "--set", "eval.bootstrap=5", "--set", "eval.features=digits")
    code, out, _ = run(monkeypatch, capsys, *words, *small, "--device", "cpu", "--seed", 2)
    about = json.loads(out)["about"]
    assert code == 0 and (about["dtype"], about["device"]) == ("bfloat16", "cpu")
    assert RunRecord.load(tmp_path / "o").recipe.seed == 2


def test_report_takes_a_run_and_version_is_told(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version")[:2] == (0, f"halfstep {__version__}\n")
    assert "nowhere" in refused(monkeypatch, capsys, "report", tmp_path / "nowhere")


# ---- halfstep recipe -------------------------------------------------------------------------------------------------


def walked(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for one in dataclasses.fields(value):
        inner = getattr(value, one.name)
        if dataclasses.is_dataclass(inner):
            yield from walked(inner, f"{prefix}{one.name}.")
        else:
            yield prefix + one.name, inner


@pytest.mark.parametrize("name", ["", *RECIPES])
def test_every_field_of_a_recipe_is_listed_once(name, monkeypatch, capsys):
    words = ("recipe", *([name] if name else []), "--set", "search.fit=3", "--set", "data.flip=yes")
    recipe = named(name or "default").edit(["search.fit=3", "data.flip=yes"])
    expected = {key: list(v) if isinstance(v, tuple) else v for key, v in walked(recipe)}
    record = json.loads(run(monkeypatch, capsys, *words, "--json")[1])
    assert [one["name"] for one in record["fields"]] == list(expected)
    assert {one["name"]: one["value"] for one in record["fields"]} == expected
    assert all(one["meaning"] and one["allowed"] for one in record["fields"])
    assert set(record["recipes"]) == (set() if name else set(RECIPES))
    rows = run(monkeypatch, capsys, *words)[1].splitlines()
    told = [row.removeprefix("* ").split()[0] for row in rows if row[:2] in ("* ", "  ") and row[2:3].strip()]
    assert [one for one in told if one in expected] == list(expected)


def test_a_run_is_shown_with_what_it_read_and_where_it_differs(tmp_path, monkeypatch, capsys):
    recipe = named("default").edit(["train.steps=7", "search.table=local"])
    record = RunRecord(inputs={"verb": "search", "data": "d"}, recipe=recipe, read=("12 pictures of d",))
    (tmp_path / "recipe.json").write_text(json.dumps(record.to_json()))
    out = run(monkeypatch, capsys, "recipe", tmp_path)[1]
    assert "12 pictures of d" in out and "verb: search" in out
    stars = [row.split()[1] for row in out.splitlines() if row.startswith("* ") and "differs" not in row]
    assert stars == ["train.steps", "search.table"] == named("default").differences(recipe)
    found = json.loads(run(monkeypatch, capsys, "recipe", tmp_path, "--json")[1])
    assert found["read"] == ["12 pictures of d"] and len(found["fields"]) == len(list(walked(Recipe())))


def test_a_mistyped_recipe_names_the_nearest_and_a_folder_of_no_run_is_told(tmp_path, monkeypatch, capsys):
    assert "fashion16" in refused(monkeypatch, capsys, "recipe", "fashoin16").split("did you mean")[1]
    assert "the folder of a run" in refused(monkeypatch, capsys, "recipe", tmp_path)
    assert "train.steps" in refused(monkeypatch, capsys, "recipe", "digits", "--set", "train.stpes=1")
