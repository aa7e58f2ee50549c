"""Letters between the ranks of a gang, over Dask's own connections between workers.

Each pair of ranks has a connection of its own, on which letters go both ways without answers. Where
Dask encrypts and asks for certificates, so does this: the connection is one of Dask's, made and
accepted as all others are.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

from distributed.comm import connect
from distributed.core import Status
from distributed.protocol import to_serialize

from dask_nn.collectives.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from distributed import Worker
    from distributed.comm import Comm

__all__ = ["WorkerMailbox", "open_post_office"]

OPERATION = "dask_nn_mail"
# What is under way when a rank leaves may take so long.
LEAVE_S = 10.0
# Shorter letters travel inside Dask's message, longer ones beside it, where nothing copies them.
BESIDE_BYTES = 2048

# By worker, gang and member: workers of threads share a process.
_boxes: dict[tuple[str, str, int], WorkerMailbox] = {}
_lock = threading.Lock()


def open_post_office(worker: Worker) -> None:
    """Let peers connect to the mailboxes of a worker; done once for each worker."""

    async def handle(comm: Comm, gang: str, sender: int, receiver: int) -> Status:
        with _lock:
            box = _boxes.get((worker.address, gang, receiver))
        if box is None:
            comm.abort()  # that rank has ended
        else:
            await box.accept(sender, comm)
        return Status.dont_reply

    worker.handlers.setdefault(OPERATION, handle)


class WorkerMailbox(Mailbox):
    """The letters of one rank of one gang; everything about connections is done by the event loop.

    Parameters
    ----------
    worker : Worker
        This rank's.
    gang : str
        A name that this gang alone has.
    """

    def __init__(self, worker: Worker, gang: str) -> None:
        super().__init__()
        self._worker = worker
        self._gang = gang
        self._loop: asyncio.AbstractEventLoop = worker.loop.asyncio_loop  # type: ignore[attr-defined]
        self._member = -1
        self._comms: dict[int, Comm] = {}
        self._outgoing: dict[int, asyncio.Queue[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def register(self, member: int) -> bytes:
        """Be found by peers that connect to this worker."""
        self._member = member
        with _lock:
            _boxes[self._worker.address, self._gang, member] = self
        self._in_loop(lambda: self._start(self._end_with_worker()))
        return str(self._worker.address).encode()

    def connect(self, peer: int, address: bytes) -> None:
        """Open a connection to a peer's worker."""
        self._in_loop(lambda: self._start(self._dial(peer, address.decode())))

    async def _end_with_worker(self) -> None:
        """Tell the peers when this worker is closed, whose process may go on."""
        await self._worker.finished()
        for comm in self._comms.values():
            comm.abort()

    async def _dial(self, peer: int, address: str) -> None:
        greeting = {
            "op": OPERATION,
            "gang": self._gang,
            "sender": self._member,
            "receiver": peer,
            "reply": False,
        }
        pool = self._worker.rpc
        try:
            # Not one of the worker's own connections: these are few, and letters keep theirs.
            comm = await connect(
                address, timeout=pool.timeout, deserialize=True, **pool.connection_args
            )
        except OSError as error:
            self.lose(peer, f"{address} cannot be reached: {error}")
            return
        comm.allow_offload = pool.allow_offload
        try:
            await comm.write(greeting)
            self._begin(peer, comm)
            await self._read(peer, comm)
        except OSError as error:
            self.lose(peer, str(error))
        finally:
            comm.abort()

    async def accept(self, peer: int, comm: Comm) -> None:
        """Take a peer's connection, and read it to its end."""
        if self._closed:
            comm.abort()
            return
        self._begin(peer, comm)
        await self._read(peer, comm)

    def send(self, peer: int, payload: Any) -> None:
        """Queue a letter."""
        self._in_loop(self._outgoing[peer].put_nowait, payload)

    def break_off(self) -> None:
        """Abort all connections."""

        def abort() -> None:
            for comm in self._comms.values():
                comm.abort()

        self._in_loop(abort)

    def close(self) -> None:
        """Write what is queued, then close all connections."""
        with _lock:
            _boxes.pop((self._worker.address, self._gang, self._member), None)
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(Exception):  # a worker that ends takes its connections with it
            asyncio.run_coroutine_threadsafe(self._leave(), self._loop).result(2 * LEAVE_S)

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(LEAVE_S):
                for peer, comm in self._comms.items():
                    if not comm.closed():
                        await self._outgoing[peer].join()
                        await comm.close()
        finally:
            for comm in self._comms.values():
                comm.abort()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, peer: int, comm: Comm) -> None:
        self._comms[peer] = comm
        self._outgoing[peer] = asyncio.Queue()
        self._start(self._write(peer, comm))
        self.joined(peer)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(self, peer: int, comm: Comm) -> None:
        queue = self._outgoing[peer]
        while True:
            payload = await queue.get()
            view = memoryview(payload)
            letter = bytes(view) if view.nbytes <= BESIDE_BYTES else to_serialize(view)
            try:
                await comm.write({"letter": letter})
            except OSError as error:
                self.lose(peer, str(error))
                comm.abort()
            finally:
                queue.task_done()

    async def _read(self, peer: int, comm: Comm) -> None:
        reason = "its connection was closed"
        try:
            while True:
                message = await comm.read()
                self.deliver(peer, message["letter"])
        except OSError as error:
            reason = str(error) or reason
        finally:
            comm.abort()
            self.lose(peer, reason)

    def _in_loop(self, function: Callable[..., object], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # a loop that has ended has no connections
            self._loop.call_soon_threadsafe(function, *arguments)
