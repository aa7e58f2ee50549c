"""Random numbers that depend on the run's seed and a key alone, whoever draws them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from typing import TYPE_CHECKING

import torch

from dask_nn.data.plan import key64
from dask_nn.errors import DaskNNError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["SeededRandomness", "call_beside_others", "own_generator", "restored_generator"]

SEED_BITS = (1 << 63) - 1
# How often whoever waits for the generator looks whether it should go on waiting.
LOOK_S = 0.1
# A shard's step may take minutes. Whoever keeps it for longer hangs, and others would hang with it.
PATIENCE_S = 600.0
# More between two looks is time for which this process was stopped, and so was whoever has it.
LOOK_COUNTS_S = 1.0
# Who has many numbers to draw gives it on after so long, where somebody waits.
TURN_S = 0.05


class _Waiting(threading.local):
    """What this thread calls now and then while it waits for its turn."""

    call: Callable[[], None] | None = None


class _Turns:
    """Whose turn it is to use PyTorch's default generator, which belongs to the process.

    Ranks that are threads of one process meet there, and one may meet others unawares: one that was
    not waited for, of a run that ended, or another run's. Many that draw nothing, or one that
    draws, have their turn at a time, in the order in which they come.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._sharing = 0
        self._owner: int | None = None
        self._depth = 0
        self._handed_over = 0
        self._users: Counter[int] = Counter()
        self._before: list[torch.Tensor] = []
        self._waiting = _Waiting()

    @contextlib.contextmanager
    def used(self, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Be one of those who use it; the last of them gives it its first state back.

        While this thread waits for its turn, ``waiting`` is called; what it raises ends that.
        """
        me = threading.get_ident()
        outer = self._waiting.call
        self._waiting.call = waiting or outer
        with self._changed:
            if not self._users:
                self._before = _state()
            self._users[me] += 1
        try:
            yield
        finally:
            self._waiting.call = outer
            with self._changed:
                self._users[me] -= 1
                if not self._users[me]:
                    del self._users[me]
                if not self._users:
                    _set_state(self._before)
                    self._hand_over()

    def has_others(self) -> bool:
        """Tell whether other threads use it."""
        return len(self._users) > (threading.get_ident() in self._users)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it."""
        return bool(self._queue)

    @property
    def idle_since(self) -> int | None:
        """The number of turns after which nobody has it; None while somebody has."""
        return None if self._owner is not None or self._sharing else self._handed_over

    def put_back(self, state: torch.Tensor, idle_since: int | None) -> bool:
        """Give the generator a state again, if nobody has had it since; tell whether it is so."""
        with self._changed:
            if idle_since is None or self.idle_since != idle_since:
                return False
            torch.default_generator.set_state(state)
            return True

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Share it with others that draw nothing; who has it alone has it all the more."""
        if self._owner == threading.get_ident():
            yield
            return
        self._take(lambda: self._owner is None, self._share)
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._hand_over()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Have it alone; who has it may take it again."""
        if self._owner != threading.get_ident():
            self._take(lambda: self._owner is None and not self._sharing, self._own)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                with self._changed:
                    self._owner = None
                    self._hand_over()

    def _share(self) -> None:
        self._sharing += 1

    def _own(self) -> None:
        self._owner = threading.get_ident()

    def _hand_over(self) -> None:
        self._handed_over += 1
        self._changed.notify_all()

    def _take(self, is_free: Callable[[], bool], take: Callable[[], None]) -> None:
        """Wait until it is free for this thread."""
        ticket = object()
        waiting = self._waiting.call
        with self._changed:
            if not self._queue and is_free():
                take()
                return
            self._queue.append(ticket)
            handed_over, waited_s, looked = self._handed_over, 0.0, time.monotonic()
        try:
            while True:
                with self._changed:
                    if self._changed.wait_for(
                        lambda: self._queue[0] is ticket and is_free(), LOOK_S
                    ):
                        take()
                        return
                    if handed_over != self._handed_over:
                        handed_over, waited_s = self._handed_over, 0.0
                if waiting is not None:
                    waiting()
                before, looked = looked, time.monotonic()
                waited_s += min(looked - before, LOOK_COUNTS_S)
                if waited_s > PATIENCE_S:
                    message = (
                        "something else in this process, such as another training, has had "
                        f"PyTorch's random generator for {PATIENCE_S:g} s; wait until it ends, or "
                        "use another process"
                    )
                    raise DaskNNError(message)
        finally:
            with self._changed:
                self._queue.remove(ticket)
                self._changed.notify_all()


_turns = _Turns()


class SeededRandomness:
    """Run functions on random numbers of their own.

    A function that draws random numbers runs alone in its process. One that draws none may run
    beside others of its kind, and is recognised by the untouched generator; if it does draw later,
    that very call is repeated alone.

    Parameters
    ----------
    seed : int
        The run's seed.

    Raises
    ------
    DaskNNError
        By each method, if another thread of this process keeps the generator for ten minutes.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._draws = True

    def run[T](self, compute: Callable[[bool], T], *key: int | str) -> T:
        """Call ``compute`` with the generator seeded by the run's seed and a key.

        Parameters
        ----------
        compute : callable
            Told whether it may be called once more, which must then not see effects of this call.
        *key : int or str
            What the numbers depend on, besides the seed.
        """
        others = _turns.has_others()
        if others and not self._draws:
            with _turns.shared():
                before = _state()
                result = compute(True)
                untouched = _equal(_state(), before)
            if untouched:
                return result
        with _turns.alone():
            self._reseed(*key)
            before = _state() if others else []
            result = compute(False)
            if others:
                self._draws = not _equal(_state(), before)
        return result

    def run_once[T](self, compute: Callable[[], T], *key: int | str) -> T:
        """Call ``compute`` as :meth:`run` does, exactly once and always alone."""
        with _turns.alone():
            self._reseed(*key)
            return compute()

    def run_watched[T](self, compute: Callable[[], T], *key: int | str) -> tuple[T, bool]:
        """Call ``compute`` as :meth:`run_once` does, and tell whether it draws numbers.

        Also where it sets the generator's state back: others would see the state in between.
        """
        from dask_nn.data.draws import WatchedDraws

        with _turns.alone(), WatchedDraws() as watched:
            self._reseed(*key)
            before = _state()
            return compute(), watched.drew or not _equal(_state(), before)

    def run_each[T](
        self, compute: Callable[[int], T], numbers: Iterable[int], *key: int | str
    ) -> list[T]:
        """Call ``compute`` of each number as :meth:`run_once` does, with the number in its key.

        All of them in one turn, if nobody waits for the generator.
        """
        left = deque(numbers)
        results: list[T] = []
        while left:
            with _turns.alone():
                until = time.monotonic() + TURN_S
                while left and not (_turns.is_wanted and time.monotonic() > until):
                    self._reseed(*key, left[0])
                    results.append(compute(left.popleft()))
        return results

    def _reseed(self, *key: int | str) -> None:
        seed = key64(self._seed, *key) & SEED_BITS
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)


def call_beside_others[T](compute: Callable[[], T]) -> tuple[T, bool]:
    """Call a function that should draw no random numbers, and tell whether it did.

    It waits for nobody: where others had the generator meanwhile, it cannot be told, and is False.
    The generator is as before.
    """
    idle_since, before = _turns.idle_since, torch.default_generator.get_state()
    result = compute()
    touched = not torch.equal(torch.default_generator.get_state(), before)
    return result, touched and _turns.put_back(before, idle_since)


@contextlib.contextmanager
def restored_generator(waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Give the process its random state back afterwards, once nobody else uses the generator.

    Parameters
    ----------
    waiting : callable, optional
        Called now and then while this thread waits until another has used the generator; what it
        raises ends the wait.
    """
    with _turns.used(waiting):
        yield


@contextlib.contextmanager
def own_generator() -> Iterator[None]:
    """Have the process's generator alone, and give its state back afterwards."""
    with _turns.used(), _turns.alone():
        yield


def _state() -> list[torch.Tensor]:
    """Copy the state of the processor's generator and, where in use, of the graphics card's."""
    states: list[torch.Tensor] = [torch.default_generator.get_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def _set_state(states: list[torch.Tensor]) -> None:
    torch.default_generator.set_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


def _equal(states: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(states) == len(others) and all(map(torch.equal, states, others))
