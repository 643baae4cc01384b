"""SparseDM. Oracles: the dense model itself, closed forms of the gradients, the specification's MACs and toy study."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from halfstep.core.errors import ModelError
from halfstep.core.process import Process
from halfstep.core.recipe import SparseSpec, TrainSpec
from halfstep.engine.profiling import macs_by_kind
from halfstep.methods.sparse import (
    STAGES,
    Frozen,
    Masked,
    choose,
    decoupled_pull,
    pattern_at,
    permute,
    sparse_objective,
    sparsify,
)
from halfstep.nets.denoiser import Memo, predictor
from halfstep.nets.masks import Pattern, groups_of, keep_mask
from halfstep.nets.uvit import UViT2DModel
from halfstep.training.train import Batch, Diffusion, TrainState
from tiny import unet, uvit

TWO_FOUR = Pattern(2, 4)
ALL = SparseSpec(least=1)


wide = partial(unet, channels=(16, 32), attend=True, norm_num_groups=8, attention_head_dim=8)


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 1, 8, 8), torch.tensor([3, 700])[:batch]


@pytest.fixture(params=[wide, uvit])
def model(request):
    return request.param()


# --- the switch -------------------------------------------------------------------------------------------------------


def test_off_is_the_dense_model_bit_for_bit_and_on_is_a_function_of_the_weights(model):
    net, (x, t) = sparsify(model, "2:4", ALL), inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = net.predict(TWO_FOUR)(x, t, {}, Memo())
    assert torch.equal(net.predict(None)(x, t, {}, Memo()), model(x, t).sample)
    assert torch.equal(net.predict(TWO_FOUR)(x, t, {}, Memo()), first) and not torch.allclose(first, model(x, t).sample)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_baked_weights_follow_the_pattern_compute_the_same_and_do_not_change_when_baked_again(model, tmp_path):
    net, (x, t) = sparsify(model, "1:4", ALL), inputs()
    baked = net.bake(Pattern(1, 4))
    assert torch.equal(baked(x, t).sample, net.predict(Pattern(1, 4))(x, t, {}, Memo()))
    for name in net.names:
        assert (groups_of(baked.state_dict()[name], 4).count_nonzero(dim=1) == 1).all()
    again = sparsify(baked, "1:4", ALL).bake(Pattern(1, 4))
    assert all(torch.equal(a, b) for a, b in zip(baked.parameters(), again.parameters(), strict=True))
    baked.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(x, t).sample, baked(x, t).sample)
    assert net.bake(None).half().dtype == torch.float16 and sparsify(model.half()).bake(TWO_FOUR).dtype == torch.float16


# --- which layers -----------------------------------------------------------------------------------------------------


def test_every_layer_gets_a_decision_with_a_reason():
    decided = {choice.layer: choice.why for choice in choose(wide(), replace(ALL, least=300), [TWO_FOUR])}
    assert decided["conv_in"] == "its 1 inputs are no multiple of M for 2:4"
    assert decided["conv_out"] == "input or output layer"
    assert decided["time_embedding.linear_1"] == "time or class embedding"
    assert decided["down_blocks.1.resnets.0.conv1"] == "masked"
    assert decided["down_blocks.1.resnets.0.time_emb_proj"] == "time or class embedding"
    everything = choose(wide(), SparseSpec(layers="all"), [TWO_FOUR])
    assert [c.layer for c in everything if not c.masked] == ["conv_in"]


@pytest.mark.parametrize(("layers", "gmacs"), [("paper", 6.07), ("default", 5.66)])
def test_uvit_small_costs_what_the_specification_says(layers, gmacs):
    with torch.device("meta"):
        model = UViT2DModel()
    chosen = {c.layer for c in choose(model, SparseSpec(layers=layers), [TWO_FOUR]) if c.masked}
    kinds = macs_by_kind(model)
    inside = sum(_layer_macs(model, name) for name in chosen)
    assert (kinds["conv"] + kinds["linear"] - inside / 2) / 1e9 == pytest.approx(gmacs, rel=0.01)


def _layer_macs(model, name: str) -> int:
    return model.get_submodule(name).weight.numel() * 257


@pytest.mark.parametrize(
    ("spec", "patterns", "text"),
    [
        (SparseSpec(include=("nothing*",)), [TWO_FOUR], "not included"),
        (SparseSpec(include=("mid_block.*",)), [Pattern(2, 3)], "no layer to mask"),
        (SparseSpec(least=10**9), [TWO_FOUR], "change --set sparse.include"),
        (SparseSpec(include=("conv_in",)), [TWO_FOUR], "1 inputs of conv_in"),
    ],
)
def test_filters_that_leave_nothing_are_refused(spec, patterns, text):
    with pytest.raises(ModelError, match=text):
        Masked(wide(), patterns, spec)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.3])
def test_the_gradient_is_that_of_the_masked_weights_and_the_pull(model, decay):
    net, diffusion = sparsify(model, "2:4", ALL), Diffusion(Process())
    objective = sparse_objective(net, diffusion.draw, replace(ALL, decay=decay), 10)
    torch.manual_seed(5)
    for loss in objective(Batch(torch.ones(2, 1, 8, 8), {})):
        loss.backward()
    twin = net.bake(TWO_FOUR).train(model.training)  # the masked weights as weights of their own
    torch.manual_seed(5)
    diffusion.loss(predictor(twin), Batch(torch.ones(2, 1, 8, 8), {})).backward()
    theirs = dict(twin.named_parameters())
    for name, weight in model.named_parameters():
        expected = theirs[name].grad
        if name in net.names:
            expected = expected + decay * weight.detach() * ~keep_mask(weight, TWO_FOUR)
        assert torch.allclose(weight.grad, expected, rtol=1e-5, atol=1e-7), name


def test_the_pull_survives_loss_scaling():
    net = sparsify(wide(), "2:4", ALL)
    weight = dict(net.model.named_parameters())[net.names[0]]
    (2**16 * 2e-4 * net.pull(TWO_FOUR)).backward()
    assert torch.allclose(weight.grad / 2**16, 2e-4 * weight.detach() * ~keep_mask(weight, TWO_FOUR), rtol=1e-5)


def test_the_decoupled_pull_acts_after_the_step():
    net = sparsify(wide(), "2:4", ALL)
    spec = replace(ALL, decay=0.5, decoupled=True)
    optimizer = torch.optim.SGD(net.model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(decoupled_pull(net, spec, lambda: TWO_FOUR))
    before = {name: value.clone() for name, value in net.model.named_parameters()}
    optimizer.step()
    for name, weight in net.model.named_parameters():
        factor = 1 - 0.05 * ~keep_mask(before[name], TWO_FOUR) if name in net.names else 1.0
        assert torch.allclose(weight, before[name] * factor)
    losses = list(sparse_objective(net, Diffusion(Process()).draw, spec, 10)(Batch(torch.zeros(2, 1, 8, 8), {})))
    assert len(losses) == 1


def test_the_teacher_is_dense_gets_no_gradient_and_counts_by_its_weight():
    model, teacher, diffusion = wide(), wide(7).eval(), Diffusion(Process())
    net, batch = sparsify(model, "2:4", ALL), Batch(torch.zeros(2, 1, 8, 8), {})

    def losses(eta, given):
        torch.manual_seed(2)
        spec = replace(ALL, teacher=eta, decay=0.0)
        return next(iter(sparse_objective(net, diffusion.draw, spec, 10, given)(batch)))

    torch.manual_seed(2)
    noisy, timestep, target = diffusion.draw(batch.clean)
    found = net.predict(TWO_FOUR)(noisy, timestep, {}, Memo())
    plain = (found - target).square().mean()
    lesson = (found - teacher(noisy, timestep).sample).square().mean()
    assert torch.equal(losses(0.0, predictor(teacher)), losses(0.1, None))
    assert torch.allclose(losses(0.0, None), plain)
    assert torch.allclose(losses(0.4, predictor(teacher)), plain + 0.4 * lesson)
    losses(0.4, predictor(teacher)).backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_growing_sparsity_never_grows_denser_and_its_last_stage_has_its_share():
    for schedule in ("s31", "s7"):
        for share in (0.2, 0.5, 1.0):
            spec = SparseSpec(schedule=schedule, final_share=share)
            found = [pattern_at(step, 1000, spec) for step in range(1000)]
            density = [pattern.density for pattern in found]
            assert density == sorted(density, reverse=True)
            assert sum(pattern == TWO_FOUR for pattern in found) == pytest.approx(1000 * share, abs=1)
            if share == 0.2:
                firsts = [found.index(Pattern.parse(text)) for text in STAGES[schedule]]
                assert firsts == [0, 200, 400, 600, 800]
    assert pattern_at(3, 10, SparseSpec(pattern="1:4")) == Pattern(1, 4)


def test_the_moving_average_starts_again_with_every_pattern():
    model = uvit()
    state = TrainState.new(model, TrainSpec())
    net = Masked(model, [Pattern(2, 4), Pattern(3, 4), Pattern(7, 8), Pattern(15, 16), Pattern(31, 32)], ALL)
    seen = []
    spec = replace(ALL, schedule="s31", final_share=0.2)
    objective = sparse_objective(net, Diffusion(Process()).draw, spec, 10, None, state.restart_average)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    for step in range(4):
        list(objective(Batch(torch.zeros(2, 1, 8, 8), {}, step)))
        seen.append(torch.equal(state.average()["norm.weight"], model.state_dict()["norm.weight"]))
    assert seen == [False, False, True, True]


def test_the_average_is_masked_by_its_own_weights():
    net = sparsify(wide(), "2:4", ALL)
    name = net.names[0]
    a, b = net.model.state_dict()[name].clone(), wide(1).state_dict()[name]
    state = TrainState.new(net.model, TrainSpec())
    shadow = dict(zip([n for n, _ in net.model.named_parameters()], state.ema.shadow_params, strict=True))
    shadow[name].copy_((a + b) / 2)
    net.model.load_state_dict(state.average())
    baked = net.bake(TWO_FOUR).state_dict()[name]
    assert torch.equal(baked != 0, keep_mask((a + b) / 2, TWO_FOUR))


def test_a_switchable_training_draws_every_pattern_and_leaves_the_pull_out():
    net = Masked(uvit(), [TWO_FOUR, Pattern(3, 4)], ALL)
    asked = []
    predict = net.predict
    net.predict = lambda pattern: asked.append(pattern) or predict(pattern)
    spec = replace(ALL, schedule="switch", also=("3:4", "dense"))
    objective = sparse_objective(net, Diffusion(Process()).draw, spec, 10)
    torch.manual_seed(0)
    assert all(len(list(objective(Batch(torch.zeros(1, 1, 8, 8), {}, i)))) == 1 for i in range(40))
    assert set(asked) == {TWO_FOUR, Pattern(3, 4), None} and min(map(asked.count, set(asked))) > 4


def test_frozen_masks_never_change():
    model = wide()
    spec = replace(ALL, frozen=True)
    net = Frozen(model, TWO_FOUR, spec)
    masks = copy.deepcopy(net.masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    objective = sparse_objective(net, Diffusion(Process()).draw, spec, 10)
    for step in range(5):
        for loss in objective(Batch(torch.randn(2, 1, 8, 8), {}, step)):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    baked = net.bake(TWO_FOUR).state_dict()
    for name in net.names:
        assert torch.equal(net.masks[name], masks[name])
        assert not (baked[name] * ~masks[name]).any() and (baked[name] != 0).float().mean() > 0.49


# --- permutation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", [TWO_FOUR, *(pytest.param(p, marks=pytest.mark.slow) for p in (Pattern(1, 4), Pattern(2, 8)))]
)
def test_permuting_keeps_the_dense_function_and_more_magnitude(pattern):
    torch.manual_seed(0)
    nets = (uvit(), unet(0, (64, 64), attention_head_dim=32))
    for model in nets:
        net = Masked(model, [pattern], ALL)
        x, t = inputs()
        before = model(x, t).sample.detach()
        free = {name for name in net.names if name.endswith(("fc2.weight", "conv2.weight"))}
        old = {name: _kept_magnitude(model, name, pattern) for name in free}
        permute(model, net.names, pattern)
        assert torch.allclose(model(x, t).sample, before, atol=2e-5)
        new = {name: _kept_magnitude(model, name, pattern) for name in free}
        assert free and all(new[name] >= old[name] - 1e-3 for name in free)
        assert sum(new.values()) > 1.002 * sum(old.values())


def _kept_magnitude(model, name: str, pattern: Pattern) -> float:
    weight = model.get_parameter(name).detach()
    return float((weight * keep_mask(weight, pattern)).abs().sum())
