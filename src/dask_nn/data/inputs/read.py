"""From whatever the user has to named arrays of rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np

from dask_nn.data.inputs.bags import is_bag, parts_of_bag
from dask_nn.data.inputs.datasets import is_dataset, parts_of_dataset
from dask_nn.data.inputs.frames import (
    group_of_names,
    is_dask_frame,
    is_frame,
    nearest,
    read_frame,
)
from dask_nn.data.inputs.labelled import batch_dim_of, is_labelled, is_labelled_set, rows_first
from dask_nn.data.inputs.parts import columns_of_parts, delayed_parts, head_of, look_at
from dask_nn.data.inputs.plain import as_numpy
from dask_nn.errors import ConfigurationError, DataError
from dask_nn.grouping import group_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distributed import Client

__all__ = ["Rows", "is_name", "read_inputs", "read_rows"]

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
    _check_features(features)
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


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What predictions are made from.

    Parameters
    ----------
    arrays : dict of str to array
        ``"X"``, or one entry for each member of a dictionary.
    like : collection
        X itself; of a dictionary the first member whose rows have labels, if one has.
    indexed : str or None
        The array whose blocks are `Indexed`, if there is one.
    """

    arrays: dict[str, Any]
    like: Any
    indexed: str | None


def read_rows(X: Any, *, features: Any = None, batch_dim: str | None = None) -> Rows:
    """Read inputs of any kind to predict from them, with what is kept of their rows.

    Parameters
    ----------
    X, features, batch_dim
        As for `read_inputs`.

    Raises
    ------
    DataError
        If X is of no kind that can be read, or names do not exist.
    """
    _check_features(features)
    reader = _Reader(features=features, batch_dim=batch_dim, keep_index=True)
    reader.read(X, None, None)
    arrays = {name: array for name, array in reader.found.items() if group_of(name) == "X"}
    like = reader.like if isinstance(X, dict) else X
    return Rows(arrays=arrays, like=like, indexed=reader.indexed)


def _check_features(features: Any) -> None:
    if features is not None and not isinstance(features, list | tuple):
        message = f"features must be a list of names, got {features!r}"
        if isinstance(features, str):
            message += f"; for a single one write features=[{features!r}]"
        raise ConfigurationError(message)


@dataclass
class _Reader:
    features: Any
    batch_dim: str | None
    client: Client | None = None
    block_size_bytes: int = BLOCK_SIZE_BYTES
    keep_index: bool = False
    like: Any = None
    indexed: str | None = None
    of_samples: bool = False
    found: dict[str, Any] = field(default_factory=dict)

    def read(self, X: Any, y: Any, weight: Any) -> None:
        names = {
            key: value for key, value in (("y", y), ("sample_weight", weight)) if is_name(value)
        }
        if is_frame(X) and getattr(X, "ndim", 1) == 2:
            self._read_frame(
                "X",
                X,
                target=names.get("y"),
                weight=names.get("sample_weight"),
                features=self.features,
            )
        elif is_labelled_set(X) or isinstance(X, dict):
            self._read_mapping(X, names)
        elif names and self.features is None and hasattr(X, "coords"):
            self._read_one("X", X)
            self._read_named(names, {str(key): value for key, value in X.coords.items()})
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
        # Coordinates are inputs only where they are named.
        known = members | {str(key): value for key, value in getattr(X, "coords", {}).items()}
        taken = {str(member) for wanted in names.values() for member in group_of_names(wanted)}
        if self.features is None:
            own = [member for member in members if member not in taken]
        else:
            own = [str(member) for member in self.features]
            self._check_exist(own, known, "features")
        for key, wanted in names.items():
            self._check_exist(group_of_names(wanted), known, key)
        for member in own:
            self._read_one(f"X.{member}", known[member])
        self._read_named(names, known)

    def _read_named(self, names: Mapping[str, Any], known: Mapping[str, Any]) -> None:
        """Read the members that are targets and weights."""
        for key, wanted in names.items():
            group = group_of_names(wanted)
            self._check_exist(group, known, key)
            for member in map(str, group):
                single = not isinstance(wanted, list | tuple)
                self._read_one(key if single else f"{key}.{member}", known[member])

    @staticmethod
    def _check_exist(wanted: list[Any], members: Mapping[str, Any], what: str) -> None:
        for name in wanted:
            if str(name) not in members:
                message = f"{what}: {nearest(name, list(members), kind='entry')}"
                raise DataError(message)

    def _read_one(self, name: str, value: Any, *, alone: bool = False) -> None:
        """Read one collection; ``alone`` if it may bring targets and weights with it."""
        if isinstance(value, dict) or is_labelled_set(value):
            for key, member in value.items():
                self._read_one(f"{name}.{key}", member)
        elif is_labelled(value):
            self.batch_dim = batch_dim_of(value, self.batch_dim)
            self.like = value if self.like is None else self.like
            self.found[name] = rows_first(value, self.batch_dim, name)
        elif is_frame(value):
            self._read_frame(name, value)
        elif is_dataset(value):
            tensors = getattr(value, "tensors", None)  # of a TensorDataset: arrays already
            if tensors is not None:
                self._spread(name, list(tensors), alone=alone)
            else:
                parts, first, lengths = parts_of_dataset(
                    value, block_size_bytes=self.block_size_bytes
                )
                columns = columns_of_parts(parts, first, lengths=lengths)
                self._spread(name, columns, alone=alone)
        elif is_bag(value):
            parts, layout = parts_of_bag(
                value, name=name, beside_samples=self.of_samples, client=self.client
            )
            self.of_samples = layout.samples
            self._spread(name, columns_of_parts(parts, layout.value), alone=alone)
        elif (pieces := delayed_parts(value)) is not None:
            what = f"the list of Delayed for {name}" if isinstance(value, list) else name
            first = look_at(pieces[0], head_of, self.client, what=what)
            self._spread(name, columns_of_parts(pieces, first), alone=alone)
        else:
            self.found[name] = _array(name, value)

    def _read_frame(self, name: str, frame: Any, **columns: Any) -> None:
        """Read a table; one of Dask that comes first keeps its index with its rows, if wanted."""
        indexed = self.keep_index and self.like is None and is_dask_frame(frame)
        self.found |= read_frame(frame, name=name, indexed=indexed, **columns)
        self.like = frame if self.like is None else self.like
        if indexed:
            self.indexed = name

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


def is_name(value: Any) -> bool:
    """Tell whether something names columns instead of being one."""
    return isinstance(value, str | int | np.integer) or (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(item, str) for item in value)
    )


def _array(name: str, value: Any) -> Any:
    if isinstance(value, da.Array):
        return value
    try:
        return as_numpy(value)
    except ValueError as error:
        message = f"{name} cannot be read as an array: {error}"
        raise DataError(message) from error
