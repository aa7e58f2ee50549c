from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch

from dask_nn.diagnosis.canary import standard_fingerprint_here
from dask_nn.training.randomness import ShardRandomness, restored_generator


@pytest.fixture(autouse=True)
def _generator():
    with restored_generator():
        yield


def numbers(shared: bool, step: int = 3, shard: int = 2, seed: int = 7) -> torch.Tensor:
    return ShardRandomness(seed, shared=shared).run(lambda: torch.rand(4), step, shard)


def test_numbers_depend_on_seed_step_and_shard_alone():
    torch.manual_seed(1)
    expected = numbers(shared=False)
    torch.manual_seed(2)
    assert torch.equal(numbers(shared=False), expected)
    assert torch.equal(numbers(shared=True), expected)
    for other in ({"step": 4}, {"shard": 3}, {"seed": 8}):
        assert not torch.equal(numbers(shared=False, **other), expected)


def test_a_function_that_begins_to_draw_is_repeated_with_its_own_numbers():
    expected = ShardRandomness(7, shared=False).run(lambda: torch.rand(4), 1, 0)
    randomness = ShardRandomness(7, shared=True)
    randomness.run(lambda: torch.ones(1), 0, 0)
    assert randomness.may_repeat
    assert torch.equal(randomness.run(lambda: torch.rand(4), 1, 0), expected)
    assert not randomness.may_repeat


def test_whoever_draws_is_never_disturbed_by_one_that_did_not_draw_before():
    expected = [numbers(shared=False, step=1, shard=shard) for shard in range(2)]
    surprise = ShardRandomness(7, shared=True)
    surprise.run(lambda: torch.ones(1), 0, 0)
    steady = ShardRandomness(7, shared=True)
    drawing, go_on = threading.Event(), threading.Event()

    def slowly() -> torch.Tensor:
        first = torch.rand(2)
        drawing.set()
        go_on.wait(0.2)  # ends early only if the other one draws in between, which it must not
        return torch.cat([first, torch.rand(2)])

    def suddenly() -> torch.Tensor:
        found = torch.rand(4)
        go_on.set()
        return found

    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(steady.run, slowly, 1, 1)
        assert drawing.wait(5)
        first = pool.submit(surprise.run, suddenly, 1, 0)
        found = [first.result(5), second.result(5)]
    whole = torch.cat([found[1][:2], found[1][2:]])
    assert torch.equal(found[0], expected[0])
    torch.manual_seed(0)
    again = ShardRandomness(7, shared=False).run(
        lambda: torch.cat([torch.rand(2), torch.rand(2)]), 1, 1
    )
    assert torch.equal(whole, again)


def leave() -> None:
    """Do as a rank that was not waited for, and ends at last."""
    with restored_generator():
        inside.set()
        assert drawing.wait(5)


def draw() -> None:
    """Do as the rank of another run."""
    assert drawing.wait(5)
    numbers(shared=False)


inside, drawing = threading.Event(), threading.Event()


@pytest.mark.parametrize("disturb", [leave, draw, standard_fingerprint_here])
def test_a_rank_that_is_alone_in_its_gang_is_not_disturbed_by_others_of_its_process(disturb):
    inside.clear()
    drawing.clear()

    def slowly() -> torch.Tensor:
        first = torch.rand(2)
        drawing.set()
        wait([other], timeout=0.5)  # who must wait until all is drawn
        return torch.cat([first, torch.rand(2)])

    def twice() -> torch.Tensor:
        return torch.cat([torch.rand(2), torch.rand(2)])

    randomness = ShardRandomness(7, shared=False)
    expected = randomness.run(twice, 1, 1)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(disturb)
        if disturb is leave:
            assert inside.wait(5)
        if disturb is standard_fingerprint_here:
            other.result(30)  # imports much the first time
            other = pool.submit(disturb)
        assert torch.equal(randomness.run(slowly, 1, 1), expected)
        other.result(30)


def test_functions_that_draw_nothing_run_side_by_side():
    meeting = threading.Barrier(2, timeout=5)
    each = [ShardRandomness(7, shared=True) for _ in range(2)]
    for randomness in each:
        randomness.run(lambda: None, 0, 0)
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(randomness.run, meeting.wait, 1, 0) for randomness in each]
        assert sorted(wait.result(5) for wait in waits) == [0, 1]


def test_an_error_leaves_the_generator_to_others():
    def fail() -> None:
        message = "no"
        raise ValueError(message)

    randomness = ShardRandomness(7, shared=True)
    with pytest.raises(ValueError, match="no"):
        randomness.run(fail, 0, 0)
    assert torch.equal(numbers(shared=True), numbers(shared=False))
