from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from dask_nn.controller.meeting import _MeetingPoint

if TYPE_CHECKING:
    import pytest


async def announce(point: _MeetingPoint, *gangs: str) -> None:
    for gang in gangs:
        await point.handle(gang, "set", "key", gang.encode())


def test_any_number_of_gangs_may_meet_on_one_worker() -> None:
    async def meet() -> list[bytes | None]:
        point, gangs = _MeetingPoint(), [f"gang {number}" for number in range(20)]
        await announce(point, *gangs)
        return [await point.handle(gang, "get", "key", b"") for gang in gangs]

    assert asyncio.run(meet()) == [f"gang {number}".encode() for number in range(20)]


def test_gangs_of_which_nothing_was_heard_for_long_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_MeetingPoint, "KEPT_S", 0.0)

    async def meet() -> list[str]:
        point = _MeetingPoint()
        await announce(point, "first", "second")
        return list(point._gangs)

    assert asyncio.run(meet()) == ["second"]
