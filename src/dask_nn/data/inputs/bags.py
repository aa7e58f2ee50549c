"""Dask Bags: partitions of samples, or of blocks of rows."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_nn.data.inputs.parts import look_at
from dask_nn.data.inputs.plain import as_numpy
from dask_nn.errors import DataError
from dask_nn.grouping import group_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dask.delayed import Delayed
    from distributed import Client

__all__ = ["Layout", "is_bag", "layout_of", "parts_of_bag"]


def is_bag(value: Any) -> bool:
    """Tell whether something is a Bag."""
    module = sys.modules.get("dask.bag")
    return module is not None and isinstance(value, module.Bag)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the elements of a Bag are; pickles.

    Parameters
    ----------
    samples : bool
        Whether an element is a sample; else it is a block of rows.
    heads : tuple of ndarray
        For each member of an element what no rows of it are, shape (0, ...).
    paired : bool
        Whether elements are tuples.
    """

    samples: bool
    heads: tuple[np.ndarray[Any, Any], ...]
    paired: bool

    def join(self, elements: Any) -> Any:
        """Join the elements of a partition to arrays, shape (rows, ...); none give no rows."""
        items = list(elements)
        if not items:
            return self.value
        columns = list(zip(*items, strict=True)) if self.paired else [items]
        join = np.stack if self.samples else np.concatenate
        joined = tuple(join([as_numpy(member) for member in column]) for column in columns)
        return joined if self.paired else joined[0]

    @property
    def value(self) -> Any:
        """What a partition without elements gives."""
        return self.heads if self.paired else self.heads[0]


def parts_of_bag(
    bag: Any, *, name: str, beside_samples: bool, client: Client | None
) -> tuple[list[Delayed], Layout]:
    """Read a Bag as one part for each partition.

    Parameters
    ----------
    bag : Bag
        Of arrays, or of tuples of them.
    name : str
        What it is: ``"X"``, ``"y"``, ...
    beside_samples : bool
        Whether it belongs to another Bag, whose elements are samples.
    client : Client or None
        Looks at the elements; this process if None.

    Returns
    -------
    parts : list of Delayed
        Each gives arrays of the rows of a partition, perhaps none.
    layout : Layout
        What the elements are.

    Raises
    ------
    DataError
        If all partitions are empty, or elements can be taken for samples and for blocks.
    """
    from dask.delayed import delayed

    pieces = list(bag.to_delayed(optimize_graph=False))
    what = f"the Bag for {name}"
    for number, piece in enumerate(pieces):
        layout = look_at(
            piece,
            layout_of,
            client,
            what=what,
            number=number,
            name=name,
            beside_samples=beside_samples,
        )
        if layout is not None:
            break
    else:
        message = f"{what} is empty"
        raise DataError(message)
    join = delayed(layout.join, pure=False)
    return [join(piece) for piece in pieces], layout


def layout_of(elements: Any, *, what: str, name: str, beside_samples: bool) -> Layout | None:
    """Tell from a partition what the elements of a Bag are; None if there are none.

    Tuples are samples if x and y differ in length or y is a number. Alone, vectors are samples of
    X, and so are single numbers; everything else is blocks of rows.
    """
    items = list(elements)
    if not items:
        return None
    paired = isinstance(items[0], tuple | list)
    try:
        rows = [list(map(as_numpy, item if paired else [item])) for item in items]
    except ValueError as error:
        message = f"the elements of {what} must be arrays, or tuples of them: {error}"
        raise DataError(message) from error
    first = rows[0]
    if any(member.dtype.kind not in "biuf" for member in first):
        kinds = ", ".join(type(member).__name__ for member in (items[0] if paired else items[:1]))
        message = f"the elements of {what} must be arrays, or tuples of them, got {kinds}"
        raise DataError(message)
    if len(first) > 1:
        samples = _are_samples(rows, what)
    else:
        samples = beside_samples or first[0].ndim <= (1 if group_of(name) == "X" else 0)
    heads = tuple(np.empty_like(member[None] if samples else member)[:0] for member in first)
    return Layout(samples=samples, heads=heads, paired=paired)


def _are_samples(rows: Sequence[list[np.ndarray[Any, Any]]], what: str) -> bool:
    x, y, *_ = rows[0]
    lengths = [{member.shape[:1] for member in members} for members in rows]
    if not y.ndim or any(len(found) > 1 for found in lengths):
        return True
    if x.ndim == y.ndim == 1 and len(set.union(*lengths)) == 1:
        message = (
            f"the elements of {what} are pairs of vectors of one length ({len(x)}): they can be "
            f"samples, or blocks of {len(x)} rows. For samples, make every element a block of one "
            "row, (x[None], y[None]); for blocks, make every x an array of shape (rows, 1)"
        )
        raise DataError(message)
    return False
