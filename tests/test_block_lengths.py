"""Blocks of other lengths than were said, or found before: no row is left out without a word."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import torch
from dask.delayed import delayed
from torch import nn

import dask_nn
from dask_nn.callbacks.base import Callback
from dask_nn.errors import DataError, RankFailed

if TYPE_CHECKING:
    from collections.abc import Callable

SAID = 20
BLOCKS = 5


def train(*data: Any, **options: Any) -> Any:
    return dask_nn.train(
        partial(nn.Linear, 1, 2),
        *data,
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        batch_size=20,
        strategy=dask_nn.Synchronous(shards=2, threads_per_rank=1),
        **({"epochs": 1, "window": 2} | options),
    )


def column(lengths: list[int], *row_shape: int, dtype: str = "f4") -> da.Array:
    """Make an array of such blocks, each of which Dask takes to have 20 rows."""
    parts = [delayed(np.zeros((rows, *row_shape), dtype)) for rows in lengths]
    return da.concatenate([da.from_delayed(part, (SAID, *row_shape), dtype) for part in parts])


def wrong(block: int, rows: int) -> str:
    return rf"block {block} gave an array of {rows} rows, expected {SAID}: .*compute_chunk_sizes"


@pytest.fixture(params=["here", "spmd", "graph"])
def where(request) -> dict[str, Any]:
    """Train in this process, or on two workers, with each engine."""
    if request.param == "here":
        return {"client": None}
    return {"client": request.getfixturevalue("threads_client"), "engine": request.param}


@pytest.mark.parametrize("rows", [SAID + 4, SAID - 4], ids=["longer", "shorter"])
@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("of", ["X", "y"])
def test_a_block_of_another_length_than_its_array_says_is_refused(of, memory, rows, where):
    said, other = [SAID] * BLOCKS, [SAID] * 3 + [rows] + [SAID]
    X = column(other if of == "X" else said, 1)
    y = column(other if of == "y" else said, dtype="i8")
    with pytest.raises((DataError, RankFailed), match=wrong(3, rows)):
        train(X, y, memory=memory, **where)


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_validation_data_of_another_length_is_refused(memory, where):
    X, y = column([SAID] * BLOCKS, 1), column([SAID] * BLOCKS, dtype="i8")
    longer = column([SAID, SAID, SAID + 4], 1), column([SAID, SAID, SAID + 4], dtype="i8")
    with pytest.raises((DataError, RankFailed), match=wrong(2, SAID + 4)):
        train(X, y, validation=longer, memory=memory, **where)


def test_blocks_that_are_as_long_as_their_array_says_are_trained_on(where):
    X, y = column([SAID] * BLOCKS, 1), column([SAID] * BLOCKS, dtype="i8")
    for memory in ("resident", "stream"):
        assert len(train(X, y, validation=(X, y), memory=memory, **where).history) == 1


class AtTheEndOfAnEpoch(Callback):
    """Changes the source once an epoch is over."""

    def __init__(self, change: Callable[[], None]) -> None:
        self.change = change

    def on_epoch_end(self, record: dict[str, Any]) -> None:
        self.change()


def load(number: int, folder: str) -> tuple[np.ndarray, np.ndarray]:
    rows = int(Path(folder, "rows").read_text())
    return np.full((rows, 1), number, "f4"), np.arange(rows) % 2


@pytest.mark.parametrize("rows", [SAID + 4, SAID - 4], ids=["grows", "shrinks"])
@pytest.mark.parametrize("kind", ["Delayed", "Parquet"])
def test_a_source_that_changes_its_length_between_epochs_ends_the_run(kind, rows, where, tmp_path):
    def write(rows: int) -> None:
        """Replace the source, whole files at a time: it is read meanwhile."""
        (tmp_path / "new").write_text(str(rows))
        (tmp_path / "new").rename(tmp_path / "rows")
        for number in range(BLOCKS):
            X, y = load(number, str(tmp_path))
            frame = pd.DataFrame({"a": X[:, 0], "label": y})
            frame.to_parquet(tmp_path / "new")
            (tmp_path / "new").rename(tmp_path / f"{number}.parquet")

    write(SAID)
    data = (
        ([delayed(load)(number, str(tmp_path)) for number in range(BLOCKS)],)
        if kind == "Delayed"
        else (dask_nn.open_data(f"parquet:{tmp_path}/*.parquet"), "label")
    )
    changing = AtTheEndOfAnEpoch(partial(write, rows))
    with pytest.raises((DataError, RankFailed), match=wrong(r"\d", rows)) as caught:
        train(*data, memory="stream", epochs=9, callbacks=[changing], **where)
    assert "its source has changed since it was looked at" in str(caught.value)
