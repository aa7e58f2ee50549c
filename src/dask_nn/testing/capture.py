"""What travels over a network interface, recorded as the kernel sees it; needs root."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Capture", "listening_ports"]

ETH_P_ALL = 0x0003
ETH_HEADER_BYTES = 14
ETH_IPV4 = b"\x08\x00"
IP_TCP = 6
SOL_PACKET = 263
PACKET_STATISTICS = 6
SO_RCVBUFFORCE = 33
BUFFER_BYTES = 256 << 20
FRAME_BYTES = 1 << 18
POLL_S = 0.1
LISTEN = "0A"


class Capture:
    """Records all TCP payloads of some interfaces of this namespace; a context manager.

    Parameters
    ----------
    interfaces : sequence of str
        Their names.

    Attributes
    ----------
    dropped : int
        Frames that the kernel could not hand over; with any, nothing can be said of what was not
        found.
    """

    def __init__(self, interfaces: Sequence[str]) -> None:
        self._interfaces = interfaces
        self._frames: list[bytes] = []
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self.dropped = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for interface in self._interfaces:
                sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
                stack.enter_context(sock)
                sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
                sock.bind((interface, ETH_P_ALL))
                sock.settimeout(POLL_S)
                thread = threading.Thread(
                    target=self._record, args=(sock,), name="dask-nn-capture", daemon=True
                )
                self._threads.append(thread)
            stack.pop_all()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _record(self, sock: socket.socket) -> None:
        with sock:
            while True:
                try:
                    self._frames.append(sock.recv(FRAME_BYTES))
                except TimeoutError:
                    if self._ended.is_set():
                        break
            counts = sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
            self.dropped += struct.unpack("II", counts)[1]

    def streams(self) -> list[bytes]:
        """Put the payloads of each connection and direction into the order of the sender."""
        pieces: defaultdict[bytes, dict[int, bytes]] = defaultdict(dict)
        for frame in self._frames:
            found = _tcp_payload(frame)
            if found is not None:
                connection, sequence, payload = found
                known = pieces[connection].get(sequence, b"")
                pieces[connection][sequence] = max(known, payload, key=len)
        return [b"".join(parts[at] for at in sorted(parts)) for parts in pieces.values()]

    def find(self, patterns: dict[str, bytes]) -> set[str]:
        """Give the names of the patterns that occur in a stream."""
        streams = self.streams()
        return {name for name, pattern in patterns.items() if any(pattern in s for s in streams)}


def _tcp_payload(frame: bytes) -> tuple[bytes, int, bytes] | None:
    """Give connection, sequence number and payload of a frame; None for what has none."""
    packet = frame[ETH_HEADER_BYTES:]
    if frame[12:14] != ETH_IPV4 or len(packet) < 20 or packet[9] != IP_TCP:
        return None
    segment = packet[(packet[0] & 0xF) * 4 : int.from_bytes(packet[2:4]) or None]
    payload = segment[(segment[12] >> 4) * 4 :]
    if not payload:
        return None
    return packet[12:20] + segment[:4], int.from_bytes(segment[4:8]), payload


def listening_ports(pid: int) -> set[int]:
    """Give the TCP ports on which anybody in a process's network namespace listens."""
    ports = set()
    for name in ("tcp", "tcp6"):
        path = Path("/proc", str(pid), "net", name)
        for line in path.read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports
