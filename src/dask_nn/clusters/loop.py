"""An event loop in a thread, whose child processes see neither Ctrl-C nor a closed terminal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from concurrent.futures import Future
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

from distributed.utils import LoopRunner

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["loop_blind_to_interrupts", "run_in", "see_through", "start_in", "stop"]


def loop_blind_to_interrupts() -> LoopRunner:
    """Start an event loop in a thread whose child processes have SIGINT and SIGHUP blocked.

    A terminal sends them to the whole process group, and only the client shall decide what stops:
    else workers would die of it, and so would the commands that end their jobs.
    """
    # The tracker unblocks SIGINT in the thread that starts it, so it must be running before.
    resource_tracker.ensure_running()
    runner = LoopRunner()
    if not hasattr(signal, "pthread_sigmask"):
        runner.start()
        return runner
    # Threads inherit the mask of the thread that starts them, and processes that of the thread
    # that forks them; the main thread goes on to hear Ctrl-C.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        runner.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return runner


def start_in[T](runner: LoopRunner, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine in the loop."""
    loop: Any = runner.loop
    return asyncio.run_coroutine_threadsafe(coroutine, loop.asyncio_loop)


def run_in[T](runner: LoopRunner, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that has a deadline of its own, and wait for it; Ctrl-C cancels it."""
    future = start_in(runner, coroutine)
    try:
        return future.result()
    except KeyboardInterrupt:
        future.cancel()
        raise


def see_through[T](future: Future[T], timeout_s: float) -> T:
    """Wait for something that has to be done, even if Ctrl-C is pressed meanwhile.

    Raises
    ------
    KeyboardInterrupt
        If Ctrl-C was pressed; not before it is done, or the time is over.
    TimeoutError
        If it is not done in time.
    """
    deadline = time.monotonic() + timeout_s
    pressed = False
    try:
        while True:
            try:
                return future.result(max(0.0, deadline - time.monotonic()))
            except KeyboardInterrupt:
                pressed = True
    finally:
        if pressed:
            raise KeyboardInterrupt


def stop(runner: LoopRunner, timeout_s: float) -> None:
    """Stop the event loop; what still runs in a thread of this process keeps nobody."""
    with contextlib.suppress(TimeoutError):
        runner.stop(timeout_s)
