from __future__ import annotations

import threading
from typing import Any

import dask
import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset

from dask_nn.data import randomness
from dask_nn.data.inputs.datasets import Held, parts_of_dataset, read_samples
from dask_nn.errors import DaskNNError


class Plain(Dataset[tuple[torch.Tensor, int]]):
    """Samples as they are stored."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3,), index, dtype=torch.float32), index


class Augmented(Plain):
    """A sample with noise, as an augmentation makes it."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return index + torch.rand(3), index


DRAWING = {
    "one by one": Augmented(),
    "subset": Subset(Augmented(), range(8)),
    "the last ones": ConcatDataset([Plain(), Augmented()]),
    "stacked": StackDataset(Augmented(), Augmented()),
}


def values(dataset: Any, rows: int) -> np.ndarray[Any, Any]:
    """Give what workers read in blocks of so many rows."""
    row_bytes = 40 if isinstance(dataset, StackDataset) else 20
    parts, _, lengths = parts_of_dataset(dataset, block_size_bytes=rows * row_bytes)
    assert lengths[0] == rows
    firsts = [block[0] for block in dask.compute(*parts, scheduler="sync")]
    return np.concatenate([first[0] if isinstance(first, tuple) else first for first in firsts])


@pytest.mark.parametrize("name", DRAWING)
def test_what_a_sample_draws_depends_on_its_index_alone(name):
    torch.manual_seed(1)
    expected = values(DRAWING[name], 8)
    torch.manual_seed(2)
    torch.rand(5)
    before = torch.default_generator.get_state()
    np.testing.assert_array_equal(values(DRAWING[name], 3), expected)
    drawn = expected[-8:]
    assert len(np.unique(drawn % 1)) == drawn.size
    assert torch.equal(torch.default_generator.get_state(), before)


@pytest.mark.parametrize(
    "dataset", [Plain(), Subset(Plain(), range(8))], ids=["one by one", "together"]
)
def test_samples_that_draw_nothing_wait_for_nobody(monkeypatch, dataset):
    monkeypatch.setattr(randomness, "PATIENCE_S", 0.0)
    parts, _, _ = parts_of_dataset(dataset, block_size_bytes=1000)
    found: list[Any] = []
    with randomness.own_generator():
        reading = threading.Thread(
            target=lambda: found.extend(dask.compute(*parts, scheduler="sync"))
        )
        reading.start()
        reading.join(5)
    assert list(found[0][1]) == list(range(8))


def test_samples_that_draw_wait_for_whoever_has_the_generator(monkeypatch):
    monkeypatch.setattr(randomness, "PATIENCE_S", 0.0)
    errors: list[Exception] = []

    def read() -> None:
        try:
            read_samples(Held(Augmented(), draws=True), 0, 2)
        except DaskNNError as error:
            errors.append(error)

    with randomness.own_generator():
        reading = threading.Thread(target=read)
        reading.start()
        reading.join(5)
    assert errors
