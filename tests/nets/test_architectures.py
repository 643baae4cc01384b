"""The table of net families. Oracles: the nets themselves, run before and after what a row says; a toy family."""

from __future__ import annotations

import ast
import fnmatch
from functools import partial
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from halfstep.core.errors import ModelError
from halfstep.core.recipe import ModelSpec
from halfstep.nets.architectures import (
    ARCHITECTURES,
    MISSING,
    ROWS,
    Architecture,
    Slimming,
    architecture_of,
    constants,
    narrowed,
    require,
    skeleton,
    slices_for,
)
from halfstep.nets.channels import between
from halfstep.nets.denoiser import copy_of
from halfstep.nets.models import build_model
from halfstep.nets.slices import cut_all
from tiny import cond_for_net, ode_unet, text_unet, unet, uvit, wavelet_unet
from transformers_tiny import Transformers, dit, flux, inputs_of, pixart, sd3

plain_unet = partial(unet, channels=(16, 32), attend=True, norm_num_groups=8, attention_head_dim=8)
SOURCE = Path(__file__).parents[2] / "src" / "halfstep"


def small(name: str):
    """A tiny net of a family, no weight of which is trivial."""
    torch.manual_seed(0)
    make = {
        "UNet2DModel": plain_unet,
        "UViT2DModel": uvit,
        "SpectralUNet2DModel": wavelet_unet,
        "ContinuousUNet2DModel": ode_unet,
        "UNet2DConditionModel": text_unet,
        "DiTTransformer2DModel": dit,
        "PixArtTransformer2DModel": pixart,
        "SD3Transformer2DModel": sd3,
        "FluxTransformer2DModel": flux,
    }[name]
    model = make().eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def ran(model, weights=None) -> torch.Tensor:
    torch.manual_seed(1)
    if isinstance(model, Transformers):
        sample, timestep, cond = inputs_of(model, 1)
    else:
        sample, timestep, cond = torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), cond_for_net(model)
    with torch.no_grad():
        if weights is None:
            return model(sample, timestep=timestep, **cond).sample
        return torch.func.functional_call(model, weights, (sample,), {"timestep": timestep, **cond}).sample


def having(ability: str) -> list[str]:
    return [name for name, row in ARCHITECTURES.items() if getattr(row, ability) is not None]


# --- every row --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_is_of_its_row_compiled_or_not(name):
    model = small(name)
    assert architecture_of(model) is ARCHITECTURES[name] is architecture_of(torch.compile(model))
    assert ARCHITECTURES[name].name == name == type(model).__name__


@pytest.mark.parametrize("name", having("slim"))
def test_slices_at_width_one_are_the_whole_net_and_below_it_a_net_of_the_narrow_config(name):
    family, model = ARCHITECTURES[name], small(name)
    whole = cut_all(model.state_dict(), slices_for(family, model.config, 1.0))
    assert all(torch.equal(value, whole[key]) for key, value in model.state_dict().items())
    narrow = narrowed(family, model.config, 0.5)
    cut = cut_all(model.state_dict(), slices_for(family, model.config, 0.5))
    plain = family.kind.from_config(narrow).eval()
    plain.load_state_dict(cut)
    assert torch.equal(ran(skeleton(family, narrow).eval(), {**cut, **constants(family, narrow)}), ran(plain))
    assert plain.num_parameters() < 0.5 * model.num_parameters()


@pytest.mark.parametrize("name", having("free"))
def test_an_order_of_free_channels_changes_the_weights_and_not_the_function(name):
    model = small(name)
    moved = copy_of(model)
    count = 0
    for free in ARCHITECTURES[name].free(moved):
        before = [p.clone() for p, _, _ in free.moves]
        free.apply(free.by_score())
        count += any(not torch.equal(a, p) for a, (p, _, _) in zip(before, free.moves, strict=True))
    assert count >= 3 and torch.allclose(ran(moved), ran(model), atol=1e-5)


@pytest.mark.parametrize("name", having("levels"))
def test_levels_are_modules_of_the_net_and_put_out_pictures_of_every_size(name):
    model, sizes = small(name), []
    levels = ARCHITECTURES[name].levels(model)
    assert set(levels) <= set(model.modules()) and len(set(levels)) == len(levels)
    for level in levels:
        level.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[-1]))
    ran(model)
    assert sizes == [8, 4, 4, 4, 8]


@pytest.mark.parametrize("name", having("gated"))
def test_the_gated_class_takes_the_layout_and_has_as_many_levels(name):
    family = ARCHITECTURES[name]
    model, row = small(name), next(row for row in ROWS if row.kind is family.gated)
    layout = ("sample_size", "in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types")
    gated = row.kind(**{key: model.config[key] for key in layout}, norm_num_groups=8)
    assert len(row.levels(gated)) == len(family.levels(model))


def reads_of(model) -> list[tuple[str, torch.Tensor]]:
    """What every convolution and linear layer reads in one call, in the order of the calls."""
    reads = []
    layers = [(key, part) for key, part in model.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    handles = [
        part.register_forward_pre_hook(lambda _, given, key=key: reads.append((key, given[0]))) for key, part in layers
    ]
    ran(model)
    for handle in handles:
        handle.remove()
    return reads


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ends_are_the_layers_at_the_picture_and_time_and_text_are_what_reads_no_picture(name):
    """Oracle: the net's own calls, on two pictures."""
    model, parts = small(name), ARCHITECTURES[name].parts
    is_in = lambda key, globs: any(fnmatch.fnmatchcase(key, glob) for glob in globs)  # noqa: E731
    first = reads_of(model)
    model.register_forward_pre_hook(lambda _, given: (given[0] + 1, *given[1:]))
    second = reads_of(model)
    seen = [key for (key, a), (_, b) in zip(first, second, strict=True) if not torch.equal(a, b)]
    assert is_in(seen[0], parts.ends) and is_in(seen[-1], parts.ends)
    assert all(is_in(key, (*parts.time, *parts.text)) == (key not in seen) for key, _ in first)


@pytest.mark.parametrize("name", having("fresh"))
def test_a_fresh_config_builds_a_net_of_its_family_for_these_images(name):
    family = ARCHITECTURES[name]
    spec = ModelSpec(kind=family.word, channels=(16, 16) if family.word == "unet" else (16,), layers=2, head_dim=8)
    model = build_model({"_class_name": name, **family.fresh(spec, 8, 1, None, 1000)}, where="here")
    assert type(model) is family.kind and ran(model).shape == (2, 1, 8, 8)


def test_a_recipe_has_a_word_for_every_family_that_can_be_fresh():
    words = {row.word for row in ROWS if row.fresh}
    assert set(get_type_hints(ModelSpec)["kind"].__args__) == words and "" not in words
    assert {row.word for row in ROWS if not row.fresh} <= {""}


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.own_checks])
@pytest.mark.parametrize("size", [1, 3, 7, 9, 30])
def test_a_family_with_its_own_checks_runs_every_size_that_its_constructor_takes(name, size):
    config = dict(small(name).config) | {"sample_size": size}
    try:
        model = ARCHITECTURES[name].kind.from_config(config)
    except ModelError:
        return
    assert model(torch.randn(1, 1, size, size), 3).sample.shape[-1] == size


# --- what a family does not give --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ability", MISSING)
def test_what_a_family_does_not_give_is_refused_by_its_name(ability):
    able = having(ability)
    assert able
    for family in ROWS:
        if family.name in able:
            assert require(family, ability) is getattr(family, ability)
            continue
        with pytest.raises(ModelError) as error:
            require(family, ability)
        said = str(error.value)
        assert f"a {family.name}, which {MISSING[ability]}" in said and all(name in said for name in able)


def test_a_model_of_no_family_is_refused_with_all_their_names():
    with pytest.raises(ModelError) as error:
        architecture_of(nn.Linear(2, 2))
    assert all(name in str(error.value) for name in ARCHITECTURES) and "Linear" in str(error.value)


def test_no_other_module_asks_a_model_for_its_class():
    """The classes of the rows are named in their net files and here, and nobody else compares with them."""
    names = set(ARCHITECTURES)
    for file in SOURCE.rglob("*.py"):
        if file.stem == "architectures":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            tests = []
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                tests = node.args
            elif isinstance(node, ast.Compare):
                tests = [node.left, *node.comparators]
            found = {getattr(one, "id", getattr(one, "attr", "")) for t in tests for one in ast.walk(t)} & names
            assert not found, f"{file.name}:{node.lineno} asks for {found}"


# --- a new family is a net file and a row -----------------------------------------------------------------------------


class ToyModel(ModelMixin, ConfigMixin):
    """The smallest net that slimming can get wrong: a layer reads two others' outputs side by side."""

    @register_to_config
    def __init__(self, width: int = 8, in_channels: int = 1):
        super().__init__()
        self.left, self.right = nn.Conv2d(in_channels, width, 1), nn.Conv2d(in_channels, width, 1)
        self.join = nn.Conv2d(2 * width, in_channels, 1)
        self.inner, self.outer = nn.Linear(in_channels, 4), nn.Linear(4, in_channels)

    def forward(self, sample, timestep, return_dict=True):
        both = torch.cat([self.left(sample), self.right(sample)], dim=1).tanh()
        time = self.outer(self.inner(torch.ones(1, sample.shape[1])).tanh())
        return UNet2DOutput(sample=self.join(both) + time[..., None, None])


def toy_narrow(config, width):
    return {"width": int(config["width"] * width), "in_channels": config["in_channels"]}


def toy_exceptions(config, narrow, shapes, concat):
    if concat == "aligned":
        yield "join.weight", 1, ((0, narrow["width"]), (config["width"], narrow["width"]))


def toy_free(model):
    yield between(model.inner, model.outer)


def test_a_row_is_all_that_slimming_a_new_family_takes():
    rows = (*ROWS, Architecture(ToyModel, slim=Slimming(toy_narrow, toy_exceptions), free=toy_free))
    torch.manual_seed(0)
    model = ToyModel().eval()
    family = architecture_of(model, rows)
    assert family.kind is ToyModel and family not in ROWS
    cut = cut_all(model.state_dict(), slices_for(family, model.config, 0.5))
    half = skeleton(family, narrowed(family, model.config, 0.5)).eval()
    silenced = copy_of(model)  # the oracle: the whole net with what the half does not have put out
    for part in (silenced.left, silenced.right):
        part.weight.data[4:], part.bias.data[4:] = 0, 0
    assert torch.allclose(ran(half, cut), ran(silenced), atol=1e-6)
    leading = cut_all(model.state_dict(), slices_for(family, model.config, 0.5, "leading"))
    assert not torch.allclose(ran(half, leading), ran(silenced), atol=1e-3)
    for free in require(family, "free")(model):
        before = ran(model)
        free.apply(torch.tensor([3, 1, 0, 2]))
        assert torch.allclose(ran(model), before, atol=1e-6)
    with pytest.raises(ModelError, match=f"a ToyModel, which {MISSING['levels']}"):
        require(family, "levels", rows)
