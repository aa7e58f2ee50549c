from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from dask_nn.data.inputs.datasets import read_samples


class Augmented(Dataset[tuple[torch.Tensor, int]]):
    """A sample with noise, as an augmentation makes it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return index + torch.rand(3), index


class Batched(Augmented):
    """Reads many samples at a time."""

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        return [self[index] for index in indices]


def test_what_a_sample_draws_depends_on_its_index_alone():
    torch.manual_seed(1)
    x, y = read_samples(Augmented(), 0, 8)
    torch.manual_seed(2)
    torch.rand(5)
    before = torch.default_generator.get_state()
    parts = [read_samples(Augmented(), start, stop) for start, stop in [(5, 8), (0, 5)]]
    np.testing.assert_array_equal(np.concatenate([parts[1][0], parts[0][0]]), x)
    assert list(y) == list(range(8))
    assert len(np.unique(x % 1)) == x.size
    assert torch.equal(torch.default_generator.get_state(), before)


def test_samples_that_are_read_together_are_the_same_when_read_again():
    x, _ = read_samples(Batched(), 2, 6)
    again, _ = read_samples(Batched(), 2, 6)
    np.testing.assert_array_equal(again, x)
