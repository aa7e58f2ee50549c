from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from dask_nn.checkpoints.serialization import load_weights, save_weights, weights_sha256
from dask_nn.errors import CheckpointError


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        # Neither sorted by name nor by dtype, as the format would store them.
        "z": torch.randn(4, 3, generator=generator),
        "counts": torch.arange(5),
        "a": torch.randn(2, generator=generator, dtype=torch.float64),
        "scalar": torch.tensor(7),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "mask": torch.tensor([True, False]),
    }


def test_weights_come_back_equal_in_order_and_with_their_metadata(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, weights, {"model": "SimpleNN"})
    loaded, metadata = load_weights(path)
    assert list(loaded) == list(weights)
    assert metadata == {"model": "SimpleNN"}
    for name, tensor in weights.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert weights_sha256(loaded) == weights_sha256(weights)


def test_the_hash_is_over_the_raw_bytes_in_order() -> None:
    first, second = torch.arange(6.0).reshape(2, 3), torch.tensor(3)
    expected = hashlib.sha256(first.numpy().tobytes() + second.numpy().tobytes()).hexdigest()
    assert weights_sha256({"a": first, "b": second}) == expected
    assert weights_sha256({"b": second, "a": first}) != expected


def test_the_hash_does_not_depend_on_the_layout_in_memory() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    transposed = tensor.T.contiguous().T
    assert not transposed.is_contiguous()
    assert weights_sha256({"a": transposed}) == weights_sha256({"a": tensor})


def test_one_other_bit_gives_another_hash() -> None:
    assert weights_sha256({"a": torch.tensor(0.0)}) != weights_sha256({"a": torch.tensor(-0.0)})


def test_tied_weights_are_saved_under_both_names(tmp_path: Path) -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    path = tmp_path / "tied.safetensors"
    save_weights(path, nn.Sequential(first, second).state_dict())
    loaded, _ = load_weights(path)
    assert torch.equal(loaded["0.weight"], loaded["1.weight"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: no such file"):
        load_weights(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"\xff" * 64])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"other\.safetensors: expected a whole safetensors"):
        load_weights(path)


def test_a_truncated_file_is_refused(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "cut.safetensors"
    save_weights(path, weights)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: expected a whole"):
        load_weights(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "flipped.safetensors"
    save_weights(path, weights)
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"flipped\.safetensors: corrupt"):
        load_weights(path)


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        save_weights(tmp_path / "absent" / "weights.safetensors", {"a": torch.zeros(1)})
