"""Checkpoints of one run: written in the background, kept, found again."""

from __future__ import annotations

import functools
import logging
import platform
import time
import uuid
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from dask_nn import faults
from dask_nn.checkpoints.background import BackgroundWriter
from dask_nn.checkpoints.catalog import (
    MANIFEST,
    MODEL,
    STATE,
    WEIGHTS,
    Catalog,
    CheckpointContent,
    reason_of,
)
from dask_nn.checkpoints.codec import encode
from dask_nn.checkpoints.fence import Fence, FenceError
from dask_nn.checkpoints.manifest import Manifest, StoredFile
from dask_nn.checkpoints.retention import leftovers, place, retired
from dask_nn.checkpoints.serialization import weights_to_bytes
from dask_nn.checkpoints.storage import Storage
from dask_nn.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from dask_nn.checkpoints.options import Checkpoint

__all__ = ["CheckpointContent", "CheckpointManager"]

PACKAGES = ("dask-nn", "torch", "numpy", "dask", "distributed", "safetensors")
# A folder that another run left unfinished is removed when it is so much older than what was just
# written, by the storage's own clock: somebody may be at work on it.
ABANDONED_S = 3600.0

logger = logging.getLogger("dask_nn.checkpoints")


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
        self._catalog = Catalog(self._storage)
        self._writer = BackgroundWriter(self._write_or_warn)
        self._fence: Fence | None = None
        self._began: tuple[int, int] | None = None
        self._written: set[str] = set()

    # Writing

    def claim(self, run_id: str, generation: int, began: tuple[int, int]) -> None:
        """Become the one that writes here: what an older gang writes from now on does not count.

        Parameters
        ----------
        run_id, generation
            The gang.
        began : tuple of int
            Epoch and steps from which it goes on. Checkpoints that lie further on were passed
            over, because they are damaged.
        """
        self._began = began
        fence = self._fence = Fence(self._storage, run_id, generation)

        def claim() -> None:
            fence.open()
            try:
                fence.claim()
            except Exception as error:  # before anything is written it is tried again
                logger.warning("%s: %s", self._storage.url, reason_of(error))

        self._writer.begin(claim, fence.close)

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
            message = f"checkpoints cannot be written to {self._storage.url}: {reason_of(error)}"
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
        except FenceError as error:
            logger.warning("%s is not written: %s", self._path(content), error)
            name = "checkpoint-skipped" if error.by_own_run else "checkpoint-failed"
            self._tell(name, content, reason=str(error))
            return
        except Exception as error:  # each file system has errors of its own
            logger.warning("%s was not written: %s", self._path(content), reason_of(error))
            self._tell("checkpoint-failed", content, reason=reason_of(error))
            return
        self._tell("checkpoint", content, seconds=time.perf_counter() - started)
        try:
            if self._fence is None or self._fence.holds():
                self._retire(content)
        except Exception as error:
            logger.warning("old checkpoints could not be removed: %s", reason_of(error))

    def _write(self, content: CheckpointContent) -> None:
        manifest, files = _files(content)
        folder = content.name
        if self._fence is not None:
            self._fence.enter()
        if self._catalog.holds(folder, manifest):  # a run that lost time comes by again
            self._written.add(folder)
            return
        self._refuse_newer(folder, manifest)
        written = self._storage.begin(folder, f"{content.run_id}-{content.generation}")
        try:
            # Without a manifest it counts as none, until all of it is there.
            self._storage.remove(written, MANIFEST)
            for name, data in files.items():
                self._storage.write(written, name, data)
                if faults.hook is not None:
                    faults.hook("writing a checkpoint", {"step": content.steps})
            self._check_written(written, manifest)
            if self._fence is not None:
                self._fence.leave(lambda: self._is_newest(content))
            self._storage.write(written, MANIFEST, manifest.to_bytes())
            self._put_in_place(written, folder, manifest)
        except Exception:
            if written != folder:  # another may be writing in the same place
                with suppress(Exception):  # what went wrong first says more
                    self._storage.remove(written)
            if self._fence is not None:
                self._fence.enter()  # who took its place may have removed its files
            raise
        self._written.add(folder)

    def _put_in_place(self, written: str, folder: str, manifest: Manifest) -> None:
        try:
            self._storage.commit(written, folder)
        except FileExistsError:
            # A rank that was given up may write what its successor has written meanwhile.
            if self._catalog.holds(folder, manifest):
                self._storage.remove(written)
                return
            self._refuse_newer(folder, manifest)
            self._remove(folder)
            self._storage.commit(written, folder)

    def _check_written(self, written: str, manifest: Manifest) -> None:
        """Check that nobody took away what was written, before the manifest vouches for it."""
        if not self._catalog.has_all(written, manifest.files):
            message = "somebody removed what was written before it was whole"
            raise CheckpointError(message)

    def _refuse_newer(self, folder: str, manifest: Manifest) -> None:
        """Leave what a newer gang of this run has written as it is."""
        found = self._catalog.find(folder)
        if (
            found is not None
            and found.run_id == manifest.run_id
            and found.generation > manifest.generation
            and self._catalog.has_all(folder, found.files)
        ):
            message = f"gang {found.generation} of this run has written it already"
            raise FenceError(message, by_own_run=True)

    def _is_newest(self, content: CheckpointContent) -> bool:
        mine = place(content.name)
        return all(place(name) < mine for name in self.names() if self._catalog.is_complete(name))

    def _retire(self, content: CheckpointContent) -> None:
        """Remove what need not be kept, and what was begun before that and never finished."""
        written = content.name
        folders = self._storage.folders()
        names = self._catalog.names(folders)
        for leftover in leftovers(
            folders,
            names,
            written=written,
            run_id=content.run_id,
            generation=content.generation,
            in_place=not self._storage.renames,
        ):
            if not leftover.by_age or self._is_abandoned(leftover.name, written):
                self._storage.remove(leftover.name)
        if self._options.keep is None:
            return
        counted = [name for name in names if self._counts(name)]
        best = None
        if self._options.best is not None:
            best = self._catalog.best(self._options, counted)
        for name in retired(
            names, written=written, counted=counted, keep=self._options.keep, best=best
        ):
            self._remove(name)

    def _counts(self, name: str) -> bool:
        """Tell whether the run could go on from a checkpoint, without reading all of it."""
        if name in self._written:
            return True
        passed_over = self._began is not None and place(name) > self._began
        return not passed_over and self._catalog.is_complete(name)

    def _is_abandoned(self, folder: str, written: str) -> bool:
        now = self._storage.changed(written, MANIFEST)
        then = self._storage.changed(folder)
        return now is not None and then is not None and now - then > ABANDONED_S

    def _remove(self, name: str) -> None:
        # The manifest first: what remains after an interruption counts as none.
        self._storage.remove(name, MANIFEST)
        self._storage.remove(name)

    # Reading

    def names(self) -> list[str]:
        """Give the names of all checkpoints with a manifest, oldest first."""
        return self._catalog.names()

    def load_latest(
        self,
    ) -> tuple[CheckpointContent, Manifest, list[tuple[str, str]]] | None:
        """Read the newest checkpoint that is whole; see `Catalog.load_latest`."""
        return self._catalog.load_latest()

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


def _files(content: CheckpointContent) -> tuple[Manifest, dict[str, bytes]]:
    """Give a checkpoint's manifest and the bytes of its other files."""
    tensors: dict[str, torch.Tensor] = {}
    state = encode(content.tree, tensors)
    weights = {name[len(WEIGHTS) :]: t for name, t in tensors.items() if name.startswith(WEIGHTS)}
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
        bitwise=content.bitwise,
        canary=content.canary,
    )
    return manifest, files


@functools.cache
def _versions() -> dict[str, str]:
    """Look up the versions of packages once: it takes milliseconds."""
    versions = {package: version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **versions}
