"""Blocks of another number type than the first: no value is changed without a word."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import torch
from dask.delayed import delayed
from torch import nn

import dask_nn
from dask_nn.errors import DataError, RankFailed

if TYPE_CHECKING:
    from pathlib import Path

# What pandas makes of a file with a missing value, and what else is no byte.
STRANGE = {"missing": [5, np.nan, 7, 8], "broken": [5, 6, 7.9, 8], "large": [5, 6, 7, 300.0]}
LABELS = [0, 1, 0, 1]
WHOLE = [5.0, 6.0, 7.0, 8.0]

strange = pytest.mark.parametrize("values", STRANGE.values(), ids=STRANGE)
in_memory = pytest.mark.parametrize("memory", ["resident", "stream"])


def scaled(rows: torch.Tensor) -> torch.Tensor:
    return rows.float() / 8


def train(*data: Any, kind: type[nn.Linear] = nn.Linear, **options: Any) -> Any:
    torch.manual_seed(0)
    return dask_nn.train(
        kind(1, 2),
        *data,
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        epochs=1,
        strategy=dask_nn.Synchronous(shards=2, threads_per_rank=1),
        **{"batch_size": 4, "transform": scaled, **options},
    )


def table(folder: Path, a: Any, label: Any = LABELS) -> Any:
    """Make a table of two files: the first has bytes, the second what is given."""
    first = pd.DataFrame({"a": np.array([1, 2, 3, 4], "u1"), "label": np.array(LABELS, "u1")})
    first.to_parquet(folder / "0.parquet")
    pd.DataFrame({"a": a, "label": label}).to_parquet(folder / "1.parquet")
    return dask_nn.open_data(f"parquet:{folder}/*.parquet")


def parts(a: Any, label: Any = LABELS) -> list[Any]:
    """Make the same of Delayed."""
    first = np.array([[1], [2], [3], [4]], "u1"), np.array(LABELS, "u1")
    return [delayed(first), delayed((np.array(a)[:, None], np.array(label)))]


@pytest.fixture(params=["here", "spmd", "graph"])
def where(request) -> dict[str, Any]:
    """Train in this process, or on two workers, with each engine."""
    if request.param == "here":
        return {"client": None}
    return {"client": request.getfixturevalue("threads_client"), "engine": request.param}


@strange
@in_memory
def test_a_file_whose_features_have_another_type_is_refused(values, memory, tmp_path):
    with pytest.raises(DataError, match=r"column 'a' of X has type float64, expected uint8"):
        train(table(tmp_path, values), "label", memory=memory, client=None)


@in_memory
def test_a_file_whose_labels_have_another_type_is_refused(memory, where, tmp_path):
    data = table(tmp_path, WHOLE, [1, 1, None, 1])
    said = r"column 'label' of y has type float64, expected uint8 .* the value nan"
    with pytest.raises(DataError, match=said):
        train(data, "label", memory=memory, **where)


@strange
@in_memory
def test_a_part_whose_features_have_another_type_is_refused(values, memory, where):
    said = r"block 1 of X has type float64, expected uint8"
    with pytest.raises((DataError, RankFailed), match=said):
        train(parts(values), memory=memory, **where)


class Members(nn.Linear):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return super().forward((left + right).float())


@in_memory
def test_the_member_of_a_dictionary_is_named(memory, where):
    X = {"left": da.ones((8, 1), "f4", chunks=4), "right": told("u1", [[1]] * 4, [[300]] * 4)}
    with pytest.raises((DataError, RankFailed), match=r"block 1 of X\.right has type int64, exp"):
        train(
            X,
            told("i8", LABELS, LABELS),
            kind=Members,
            batch_size=8,
            transform=None,
            memory=memory,
            **where,
        )


@pytest.mark.parametrize("labels", [[1, 1, np.nan, 1], [1, 1, 1, 0.9]], ids=["missing", "broken"])
@in_memory
def test_a_part_whose_labels_have_another_type_is_refused(labels, memory, where):
    said = r"block 1 of y has type float64, expected int64|y has 1 values that are missing .* row 6"
    with pytest.raises(DataError, match=said):
        train(parts(WHOLE, labels), memory=memory, **where)


@in_memory
def test_targets_that_are_no_labels_are_refused_too(memory):
    data = parts(WHOLE, [1, 1, 0.9, 1])
    with pytest.raises(DataError, match=r"block 1 of y has type float64, expected int64"):
        dask_nn.train(
            nn.Linear(1, 1),
            data,
            loss=squared,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            batch_size=8,
            epochs=1,
            transform=scaled,
            memory=memory,
            client=None,
        )


def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(output[:, 0], target.float())


@in_memory
def test_validation_data_of_another_type_is_refused(memory, where):
    said = r"validation data: block 1 of X has type float64, expected uint8"
    with pytest.raises((DataError, RankFailed), match=said):
        train(parts(WHOLE), validation=parts(STRANGE["broken"]), memory=memory, **where)


@in_memory
def test_a_type_that_holds_the_same_numbers_gives_the_same_bits(memory, where, tmp_path):
    expected = train(parts(np.array(WHOLE, "u1")), client=None).weights_sha256
    objects = parts(np.array(WHOLE, object), np.array(LABELS, object))
    floats = table(tmp_path, WHOLE, np.array(LABELS, "f4"))
    for data in ((parts(WHOLE),), (objects,), (floats, "label")):
        assert train(*data, validation=data, memory=memory, **where).weights_sha256 == expected


@in_memory
def test_validation_data_of_objects_gives_the_same_loss(memory, where):
    given = parts(WHOLE), parts(np.array(WHOLE, object), np.array(LABELS, object))
    history = [train(parts(WHOLE), validation=v, memory=memory, **where).history for v in given]
    assert history[0][-1]["val_loss"] == history[1][-1]["val_loss"]


@in_memory
@pytest.mark.parametrize("of", ["X", "y"])
def test_text_in_the_rows_that_a_step_is_tried_on_is_refused(memory, of, where):
    """Two rows a block: those of block 1 are among the first."""
    blocks = {"X": [column([1.0, 2.0])] * 4, "y": [np.array([0.0, 1.0])] * 4}
    blocks[of][1:2] = [blocks[of][1].astype("U3")]
    data = [da.concatenate([from_block(a, a.shape) for a in blocks[name]]) for name in ("X", "y")]
    said = rf"block 1 of {of} has type <U3, expected float32 .* the value '[01]\.0'"
    with pytest.raises(DataError, match=said):
        dask_nn.train(
            nn.Linear(1, 1),
            *data,
            loss=squared,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            batch_size=8,
            epochs=1,
            memory=memory,
            strategy=dask_nn.Synchronous(shards=1, threads_per_rank=1),
            **where,
        )


def from_block(block: np.ndarray[Any, Any], shape: tuple[float, ...]) -> da.Array:
    return da.from_delayed(delayed(block, pure=False), shape, "f4")


@strange
def test_evaluate_and_predict_refuse_such_files(values, tmp_path):
    data = table(tmp_path, values)
    said = r"block 1 could not be computed: column 'a' of X has type float64, expected uint8"
    with pytest.raises(DataError, match=said):
        dask_nn.evaluate(nn.Linear(1, 2), data, "label", metrics=["accuracy"], transform=scaled)
    with pytest.raises(DataError, match=said):
        dask_nn.predict(nn.Linear(1, 2), data, features=["a"], transform=scaled).compute()


# Values of blocks, and a type said of all of them that cannot hold one of the last.
UNFIT = {
    "missing": ("i8", [1.0, np.nan, 1.0, 0.0], "float64", "nan"),
    "broken": ("i8", [1.0, 0.9, 1.0, 0.0], "float64", "0.9"),
    "large": ("u1", [1, 300, 1, 0], "int64", "300"),
    "text": ("i8", ["1", "0", "1", "0"], "<U1", "'1'"),
}
unfit = pytest.mark.parametrize(("dtype", "values", "found", "value"), UNFIT.values(), ids=UNFIT)


def told(dtype: str, *blocks: Any) -> da.Array:
    """Make an array of such blocks of four rows, whatever type they have."""
    arrays = [np.asarray(block) for block in blocks]
    return da.concatenate(
        [da.from_delayed(delayed(a, pure=False), (4, *a.shape[1:]), dtype) for a in arrays]
    )


def column(values: Any) -> np.ndarray[Any, Any]:
    return np.array(values)[:, None]


@pytest.fixture(params=["here", "cluster"])
def anywhere(request) -> None:
    """Compute in this process, or on two workers."""
    if request.param == "cluster":
        request.getfixturevalue("threads_client")


def refusal(dtype: str, found: str, value: str, of: str) -> str:
    return rf"{of} has type {found}, expected {np.dtype(dtype)} in all blocks, .* value {value}, "


BLOCK = r"block 1 could not be computed.*: "


@unfit
def test_predict_refuses_blocks_of_another_type(anywhere, dtype, values, found, value):
    X = told(dtype, column([1, 2, 3, 4]), column(values))
    for given, of in ((X, "X"), ({"input": X}, r"X\.input")):
        lazy = dask_nn.predict(nn.Linear(1, 3), given, transform=as_floats)
        with pytest.raises(DataError, match=BLOCK + refusal(dtype, found, value, of)):
            lazy.compute()


def as_floats(rows: Any) -> Any:
    if isinstance(rows, dict):
        return {key: as_floats(value) for key, value in rows.items()}
    return rows.float()


@unfit
def test_evaluate_refuses_features_of_another_type(anywhere, dtype, values, found, value):
    X = told(dtype, column([1, 2, 3, 4]), column(values))
    with pytest.raises(DataError, match=BLOCK + refusal(dtype, found, value, "X")):
        dask_nn.evaluate(nn.Linear(1, 2), X, told("i8", LABELS, LABELS), transform=as_floats)


@pytest.mark.parametrize("metric", ["accuracy", "mse"])
@pytest.mark.parametrize("kind", ["missing", "broken", "text"])
def test_evaluate_refuses_targets_of_another_type(anywhere, kind, metric):
    dtype, values, found, value = UNFIT[kind]
    outputs = 2 if metric == "accuracy" else 1
    X, y = da.zeros((8, 1), chunks=4, dtype="f4"), told(dtype, LABELS, values)
    with pytest.raises(DataError, match=BLOCK + refusal(dtype, found, value, "y")):
        dask_nn.evaluate(nn.Linear(1, outputs), X, y, metrics=[metric])


def test_evaluate_refuses_weights_of_another_type(anywhere):
    X, y = da.zeros((8, 1), chunks=4, dtype="f4"), told("i8", LABELS, LABELS)
    weight = told("f4", [1.0] * 4, ["1"] * 4)
    said = BLOCK + refusal("f4", "<U1", "'1'", "sample_weight")
    with pytest.raises(DataError, match=said):
        dask_nn.evaluate(
            nn.Linear(1, 2),
            X,
            y,
            metrics=[],
            sample_weight=weight,
            loss=nn.CrossEntropyLoss(),
        )


def test_evaluate_takes_no_integers_too_large_for_a_batch():
    y = np.array([2**64 - 1] * 4, "u8")
    with pytest.raises(DataError, match=refusal("i8", "uint64", "18446744073709551615", "y")):
        dask_nn.evaluate(nn.Linear(1, 1), np.zeros((4, 1), "f4"), y, metrics=["mse"])


def by_its_type(rows: torch.Tensor) -> torch.Tensor:
    return rows.float() / torch.iinfo(rows.dtype).max


def test_evaluate_and_predict_cast_blocks_that_keep_their_values(anywhere):
    """A transform sees one type in all blocks, and a loss its labels."""
    whole, labels = column([5, 6, 7, 255]), [0, 1, 1, 0]
    model = nn.Linear(1, 2)
    results = []
    for other in (whole.astype("u1"), whole.astype("f8"), whole.astype(object)):
        X = told("u1", whole.astype("u1"), other)
        y = told("i8", labels, np.array(labels, other.dtype))
        raw = dask_nn.predict(model, X, output="raw", transform=by_its_type).compute()
        options = {"loss": nn.CrossEntropyLoss(), "metrics": ["accuracy"]}
        scores = dask_nn.evaluate(model, X, y, transform=by_its_type, **options)
        results.append((raw.tolist(), scores))
    assert results[1:] == [results[0]] * 2


# Dask gives what it joins the type of its first piece: 44 would be a label, and 0.9 would be 0.
JOINED = r"block 1 of {} as it was given"


no_label = pytest.mark.parametrize("kind", ["missing", "broken", "text"])


def test_evaluate_names_what_several_blocks_need_and_cannot_be_computed(anywhere):
    def broken(block: Any, block_info: Any = None) -> Any:
        if block_info[0]["chunk-location"] == (1,):
            raise KeyError("lost")
        return block

    X, y = da.zeros((8, 1), dtype="f4", chunks=(2, 1)), da.zeros(8, chunks=4, dtype="i8")
    y = y.map_blocks(broken, dtype="i8", meta=np.empty(0, "i8"))
    said = "^block 1 of '.*', which several blocks need, could not be computed.*: KeyError: 'lost'"
    with pytest.raises(DataError, match=said):
        dask_nn.evaluate(nn.Linear(1, 50), X, y, metrics=["accuracy"])


@no_label
@pytest.mark.parametrize("rows", [2, 8], ids=["cut", "joined"])
def test_evaluate_looks_at_labels_before_they_are_cut_or_joined(anywhere, kind, rows):
    dtype, values, found, value = UNFIT[kind]
    X = da.zeros((8, 1), dtype="f4", chunks=(rows, 1))
    y = told(dtype, np.array(LABELS, dtype), values)
    with pytest.raises(DataError, match=refusal("i8", found, value, JOINED.format("y"))):
        dask_nn.evaluate(nn.Linear(1, 50), X, y, metrics=["accuracy"])


@no_label
@in_memory
def test_train_looks_at_labels_before_they_are_joined(memory, where, kind):
    dtype, values, found, value = UNFIT[kind]
    X, y = da.zeros((8, 1), dtype="f4", chunks=(8, 1)), told(dtype, np.array(LABELS, dtype), values)
    said = refusal("i8", found, value, JOINED.format("y"))
    with pytest.raises(DataError, match=said):
        train(X, y, memory=memory, **where)


@unfit
def test_columns_are_looked_at_before_they_are_joined(anywhere, dtype, values, found, value):
    left = da.ones((8, 1), dtype=dtype, chunks=(4, 1))
    X = da.concatenate([left, told(dtype, column([1, 2, 3, 4]), column(values))], axis=1)
    said = refusal(dtype, found, value, JOINED.format("X"))
    with pytest.raises(DataError, match=said):
        dask_nn.predict(nn.Linear(2, 3), X, transform=as_floats).compute()
    with pytest.raises(DataError, match=said):
        train(X, da.zeros(8, chunks=4, dtype="i8"), client=None)


# A type that is told, and values of a block that it cannot hold but a batch can.
NARROW = {
    "labels": ("y", "u1", np.array([300, 1, 2, 3])),
    "unsigned labels": ("y", "u8", np.array([3, 1, 2**40 + 1, 3])),
    "targets": ("y", "f4", np.array([0.1, 1 / 3, 2.0, 3.0])),
    "objects": ("y", "f4", np.array([0.1, 1, True, 1 / 3], object)),
    "weights": ("sample_weight", "i1", np.array([0.5, 1.0, 0.25, 2.0])),
}


class Distances(nn.MSELoss):
    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(output, target.double())


def weights_of(X: da.Array, y: da.Array, weight: da.Array, **options: Any) -> str:
    torch.manual_seed(0)
    result = dask_nn.train(
        nn.Sequential(nn.Linear(int(X.shape[1]), 1), nn.Flatten(0)).double(),
        *(X, y),
        sample_weight=weight,
        loss=Distances(),
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        batch_size=8,
        epochs=1,
        shuffle=False,
        strategy=dask_nn.Synchronous(shards=1, threads_per_rank=1),
        **options,
    )
    return result.weights_sha256


@in_memory
@pytest.mark.parametrize(("field", "dtype", "values"), NARROW.values(), ids=NARROW)
def test_joined_rows_give_the_bits_of_others(memory, where, field, dtype, values):
    columns = {"y": da.ones(8, chunks=4), "weight": da.ones(8, chunks=4)}
    columns[field.removeprefix("sample_")] = told(dtype, np.ones(4, dtype), values)
    uncut, cut = (
        weights_of(da.ones((8, 1), chunks=(rows, 1)), **columns, memory=memory, **where)
        for rows in (4, 8)
    )
    assert uncut == cut


@in_memory
def test_joined_columns_give_the_bits_of_others(memory, where):
    left, right = column([1.0, 2.0, 3.0, 4.0]), column([0.1, 0.2, 1e5 / 3, 0.4])
    parts = [told("f4", left.astype("f4"), one) for one in (left, right)]
    whole = told("f4", np.hstack([left, left]).astype("f4"), np.hstack([left, right]))
    columns = {"y": da.ones(8, chunks=4), "weight": da.ones(8, chunks=4)}
    uncut, cut = (
        weights_of(X, **columns, memory=memory, **where)
        for X in (whole, da.concatenate(parts, axis=1))
    )
    assert uncut == cut


def test_blocks_that_keep_their_values_are_joined_in_one_type(anywhere):
    X = da.zeros((8, 1), dtype="f4", chunks=(8, 1))
    y = told("i8", np.array([0.0, 1.0, 1.0, 1.0]), [0, 1, 1, 1])
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, 1.0]))  # it says 1 of every row
    assert dask_nn.evaluate(model, X, y, metrics=["accuracy"]) == {"accuracy": 0.75}


MISSING = np.array([1.0, None, 1.0, 0.0], object)


@in_memory
@pytest.mark.parametrize("size", [4, 400_000], ids=["small", "large"])
@pytest.mark.parametrize("field", ["y", "sample_weight"])
def test_missing_values_among_objects_are_found(memory, where, field, size):
    """None becomes NaN in a batch, as it would in a table."""
    values = np.concatenate([MISSING, np.ones(size - 4, object)])
    told = da.from_delayed(delayed(values, pure=False), (size,), "f8")
    data = {"X": da.ones((2 * size, 1), chunks=(size, 1))}
    data |= {name: da.ones(2 * size, chunks=size) for name in ("y", "sample_weight")}
    data[field] = da.concatenate([da.ones(size, chunks=size), told])
    said = (
        rf"{field} has 1 values that are missing \(NaN\) or infinite, the first in row {size + 1}"
    )
    with pytest.raises(DataError, match=said):
        weights_of(data["X"], data["y"], data["sample_weight"], memory=memory, **where)


@in_memory
@pytest.mark.parametrize("field", ["y", "sample_weight"])
def test_missing_values_among_objects_of_validation_data_are_found(memory, where, field):
    X, ones = da.ones((8, 1), chunks=(4, 1)), da.ones(8, chunks=4)
    columns = {"y": ones, "sample_weight": ones}
    columns[field] = told("f8", np.ones(4), MISSING)
    said = rf"validation data: {field} has 1 values that are missing"
    with pytest.raises(DataError, match=said):
        weights_of(X, ones, ones, validation=(X, *columns.values()), memory=memory, **where)


def unknown(array: da.Array) -> da.Array:
    """Give an array whose lengths nobody knows."""
    chunks = ((np.nan,) * array.numblocks[0], *array.chunks[1:])
    return da.Array(array.dask, array.name, chunks, meta=array)


def squared_errors(output: torch.Tensor, target: torch.Tensor, reduction: str) -> torch.Tensor:
    return nn.functional.mse_loss(output[:, 0], target.float(), reduction=reduction)


FIVE = r"{} has 1 values that are missing .*, the first in row 5, in block 1; drop"
UNLIKE = r"block 1 of {} has type object, expected {} .* the value {}"
LABEL = f"({UNLIKE.format('y', 'int64', 'None')}|{FIVE.format('y')})"
# What is missing or unlike the type that is told, and what is said of it.
HOLES = {
    "a target": ("y", "f4", [0.5, None, 1.0, 0.0], FIVE.format("y")),
    "a label": ("y", "i8", [1, None, 1, 0], LABEL),
    "a weight": ("sample_weight", "f4", [0.5, None, 1.0, 1.0], FIVE.format("sample_weight")),
    "a whole weight": ("sample_weight", "i8", [1, None, 1, 1], FIVE.format("sample_weight")),
    "text": ("y", "f4", [0.5, "2", 3, 4], UNLIKE.format("y", "float32", "'2'")),
}


@pytest.mark.parametrize("of", ["training", "validation"])
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize(("name", "dtype", "values", "said"), HOLES.values(), ids=HOLES)
@in_memory
def test_objects_among_targets_and_weights_are_looked_at_before_the_first_step(
    memory, name, dtype, values, said, known, of
):
    fine = {
        "X": da.zeros((8, 1), chunks=(4, 1), dtype="f4"),
        "y": told(dtype if name == "y" else "f4", [1] * 4, [1] * 4),
        "sample_weight": told("f4", [1] * 4, [1] * 4),
    }
    wrong = fine | {name: told(dtype, [1] * 4, np.array(values, object))}
    if not known:
        fine, wrong = ({key: unknown(data[key]) for key in data} for data in (fine, wrong))
    train_on, validation = (wrong, fine) if of == "training" else (fine, wrong)
    begin = "" if of == "training" else "validation data: "
    # A rank looks at the labels of validation data, unless a classifier's loss did before.
    with pytest.raises((DataError, RankFailed), match=begin + said):
        dask_nn.train(
            nn.Linear(1, 1),
            **train_on,
            validation=tuple(validation.values()),
            loss=squared_errors,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            batch_size=8,
            epochs=1,
            memory=memory,
            client=None,
            strategy=dask_nn.Synchronous(shards=1, threads_per_rank=1),
        )
