"""A continuous U-Net, whose stages are solves of an ordinary differential equation (ODE): the net of The Missing U.

Paper: The Missing U for Efficient Diffusion Models, Calvo-Ordonez et al., TMLR 2024, arXiv 2310.20092. Its training is
in `methods/continuous.py`.

Implemented: the U-Net of dynamic blocks. A block carries its state z over the unit time of z' = f(z, e), where f is two
convolutions with norms and e, the embedding of the diffusion step, scales and shifts in between (FiLM). One set of
weights serves any number of solver steps, so the steps are chosen at run time.

What differs, and why:
- `mode="paper"`, the default, is what the text says; the released code (Sergio20f/cDDPM) says otherwise in three
  points, which `mode="released"` reproduces: it drops the timestep, its instance norms erase the image's scale and mean
  (so it cannot know the noise level in any way), and its attention replaces the state where U-Nets add to it.
- Neither is of second order: position and velocity are mixed freely. `order=2` is: z = [x; v], x' = v, v' = f(z, e),
  with 3/8 of the convolution weights. The stem gives it x from the image and v from a small net of x, and every 1x1
  convolution between stages makes a new pair.
- The sinusoid has the usual exponents (the released table doubles them) and is computed, not stored. Only the released
  modes that never had FiLM keep the table of 256,000 frozen numbers, which the published sizes count.
- The head starts at zero: a stack of first-order solves would start with outputs of size 5 to 10, for a target of 1.
- The released solver is one step of the 3/8 rule, whatever tolerance is asked for. Here it is written out, compiles as
  one graph, and takes any number of steps. torchdiffeq is needed only for `solver` "adjoint" and "dopri5", which are
  for analysis: backpropagation through the steps is exact, and faster than the adjoint at so few of them. One adjoint
  step back through z' = z + ... evaluates f where z has cancelled, so the norms see remains: a quarter off (measured).
- Left out: ODE time as an extra channel of f (off in the released code), damping in the second-order equation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.nets.denoiser import require_config, require_labels

# --------------------------------------------------------------------------------------------------------- the solvers

Field = Callable[[torch.Tensor], torch.Tensor]
"""The right-hand side f of z' = f(z): a state to its change per unit of time, same shape."""


def rk4(f: Field, z: torch.Tensor, steps: int) -> torch.Tensor:
    """z(1) from z(0) = z in `steps` equal steps of Kutta's 3/8 rule: order 4, four evaluations of f a step.

    z <- z + h (k1 + 3 k2 + 3 k3 + k4) / 8, with k1 = f(z), k2 = f(z + h k1 / 3), k3 = f(z + h (k2 - k1 / 3)) and
    k4 = f(z + h (k1 - k2 + k3)).
    """
    h = 1 / steps
    for _ in range(steps):  # add(k, alpha=h) is z + h k in one pass over memory
        k1 = f(z)
        k2 = f(z.add(k1, alpha=h / 3))
        k3 = f(z.add(k2, alpha=h).sub(k1, alpha=h / 3))
        k4 = f(z.add(k1 - k2 + k3, alpha=h))
        z = z.add(k1 + k4, alpha=h / 8).add(k2 + k3, alpha=3 * h / 8)
    return z


def midpoint(f: Field, z: torch.Tensor, steps: int) -> torch.Tensor:
    """As `rk4`, of order 2, with two evaluations a step."""
    h = 1 / steps
    for _ in range(steps):
        z = z + h * f(z + h / 2 * f(z))
    return z


def euler(f: Field, z: torch.Tensor, steps: int) -> torch.Tensor:
    """As `rk4`, of order 1, with one evaluation a step."""
    for _ in range(steps):
        z = z + f(z) / steps
    return z


def adjoint_solve(f: Field, z: torch.Tensor, steps: int, params: Sequence[torch.Tensor]) -> torch.Tensor:
    """As `rk4`, but the gradient comes from the adjoint ODE, solved backwards in as many steps: memory does not grow
    with them. `params`: every tensor but z that f uses and that wants a gradient."""
    grid = {"step_size": 1 / steps}
    span = torch.tensor([0.0, 1.0], device=z.device)
    found = _torchdiffeq().odeint_adjoint(
        lambda _, z: f(z), z, span, method="rk4", options=grid, adjoint_options=grid, adjoint_params=tuple(params)
    )
    return found[-1]


def adaptive_solve(f: Field, z: torch.Tensor, tolerance: float = 1e-5) -> torch.Tensor:
    """z(1) by dopri5, which chooses its steps for the whole batch by this relative and absolute tolerance."""
    span = torch.tensor([0.0, 1.0], device=z.device)
    return _torchdiffeq().odeint(lambda _, z: f(z), z, span, method="dopri5", rtol=tolerance, atol=tolerance)[-1]


def _torchdiffeq() -> Any:
    try:
        import torchdiffeq
    except ImportError as error:
        raise ModelError(
            got="no torchdiffeq",
            expected="it, for the adjoint and for adaptive steps",
            where="continuous solver",
            do="pip install torchdiffeq, or choose rk4, midpoint or euler",
        ) from error
    return torchdiffeq


FIXED = {"rk4": rk4, "midpoint": midpoint, "euler": euler}
"""The solvers that need nothing but torch; of one set of weights, each makes another denoiser."""

Solver = Literal["rk4", "midpoint", "euler", "adjoint", "dopri5"]


# ---------------------------------------------------------------------------------------------------------- the blocks


class Dynamics(nn.Module):
    """The right-hand side of first order: state [B, c, H, W], FiLM's (scale, shift) [B, c, 1, 1] -> its change, as z.

    f(z) = z + softplus(conv2(h (1 + scale) + shift)), h = norm2(softplus(conv1(norm1(z)))): smooth, as solvers want it.
    `residual=False` is the released ablation "no res-blocks": nothing is added, and the second kernel is 1x1.
    """

    order = 1

    def __init__(self, channels: int, norm: Callable[[int], nn.Module], residual: bool = True):
        super().__init__()
        inner, kernel = channels // self.order, 3 if residual else 1
        self.residual = residual
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, inner, 3, padding=1)
        self.norm2, self.conv2 = norm(inner), nn.Conv2d(inner, inner, kernel, padding=kernel // 2)

    def hidden(self, z: torch.Tensor, film: Sequence[torch.Tensor]) -> torch.Tensor:
        h = self.norm2(F.softplus(self.conv1(self.norm1(z))))
        return h * (1 + film[0]) + film[1] if film else h

    def forward(self, z: torch.Tensor, film: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        h = F.softplus(self.conv2(self.hidden(z, film)))
        return z + h if self.residual else h


class SecondOrderDynamics(Dynamics):
    """The same of second order, z = [x; v] with c/2 channels each: x'' = a(x, x'), so z' = [v; a(z)].

    a(z) = conv2(softplus(h (1 + scale) + shift)), h as above: no softplus at the end, as accelerations have both signs.
    """

    order = 2

    def acceleration(self, z: torch.Tensor, film: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        return self.conv2(F.softplus(self.hidden(z, film)))

    def forward(self, z: torch.Tensor, film: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        return torch.cat([z.chunk(2, dim=1)[1], self.acceleration(z, film)], dim=1)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the pixels, after a norm of every pixel's channels. [B, C, H, W] -> same."""

    def __init__(self, channels: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * heads * head_dim, 1, bias=False)
        self.out = nn.Conv2d(heads * head_dim, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.normalize(x, dim=1) * self.gain * x.shape[1] ** 0.5
        q, k, v = self.qkv(normed).flatten(2).unflatten(1, (3, self.heads, -1)).mT.unbind(1)
        return self.out(F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2).unflatten(2, x.shape[2:]))


class OdeBlock(nn.Module):
    """One stage: z(0) [B, c, H, W] and embedding [B, e] (or None) -> z(1), then attention where the stage has it.

    z(1) = z(0) + integral over tau from 0 to 1 of f(z(tau), e), whose FiLM is (scale, shift) = Linear(silu(e)).
    `time`: "film" (scale and shift inside the equation), "stage" (an MLP of the embedding is added to z(0)) or "none".
    """

    def __init__(
        self, channels: int, dynamics: Dynamics, time: str, embed: int, attention: nn.Module | None, add: bool
    ):
        super().__init__()
        self.dynamics, self.attention, self.add = dynamics, attention, add
        self.film = nn.Linear(embed, 2 * channels // dynamics.order) if time == "film" else None
        self.stage = None
        if time == "stage":
            self.stage = nn.Sequential(nn.Linear(embed, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, z: torch.Tensor, embedding: torch.Tensor | None, steps: int, solver: Solver) -> torch.Tensor:
        film: tuple[torch.Tensor, ...] = ()
        if self.film is not None and embedding is not None:  # constant in ODE time: computed once
            film = self.film(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        if self.stage is not None and embedding is not None:
            z = z + self.stage(embedding)[:, :, None, None]
        f = partial(self.dynamics, film=film)
        if solver == "adjoint":
            z = adjoint_solve(f, z, steps, [*self.dynamics.parameters(), *film])
        elif solver == "dopri5":
            z = adaptive_solve(f, z)
        else:
            z = FIXED[solver](f, z, steps)
        if self.attention is None:
            return z
        return z + self.attention(z) if self.add else self.attention(z)


class Stem(nn.Module):
    """The state from the noisy image, [B, C, S, S] -> [B, 2 nf, S, S]: position, then velocity as a net of it.

    The image is never normalised, so that its scale, which tells the noise, gets through.
    """

    def __init__(self, in_channels: int, base: int):
        super().__init__()
        self.position = nn.Conv2d(in_channels, base, 3, padding=1)
        self.norm, self.velocity = nn.GroupNorm(1, base), nn.Conv2d(base, base, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        position = self.position(x)
        return torch.cat([position, self.velocity(F.softplus(self.norm(position)))], dim=1)


def _released_stem(in_channels: int, base: int) -> nn.Module:
    first = [nn.InstanceNorm2d(in_channels), nn.Conv2d(in_channels, base, 3, padding=1), nn.Softplus()]
    return nn.Sequential(*first, nn.InstanceNorm2d(base), nn.Conv2d(base, 2 * base, 1), nn.Softplus())


def _released_table(dim: int) -> nn.Embedding:
    """Frozen sines and cosines of 1000 timesteps, at the released frequencies 10000^(-4k/dim)."""
    angles = torch.arange(1000.0)[:, None] * 10000.0 ** (-4 * torch.arange(dim // 2) / dim)
    return nn.Embedding.from_pretrained(torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1))


def _norm(channels: int, most: int) -> nn.Module:
    """Group norm with at most `most` groups of at least two channels: one channel at one pixel has no variance."""
    return nn.GroupNorm(math.gcd(most, channels // 2), channels)


# --------------------------------------------------------------------------------------------------------- the network


class ContinuousUNet2DModel(ModelMixin, ConfigMixin):
    """sample [B, in_channels, S, S], timestep (a number, 0-dim or [B]), class_labels int [B] -> .sample [B, out, S, S].

    `base_channels`: nf, even; the state has 2 nf * 2^i channels at level i. `levels`: how often S halves.
    `attention_levels`: levels whose encoder and decoder stage get attention; `levels` itself is the bottleneck. None:
    the deepest, published as "2 attention"; (1, 3, 4) is "5 attention", () is none.
    `order`, `mode`: see this module's head. `time`: how the embedding gets in, None for the mode's own ("film" in
    "paper", "none" in "released"). `residual=False` with `time="stage"`: the released "no res-blocks".
    `norm_num_groups`: at most so many groups, fewer for widths that they do not divide.
    `solver_steps`, `solver`: no weight depends on them, see `with_solver`. `zero_head`: begin with output 0.
    Raises ModelError for sizes, channels and choices that do not fit together.
    There are as many parameters as fields of the config, because diffusers' `register_to_config` makes it from them.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["OdeBlock"]  # noqa: RUF012 (diffusers' own way to say it)

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        base_channels: int = 16,
        levels: int = 4,
        attention_levels: tuple[int, ...] | None = None,
        order: Literal[1, 2] = 1,
        mode: Literal["paper", "released"] = "paper",
        time: Literal["film", "stage", "none"] | None = None,
        residual: bool = True,
        time_embed_dim: int = 256,
        num_class_embeds: int | None = None,
        norm_num_groups: int = 8,
        num_heads: int = 4,
        attention_head_dim: int = 32,
        solver_steps: int = 1,
        solver: Solver = "rk4",
        zero_head: bool = True,
    ):
        super().__init__()
        _check(self.config)
        released = mode == "released"
        time = time or ("none" if released else "film")
        sites = (levels - 1,) if attention_levels is None else attention_levels
        norm = nn.InstanceNorm2d if released else partial(_norm, most=norm_num_groups)
        widths = [2 * base_channels * 2**i for i in range(levels + 1)]

        def stage(level: int) -> OdeBlock:
            channels = widths[level]
            kind = SecondOrderDynamics if order == 2 else Dynamics
            attention = SelfAttention(channels, num_heads, attention_head_dim) if level in sites else None
            return OdeBlock(channels, kind(channels, norm, residual), time, time_embed_dim, attention, not released)

        self.gradient_checkpointing = False
        self.table = _released_table(time_embed_dim) if released and time != "film" else None
        self.timed = time != "none"
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, time_embed_dim)
        pairs = list(itertools.pairwise(widths))
        self.stem = (_released_stem if released else Stem)(in_channels, base_channels)
        self.down = nn.ModuleList(stage(i) for i in range(levels))
        self.widen = nn.ModuleList(nn.Conv2d(here, below, 1) for here, below in pairs)
        self.middle = stage(levels)
        self.narrow = nn.ModuleList(nn.Conv2d(here + below, here, 1) for here, below in reversed(pairs))
        self.up = nn.ModuleList(stage(i) for i in reversed(range(levels)))
        self.head = nn.Conv2d(widths[0], out_channels, 1)
        if zero_head:
            _zero(self.head)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        solver_steps: int | None = None,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """`solver_steps`: of every block in this call; None for the config's."""
        config: Any = self.config
        steps = config.solver_steps if solver_steps is None else solver_steps
        _check_call(sample, class_labels, steps, config)
        embedding = self._embed(sample, timestep, class_labels)
        z, skips = self.stem(sample), []
        for block, widen in zip(self.down, self.widen, strict=True):
            z = self._run(block, z, embedding, steps)
            skips.append(z)
            z = F.avg_pool2d(F.softplus(widen(z)), 2)  # which is bilinear resizing by 1/2
        z = self._run(self.middle, z, embedding, steps)
        for block, narrow in zip(self.up, self.narrow, strict=True):
            z = F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=False)
            z = F.softplus(narrow(torch.cat([z, skips.pop()], dim=1)))
            z = self._run(block, z, embedding, steps)
        out = self.head(z)
        return UNet2DOutput(sample=out) if return_dict else (out,)

    def _embed(self, sample: torch.Tensor, timestep: Any, class_labels: torch.Tensor | None) -> torch.Tensor | None:
        if not self.timed:
            return None
        config: Any = self.config
        steps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        if self.table is None:
            found = get_timestep_embedding(steps, config.time_embed_dim, downscale_freq_shift=0)
        else:
            found = self.table(steps.long())
        found = found.to(sample.dtype)
        return found if class_labels is None else found + self.class_embedding(class_labels)

    def _run(self, block: nn.Module, z: torch.Tensor, embedding: torch.Tensor | None, steps: int) -> torch.Tensor:
        solver = self.config.solver
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, z, embedding, steps, solver)
        return block(z, embedding, steps, solver)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _check(config: Any) -> None:
    require = partial(require_config, where="ContinuousUNet2DModel")
    size, base, levels, side = config.sample_size, config.base_channels, config.levels, 2**config.levels
    require(levels >= 1, f"{levels} levels", "at least 1")
    require(size >= side and size % side == 0, f"size {size}", f"a multiple of {side} (halved {levels} times)")
    require(base >= 2 and base % 2 == 0, f"{base} base channels", "an even number above 0, for groups of two channels")
    require(config.norm_num_groups >= 1, f"{config.norm_num_groups} norm groups", "at least 1")
    require(config.time_embed_dim % 2 == 0, f"time_embed_dim {config.time_embed_dim}", "an even number")
    require(config.order in (1, 2), f"order {config.order}", "1 or 2")
    require(config.mode in ("paper", "released"), f"mode {config.mode}", "paper or released")
    require(config.time in (None, "film", "stage", "none"), f"time {config.time}", "film, stage or none")
    sites = config.attention_levels or ()
    require(all(0 <= i <= levels for i in sites), f"attention_levels {tuple(sites)}", f"numbers from 0 to {levels}")
    plain = config.mode == "paper" and config.residual
    require(config.order == 1 or plain, "order 2 of the released code or without res-blocks", "mode paper, residual")
    blind = config.time == "none" or (config.time is None and config.mode == "released")
    require(config.num_class_embeds is None or not blind, "classes without an embedding", "time film or stage")
    require(config.mode == "paper" or size > side, f"size {size}", f"at least {2 * side}: instance norm needs 2 pixels")
    solvers = (*FIXED, "adjoint", "dopri5")
    require(config.solver in solvers, f"solver {config.solver}", f"one of {', '.join(solvers)}")
    require_steps(config.solver_steps)


def require_steps(steps: int) -> None:
    if not isinstance(steps, int) or steps < 1:  # the message is made only here: a compiled graph could not
        require_config(False, f"solver_steps {steps}", "a whole number above 0", "continuous solver")


def _check_call(sample: torch.Tensor, labels: torch.Tensor | None, steps: int, config: Any) -> None:
    require_steps(steps)
    side, (height, width) = 2**config.levels, sample.shape[-2:]
    least = side if config.mode == "paper" else 2 * side
    if height % side or width % side or min(height, width) < least:
        raise ModelError(
            got=f"an image of {height}x{width}",
            expected=f"sides of at least {least} that {side} divides",
            where="ContinuousUNet2DModel",
            do="resize the images, or make a model with fewer levels",
        )
    require_labels(labels, config, where="ContinuousUNet2DModel")


def with_solver(model: ContinuousUNet2DModel, steps: int, solver: Solver | None = None) -> ContinuousUNet2DModel:
    """A second denoiser on the very same weights (gradients too), solved in so many steps: an entry of a bank.

    `copy_of` it where the weights must not change together. Raises ModelError for steps or solvers that are none.
    """
    given = {key: value for key, value in model.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        twin = ContinuousUNet2DModel(**given | {"solver_steps": steps, "solver": solver or given["solver"]})
    for name, part in model.named_children():
        setattr(twin, name, part)
    twin.training = model.training
    return twin
