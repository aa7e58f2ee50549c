"""What is asked of a cluster, whatever starts it."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from dask.utils import parse_bytes
from distributed import Security

from dask_nn.clusters.option_types import TEXTS, check_types, lines
from dask_nn.errors import ConfigurationError

__all__ = ["ClusterRequest"]

START_TIMEOUT_S = 600.0
# Machines that nobody uses any more end themselves: those of a client that died.
IDLE_TIMEOUT = "3600s"
DEATH_TIMEOUT = "300s"


@dataclass(frozen=True, kw_only=True)
class ClusterRequest:
    """A cluster to start: equal words for every kind.

    Parameters
    ----------
    kind : str
        ``"local"``, ``"slurm"``, ...
    workers : int or None
        Workers to start and to keep; as the kind sees fit where None.
    adapt : (int, int) or None
        Smallest and largest number of workers instead, between which Dask chooses by the load.
    cores : int
        Threads of each worker.
    memory : str or None
        Memory of each worker, such as ``"16 GB"``; as the kind sees fit where None.
    walltime : str or None
        How long a batch job may run, in the batch system's own format.
    gpus : int
        GPUs of each worker: 0 or 1, because a rank uses one.
    security : distributed.Security, bool or None
        TLS for everything that Dask sends; True makes certificates that live as long as the
        cluster.
    env : mapping of str to str
        Environment variables of the workers.
    preload : str or sequence of str
        Modules that the workers import before they take work.
    start_timeout_s : float or None
        How long to wait for the workers, in seconds; see `timeout_s`.
    options : mapping of str to object
        Keyword arguments of the library that starts the cluster, handed on as they are.

    Raises
    ------
    ConfigurationError
        If a value cannot work.
    """

    kind: str
    workers: int | None = None
    adapt: tuple[int, int] | None = None
    cores: int = 1
    memory: str | None = None
    walltime: str | None = None
    gpus: int = 0
    security: Security | bool | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    preload: str | Sequence[str] = ("torch",)
    start_timeout_s: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workers is not None:
            _check_count("workers", self.workers)
        _check_count("cores", self.cores)
        self._check_adapt()
        if isinstance(self.gpus, bool) or self.gpus not in (0, 1):
            raise ConfigurationError(
                f"gpus must be 0 or 1, got {self.gpus!r}: a worker runs one rank, and a rank uses "
                "one GPU; ask for more workers instead"
            )
        _check_memory(self.memory)
        walltime: Any = self.walltime
        if walltime is not None and not (isinstance(walltime, str) and walltime):
            raise ConfigurationError(
                f'walltime must be a text such as "02:00:00", got {self.walltime!r}'
            )
        if not isinstance(self.security, Security | bool | None):
            raise ConfigurationError(
                "security must be a distributed.Security, or True for temporary certificates, got "
                f"{self.security!r}"
            )
        _check_environment(self.env)
        for name in self.options:
            if name in {each.name for each in fields(self)}:
                raise ConfigurationError(
                    f"{name} is an argument of the cluster itself, not one of its options"
                )
        seconds: Any = self.start_timeout_s
        if seconds is not None and not (_is_number(seconds) and seconds > 0):
            raise ConfigurationError(f"start_timeout_s must be a positive number, got {seconds!r}")
        check_types({"preload": self.preload}, {"preload": TEXTS})
        object.__setattr__(self, "preload", tuple(lines(self.preload)))

    def _check_adapt(self) -> None:
        adapt: Any = self.adapt
        if adapt is None:
            return
        if self.workers is not None:
            raise ConfigurationError(
                f"workers={self.workers} is a fixed number and adapt={adapt!r} a range: give either"
            )
        if not (isinstance(adapt, tuple | list) and len(adapt) == 2):
            raise ConfigurationError(
                f"adapt must be the smallest and the largest number of workers, got {adapt!r}"
            )
        for name, count in zip(("minimum", "maximum"), adapt, strict=True):
            _check_count(f"adapt's {name}", count)
        if adapt[0] > adapt[1]:
            raise ConfigurationError(
                f"adapt's minimum must not be above its maximum, got {adapt!r}"
            )
        object.__setattr__(self, "adapt", tuple(adapt))

    @property
    def wanted(self) -> int | None:
        """Workers to wait for: all of a fixed number, the minimum of a range."""
        return self.adapt[0] if self.adapt else self.workers

    @property
    def timeout_s(self) -> float:
        """How long to wait for the workers, in seconds: as was asked for, or 600."""
        return START_TIMEOUT_S if self.start_timeout_s is None else self.start_timeout_s

    def with_certificates(self) -> ClusterRequest:
        """Make what ``security=True`` asks for; afterwards it is a Security or None.

        Raises
        ------
        ConfigurationError
            If the package that makes certificates is missing.
        """
        if self.security is not True:
            return replace(self, security=self.security or None)
        try:
            return replace(self, security=Security.temporary())
        except ImportError as error:
            raise ConfigurationError(
                "security=True makes certificates with the package cryptography, which is missing; "
                "install it (pip install cryptography), or give a distributed.Security with your "
                "own certificates"
            ) from error


def _check_count(name: str, count: Any) -> None:
    integral = isinstance(count, numbers.Integral) and not isinstance(count, bool)
    if not integral:
        raise ConfigurationError(f"{name} must be a whole number, got {count!r}")
    if count < 1:
        raise ConfigurationError(f"{name} must be at least 1, got {count}")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_memory(memory: Any) -> None:
    try:
        if memory is not None and not (isinstance(memory, str) and parse_bytes(memory) > 0):
            raise ValueError  # noqa: TRY301
    except (ValueError, OverflowError):
        raise ConfigurationError(
            f'memory must be a size with its unit, such as "16 GB", got {memory!r}'
        ) from None


def _check_environment(env: Any) -> None:
    pairs = env.items() if isinstance(env, Mapping) else [(None, None)]
    for name, value in pairs:
        if not (isinstance(name, str) and name.isidentifier() and isinstance(value, str)):
            raise ConfigurationError(
                'env must map names of variables to texts, such as {"OMP_NUM_THREADS": "1"}, got '
                f"{env!r}"
            )
