"""Messages between the members of one gang, whatever carries them."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

__all__ = ["LocalMailbox", "Mailbox"]

Payload = Any  # whatever offers the buffer protocol


class Mailbox(ABC):
    """One member's letters; those of one sender arrive in the order in which they were sent.

    A member registers, announces its address to all others, and connects to the members before it;
    connections carry letters both ways. Subclasses carry them and call `joined`, `deliver` and
    `lose`, from any thread.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._letters: defaultdict[int, deque[Payload]] = defaultdict(deque)
        self._joined: set[int] = set()
        self._lost: dict[int, str] = {}

    @abstractmethod
    def register(self, member: int) -> bytes:
        """Begin to accept connections as this member; give the address that peers need."""

    @abstractmethod
    def connect(self, peer: int, address: bytes) -> None:
        """Begin to connect to a peer that has registered; `await_peers` tells how it went."""

    @abstractmethod
    def send(self, peer: int, payload: Payload) -> None:
        """Begin to send; never waits for the peer.

        The buffer is read later, so it must stay as it is until the peer has answered the letter.
        """

    @abstractmethod
    def break_off(self) -> None:
        """Cut all connections: peers that wait for this member learn it at once."""

    @abstractmethod
    def close(self) -> None:
        """Send what is under way, and leave; may be called twice."""

    def await_peers(self, peers: Iterable[int], *, timeout_s: float) -> bool:
        """Wait until all these members are connected; tell whether they are.

        Raises
        ------
        ConnectionError
            If one refused, or is gone again.
        """
        wanted = set(peers)
        with self._changed:
            self._changed.wait_for(
                lambda: wanted <= self._joined or self._gone(wanted) is not None, timeout_s
            )
            self._check(wanted)
            return wanted <= self._joined

    def receive(self, peer: int, *, timeout_s: float) -> Payload | None:
        """Wait for the next letter of a member; None if none came in time.

        Raises
        ------
        ConnectionError
            If the member is gone and has left no letter.
        """
        with self._changed:
            letters = self._letters[peer]
            self._changed.wait_for(lambda: letters or self._gone((peer,)) is not None, timeout_s)
            self._check((peer,))
            return letters.popleft() if letters else None

    def check(self, peers: Collection[int]) -> None:
        """Raise a ConnectionError if one of these members is gone and has left no letter."""
        with self._changed:
            self._check(peers)

    def check_present(self, peers: Collection[int]) -> None:
        """Raise a ConnectionError if one of these members is gone, whatever it has left."""
        with self._changed:
            for peer in peers:
                if peer in self._lost:
                    raise ConnectionError(self._lost[peer])

    def joined(self, peer: int) -> None:
        """Learn that a member is connected."""
        with self._changed:
            self._joined.add(peer)
            self._changed.notify_all()

    def deliver(self, peer: int, payload: Payload) -> None:
        """Take a member's letter."""
        with self._changed:
            self._letters[peer].append(payload)
            self._changed.notify_all()

    def lose(self, peer: int, reason: str) -> None:
        """Learn that a member's connection is gone."""
        with self._changed:
            self._lost.setdefault(peer, reason)
            self._changed.notify_all()

    def _gone(self, peers: Collection[int]) -> str | None:
        """Give why one of these members is gone without a letter; None if none is."""
        for peer, reason in self._lost.items():
            if peer in peers and not self._letters[peer]:
                return reason
        return None

    def _check(self, peers: Collection[int]) -> None:
        reason = self._gone(peers)
        if reason is not None:
            raise ConnectionError(reason)


_offices: defaultdict[str, dict[int, LocalMailbox]] = defaultdict(dict)
_offices_lock = threading.Lock()


class LocalMailbox(Mailbox):
    """Members that are threads of one process: letters are handed over as they are.

    Parameters
    ----------
    gang : str
        A name that this gang alone has.
    """

    def __init__(self, gang: str) -> None:
        super().__init__()
        self._gang = gang
        self._member = -1
        self._peers: dict[int, LocalMailbox] = {}

    def register(self, member: int) -> bytes:
        """Enter the list of the gang's members."""
        self._member = member
        with _offices_lock:
            _offices[self._gang][member] = self
        return self._gang.encode()

    def connect(self, peer: int, address: bytes) -> None:
        """Look the peer up, and be known to it."""
        with _offices_lock:
            other = _offices[address.decode()].get(peer)
        if other is None:
            self.lose(peer, "it has ended")
            return
        self._meet(peer, other)
        other._meet(self._member, self)  # noqa: SLF001 - of this class

    def _meet(self, peer: int, other: LocalMailbox) -> None:
        self._peers[peer] = other
        self.joined(peer)

    def send(self, peer: int, payload: Payload) -> None:
        """Hand the buffer over."""
        self._peers[peer].deliver(self._member, payload)

    def break_off(self) -> None:
        """Tell all peers, as the end of a connection would, and lose them."""
        for peer, other in list(self._peers.items()):
            other.lose(self._member, "it broke off")
            self.lose(peer, "broken off here")

    def close(self) -> None:
        """Leave the list."""
        with _offices_lock:
            members = _offices[self._gang]
            if members.get(self._member) is self:
                del members[self._member]
            if not members:
                del _offices[self._gang]
        for other in self._peers.values():
            other.lose(self._member, "it has ended")
        self._peers = {}
