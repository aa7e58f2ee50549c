from __future__ import annotations

import ast
import inspect

import pytest
import torch

from dask_nn.examples.mnist import sequential
from dask_nn.examples.mnist.digits import make_digits
from dask_nn.examples.mnist.model import make_model
from dask_nn.examples.mnist.sequential import best_loop, guide_loop

DIGITS = make_digits(train=2_000, test=500)


def test_the_file_imports_nothing_of_this_package() -> None:
    imported = []
    for node in ast.walk(ast.parse(inspect.getsource(sequential))):
        if isinstance(node, ast.Import):
            imported += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.append(node.module or "")
    assert imported
    assert not [name for name in imported if name.startswith(("dask", "distributed"))]


@pytest.mark.parametrize("loop", [guide_loop, best_loop])
def test_a_loop_learns_and_tells_of_every_epoch(loop: object) -> None:
    told = []
    threads = torch.get_num_threads()
    result = loop(
        make_model(32),
        DIGITS,
        epochs=3,
        batch_size=32,
        lr=0.1,
        on_epoch_end=lambda *values: told.append(values),
    )
    assert len(result.epoch_s) == len(result.loss) == 3
    assert min(result.epoch_s) > 0
    assert result.loss[0] > result.loss[1] > result.loss[2]
    assert result.accuracy > 0.5
    assert told == list(zip(range(3), result.loss, result.epoch_s, strict=True))
    assert torch.get_num_threads() == threads


def test_both_loops_do_the_same_math() -> None:
    """With one batch per epoch the order of the samples does not matter."""
    guide, best = make_model(16), make_model(16)
    guide_loop(guide, DIGITS, epochs=3, batch_size=2_000, lr=0.5)
    best_loop(best, DIGITS, epochs=3, batch_size=2_000, lr=0.5)
    for ours, theirs in zip(guide.parameters(), best.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_trying_out_does_not_train() -> None:
    model = make_model(8)
    before = [parameter.clone() for parameter in model.parameters()]
    best_loop(model, DIGITS, epochs=0)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_equal_seeds_give_equal_losses() -> None:
    first, second = (
        best_loop(make_model(8), DIGITS, epochs=1, threads=(1,), seed=4).loss for _ in range(2)
    )
    assert first == pytest.approx(second, rel=1e-6)
