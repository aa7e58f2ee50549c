"""Pickling that names the attribute which stands in the way."""

from __future__ import annotations

import functools
import inspect
import types
from typing import TYPE_CHECKING, Any, Final

import cloudpickle

from dask_nn.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["dumps"]

# Where a torch module keeps what users set as plain attributes.
_MODULE_TABLES: Final = ("_modules", "_parameters", "_buffers")


def dumps(obj: Any, what: str) -> bytes:
    """Pickle an object as Dask ships it, by value where it has no importable name.

    Parameters
    ----------
    obj : object
        A module, loss, optimizer factory or transform.
    what : str
        What the object is called in the error: ``"module"``, ``"loss"``, ...

    Returns
    -------
    bytes
        For ``pickle.loads``.

    Raises
    ------
    ModelError
        If the object cannot be pickled. The text names the first attribute that cannot, such as
        ``module.encoder.lock``.
    """
    try:
        return bytes(cloudpickle.dumps(obj))
    except Exception as error:
        path, culprit, reason = _find(obj, what, error, set())
        raise ModelError(
            f"{what} cannot be sent to the workers: {path} is of type "
            f"{type(culprit).__qualname__}, which cannot be pickled ({reason}); make it when it "
            "is first used, or leave it out in __getstate__"
        ) from error


def _find(obj: Any, path: str, error: Exception, seen: set[int]) -> tuple[str, Any, Exception]:
    """Follow the first part that cannot be pickled down to one whose own parts all can."""
    seen.add(id(obj))
    for inner_path, inner in _parts_of(obj, path):
        if id(inner) in seen:
            continue
        try:
            cloudpickle.dumps(inner)
        except Exception as inner_error:
            return _find(inner, inner_path, inner_error, seen)
    return path, obj, error


def _parts_of(obj: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(obj, dict):
        yield from ((f"{path}[{key!r}]", value) for key, value in obj.items())
    elif isinstance(obj, (list, tuple, set, frozenset)):
        yield from ((f"{path}[{index}]", value) for index, value in enumerate(obj))
    elif isinstance(obj, functools.partial):
        yield f"{path}.func", obj.func
        yield from _parts_of(obj.args, f"{path}.args")
        yield from _parts_of(obj.keywords, f"{path}.keywords")
    elif isinstance(obj, types.MethodType):
        yield f"{path}.__self__", obj.__self__
    elif isinstance(obj, types.FunctionType):
        variables = inspect.getclosurevars(obj)
        for name, value in {**variables.globals, **variables.nonlocals}.items():
            yield f"{path} (variable {name})", value
    elif not isinstance(obj, type):
        yield from _attributes_of(obj, path)


def _attributes_of(obj: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, value in _stored(obj).items():
        if name in _MODULE_TABLES and isinstance(value, dict):
            yield from ((f"{path}.{inner}", part) for inner, part in value.items())
        else:
            yield f"{path}.{name}", value


def _stored(obj: Any) -> dict[str, Any]:
    """Return what pickle would store of an object, or nothing where that is no dictionary."""
    try:
        state = obj.__getstate__()
    except Exception:
        state = getattr(obj, "__dict__", None)
    return state if isinstance(state, dict) else {}
