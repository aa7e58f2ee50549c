"""Columns of a table that are no numbers in a later partition: nothing makes numbers of them."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import dask_nn
from dask_nn.errors import DataError

FIRST = pd.DataFrame({"a": np.arange(4.0), "b": np.arange(4.0), "y": [0.0, 1.0, 0.0, 1.0]})

# What float() takes, or pandas does, and how the error shows the first of them.
STRANGE = {
    "text": (pd.array(["1e3", "7", " 8 ", "9"], "str"), "'1e3'"),
    "words": (pd.array(["7", "x", "8", None], "str"), "'7'"),
    "nullable text": (pd.array(["1e3", "7", " 8 ", None], "string"), "'1e3'"),
    "text of Arrow": (pd.array(["1e3", "7", " 8 ", None], "string[pyarrow]"), "'1e3'"),
    "text objects": (pd.Series(["1e3", "7", " 8 ", "9"], dtype=object), "'1e3'"),
    "dates": (pd.date_range("2024-01-01", periods=4), "2024-01-01T"),
    "dates of a zone": (
        pd.date_range("2024-01-01", periods=4, tz="UTC"),
        "Timestamp('2024-01-01 00:00:00+0000', tz='UTC')",
    ),
    "dates of Arrow": (
        pd.Series(pd.date_range("2024-01-01", periods=4)).astype("timestamp[us][pyarrow]"),
        "Timestamp('2024-01-01 00:00:00')",
    ),
    "periods": (pd.period_range("2024-01-01", periods=4), "Period('2024-01-01', 'D')"),
    "durations": (pd.to_timedelta([3, 4, 5, 6], unit="s"), "3000000 microseconds"),
    "durations of Arrow": (
        pd.Series(pd.to_timedelta([3, 4, 5, 6], unit="s")).astype("duration[us][pyarrow]"),
        "Timedelta('0 days 00:00:03')",
    ),
}
strange = pytest.mark.parametrize(("values", "shown"), STRANGE.values(), ids=STRANGE)


def table(values: Any) -> dd.DataFrame:
    """Make a table of two partitions; a column of floats is something else in the second."""
    parts = [FIRST, FIRST.assign(b=values)]
    return dd.from_map(parts.__getitem__, [0, 1], meta=FIRST[:0])


def refused(shown: str, of: str) -> str:
    return (
        rf"block 1.* could not be computed.*: column 'b' of {of} has type .*, expected float64 in "
        rf"all blocks, and the value {re.escape(shown)}"
    )


def train(*data: Any, **options: Any) -> Any:
    return dask_nn.train(
        nn.Linear(2, 2),
        *data,
        loss=difference,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        batch_size=4,
        epochs=1,
        strategy=dask_nn.Synchronous(shards=1, threads_per_rank=1),
        client=None,
        **options,
    )


def difference(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output[:, 0] - target).abs().mean()


@strange
@pytest.mark.parametrize("of", ["X", "y"])
@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_train_refuses_them(memory, of, values, shown):
    with pytest.raises(DataError, match=refused(shown, of)):
        train(table(values), "b" if of == "y" else "y", memory=memory)


@strange
@pytest.mark.parametrize("of", ["X", "y"])
def test_evaluate_refuses_them(of, values, shown):
    target = "b" if of == "y" else "y"
    with pytest.raises(DataError, match=refused(shown, of)):
        dask_nn.evaluate(nn.Linear(2, 1), table(values), target, metrics=["mse"])


@strange
def test_predict_refuses_them(values, shown):
    lazy = dask_nn.predict(nn.Linear(2, 1), table(values), features=["a", "b"], output="raw")
    with pytest.raises(DataError, match=refused(shown, "X")):
        lazy.compute()
