"""The continuous U-Net. Oracles: torchdiffeq, closed solutions, published sizes and MACs, plain gradients."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.core.errors import ModelError
from halfstep.engine.profiling import count_params, macs_by_kind
from halfstep.nets.continuous import (
    FIXED,
    ContinuousUNet2DModel,
    Dynamics,
    OdeBlock,
    SecondOrderDynamics,
    adaptive_solve,
    adjoint_solve,
    euler,
    midpoint,
    rk4,
    with_solver,
)
from halfstep.nets.denoiser import Memo, cond_of, copy_of, predictor
from tiny import ode_unet

RELEASED = {"mode": "released"}
NO_RES = {"mode": "released", "residual": False, "time": "stage"}
KINDS = [{}, {"order": 2}, RELEASED, NO_RES, {"mode": "released", "time": "film"}, {"time": "stage"}]


def dynamics(kind=Dynamics, channels: int = 8, dtype=torch.float64):
    torch.manual_seed(0)
    return kind(channels, lambda c: torch.nn.GroupNorm(2, c)).to(dtype)


class Counted:
    """A right-hand side that counts its calls."""

    def __init__(self, f):
        self.f, self.calls = f, 0

    def __call__(self, *given):
        self.calls += 1
        return self.f(*given)


# --- the solvers ------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["rk4", "midpoint", "euler"]), st.integers(1, 6), st.integers(0, 99))
def test_fixed_solvers_are_torchdiffeqs(name, steps, seed):
    torch.manual_seed(seed)
    weight, z = torch.randn(5, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    f = Counted(lambda z: torch.tanh(z @ weight) + z / 2)
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    theirs = torchdiffeq.odeint(lambda _, z: f(z), z, grid, method=name)[-1]
    before, f.calls = f.calls, 0
    assert torch.allclose(FIXED[name](f, z, steps), theirs, rtol=1e-12, atol=1e-12)
    assert f.calls == before == steps * {"rk4": 4, "midpoint": 2, "euler": 1}[name]


@pytest.mark.parametrize(("solve", "order"), [(euler, 1), (midpoint, 2), (rk4, 4)])
@pytest.mark.parametrize("kind", [Dynamics, SecondOrderDynamics])
def test_errors_fall_with_the_solvers_order(solve, order, kind):
    f, z = dynamics(kind), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        exact = rk4(f, z, 256)
        errors = [(solve(f, z, steps) - exact).norm() for steps in (16, 32)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("residual", [True, False])
def test_without_weights_the_solution_is_known(residual):
    block = Dynamics(4, torch.nn.InstanceNorm2d, residual).double()
    for value in block.parameters():
        torch.nn.init.zeros_(value)
    z, ln2 = torch.randn(2, 4, 3, 3, dtype=torch.float64), math.log(2)
    if residual:  # z' = z + ln 2
        one, limit = 65 / 24 * z + 41 / 24 * ln2, math.e * z + (math.e - 1) * ln2
    else:
        one = limit = z + ln2
    with torch.no_grad():
        assert (rk4(block, z, 1) - one).abs().max() < 1e-12
        assert (rk4(block, z, 64) - limit).abs().max() < 1e-7
        assert (adaptive_solve(block, z, 1e-9) - limit).abs().max() < 1e-7


def test_second_order_means_that_the_position_moves_with_the_velocity():
    f, z = dynamics(SecondOrderDynamics), torch.randn(2, 8, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        change = f(z)
    assert torch.equal(change[:, :4], z[:, 4:]) and (change[:, 4:] < 0).any() and (change[:, 4:] > 0).any()
    omega = 2.0
    f.acceleration = lambda z, film: -(omega**2) * z[:, :4]
    position = z[:, :4] * math.cos(omega) + z[:, 4:] / omega * math.sin(omega)
    assert (rk4(f, z, 64)[:, :4] - position).abs().max() < 1e-6


def test_film_scales_and_shifts_the_second_norm():
    f, z = dynamics(), torch.randn(2, 8, 3, 3, dtype=torch.float64)
    scale, shift = torch.randn(2, 2, 8, 1, 1, dtype=torch.float64)
    h = f.norm2(F.softplus(f.conv1(f.norm1(z)))) * (1 + scale) + shift
    assert torch.allclose(f(z, (scale, shift)), F.softplus(f.conv2(h)) + z)
    assert torch.allclose(f(z, (0 * scale, 0 * shift)), f(z))


def test_only_adaptive_steps_answer_to_the_tolerance():
    z = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    counts, ends = [], []
    for tolerance in (1e-3, 1e-6):
        f = Counted(dynamics())
        with torch.no_grad():
            ends.append(adaptive_solve(f, z, tolerance))
            counts.append(f.calls)
            theirs = torchdiffeq.odeint(
                lambda _, z, f=f: f(z), z, torch.tensor([0.0, 1.0]), method="rk4", rtol=tolerance, atol=tolerance
            )[-1]
            assert f.calls == counts[-1] + 4 and torch.allclose(theirs, rk4(f, z, 1), rtol=1e-12)
    assert counts[0] < counts[1] and not torch.equal(*ends)
    with torch.no_grad():
        assert torch.allclose(ends[1], rk4(dynamics(), z, 64), atol=1e-4)


def adjoint_gap(f: Dynamics, steps: int) -> float:
    """Relative distance of the adjoint's gradient to the exact one, over the state, FiLM and every weight."""
    z = torch.randn(2, 8, 8, 8, dtype=torch.float64, requires_grad=True)
    film = [torch.randn(2, 8 // f.order, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    used, found = [*f.parameters(), *film], []
    for end in (rk4(lambda z: f(z, film), z, steps), adjoint_solve(lambda z: f(z, film), z, steps, used)):
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(end.square().mean(), [z, *used])]))
    return float((found[0] - found[1]).norm() / found[0].norm())


def test_the_adjoints_gradient_is_close_to_the_exact_one_but_for_one_step_with_norms():
    torch.manual_seed(0)
    smooth = Dynamics(8, lambda _: torch.nn.Identity(), residual=False).double()
    assert adjoint_gap(smooth, 1) < 1e-3 and adjoint_gap(smooth, 4) < 1e-5
    assert adjoint_gap(dynamics(SecondOrderDynamics), 1) < 5e-2 and adjoint_gap(dynamics(SecondOrderDynamics), 4) < 1e-4
    assert adjoint_gap(dynamics(), 4) < 1e-3
    assert adjoint_gap(dynamics(), 1) > 0.1  # why it is not the default


def test_no_sample_sees_its_batch_mates_unless_the_steps_adapt():
    f, z = dynamics(), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    other = torch.stack([z[0], 30 * z[1]])
    with torch.no_grad():
        assert torch.equal(rk4(f, z, 2)[0], rk4(f, other, 2)[0])
        gap = (adaptive_solve(f, z, 1e-3)[0] - adaptive_solve(f, other, 1e-3)[0]).abs().max()
    assert gap > 0


def test_without_torchdiffeq_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ModelError, match="pip install torchdiffeq"):
        ode_unet(solver="dopri5")(torch.zeros(1, 1, 8, 8), 3)
    ode_unet()(torch.zeros(1, 1, 8, 8), 3)


# --- the network ------------------------------------------------------------------------------------------------------

UNET = 35_710_339  # the published baseline


@pytest.mark.parametrize(
    ("config", "params"),
    [
        (RELEASED, 8_811_875),
        (RELEASED | {"attention_levels": ()}, 8_548_707),
        (RELEASED | {"attention_levels": (1, 3, 4)}, 9_140_835),
        (NO_RES, 6_138_083),
        (NO_RES | {"attention_levels": ()}, 5_874_915),
        (RELEASED | {"time": "film"}, 9_312_483),
        ({}, 9_318_131),
        ({"order": 2}, 4_029_363),
    ],
)
def test_published_sizes(config, params):
    with torch.device("meta"):
        model = ContinuousUNet2DModel(sample_size=64, **config)
    assert count_params(model) == params
    assert params / UNET <= (0.25 if config in (RELEASED, NO_RES, {"order": 2}) else 0.27)


@pytest.mark.parametrize(
    ("config", "gmacs", "within"),
    [
        (RELEASED, 2.823, 0.003),
        (RELEASED | {"attention_levels": (1, 3, 4)}, 2.894, 0.003),
        (NO_RES, 1.62, 0.01),
        (RELEASED | {"solver_steps": 2}, 5.54, 0.03),
        ({}, 2.82, 0.02),
        ({"solver_steps": 2}, 5.54, 0.03),
    ],
)
def test_published_macs(config, gmacs, within):
    assert macs_by_kind(ContinuousUNet2DModel(sample_size=64, **config))["conv"] / 1e9 == pytest.approx(
        gmacs, abs=within
    )


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_nine_blocks_are_evaluated_four_times_a_step(steps):
    model, calls = ode_unet(sample_size=16, levels=4), []
    blocks = [module for module in model.modules() if isinstance(module, OdeBlock)]
    for block in blocks:
        block.dynamics.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(1, 1, 16, 16), 3, solver_steps=steps)
    assert len(blocks) == 9 and len(calls) == 36 * steps


def test_halving_is_bilinear_resizing():
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(F.avg_pool2d(x, 2), F.interpolate(x, scale_factor=0.5, mode="bilinear"), atol=1e-6)


def test_attention_is_softmax_of_scaled_products_of_normed_pixels():
    attention = ode_unet().up[0].attention
    x = torch.randn(2, 16, 3, 3)
    normed = x / x.square().mean(1, keepdim=True).sqrt() * attention.gain
    q, k, v = (part.reshape(2, 4, 4, 9) for part in attention.qkv(normed).chunk(3, dim=1))
    weights = (q.mT @ k / 2).softmax(-1)
    expected = attention.out((weights @ v.mT).mT.reshape(2, 16, 3, 3))
    assert torch.allclose(attention(x), expected, atol=1e-5)


@pytest.mark.parametrize(("config", "adds"), [({}, True), (RELEASED, False)])
def test_attention_is_added_in_paper_mode_and_replaces_in_released_mode(config, adds):
    model = ode_unet(**config)
    block, z, e = model.middle, torch.randn(1, 32, 2, 2), torch.randn(1, 16)
    assert block.attention is None and model.down[1].attention is not None and model.down[0].attention is None
    block = model.down[1]
    z = torch.randn(1, 16, 4, 4)
    found, block.attention = block(z, e, 1, "rk4"), None
    end = block(z, e, 1, "rk4")
    attention = model.up[0].attention
    block.attention = attention
    assert torch.allclose(block(z, e, 1, "rk4"), attention(end) + end * adds, atol=1e-5)
    assert found.shape == end.shape


def distance(model: ContinuousUNet2DModel, a, b, **kwargs) -> float:
    with torch.no_grad():
        one, other = model(*a, **kwargs).sample, model(*b, **kwargs).sample
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize("config", KINDS)
def test_only_the_released_network_is_blind_to_the_timestep(config):
    model = ode_unet(sample_size=32, in_channels=3, out_channels=3, levels=4, time_embed_dim=256, **config)
    x = torch.randn(2, 3, 32, 32)
    gap = distance(model, (x, 5), (x, 900))
    assert gap == 0 if config == RELEASED else gap > 1e-2


@pytest.mark.parametrize("order", [1, 2])
def test_only_the_released_network_is_blind_to_the_images_scale_and_mean(order):
    x = torch.randn(2, 3, 32, 32)
    wide = {"sample_size": 32, "in_channels": 3, "out_channels": 3, "levels": 4, "base_channels": 16}
    released, paper = ode_unet(**wide, **RELEASED), ode_unet(**wide, order=order)
    for changed in (3 * x, x + 0.7):
        assert distance(released, (x, 5), (changed, 5)) < 1e-3
        assert distance(paper, (x, 5), (changed, 5)) > 1e-2


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7, 7])])
@pytest.mark.parametrize("config", [{}, NO_RES])
def test_a_timestep_may_be_a_number_or_a_tensor(timestep, config):
    model, x = ode_unet(**config), torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x, timestep).sample, model(x, torch.tensor([7, 7])).sample)
    assert not torch.allclose(model(x, timestep).sample, model(x, 8).sample)


@pytest.mark.parametrize("order", [1, 2])
def test_labels_change_the_output_and_are_asked_for(order):
    model, x = ode_unet(num_class_embeds=3, order=order), torch.randn(2, 1, 8, 8)
    a, b = (model(x, 5, torch.tensor([c, c])).sample for c in (0, 1))
    assert not torch.allclose(a, b)
    mixed = model(x, 5, torch.tensor([0, 1])).sample
    assert torch.allclose(mixed, torch.stack([a[0], b[1]]), atol=1e-4)
    with pytest.raises(ModelError, match="labels"):
        model(x, 5)
    with pytest.raises(ModelError, match="labels"):
        ode_unet()(x, 5, torch.tensor([0, 0]))


@pytest.mark.parametrize("config", KINDS)
def test_it_saves_and_loads_as_a_diffusers_model(tmp_path, config):
    model, x = ode_unet(**config, solver_steps=2), torch.randn(2, 1, 8, 8)
    model.save_pretrained(tmp_path)
    again = ContinuousUNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(again(x, 3).sample, model(x, 3).sample)
    assert again(x, 3, return_dict=False)[0].shape == x.shape and again.config.solver_steps == 2


@pytest.mark.parametrize("config", [*KINDS, {"num_class_embeds": 3, "solver_steps": 2}])
def test_gradient_checkpointing_changes_no_gradient(config):
    model, x, labels = ode_unet(**config).train(), torch.randn(2, 1, 8, 8), None
    if "num_class_embeds" in config:
        labels = torch.tensor([0, 2])
    again = copy_of(model)
    again.enable_gradient_checkpointing()
    for one in (model, again):
        one(x, 9, labels).sample.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        if a.requires_grad:
            assert a.grad is not None and torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), name
        else:
            assert name == "table.weight"


def test_the_head_starts_at_zero_where_not_told_otherwise():
    model = ode_unet(zero_head=True)
    assert not model(torch.randn(2, 1, 8, 8), 5).sample.any()


@pytest.mark.parametrize(
    ("config", "sizes"),
    [({"levels": 4}, (16, 32, 64)), ({"levels": 4, "order": 2}, (16, 32, 64)), (RELEASED | {"levels": 4}, (32, 64))],
)
def test_sizes_that_fit_are_taken(config, sizes):
    model = ode_unet(**(config | {"sample_size": 32}))
    for size in sizes:
        assert model(torch.randn(1, 1, size, size), 5).sample.shape == (1, 1, size, size)
    for size in (24, 33, *({16} - set(sizes))):
        with pytest.raises(ModelError, match=f"{size}x{size}.*fewer levels"):
            model(torch.randn(1, 1, size, size), 5)


@pytest.mark.parametrize("base", [2, 4, 6, 10, 14])
@pytest.mark.parametrize("order", [1, 2])
def test_norm_groups_adapt_to_small_widths(base, order):
    model = ode_unet(base_channels=base, order=order)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert all(norm.num_channels >= 2 * norm.num_groups and norm.num_groups <= 8 for norm in norms)
    assert model(torch.randn(1, 1, 4, 4), 5).sample.isfinite().all()  # one pixel in the bottleneck


@pytest.mark.parametrize(
    "config",
    [
        {"sample_size": 10}, {"sample_size": 0}, {"levels": 0}, {"base_channels": 5}, {"base_channels": 0},
        {"norm_num_groups": 0}, {"time_embed_dim": 15}, {"order": 3}, {"mode": "other"}, {"time": "other"},
        {"attention_levels": (3,)}, {"attention_levels": (-1,)}, {"solver_steps": 0}, {"solver_steps": 1.5},
        {"solver": "heun"}, {"order": 2, "mode": "released"}, {"order": 2, "residual": False},
        {"mode": "released", "num_class_embeds": 3}, {"time": "none", "num_class_embeds": 3},
        {"mode": "released", "sample_size": 4},
    ],
)  # fmt: skip
def test_configs_that_do_not_fit_are_refused(config):
    with pytest.raises(ModelError, match="change the model's config") as found:
        ode_unet(**config)
    assert "\n" not in str(found.value)


# --- steps at run time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", KINDS)
def test_no_weight_depends_on_the_steps(config):
    one, x = ode_unet(**config), torch.randn(2, 1, 8, 8)
    four = ode_unet(**config, seed=1, solver_steps=4)
    four.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(four(x, 3).sample, one(x, 3, solver_steps=4).sample)
        assert torch.equal(four(x, 3, solver_steps=1).sample, one(x, 3).sample)
        assert not torch.equal(four(x, 3).sample, one(x, 3).sample)
        with pytest.raises(ModelError, match="solver_steps 0"):
            one(x, 3, solver_steps=0)


@pytest.mark.parametrize("order", [1, 2])
def test_more_steps_come_closer_to_the_adaptive_solution(order):
    model, x = ode_unet(order=order).double(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        exact = model(x, 3, solver_steps=64).sample
        gaps = [float((model(x, 3, solver_steps=n).sample - exact).norm() / exact.norm()) for n in (1, 2, 4, 8)]
        adaptive = with_solver(model, 1, "dopri5")(x, 3).sample
    assert all(a > 4 * b for a, b in itertools.pairwise(gaps))
    assert (adaptive - exact).norm() < 1e-3 * exact.norm()


def test_the_blocks_of_a_twin_count_as_its_own():
    costs = [macs_by_kind(with_solver(ode_unet(), steps))["conv"] for steps in (1, 2, 4)]
    assert costs[2] - costs[1] == 2 * (costs[1] - costs[0]) > 0


def test_twins_share_every_weight_and_its_gradient():
    model, x = ode_unet(num_class_embeds=2), torch.randn(2, 1, 8, 8)
    labels = torch.tensor([0, 1])
    four = with_solver(model, 4)
    assert (four.config.solver_steps, model.config.solver_steps, four.training) == (4, 1, False)
    assert {id(p) for p in four.parameters()} == {id(p) for p in model.parameters()}
    assert torch.equal(predictor(four)(x, 3, cond_of(labels), Memo()), model(x, 3, labels, solver_steps=4).sample)
    four(x, 3, labels).sample.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert with_solver(four, 2, "euler").config.solver == "euler" and with_solver(model, 2).config.solver == "rk4"
    with pytest.raises(ModelError, match="solver_steps 0"):
        with_solver(model, 0)


@pytest.mark.parametrize("order", [1, 2])
def test_the_adjoint_trains_the_whole_network(order):
    model, x = ode_unet(order=order, num_class_embeds=2).double(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    found = []
    for solver in ("rk4", "adjoint"):
        model.zero_grad()
        with_solver(model, 8, solver)(x, 3, torch.tensor([0, 1])).sample.square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (found[0] - found[1]).norm() < 1e-3 * found[0].norm()


@pytest.mark.parametrize(
    ("config", "counts"),
    [({}, (2, 1, 4)), *(pytest.param(config, (2,), marks=pytest.mark.slow) for config in KINDS[1:])],
)
def test_it_compiles_as_one_graph(config, counts):
    model, x, timestep = ode_unet(**config, levels=1), torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for steps in counts:
            expected = model(x, timestep, solver_steps=steps).sample
            assert torch.allclose(compiled(x, timestep, solver_steps=steps).sample, expected, atol=1e-5)
