from __future__ import annotations

import functools
import types
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook

from dask_nn.training.update import draws_nothing, plain_step


class Own(SGD):
    """Anything may be in its step."""


def sgd() -> SGD:
    return SGD(nn.Linear(2, 1).parameters(), lr=0.1)


def replaced() -> Optimizer:
    optimizer = sgd()
    optimizer.step = types.MethodType(lambda _: torch.rand(1), optimizer)
    return optimizer


def wrapped() -> Optimizer:
    optimizer = sgd()
    noisy = functools.wraps(SGD.step)(lambda _: torch.rand(1))
    optimizer.step = types.MethodType(noisy, optimizer)
    return optimizer


def hooked() -> Optimizer:
    optimizer = sgd()
    optimizer.register_step_pre_hook(lambda *_: torch.rand(1))
    return optimizer


def draw(*_: Any) -> float:
    return float(torch.rand(1))


def chained(*parts: Any) -> Any:
    return schedulers.ChainedScheduler(list(parts))


CASES = {
    "SGD": (sgd, None, True),
    "Adam": (lambda: Adam(nn.Linear(2, 1).parameters()), None, True),
    "OneCycleLR": (sgd, lambda o: schedulers.OneCycleLR(o, 0.1, 10), True),
    "CyclicLR": (sgd, lambda o: schedulers.CyclicLR(o, 0.1, 0.2), True),
    "two in one": (sgd, lambda o: chained(schedulers.StepLR(o, 2), schedulers.StepLR(o, 3)), True),
    "own class": (lambda: Own(nn.Linear(2, 1).parameters(), lr=0.1), None, False),
    "hook": (hooked, None, False),
    "own step": (replaced, None, False),
    "own step that calls itself torch's": (wrapped, None, False),
    "own step, scheduled": (replaced, lambda o: schedulers.StepLR(o, 2), False),
    "LambdaLR": (sgd, lambda o: schedulers.LambdaLR(o, draw), False),
    "CyclicLR with a function": (
        sgd,
        lambda o: schedulers.CyclicLR(o, 0.1, 0.2, scale_fn=draw),
        False,
    ),
    "LambdaLR deep inside": (sgd, lambda o: chained(chained(schedulers.LambdaLR(o, draw))), False),
}


@pytest.mark.parametrize("name", CASES)
def test_an_update_surely_draws_nothing_where_all_of_it_is_torch_s(name: str) -> None:
    make, schedule, expected = CASES[name]
    optimizer = make()
    scheduler = None if schedule is None else schedule(optimizer)
    assert draws_nothing(optimizer, scheduler) is expected


def test_hooks_of_all_optimizers_are_called_and_may_draw():
    called: list[Any] = []
    optimizer = sgd()
    with ExitStack() as stack:
        hook = register_optimizer_step_post_hook(lambda *_: called.append(1))
        stack.callback(hook.remove)
        assert not draws_nothing(optimizer, None)
        plain_step(optimizer)()
    assert called
    assert draws_nothing(optimizer, None)
