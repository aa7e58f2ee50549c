from __future__ import annotations

import pickle
import threading
from typing import Any

import dask
import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, StackDataset, Subset

from dask_nn.data import randomness
from dask_nn.data.inputs.datasets import Held, parts_of_dataset
from dask_nn.errors import DaskNNError, DataError


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


class Seldom(Plain):
    """Augments one sample of a hundred, such as those of a rare class."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(3) if index == 10 else torch.zeros(3)
        return index + noise, index


class Sometimes(Plain):
    """Augments samples in the middle."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(3) if index in {3, 4} else torch.zeros(3)
        return index + noise, index


class SetsBack(Plain):
    """Draws what it likes and gives the generator its state back."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            return torch.rand(3), index


class OwnGenerator(Plain):
    """Draws from a generator of its own."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.rand(3, generator=torch.Generator().manual_seed(index)), index


class Opens(Plain):
    """Has something from its first use on that cannot be pickled, such as an open file."""

    opened: Any = None

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.opened = self.opened or threading.Lock()
        return super().__getitem__(index)


DRAWING = {
    "one by one": Augmented(),
    "subset": Subset(Augmented(), range(8)),
    "the last ones": ConcatDataset([Plain(), Augmented()]),
    "stacked": StackDataset(Augmented(), Augmented()),
    "in the middle": Sometimes(),
    "seldom": Seldom(),
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
    drawn = expected[expected % 1 != 0]
    assert len(np.unique(drawn % 1)) == drawn.size > 0
    assert torch.equal(torch.default_generator.get_state(), before)


@pytest.mark.parametrize(
    "dataset",
    [Plain(), Subset(Plain(), range(8)), OwnGenerator()],
    ids=["one by one", "together", "own generator"],
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


@pytest.mark.parametrize(
    "dataset",
    [Augmented(), Sometimes(), SetsBack()],
    ids=["augmented", "in the middle", "set back"],
)
def test_samples_that_draw_wait_for_whoever_has_the_generator(monkeypatch, dataset):
    parts, _, _ = parts_of_dataset(dataset, block_size_bytes=1000)
    monkeypatch.setattr(randomness, "PATIENCE_S", 0.0)
    errors: list[Exception] = []

    def read() -> None:
        try:
            dask.compute(*parts, scheduler="sync")
        except DaskNNError as error:
            errors.append(error)

    with randomness.own_generator():
        reading = threading.Thread(target=read)
        reading.start()
        reading.join(5)
    assert errors


class BesideOthers(Plain):
    """Is read while a rank of this process draws."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        rank = threading.Thread(target=draw)
        rank.start()
        rank.join()
        return super().__getitem__(index)


def draw() -> None:
    randomness.SeededRandomness(7).run_once(lambda: torch.rand(1), "step")


def test_what_others_draw_is_not_taken_for_what_a_sample_draws():
    held = Held(BesideOthers(), draws=False)
    with randomness.restored_generator():
        held.read(range(8))
    assert not held.draws


def test_whoever_has_the_generator_may_have_drawn():
    held = Held(Augmented(), draws=False)
    with randomness.own_generator():
        held.read(range(8))
    assert not held.draws


def test_a_dataset_that_cannot_be_pickled_once_it_was_used():
    dataset = Opens()
    parts, first, _ = parts_of_dataset(dataset, block_size_bytes=1000)
    assert len(first) == 2
    pickle.dumps(dataset)
    block = dask.compute(*parts, scheduler="sync")[0]
    assert list(block[1]) == list(range(8))


class Endless(IterableDataset[int]):
    """Says how long it is, for progress bars, and has no sample that could be asked for."""

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Any:
        return iter(range(8))


def test_an_iterable_dataset_is_refused_also_with_a_length():
    with pytest.raises(DataError, match="Endless is iterable"):
        parts_of_dataset(Endless(), block_size_bytes=1000)
