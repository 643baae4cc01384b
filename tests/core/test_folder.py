"""Run folders against the file system: whose a folder is, who works in it, and what its model and data were."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from halfstep.app import inspection, verbs
from halfstep.app.inspection import Noise
from halfstep.app.measurement import features
from halfstep.core import lock
from halfstep.core.errors import HalfstepError, RunError
from halfstep.core.folder import IGNORED, MEASURED, open_run
from halfstep.core.recipe import Recipe, RunRecord, SampleSpec, field_names
from halfstep.core.sums import write_sums
from halfstep.data.sources import _names
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import StepAwarePipeline, reference_plan
from halfstep.nets.content import digest_tensors, fingerprint
from halfstep.nets.models import load_denoiser
from tiny import recipes

INPUTS = {"verb": "train", "model": "m", "data": "d"}
tiny = recipes("""
model.channels=4,4 model.groups=2 model.head_dim=2 data.size=8 data.channels=1 train.steps=2 train.batch=4
train.warmup=0 train.sample_every=0 eval.feature_steps=2
""")


def test_every_name_that_may_change_between_two_calls_is_a_field():
    assert set(MEASURED) <= set(field_names())
    for prefix in {prefix for prefixes in IGNORED.values() for prefix in prefixes}:
        assert any(name == prefix or (prefix.endswith(".") and name.startswith(prefix)) for name in field_names())


AS_RANK = """
import sys, time
from pathlib import Path
from halfstep.core.folder import open_run
from halfstep.core.recipe import Recipe

class Slow:
    def say(self, line):
        print("said", line, end=" ")
        time.sleep(1.5)

inputs = {"verb": "train", "model": "m", "data": "d"}
out = open_run(Path(sys.argv[1]), Recipe(), inputs, {}, Slow(), ["pictures"])
print("opened" if (out / "recipe.json").is_file() else "not there yet")
"""


@pytest.mark.slow
def test_the_second_of_two_processes_waits_until_the_first_has_opened_the_folder(tmp_path: Path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", AS_RANK, tmp_path / "run"],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [rank.communicate(timeout=60)[0].strip() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert told == ["said pictures opened", "opened"]


def listing(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder of somebody else's, with names that look like left-overs of ours."""
    folder = tmp_path / "home"
    (folder / "deep").mkdir(parents=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = (
        "letter.txt",
        f".notes.{dead.pid}.tmp",
        f"deep/.x.{dead.pid}.old",
        f".y.{dead.pid}.halfstep-tmp",
        "000000.png",
    )
    for name in names:
        (folder / name).write_text("mine")
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A step-aware pipeline of one entry, two steps."""
    folder = tmp_path_factory.mktemp("pipeline")
    net, noise = load_denoiser("digits")
    bank = Bank({"full": net}, "full", noise["prediction_type"])
    plan = reference_plan(bank, noise, SampleSpec(steps=2), {"full": 1})
    StepAwarePipeline(bank, plan).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(6):
        pixels = np.random.default_rng(k).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


# ---- whose folder it is --------------------------------------------------------------------------------------------


def calls(pipeline: Path, out: Path) -> dict:
    return {
        "train": lambda: verbs.train("digits", out, tiny()),
        "features": lambda: features("digits", out, tiny()),
        "sample": lambda: verbs.sample(str(pipeline), out, Recipe(), count=1),
        "spectrum": lambda: inspection.spectrum(["digits"], "digits", out, timesteps=(20,), images=4),
        "denoise": lambda: inspection.denoise(["digits"], [out / "a.png"], out, Noise(level=0.1, there=True)),
    }


@pytest.mark.parametrize("verb", ["train", "features", "sample", "spectrum", "denoise"])
def test_a_folder_of_somebody_else_is_refused_untouched(pipeline: Path, mine: Path, verb: str):
    Image.new("L", (8, 8)).save(mine / "a.png")
    before, times = listing(mine), mine.stat().st_mtime_ns
    with pytest.raises(HalfstepError, match="a folder with other files"):
        calls(pipeline, mine)[verb]()
    assert (listing(mine), mine.stat().st_mtime_ns) == (before, times)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"inputs": 3}', '{"format": 1, "recipe": {}, "inputs": {}, "oven": "200 degrees"}']
)
def test_a_recipe_json_of_somebody_else_opens_no_folder(mine: Path, text: str):
    (mine / "recipe.json").write_text(text)
    before = listing(mine)
    with pytest.raises(HalfstepError):
        open_run(mine, tiny(), INPUTS, {})
    assert listing(mine) == before


def test_only_our_own_left_overs_are_cleared_and_only_in_our_own_run(mine: Path, tmp_path: Path):
    out = open_run(tmp_path / "run", tiny(), INPUTS, {})
    shutil.copytree(mine, out, dirs_exist_ok=True)
    with pytest.raises(RunError, match="differ"):
        open_run(out, tiny(), INPUTS | {"data": "e"}, {})
    assert set(listing(mine)) <= set(listing(out))
    open_run(out, tiny(), INPUTS, {})
    gone = set(listing(mine)) - set(listing(out))
    assert len(gone) == 1 and gone.pop().endswith(".halfstep-tmp")


def test_images_are_drawn_again_for_the_same_request_and_refused_for_another(pipeline: Path, tmp_path: Path):
    grid = verbs.sample(str(pipeline), tmp_path / "a", Recipe(), count=2)
    first = (tmp_path / "a" / "000001.png").read_bytes()
    grid.unlink()
    assert verbs.sample(str(pipeline), tmp_path / "a", Recipe().edit(["sample.batch=1"]), count=2).is_file()
    with pytest.raises(RunError, match="seed differ"):
        verbs.sample(str(pipeline), tmp_path / "a", Recipe().edit(["seed=1"]), count=2)
    assert (tmp_path / "a" / "000001.png").read_bytes() == first


# ---- what lay behind the names -------------------------------------------------------------------------------------


def test_a_run_is_resumed_with_the_same_content_alone(tmp_path: Path):
    out, contents = tmp_path / "run", {"model_content": "a", "data_content": "b"}
    open_run(out, tiny(), INPUTS, contents)
    (out / "log.jsonl").touch()
    assert RunRecord.load(out).inputs == INPUTS | contents
    open_run(out, tiny(), INPUTS, contents)
    for name, what in (("model_content", "another model behind 'm'"), ("data_content", "another data behind 'd'")):
        with pytest.raises(RunError, match=what):
            open_run(out, tiny(), INPUTS, contents | {name: "c"})


def test_a_run_of_before_is_believed_with_a_word_and_knows_its_content_from_then_on(tmp_path: Path):
    said: list[str] = []
    out = open_run(tmp_path / "run", tiny(), INPUTS, {})
    (out / "log.jsonl").touch()
    open_run(out, tiny(), INPUTS, {"model_content": "a"}, SimpleNamespace(say=said.append))  # type: ignore[arg-type]
    assert len(said) == 1 and "what lies there now is believed" in said[0]
    assert RunRecord.load(out).inputs["model_content"] == "a"
    with pytest.raises(RunError, match="another model"):
        open_run(out, tiny(), INPUTS, {"model_content": "b"})


def test_replaced_pictures_and_retrained_models_are_noticed_by_every_verb(pictures: Path, tmp_path: Path):
    data = f"folder:{pictures}"
    dense = verbs.train(data, tmp_path / "dense", tiny())
    features(data, tmp_path / "features", tiny())
    inspection.spectrum([str(dense)], data, tmp_path / "spectrum", timesteps=(20,), images=4)
    net = dense / "unet" / "diffusion_pytorch_model.safetensors"
    kept = net.read_bytes()
    verbs.train(data, tmp_path / "other", tiny().edit(["seed=1"]))
    shutil.copy(tmp_path / "other" / "pipeline" / "unet" / net.name, net)
    write_sums(dense)
    with pytest.raises(RunError, match="another model behind"):
        inspection.spectrum([str(dense)], data, tmp_path / "spectrum", timesteps=(20,), images=4)
    net.write_bytes(kept)
    write_sums(dense)
    Image.new("L", (8, 8)).save(pictures / "0.png")
    for again in (
        lambda: verbs.train(data, tmp_path / "dense", tiny()),
        lambda: features(data, tmp_path / "features", tiny()),
        lambda: inspection.spectrum([str(dense)], data, tmp_path / "spectrum", timesteps=(20,), images=4),
    ):
        with pytest.raises(RunError, match="another data behind"):
            again()


def test_a_run_inside_of_its_own_pictures_is_no_data_and_can_be_repeated(pictures: Path):
    data, out = f"folder:{pictures}", pictures / "run"
    first = verbs.train(data, out, tiny())
    before = RunRecord.load(out)
    assert verbs.train(data, out, tiny()) == first and RunRecord.load(out) == before
    (pictures / "pizza").mkdir()
    (pictures / "pizza" / "recipe.json").write_text('{"oven": 200}')  # somebody's own
    Image.new("L", (8, 8)).save(pictures / "pizza" / "a.png")
    assert any("pizza" in str(name) for name in _names(pictures)) and not any("run" in str(n) for n in _names(pictures))


def test_a_feature_network_of_before_is_used_for_its_own_data_alone(pictures: Path, tmp_path: Path):
    out = features(f"folder:{pictures}", tmp_path / "f", tiny())
    (out / "recipe.json").unlink()
    assert features(f"folder:{pictures}", out, tiny()) == out
    with pytest.raises(RunError, match="the feature network of other data"):
        features("digits", out, tiny())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_digest_changes_with_every_bit_name_shape_and_type(dtype: torch.dtype):
    one = {"a": torch.ones(2, 3).to(dtype), "b": torch.ones(()).to(dtype)}
    others = [
        {"a": one["a"].clone(), "b": torch.zeros(()).to(dtype)},
        {"a": one["a"].reshape(3, 2), "b": one["b"]},
        {"c": one["a"], "b": one["b"]},
        {"a": one["a"]},
        {"a": one["a"].to(torch.float16), "b": one["b"]},
    ]
    digests = {digest_tensors(tensors) for tensors in [one, *others]}
    assert len(digests) == 6 and digest_tensors(dict(reversed(one.items()))) in digests
    assert digest_tensors(one, "step 1") not in digests


def test_a_fingerprint_is_of_weights_and_config_alone():
    net = torch.nn.Linear(2, 2)
    twin = torch.nn.Linear(2, 2)
    twin.load_state_dict(net.state_dict())
    assert fingerprint(net, {"b": 1, "a": (2,)}) == fingerprint(twin, {"a": [2], "b": 1, "_diffusers_version": "9"})
    assert fingerprint(net) != fingerprint(torch.nn.Linear(2, 2)) and fingerprint(None, net) != fingerprint(net)


# ---- what was asked for --------------------------------------------------------------------------------------------


def test_a_run_that_has_only_its_record_is_begun_anew_and_one_that_has_more_is_not(tmp_path: Path):
    out = open_run(tmp_path / "run", tiny(), INPUTS, {})
    (out / "supernet").mkdir()
    (out / "supernet" / "recipe.json").write_text((out / "recipe.json").read_text())
    open_run(out, tiny().edit(["seed=3"]), INPUTS | {"data": "e"}, {})
    assert RunRecord.load(out).recipe.seed == 3 and RunRecord.load(out).inputs["data"] == "e"
    (out / "supernet" / "log.jsonl").touch()
    with pytest.raises(RunError, match="seed, data differ"):
        open_run(out, tiny(), INPUTS, {})


@pytest.mark.parametrize(
    ("edit", "moved"),
    [
        ("eval.tolerance=0.2", ["quality.json", "report.html"]),
        (
            "eval.features=digits",
            ["features", "finals.json", "quality.json", "report.html", "scores.jsonl", "search.jsonl"],
        ),
    ],
)
def test_another_measurement_sets_aside_what_hangs_on_it_and_nothing_that_was_trained(tmp_path, edit, moved):
    out, inputs = tmp_path / "run", INPUTS | {"verb": "optimize"}
    open_run(out, tiny(), inputs, {})
    measured = ("quality.json", "report.html", "scores.jsonl", "search.jsonl", "finals.json", "features/x")
    for name in (*measured, "supernet/x", "plan.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(name)
    before = listing(out)
    said: list[str] = []
    other = tiny().edit([edit])
    for _ in range(2):  # the second time it is this run's own recipe
        open_run(out, other, inputs, {}, SimpleNamespace(say=said.append))  # type: ignore[arg-type]
    assert sorted(p.name for p in (out / "earlier-1").iterdir()) == moved and len(said) == 1
    after = listing(out)
    for name, content in before.items():
        if content is not None and name != "recipe.json":
            assert content in (after.get(name), after.get(f"earlier-1/{name}"))
    assert RunRecord.load(out).recipe == other
    with pytest.raises(RunError, match=r"train\.lr differ"):
        open_run(out, other.edit(["train.lr=1"]), inputs, {})
    open_run(out, tiny(), inputs, {})
    assert not (out / "earlier-2").exists()  # nothing was measured in between


def test_what_was_read_is_said_once_by_a_run_and_the_runs_inside_of_it(tmp_path: Path):
    said: list[str] = []
    watch = SimpleNamespace(say=said.append)

    @lock.releasing
    def verb() -> None:
        out = open_run(tmp_path / "run", tiny(), INPUTS, {}, watch, ["pictures", "model"])  # type: ignore[arg-type]
        open_run(out / "supernet", tiny(), INPUTS, {}, watch, ["pictures", "model"])  # type: ignore[arg-type]

    verb()
    assert said == ["pictures", "model"]
    assert RunRecord.load(tmp_path / "run" / "supernet").read == ("pictures", "model")


# ---- who works in it -----------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from halfstep.core import lock
lock.hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_told_who_works_in_a_run_folder_and_goes_on_after_it(tmp_path: Path):
    out = tmp_path / "run"

    @lock.releasing
    def stopped() -> None:
        open_run(out, tiny(), INPUTS, {})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"process {other.pid} on .* since .*one process at a time"):
            open_run(out, tiny(), INPUTS, {})
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    open_run(out, tiny(), INPUTS, {})
    assert json.loads((out / ".holder.json").read_text())["pid"] == os.getpid()


def test_locks_nest_and_are_given_back_in_their_order(tmp_path: Path):
    for name in ("a", "a/b"):
        (tmp_path / name).mkdir()

    @lock.releasing
    def inner() -> None:
        lock.hold(tmp_path / "a" / "b")
        lock.hold(tmp_path / "a")
        assert (tmp_path / "a" / "b" / ".holder.json").exists()

    @lock.releasing
    def outer() -> None:
        lock.hold(tmp_path / "a")
        inner()
        assert (tmp_path / "a" / ".holder.json").exists() and not (tmp_path / "a" / "b" / ".holder.json").exists()

    outer()
    assert not list(tmp_path.rglob(".holder.json"))


def test_a_home_of_hidden_files_is_no_empty_folder_and_what_systems_leave_is(tmp_path: Path):
    home, empty = tmp_path / "home", tmp_path / "empty"
    for folder, names in ((home, (".bashrc", ".ssh")), (empty, (".DS_Store", ".lock", ".log.jsonl.1.halfstep-tmp"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("x")
    with pytest.raises(RunError, match=r"other files \(.bashrc, .ssh\)"):
        open_run(home, None, {"verb": "sample"}, {})
    assert sorted(p.name for p in home.iterdir()) == [".bashrc", ".ssh"]
    assert open_run(empty, None, {"verb": "sample"}, {}) == empty


def test_a_picture_too_small_to_be_measured_is_refused_before_a_folder_is_made(tmp_path: Path):
    file = tmp_path / "small.png"
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(file)
    with pytest.raises(HalfstepError, match=r"at least 11 pixels.*--noisy"):
        inspection.denoise(["digits"], [file], tmp_path / "out", Noise(level=0.1))
    assert not (tmp_path / "out").exists()
    assert inspection.denoise(["digits"], [file], tmp_path / "out", Noise(level=0.1, there=True)) == []
    assert (tmp_path / "out" / "report.html").is_file()
