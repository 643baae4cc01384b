"""Costs: every number against a hand count or a known allocation. Speed itself is never asserted."""

import math
from functools import partial

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from halfstep.core.errors import HalfstepError, ModelError
from halfstep.core.machine import machine
from halfstep.core.results import Cost
from halfstep.engine import profiling
from halfstep.engine.profiling import Inputs
from halfstep.nets.denoiser import Memo, predictor
from tiny import unet

MIB = 2**20


tiny = partial(unet, colours=3, attend=True, attention_head_dim=8)


def ddpm_cifar10():
    """The shape of google/ddpm-cifar10-32, without numbers."""
    with torch.device("meta"):
        return UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=32,
            norm_eps=1e-6,
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
        )


def hand_counted(model):
    """MACs of one image by kind, from forward hooks on the layers and nothing of the module under test."""
    found = {"conv": 0, "linear": 0, "matmul": 0}

    def conv(module, _, output):
        found["conv"] += output.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)

    def linear(module, _, output):
        found["linear"] += output.numel() * module.in_features

    def attention(module, args):
        tokens = math.prod(args[0].shape[2:])
        found["matmul"] += 2 * tokens * tokens * module.inner_dim

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(conv)
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(linear)
        elif type(module).__name__ == "Attention":
            module.register_forward_pre_hook(attention)
    with torch.no_grad():
        model(torch.zeros(1, 3, 8, 8), torch.ones(1))
    return found


def on_real_numbers(monkeypatch):
    def refuse(model):
        raise RuntimeError("no twin today")

    monkeypatch.setattr(profiling, "_meta_twin", refuse)


class Bare(nn.Module):
    """A layer with the face of a denoiser: its further inputs come as conditions."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, sample, timestep, return_dict, **cond):
        found = self.layer(sample, **cond)
        return (found[0] if isinstance(found, tuple) else found,)


def taking(sample, **cond):
    return Inputs(sample, torch.ones(len(sample)), cond)


def test_conv_by_hand():
    conv = nn.Conv2d(6, 4, 3, padding=1, groups=2)
    kinds = profiling.macs_by_kind(Bare(conv), inputs=taking(torch.zeros(5, 6, 10, 7)))
    assert kinds == {"conv": 4 * 10 * 7 * 3 * 9, "linear": 0, "matmul": 0}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 12), (2, 5, 12)])
def test_linear_by_hand(bias, shape):
    kinds = profiling.macs_by_kind(Bare(nn.Linear(12, 7, bias=bias)), inputs=taking(torch.zeros(shape)))
    assert kinds == {"conv": 0, "linear": math.prod(shape[1:]) * 7, "matmul": 0}


@given(
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    groups=st.integers(1, 3),
    batch=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_conv_formula(channels, kernel, size, stride, padding, groups, batch):
    inside, outside = channels[0] * groups, channels[1] * groups
    conv = nn.Conv2d(inside, outside, kernel, stride, padding, groups=groups)
    pixels = math.prod((s + 2 * padding - k) // stride + 1 for s, k in zip(size, kernel, strict=True))
    macs = profiling.count_macs(Bare(conv), inputs=taking(torch.zeros(batch, inside, *size)))
    assert macs == pixels * outside * channels[0] * math.prod(kernel)


@pytest.mark.parametrize("real", [False, True])
def test_multihead_attention_by_hand(monkeypatch, real):
    """Its fast path, taken for real numbers, would hide every product from the counter."""
    if real:
        on_real_numbers(monkeypatch)
    tokens, width = 10, 16
    attention = nn.MultiheadAttention(width, 4, batch_first=True).eval()
    x = torch.zeros(3, tokens, width)
    macs = profiling.count_macs(Bare(attention), inputs=taking(x, key=x, value=x))
    assert macs == 4 * tokens * width**2 + 2 * tokens**2 * width
    assert torch.backends.mha.get_fastpath_enabled()


def test_unet_by_hand():
    model = tiny()
    expected = hand_counted(tiny())  # another one: hooks travel with a model into its twin
    assert all(expected.values())
    assert profiling.macs_by_kind(model) == expected
    assert profiling.count_macs(model) == sum(expected.values())


def test_ddpm_cifar10():
    model = ddpm_cifar10()
    kinds = profiling.macs_by_kind(model)
    assert profiling.count_params(model) == pytest.approx(35.75e6, rel=1e-3)
    assert kinds["conv"] + kinds["linear"] == pytest.approx(6.054e9, rel=1e-3)
    # Two products in each of five blocks of 256 tokens and of one block of 16, all 256 wide.
    assert kinds["matmul"] == 2 * 256 * (5 * 256**2 + 16**2)
    assert profiling.count_macs(model) == pytest.approx(6.222e9, rel=1e-3)


def test_attention_counts_alike_where_numbers_are_real(monkeypatch):
    expected = profiling.macs_by_kind(tiny())
    on_real_numbers(monkeypatch)
    assert profiling.macs_by_kind(tiny()) == expected


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_macs_do_not_depend_on_batch_or_dtype(monkeypatch, dtype, real):
    expected = profiling.count_macs(tiny())
    if real:
        on_real_numbers(monkeypatch)
    model = tiny().to(dtype)
    inputs = profiling.example_inputs(model, batch=3)
    assert profiling.count_macs(model) == expected
    assert profiling.count_macs(model, inputs=inputs) == expected


def test_macs_of_an_edited_model():
    """The config is not believed: a pruned model has another shape than it says."""
    model = tiny()
    before = profiling.count_macs(model)
    layer = model.down_blocks[0].resnets[0]
    layer.conv1, layer.norm2 = nn.Conv2d(8, 4, 3, padding=1), nn.GroupNorm(4, 4)
    layer.time_emb_proj, layer.conv2 = nn.Linear(32, 4), nn.Conv2d(4, 8, 3, padding=1)
    assert profiling.count_macs(model) == before - 2 * 64 * 9 * 8 * 4 - 32 * 4


def test_macs_of_a_forward_that_reads_numbers():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample, timestep, return_dict):
            for _ in range(int(sample.sum().item())):
                sample = self.layer(sample)
            return (sample @ torch.zeros(4, 2),)

    model = Reads()
    inputs = Inputs(torch.full((1, 4), 0.75), torch.ones(1), {})
    model.layer.weight.data.zero_()
    assert profiling.macs_by_kind(model, inputs=inputs) == {"conv": 0, "linear": 3 * 16, "matmul": 8}
    assert profiling.macs_by_module(model, inputs=inputs) == {"layer": 3 * 16, "(own)": 8}


def test_macs_by_module_sum_to_the_total():
    model = ddpm_cifar10()
    parts = profiling.macs_by_module(model)
    assert sum(parts.values()) == profiling.count_macs(model)
    assert {"conv_in", "time_embedding", "down_blocks.0", "mid_block", "up_blocks.3", "conv_out"} <= set(parts)
    assert parts["conv_in"] == 32 * 32 * 3 * 9 * 128
    assert parts["time_embedding"] == 128 * 512 + 512 * 512


def test_counting_leaves_the_model_alone():
    model = tiny().train()
    model.mid_block.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    random = torch.get_rng_state()
    profiling.count_macs(model)
    profiling.latency({"a": model}, repeats=1, warmup=0, dtype=torch.float64)
    profiling.latency({"a": model}, repeats=1, warmup=0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]) and value.device.type == "cpu"


def test_modes_are_restored_after_an_error():
    model = tiny().train()
    with pytest.raises(RuntimeError):
        profiling.count_macs(model, inputs=Inputs(torch.zeros(1, 5, 8, 8), torch.ones(1), {}))
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "changes",
    [{"num_class_embeds": 10}, {"class_embed_type": "timestep"}, {"class_embed_type": "identity"}],
    ids=["labels", "timestep", "identity"],
)
def test_class_conditional(changes):
    model = tiny(**changes)
    inputs = profiling.example_inputs(model, batch=2)
    assert inputs.cond["class_labels"].shape[0] == 2
    with torch.no_grad():
        assert predictor(model)(*inputs, Memo()).shape == (2, 3, 8, 8)
    assert profiling.count_macs(model) >= profiling.count_macs(tiny())


def test_example_inputs_follow_the_config():
    inputs = profiling.example_inputs(tiny(sample_size=(8, 16), in_channels=5), batch=3, dtype=torch.bfloat16)
    assert inputs.sample.shape == (3, 5, 8, 16) and inputs.sample.dtype == torch.bfloat16
    assert inputs.timestep.shape == (3,) and inputs.cond == {}
    again = profiling.example_inputs(tiny(sample_size=(8, 16), in_channels=5), batch=3, dtype=torch.bfloat16)
    assert torch.equal(inputs.sample, again.sample)


def test_example_inputs_say_what_is_missing():
    with pytest.raises(ModelError, match="sample_size"):
        profiling.example_inputs(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="sample_size"):
        profiling.example_inputs(tiny(sample_size=None))

    class Prompted(UNet2DModel):
        def forward(self, sample, timestep, encoder_hidden_states):
            raise AssertionError("never called")

    with pytest.raises(ModelError, match="encoder_hidden_states"):
        profiling.example_inputs(Prompted(**tiny().config))


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert profiling.count_params(model) == 9 + 3 + 3


def test_interleave_takes_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ABC"}
    times = profiling.interleave(calls, repeats=4, warmup=2)
    assert order == list("ABC") * 6
    assert list(times) == list("ABC")
    assert all(len(found) == 4 and min(found) >= 0 for found in times.values())


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": -1}])
def test_interleave_refuses(wrong):
    with pytest.raises(HalfstepError, match="repeats"):
        profiling.interleave({}, **wrong)


def test_latency_fills_a_cost():
    models = {"wide": tiny(), "narrow": tiny(block_out_channels=(4, 8), attention_head_dim=4)}
    calls = []
    models["wide"].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    costs = profiling.latency(models, batch=2, repeats=3, warmup=1)
    assert calls[: 3 + 1] == [False] * 4
    assert list(costs) == ["wide", "narrow"]
    for name, cost in costs.items():
        assert cost.macs == profiling.count_macs(models[name])
        assert cost.params == profiling.count_params(models[name])
        assert cost.latency_ms > 0 and cost.latency_spread_ms >= 0 and cost.peak_mib > 0
        assert cost.batch == 2 and cost.dtype == "float32" and cost.threads == torch.get_num_threads()
        assert cost.device.startswith("cpu") and cost.backend == "eager"
        assert Cost.from_json(cost.to_json()) == cost


def test_latency_states_median_and_spread(monkeypatch):
    times = {"a": [1.0, 2.0, 3.0, 4.0, 100.0]}
    monkeypatch.setattr(profiling, "interleave", lambda *_, **__: times)
    cost = profiling.latency({"a": tiny()}, repeats=5)["a"]
    assert (cost.latency_ms, cost.latency_spread_ms) == (3.0, 1.0)
    times["a"] = [7.0]
    cost = profiling.latency({"a": tiny()}, repeats=1)["a"]
    assert (cost.latency_ms, cost.latency_spread_ms) == (7.0, None)


def test_latency_in_another_dtype_measures_a_copy():
    model = tiny()
    cost = profiling.latency({"a": model}, repeats=1, warmup=0, dtype=torch.bfloat16)["a"]
    assert cost.dtype == "bfloat16" and model.dtype == torch.float32


def test_latency_of_a_compiled_model():
    model = torch.compile(tiny(), backend="eager")
    cost = profiling.latency({"a": model}, repeats=1, warmup=1)["a"]
    assert cost.backend == "compile" and cost.macs == profiling.count_macs(tiny())
    with pytest.raises(ModelError, match="then compile"):
        profiling.latency({"a": model}, dtype=torch.bfloat16)


def test_peak_of_a_known_allocation():
    def call():
        held = torch.empty(3 * MIB, dtype=torch.uint8)
        for _ in range(4):  # one after the other: the peak is one of them, not four
            torch.empty(8 * MIB, dtype=torch.uint8)
        return held

    assert profiling.peak_mib(call, device="cpu") == pytest.approx(11, abs=0.1)
    assert profiling.peak_mib(lambda: None, device="cpu") == pytest.approx(0, abs=0.1)


def test_peak_ignores_what_was_held_before():
    held = [torch.zeros(MIB)]

    def call():
        held.clear()
        return torch.empty(2 * MIB, dtype=torch.uint8)

    assert profiling.peak_mib(call, device="cpu") == pytest.approx(2, abs=0.1)


def test_peak_counts_the_result():
    result = profiling.peak_mib(lambda: torch.ones(MIB) + torch.ones(MIB), device="cpu")
    assert result == pytest.approx(12, abs=0.1)


def test_peak_is_unknown_on_other_devices():
    assert profiling.peak_mib(lambda: None, device="meta") is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_on_cuda():
    assert profiling.peak_mib(lambda: torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")) == pytest.approx(64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_macs_alike_on_cuda(monkeypatch):
    expected = profiling.macs_by_kind(tiny())
    on_real_numbers(monkeypatch)
    for dtype in (torch.float32, torch.bfloat16):
        assert profiling.macs_by_kind(tiny().to("cuda", dtype)) == expected


def test_machine():
    found = machine()
    assert set(found) == {"python", "torch", "diffusers", "cpu", "cores", "threads", "cuda", "platform"}
    assert found["cpu"] and found["cores"] >= 1 and found["torch"] == torch.__version__
