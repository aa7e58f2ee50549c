"""A state as bytes that are sent in pieces, without a second copy of it in the memory of its owner.

What is not a plain tensor is pickled; the tensors' own memory follows, one after the other.
"""

from __future__ import annotations

import io
import pickle
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["StatePieces", "assemble"]

HEADER_BYTES = 8
# Tensors begin at multiples of this.
ALIGN_BYTES = 64


class StatePieces:
    """A state as a row of bytes of which any piece can be read.

    Parameters
    ----------
    state : object
        Never changed while it is sent; its tensors are read where they lie.
    """

    def __init__(self, state: object) -> None:
        buffers: list[pickle.PickleBuffer] = []
        stream = io.BytesIO()
        _Pickler(stream, buffers.append).dump(state)
        views = [buffer.raw() for buffer in buffers]
        plan = pickle.dumps((stream.getvalue(), [view.nbytes for view in views]))
        head = len(plan).to_bytes(HEADER_BYTES, "little") + plan
        parts = [memoryview(head)]
        end = len(head)
        for view in views:
            padding = bytes(-end % ALIGN_BYTES)
            parts += [memoryview(padding), view]
            end += len(padding) + view.nbytes
        self._parts = parts
        self._starts = [0, *accumulate(part.nbytes for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def piece(self, offset: int, size_bytes: int) -> bytes:
        """Give the bytes from an offset on, fewer at the end."""
        found: list[memoryview] = []
        index = bisect_right(self._starts, offset) - 1
        while size_bytes > 0 and index < len(self._parts):
            begin = offset - self._starts[index]
            taken = self._parts[index][begin : begin + size_bytes]
            found.append(taken)
            size_bytes -= taken.nbytes
            offset += taken.nbytes
            index += 1
        return b"".join(found)


def assemble(received: bytearray) -> Any:
    """Make the state again; its tensors lie in the bytes that were received."""
    whole = memoryview(received)
    end = HEADER_BYTES + int.from_bytes(whole[:HEADER_BYTES], "little")
    # Made by a rank of this very run.
    stream, sizes = pickle.loads(whole[HEADER_BYTES:end])  # noqa: S301
    buffers = []
    for size in sizes:
        begin = end + -end % ALIGN_BYTES
        end = begin + size
        buffers.append(whole[begin:end])
    return pickle.loads(stream, buffers=buffers)  # noqa: S301


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, take: Any) -> None:
        super().__init__(file, protocol=5, buffer_callback=take)

    def reducer_override(self, value: Any) -> Any:
        import torch

        plain = (
            type(value) is torch.Tensor
            and value.device.type == "cpu"
            and value.layout is torch.strided
            and not (value.requires_grad or value.is_quantized or value.is_conj() or value.is_neg())
            and value.is_contiguous()
            and value.numel() > 0
        )
        if not plain:
            return NotImplemented
        memory = value.reshape(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(memory), value.dtype, tuple(value.shape))


def _tensor(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).reshape(shape)
