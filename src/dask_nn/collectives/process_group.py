"""Ranks on several hosts, or with their leaves on GPUs: PyTorch's own process groups.

The groups are made directly, without ``init_process_group``, so that several gangs, and several
ranks, may live in one process. PyTorch only moves the bytes.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch._C import _distributed_c10d as c10d

from dask_nn.collectives.messages import MessageCommunicator
from dask_nn.collectives.process_group_store import RendezvousStore
from dask_nn.errors import Aborted, CollectiveError, CollectiveTimeout

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["ProcessGroupCommunicator"]

# How long a wait may take to notice the abort flag.
POLL = timedelta(milliseconds=100)
# Our own deadline comes first: it knows more to say.
SPARE_S = 30.0
BREAK_TIMEOUT_S = 5.0


class ProcessGroupCommunicator(MessageCommunicator):
    """The exchange through a process group; subclasses make and break the group.

    Parameters
    ----------
    rank, world_size, rendezvous, timeout_s, abort_event, slice_above_bytes, group_sizes
        See :class:`~dask_nn.collectives.messages.MessageCommunicator`.
    """

    _group: Any = None
    work: Any = None

    @abstractmethod
    def make_group(self, store: RendezvousStore) -> Any:
        """Make the process group; every rank of the gang does so."""

    @abstractmethod
    def disconnect(self, group: Any) -> None:
        """End what the group has under way, here and at the peers."""

    def connect(self, device: torch.device) -> None:
        """Make the group."""
        store = RendezvousStore(self, self.rendezvous)
        try:
            self._group = self.make_group(store)
        except RuntimeError as error:
            raise (store.error or self.failure(error)) from error

    def begin_gather(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Begin an all-gather."""
        options = c10d.AllgatherOptions()
        options.timeout = self.patience
        self._begin("_allgather_base", received.view(-1), sent.view(-1), options)

    def begin_scatter(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_sizes: Sequence[int],
        sent_sizes: Sequence[int],
    ) -> None:
        """Begin an all-to-all."""
        options = c10d.AllToAllOptions()
        options.timeout = self.patience
        self._begin(
            "alltoall_base",
            received.view(-1),
            sent.view(-1),
            list(received_sizes),
            list(sent_sizes),
            options,
        )

    def finish(self) -> None:
        """Wait for the operation under way."""
        work = self.work
        deadline = self.deadline()
        while True:
            try:
                work.wait(POLL)
            except RuntimeError as error:
                if work.is_completed() and not work.is_success():
                    raise self.failure(error) from error
            else:
                return
            self.check_abort()
            if time.monotonic() > deadline:
                raise self.timed_out("its peers")

    def signal_abort(self) -> None:
        """Break the connections: the peers' waits end, and so does one of this rank."""
        group = self._group
        if group is not None:
            self.disconnect(group)

    def close(self) -> None:
        """Leave the group, and break it first if an exchange is still under way."""
        group, self._group = self._group, None
        work, self.work = self.work, None
        if group is None:
            return
        if work is not None and not work.is_completed():
            self.disconnect(group)
            # A group that goes joins its threads with the interpreter lock held, while they may
            # want that lock to drop tensors: let them end first.
            deadline = time.monotonic() + BREAK_TIMEOUT_S
            while not work.is_completed() and time.monotonic() < deadline:
                time.sleep(0.001)
        del work, group
        super().close()

    @property
    def patience(self) -> timedelta:
        """Deadline for PyTorch's own waits, later than that of this communicator."""
        return timedelta(seconds=self.timeout_s + SPARE_S)

    def _begin(self, operation: str, *arguments: Any) -> None:
        self.check_abort()
        group = self._group
        if group is None:
            raise Aborted(f"{self.title} exchanges through a closed communicator")
        try:
            self.work = getattr(group, operation)(*arguments)
        except RuntimeError as error:
            raise self.failure(error) from error

    def failure(self, error: RuntimeError) -> CollectiveError:
        """Turn an error of PyTorch into one of ours."""
        reason = str(error).partition("\n")[0]
        if self.abort_event.is_set():
            return Aborted(f"{self.title} was told to end its exchange")
        if "timed out" in reason.lower():
            return CollectiveTimeout(f"{self.title} waited too long for a peer: {reason}")
        return Aborted(
            f"{self.title} lost a peer, which ended the exchange or died "
            f"(communicator {self.name!r}): {reason}"
        )
