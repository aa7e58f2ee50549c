from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
from distributed import LocalCluster

from dask_nn.clusters import serve as module
from dask_nn.clusters.request import ClusterRequest
from dask_nn.clusters.serve import serve
from dask_nn.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed import Client


HERE: Any = {
    "n_workers": 0,
    "threads_per_worker": 1,
    "processes": False,
    "dashboard_address": ":0",
    "asynchronous": True,
}


def empty() -> LocalCluster:
    """Give a cluster that has no workers before it is scaled, as those of batch systems."""
    return LocalCluster(**HERE)


class Barren(LocalCluster):
    """A cluster whose workers do not come."""

    def scale(self, *_: Any, **__: Any) -> Any:
        return None


def barren() -> LocalCluster:
    return Barren(**HERE)


def opened(
    make: Callable[[], Any] = empty,
    *,
    ask: Callable[[Client], Any] = nullcontext,
    start_timeout_s: float = 20,
    **options: Any,
) -> Any:
    request = ClusterRequest(kind="slurm", start_timeout_s=start_timeout_s)
    with serve(request, make, **options) as client:
        return ask(client)


def num_workers(client: Client) -> int:
    return len(client.scheduler_info(n_workers=-1)["workers"])


def test_where_no_number_is_asked_for_there_is_one_worker() -> None:
    assert opened(ask=num_workers) == 1


def test_a_deadline_of_the_library_is_told_in_its_own_words() -> None:
    async def make() -> None:
        raise TimeoutError("not actioned after 60 seconds, is the operator running?")

    with pytest.raises(ClusterError, match="did not start: not actioned after 60 seconds"):
        opened(make)


def test_a_start_that_takes_too_long_says_how_to_wait_longer() -> None:
    with pytest.raises(ClusterError, match=r"0 of 1 workers came.*start_timeout_s=, --start-time"):
        opened(barren, start_timeout_s=2)


class Slow(LocalCluster):
    """A cluster whose scheduler does not start."""

    async def _start(self) -> None:
        await super()._start()
        await asyncio.sleep(60)


def test_a_scheduler_that_does_not_start_in_time_is_explained() -> None:
    async def explain(_: Any) -> str:
        return "no machine is free"

    with pytest.raises(ClusterError, match=r"it was still starting.*\nno machine is free$"):
        opened(lambda: Slow(**HERE), start_timeout_s=0.5, explain=explain)


def test_a_scheduler_that_will_not_start_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASK_FIRST_AFTER_S", 0.1)

    async def hopeless(_: Any) -> str:
        return "its machine has ended"

    with pytest.raises(ClusterError, match=r"^its machine has ended$"):
        opened(lambda: Slow(**HERE), start_timeout_s=100, hopeless=hopeless)


def test_an_answer_that_is_older_than_the_start_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ASK_FIRST_AFTER_S", 0.01)
    asked, started = asyncio.Event(), asyncio.Event()

    class Tardy(LocalCluster):
        def __await__(self) -> Any:
            yield from asked.wait().__await__()
            yield from super().__await__()
            started.set()
            return self

    async def hopeless(_: Any) -> str:
        if asked.is_set():
            return ""
        asked.set()
        await started.wait()
        return "no image"

    options = {**HERE, "n_workers": 1}
    assert opened(lambda: Tardy(**options), ask=num_workers, hopeless=hopeless) == 1
    assert started.is_set()


def test_a_platform_that_gives_no_answer_does_not_end_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ASK_FIRST_AFTER_S", 0.01)
    asked = []

    async def hopeless(_: Any) -> str:
        asked.append(True)
        raise OSError("cannot allocate memory")

    with pytest.raises(ClusterError, match="0 of 1 workers came"):
        opened(barren, start_timeout_s=2, hopeless=hopeless)
    assert asked


def test_distributed_is_heard_inside_the_block_only() -> None:
    logger = logging.getLogger("distributed")
    before = logger.level
    assert opened(ask=lambda _: logger.level) == before
    assert logger.level == before


def test_a_command_that_hangs_while_it_closes_does_not_hide_what_the_block_gave() -> None:
    hanging = threading.Event()

    async def end(_: Any) -> None:
        await asyncio.to_thread(hanging.wait, 20)

    try:
        given = opened(ask=lambda _: "trained", close=end, close_timeout_s=0.2)
    finally:
        hanging.set()
    assert given == "trained"


def test_what_ends_the_rest_has_time_of_its_own_after_a_close_that_hung(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And Distributed is not heard meanwhile."""
    ended = []

    class Hanging(LocalCluster):
        async def _close(self) -> None:
            if not ended:
                await asyncio.sleep(60)
            await super()._close()

    async def end(cluster: Any) -> None:
        await asyncio.sleep(0.5)
        ended.append(logging.getLogger("distributed").level)
        await cluster.close()

    opened(lambda: Hanging(**HERE), close=end, close_timeout_s=2)
    assert ended == [logging.CRITICAL]
    assert "was not closed cleanly: TimeoutError" in caplog.text
