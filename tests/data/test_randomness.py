from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from dask_nn.data import randomness
from dask_nn.data.inputs.datasets import Held, read_samples
from dask_nn.data.randomness import (
    SeededRandomness,
    call_beside_others,
    own_generator,
    restored_generator,
)
from dask_nn.diagnosis.canary import standard_fingerprint_here
from dask_nn.errors import Aborted, DaskNNError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


@contextmanager
def in_a_thread(make: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Let another thread be inside a context."""
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with make():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    try:
        assert inside.wait(5)
        yield
    finally:
        leave.set()
        thread.join()


def another_user() -> AbstractContextManager[None]:
    """Do as if another rank were a thread of this process, between two steps."""
    return in_a_thread(restored_generator)


def drawn(_: bool = False) -> torch.Tensor:
    return torch.rand(4)


def quiet(_: bool = False) -> None:
    return None


def numbers(step: int = 3, shard: int = 2, seed: int = 7) -> torch.Tensor:
    with restored_generator():
        return SeededRandomness(seed).run(drawn, step, shard)


def test_numbers_depend_on_seed_and_key_alone():
    torch.manual_seed(1)
    expected = numbers()
    torch.manual_seed(2)
    assert torch.equal(numbers(), expected)
    with another_user():
        assert torch.equal(numbers(), expected)
        assert torch.equal(SeededRandomness(7).run_once(drawn, 3, 2), expected)
    for other in ({"step": 4}, {"shard": 3}, {"seed": 8}):
        assert not torch.equal(numbers(**other), expected)


def test_a_function_that_begins_to_draw_is_repeated_with_its_own_numbers():
    calls: list[bool] = []

    def draw(again: bool) -> torch.Tensor:
        calls.append(again)
        return torch.rand(4)

    with another_user(), restored_generator():
        seeded = SeededRandomness(7)
        seeded.run(quiet, 0, 0)
        assert torch.equal(seeded.run(draw, 1, 0), numbers(1, 0))
        assert calls == [True, False]
        seeded.run(draw, 2, 0)
        assert calls == [True, False, False]


def test_whoever_has_no_company_is_called_once():
    calls: list[bool] = []
    with restored_generator():
        seeded = SeededRandomness(7)
        for step in range(3):
            seeded.run(calls.append, step, 0)
    assert calls == [False, False, False]


def leave() -> None:
    """Do as a rank that was not waited for, and ends at last."""
    with restored_generator():
        pass


def draw() -> None:
    """Do as the rank of another run."""
    numbers()


def begin_to_draw() -> None:
    """Do as a rank that drew nothing before."""
    with restored_generator():
        surprise = SeededRandomness(7)
        surprise.run(quiet, 0, 0)
        surprise.run(drawn, 1, 1)


def update() -> None:
    """Do as an optimizer that draws."""
    with restored_generator():
        SeededRandomness(7).run_once(drawn, "update", 1)


class Augmented(torch.utils.data.Dataset[torch.Tensor]):
    """Every sample differs at random from the one before."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(2)


def read() -> None:
    """Do as the reading of a dataset that augments its samples."""
    read_samples(Held(Augmented(), draws=True), 0, 3)


@pytest.mark.parametrize(
    "disturb", [leave, draw, begin_to_draw, update, read, standard_fingerprint_here]
)
def test_a_rank_that_draws_is_not_disturbed_by_others_of_its_process(disturb):
    standard_fingerprint_here()  # imports much the first time
    drawing = threading.Event()
    ended = threading.Event()

    def disturbing() -> None:
        assert drawing.wait(5)
        disturb()
        ended.set()

    def slowly(_: bool) -> torch.Tensor:
        first = torch.rand(2)
        drawing.set()
        ended.wait(0.3)  # ends early only if the other one does not wait, which `leave` need not
        return torch.cat([first, torch.rand(2)])

    def at_once(_: bool) -> torch.Tensor:
        return torch.cat([torch.rand(2), torch.rand(2)])

    with restored_generator(), ThreadPoolExecutor(1) as pool:
        seeded = SeededRandomness(7)
        expected = seeded.run(at_once, 1, 1)
        other = pool.submit(disturbing)
        assert torch.equal(seeded.run(slowly, 1, 1), expected)
        other.result(30)


def test_functions_that_draw_nothing_run_side_by_side():
    meeting = threading.Barrier(2, timeout=5)

    def rank() -> int:
        with restored_generator():
            seeded = SeededRandomness(7)
            meeting.wait()  # both are users now
            seeded.run(quiet, 0, 0)
            meeting.wait()  # both are known to draw nothing: to find out, each was alone
            return seeded.run(lambda _: meeting.wait(), 1, 0)

    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(rank) for _ in range(2)]
        assert sorted(wait.result(10) for wait in waits) == [0, 1]


def test_an_error_leaves_the_generator_to_others():
    def fail(_: bool) -> None:
        message = "no"
        raise ValueError(message)

    expected = numbers()
    with restored_generator(), pytest.raises(ValueError, match="no"):
        SeededRandomness(7).run(fail, 0, 0)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(numbers).result(5), expected)


def test_overlapping_users_give_the_process_its_state_back():
    before = torch.default_generator.get_state()
    first, second = restored_generator(), restored_generator()
    first.__enter__()
    torch.rand(1)
    second.__enter__()
    torch.rand(1)
    first.__exit__(None, None, None)
    torch.rand(1)
    second.__exit__(None, None, None)
    assert torch.equal(torch.default_generator.get_state(), before)


def abort() -> None:
    message = "told to end"
    raise Aborted(message)


def go_on() -> None:
    """Show life, and wait."""


@pytest.mark.parametrize(("waiting", "error"), [(abort, Aborted), (go_on, DaskNNError)])
def test_whoever_waits_may_stop_waiting_and_is_in_nobodys_way(monkeypatch, waiting, error):
    """Nobody waits for ever: whoever has the generator may hang."""
    monkeypatch.setattr(randomness, "PATIENCE_S", 0.0)
    with in_a_thread(own_generator), restored_generator(waiting):
        with pytest.raises(error):
            SeededRandomness(7).run(quiet, 0, 0)
        with pytest.raises(error):
            SeededRandomness(7).run_once(quiet, 0)
        with pytest.raises(error):
            read()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(numbers).result(5)


def test_whoever_waits_for_many_in_turn_is_patient(monkeypatch):
    """As long as each of them gives the generator on."""
    monkeypatch.setattr(randomness, "PATIENCE_S", 0.5)
    monkeypatch.setattr(randomness, "LOOK_S", 0.01)
    queued = threading.Semaphore(0)

    def turn() -> None:
        with restored_generator(queued.release):
            SeededRandomness(7).run_once(partial(time.sleep, 0.2), 0)

    with ThreadPoolExecutor(5) as pool:
        with own_generator():
            turns = [pool.submit(turn) for _ in range(5)]
            for _ in turns:
                assert queued.acquire(timeout=5)
        for each in turns:
            each.result(5)


def test_time_for_which_the_process_was_stopped_does_not_count(monkeypatch):
    """As after Ctrl-Z: whoever has the generator was stopped, too."""
    hours = itertools.count(0, 36_000)
    monkeypatch.setattr(randomness, "LOOK_S", 0.01)
    looks, enough = 0, threading.Event()

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 5:
            enough.set()

    def keep() -> None:
        with own_generator():
            kept.set()
            assert enough.wait(5)

    kept = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        keeping = pool.submit(keep)
        assert kept.wait(5)
        # Its own clock alone: other threads look at theirs.
        monkeypatch.setattr(randomness, "time", SimpleNamespace(monotonic=lambda: next(hours)))
        with restored_generator(look):
            SeededRandomness(7).run_once(quiet, 0)
        keeping.result(5)


def test_a_state_that_others_give_back_meanwhile_is_not_undone():
    """Nor taken for what a reader draws."""
    before = torch.default_generator.get_state()
    rank = restored_generator()
    rank.__enter__()
    torch.rand(1)
    _, drew = call_beside_others(lambda: rank.__exit__(None, None, None))
    assert not drew
    assert torch.equal(torch.default_generator.get_state(), before)


def test_whoever_has_much_to_draw_gives_the_generator_on_in_between():
    """And draws the same as without company."""
    expected = numbers(5, 3)
    results: list[list[torch.Tensor]] = []
    begun = threading.Event()

    def slowly(number: int) -> torch.Tensor:
        begun.set()
        time.sleep(0.02)
        read_so_far.append(number)
        return torch.rand(4)

    read_so_far: list[int] = []

    def draw_many() -> None:
        with restored_generator():
            results.append(SeededRandomness(7).run_each(slowly, range(100), 5))

    thread = threading.Thread(target=draw_many)
    thread.start()
    assert begun.wait(5)
    with own_generator():
        assert len(read_so_far) < 50
    thread.join(10)
    assert torch.equal(results[0][3], expected)


def test_whoever_gives_up_waiting_for_sharers_leaves_the_generator_to_others():
    """As Ctrl-C in a client whose process runs ranks, too."""
    sharing, go_on = threading.Event(), threading.Event()

    def interrupt() -> None:
        raise KeyboardInterrupt

    def share(_: bool) -> None:
        sharing.set()
        assert go_on.wait(5)

    def rank() -> None:
        with restored_generator():
            seeded = SeededRandomness(7)
            seeded.run(quiet, 0, 0)
            seeded.run(share, 1, 0)

    with ThreadPoolExecutor(2) as pool, another_user():
        first = pool.submit(rank)
        assert sharing.wait(5)
        with pytest.raises(KeyboardInterrupt), restored_generator(interrupt):
            SeededRandomness(7).run_once(quiet, 0)
        go_on.set()
        first.result(5)
        pool.submit(numbers).result(5)
