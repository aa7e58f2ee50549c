from __future__ import annotations

import mmap
from typing import Any

import pytest

from dask_nn.collectives.region import (
    CHECK_EVERY,
    FILLED,
    FINISHED,
    FOLDED,
    WRITTEN,
    Region,
    RegionLayout,
)
from dask_nn.collectives.serial import SerialCommunicator
from dask_nn.errors import Aborted

LAYOUT = RegionLayout(members=2, num_cells=2, num_slots=2, slot_bytes=16)


def two_members(**options: Any) -> tuple[Region, Region]:
    memory = mmap.mmap(-1, LAYOUT.size_bytes)
    first, second = (
        Region(SerialCommunicator(0, 1), LAYOUT, memory, member, polls=1, **options)
        for member in range(2)
    )
    return first, second


@pytest.mark.parametrize("kind", [FILLED, FOLDED, WRITTEN])
def test_a_member_that_comes_after_the_end_does_not_show_itself(kind):
    first, second = two_members()
    first.raise_flag(kind, 1)
    first.end()
    with pytest.raises(Aborted, match="rank 0 ended the exchange"):
        second.raise_flag(kind, 1)
    assert not second._flags[(kind * 2 + 1) * 8]


@pytest.mark.parametrize("kind", [WRITTEN, FINISHED])
def test_what_other_hosts_have_completed_is_passed_on_after_the_end(kind):
    first, second = two_members()
    first.end()
    second.raise_flag(kind, 1, complete=True)
    first.wait(kind, 1)


def test_who_has_what_it_waits_for_completes_though_told_to_end():
    """Its peer completes, too: it saw all flags, and no end."""
    waited = 0

    def pause() -> None:
        nonlocal waited
        waited += 1
        if waited == CHECK_EVERY:
            second.raise_flag(FILLED, 1)
            first.end()

    first, second = two_members(pause=pause)
    first.wait(FILLED, 1)
    assert waited == CHECK_EVERY
