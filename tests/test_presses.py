"""Ctrl-C is heard in sections, kept elsewhere, and gone afterwards."""

from __future__ import annotations

import signal
import threading
from itertools import pairwise
from types import SimpleNamespace

import pytest

from dask_nn import presses as module
from dask_nn.controller.calling import ending_cleanly
from dask_nn.presses import Presses


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_a_press_interrupts_a_section_and_is_kept_elsewhere(clock):
    presses = Presses()
    with presses.kept():
        with pytest.raises(KeyboardInterrupt), presses.heard():
            press()
        clock.now += 1.0
        press()
        assert presses.pending
        with pytest.raises(KeyboardInterrupt), presses.heard():
            pytest.fail("it should not have begun")
        assert not presses.pending
        with presses.heard():
            pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_press_in_an_inner_section_leaves_the_outer_one_to_end_in_peace(clock):
    presses = Presses()
    with presses.kept(), presses.heard():
        with pytest.raises(KeyboardInterrupt), presses.heard():
            press()
        clock.now += 1.0
        press()
        assert presses.pending


def test_a_signal_that_does_what_ctrl_c_does_is_kept_too():
    presses = Presses()
    with ending_cleanly(), presses.kept():
        signal.raise_signal(signal.SIGTERM)
        assert presses.pending
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_handlers_of_others_stay():
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        with Presses().kept():
            press()
        assert heard
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_nothing():
    def work() -> None:
        with Presses().kept():
            found.append(signal.getsignal(signal.SIGINT))

    found: list[object] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_key_that_is_held_down_is_one_press(clock):
    """Also across a section where it is not heard, however long that is."""
    presses = Presses()
    with presses.kept():
        with pytest.raises(KeyboardInterrupt), presses.heard():
            press()
        assert presses.is_another()
        clock.now += 0.66  # before a key begins to repeat
        for _ in range(40):
            press()
            clock.now += 0.03
        assert not presses.pending
        clock.now += 1.0
        press()
        assert presses.pending


def test_a_callback_that_interrupts_again_and_again_is_one_wish(clock):
    presses = Presses()
    assert presses.is_another()
    for _ in range(40):
        clock.now += 0.4
        assert not presses.is_another()
    clock.now += 1.0
    assert presses.is_another()


@pytest.mark.parametrize("every_s", [0.03, 0.5])
def test_who_presses_on_is_heard_again(clock, every_s):
    presses = Presses()
    heard_at = []
    with presses.kept():
        while clock.now < 4 * module.PRESSING_S:
            try:
                with presses.heard():
                    press()
            except KeyboardInterrupt:
                heard_at.append(clock.now)
            clock.now += every_s
    assert len(heard_at) == 4
    assert all(b > a + module.PRESSING_S for a, b in pairwise(heard_at))


@pytest.mark.parametrize("every_s", [0.03, 0.25, 1.0])
def test_who_is_not_heard_for_long_is_obeyed(clock, every_s):
    presses = Presses()
    with presses.kept():
        while clock.now < module.UNHEARD_S:
            press()
            clock.now += every_s
        clock.now += every_s
        with pytest.raises(KeyboardInterrupt):
            press()
