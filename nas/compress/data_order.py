"""Which blocks each training step takes: a function of (seed, step), so that a run goes on anywhere with the blocks that it would have seen.

Shape suffixes: N blocks, B blocks of a batch.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class DataOrder:
    """Epoch e goes over all blocks in a permutation that follows from (seed, e) alone; a batch may span epochs."""

    def __init__(self, num_blocks: int, *, batch_size: int, seed: int) -> None:
        self.num_blocks, self.batch_size, self.seed = num_blocks, batch_size, seed
        self._epoch, self._order_N = 0, self._permutation(0)

    def rows(self, step: int) -> Tensor:
        """rows_B: indices of the blocks of the step (from 0), int64, on the CPU."""
        rows: list[Tensor] = []
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        while position < end:
            epoch, first = divmod(position, self.num_blocks)
            if epoch != self._epoch:
                self._epoch, self._order_N = epoch, self._permutation(epoch)
            taken = self._order_N[first : first + end - position]
            rows.append(taken)
            position += len(taken)
        return torch.cat(rows)

    def _permutation(self, epoch: int) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()[:7], "big")
        return torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(seed))
