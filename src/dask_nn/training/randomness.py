"""Random numbers that depend on (seed, step, shard) alone, whoever computes the shard."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import torch

from dask_nn.data.plan import key64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["ShardRandomness"]

SEED_BITS = (1 << 63) - 1


class _GeneratorLock:
    """Many that draw nothing, or one that draws, may use the generator at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._taken = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken)
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken)
            self._taken = True
            self._changed.wait_for(lambda: not self._sharing)
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()


# PyTorch's default generator belongs to the process; ranks that are threads of one share it.
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
            self._reseed(step, shard)
            return compute()
        if not self._draws:
            with _generator.shared():
                before = torch.default_generator.get_state()
                result = compute()
                untouched = torch.equal(torch.default_generator.get_state(), before)
            if untouched:
                return result
        with _generator.alone(), restored_generator():
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
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
