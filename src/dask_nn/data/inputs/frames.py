"""Tables, pandas' and Dask's: columns by name, categories as codes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dask_nn.data.casts import cast
from dask_nn.data.inputs.parts import array_of_parts
from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "Indexed",
    "Table",
    "group_of_names",
    "is_dask_frame",
    "is_frame",
    "nearest",
    "read_frame",
]


def is_frame(value: Any) -> bool:
    """Tell whether something is a table or a column of one, of pandas or Dask."""
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(value, pandas.DataFrame | pandas.Series):
        return True
    return is_dask_frame(value)


def nearest(wanted: Any, names: Sequence[Any], kind: str = "column") -> str:
    """Say which names there are, and which is nearest to one that there is not."""
    known = {str(name): name for name in names}
    close = get_close_matches(str(wanted), list(known), n=1)
    hint = f"; did you mean {known[close[0]]!r}?" if close else "."
    shown = ", ".join(repr(name) for name in list(names)[:20])
    more = ", ..." if len(names) > 20 else ""
    return f"there is no {kind} {wanted!r}{hint} There are {shown}{more}"


def group_of_names(wanted: Any) -> list[Any]:
    """Give names as a list: of one name, or of several."""
    return list(wanted) if isinstance(wanted, list | tuple) else [wanted]


class Indexed(NamedTuple):
    """The rows of a partition of a table, and their index."""

    rows: np.ndarray[Any, Any]
    index: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the rows."""
        return tuple(self.rows.shape)


def read_frame(
    frame: Any,
    *,
    name: str,
    target: Any = None,
    weight: Any = None,
    features: Any = None,
    indexed: bool = False,
) -> dict[str, Any]:
    """Read a table or a column as arrays of rows.

    Parameters
    ----------
    frame : DataFrame or Series, of pandas or Dask
        With columns of numbers, booleans or known categories.
    name : str
        What it is: ``"X"``, ``"y"`` or ``"sample_weight"``.
    target, weight : name or list of names, optional
        Columns of `frame` that are y, and sample weights.
    features : list of names, optional
        Columns that are X; all others by default.
    indexed : bool
        Whether the blocks of a Dask table are `Indexed`, and no arrays: rows and index out of the
        same partition, which Dask may cut in another way where it reads other columns.

    Returns
    -------
    dict of str to Array
        Under `name` shape (rows, columns), or (rows,) for a Series; and ``"y"`` and
        ``"sample_weight"`` where asked for.

    Raises
    ------
    DataError
        If a column does not exist, or holds neither numbers nor known categories.
    """
    tables = _tables(frame, name=name, target=target, weight=weight, features=features)
    if not is_dask_frame(frame):
        return {key: table.encode(frame) for key, table in tables.items()}
    wanted = list(dict.fromkeys(column for table in tables.values() for column in table.columns))
    chosen = frame if frame.ndim == 1 else frame[wanted]
    parts = chosen.to_delayed()
    meta = chosen._meta  # noqa: SLF001 - what Dask knows of the columns
    return {
        key: array_of_parts(
            parts,
            table.encode_indexed if indexed else table.encode,
            like=table.encode(meta),
            name=f"dask-nn-{key}",
        )
        for key, table in tables.items()
    }


@dataclass(frozen=True)
class Table:
    """Which columns make an array, and of which type.

    Parameters
    ----------
    columns : tuple
        Their names; of one alone if the array has one axis.
    flat : bool
        Whether the array has one axis.
    dtype : numpy.dtype
        Its type.
    name : str
        How errors call it.
    categories : dict
        Of each column of categories, those that its codes count.
    """

    columns: tuple[Any, ...]
    flat: bool
    dtype: np.dtype[Any]
    name: str
    categories: dict[Any, Any] = field(default_factory=dict)

    def encode(self, frame: Any) -> np.ndarray[Any, Any]:
        """Give the rows of a pandas table; shape (rows, columns), or (rows,)."""
        if frame.ndim == 1:
            return self._column(frame)
        if self.flat:
            return self._column(frame[self.columns[0]])
        rows = np.empty((len(frame), len(self.columns)), dtype=self.dtype)
        for place, column in enumerate(self.columns):
            rows[:, place] = self._column(frame[column])
        return rows

    def encode_indexed(self, frame: Any) -> Indexed:
        """Give the rows of a pandas table, and their index."""
        return Indexed(self.encode(frame), frame.index)

    def _column(self, series: Any) -> np.ndarray[Any, Any]:
        if series.dtype.name == "category":
            self._refuse_missing(np.asarray(series.isna()), series)
            codes = np.asarray(self._with_known_categories(series).cat.codes)
            return codes.astype(self.dtype)
        if series.name in self.categories:
            message = (
                f"column {series.name!r} of {self.name} has type {series.dtype} in this partition "
                "and is a category in the DataFrame's meta; make it one, or mend the meta"
            )
            raise DataError(message)
        values = self._values(series)
        what = f"column {series.name!r} of {self.name}"
        return cast(values, self.dtype, what, kind=series.dtype)

    def _values(self, series: Any) -> np.ndarray[Any, Any]:
        """Give the values of a column, NaN where one is missing and floats are expected."""
        if isinstance(series.dtype, np.dtype):
            return np.asarray(series)
        if self.dtype.kind != "f":
            self._refuse_missing(np.asarray(series.isna()), series)
            return np.asarray(series)
        # pandas itself would make numbers of text and dates.
        whole = self.dtype if series.dtype.kind in "biuf" else object
        return np.asarray(series.to_numpy(dtype=whole, na_value=np.nan))

    def _with_known_categories(self, series: Any) -> Any:
        """Give a column the categories of the whole table; a partition may have others."""
        known = self.categories.get(series.name)
        if known is None:
            message = (
                f"column {series.name!r} of {self.name} is a category in this partition, and none "
                "in the DataFrame's meta, so that its codes would mean something else in each "
                "partition; mend the meta, or call categorize()"
            )
            raise DataError(message)
        if series.cat.categories.equals(known):
            return series
        ours = series.cat.set_categories(known)
        if (strange := np.asarray(ours.isna())).any():
            listed = ", ".join(map(repr, known[:8])) + (", ..." if len(known) > 8 else "")
            message = (
                f"column {series.name!r} of {self.name} has the category "
                f"{series[strange].iloc[0]!r}, which is none of those of the whole DataFrame "
                f"({listed}); call categorize() on it"
            )
            raise DataError(message)
        return ours

    def _refuse_missing(self, missing: np.ndarray[Any, Any], series: Any) -> None:
        if missing.any():
            message = (
                f"column {series.name!r} of {self.name} has {int(missing.sum())} missing values "
                f"(the first at index {series.index[missing.argmax()]!r}); fill or drop them"
            )
            raise DataError(message)


def _tables(frame: Any, *, name: str, target: Any, weight: Any, features: Any) -> dict[str, Table]:
    meta = frame._meta if is_dask_frame(frame) else frame  # noqa: SLF001
    if frame.ndim == 1:
        dtype = _dtype_of(meta, meta.name, name, nan=name != "y")
        categories = _categories([meta])
        return {name: Table((meta.name,), flat=True, dtype=dtype, name=name, categories=categories)}
    columns = list(meta.columns)
    taken = {}
    for key, wanted in (("y", target), ("sample_weight", weight)):
        if wanted is not None:
            taken[key] = group_of_names(wanted)
            _check_exist(taken[key], columns, key)
    own = list(features) if features is not None else None
    if own is None:
        others = {column for group in taken.values() for column in group}
        own = [column for column in columns if column not in others]
    else:
        _check_exist(own, columns, "features")
    if not own:
        message = f"no column of {name} is left for features"
        raise DataError(message)
    tables = {name: _table(meta, own, name, flat=False)}
    for key, group in taken.items():
        wanted = target if key == "y" else weight
        tables[key] = _table(meta, group, key, flat=not isinstance(wanted, list | tuple))
    return tables


def _table(meta: Any, columns: list[Any], name: str, *, flat: bool) -> Table:
    types = [_dtype_of(meta[column], column, name, nan=name != "y") for column in columns]
    categories = _categories(meta[column] for column in columns)
    dtype = np.result_type(*types)
    return Table(tuple(columns), flat=flat, dtype=dtype, name=name, categories=categories)


def _categories(columns: Iterable[Any]) -> dict[Any, Any]:
    return {one.name: one.cat.categories for one in columns if one.dtype.name == "category"}


def _check_exist(wanted: Sequence[Any], columns: Sequence[Any], what: str) -> None:
    for column in wanted:
        if column not in columns:
            message = f"{what}: {nearest(column, columns)}"
            raise DataError(message)


def _dtype_of(series: Any, column: Any, name: str, *, nan: bool) -> np.dtype[Any]:
    """Find the type in which a column is stored."""
    dtype = series.dtype
    if dtype.name == "category":
        if "__UNKNOWN_CATEGORIES__" in series.cat.categories:
            message = (
                f"the categories of column {column!r} of {name} are unknown; call "
                "categorize() on the DataFrame first"
            )
            raise DataError(message)
        return np.dtype(np.int64) if name == "y" else np.asarray(series.cat.codes).dtype
    if isinstance(dtype, np.dtype):
        if dtype.kind in "biuf":
            return dtype
    elif getattr(dtype, "kind", "O") in "iub":  # pandas' nullable numbers
        if not nan:
            return np.dtype(np.int64)
        return np.dtype(np.float64 if dtype.itemsize > 2 else np.float32)
    elif getattr(dtype, "kind", "O") == "f":
        return np.dtype(f"f{dtype.itemsize}")
    message = (
        f"column {column!r} of {name} has type {dtype}, expected numbers, booleans or categories; "
        "make it a category (astype('category'), with Dask also categorize()), encode it, or "
        "leave it out"
    )
    raise DataError(message)


def is_dask_frame(value: Any) -> bool:
    """Tell whether something is a table or a column of Dask's."""
    module: Any = sys.modules.get("dask.dataframe")
    return bool(module and isinstance(value, (module.DataFrame, module.Series)))
