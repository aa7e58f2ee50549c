"""What is measured and what comes out, in a form that passes from process to process."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from dask_nn.examples.mnist.sequential import Digits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.networks import Network

__all__ = ["Measurement", "Task", "load_digits", "save_digits"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training, the same for every system.

    ``folder`` holds the digits, see :func:`save_digits`. The first of the ``epochs`` warms up and
    is not counted.
    """

    network: Network
    folder: Path
    epochs: int
    batch_size: int = 128
    lr: float = 0.01
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The counted epochs of a system, in seconds, and its mean loss in the last one."""

    epoch_s: tuple[float, ...]
    loss: float
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, ends_s: Sequence[float], loss: float, **details: Any) -> Self:
        """Measure epochs by the moments at which they ended.

        An epoch thus lasts from the end of the one before to its own end, whatever a system does
        in between; the first one warms up and is not counted.
        """
        epoch_s = tuple(end - start for start, end in pairwise(ends_s))
        return cls(epoch_s=epoch_s, loss=loss, details=details)

    @property
    def median_s(self) -> float:
        """Seconds of the median epoch."""
        return median(self.epoch_s)

    def joined(self, later: Self) -> Self:
        """Count a later round of the same system too."""
        return type(self)(
            epoch_s=self.epoch_s + later.epoch_s, loss=later.loss, details=later.details
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        return {"median_s": self.median_s, **asdict(self)}


def save_digits(folder: Path, digits: Digits, num_train: int, num_test: int) -> None:
    """Write the first images and labels where the systems' processes find them."""
    folder.mkdir()
    np.save(folder / "train_images.npy", digits.train_images[:num_train])
    np.save(folder / "train_labels.npy", digits.train_labels[:num_train])
    np.save(folder / "test_images.npy", digits.test_images[:num_test])
    np.save(folder / "test_labels.npy", digits.test_labels[:num_test])


def load_digits(folder: Path) -> Digits:
    """Read what :func:`save_digits` wrote."""
    return Digits(
        train_images=np.load(folder / "train_images.npy"),
        train_labels=np.load(folder / "train_labels.npy"),
        test_images=np.load(folder / "test_images.npy"),
        test_labels=np.load(folder / "test_labels.npy"),
    )
