"""Weights as safetensors files: whole or absent, checked by a sum, loaded without pickle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dask_nn.checkpoints.whole_file import whole_file
from dask_nn.errors import CheckpointError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = ["load_weights", "save_weights", "weights_sha256", "weights_to_bytes"]

# safetensors writes tensors sorted by dtype and name; the order of the state dict is kept apart.
# One entry: safetensors writes several in any order, and equal weights should give equal bytes.
_ENTRY = "dask_nn"


def weights_sha256(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Hash the raw bytes of all tensors, in the state dict's order.

    Parameters
    ----------
    state_dict : mapping of str to torch.Tensor
        Tensors of any shape, dtype and device; an empty mapping hashes no bytes.

    Returns
    -------
    str
        SHA-256 as 64 hexadecimal digits. Names, shapes and dtypes are not part of it.
    """
    digest = hashlib.sha256()
    for tensor in state_dict.values():
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def save_weights(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a state dict to a safetensors file that is always whole.

    The file is written beside its destination, synchronised to disk and renamed, so that a file
    that was there before stays until the new one is complete.

    Parameters
    ----------
    path : path-like
        Destination; its folder must exist.
    state_dict : mapping of str to torch.Tensor
        Tensors that share memory are stored once each.
    metadata : mapping of str to str, optional
        Kept in the file's header and returned by `load_weights`.

    Raises
    ------
    CheckpointError
        If the file cannot be written; names the file.
    """
    target = Path(path)
    data = weights_to_bytes(state_dict, metadata)
    try:
        with whole_file(target) as file:
            file.write(data)
    except OSError as error:
        message = f"{target}: weights cannot be written there: {error.strerror or error}"
        raise CheckpointError(message) from error


def weights_to_bytes(
    state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Make the content of a safetensors file that `load_weights` reads."""
    tensors = {name: tensor.detach().to("cpu") for name, tensor in state_dict.items()}
    # Tied weights share memory, which the format refuses; each name gets bytes of its own.
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    header = {
        **(metadata or {}),
        _ENTRY: json.dumps({"order": list(tensors), "sha256": weights_sha256(tensors)}),
    }
    return save(tensors, metadata=header)


def load_weights(
    path: str | os.PathLike[str],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file.

    Parameters
    ----------
    path : path-like
        A file of `save_weights`, or any other safetensors file.

    Returns
    -------
    tuple of dict
        The tensors in the order in which they were saved, and the metadata given to
        `save_weights`.

    Raises
    ------
    CheckpointError
        If the file is missing, is no safetensors file, is truncated, or its bytes are not those
        that were saved; names the file.
    """
    target = Path(path)
    try:
        if not target.is_file():
            message = f"{target}: no such file; expected a safetensors file of weights"
            raise CheckpointError(message)
        # safe_open maps the file; clones do not depend on it after it is closed or replaced.
        with safe_open(target, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        message = f"{target}: expected a whole safetensors file of weights, but {error}"
        raise CheckpointError(message) from error

    entry = metadata.pop(_ENTRY, None)
    if entry is None:
        return tensors, metadata
    header = json.loads(entry)
    names, expected = header["order"], header["sha256"]
    if sorted(names) != sorted(tensors):
        message = f"{target}: its header names the tensors {names}, it holds {list(tensors)}"
        raise CheckpointError(message)
    tensors = {name: tensors[name] for name in names}
    if (found := weights_sha256(tensors)) != expected:
        message = (
            f"{target}: corrupt, the SHA-256 of its weights is {found}, expected {expected}; "
            "save the weights again"
        )
        raise CheckpointError(message)
    return tensors, metadata
