"""The order of the data: a function of seed and step."""

from __future__ import annotations

import torch

from nas.compress.data_order import DataOrder


def test_every_epoch_shows_every_block_once_in_another_order() -> None:
    order = DataOrder(22, batch_size=4, seed=3)
    seen_N = torch.cat([order.rows(step) for step in range(11)])  # two epochs of 22
    first_N, second_N = seen_N[:22], seen_N[22:]
    assert sorted(first_N.tolist()) == sorted(second_N.tolist()) == list(range(22))
    assert not torch.equal(first_N, second_N)
    assert torch.equal(order.rows(2), seen_N[8:12])  # backwards, too: the order is a function, not a stream


def test_a_batch_may_be_larger_than_the_corpus() -> None:
    rows_B = DataOrder(3, batch_size=7, seed=0).rows(0)
    assert sorted(rows_B[:3].tolist()) == sorted(rows_B[3:6].tolist()) == [0, 1, 2]
