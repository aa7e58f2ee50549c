"""Where a run is saved, and how often."""

from __future__ import annotations

import numbers
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from dask.utils import parse_timedelta

from dask_nn.errors import ConfigurationError

__all__ = ["Checkpoint"]

BEST_MODES = ("auto", "min", "max")
EXPECTED_EVERY = (
    "'epoch', a number of steps, or a time such as '10 minutes' or a datetime.timedelta"
)


@dataclass(frozen=True)
class Checkpoint:
    """Save a run now and then, so that it can go on from there.

    Every checkpoint is a folder ``epoch-0002-step-000000938`` below `url`, with the weights
    (``model.safetensors``), all other tensors of the state (``state.safetensors``) and
    ``manifest.json``, which is written last and holds the SHA-256 of both. Loading runs no pickle.

    Parameters
    ----------
    url : str or path-like
        A folder, or a URL that fsspec understands (such as ``s3://bucket/run`` with s3fs).
    every : "epoch", int, str or timedelta, default "epoch"
        Save after every epoch, after so many steps, or after so much time (``"10 minutes"``).
    keep : int or None, default 3
        Checkpoints that stay, the newest ones; all of them if None.
    best : str, optional
        Keep the best checkpoint too, by this entry of the history, such as ``"val_loss"``. Needs
        ``every="epoch"``.
    best_mode : {"auto", "min", "max"}
        Whether small or large is good; "auto" takes losses and errors as better when smaller.
    before_walltime_s : float, optional
        Save also when a job's time is about to end: so many seconds before the end that Slurm
        names in ``SLURM_JOB_END_TIME`` on a rank's worker, or that the script of a job of
        :func:`dask_nn.cluster` names in ``DASK_NN_JOB_END_TIME``, in seconds since 1970. Workers
        that are asked to close (as on SIGTERM) save in any case.

    Raises
    ------
    ConfigurationError
        If a value cannot work.
    """

    url: str | os.PathLike[str]
    every: int | str | timedelta = "epoch"
    keep: int | None = 3
    best: str | None = None
    best_mode: Literal["auto", "min", "max"] = "auto"
    before_walltime_s: float | None = None

    def __post_init__(self) -> None:
        url: Any = self.url
        if not isinstance(url, str | os.PathLike) or not os.fspath(url):
            message = f"checkpoint must be a path, a URL or a Checkpoint(...), got {url!r}"
            raise ConfigurationError(message)
        object.__setattr__(self, "url", _whole_url(os.fspath(url)))
        self._check_every()
        if self.keep is not None and not _is_count(self.keep):
            message = f"keep must be a positive integer or None, got {self.keep!r}"
            raise ConfigurationError(message)
        best: Any = self.best
        if best is not None and not (isinstance(best, str) and best):
            message = f"best must be the name of an entry of the history, got {best!r}"
            raise ConfigurationError(message)
        if self.best is not None and self.every != "epoch":
            message = f"best= compares whole epochs and needs every='epoch', got {self.every!r}"
            raise ConfigurationError(message)
        if self.best_mode not in BEST_MODES:
            message = f"best_mode must be 'auto', 'min' or 'max', got {self.best_mode!r}"
            raise ConfigurationError(message)
        seconds = self.before_walltime_s
        if seconds is not None and not (isinstance(seconds, numbers.Real) and seconds > 0):
            message = f"before_walltime_s must be a positive number, got {seconds!r}"
            raise ConfigurationError(message)

    def _check_every(self) -> None:
        if self.every == "epoch" or _is_count(self.every):
            return
        if isinstance(self.every, timedelta):
            seconds = self.every.total_seconds()
        else:
            try:
                if not isinstance(self.every, str):
                    raise TypeError  # noqa: TRY301
                # Without a unit it could as well be meant as steps.
                if self.every.strip().replace(".", "").isdigit():
                    raise ValueError  # noqa: TRY301
                seconds = float(parse_timedelta(self.every))
            except (ValueError, TypeError, KeyError):
                message = f"every must be {EXPECTED_EVERY}, got {self.every!r}"
                raise ConfigurationError(message) from None
        if not seconds > 0:
            message = f"every must be a positive time, got {self.every!r}"
            raise ConfigurationError(message)
        object.__setattr__(self, "every", timedelta(seconds=seconds))

    @classmethod
    def of(cls, value: Any) -> Checkpoint | None:
        """Take a Checkpoint as it is, a path or URL as one with default values.

        Raises
        ------
        ConfigurationError
            If it is neither, nor None.
        """
        return value if value is None or isinstance(value, cls) else cls(value)

    def due(self, steps: int, seconds: float, epoch_ended: bool) -> bool:
        """Tell whether to save: so many steps and seconds after the last checkpoint."""
        if self.every == "epoch":
            return epoch_ended
        if isinstance(self.every, timedelta):
            return seconds >= self.every.total_seconds()
        return isinstance(self.every, int) and steps >= self.every

    def save_at(self) -> float | None:
        """Give the time, by ``time.time()``, at which this process's job is about to end."""
        if self.before_walltime_s is None:
            return None
        for name in ("SLURM_JOB_END_TIME", "DASK_NN_JOB_END_TIME"):
            end = os.environ.get(name, "")
            if end.isdecimal():
                return float(end) - self.before_walltime_s
        return None

    def is_better(self, value: float, than: float) -> bool:
        """Compare two values of the `best` entry."""
        return value > than if self._larger_is_better else value < than

    @property
    def _larger_is_better(self) -> bool:
        if self.best_mode != "auto":
            return self.best_mode == "max"
        name = self.best or ""
        words = ("loss", "error", "perplexity", "seconds", "mse", "mae")
        return not any(word in name for word in words)


def _whole_url(url: str) -> str:
    """Make a path absolute: workers may run in another folder than the client."""
    if "://" in url or "::" in url:
        return url
    return os.path.abspath(os.path.expanduser(url))  # noqa: PTH100, PTH111  (text in, text out)


def _is_count(value: Any) -> bool:
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return integral and value > 0
