from __future__ import annotations

from importlib.metadata import version

import pytest

import dask_nn

PUBLIC = [
    "Callback",
    "Checkpoint",
    "Recovery",
    "Synchronous",
    "TrainingResult",
    "cluster",
    "doctor",
    "evaluate",
    "open_data",
    "predict",
    "train",
]


def test_the_public_names_are_these():
    assert sorted(dask_nn.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring(name):
    assert getattr(dask_nn, name).__doc__


def test_dir_shows_what_is_imported_on_first_use():
    assert set(PUBLIC) <= set(dir(dask_nn))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = dask_nn.trian


def test_the_version_is_that_of_the_distribution():
    assert dask_nn.__version__ == version("dask-nn")
