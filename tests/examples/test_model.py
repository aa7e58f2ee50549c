from __future__ import annotations

import pickle

import pytest
import torch

from dask_nn.errors import ModelError
from dask_nn.examples.mnist.model import SimpleNN, make_model, model_from_weights, scale


def test_it_maps_pixels_to_ten_logits() -> None:
    assert SimpleNN(16)(torch.zeros(3, 784)).shape == (3, 10)


def test_equal_seeds_give_equal_weights_and_leave_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = make_model(8, seed=5), make_model(8, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.fc1.weight, second.fc1.weight)
    assert not torch.equal(first.fc1.weight, make_model(8, seed=6).fc1.weight)


def test_the_weights_tell_the_width() -> None:
    model = make_model(32)
    again = model_from_weights(model.state_dict())
    assert torch.equal(again.fc2.weight, model.fc2.weight)


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"fc1.weight": torch.tensor(1.0)},
        {**make_model(8).state_dict(), "fc3.bias": torch.zeros(1)},
        {**make_model(8).state_dict(), "fc2.bias": torch.zeros(11)},
        make_model(8).double().state_dict(),
        torch.nn.Linear(784, 10).state_dict(),
    ],
)
def test_weights_of_another_network_are_refused(weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ModelError, match="not those of the network of `dask-nn mnist`"):
        model_from_weights(weights)


def test_scaling_brings_bytes_to_one_and_pickles() -> None:
    scaled = pickle.loads(pickle.dumps(scale))(torch.tensor([[0, 255]], dtype=torch.uint8))
    assert scaled.dtype == torch.float32
    assert scaled.tolist() == [[0.0, 1.0]]
