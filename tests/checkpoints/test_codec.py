from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, deque

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

from dask_nn.checkpoints.codec import decode, encode
from dask_nn.errors import CheckpointError


def there_and_back(value):
    tensors: dict[str, torch.Tensor] = {}
    return decode(json.loads(json.dumps(encode(value, tensors))), tensors)


def same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, list | tuple | deque):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found)
    else:
        assert found == expected


@pytest.mark.parametrize(
    "value",
    [
        {0: {"a": 1, 2: [True, None, "x"]}, (1, 2): (3.0, 0.1 + 0.2)},
        [math.inf, -math.inf, math.nan, 1e-320, 2**70],
        {"t": torch.arange(6).reshape(2, 3), "n": {"t": torch.tensor(1.5)}},
        [torch.tensor([True]), torch.zeros(0, 4), torch.ones(2, dtype=torch.bfloat16)],
        Counter({30: 1, 60: 1}),
        OrderedDict(b=1, a=2),
        {1, 2},
        deque([1, 2]),
        {},
    ],
)
def test_values_come_back_exactly(value):
    same(there_and_back(value), value)


OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "lbfgs": lambda p: optim.LBFGS(p, lr=0.1, max_iter=3),
}
SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "multi": lambda o: lr_scheduler.MultiStepLR(o, [1, 3, 3]),
    "cosine": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "plateau": lr_scheduler.ReduceLROnPlateau,
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
}


def step(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_from_what_came_back(name):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer)
    state = optimizer.state_dict()
    same(there_and_back(state), state)


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_goes_on_from_what_came_back(name):
    def make():
        optimizer = optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1, momentum=0.9)
        optimizer._opt_called = True
        return optimizer, SCHEDULERS[name](optimizer)

    def go(scheduler):
        scheduler.step(1.0) if name == "plateau" else scheduler.step()

    optimizer, scheduler = make()
    for _ in range(3):
        go(scheduler)
    state = scheduler.state_dict()
    other_optimizer, other = make()
    other.load_state_dict(there_and_back(state))
    other_optimizer.load_state_dict(there_and_back(optimizer.state_dict()))
    for _ in range(5):
        go(scheduler)
        go(other)
    assert optimizer.param_groups[0]["lr"] == other_optimizer.param_groups[0]["lr"]


def test_what_only_pickle_could_hold_is_refused_by_name():
    with pytest.raises(CheckpointError, match=r"optimizer/hooks/0: .*got builtins\.object"):
        encode({"optimizer": {"hooks": [object()]}}, {})


@pytest.mark.parametrize("encoded", [{"tensor": "none"}, {"what": []}, {}, {"dict": [[1]]}])
def test_a_manifest_that_makes_no_sense_is_refused(encoded):
    with pytest.raises(CheckpointError, match="cannot be understood"):
        decode(encoded, {})
