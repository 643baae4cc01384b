"""ONNX graphs of entries: onnxruntime gives what PyTorch gives, at any batch, and what cannot be is refused by name."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from banks import slim_bank
from halfstep.core.errors import ModelError
from halfstep.engine.entry import Entry, Reuse
from halfstep.engine.graphs import graph_of
from halfstep.nets.architectures import shape_of
from halfstep.nets.denoiser import Memo, flattened, predictor
from halfstep.nets.reuse import OUT, cut_count, shallow, tapped
from tiny import cond_for_net, ode_unet, text_unet, unet, uvit, wavelet_unet

ort = pytest.importorskip("onnxruntime")


def ran(graph, *tensors):
    session = ort.InferenceSession(graph.content)
    assert tuple(one.name for one in session.get_inputs()) == graph.inputs
    assert tuple(one.name for one in session.get_outputs()) == graph.outputs
    given = dict(zip(graph.inputs, (tensor.numpy() for tensor in tensors), strict=True))
    return [torch.from_numpy(found) for found in session.run(None, given)]


def inputs_of(model, batch):
    torch.manual_seed(batch)
    cond = cond_for_net(model, batch)
    return torch.randn(shape_of(model, batch)), torch.linspace(900, 20, batch), cond


def require_close(found, wanted):
    assert found.shape == wanted.shape and (found - wanted).abs().max() <= 1e-4


NETS = {
    "unet of classes": lambda: unet(attend=True, num_class_embeds=5),
    "wavelet": wavelet_unet,
    "continuous": ode_unet,
    "uvit of classes": lambda: uvit(num_class_embeds=5),
    "text": text_unet,
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in NETS if name != "uvit of classes"]


@pytest.mark.parametrize("name", ["uvit of classes", *SLOW])
@torch.no_grad()
def test_a_graph_gives_what_the_net_gives_at_any_batch(name):
    model = NETS[name]()
    graph = graph_of(Entry(model), tokens=5)
    assert graph.batch is None and graph.outputs == ("prediction",)
    for batch in (1, 5):
        sample, timestep, cond = inputs_of(model, batch)
        [found] = ran(graph, sample, timestep, *dict(flattened(cond)).values())
        require_close(found, predictor(model)(sample, timestep, cond, Memo()))


@pytest.mark.parametrize(
    "make", [pytest.param(lambda: unet(num_class_embeds=5), marks=pytest.mark.slow, id="unet"), uvit]
)
@torch.no_grad()
def test_features_leave_one_graph_and_enter_another(make):
    model = make()
    cut = cut_count(model) - 1
    leaving, taking = graph_of(Entry(model), [cut, OUT]), graph_of(Entry(model, Reuse("full", cut)))
    assert leaving.outputs == ("prediction", f"cut{cut}") and taking.inputs[-1] == "features"
    sample, timestep, cond = inputs_of(model, 2)
    given = dict(flattened(cond)).values()
    prediction, kept = tapped(model, sample, timestep, cond, [cut])
    for found, wanted in zip(ran(leaving, sample, timestep, *given), (prediction, kept[cut]), strict=True):
        require_close(found, wanted)
    later, time = torch.randn_like(sample), timestep - 10
    [found] = ran(taking, later, time, *given, kept[cut])
    require_close(found, shallow(model, later, time, cond, cut, kept[cut]))


@pytest.mark.slow
@torch.no_grad()
def test_widths_of_a_bank_and_another_memory_layout():
    bank = slim_bank()
    for entry in (bank.entries["w0.50"], Entry.of(bank["full"]).put("channels_last")):
        sample, timestep, cond = inputs_of(entry.model, 2)
        [found] = ran(graph_of(entry), sample, timestep)
        require_close(found, predictor(entry.model)(sample, timestep, cond, Memo()))


class Counting(nn.Module):
    """To what traces it, the length is a number and no size."""

    def forward(self, x):
        return x.expand(len(x), x.shape[1]) + torch.zeros(len(x), 1)


@torch.no_grad()
def test_a_net_that_fixes_its_batch_is_told_by_its_graph():
    model = uvit()
    model.time_embed = Counting()
    graph = graph_of(Entry(model), batch=2)
    assert graph.batch == 2
    sample, timestep, cond = inputs_of(model, 2)
    [found] = ran(graph, sample, timestep)
    require_close(found, predictor(model)(sample, timestep, cond, Memo()))


class Bessel(nn.Module):
    """ONNX has no such operator."""

    def forward(self, x):
        return torch.special.bessel_j0(x)


class Choosing(nn.Module):
    """What is computed hangs on the numbers."""

    def forward(self, x):
        return x if x.sum() > 0 else 2 * x


@pytest.mark.parametrize(("layer", "told"), [(Bessel(), "bessel_j0"), (Choosing(), "")])
def test_what_does_not_export_is_refused_by_its_layer(layer, told):
    model = uvit()
    model.time_embed = layer
    with pytest.raises(ModelError, match=f"{told}.*layer time_embed, which does not export") as caught:
        graph_of(Entry(model))
    assert "\n" not in str(caught.value)


def test_an_entry_that_computes_nothing_half_precision_and_a_missing_extra_are_refused(monkeypatch):
    with pytest.raises(ModelError, match="repeats a prediction"):
        graph_of(Entry(unet(), Reuse("full", OUT)))
    with pytest.raises(ModelError, match="bfloat16, expected float32"):
        graph_of(Entry(unet().bfloat16()))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModelError, match=r"no onnxscript.*halfstep\[onnx\]"):
        graph_of(Entry(unet()))
