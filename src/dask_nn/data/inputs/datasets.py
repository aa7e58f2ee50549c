"""Map-style datasets of torch, cut into blocks that workers read."""

from __future__ import annotations

import sys
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_nn.data.inputs.plain import as_numpy
from dask_nn.errors import DataError
from dask_nn.pickling import dumps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["is_dataset", "parts_of_dataset"]


def is_dataset(value: Any) -> bool:
    """Tell whether something is a dataset of torch."""
    data = sys.modules.get("torch.utils.data")
    return data is not None and isinstance(value, data.Dataset)


def parts_of_dataset(dataset: Any, *, block_size_bytes: int) -> tuple[list[Any], Any, list[int]]:
    """Cut a dataset into blocks of consecutive samples.

    Parameters
    ----------
    dataset : torch.utils.data.Dataset
        With ``__len__`` and ``__getitem__``; its samples are tuples (x, y), or x alone.
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

    try:
        length = len(dataset)
    except TypeError:
        message = (
            f"{type(dataset).__name__} has no length; expected a map-style dataset with __len__ "
            "and __getitem__, since an iterable one has no sample that could be read again"
        )
        raise DataError(message) from None
    if not length:
        message = f"{type(dataset).__name__} has no samples"
        raise DataError(message)
    first = read_samples(dataset, 0, 1)
    sample_bytes = max(1, sum(array.nbytes for array in _leaves(first)))
    rows = max(1, min(length, block_size_bytes // sample_bytes))
    dumps(dataset, "dataset")  # to name what cannot be pickled
    token = uuid.uuid4().hex
    node = delayed(_Held(dataset), name=f"dask-nn-dataset-{token}", pure=False, traverse=False)
    read = delayed(read_samples, pure=False)
    bounds = [(start, min(start + rows, length)) for start in range(0, length, rows)]
    parts = [
        read(node, start, stop, dask_key_name=f"dask-nn-read-{token}-{start}")
        for start, stop in bounds
    ]
    return parts, first, [stop - start for start, stop in bounds]


class _Held:
    """A dataset as one literal of a graph: not iterated, not looked into."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __dask_tokenize__(self) -> str:
        return uuid.uuid4().hex


def read_samples(dataset: Any, start: int, stop: int) -> Any:
    """Stack the samples ``start..stop-1``.

    Random numbers of torch that a sample draws, such as an augmentation's, depend on its index
    alone: a block that is lost is read again with the same values.

    Returns
    -------
    tuple of ndarray or dict of str to ndarray
        Shape (stop - start, ...) each.
    """
    if isinstance(dataset, _Held):
        dataset = dataset.dataset
    batch_of = getattr(dataset, "__getitems__", None)
    if batch_of is None:
        samples = _read_seeded(dataset.__getitem__, range(start, stop))
    else:
        (samples,) = _read_seeded(lambda first: batch_of(list(range(first, stop))), [start])
    stacked = _stack(samples, f"samples {start} to {stop - 1} of {type(dataset).__name__}")
    return stacked if isinstance(stacked, tuple) else (stacked,)


def _read_seeded(read: Callable[[int], Any], indices: Sequence[int]) -> list[Any]:
    """Read samples; where the first one draws random numbers, others that draw wait for them all.

    They could not have their turns one by one: each would wait for a rank's step.
    """
    from dask_nn.data.randomness import SeededRandomness, own_generator

    randomness = SeededRandomness(0)
    with own_generator():
        first, draws = randomness.run_watched(partial(read, indices[0]), "sample", indices[0])
        if draws:
            rest = [randomness.run_once(partial(read, n), "sample", n) for n in indices[1:]]
            return [first, *rest]
    return [first, *map(read, indices[1:])]


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
