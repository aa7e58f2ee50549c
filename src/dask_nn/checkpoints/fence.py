"""Who may write checkpoints into a folder: the newest gang of the newest run, and nobody else.

Every gang's rank 0 leaves its name in a small file beside the checkpoints when it starts. Whoever
finds another name there was given up meanwhile, or its run goes on elsewhere. That holds on shared
folders and on object stores, without locks, which die with nobody to release them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from dask_nn.checkpoints.awake import SleepWatch
from dask_nn.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dask_nn.checkpoints.storage import Storage

__all__ = ["CLAIM", "Claim", "Fence", "FenceError"]

CLAIM = ".dask-nn-writer"
# A process that slept waits so long before it writes: time for its successor to leave its name,
# and for itself to be closed.
AWAKE_S = 5.0


class FenceError(CheckpointError):
    """Somebody else writes here now.

    Parameters
    ----------
    message : str
        Who.
    by_own_run : bool
        Whether it is a newer gang of the same run.
    """

    def __init__(self, message: str, by_own_run: bool = False) -> None:
        super().__init__(message, by_own_run)
        self.by_own_run = by_own_run

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Who writes into a folder.

    Parameters
    ----------
    run_id : str
        The run.
    generation : int
        Its gang.
    term : int
        Counts the runs that wrote here.
    """

    run_id: str
    generation: int
    term: int = 0

    @classmethod
    def of(cls, data: bytes) -> Claim | None:
        """Read a claim; None if it is none."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None


class Fence:
    """Keeps a gang that was given up from writing checkpoints.

    Parameters
    ----------
    storage : Storage
        Where they are.
    run_id, generation
        The gang.
    """

    def __init__(self, storage: Storage, run_id: str, generation: int) -> None:
        self._storage = storage
        self._own = Claim(run_id=run_id, generation=generation)
        self._claimed = False
        self._watch = SleepWatch()

    def open(self) -> None:
        """Watch this process's sleep from here on."""
        self._watch.start()

    def close(self) -> None:
        """End the watch."""
        self._watch.close()

    def claim(self) -> None:
        """Leave this gang's name.

        Raises
        ------
        FenceError
            If a newer gang of the run has left its own.
        OSError
            If the storage fails; it is made up for before anything is written.
        """
        self._watch.stay_awake(AWAKE_S)
        found = self._read()
        if found is None:
            term = 1
        elif found.run_id == self._own.run_id:
            self._refuse_newer(found)
            term = found.term
        else:
            term = found.term + 1
        self._own = Claim(run_id=self._own.run_id, generation=self._own.generation, term=term)
        if found != self._own:
            self._storage.write("", CLAIM, json.dumps(asdict(self._own)).encode())
        self._claimed = True

    def enter(self) -> None:
        """Check that this gang may begin to write.

        Raises
        ------
        FenceError
            If somebody else writes here now.
        """
        self._watch.stay_awake(AWAKE_S)
        self._check()

    def leave(self, is_newest: Callable[[], bool]) -> None:
        """Check that what was begun may take its place.

        What a gang had begun before its successor came is worth its place, unless there is
        something newer already, or this process slept over it.

        Parameters
        ----------
        is_newest : callable
            Tells whether nothing as new is there yet.

        Raises
        ------
        FenceError
            If it may not.
        """
        try:
            self._check()
        except FenceError as error:
            slept = self._watch.awake_s() < float("inf")
            if slept or not error.by_own_run or not is_newest():
                raise

    def holds(self) -> bool:
        """Tell whether this gang still is the one that writes here."""
        try:
            self._check()
        except FenceError:
            return False
        return True

    def _check(self) -> None:
        found = self._read()
        if found == self._own and self._claimed:
            return
        if found is None or not self._claimed or found.term < self._own.term:
            self.claim()  # it failed before, or the folder was emptied
            return
        if found.run_id != self._own.run_id:
            message = f"another run ({found.run_id}) writes there now"
            raise FenceError(message)
        self._refuse_newer(found)
        self.claim()  # an older gang, which woke up between its look and its claim

    def _refuse_newer(self, found: Claim) -> None:
        if found.generation > self._own.generation:
            message = (
                f"gang {found.generation} of this run writes there now, gang "
                f"{self._own.generation} was given up"
            )
            raise FenceError(message, by_own_run=True)

    def _read(self) -> Claim | None:
        try:
            return Claim.of(self._storage.read("", CLAIM))
        except FileNotFoundError:
            return None
