"""What a checkpoint says of itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from dask_nn.errors import CheckpointError

__all__ = ["FORMAT", "Manifest", "StoredFile"]

FORMAT = 1
_SUM = "manifest_sha256"


@dataclass(frozen=True)
class StoredFile:
    """A file beside the manifest.

    Parameters
    ----------
    sha256 : str
        Of its bytes, hexadecimal.
    size : int
        Bytes.
    """

    sha256: str
    size: int

    @classmethod
    def of(cls, data: bytes) -> StoredFile:
        """Describe the bytes of a file."""
        return cls(hashlib.sha256(data).hexdigest(), len(data))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All of a checkpoint but its tensors.

    Parameters
    ----------
    epoch, step, steps : int
        The epoch under way (from 0), the steps completed in it, and over the whole run.
    run_id, generation
        Who wrote it.
    configuration : dict
        What decides the bits of the run: plan version, shards, seed, batch size and so on. The
        random numbers of every step follow from the seed, so nothing else of them is stored.
    history : list of dict
        Records of the finished epochs.
    record : dict
        Record of the epoch that has just ended; empty in the middle of one.
    state : object
        The state's structure and plain values, see :mod:`dask_nn.checkpoints.codec`.
    files : dict of str to StoredFile
        The tensors' files.
    packages : dict of str to str
        Versions.
    bitwise : bool
        Whether all gangs so far computed the same bits.
    canary : dict of str to str
        What the run's first gang computed from a fixed batch, for whoever goes on: ``sample``, the
        sum of that batch, and ``bits``, that of its gradients.
    """

    epoch: int
    step: int
    steps: int
    run_id: str = ""
    generation: int = 0
    configuration: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    record: dict[str, float] = field(default_factory=dict)
    state: Any = None
    files: dict[str, StoredFile] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    bitwise: bool = True
    canary: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def position(self) -> tuple[int, int]:
        """What orders checkpoints of a run."""
        return (self.epoch, self.steps)

    def to_bytes(self) -> bytes:
        """Write as JSON with its own checksum."""
        # A loss can be NaN; Python's reader takes what its writer makes of it.
        values = asdict(self)
        values[_SUM] = _checksum(values)
        # On one line: with an indent Python's slow encoder would take the interpreter from a rank.
        return json.dumps(values).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read what `to_bytes` wrote.

        Raises
        ------
        CheckpointError
            If it is truncated, changed, or of a newer version of dask-nn.
        """
        try:
            values = json.loads(data)
            expected = values.pop(_SUM)
            version = values["format"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = "its manifest is truncated or no manifest at all"
            raise CheckpointError(message) from error
        if version != FORMAT:
            message = f"it has format {version}; this version of dask-nn reads format {FORMAT}"
            raise CheckpointError(message)
        if _checksum(values) != expected:
            message = "its manifest was changed: the checksum is another"
            raise CheckpointError(message)
        values["files"] = {name: StoredFile(**stored) for name, stored in values["files"].items()}
        return cls(**values)


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
