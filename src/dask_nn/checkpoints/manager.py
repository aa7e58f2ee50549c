"""Checkpoints of one run: written in the background, kept, found again."""

from __future__ import annotations

import functools
import logging
import math
import platform
import re
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from dask_nn import faults
from dask_nn.checkpoints.background import BackgroundWriter
from dask_nn.checkpoints.codec import decode, encode
from dask_nn.checkpoints.manifest import Manifest, StoredFile
from dask_nn.checkpoints.serialization import weights_to_bytes
from dask_nn.checkpoints.storage import Storage
from dask_nn.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from dask_nn.checkpoints.options import Checkpoint

__all__ = ["CheckpointContent", "CheckpointManager"]

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
STATE = "state.safetensors"
# The model's tensors have a file of their own, which evaluate and predict can read.
WEIGHTS = "weights/"
NAME = re.compile(r"epoch-\d{4,}-step-\d{9,}")
# A folder that is being written, or one that never got its manifest.
UNFINISHED = re.compile(rf"\.?({NAME.pattern})(?:\.[0-9a-f]+)?")
NUMBER = re.compile(r"\d+")
PACKAGES = ("dask-nn", "torch", "numpy", "dask", "distributed", "safetensors")

logger = logging.getLogger("dask_nn.checkpoints")


@dataclass(frozen=True, kw_only=True)
class CheckpointContent:
    """A state to save, or one that was read.

    Parameters
    ----------
    tree : dict
        Nested state dicts, see :mod:`dask_nn.checkpoints.codec`; the model's under ``"weights"``.
    epoch, step, steps, configuration, history, record, run_id, generation
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
    path: str = ""

    @property
    def name(self) -> str:
        """The folder's name; in the order of the run."""
        return f"epoch-{self.epoch:04d}-step-{self.steps:09d}"


class CheckpointManager:
    """Writes and reads the checkpoints of one run.

    Parameters
    ----------
    options : Checkpoint
        Where they are and which of them stay.
    on_event : callable, optional
        Told ``"checkpoint"``, ``"checkpoint-skipped"`` and ``"checkpoint-failed"``, with details.

    Raises
    ------
    CheckpointError
        If the URL's kind is not known.
    """

    def __init__(
        self,
        options: Checkpoint,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> None:
        self._options = options
        self._on_event = on_event
        self._storage = Storage(str(options.url))
        self._writer = BackgroundWriter(self._write_or_warn)

    # Writing

    def save(self, content: CheckpointContent) -> None:
        """Write a checkpoint in the background.

        If the one before has not even begun when the next is ready, only the newer is written.
        """
        skipped = self._writer.put(content)
        if skipped is not None:
            self._tell("checkpoint-skipped", skipped, reason="the storage is slower than the run")

    def wait(self, timeout_s: float) -> bool:
        """Wait until everything is written; tell whether it is."""
        return self._writer.wait(timeout_s)

    def give_up(self, reason: str) -> None:
        """Tell that what is not written yet is not waited for any longer."""
        unwritten = self._writer.unwritten
        if unwritten is not None:
            logger.warning("%s is not written yet: %s", self._path(unwritten), reason)
            self._tell("checkpoint-failed", unwritten, reason=reason)

    def close(self) -> None:
        """Take nothing more; what is under way is written to its end, as far as time allows."""
        self._writer.close()

    @contextmanager
    def probe(self) -> Iterator[str]:
        """Write and read a small file, and give its name until it is removed again.

        Raises
        ------
        CheckpointError
            If that fails; names the folder.
        """
        name, probe = f".dask-nn-{uuid.uuid4().hex[:8]}", b"dask-nn"
        try:
            self._storage.write("", name, probe)
            found = self._storage.read("", name)
        except Exception as error:  # file systems raise errors of their own kinds
            message = f"checkpoints cannot be written to {self._storage.url}: {_reason(error)}"
            raise CheckpointError(message) from error
        if found != probe:
            message = f"{self._storage.url} does not give back what is written to it"
            raise CheckpointError(message)
        try:
            yield name
        finally:
            with suppress(Exception):  # who can write a file can as well leave it
                self._storage.remove("", name)

    def has_probe(self, name: str) -> bool:
        """Tell whether a file of `probe` can be seen from here."""
        return self._storage.exists("", name)

    def _write_or_warn(self, content: CheckpointContent) -> None:
        """Write; training goes on whatever happens here."""
        started = time.perf_counter()
        try:
            self._write(content)
        except Exception as error:  # each file system has errors of its own
            logger.warning("%s could not be written: %s", self._path(content), _reason(error))
            self._tell("checkpoint-failed", content, reason=_reason(error))
            return
        self._tell("checkpoint", content, seconds=time.perf_counter() - started)
        try:
            self._retire()
        except Exception as error:
            logger.warning("old checkpoints could not be removed: %s", _reason(error))

    def _write(self, content: CheckpointContent) -> None:
        tensors: dict[str, torch.Tensor] = {}
        state = encode(content.tree, tensors)
        weights = {
            name[len(WEIGHTS) :]: t for name, t in tensors.items() if name.startswith(WEIGHTS)
        }
        others = {name: t for name, t in tensors.items() if not name.startswith(WEIGHTS)}
        files = {MODEL: weights_to_bytes(weights)}
        if others:
            files[STATE] = weights_to_bytes(others)
        manifest = Manifest(
            epoch=content.epoch,
            step=content.step,
            steps=content.steps,
            run_id=content.run_id,
            generation=content.generation,
            configuration=content.configuration,
            history=content.history,
            record=content.record,
            state=state,
            files={name: StoredFile.of(data) for name, data in files.items()},
            packages=_versions(),
        )
        folder = content.name
        if self._holds(folder, manifest):
            return
        written = self._storage.begin(folder)
        try:
            # Without a manifest it counts as none, until all of it is there.
            self._storage.remove(written, MANIFEST)
            for name, data in files.items():
                self._storage.write(written, name, data)
                if faults.hook is not None:
                    faults.hook("writing a checkpoint", {"step": content.steps})
            self._storage.write(written, MANIFEST, manifest.to_bytes())
            self._put_in_place(written, folder, manifest)
        except Exception:
            with suppress(Exception):  # what went wrong first says more
                if not self._storage.exists(written, MANIFEST) or written != folder:
                    self._storage.remove(written)
            raise

    def _put_in_place(self, written: str, folder: str, manifest: Manifest) -> None:
        try:
            self._storage.commit(written, folder)
        except FileExistsError:
            # A rank that was given up may write what its successor has written meanwhile.
            if self._holds(folder, manifest):
                self._storage.remove(written)
                return
            self._remove(folder)
            self._storage.commit(written, folder)

    def _holds(self, folder: str, manifest: Manifest) -> bool:
        """Tell whether the very same state lies there: a run that lost time comes by again."""
        if not self._storage.exists(folder, MANIFEST):
            return False
        try:
            _, found = self._load(folder)
        except CheckpointError:
            return False
        return found.configuration == manifest.configuration and found.files == manifest.files

    def _retire(self) -> None:
        """Remove what need not be kept, and what was begun before that and never finished."""
        folders = self._storage.folders()
        names = self._whole(folders)
        for name in folders:
            whole = UNFINISHED.fullmatch(name)
            if name not in names and whole and names and _place(whole[1]) < _place(names[-1]):
                self._storage.remove(name)
        if self._options.keep is None:
            return
        keep = set(names[-self._options.keep :])
        best = self.best() if self._options.best is not None else None
        for name in names:
            if name not in keep and name != best:
                self._remove(name)

    def _remove(self, name: str) -> None:
        # The manifest first: what remains after an interruption counts as none.
        self._storage.remove(name, MANIFEST)
        self._storage.remove(name)

    # Reading

    def names(self) -> list[str]:
        """Give the names of all checkpoints with a manifest, oldest first."""
        return self._whole(self._storage.folders())

    def _whole(self, folders: list[str]) -> list[str]:
        names = (name for name in folders if NAME.fullmatch(name))
        found = [name for name in names if self._storage.exists(name, MANIFEST)]
        return sorted(found, key=_place)

    def best(self) -> str | None:
        """Give the name of the best checkpoint by ``Checkpoint.best``; None if none has it."""
        entry = self._options.best
        found: tuple[str, float] | None = None
        for name in self.names():
            try:
                record = self._manifest(name).record
            except CheckpointError:
                continue
            value = record.get(entry or "")
            if value is None or math.isnan(value):  # nothing compares with NaN: it would stay
                continue
            if found is None or self._options.is_better(value, found[1]):
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
                content, manifest = self._load(name)
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

    def _manifest(self, name: str) -> Manifest:
        return Manifest.from_bytes(self._read(name, MANIFEST))

    def _load(self, name: str) -> tuple[CheckpointContent, Manifest]:
        manifest = self._manifest(name)
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
            path=self._storage.path(name),
        )
        return content, manifest

    def _read(self, folder: str, name: str) -> bytes:
        try:
            return self._storage.read(folder, name)
        except Exception as error:  # file systems raise errors of their own kinds
            message = f"{name} cannot be read: {_reason(error)}"
            raise CheckpointError(message) from error

    def _path(self, content: CheckpointContent) -> str:
        return self._storage.path(content.name)

    def _tell(self, event: str, content: CheckpointContent, **details: Any) -> None:
        if self._on_event is not None:
            self._on_event(
                event,
                {
                    "path": self._path(content),
                    "epoch": content.epoch,
                    "steps": content.steps,
                    **details,
                },
            )


def _place(name: str) -> list[int]:
    """Give the numbers in a name: epoch 10000 comes after epoch 9999."""
    return [int(part) for part in NUMBER.findall(name)]


@functools.cache
def _versions() -> dict[str, str]:
    """Look up the versions of packages once: it takes milliseconds."""
    versions = {package: version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **versions}


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return f"{text}" if text else type(error).__name__
