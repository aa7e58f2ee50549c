"""What a rank adds up over an epoch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dask_nn.training.snapshot import Snapshot
    from dask_nn.training.update import StepTotal

__all__ = ["EpochSums"]


class EpochSums:
    """Loss, samples and time of the steps of an epoch, the same on every rank but for the time.

    Parameters
    ----------
    start : Snapshot, optional
        What had been added up where the run goes on.
    """

    def __init__(self, start: Snapshot | None = None) -> None:
        self.restart()
        if start is not None:
            self._loss_sum, self._normalizer = start.loss_sum, start.normalizer
            self._samples = start.samples
            self._started -= start.seconds

    def restart(self) -> None:
        """Begin an epoch."""
        self._loss_sum = self._normalizer = 0.0
        self._samples = 0
        self._started = time.perf_counter()

    def add(self, total: StepTotal, samples: int) -> None:
        """Add a step with its number of rows."""
        self._loss_sum += total.loss
        self._normalizer += total.normalizer
        self._samples += samples

    @property
    def loss(self) -> float:
        """Mean loss so far; 0 if all weights were 0."""
        return self._loss_sum / self._normalizer if self._normalizer else 0.0

    def pace(self) -> dict[str, float]:
        """Give ``samples_per_s`` and ``seconds``, over all gangs of the epoch."""
        seconds = self._seconds()
        return {"samples_per_s": self._samples / seconds, "seconds": seconds}

    def as_fields(self) -> dict[str, Any]:
        """Give the fields of a snapshot that hold them."""
        return {
            "loss_sum": self._loss_sum,
            "normalizer": self._normalizer,
            "samples": self._samples,
            "seconds": self._seconds(),
        }

    def _seconds(self) -> float:
        return time.perf_counter() - self._started
