from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from dask_nn import errors

ERRORS = sorted(
    (
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, BaseException)
    ),
    key=lambda value: value.__name__,
)

# What a constructor wants in each place, by the name of its parameter.
ARGUMENTS = {
    "address": "tcp://127.0.0.1:1234",
    "addresses": ("tcp://127.0.0.1:1234",),
    "epoch": 3,
    "message": "ValueError: no such thing",
    "rank": 1,
    "reason": "max_failures=3 was reached",
    "result": {"weights": [1.0, 2.0]},
    "step": 17,
    "traceback": "Traceback (most recent call last): ...",
    "value": float("inf"),
}


def example(error: type[BaseException]) -> BaseException:
    if error.__init__ in {Exception.__init__, BaseException.__init__, ValueError.__init__}:
        return error("batch_size must be positive, got -1")
    parameters = list(inspect.signature(error).parameters)
    assert not set(parameters) - set(ARGUMENTS), f"tell this test what {parameters} may be"
    return error(*(ARGUMENTS[name] for name in parameters))


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_survives_pickling_twice(error):
    original = example(error)
    travelled = original
    for _ in range(2):
        travelled = pickle.loads(pickle.dumps(travelled))
    assert type(travelled) is error
    assert str(travelled) == str(original)
    assert travelled.args == original.args
    assert vars(travelled) == vars(original)


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_can_be_copied(error):
    original = example(error)
    assert vars(copy.copy(original)) == vars(original)


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_says_what_it_was_given(error):
    assert str(example(error)).strip()


def test_all_names_every_error():
    assert sorted(errors.__all__) == [error.__name__ for error in ERRORS]


def test_the_tree_in_the_docstring_names_every_error():
    missing = [error.__name__ for error in ERRORS if error.__name__ not in errors.__doc__]
    assert missing == []


@pytest.mark.parametrize("error", [errors.ConfigurationError, errors.DataError, errors.ModelError])
def test_bad_arguments_are_value_errors(error):
    assert issubclass(error, ValueError)


def test_only_an_interruption_lies_outside_the_tree():
    outside = [error for error in ERRORS if not issubclass(error, errors.DaskNNError)]
    assert outside == [errors.TrainingInterrupted]
    assert issubclass(errors.TrainingInterrupted, KeyboardInterrupt)


def test_the_error_of_a_rank_names_rank_step_worker_and_traceback():
    text = str(example(errors.RankFailed))
    for part in ("rank 1", "step 17", "tcp://127.0.0.1:1234", "ValueError: no such thing"):
        assert part in text
    assert ARGUMENTS["traceback"] in text
