from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from dask_nn.clusters.loop import see_through


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_is_heard_when_what_has_to_be_done_is_done() -> None:
    pressed = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        waited: Future[bool] = pool.submit(pressed.wait, 20)

        def press_twice() -> None:
            for _ in range(2):
                press()
            pressed.set()

        timer = threading.Timer(0.2, press_twice)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            see_through(waited, 20)
        assert waited.done()
    assert waited.result()
    timer.join()


def test_ctrl_c_is_heard_when_the_time_is_over() -> None:
    timer = threading.Timer(0.1, press)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        see_through(Future(), 0.5)
    timer.join()


def test_without_ctrl_c_what_was_done_is_given_or_is_too_late() -> None:
    done: Future[int] = Future()
    done.set_result(7)
    assert see_through(done, 1) == 7
    with pytest.raises(TimeoutError):
        see_through(Future(), 0.01)
