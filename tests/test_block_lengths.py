"""Blocks of other lengths than were said, or found before: no row is left out without a word."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import torch
from dask.delayed import delayed
from dask.utils import ensure_dict
from torch import nn

import dask_nn
from dask_nn.callbacks.base import Callback
from dask_nn.data.cuts import cut_rows
from dask_nn.errors import DataError, RankFailed

if TYPE_CHECKING:
    from collections.abc import Callable

SAID = 20
BLOCKS = 5


def train(*data: Any, **options: Any) -> Any:
    return dask_nn.train(
        partial(nn.Linear, 1, 2),
        *data,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        batch_size=20,
        strategy=dask_nn.Synchronous(shards=2, threads_per_rank=1),
        **({"loss": nn.CrossEntropyLoss(), "epochs": 1, "window": 2} | options),
    )


def column(lengths: list[int], *row_shape: int, dtype: str = "f4") -> da.Array:
    """Make an array of such blocks, each of which Dask takes to have 20 rows."""
    parts = [delayed(np.zeros((rows, *row_shape), dtype)) for rows in lengths]
    return da.concatenate([da.from_delayed(part, (SAID, *row_shape), dtype) for part in parts])


def wrong(block: int | str, of: str, rows: int) -> str:
    said = rf"block {block} of {of} gave an array of {rows} rows"
    return rf"{said}, expected {SAID}: .*compute_chunk_sizes"


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
    with pytest.raises((DataError, RankFailed), match=wrong(3, of, rows)):
        train(X, y, memory=memory, **where)


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_validation_data_of_another_length_is_refused(memory, where):
    X, y = column([SAID] * BLOCKS, 1), column([SAID] * BLOCKS, dtype="i8")
    longer = column([SAID, SAID, SAID + 4], 1), column([SAID, SAID, SAID + 4], dtype="i8")
    said = "validation data: " + wrong(2, "(X|y)", SAID + 4)
    with pytest.raises((DataError, RankFailed), match=said):
        train(X, y, validation=longer, memory=memory, **where)


def halves(first: int, *row_shape: int, dtype: str = "i8") -> da.Array:
    """Make an array of two blocks, each of which Dask takes to have 50 rows."""
    parts = [delayed(np.zeros((rows, *row_shape), dtype)) for rows in (first, 50)]
    return da.concatenate([da.from_delayed(part, (50, *row_shape), dtype) for part in parts])


def cut(name: str, rows: int) -> str:
    return rf"block 0 of {name} as it was given gave an array of {rows} rows, expected 50"


longer_or_shorter = pytest.mark.parametrize("rows", [54, 46], ids=["longer", "shorter"])


@longer_or_shorter
@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("of", ["y", "sample_weight"])
def test_a_block_is_compared_before_it_is_cut_at_other_rows(of, memory, rows, where):
    X, y = column([SAID] * BLOCKS, 1), column([SAID] * BLOCKS, dtype="i8")
    inputs = {"y": y} | {of: halves(rows)}
    with pytest.raises((DataError, RankFailed), match=cut(of, rows)):
        train(X, **inputs, memory=memory, **where)


@longer_or_shorter
@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_validation_data_is_compared_before_it_is_cut(memory, rows, where):
    X, y = column([SAID] * BLOCKS, 1), column([SAID] * BLOCKS, dtype="i8")
    said = "(?s)validation data: .*" + cut("y", rows)
    with pytest.raises((DataError, RankFailed), match=said):
        train(X, y, validation=(X, halves(rows)), memory=memory, **where)


@longer_or_shorter
def test_evaluate_compares_a_block_before_it_is_cut(rows, where):
    X = column([SAID] * BLOCKS, 1)
    with pytest.raises(DataError, match=cut("y", rows)):
        dask_nn.evaluate(nn.Linear(1, 2), X, halves(rows), metrics=["accuracy"])


class Sum(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b


@longer_or_shorter
def test_predict_compares_a_block_of_another_input_before_it_is_cut(rows, where):
    X = {"a": column([SAID] * BLOCKS, 1), "b": halves(rows, 1, dtype="f4")}
    with pytest.raises(DataError, match=cut(r"X\.b", rows)):
        dask_nn.predict(Sum(), X).compute()


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_blocks_that_are_as_long_as_told_are_cut_at_other_rows(memory, where):
    rows = np.arange(100)
    X = da.from_array(rows[:, None].astype("f4") / 100, chunks=(SAID, 1))
    seen = []
    for y in (da.from_array(rows % 2, chunks=SAID), da.from_array(rows % 2, chunks=50)):
        found = train(X, y, validation=(X, y), memory=memory, **where)
        scores = dask_nn.evaluate(found.model, X, y, metrics=["accuracy"])
        seen.append((found.weights_sha256, found.history[-1]["val_loss"], scores))
    assert seen[0] == seen[1]


def test_to_be_compared_costs_no_task_and_little_room():
    blocks = 1000
    y = da.zeros(10 * blocks, chunks=10).map_blocks(np.negative, meta=np.empty(0))
    rows = (5, *[10] * (blocks - 1), 5)
    with dask.config.set({"array.rechunk.method": "tasks"}):
        plain, compared = (
            ensure_dict(dask.optimize(array)[0].dask)
            for array in (y.rechunk({0: rows}), cut_rows("y", y, rows))
        )
    assert len(compared) == len(plain)
    assert len(pickle.dumps(compared)) < len(pickle.dumps(plain)) + 200 * blocks


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
    with pytest.raises((DataError, RankFailed), match=wrong(r"\d", "(X|y)", rows)) as caught:
        train(*data, memory="stream", epochs=9, callbacks=[changing], **where)
    assert "its source has changed since it was looked at" in str(caught.value)


def squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Broadcast what has another shape, as a loss of one's own may."""
    return ((output[:, 0] - target) ** 2).mean()


@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize(("of", "wrong_blocks"), [("X", [1]), ("y", [0, 1, 2])], ids=["X", "y"])
def test_validation_data_of_another_row_shape_is_refused(of, wrong_blocks, memory, where):
    def parts(name: str, *row_shape: int) -> da.Array:
        more = wrong_blocks if name == of else []
        shapes = [(SAID, *row_shape, *([1] if number in more else [])) for number in range(3)]
        made = [delayed(np.ones(shape, "f4")) for shape in shapes]
        return da.concatenate([da.from_delayed(m, (SAID, *row_shape), "f4") for m in made])

    X, y = np.ones((BLOCKS * SAID, 1), "f4"), np.ones(BLOCKS * SAID, "f4")
    X, y = da.from_array(X, chunks=(SAID, 1)), da.from_array(y, chunks=SAID)
    said = rf"validation data: block {wrong_blocks[0]} of {of} has shape"
    with pytest.raises((DataError, RankFailed), match=said):
        train(X, y, validation=(parts("X", 1), parts("y")), loss=squares, memory=memory, **where)
