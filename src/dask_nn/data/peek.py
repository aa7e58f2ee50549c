"""A look at the data before any work starts: some rows, and the range of the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from distributed import Future

from dask_nn.errors import DataError

if TYPE_CHECKING:
    from distributed import Client

    from dask_nn.data.blocks import Blocks

__all__ = ["LabelRange", "label_range", "sample"]

type Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class LabelRange:
    """The least and greatest label, and whether labels to be ignored occur.

    ``low > high`` if there are no labels but ignored ones.
    """

    low: int
    high: int
    ignored: bool


def sample(blocks: Blocks, rows: int, *, client: Client | None) -> tuple[Array, ...]:
    """Give the first rows of the data, one array of native byte order for each field.

    Parameters
    ----------
    blocks : Blocks
        The data set.
    rows : int
        At most so many.
    client : Client or None
        Where the blocks are; this process if None.

    Raises
    ------
    DataError
        If blocks are not what their arrays said.
    """
    takes = []
    for number, length in enumerate(blocks.lengths):
        if length and rows:
            takes.append((number, min(length, rows)))
            rows -= takes[-1][1]
    if blocks.arrays is not None:
        heads = [[_head(array, take) for array in blocks.arrays[n]] for n, take in takes]
    elif client is None or blocks.keys is None:
        message = "blocks with keys need a client"
        raise ValueError(message)
    else:
        heads = client.gather(
            [
                [
                    client.submit(_head, Future(key, client), take, pure=False)
                    for key in blocks.keys[n]
                ]
                for n, take in takes
            ]
        )
    columns = [np.concatenate(column) for column in zip(*heads, strict=True)]
    for field, column in zip(blocks.fields, columns, strict=True):
        expected = (sum(take for _, take in takes), *field.shape)
        if column.shape != expected:
            message = (
                f"the first rows of {field.name} have shape {column.shape}, expected {expected}; "
                "is the chunk size that its Dask array tells true?"
            )
            raise DataError(message)
    return tuple(columns)


def label_range(blocks: Blocks, *, ignore: int, client: Client | None) -> LabelRange:
    """Find the range of integer labels ``y``, where they lie.

    Parameters
    ----------
    blocks : Blocks
        The data set; its second field holds the labels.
    ignore : int
        A label that stands for none.
    client : Client or None
        Where the blocks are; this process if None.
    """
    if blocks.arrays is not None:
        parts = [_range(arrays[1], ignore) for arrays in blocks.arrays]
    elif client is None or blocks.keys is None:
        message = "blocks with keys need a client"
        raise ValueError(message)
    else:
        parts = client.gather(
            client.map(
                _range, [Future(keys[1], client) for keys in blocks.keys], ignore=ignore, pure=False
            )
        )
    seen = [part for part in parts if part.low <= part.high]
    return LabelRange(
        low=min((part.low for part in seen), default=0),
        high=max((part.high for part in seen), default=-1),
        ignored=any(part.ignored for part in parts),
    )


def _head(array: Array, rows: int) -> Array:
    return np.array(array[:rows], dtype=array.dtype.newbyteorder("="))


def _range(labels: Array, ignore: int) -> LabelRange:
    labels = np.asarray(labels)
    kept = labels[labels != ignore]
    return LabelRange(
        low=int(kept.min()) if kept.size else 0,
        high=int(kept.max()) if kept.size else -1,
        ignored=kept.size < labels.size,
    )
