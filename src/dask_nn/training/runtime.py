"""Settings of the process and thread that a rank runs in, restored when it ends."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import torch

# Optimizers do this at first use; in a rank, the import would keep the rank's frames alive.
import torch._dynamo
from torch.utils import deterministic as memory_filling

from dask_nn.allocator import keeping_freed_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["rank_runtime", "task_runtime"]

_lock = threading.Lock()
_users = 0
_before: dict[str, int] = {}


@contextlib.contextmanager
def rank_runtime(threads: int, *, deterministic: bool = True) -> Iterator[None]:
    """Prepare this thread and its process for a rank.

    Intra-op threads are set, nondeterministic kernels are refused, and the allocator keeps what
    it freed.

    Parameters
    ----------
    threads : int
        Intra-op threads.
    deterministic : bool
        Whether kernels without reproducible bits are refused.
    """
    with keeping_freed_memory(), task_runtime(threads, deterministic=deterministic):
        yield


@contextlib.contextmanager
def task_runtime(threads: int, *, deterministic: bool = True) -> Iterator[None]:
    """Prepare a worker thread for one task: intra-op threads and reproducible kernels.

    Parameters
    ----------
    threads : int
        Intra-op threads.
    deterministic : bool
        Whether kernels without reproducible bits are refused.
    """
    threads_before = torch.get_num_threads()
    _enter(deterministic=deterministic)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        _leave()


def _enter(*, deterministic: bool) -> None:
    global _users  # noqa: PLW0603  (the settings are the process's own)
    with _lock:
        _users += 1
        if _users > 1:
            return
        _before["deterministic"] = torch.get_deterministic_debug_mode()
        _before["fill"] = memory_filling.fill_uninitialized_memory  # type: ignore[attr-defined]
        # torch.use_deterministic_algorithms imports the compiler first, which takes a second.
        torch.set_deterministic_debug_mode("error" if deterministic else "default")
        # Filling every new tensor with NaN finds bugs, and costs time in each step.
        memory_filling.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _leave() -> None:
    global _users  # noqa: PLW0603
    with _lock:
        _users -= 1
        if _users:
            return
        torch.set_deterministic_debug_mode(int(_before["deterministic"]))
        memory_filling.fill_uninitialized_memory = bool(_before["fill"])  # type: ignore[attr-defined]
