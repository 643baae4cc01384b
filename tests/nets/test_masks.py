"""N:M masks. Oracles: a stable sort of every group, the im2col product, round trips, closed forms of the gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.core.errors import ModelError, RecipeError
from halfstep.nets.masks import Pattern, groups_of, keep_mask, mask_all, masked, pack, ungrouped, unpack

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(2, 8), Pattern(4, 8), Pattern(7, 8), Pattern(31, 32), Pattern(2, 3)]
patterns = st.sampled_from(PATTERNS)
shapes = st.sampled_from([(5, 1), (3, 2), (4, 1, 3, 3), (2, 3, 1, 1)])


def weight(shape, pattern: Pattern, seed: int, levels: int = 3) -> torch.Tensor:
    """Weights of few different sizes, so that groups hold equals; the input dimension is `shape[1]` groups."""
    generator = torch.Generator().manual_seed(seed)
    full = (shape[0], shape[1] * pattern.m, *shape[2:])
    return torch.randint(-levels, levels + 1, full, generator=generator).float()


@settings(max_examples=60, deadline=None)
@given(patterns, shapes, st.integers(0, 1000))
def test_masks_are_those_of_a_stable_sort_of_every_group(pattern, shape, seed):
    w = weight(shape, pattern, seed)
    groups = groups_of(w, pattern.m)
    assert torch.equal(ungrouped(groups, w.shape), w)
    best = groups.abs().argsort(dim=1, descending=True, stable=True)[:, : pattern.n]
    expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
    mask = keep_mask(w, pattern)
    assert torch.equal(groups_of(mask, pattern.m), expected)
    assert torch.equal(mask, keep_mask(3 * w, pattern))
    assert mask.sum() * pattern.m == mask.numel() * pattern.n


def test_groups_run_along_the_channels_of_one_kernel_tap():
    w = torch.arange(2 * 4 * 3 * 3).float().view(2, 4, 3, 3) + 1
    for o in range(2):
        for y in range(3):
            for x in range(3):
                assert keep_mask(w, Pattern(2, 4))[o, :, y, x].tolist() == [False, False, True, True]


def test_a_masked_convolution_is_a_product_with_a_matrix_that_follows_the_pattern():
    torch.manual_seed(0)
    w, x = masked(torch.randn(6, 8, 3, 3), Pattern(2, 4)), torch.randn(2, 8, 5, 5)
    matrix = w.permute(0, 2, 3, 1).reshape(6, -1)  # columns in the order (tap, channel)
    columns = F.unfold(x, 3, padding=1).view(2, 8, 9, 25).transpose(1, 2).reshape(2, 72, 25)
    assert torch.allclose((matrix @ columns).view(2, 6, 5, 5), F.conv2d(x, w, padding=1), atol=1e-5)
    assert (matrix.view(-1, 4).count_nonzero(dim=1) <= 2).all()


@settings(max_examples=30, deadline=None)
@given(patterns, shapes, st.integers(0, 1000))
def test_gradients_pass_straight_through(pattern, shape, seed):
    w = weight(shape, pattern, seed).requires_grad_()
    found = masked(w, pattern)
    assert torch.equal(found, w * keep_mask(w, pattern))
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed))
    found.backward(upstream)
    assert torch.equal(w.grad, upstream)


def test_a_dropped_weight_that_grows_comes_back():
    w = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert keep_mask(w, Pattern(2, 4)).tolist() == [[True, True, False, False]]
    w[0, 3] = -3.5
    assert keep_mask(w, Pattern(2, 4)).tolist() == [[True, False, False, True]]


def test_the_released_chain_is_nested_and_four_of_eight_is_not_in_two_of_four():
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    chain = [keep_mask(w, Pattern(n - 1, n)) for n in (32, 16, 8, 4)] + [keep_mask(w, Pattern(2, 4))]
    for more, fewer in itertools.pairwise(chain):
        assert (more | ~fewer).all()
    assert (keep_mask(w, Pattern(2, 4)) & ~keep_mask(w, Pattern(4, 8))).any()


def test_only_named_weights_are_masked_and_no_pattern_means_the_same_tensors():
    weights = {"a": torch.randn(2, 4), "b": torch.randn(2, 4)}
    found = mask_all(weights, {"a"}, Pattern(2, 4))
    assert found["b"] is weights["b"] and found["a"].count_nonzero() == 4
    assert mask_all(weights, {"a"}, None)["a"] is weights["a"]


@pytest.mark.parametrize("text", ["5:4", "4:4", "0:4", "2", "2:", "two:four", "2:4:8", "2:128", ""])
def test_impossible_patterns_are_refused(text):
    with pytest.raises(RecipeError, match=r"write e\.g\. 2:4"):
        Pattern.parse(text)


@given(patterns)
def test_patterns_are_read_as_they_are_written(pattern):
    assert Pattern.parse(str(pattern)) == pattern and pattern.density == pattern.n / pattern.m


# --- storage ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(patterns, shapes, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 1000))
def test_packed_weights_come_back_bit_for_bit(pattern, shape, dtype, seed):
    dense = masked(weight(shape, pattern, seed, levels=1000), pattern).to(dtype)
    values, places = pack(dense, pattern)
    again = unpack(values, places, pattern, dense.shape, "here")
    assert again.dtype == dtype and torch.equal(again, dense)


def test_two_of_four_takes_nine_sixteenths_of_the_bytes_at_16_bits():
    dense = masked(torch.randn(64, 64, 3, 3), Pattern(2, 4)).half()
    values, places = pack(dense, Pattern(2, 4))
    assert (values.nbytes + places.nbytes) / dense.nbytes == 0.5625


def test_a_dense_weight_is_not_packed():
    with pytest.raises(ModelError, match="bake the mask first"):
        pack(torch.ones(4, 8), Pattern(2, 4))


@pytest.mark.parametrize("harm", ["values", "places", "order"])
def test_torn_packed_weights_are_refused_by_name(harm):
    dense = masked(torch.randn(4, 8), Pattern(2, 4))
    values, places = pack(dense, Pattern(2, 4))
    if harm == "values":
        values = values[:-1]
    elif harm == "places":
        places = places[:-1]
    else:
        places = torch.zeros_like(places)
    with pytest.raises(ModelError, match=r"unet\.safetensors"):
        unpack(values, places, Pattern(2, 4), dense.shape, "unet.safetensors")
