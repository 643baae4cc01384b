"""The order of a buffer: each epoch once, the same from anywhere, of neighbours."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from halfstep.data.order import CHUNKS, BufferedOrder

SIZES = {"n": st.integers(1, 500), "buffer": st.integers(1, 600), "seed": st.integers(0, 99)}


@given(**SIZES)
def test_every_epoch_has_every_image_once(n: int, buffer: int, seed: int) -> None:
    taken = BufferedOrder(n, seed, buffer).take(0, 3 * n)
    for epoch in taken.split(n):
        assert torch.equal(epoch.sort().values, torch.arange(n))


@given(**SIZES, pieces=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 70)), max_size=6))
def test_any_position_is_found_without_those_before_it(n: int, buffer: int, seed: int, pieces: list) -> None:
    whole, order = BufferedOrder(n, seed, buffer).take(0, 1600), BufferedOrder(n, seed, buffer)
    for start, count in pieces:
        assert torch.equal(order.take(start, count), whole[start : start + count])


@given(n=st.integers(100, 900), buffer=st.integers(16, 90), seed=st.integers(0, 9))
def test_a_buffer_holds_a_few_stretches_of_neighbours(n: int, buffer: int, seed: int) -> None:
    order = BufferedOrder(n, seed, buffer)
    epoch, stretch = order.take(0, n), buffer // CHUNKS
    begin = 0
    while begin < n:
        end = begin + len(order._at(0, begin)[0])
        assert end - begin <= buffer
        assert len((epoch[begin:end] // stretch).unique()) <= CHUNKS  # so few places are read at a time
        begin = end


def test_epochs_and_seeds_differ() -> None:
    first, second = BufferedOrder(400, 0, 64).take(0, 800).split(400)
    other = BufferedOrder(400, 1, 64).take(0, 400)
    for one, two in ((first, second), (first, other)):
        assert (one == two).sum() < 20
    assert not torch.equal(first[:64].sort().values, torch.arange(64))
