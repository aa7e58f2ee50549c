"""The checkpoints that lie in a folder, found and read."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from dask_nn.checkpoints.codec import decode
from dask_nn.checkpoints.manifest import Manifest, StoredFile
from dask_nn.checkpoints.retention import is_checkpoint, place
from dask_nn.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from dask_nn.checkpoints.options import Checkpoint
    from dask_nn.checkpoints.storage import Storage

__all__ = ["MANIFEST", "MODEL", "STATE", "WEIGHTS", "Catalog", "CheckpointContent", "reason_of"]

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
STATE = "state.safetensors"
# The model's tensors have a file of their own, which evaluate and predict can read.
WEIGHTS = "weights/"

logger = logging.getLogger("dask_nn.checkpoints")


@dataclass(frozen=True, kw_only=True)
class CheckpointContent:
    """A state to save, or one that was read.

    Parameters
    ----------
    tree : dict
        Nested state dicts, see :mod:`dask_nn.checkpoints.codec`; the model's under ``"weights"``.
    epoch, step, steps, configuration, history, record, run_id, generation, bitwise, canary
        See :class:`~dask_nn.checkpoints.manifest.Manifest`.
    path : str
        Where it was read.
    """

    tree: dict[str, Any]
    epoch: int
    step: int
    steps: int
    configuration: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    record: dict[str, float] = field(default_factory=dict)
    run_id: str = ""
    generation: int = 0
    bitwise: bool = True
    canary: dict[str, str] = field(default_factory=dict)
    path: str = ""

    @property
    def name(self) -> str:
        """The folder's name; in the order of the run."""
        return f"epoch-{self.epoch:04d}-step-{self.steps:09d}"


class Catalog:
    """Finds and reads checkpoints.

    Parameters
    ----------
    storage : Storage
        Where they are.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._complete: set[str] = set()

    def names(self, folders: Iterable[str] | None = None) -> list[str]:
        """Give the names of all checkpoints with a manifest, oldest first."""
        if folders is None:
            folders = self._storage.folders()
        found = [name for name in folders if is_checkpoint(name)]
        return sorted((n for n in found if self._storage.exists(n, MANIFEST)), key=place)

    def manifest(self, name: str) -> Manifest:
        """Read a manifest.

        Raises
        ------
        CheckpointError
            If it is missing or damaged.
        """
        return Manifest.from_bytes(self._read(name, MANIFEST))

    def find(self, name: str) -> Manifest | None:
        """Read a manifest that may be missing or damaged."""
        try:
            return self.manifest(name) if self._storage.exists(name, MANIFEST) else None
        except CheckpointError:
            return None

    def holds(self, name: str, manifest: Manifest) -> bool:
        """Tell whether the very same state lies there, whole."""
        if not self._storage.exists(name, MANIFEST):
            return False
        try:
            _, found = self.load(name)
        except CheckpointError:
            return False
        return found.configuration == manifest.configuration and found.files == manifest.files

    def has_all(self, folder: str, files: dict[str, StoredFile]) -> bool:
        """Tell whether files are there with the sizes that they shall have."""
        return all(self._storage.size(folder, name) == file.size for name, file in files.items())

    def is_complete(self, name: str) -> bool:
        """Tell whether a checkpoint has all its files; sums are left to those who read it."""
        if name not in self._complete:
            manifest = self.find(name)
            if manifest is not None and self.has_all(name, manifest.files):
                self._complete.add(name)
        return name in self._complete

    def best(self, options: Checkpoint, names: Iterable[str]) -> str | None:
        """Give the name of the best of some checkpoints; None if none has the entry."""
        found: tuple[str, float] | None = None
        for name in names:
            manifest = self.find(name)
            value = None if manifest is None else manifest.record.get(options.best or "")
            if value is None or math.isnan(value):  # nothing compares with NaN: it would stay
                continue
            if found is None or options.is_better(value, found[1]):
                found = (name, value)
        return None if found is None else found[0]

    def load_latest(
        self,
    ) -> tuple[CheckpointContent, Manifest, list[tuple[str, str]]] | None:
        """Read the newest checkpoint that is whole.

        Returns
        -------
        tuple or None
            Its content, its manifest, and for every newer one the path and why it cannot be used.
            None if there are no checkpoints.

        Raises
        ------
        CheckpointError
            If there are some, but none can be used.
        """
        skipped: list[tuple[str, str]] = []
        for name in reversed(self.names()):
            try:
                content, manifest = self.load(name)
            except CheckpointError as error:
                logger.warning("%s is passed over: %s", self._storage.path(name), error)
                skipped.append((self._storage.path(name), str(error)))
            else:
                return content, manifest, skipped
        if skipped:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in skipped)
            message = f"none of the checkpoints in {self._storage.url} can be used: {reasons}"
            raise CheckpointError(message)
        return None

    def load(self, name: str) -> tuple[CheckpointContent, Manifest]:
        """Read a checkpoint and verify it.

        Raises
        ------
        CheckpointError
            If it cannot be used; says why.
        """
        manifest = self.manifest(name)
        tensors: dict[str, torch.Tensor] = {}
        for file, stored in manifest.files.items():
            data = self._read(name, file)
            if len(data) != stored.size:
                message = f"{file} has {len(data)} bytes, {stored.size} were written"
                raise CheckpointError(message)
            if StoredFile.of(data) != stored:
                message = f"{file} was changed: its SHA-256 is another"
                raise CheckpointError(message)
            try:
                found = load_tensors(data)
            except SafetensorError as error:
                message = f"{file} is no safetensors file: {error}"
                raise CheckpointError(message) from error
            prefix = WEIGHTS if file == MODEL else ""
            tensors |= {f"{prefix}{key}": tensor for key, tensor in found.items()}
        content = CheckpointContent(
            tree=decode(manifest.state, tensors),
            epoch=manifest.epoch,
            step=manifest.step,
            steps=manifest.steps,
            configuration=manifest.configuration,
            history=manifest.history,
            record=manifest.record,
            run_id=manifest.run_id,
            generation=manifest.generation,
            bitwise=manifest.bitwise,
            canary=manifest.canary,
            path=self._storage.path(name),
        )
        return content, manifest

    def _read(self, folder: str, name: str) -> bytes:
        try:
            return self._storage.read(folder, name)
        except Exception as error:  # file systems raise errors of their own kinds
            message = f"{name} cannot be read: {reason_of(error)}"
            raise CheckpointError(message) from error


def reason_of(error: BaseException) -> str:
    """Say in a few words what went wrong."""
    text = getattr(error, "strerror", None) or str(error)
    return f"{text}" if text else type(error).__name__
