"""From whatever the user has to named arrays of rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np

from dask_nn.data.inputs.datasets import is_dataset, parts_of_dataset
from dask_nn.data.inputs.frames import is_frame, nearest, read_frame
from dask_nn.data.inputs.labelled import batch_dim_of, is_labelled, is_labelled_set, rows_first
from dask_nn.data.inputs.parts import columns_of_parts, compute_one, delayed_parts
from dask_nn.errors import DataError
from dask_nn.grouping import group_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distributed import Client

__all__ = ["is_name", "read_inputs"]

BLOCK_SIZE_BYTES = 2 << 20
NAMES = ("X", "y", "sample_weight")


def read_inputs(
    X: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    features: Any = None,
    batch_dim: str | None = None,
    client: Client | None = None,
    block_size_bytes: int = BLOCK_SIZE_BYTES,
    needs_target: bool = True,
) -> dict[str, Any]:
    """Read inputs of any kind.

    Parameters
    ----------
    X : collection
        A Dask, NumPy or xarray array, a torch tensor, a table of pandas or Dask, a list of
        Delayed, a Dask Bag, a map-style torch dataset, or a dict of arrays.
    y, sample_weight : collection, or name, optional
        The same kinds, or the names of columns, variables or entries of X. Lists of Delayed,
        Bags and datasets of tuples bring their own.
    features : list of str, optional
        Columns or variables that are X, by default all that are nothing else.
    batch_dim : str, optional
        Dimension of xarray objects along which samples lie; the first by default.
    client : Client or None
        Computes the first part where nothing else says what parts look like.
    block_size_bytes : int
        Target size of the blocks of a dataset.
    needs_target : bool
        Whether there must be a y.

    Returns
    -------
    dict of str to (dask.array.Array or numpy.ndarray)
        ``"X"``, then ``"y"`` and ``"sample_weight"`` where given; inputs that are dictionaries
        give one entry for each member, such as ``"X.image"``.

    Raises
    ------
    DataError
        If something is of no kind that can be read, names do not exist, or y is missing.
    """
    reader = _Reader(
        features=features, batch_dim=batch_dim, client=client, block_size_bytes=block_size_bytes
    )
    reader.read(X, y, sample_weight)
    found = reader.found
    if needs_target and not any(group_of(name) == "y" for name in found):
        message = (
            f"y is missing: X is a {type(X).__name__} that brings no targets of its own; pass y, "
            "or the name of a column of X"
        )
        raise DataError(message)
    return {name: found[name] for want in NAMES for name in found if group_of(name) == want}


@dataclass
class _Reader:
    features: Any
    batch_dim: str | None
    client: Client | None
    block_size_bytes: int
    found: dict[str, Any] = field(default_factory=dict)

    def read(self, X: Any, y: Any, weight: Any) -> None:
        names = {
            key: value for key, value in (("y", y), ("sample_weight", weight)) if is_name(value)
        }
        if is_frame(X) and getattr(X, "ndim", 1) == 2:
            self.found |= read_frame(
                X,
                name="X",
                target=names.get("y"),
                weight=names.get("sample_weight"),
                features=self.features,
            )
        elif is_labelled_set(X) or isinstance(X, dict):
            self._read_mapping(X, names)
        else:
            if names:
                (key, wanted), *_ = names.items()
                message = (
                    f"{key}={wanted!r} names a column, but X is a {type(X).__name__} without "
                    "named columns"
                )
                raise DataError(message)
            if self.features is not None:
                message = f"features= names columns, but X is a {type(X).__name__} without any"
                raise DataError(message)
            self._read_one("X", X, alone=y is None)
        for name, value in (("y", y), ("sample_weight", weight)):
            if value is not None and name not in names:
                self._read_one(name, value)

    def _read_mapping(self, X: Any, names: Mapping[str, Any]) -> None:
        """Read a dict of collections, or an xarray Dataset."""
        members = {str(key): value for key, value in X.items()}
        if not members:
            message = f"X is an empty {type(X).__name__}"
            raise DataError(message)
        if is_labelled_set(X):
            self.batch_dim = batch_dim_of(X, self.batch_dim)
        taken = {}
        for key, wanted in names.items():
            group = [wanted] if isinstance(wanted, str) else list(wanted)
            self._check_exist(group, members, key)
            taken[key] = group
        own = list(self.features) if self.features is not None else None
        if own is None:
            others = {member for group in taken.values() for member in group}
            own = [member for member in members if member not in others]
        else:
            self._check_exist(own, members, "features")
        for member in own:
            self._read_one(f"X.{member}", members[member])
        for key, group in taken.items():
            single = isinstance(names[key], str)
            for member in group:
                self._read_one(key if single else f"{key}.{member}", members[member])

    @staticmethod
    def _check_exist(wanted: list[Any], members: Mapping[str, Any], what: str) -> None:
        for name in wanted:
            if name not in members:
                message = f"{what}: {nearest(name, list(members), kind='entry')}"
                raise DataError(message)

    def _read_one(self, name: str, value: Any, *, alone: bool = False) -> None:
        """Read one collection; ``alone`` if it may bring targets and weights with it."""
        if isinstance(value, dict) or is_labelled_set(value):
            for key, member in value.items():
                self._read_one(f"{name}.{key}", member)
        elif is_labelled(value):
            self.batch_dim = batch_dim_of(value, self.batch_dim)
            self.found[name] = rows_first(value, self.batch_dim, name)
        elif is_frame(value):
            self.found |= read_frame(value, name=name)
        elif is_dataset(value):
            tensors = getattr(value, "tensors", None)  # of a TensorDataset: arrays already
            if tensors is not None:
                self._spread(name, list(tensors), alone=alone)
            else:
                parts, first, lengths = parts_of_dataset(
                    value, block_size_bytes=self.block_size_bytes
                )
                what = type(value).__name__
                columns = columns_of_parts(parts, first, lengths=lengths, what=what)
                self._spread(name, columns, alone=alone)
        elif (pieces := _parts(value)) is not None:
            what = f"the list of Delayed for {name}" if isinstance(value, list) else name
            first = compute_one(pieces[0], self.client, what)
            self._spread(name, columns_of_parts(pieces, first, what=what), alone=alone)
        else:
            self.found[name] = _array(name, value)

    def _spread(self, name: str, columns: list[Any], *, alone: bool) -> None:
        """Take X, y and weights out of a collection of tuples."""
        if not alone and len(columns) > 1:
            if name == "X":
                columns = columns[:1]  # y is given beside it
            else:
                message = f"{name} has tuples of {len(columns)} members, expected one array"
                raise DataError(message)
        if len(columns) > len(NAMES):
            message = (
                f"{name} has tuples of {len(columns)} members, expected (X,), (X, y) or "
                "(X, y, sample_weight)"
            )
            raise DataError(message)
        names = (name, *NAMES[1:]) if alone else (name,)
        for key, column in zip(names, columns, strict=False):
            self._read_one(key, column)


def _parts(value: Any) -> list[Any] | None:
    found = _bag_parts(value)
    return delayed_parts(value) if found is None else found


def _bag_parts(value: Any) -> list[Any] | None:
    import sys

    module = sys.modules.get("dask.bag")
    if module is None or not isinstance(value, module.Bag):
        return None
    from dask.delayed import delayed

    join = delayed(join_elements, pure=False)
    return [join(part) for part in value.to_delayed(optimize_graph=False)]


def join_elements(elements: Any) -> Any:
    """Join the elements of a partition of a Bag.

    Pairs (x, y) whose y is a single number are samples and are stacked; anything else is rows
    and is laid end to end.
    """
    items = list(elements)
    if not items:
        message = "a partition of the Bag is empty; repartition it"
        raise DataError(message)
    if not isinstance(items[0], tuple | list):
        return np.concatenate([np.asarray(item) for item in items])
    columns = list(zip(*items, strict=True))
    are_samples = len(columns) > 1 and np.ndim(columns[1][0]) == 0
    join = np.stack if are_samples else np.concatenate
    return tuple(join([np.asarray(member) for member in column]) for column in columns)


def is_name(value: Any) -> bool:
    """Tell whether something names columns instead of being one."""
    return isinstance(value, str) or (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(item, str) for item in value)
    )


def _array(name: str, value: Any) -> Any:
    if isinstance(value, da.Array):
        return value
    if hasattr(value, "detach") and hasattr(value, "numpy"):  # a torch tensor
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        message = f"{name} cannot be read as an array: {error}"
        raise DataError(message) from error
    return array
