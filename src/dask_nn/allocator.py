"""The C library's allocator, which Dask's nanny tells to give memory back at once.

The nanny starts workers with ``MALLOC_TRIM_THRESHOLD_=65536``. With it every large temporary of a
step goes back to the kernel, and is faulted in again page by page for the next one. Threads other
than the main one (a worker computes in such) allocate from heaps of at most 64 MiB; glibc returns
a heap that became empty whatever the threshold says, unless the top pad is as large as a heap.
Source: ``heap_trim`` in glibc's malloc/arena.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["keeping_freed_memory"]

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3
KEEP_BYTES = 1 << 30
HEAP_BYTES = 64 << 20
DEFAULT_BYTES = 128 * 1024
# What is freed from this size on makes glibc look at the end of the thread's heap.
LOOK_BYTES = 64 * 1024

_lock = threading.Lock()
_users = 0
_last_left = 0
_timer_runs = False


@contextlib.contextmanager
def keeping_freed_memory(linger_s: Callable[[], float] = float) -> Iterator[None]:
    """Let the allocator keep what is freed within the block; all of it goes back at its end.

    Blocks in other threads of the process may overlap; the last one that ends counts.

    Parameters
    ----------
    linger_s : callable
        Asked when the block ends: give it back so many seconds later, unless another block begins
        before. For tasks that follow each other; at once by default.
    """
    _enter()
    try:
        yield
    finally:
        _leave(linger_s())


def _enter() -> None:
    global _users  # noqa: PLW0603  (the allocator is the process's own)
    with _lock:
        _users += 1
        _set(KEEP_BYTES, KEEP_BYTES, HEAP_BYTES)


def _leave(linger_s: float) -> None:
    global _users, _last_left  # noqa: PLW0603
    with _lock:
        _users -= 1
        _last_left += 1
        if _users:
            return
        if linger_s:
            _start_timer(linger_s)
        else:
            _give_back()


def _start_timer(linger_s: float) -> None:
    """Look again later, with one thread for however many tasks."""
    global _timer_runs  # noqa: PLW0603
    if not _timer_runs:
        _timer_runs = True
        timer = threading.Timer(linger_s, _look_again, (linger_s, _last_left))
        timer.name, timer.daemon = "dask-nn-allocator", True
        timer.start()


def _look_again(linger_s: float, last_left: int) -> None:
    global _timer_runs  # noqa: PLW0603
    with _lock:
        _timer_runs = False
        if _users:
            return  # the last of them starts another timer, or gives it back
        if _last_left != last_left:
            _start_timer(linger_s)
        else:
            _give_back()


def _give_back() -> None:
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
    _set(*(int(os.environ.get(name, DEFAULT_BYTES)) for name in names), give_back=True)


def _set(trim_bytes: int, mmap_bytes: int, pad_bytes: int, *, give_back: bool = False) -> None:
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, trim_bytes)
        if not libc.mallopt(M_MMAP_THRESHOLD, mmap_bytes):  # older ones take half a heap at most
            libc.mallopt(M_MMAP_THRESHOLD, HEAP_BYTES // 2)
        libc.mallopt(M_TOP_PAD, pad_bytes)
        if give_back:
            libc.malloc_trim(0)
            # Trimming leaves the end of a thread's last heap alone; freeing there does not.
            libc.malloc.restype = ctypes.c_void_p
            libc.free(ctypes.c_void_p(libc.malloc(LOOK_BYTES)))
