"""Work on a Ray cluster of this machine. Oracle: the same work, here."""

from __future__ import annotations

import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from halfstep.core.budget import Budget
from halfstep.core.errors import PlanError, RunError
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec
from halfstep.data.images import Images
from halfstep.engine import cluster
from halfstep.engine.bank import Bank
from halfstep.engine.sampling import reference_plan
from halfstep.measure.features import raw_pixels
from halfstep.measure.judge import Judge
from halfstep.search.scores import open_scores

ray = pytest.importorskip("ray")


def net(seed: int) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1,
    ).eval()  # fmt: skip


BANK = Bank({f"net{k}": net(k) for k in range(2)}, "net0", "epsilon")
BASE = reference_plan(BANK, Process(), SampleSpec(steps=4))
PLANS = [BASE.with_entries([f"net{k >> i & 1}" for i in range(4)]) for k in range(6)]


def judge_of() -> Judge:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 1, 8, 8), dtype=np.uint8)
    pictures = Images(name="toy", pixels=pixels, labels=None, classes=(), fingerprint="toy")
    return Judge(BANK, pictures, raw_pixels(pictures), cache=None, batch=4)


DIES_ONCE = """
import os, signal
try:
    os.close(os.open(file, os.O_CREAT | os.O_EXCL))
except FileExistsError:
    pass
else:
    os.kill(os.getpid(), signal.SIGKILL)
"""
"""What a worker that is killed in the middle of a task does; modules of tests are not known there."""


@pytest.mark.slow
def test_scores_on_a_cluster_are_those_of_here_to_the_last_bit(workers, tmp_path):
    found = open_scores(judge_of(), tmp_path / "ray", executor=workers).on(18, 3).many(PLANS, "fit")
    assert found == open_scores(judge_of(), tmp_path / "here").on(18, 3).many(PLANS, "fit")
    files = [(tmp_path / where / "scores.jsonl").read_bytes() for where in ("ray", "here")]
    assert files[0] == files[1]
    assert len(workers.refs) >= 2  # the bank by itself, so that what draws by it shares it


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_task_and_nothing_else(workers, tmp_path):
    workers.submit(exec, DIES_ONCE, {"file": str(tmp_path / "dead")}).result(60)
    assert (tmp_path / "dead").exists()
    assert list(workers.map(pow, [2, 3], [3, 2])) == [8, 9]


@pytest.mark.slow
def test_a_task_that_kills_every_worker_is_one_line(workers):
    with pytest.raises(RunError, match=r"WorkerCrashedError.* expected a worker") as told:
        workers.submit(exec, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", {}).result(300)
    assert "\n" not in str(told.value)
    assert workers.submit(pow, 2, 3).result(60) == 8


@pytest.mark.slow
def test_an_error_of_ours_comes_back_as_it_was_raised(workers):
    with pytest.raises(PlanError) as there:
        workers.submit(Budget.parse, "much").result(60)
    with pytest.raises(PlanError, match=re.escape(str(there.value))):
        Budget.parse("much")
    with pytest.raises(ZeroDivisionError):
        workers.submit(divmod, 1, 0).result(60)


@pytest.mark.slow
def test_a_worker_of_another_version_is_refused_and_named(workers):
    other = cluster.Cluster(ray, torch.device("cpu"))
    other.versions = {**other.versions, "torch": "1.0"}
    with pytest.raises(RunError, match=r"worker on .*: got torch .*, expected torch 1.0, as here"):
        other.submit(pow, 2, 3).result(60)


def test_an_address_that_does_not_answer_is_one_line(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(RunError, match=f"no Ray cluster at {address}.*ray start --head"):
            cluster.use_cluster(address)
    for address in ("nowhere", "host:port", "127.0.0.1:99999"):
        with pytest.raises(RunError, match="expected local, auto, HOST:PORT"):
            cluster.use_cluster(address)


def test_ray_is_imported_only_where_it_is_asked_for():
    code = "import halfstep.app.cli, halfstep.app.verbs, sys; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
