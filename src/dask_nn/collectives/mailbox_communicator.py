"""Ranks that exchange letters: the way between hosts where PyTorch's own may not be taken."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dask_nn.collectives.messages import MessageCommunicator
from dask_nn.errors import Aborted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dask_nn.collectives.mailbox import Mailbox

__all__ = ["MailboxCommunicator"]

# How long a wait may take to notice the abort flag.
POLL_S = 0.1


class MailboxCommunicator(MessageCommunicator):
    """The exchange by letters: one for each peer and operation.

    Parameters
    ----------
    rank, world_size, rendezvous, timeout_s, abort_event, slice_above_bytes, group_sizes
        See :class:`~dask_nn.collectives.messages.MessageCommunicator`.
    mailbox : Mailbox
        Of this rank and this gang; closed with the communicator.
    """

    name = "dask"

    def __init__(self, rank: int, world_size: int, *, mailbox: Mailbox, **options: Any) -> None:
        super().__init__(rank, world_size, **options)
        self._mailbox = mailbox
        self._closed = False
        self._peers = [peer for peer in range(world_size) if peer != rank]
        self._pending: dict[int, torch.Tensor] = {}

    def connect(self, device: torch.device) -> None:
        """Announce this rank's address, connect to the ranks before it, and await the others."""
        deadline = self.deadline()
        self.rendezvous.set(f"mail/{self.rank}", self._mailbox.register(self.rank))
        for peer in range(self.rank):
            self._mailbox.connect(peer, self.await_key(self.rendezvous, f"mail/{peer}"))
        while not self._peers_joined():
            self.check_abort()
            if time.monotonic() > deadline:
                raise self.timed_out("its peers")

    def _peers_joined(self) -> bool:
        try:
            return self._mailbox.await_peers(self._peers, timeout_s=min(POLL_S, self.timeout_s))
        except ConnectionError as error:
            raise self._broken(error) from error

    def begin_gather(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Send the same to all."""
        rows = received.view(self.world_size, -1)
        rows[self.rank].copy_(sent.view(-1))
        self._begin(dict(enumerate(rows)), dict.fromkeys(self._peers, sent.view(-1)))

    def begin_scatter(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_sizes: Sequence[int],
        sent_sizes: Sequence[int],
    ) -> None:
        """Send everybody its part."""
        incoming = received.view(-1).split(list(received_sizes))
        outgoing = sent.view(-1).split(list(sent_sizes))
        incoming[self.rank].copy_(outgoing[self.rank])
        self._begin(dict(enumerate(incoming)), dict(enumerate(outgoing)))

    def _begin(self, incoming: dict[int, torch.Tensor], outgoing: dict[int, torch.Tensor]) -> None:
        self._check_may_begin()
        self._pending = {peer: incoming[peer] for peer in self._peers}
        for peer in self._peers:
            part = outgoing[peer].view(torch.uint8).cpu().numpy()
            if part.size:
                self._mailbox.send(peer, part)

    def finish(self) -> None:
        """Take the peers' letters of the operation under way."""
        deadline = self.deadline()
        # Who has been read may have completed the exchange, the last one, and have left.
        for peer, wanted in list(self._pending.items()):
            into = wanted.view(torch.uint8)
            if not into.numel():
                del self._pending[peer]
                continue
            letter = np.frombuffer(self._receive(peer, deadline), np.uint8)
            if len(letter) != into.numel():
                message = (
                    f"{self.title} got {len(letter)} bytes from {self.name_of(peer)}, expected "
                    f"{into.numel()}: the ranks do not train the same network"
                )
                raise Aborted(message)
            if wanted.is_cpu:
                np.copyto(into.numpy(), letter)
            else:
                into.copy_(torch.from_numpy(np.array(letter)))
            del self._pending[peer]

    def exchange_cells(self, cell: bytes) -> list[bytes]:
        """Send the cell to all, and take theirs."""
        self._check_may_begin()
        deadline = self.deadline()
        for peer in self._peers:
            self._mailbox.send(peer, cell)
        return [
            cell if rank == self.rank else bytes(self._receive(rank, deadline))
            for rank in range(self.world_size)
        ]

    def _check_may_begin(self) -> None:
        """Begin nothing without a peer: what it sent before it left completes nothing any more."""
        self.check_abort()
        if self._closed:
            raise Aborted(f"{self.title} exchanges through a closed communicator")
        try:
            self._mailbox.check_present(self._peers)
        except ConnectionError as error:
            raise self._broken(error) from error

    def _receive(self, peer: int, deadline: float) -> Any:
        while True:
            try:
                letter = self._mailbox.receive(peer, timeout_s=min(POLL_S, self.timeout_s))
                if letter is not None:
                    return letter
                # One that is waited for later may be gone already.
                self._mailbox.check(self._pending)
            except ConnectionError as error:
                raise self._broken(error) from error
            self.check_abort()
            if time.monotonic() > deadline:
                raise self.timed_out(self.name_of(peer))

    def signal_abort(self) -> None:
        """Cut the connections."""
        self._mailbox.break_off()

    def close(self) -> None:
        """Close the mailbox."""
        if not self._closed:
            self._closed = True
            self._mailbox.close()
            self._pending = {}
            super().close()

    def _broken(self, error: Exception) -> Aborted:
        if self.abort_event.is_set():
            return Aborted(f"{self.title} was told to end its exchange")
        return Aborted(
            f"{self.title} lost a peer, which ended the exchange or died "
            f"(communicator {self.name!r}): {error}"
        )
