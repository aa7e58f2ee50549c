from __future__ import annotations

import re
import warnings
from decimal import Decimal
from fractions import Fraction

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from dask_nn.data import casts
from dask_nn.data.batches import load_window, new_rows
from dask_nn.data.blocks import Field
from dask_nn.data.casts import cast, check_cast
from dask_nn.data.inputs.frames import read_frame
from dask_nn.data.plan import Piece, Window
from dask_nn.data.reader import MemoryReader
from dask_nn.errors import DataError

NAN = float("nan")


@pytest.mark.parametrize(
    ("found", "dtype"),
    [
        (np.array([3.0, 200.0, -0.0]), "u1"),
        (np.array([1.0, 0.0], "f4"), "?"),
        (np.array([300, -7]), "i2"),
        (np.array([1, 0]), "?"),
        (np.array([2**62], "u8"), "i8"),
        (np.array([True, False, 1], object), "?"),
        (np.array([], "f8"), "u1"),
        (np.array([], object), "i8"),
        (np.array([1e300, NAN]), "f4"),
        (np.array([2**60]), "f4"),
        (np.array([1.5, None], object), "f8"),
        (np.array([Decimal("1e500"), Fraction(1, 3), np.float32(0.1), np.True_], object), "f4"),
        (np.array([Decimal(3), np.uint8(3), 3.0], object), "i8"),
    ],
)
def test_values_that_stay_what_they_are_may_be_cast(found, dtype):
    check_cast(found, np.dtype(dtype), "it")
    with warnings.catch_warnings(action="ignore"):
        found.astype(dtype)


@pytest.mark.parametrize(
    ("found", "dtype", "value"),
    [
        (np.array([1.0, NAN]), "u1", "nan"),
        (np.array([1.0, NAN]), "i8", "nan"),
        (np.array([1.0, NAN]), "?", "nan"),
        (np.array([np.inf]), "i4", "inf"),
        (np.array([[1.0], [7.9]], "f4"), "u1", "7.9"),
        (np.array([2.0**70]), "i8", "1.1805916207174113e\\+21"),
        (np.array([1, 300]), "u1", "300"),
        (np.array([1, -1]), "u8", "-1"),
        (np.array([1, 2]), "?", "2"),
        (np.array([2**63], "u8"), "i8", "9223372036854775808"),
        (np.array([True, None], object), "?", "None"),
        (np.array([1, pd.NA], object), "i8", "<NA>"),
        (np.array([1, 300], object), "u1", "300"),
        (np.array([1, "2"], object), "i8", "'2'"),
        (np.array([1, "x" * 99], object), "i8", r"'x{79}\.\.\."),
        (np.array([1, np.float64(1e30)], object), "i8", r"1e\+30"),
        (np.array([1, np.timedelta64(3, "s")], object), "i8", "3 seconds"),
        (np.array([1, np.datetime64("2024-01-01")], object), "i8", "2024-01-01"),
        (np.array([1, np.array([3])], object), "i8", r"array\(\[3\]\)"),
        (np.array(["2024-01-01"], "M8[s]"), "i8", "2024-01-01T00:00:00"),
        (np.array([1 + 2j]), "f8", r"\(1\+2j\)"),
        (np.array(["7"]), "f4", "'7'"),
        (np.array([1.5, "7"], object), "f8", "'7'"),
        (np.array([1.5, b"7"], object), "f8", "b'7'"),
        (np.array([1.5, pd.NA], object), "f4", "<NA>"),
        (np.array([1.5, np.timedelta64(3, "s")], object), "f4", "3 seconds"),
        (np.array([1.5, 1 + 2j], object), "f4", r"\(1\+2j\)"),
        (np.array([1.5, np.complex64(1 + 2j)], object), "f4", r"\(1\+2j\)"),
        (np.array([1.5, 10**400], object), "f8", r"10{79}\.\.\."),
        (np.array([1.5, 10**5000], object), "f8", "<int>"),
        (np.array([1.5, Fraction(10**400)], object), "f8", r"Fraction\(10{70}\.\.\."),
    ],
)
def test_values_that_would_change_are_refused_with_both_types(found, dtype, value):
    said = f"it has type {found.dtype}, expected {np.dtype(dtype)} .* the value {value}, which"
    with pytest.raises(DataError, match=said.replace("[s]", r"\[s\]")):
        check_cast(found, np.dtype(dtype), "it")


@pytest.mark.parametrize(
    ("found", "dtype", "advice"),
    [
        (np.array([1.0, NAN]), "i8", "fill the missing values"),
        (np.array([1, None], object), "i8", "fill the missing values"),
        (np.array([1, pd.NA], object), "i8", "fill the missing values"),
        (np.array([1, pd.NA], object), "f8", "fill the missing values"),
        (np.array([1, pd.NaT], object), "f8", "fill the missing values"),
        (np.array(["NaT"], "M8[s]"), "i8", "fill the missing values"),
        (np.array([1, Decimal("sNaN")], object), "i8", "give all blocks a type that holds"),
        (np.array([1, 300]), "u1", "give all blocks a type that holds"),
        (np.array([7.9]), "u1", "give all blocks a type that holds"),
        (np.array([np.inf]), "i8", "give all blocks a type that holds"),
        (np.array([1, 10**400], object), "f8", "give all blocks a type that holds"),
        (np.array(["7"]), "f4", "make numbers of such values"),
        (np.array([1.5, "7"], object), "f8", "make numbers of such values"),
        (np.array([1, np.timedelta64(3, "s")], object), "f8", "make numbers of such values"),
        (np.array(["2024-01-01"], "M8[s]"), "i8", "make numbers of such values"),
        (np.array([1, np.array([3, 4])], object), "i8", "make numbers of such values"),
    ],
)
def test_what_is_advised_fits_the_value(found, dtype, advice):
    with pytest.raises(DataError, match=f"which that type cannot hold: {advice}"):
        check_cast(found, np.dtype(dtype), "it")


def test_objects_are_not_looked_at_one_by_one_where_all_of_them_are_floats(monkeypatch):
    seen = []
    fits = casts._fits
    monkeypatch.setattr(
        casts, "_fits", lambda value, dtype: seen.append(value) or fits(value, dtype)
    )
    many = [0.5, None, 3, np.float32(1), Decimal("0.1"), Fraction(1, 3), np.True_, NAN] * 1000
    check_cast(np.array(many, object), np.dtype("f4"), "it")
    assert not seen
    with pytest.raises(DataError, match="the value '7'"):
        check_cast(np.array([*many, "7"], object), np.dtype("f4"), "it")
    assert seen[-1] == "7"


def test_a_float_too_large_for_the_type_becomes_infinite_without_a_warning():
    with warnings.catch_warnings(action="error"):
        assert cast(np.array([1e300]), np.dtype("f4"), "it").tolist() == [np.inf]


@pytest.mark.parametrize("stored", ["u1", "i8", "?"])
def test_a_window_takes_no_part_of_a_number(stored):
    field = Field(name="X", shape=(), dtype=np.dtype(stored))
    kept = torch.from_numpy(np.empty(0, stored)).dtype
    reader = MemoryReader([(np.array([1], stored),), (np.array([1.0, 0.5]),)])
    window = Window(0, 3, (Piece(0, 0, 1), Piece(1, 0, 2)))
    said = r"block 1 of X has type float64, expected .* the value 0\.5"
    with pytest.raises(DataError, match=said):
        load_window(window, np.arange(3), reader, new_rows(3, (field,), (kept,)), ["X"])


@pytest.mark.parametrize("dtype", ["float64", "Float64", "double[pyarrow]"])
def test_a_column_of_integers_takes_no_part_of_a_number(dtype):
    parts = [pd.DataFrame({"y": [1, 2]}), pd.DataFrame({"y": pd.Series([3, 7.9], dtype=dtype)})]
    table = dd.from_map(parts.__getitem__, [0, 1], meta=parts[0][:0])
    said = rf"column 'y' of y has type {re.escape(dtype)}, expected int64 .* the value 7\.9"
    with pytest.raises(DataError, match=said):
        read_frame(table["y"], name="y")["y"].compute(scheduler="sync")


def test_a_column_of_floats_takes_integers_and_what_is_missing():
    parts = [pd.DataFrame({"a": values}) for values in ([0.5], [1], [None], [True])]
    table = dd.from_map(parts.__getitem__, range(4), meta=parts[0][:0])
    found = read_frame(table, name="X")["X"].compute(scheduler="sync")
    np.testing.assert_array_equal(found, [[0.5], [1.0], [NAN], [1.0]])


COLUMNS = {
    "integers": pd.array([1, None], dtype="Int64"),
    "booleans": pd.array([True, None], dtype="boolean"),
    "floats": pd.array([1.0, None], dtype="Float32"),
    "integers of Arrow": pd.array([1, None], dtype="int64[pyarrow]"),
    "booleans of Arrow": pd.array([True, None], dtype="bool[pyarrow]"),
    "floats of Arrow": pd.array([1.0, None], dtype="float[pyarrow]"),
    "decimals of Arrow": pd.array([Decimal(1), None], pd.ArrowDtype(pa.decimal128(5, 2))),
    "sparse floats": pd.arrays.SparseArray([1.0, NAN]),
}


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("values", COLUMNS.values(), ids=COLUMNS)
def test_a_column_of_floats_takes_the_numbers_of_pandas_and_what_is_missing(values, dtype):
    parts = [pd.DataFrame({"a": np.zeros(2, dtype)}), pd.DataFrame({"a": values})]
    table = dd.from_map(parts.__getitem__, [0, 1], meta=parts[0][:0])
    found = read_frame(table["a"], name="X")["X"].compute(scheduler="sync")
    np.testing.assert_array_equal(found, np.array([0, 0, 1, NAN], dtype))
    assert found.dtype == dtype


@pytest.mark.parametrize("values", [pd.array([None] * 2, pd.ArrowDtype(pa.null())), [None] * 2])
def test_a_column_of_floats_may_be_missing_altogether(values):
    parts = [pd.DataFrame({"a": [0.5]}), pd.DataFrame({"a": pd.Series(values)})]
    table = dd.from_map(parts.__getitem__, [0, 1], meta=parts[0][:0])
    found = read_frame(table["a"], name="X")["X"].compute(scheduler="sync")
    np.testing.assert_array_equal(found, [0.5, NAN, NAN])
