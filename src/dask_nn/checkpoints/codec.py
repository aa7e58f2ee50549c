"""Nested state dicts as JSON and named tensors, exactly, without pickle."""

from __future__ import annotations

import math
import numbers
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import torch

from dask_nn.errors import CheckpointError

__all__ = ["decode", "encode"]

# Containers by the tag that stands for them; subclasses of dict come back as what they were, since
# LR schedulers count with them.
_PAIRS = {"dict": dict, "counter": Counter, "ordered": OrderedDict}
_ITEMS = {"list": list, "tuple": tuple, "set": set, "deque": deque}
_PAIR_TAGS: dict[Any, str] = {kind: tag for tag, kind in _PAIRS.items()} | {defaultdict: "dict"}
_ITEM_TAGS: dict[Any, str] = {kind: tag for tag, kind in _ITEMS.items()}


def encode(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """Turn nested values into what JSON can hold.

    Parameters
    ----------
    value : object
        Dicts with any plain keys, lists, tuples, sets, numbers, strings, None and tensors.
    tensors : dict of str to torch.Tensor
        Gets the tensors, by a name made of the keys that lead to them.
    path : str
        The keys so far.

    Returns
    -------
    object
        For `decode`.

    Raises
    ------
    CheckpointError
        If something in it is of another type; names where.
    """
    if isinstance(value, torch.Tensor):
        name = path if path not in tensors else f"{path}#{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else {"float": repr(number)}
    kind = type(value)
    if kind in _PAIR_TAGS:
        pairs = [
            [
                encode(key, tensors, path),
                encode(item, tensors, f"{path}/{key}" if path else f"{key}"),
            ]
            for key, item in value.items()
        ]
        return {_PAIR_TAGS[kind]: pairs}
    if kind in _ITEM_TAGS:
        items = [encode(item, tensors, f"{path}/{n}") for n, item in enumerate(value)]
        return {_ITEM_TAGS[kind]: items}
    message = (
        f"{path}: a checkpoint holds numbers, strings, tensors and containers of them, got "
        f"{kind.__module__}.{kind.__qualname__}; an optimizer or LR scheduler with such a state "
        "cannot be saved"
    )
    raise CheckpointError(message)


def decode(encoded: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Turn the values of `encode` back.

    Raises
    ------
    CheckpointError
        If a tensor is missing, or the values are not those of `encode`.
    """
    if not isinstance(encoded, dict):
        return encoded
    try:
        ((tag, content),) = encoded.items()
        if tag == "tensor":
            return tensors[content]
        if tag == "float":
            return float(content)
        if tag in _PAIRS:
            return _PAIRS[tag]({decode(k, tensors): decode(v, tensors) for k, v in content})
        return _ITEMS[tag](decode(item, tensors) for item in content)
    except (KeyError, ValueError, TypeError) as error:
        message = f"a checkpoint's manifest has a value that cannot be understood: {error!r}"
        raise CheckpointError(message) from error
