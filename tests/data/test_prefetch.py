from __future__ import annotations

import threading

import pytest

from dask_nn.data import prefetch
from dask_nn.data.prefetch import Prefetcher


class Loads:
    """Loads that say which of them ran."""

    def __init__(self, *lanes: int) -> None:
        self.lanes = lanes
        self.ran: list[int] = []
        self.progressed = threading.Condition()

    def __iter__(self):
        for number, lane in enumerate(self.lanes):
            yield lane, lambda number=number: self.load(number)

    def load(self, number: int) -> int:
        with self.progressed:
            self.ran.append(number)
            self.progressed.notify_all()
        return number

    def wait_for(self, count: int, timeout_s: float = 5) -> bool:
        with self.progressed:
            return self.progressed.wait_for(lambda: len(self.ran) >= count, timeout_s)


def start(loads, lanes, **options) -> Prefetcher[int]:
    prefetcher: Prefetcher[int] = Prefetcher(loads, lanes=lanes, **options)
    prefetcher.start()
    return prefetcher


def test_every_lane_gets_its_loads_in_order():
    prefetcher = start(Loads(0, 1, 0, 1, 1, 0), range(2), alive=3)
    assert [prefetcher.take(lane) for lane in (0, 1, 0, 1, 1, 0)] == [0, 1, 2, 3, 4, 5]
    prefetcher.close()


@pytest.mark.parametrize("alive", [1, 2, 4])
def test_a_lane_never_has_more_loads_than_it_may(alive):
    loads = Loads(*[0] * 20)
    prefetcher = start(loads, [0], alive=alive)
    assert loads.wait_for(alive)
    for taken in range(5):
        assert prefetcher.take(0) == taken
        assert not loads.wait_for(taken + alive + 1, timeout_s=0.15)
        prefetcher.release(0)
        assert loads.wait_for(taken + alive + 1)
    prefetcher.close()


def test_closing_ends_the_thread_while_lanes_are_full():
    prefetcher = start(Loads(*[0, 1] * 20), range(2))
    assert prefetcher.take(0) == 0
    prefetcher.close()
    prefetcher.close()
    assert not prefetcher._thread.is_alive()


def test_closing_before_the_start_is_harmless():
    Prefetcher(Loads(0), lanes=[0]).close()


def test_a_load_that_does_not_end_is_left_to_itself(monkeypatch):
    monkeypatch.setattr(prefetch, "CLOSE_TIMEOUT_S", 0.5)
    release, waits = threading.Event(), []
    prefetcher = start([(0, release.wait)], [0])
    prefetcher.close(lambda: waits.append(True))
    assert len(waits) >= 2
    before = len(waits)
    prefetcher.close(lambda: waits.append(True))
    assert len(waits) == before
    release.set()
    prefetcher._thread.join(5)
    assert not prefetcher._thread.is_alive()


def test_an_error_arrives_in_every_lane_after_what_was_loaded():
    def loads():
        yield 0, lambda: 1

        def fail():
            message = "gone"
            raise OSError(message)

        yield 1, fail

    prefetcher = start(loads(), range(2))
    assert prefetcher.take(0) == 1
    for lane in (1, 0):
        with pytest.raises(OSError, match="gone"):
            prefetcher.take(lane)
    prefetcher.close()


def test_an_error_passes_a_lane_that_is_full():
    prefetcher = start([(0, lambda: 1), (1, lambda: 1 / 0)], range(2))
    with pytest.raises(ZeroDivisionError):
        prefetcher.take(1)
    assert prefetcher.take(0) == 1
    prefetcher.close()


def test_an_error_of_the_order_itself_arrives_too():
    def loads():
        yield 0, lambda: 1
        message = "no plan"
        raise ValueError(message)

    prefetcher = start(loads(), [0])
    assert prefetcher.take(0) == 1
    with pytest.raises(ValueError, match="no plan"):
        prefetcher.take(0)
    prefetcher.close()


def test_a_wait_asks_whether_to_go_on():
    release = threading.Event()
    prefetcher = start([(0, lambda: release.wait(5))], [0])
    asked = []

    def check():
        asked.append(1)
        if len(asked) == 2:
            release.set()

    assert prefetcher.take(0, check=check) is True
    assert len(asked) >= 2
    prefetcher.close()
