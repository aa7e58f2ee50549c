"""Blocks of another number type than the first: no value is changed without a word."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

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


def train(*data: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return dask_nn.train(
        nn.Linear(1, 2),
        *data,
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        batch_size=4,
        epochs=1,
        transform=scaled,
        strategy=dask_nn.Synchronous(shards=2, threads_per_rank=1),
        **options,
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
    with pytest.raises((DataError, RankFailed), match=r"block 1 has type float64, expected uint8"):
        train(parts(values), memory=memory, **where)


@pytest.mark.parametrize("labels", [[1, 1, np.nan, 1], [1, 1, 1, 0.9]], ids=["missing", "broken"])
@in_memory
def test_a_part_whose_labels_have_another_type_is_refused(labels, memory, where):
    said = r"block 1 of y has type float64, expected int64|y has 1 values that are missing .* row 6"
    with pytest.raises(DataError, match=said):
        train(parts(WHOLE, labels), memory=memory, **where)


@in_memory
def test_targets_that_are_no_labels_are_refused_too(memory):
    data = parts(WHOLE, [1, 1, 0.9, 1])
    with pytest.raises(DataError, match=r"block 1 has type float64, expected int64"):
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
    said = r"validation block 1 has type float64, expected uint8"
    with pytest.raises((DataError, RankFailed), match=said):
        train(parts(WHOLE), validation=parts(STRANGE["broken"]), memory=memory, **where)


@in_memory
def test_a_type_that_holds_the_same_numbers_gives_the_same_bits(memory, where, tmp_path):
    expected = train(parts(np.array(WHOLE, "u1")), client=None).weights_sha256
    for data in ((parts(WHOLE),), (table(tmp_path, WHOLE, np.array(LABELS, "f4")), "label")):
        assert train(*data, validation=data, memory=memory, **where).weights_sha256 == expected


@strange
def test_evaluate_and_predict_refuse_such_files(values, tmp_path):
    data = table(tmp_path, values)
    said = r"block 1 could not be computed: column 'a' of X has type float64, expected uint8"
    with pytest.raises(DataError, match=said):
        dask_nn.evaluate(nn.Linear(1, 2), data, "label", metrics=["accuracy"], transform=scaled)
    with pytest.raises(DataError, match=said):
        dask_nn.predict(nn.Linear(1, 2), data, features=["a"], transform=scaled).compute()


def test_evaluate_and_predict_cast_no_part(threads_client):
    """They know no type of the whole: what a part has is what the module gets."""
    values = [5, 6, 7.9, 300.0]
    model = nn.Linear(1, 1)
    found = dask_nn.predict(model, parts(values), output="raw", transform=scaled)
    rows = torch.tensor(values)[:, None]
    np.testing.assert_allclose(found[1].compute(), model(scaled(rows)).detach(), rtol=1e-6)
    with pytest.raises(DataError, match=r"block 1 could not be computed.*y has 1 rows with values"):
        dask_nn.evaluate(
            nn.Linear(1, 2), parts(WHOLE, [1, np.nan, 1, 0]), metrics=["accuracy"], transform=scaled
        )
