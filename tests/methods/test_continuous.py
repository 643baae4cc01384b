"""Training a continuous U-Net for several step counts. Oracles: the losses written out, plain gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from halfstep.core.errors import ModelError
from halfstep.core.process import Process
from halfstep.methods.continuous import continuous_objective
from halfstep.nets.denoiser import cond_of, predictor
from halfstep.training.train import Batch, Diffusion
from tiny import ode_unet


class Spy(torch.nn.Module):
    """Notes what a model is asked, and answers with its weight."""

    def __init__(self):
        super().__init__()
        self.weight, self.asked = torch.nn.Parameter(torch.tensor(0.5)), []

    def forward(self, sample, timestep, class_labels=None, solver_steps=None, return_dict=True):
        self.asked.append((sample, timestep, class_labels, solver_steps))
        return (self.weight.expand_as(sample),)


def test_every_step_count_is_drawn_and_the_noise_does_not_depend_on_it():
    draw, labels = Diffusion(Process()).draw, torch.tensor([1, 0])
    batch, spies = Batch(torch.randn(2, 1, 8, 8), cond_of(labels)), (Spy(), Spy())
    for spy, steps in zip(spies, ((1, 2, 4), (1,)), strict=True):
        objective = continuous_objective(spy, draw, steps)
        torch.manual_seed(0)
        for _ in range(60):
            assert len(list(objective(batch))) == 1
    several, one = (spy.asked for spy in spies)
    counts = [[asked[3] for asked in several].count(n) for n in (1, 2, 4)]
    assert sum(counts) == 60 and min(counts) >= 10 and {asked[3] for asked in one} == {1}
    for a, b in zip(several, one, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] is labels


def test_the_loss_is_the_noise_loss_plus_the_weighted_distance_to_the_teacher():
    model, teacher, diffusion = ode_unet(), ode_unet(seed=3, order=2), Diffusion(Process())
    batch = Batch(torch.randn(2, 1, 8, 8), {})
    found = []
    for args in ((), (predictor(teacher), 0.0), (predictor(teacher), 0.5)):
        torch.manual_seed(4)
        found += continuous_objective(model, diffusion.draw, (2,), *args)(batch)
    torch.manual_seed(4)
    noisy, timestep, target = diffusion.draw(batch.clean)
    ours, lesson = model(noisy, timestep, solver_steps=2).sample, teacher(noisy, timestep).sample
    assert torch.allclose(found[0], F.mse_loss(ours, target)) and torch.equal(found[0], found[1])
    assert torch.allclose(found[2], found[0] + 0.5 * F.mse_loss(ours, lesson))
    found[2].backward()
    assert all(p.grad is None for p in teacher.parameters()) and model.head.weight.grad.any()


@pytest.mark.parametrize("steps", [(), (1, 0)])
def test_step_counts_that_mean_nothing_are_refused(steps):
    with pytest.raises(ModelError, match="step"):
        continuous_objective(ode_unet(), Diffusion(Process()).draw, steps)


def two_classes(count: int, seed: int) -> Batch:
    """Bright discs on dark ground and dark bars on bright ground, 16x16, a little shifted."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    shift = torch.randint(-3, 4, (2, count, 1, 1), generator=generator)
    y, x = torch.arange(16)[:, None] - 8 - shift[0], torch.arange(16)[None] - 8 - shift[1]
    disc, bar = (x**2 + y**2 < 16).float(), 1 - (x.abs() < 2).float().expand(count, 16, 16)
    images = torch.where(labels[:, None, None] == 0, disc, bar)
    return Batch(2 * images[:, None] - 1, cond_of(labels))


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
def test_it_learns_and_needs_to_know_the_timestep(order):
    model = ode_unet(order=order, sample_size=16, attention_levels=(), zero_head=True, num_class_embeds=2).train()
    diffusion = Diffusion(Process())
    objective = continuous_objective(model, diffusion.draw, (1,))
    adam, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for step in range(80):
        (loss,) = objective(two_classes(16, step))
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    held = two_classes(128, 999)
    noisy, timestep, target = diffusion.draw(held.clean)
    with torch.no_grad():
        told = F.mse_loss(model(noisy, timestep, **held.cond).sample, target)
        frozen = [F.mse_loss(model(noisy, t, **held.cond).sample, target) for t in (100, 300, 500, 700, 900)]
    assert min(frozen) > told and sum(frozen) / 5 > 1.03 * told
