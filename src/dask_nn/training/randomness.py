"""Random numbers that depend on (seed, step, shard) alone, whoever computes the shard."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import torch

from dask_nn.data.plan import key64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["ShardRandomness", "own_generator", "restored_generator"]

SEED_BITS = (1 << 63) - 1


class _GeneratorLock:
    """Many that draw nothing, or one that draws, may use the generator at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._owner: int | None = None
        self._depth = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        if self._owner == threading.get_ident():
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._owner is None)
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Have it alone; who has it may take it again."""
        me = threading.get_ident()
        with self._changed:
            if self._owner != me:
                self._changed.wait_for(lambda: self._owner is None)
                self._owner = me
                self._changed.wait_for(lambda: not self._sharing)
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._owner = None
                    self._changed.notify_all()


# PyTorch's default generator belongs to the process; ranks that are threads of one share it. A rank
# may meet others unawares: one that was not waited for, of a run that ended, or another run's.
_generator = _GeneratorLock()


class ShardRandomness:
    """Run the random part of a shard's step (transform and forward) on numbers of its own.

    Where several ranks share the process, a function that draws random numbers runs alone. One that
    draws none may run beside others of its kind, and is recognised by the untouched generator; if
    it does draw later, that very call is repeated alone.

    Parameters
    ----------
    seed : int
        The run's seed.
    shared : bool
        Whether other ranks or tasks of this process may draw numbers at the same time.
    """

    def __init__(self, seed: int, *, shared: bool) -> None:
        self._seed = seed
        self._shared = shared
        self._draws = True
        self._cuda = torch.cuda.is_initialized()

    @property
    def may_repeat(self) -> bool:
        """Whether the next call of :meth:`run` may call its function twice."""
        return self._shared and not self._draws

    def run[T](self, compute: Callable[[], T], step: int, shard: int) -> T:
        """Call ``compute`` with the generator seeded for a step and shard.

        ``compute`` may be called twice; the second call must not see effects of the first.
        """
        if not self._shared:
            with _generator.alone():
                self._reseed(step, shard)
                return compute()
        if not self._draws:
            with _generator.shared():
                before = torch.default_generator.get_state()
                result = compute()
                untouched = torch.equal(torch.default_generator.get_state(), before)
            if untouched:
                return result
        with own_generator():
            self._reseed(step, shard)
            before = torch.default_generator.get_state()
            result = compute()
            self._draws = not torch.equal(torch.default_generator.get_state(), before)
        return result

    def _reseed(self, step: int, shard: int) -> None:
        seed = key64(self._seed, step, shard) & SEED_BITS
        torch.default_generator.manual_seed(seed)
        if self._cuda:
            torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def restored_generator() -> Iterator[None]:
    """Give the process its random state back afterwards."""
    with _generator.alone():
        state = torch.default_generator.get_state()
    try:
        yield
    finally:
        with _generator.alone():
            torch.default_generator.set_state(state)


@contextlib.contextmanager
def own_generator() -> Iterator[None]:
    """Have the process's generator alone, and give its state back afterwards."""
    with _generator.alone(), restored_generator():
        yield
