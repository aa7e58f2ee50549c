"""Map-style datasets of torch, cut into blocks that workers read."""

from __future__ import annotations

import pickle
import sys
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_nn.data.inputs.plain import as_numpy
from dask_nn.errors import DataError
from dask_nn.pickling import dumps

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Held", "is_dataset", "parts_of_dataset", "read_samples"]

# So many samples are read to see whether they draw random numbers.
LOOKS = 8


def is_dataset(value: Any) -> bool:
    """Tell whether something is a dataset of torch."""
    data = sys.modules.get("torch.utils.data")
    return data is not None and isinstance(value, data.Dataset)


def parts_of_dataset(dataset: Any, *, block_size_bytes: int) -> tuple[list[Any], Any, list[int]]:
    """Cut a dataset into blocks of consecutive samples.

    Parameters
    ----------
    dataset : torch.utils.data.Dataset
        With ``__len__`` and ``__getitem__``; its samples are tuples (x, y), or x alone. If one of
        a few that are looked at draws random numbers of torch, what each draws depends on its index
        alone.
    block_size_bytes : int
        Target size of a block.

    Returns
    -------
    parts : list of Delayed
        Each gives a tuple of arrays, shape (rows, ...).
    first : tuple of ndarray
        What the first sample makes, shape (1, ...).
    lengths : list of int
        Rows of each part.

    Raises
    ------
    DataError
        If it has no length, is empty, or its samples cannot be stacked.
    """
    from dask.delayed import delayed

    length = _length(dataset)
    if not length:
        message = f"{type(dataset).__name__} has no samples"
        raise DataError(message)
    # A copy is looked at: what a dataset opens when it is first used cannot be pickled then.
    copy = Held(pickle.loads(dumps(dataset, "dataset")), draws=False)  # noqa: S301  (made here)
    sample, draws = copy.read_watched(0)
    first = _stack_all([sample], dataset, 0)
    held = Held(dataset, draws=draws or _others_draw(copy, length))
    sample_bytes = max(1, sum(array.nbytes for array in _leaves(first)))
    rows = max(1, min(length, block_size_bytes // sample_bytes))
    token = uuid.uuid4().hex
    node = delayed(held, name=f"dask-nn-dataset-{token}", pure=False, traverse=False)
    read = delayed(read_samples, pure=False)
    bounds = [(start, min(start + rows, length)) for start in range(0, length, rows)]
    parts = [
        read(node, start, stop, dask_key_name=f"dask-nn-read-{token}-{start}")
        for start, stop in bounds
    ]
    return parts, first, [stop - start for start, stop in bounds]


class Held:
    """A dataset as one literal of a graph: not iterated, not looked into.

    Parameters
    ----------
    dataset : torch.utils.data.Dataset
        With ``__len__`` and ``__getitem__``.
    draws : bool
        Whether its samples draw random numbers of torch, such as an augmentation's.
    """

    def __init__(self, dataset: Any, *, draws: bool) -> None:
        self.dataset = dataset
        self.draws = draws

    def __dask_tokenize__(self) -> str:
        return uuid.uuid4().hex

    def read(self, indices: range) -> list[Any]:
        """Read samples; what each of them draws depends on its index alone."""
        from dask_nn.data.randomness import (
            SeededRandomness,
            call_beside_others,
            restored_generator,
        )

        if not self.draws:
            samples, drew = call_beside_others(partial(self._get, list(indices)))
            if not drew:
                return samples
            self.draws = True
        with restored_generator():
            return SeededRandomness(0).run_each(self._read_one, indices, "sample")

    def read_watched(self, index: int) -> tuple[Any, bool]:
        """Read a sample with its own random numbers, and tell whether it draws some."""
        from dask_nn.data.randomness import SeededRandomness, restored_generator

        with restored_generator():
            return SeededRandomness(0).run_watched(partial(self._read_one, index), "sample", index)

    def _read_one(self, index: int) -> Any:
        return self._get([index])[0]

    def _get(self, indices: list[int]) -> list[Any]:
        together = getattr(self.dataset, "__getitems__", None)
        if together is not None:
            return list(together(indices))
        return [self.dataset[index] for index in indices]


def read_samples(held: Held, start: int, stop: int) -> Any:
    """Stack the samples ``start..stop-1``.

    Returns
    -------
    tuple of ndarray or dict of str to ndarray
        Shape (stop - start, ...) each.
    """
    return _stack_all(held.read(range(start, stop)), held.dataset, start)


def _length(dataset: Any) -> int:
    try:
        # An iterable one may have a length, too.
        if not isinstance(dataset, sys.modules["torch.utils.data"].IterableDataset):
            return len(dataset)
    except TypeError:
        pass
    message = (
        f"{type(dataset).__name__} is iterable or has no length; expected a map-style dataset with "
        "__len__ and __getitem__: an iterable one has no sample that could be read again"
    )
    raise DataError(message)


def _others_draw(held: Held, length: int) -> bool:
    """Tell whether some of the samples after the first draw: augmented ones may be among others."""
    places = {round(n * (length - 1) / (LOOKS - 1)) for n in range(1, LOOKS)} - {0}
    try:
        return any(held.read_watched(index)[1] for index in sorted(places))
    except Exception:  # whoever reads its block will say so; until then nothing is known
        return True


def _stack_all(samples: Sequence[Any], dataset: Any, start: int) -> Any:
    what = f"samples {start} to {start + len(samples) - 1} of {type(dataset).__name__}"
    stacked = _stack(samples, what)
    return stacked if isinstance(stacked, tuple) else (stacked,)


def _stack(samples: Sequence[Any], what: str) -> Any:
    first = samples[0]
    if isinstance(first, tuple | list):
        return tuple(
            _stack([sample[place] for sample in samples], what) for place in range(len(first))
        )
    if isinstance(first, dict):
        return {key: _stack([sample[key] for sample in samples], what) for key in first}
    try:
        stacked = np.stack([as_numpy(sample) for sample in samples])
    except ValueError as error:
        message = f"{what} cannot be stacked: {error}"
        raise DataError(message) from error
    if stacked.dtype.kind not in "biuf":
        message = f"{what} have type {stacked.dtype}, expected numbers"
        raise DataError(message)
    return stacked


def _leaves(value: Any) -> list[np.ndarray[Any, Any]]:
    if isinstance(value, tuple):
        return [leaf for member in value for leaf in _leaves(member)]
    if isinstance(value, dict):
        return [leaf for member in value.values() for leaf in _leaves(member)]
    return [value]
