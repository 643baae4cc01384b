"""Runtimes: the eager prediction is the oracle of every other, and counters of dynamo that of its graphs."""

from __future__ import annotations

import copy
import pickle
import shutil
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from halfstep.core.errors import ModelError
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec
from halfstep.core.watch import Watch
from halfstep.engine import runtime as runtime_module
from halfstep.engine.bank import Bank
from halfstep.engine.entry import Entry, Runtime
from halfstep.engine.profiling import example_inputs
from halfstep.engine.runtime import fastest, ready, strayed
from halfstep.engine.runtimes import settle_runtimes
from halfstep.engine.sampling import denoise, image_generators, reference_plan, start_noise
from halfstep.nets.denoiser import Memo, picked
from halfstep.nets.reuse import Forwards
from tiny import cond_for_net, text_unet, unet

compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, g++")


class Listening(Watch):
    def __init__(self):
        self.said = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def graphs_only(monkeypatch):
    """torch.compile with dynamo's graphs alone, run by eager kernels: what is captured is seen, without minutes of
    C++."""
    torch._dynamo.reset()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, backend="eager", fullgraph=True, dynamic=False))
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def bank_of(*names: str) -> Bank:
    entries = {name: unet(seed, (4,)) for seed, name in enumerate(names or ("full",))}
    return Bank(entries, next(iter(entries)), "epsilon")


def drawn(bank: Bank, plan, batch: int) -> torch.Tensor:
    generators = image_generators(0, 0, batch)
    return denoise(bank, plan, start_noise(bank, generators), generators)


def plan_over(bank: Bank, entries, scheduler: str = "ddim"):
    plan = reference_plan(bank, Process(), SampleSpec(scheduler=scheduler, steps=len(entries)), bank.prices())
    return plan.with_entries(list(entries))


def test_each_layout_predicts_what_eager_does():
    entry = Entry.of(unet(attend=True))
    for batch in (1, 3):
        inputs = example_inputs(entry.model, batch)
        assert strayed(ready(entry, Runtime("channels_last")), Forwards.of(entry.model), inputs) < 1e-5
    assert entry.model.conv_in.weight.is_contiguous(), "the entry's own weights stay where they are"


@pytest.mark.slow  # three U-Nets are traced
def test_one_graph_per_entry_and_cut_and_no_more_over_a_trajectory(graphs_only):
    bank = bank_of().with_reuse([0], [0])
    rows = ("full", "full~0", "full", "full", "full~0", "full")
    wanted = drawn(bank, plan_over(bank, rows), 2)
    bank.set_runtimes({"full": "compile"}, [2])
    assert torch.allclose(drawn(bank, plan_over(bank, rows), 2), wanted, atol=1e-5)
    stats = graphs_only["stats"]
    assert stats["unique_graphs"] == 3, "whole, tapped at 0, from 0 on"
    for scheduler in ("dpmsolver++", "euler"):  # whose timesteps are floats
        drawn(bank, plan_over(bank, rows, scheduler), 2)
    assert stats["unique_graphs"] == 3 and not graphs_only["recompiles"] and not graphs_only["graph_break"]
    drawn(bank, plan_over(bank, rows), 3)
    assert stats["unique_graphs"] == 3, "a batch of another size runs eagerly"


def test_many_entries_of_one_class_have_graphs_of_their_own(graphs_only):
    """dynamo keeps at most eight graphs of one function, and then gives up."""
    for _ in range(10):
        entry = small()
        inputs = example_inputs(entry.model, 1)
        ready(entry, Runtime(backend="compile", batches=(1,))).plain(*inputs, Memo())
    assert graphs_only["stats"]["unique_graphs"] == 10


def test_graphs_are_left_behind_by_copies_and_moves(graphs_only):
    bank = bank_of()
    bank.set_runtimes({"full": "compile"}, [1])
    plan = plan_over(bank, ("full",))
    drawn(bank, plan, 1)
    graphs = bank.entries["full"].graphs
    assert graphs and not pickle.loads(pickle.dumps(bank)).entries["full"].graphs
    assert not copy.deepcopy(bank).entries["full"].graphs and bank.with_vae(None).entries["full"].graphs
    bank.to(torch.float64)
    assert not graphs
    assert drawn(bank, plan, 1).dtype == torch.float64


@compiles
@pytest.mark.slow  # a minute of C++
def test_compiled_predictions_are_the_eager_ones():
    bank = bank_of().with_reuse([0], [0])
    plan = plan_over(bank, ("full", "full~0", "full"))
    wanted = drawn(bank, plan, 3)
    settle_runtimes(bank, None, "compile", 3)
    assert bank.runtimes() == {"full": "compile", "full~0": "compile"}
    assert torch.allclose(drawn(bank, plan, 3), wanted, atol=1e-4)


class Small(torch.nn.Module):
    """One convolution as a denoiser; `reads`: a number of its input, which no graph can hold."""

    def __init__(self, reads: bool):
        super().__init__()
        self.conv, self.reads = torch.nn.Conv2d(1, 1, 1), reads
        self.config = Config(sample_size=8, in_channels=1, out_channels=1)

    def forward(self, sample, timestep, return_dict=True):
        if self.reads and float(sample.mean()) > 1e9:
            return (sample,)
        return (self.conv(sample),)


class Config(dict):
    __getattr__ = dict.get


def small(reads: bool = False) -> Entry:
    return Entry(Small(reads))


def test_a_net_that_does_not_compile_names_its_line_and_is_dropped(graphs_only):
    entry = small(reads=True)
    compiled = Runtime(backend="compile", batches=(2,))
    inputs = example_inputs(entry.model, 2)
    with pytest.raises(ModelError, match=r"plain call of a Small at .*test_runtime.py.*sample.mean.*--runtime eager"):
        ready(entry, compiled).plain(inputs.sample, inputs.timestep[0], {}, Memo())
    best, [_, dropped] = fastest(entry, [compiled], 2, repeats=1)
    assert best == Runtime() and "Small" in dropped.dropped and dropped.ms is None


def test_what_strays_is_dropped_with_its_number(monkeypatch):
    entry = Entry.of(unet())
    other = Entry.of(unet())
    with torch.no_grad():
        other.model.conv_out.weight.mul_(1.01)
    real = runtime_module._made
    monkeypatch.setattr(runtime_module, "_made", lambda model, *more: real(other.model, *more))
    best, [kept, dropped] = fastest(entry, [Runtime("channels_last")], 2, repeats=1)
    assert best == entry.runtime and not kept.dropped
    assert 1e-3 < dropped.error < 0.02 and f"{dropped.error:.2g} of eager's norm away" in dropped.dropped
    assert dropped.ms is None, "it is not timed"


def test_the_faster_one_is_taken_and_the_slower_told(monkeypatch):
    """By a clock that the nets set forward."""
    now, entry = [0.0], Entry.of(unet())
    entry.model.conv_in.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 2.0))
    more = {"eager": 3.0, "compile": -1.5}

    def made(model, runtime, layout):
        def run(*given):
            now[0] += more[runtime.backend]
            return Forwards.of(model).plain(*given)

        return replace(Forwards.of(model), plain=run)

    monkeypatch.setattr(runtime_module, "_made", made)
    faster, slower = Runtime(backend="compile", batches=(2,)), Runtime("channels_last")
    best, tried = fastest(entry, [slower, faster], 2, repeats=3, clock=lambda: now[0])
    assert best == faster
    assert [(one.ms, one.dropped) for one in tried] == [(2000, ""), (5000, "slower here"), (500, "")]


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
@pytest.mark.parametrize("made", [partial(unet, attend=True), text_unet])
def test_other_engines_predict_what_eager_does(backend, made):
    for package in runtime_module.PACKAGES[backend]:
        pytest.importorskip(package)
    model = made(0)
    entry, cond = Entry.of(model), cond_for_net(model, 3)
    net, oracle = ready(entry, Runtime(backend=backend)), Forwards.of(model)
    for batch in (1, 3):
        some = picked(cond, torch.arange(batch))
        given = torch.randn(batch, 1, 8, 8), torch.tensor(417), some
        assert torch.allclose(net.plain(*given, Memo()), oracle.plain(*given, Memo()), atol=1e-4)
        (mine, kept), (theirs, wanted) = net.tapped(*given, [0, "out"]), oracle.tapped(*given, [0, "out"])
        assert torch.allclose(mine, theirs, atol=1e-4) and kept.keys() == wanted.keys()
        assert all(torch.allclose(kept[cut], wanted[cut], atol=1e-4) for cut in wanted)
        features = torch.randn_like(wanted[0])
        assert torch.allclose(net.shallow(*given, 0, features), oracle.shallow(*given, 0, features), atol=1e-4)


def test_a_plan_runs_by_another_engine_but_for_what_is_in_half_precision(tmp_path):
    pytest.importorskip("onnxruntime")
    bank, watch = bank_of().with_casts(["bf16"]).with_reuse([0], [0]), Listening()
    plan = plan_over(bank, ("full", "full~0", "full@bf16", "full"))
    wanted = drawn(bank, plan, 2)
    settle_runtimes(bank, tmp_path / "runtimes.json", "onnx", 2, watch=watch)
    assert watch.said == ["full@bf16 run by PyTorch: graphs for onnx are of float32"]
    assert bank.runtimes() == {
        **dict.fromkeys(("full", "full~0"), "onnx"),
        **dict.fromkeys(("full@bf16", "full@bf16~0"), "eager"),
    }
    assert torch.allclose(drawn(bank, plan, 2), wanted, atol=1e-3)


def test_a_backend_that_is_not_there_names_its_extra(monkeypatch):
    monkeypatch.setattr(runtime_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"'onnx' without onnx or .*onnxruntime.*halfstep\[onnx\]"):
        settle_runtimes(bank_of(), None, "onnx", 2)


def test_a_runtime_that_is_asked_for_is_made_once_however_slow(monkeypatch):
    """A graph may take a minute to make."""
    made = []

    def slow(model, runtime, layout):
        made.append(runtime)

        def run(*given):
            time.sleep(0.05)
            return Forwards.of(model).plain(*given)

        return replace(Forwards.of(model), plain=run)

    monkeypatch.setattr(runtime_module, "_made", slow)
    bank = bank_of()
    settle_runtimes(bank, None, "compile", 2)
    for name in bank.computed:
        bank.forwards(name)
    assert len(made) == len(bank.computed)


def test_a_choice_is_kept_and_made_again_elsewhere(tmp_path, monkeypatch):
    bank, file, watch = bank_of(), tmp_path / "runtimes.json", Listening()
    monkeypatch.setattr("halfstep.engine.runtimes.backends_for", lambda entry: ["eager"])
    settle_runtimes(bank, file, "auto", 2, watch=watch)
    written = file.read_bytes()
    settle_runtimes(bank, file, "auto", 2, watch=watch)
    assert file.read_bytes() == written and not any("again" in line for line in watch.said)
    file.write_text(file.read_text().replace('"threads": ', '"threads": 1'))
    settle_runtimes(bank, file, "auto", 2, watch=watch)
    assert any("runtimes are measured again: threads" in line for line in watch.said)
    settle_runtimes(bank, file, "auto", 4, watch=watch)
    assert any("batch 4, not 2" in line for line in watch.said)
