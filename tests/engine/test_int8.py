"""Entries in eight bits: ONNX Runtime and OpenVINO compute what PyTorch simulates, and what is stored comes back."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace

import onnx
import pytest
import torch
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.core.plan import StepPlan
from halfstep.core.process import Process
from halfstep.core.recipe import SampleSpec
from halfstep.core.watch import Watch
from halfstep.engine.bank import Bank
from halfstep.engine.calibration import calibrated
from halfstep.engine.entry import Entry, Int8
from halfstep.engine.pricing import PriceBook
from halfstep.engine.profiling import count_macs, example_inputs
from halfstep.engine.runtime import TOLERANCE_INT8, ready, strayed
from halfstep.engine.runtimes import settle_runtimes
from halfstep.engine.sampling import denoise, image_generators, reference_plan, start_noise
from halfstep.engine.sessions import onnx_session, openvino_session
from halfstep.engine.stepaware import StepAwarePipeline
from halfstep.nets.int8 import quantised, spans_of
from halfstep.nets.reuse import Forwards
from tiny import unet

openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs halfstep[openvino]")
SESSIONS = [pytest.param("onnx", onnx_session), pytest.param("openvino", openvino_session, marks=openvino)]


def plain_bank() -> Bank:
    return Bank({"full": unet(0, (8, 16)), "slim": unet(1, (4, 8))}, "full", "epsilon")


def plan_over(bank: Bank, *entries: str) -> StepPlan:
    plan = reference_plan(bank, Process(), SampleSpec(scheduler="ddim", steps=len(entries)))
    return plan.with_entries(list(entries))


def spans_over(bank: Bank, *names: str):
    return calibrated(bank, plan_over(bank, "full", "full", "full"), names, seed=0)


@pytest.fixture(scope="module")
def bank() -> Bank:
    found = plain_bank()
    return found.with_int8(spans_over(found))


def drawn(bank: Bank, plan: StepPlan, batch: int = 2) -> torch.Tensor:
    generators = image_generators(0, 0, batch)
    return denoise(bank, plan, start_noise(bank, generators), generators)


class _Net(nn.Module):
    """A convolution as a denoiser, between what leaves it in the middle."""

    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(1, 6, 3, padding=1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.net(sample)


@pytest.mark.parametrize(("name", "made"), SESSIONS)
def test_one_layer_is_computed_to_the_last_step(name, made):
    torch.manual_seed(0)
    net = quantised(_Net(), {"net": (-2.0, 2.5, -2.0, 2.0)}).eval()
    sample = torch.randn(5, 1, 16, 16)
    program = torch.export.export(net, (sample,), strict=False)
    graph = torch.onnx.export(program, dynamo=True, verbose=False)
    graph.save(content := io.BytesIO())
    [found] = made(content.getvalue(), 1)({graph.model.graph.inputs[0].name: sample.numpy()})
    with torch.no_grad():
        apart = (torch.from_numpy(found) - net(sample)).abs()
    assert apart.max() < 1.01 * 4 / 255, "one step of its output"
    assert (apart > 1e-5).float().mean() < 2e-3, "only what lies on an edge"
    stored = onnx.load_from_string(content.getvalue()).graph
    kinds = {one.name: one.data_type for one in stored.initializer}
    layers = [node for node in stored.node if kinds.get(node.input[0]) == onnx.TensorProto.INT8]
    [weights] = [node for node in layers if node.op_type == "DequantizeLinear"]
    assert weights.attribute[0].i == 0, "a scale for each output channel"
    assert sum(node.op_type == "QuantizeLinear" for node in stored.node) == 2, "what goes in, and what comes out"


@pytest.mark.slow  # a graph of the whole net is exported
@pytest.mark.parametrize(("name", "made"), SESSIONS)
def test_a_session_strays_no_further_than_eight_bits_do(bank, name, made):
    entry = bank.entries["full@int8"]
    inputs = example_inputs(entry.model, 3)
    run = ready(entry, replace(entry.runtime, backend=name))
    assert strayed(run, Forwards.of(entry.model), inputs) < TOLERANCE_INT8 / 2
    assert strayed(run, Forwards.of(bank["full"]), inputs) < TOLERANCE_INT8 / 2
    wrong = Forwards.of(bank["slim"])
    assert strayed(run, wrong, inputs) > TOLERANCE_INT8, "another net is told from it"
    plan, whole = plan_over(bank, "full", "full@int8", "full@int8"), bank.only(["full@int8"])
    whole.set_runtimes({"full@int8": name}, ())  # the graph that is there
    ends, simulated = drawn(whole, plan), drawn(bank, plan)
    assert 0 < (ends - simulated).norm() / simulated.norm() < TOLERANCE_INT8


def test_a_plan_of_both_is_drawn_row_by_row(bank):
    more = bank.with_reuse([0])
    ends = drawn(more, plan_over(more, "full", "full@int8", "slim@int8", "full@int8", "full@int8~0", "full"))
    whole = drawn(more, plan_over(more, "full", "full", "slim", "full", "full~0", "full"))
    assert 0 < (ends - whole).norm() / whole.norm() < 0.5
    alone = plain_bank()
    assert torch.equal(drawn(bank, plan_over(bank, "full", "slim")), drawn(alone, plan_over(alone, "full", "slim")))


@pytest.mark.slow
def test_it_costs_its_sources_macs_and_a_time_of_its_own(bank):
    prices = bank.with_reuse([0]).prices()
    assert prices["full@int8"].macs == prices["full"].macs == count_macs(unet(0, (8, 16)))
    assert prices["full@int8~0"] == prices["full~0"]
    again = bank.only(["full@int8"])
    again.set_runtimes({"full@int8": "onnx"}, [2])
    book = PriceBook(again, 2)
    assert book.prices["full@int8"].us > 0 and book.prices["full@int8"].us != book.prices["full"].us


def test_calibration_is_what_the_layers_see_and_the_same_twice(bank):
    spans, plain = spans_of(bank["full@int8"]), plain_bank()
    assert spans == spans_over(plain_bank(), "full")["full"]
    least = {name: [0.0] * 4 for name in spans}

    def look(name):
        def seen(_, given, found):
            now, ends = least[name], (given[0].min(), given[0].max(), found.min(), found.max())
            least[name] = [(min, max)[k % 2](now[k], float(end)) for k, end in enumerate(ends)]

        return seen

    for name in spans:
        plain["full"].get_submodule(name).register_forward_hook(look(name))
    drawn(plain, plan_over(plain, "full", "full", "full"), 4)  # some of the pictures, along the same trajectory
    for name, span in spans.items():
        assert all(span[k] <= least[name][k] + 1e-4 for k in (0, 2)), name
        assert all(span[k] >= least[name][k] - 1e-4 for k in (1, 3)), name


def test_its_ranges_alone_are_stored_and_it_comes_back(bank, tmp_path):
    plan = plan_over(bank, "full", "full@int8", "slim@int8")
    StepAwarePipeline(bank, plan).save_pretrained(tmp_path / "pipe")
    folder = tmp_path / "pipe" / "bank" / "full@int8"
    assert [file.name for file in folder.iterdir()] == ["entry.json"]
    again = StepAwarePipeline.from_pretrained(tmp_path / "pipe")
    assert spans_of(again.bank["full@int8"]) == spans_of(bank["full@int8"])
    assert torch.equal(drawn(again.bank, again.plan), drawn(bank, plan))
    prints = [bank.fingerprint("full@int8"), bank.fingerprint("full"), again.bank.fingerprint("full@int8")]
    assert prints[0] == prints[2] != prints[1]
    spans = spans_of(bank["full@int8"])
    other = plain_bank().with_int8({"full": {name: (*span[:3], span[3] + 1e-6) for name, span in spans.items()}})
    assert other.fingerprint("full@int8") != prints[0], "a range is a setting"


def test_what_does_not_follow_from_its_source_is_refused(bank, tmp_path):
    spans = spans_of(bank["full@int8"])
    with pytest.raises(ModelError, match="one of full, slim"):
        Bank(bank.entries, "full@int8", "epsilon")
    with pytest.raises(ModelError, match="a Conv8, expected a Conv2d or a Linear"):
        bank.with_int8({"full@int8": spans})
    with pytest.raises(ModelError, match="of other ranges, expected the model of 'full' in int8"):
        Bank({"full": unet(0), "eight": Entry(unet(0), Int8("full", spans))}, "full", "epsilon")
    with pytest.raises(ModelError, match="'nowhere', no layer"):
        plain_bank().with_int8({"full": {"nowhere": (-1.0, 1.0, -1.0, 1.0)}})
    bank.save_pretrained(tmp_path / "bank")
    file = tmp_path / "bank" / "full@int8" / "entry.json"
    record = json.loads(file.read_text())
    record["weights"]["spans"]["conv_in"] = [1, 2, 3]
    file.write_text(json.dumps(record))
    with pytest.raises(ModelError, match="conv_in"):
        Bank.from_pretrained(tmp_path / "bank")


def test_pytorch_says_that_it_only_simulates(bank):
    class Listening(Watch):
        def __init__(self):
            self.said = []

        def say(self, text: str) -> None:
            self.said.append(text)

    watch = Listening()
    settle_runtimes(bank, None, "eager", 2, watch=watch)
    [said] = watch.said
    assert said.startswith("full@int8, slim@int8: PyTorch only simulates")
    assert bank.eager
