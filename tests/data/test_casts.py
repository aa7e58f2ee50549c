from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from dask_nn.data.batches import load_window, new_rows
from dask_nn.data.blocks import Field
from dask_nn.data.casts import check_cast
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
    ],
)
def test_values_that_stay_what_they_are_may_be_cast(found, dtype):
    check_cast(found, np.dtype(dtype), "it")


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
        (np.array([1, "2"], object), "i8", "2"),
        (np.array(["2024-01-01"], "M8[s]"), "i8", "2024-01-01T00:00:00"),
        (np.array([1 + 2j]), "f8", r"\(1\+2j\)"),
        (np.array([1.5, "7"], object), "f8", "7"),
        (np.array([1.5, pd.NA], object), "f4", "<NA>"),
    ],
)
def test_values_that_would_change_are_refused_with_both_types(found, dtype, value):
    said = f"it has type {found.dtype}, expected {np.dtype(dtype)} .* the value {value}, which"
    with pytest.raises(DataError, match=said.replace("[s]", r"\[s\]")):
        check_cast(found, np.dtype(dtype), "it")


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
    import dask.dataframe as dd

    parts = [pd.DataFrame({"y": [1, 2]}), pd.DataFrame({"y": pd.Series([3, 7.9], dtype=dtype)})]
    table = dd.from_map(parts.__getitem__, [0, 1], meta=parts[0][:0])
    with pytest.raises(DataError, match=r"column 'y' of y has type float64, .* the value 7\.9"):
        read_frame(table["y"], name="y")["y"].compute(scheduler="sync")


def test_a_column_of_floats_takes_integers_and_what_is_missing():
    import dask.dataframe as dd

    parts = [pd.DataFrame({"a": values}) for values in ([0.5], [1], [None], [True])]
    table = dd.from_map(parts.__getitem__, range(4), meta=parts[0][:0])
    found = read_frame(table, name="X")["X"].compute(scheduler="sync")
    np.testing.assert_array_equal(found, [[0.5], [1.0], [NAN], [1.0]])
