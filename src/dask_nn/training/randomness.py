"""Random numbers that depend on (seed, step, shard) alone, whoever computes the shard."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import torch

from dask_nn.data.plan import key64

__all__ = ["ShardRandomness"]

# PyTorch's default generator belongs to the process; ranks that are threads of one share it.
_generator_lock = threading.Lock()
SEED_BITS = (1 << 63) - 1


class ShardRandomness:
    """Run the random part of a shard's step (transform and forward) on numbers of its own.

    Where several ranks share the process, a function that draws random numbers runs under a lock.
    One that draws none does not need it, and is recognised by the untouched generator; if it does
    draw later, that very call is repeated under the lock.

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

    def run[T](self, compute: Callable[[], T], step: int, shard: int) -> T:
        """Call ``compute`` with the generator seeded for a step and shard.

        ``compute`` may be called twice; the second call must not see effects of the first.
        """
        if not self._shared:
            self._reseed(step, shard)
            return compute()
        if not self._draws:
            before = torch.default_generator.get_state()
            result = compute()
            if torch.equal(torch.default_generator.get_state(), before):
                return result
            self._draws = True
        with _generator_lock:
            self._reseed(step, shard)
            before = torch.default_generator.get_state()
            result = compute()
            after = torch.default_generator.get_state()
        self._draws = not torch.equal(before, after)
        return result

    def _reseed(self, step: int, shard: int) -> None:
        seed = key64(self._seed, step, shard) & SEED_BITS
        torch.default_generator.manual_seed(seed)
        if self._cuda:
            torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def restored_generator() -> contextlib.AbstractContextManager[None]:  # type: ignore[misc]
    """Give the process its random state back afterwards."""
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
