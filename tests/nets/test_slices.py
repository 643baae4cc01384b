"""Oracles: NumPy's fancy indexing (`np.ix_`), NumPy's scatter-add as the gradient, JSON round trips."""

from __future__ import annotations

import json

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.core.typed import typed
from halfstep.nets.slices import Pieces, cut, cut_all, pieces_of, slices_to_json

unhurried = settings(deadline=None, max_examples=60)


@st.composite
def cuts(draw):
    """A tensor of 1 to 4 dimensions and 1 to 4 pieces per dimension; pieces may overlap and come in any order."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    dims = []
    for size in shape:
        starts = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
        dims.append(tuple((start, draw(st.integers(1, size - start))) for start in starts))
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return tensor, tuple(dims)


def expand(pieces) -> list[int]:
    return [index for start, length in pieces for index in range(start, start + length)]


@unhurried
@given(cuts())
def test_a_cut_is_numpy_fancy_indexing(case):
    tensor, dims = case
    assert np.array_equal(cut(tensor, dims).numpy(), tensor.numpy()[np.ix_(*map(expand, dims))])


@unhurried
@given(cuts())
def test_the_gradient_of_a_cut_is_a_scatter_add(case):
    tensor, dims = case
    tensor.requires_grad_()
    out = cut(tensor, dims)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream)
    expected = np.zeros(tensor.shape, dtype=np.float64)
    np.add.at(expected, np.ix_(*map(expand, dims)), upstream.double().numpy())
    assert np.allclose(tensor.grad.numpy(), expected, atol=1e-5)
    untouched = np.ones(tensor.shape, dtype=bool)
    untouched[np.ix_(*map(expand, dims))] = False
    assert (tensor.grad.numpy()[untouched] == 0).all()


@unhurried
@given(cuts())
def test_one_piece_per_dimension_is_a_view_of_the_shared_weights(case):
    tensor, dims = case
    prefix = tuple(pieces[:1] for pieces in dims)
    view = cut(tensor, prefix)
    assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    view.fill_(7.0)
    assert (tensor.numpy()[np.ix_(*map(expand, prefix))] == 7).all()


@unhurried
@given(st.lists(st.integers(0, 30), min_size=1, max_size=30))
def test_pieces_give_the_indices_back_and_are_as_few_as_can_be(indices):
    pieces = pieces_of(indices)
    assert expand(pieces) == indices
    assert len(pieces) == 1 + int((np.diff(indices) != 1).sum())


def test_no_indices_are_no_pieces():
    assert pieces_of([]) == ()


@unhurried
@given(st.dictionaries(st.text(max_size=8), cuts(), max_size=4))
def test_slices_round_trip_through_json_and_cut_the_same(cases):
    slices = {name: dims for name, (_, dims) in cases.items()}
    again = typed(json.loads(json.dumps(slices_to_json(slices))), dict[str, tuple[Pieces, ...]], "slices", "here")
    assert again == slices
    weights = {name: tensor for name, (tensor, _) in cases.items()} | {"not named, not cut": torch.ones(1)}
    found, expected = cut_all(weights, again), cut_all(weights, slices)
    assert found.keys() == slices.keys()
    assert all(torch.equal(found[name], expected[name]) for name in slices)
