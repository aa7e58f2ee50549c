"""Breaking a run on purpose, with real signals to real worker processes, and a ledger of its steps.

Everything here acts on the workers of one client's cluster and on nothing else.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask_nn import faults
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distributed import Client

__all__ = [
    "Fault",
    "Ledger",
    "clear_faults",
    "fail_at",
    "install",
    "pretend_cores",
    "record_steps",
    "slow_steps",
]

ACTIONS = ("kill", "stop", "sleep", "compute", "raise", "memory", "ENOSPC", "EIO")
MEMORY_STEP_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong, once in the whole cluster.

    Parameters
    ----------
    point : str
        One of :data:`dask_nn.faults.POINTS`.
    rank : int or None
        The rank that it happens to; any if None.
    step : int or None
        The step of the run (from 0), or the first one after it at which the point is passed; any
        if None.
    action : str
        ``"kill"`` (SIGKILL), ``"stop"`` (SIGSTOP), ``"sleep"``, ``"compute"`` (looks at nothing
        meanwhile), ``"raise"`` (a RuntimeError),
        ``"memory"`` (takes more and more, until somebody ends the process), ``"ENOSPC"`` or
        ``"EIO"`` (an OSError of that kind).
    seconds : float
        How long ``"sleep"`` and ``"compute"`` take.
    every_time : bool
        Whether it goes wrong every time and everywhere the point is passed, not once.
    """

    point: str
    rank: int | None = None
    step: int | None = None
    action: str = "kill"
    seconds: float = 0.0
    every_time: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("point", self.point, faults.POINTS),
            ("action", self.action, ACTIONS),
        ):
            if value not in known:
                message = f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}"
                raise ConfigurationError(message)

    def matches(self, point: str, place: dict[str, Any]) -> bool:
        """Tell whether this is the place."""
        return (
            point == self.point
            and (self.rank is None or place.get("rank") == self.rank)
            and (self.step is None or place.get("step", -1) >= self.step)
        )


def fail_at(
    client: Client,
    rank: int | None,
    step: int | None,
    point: str,
    *,
    folder: str | os.PathLike[str],
    **options: Any,
) -> Path:
    """Make something go wrong at one place of the next run.

    Parameters
    ----------
    client : Client
        Of a cluster on this machine, made for the purpose.
    rank, step, point
        Where; see :class:`Fault`.
    folder : path-like
        Where the fault notes that it happened; workers must see it.
    **options
        More of :class:`Fault`.

    Returns
    -------
    pathlib.Path
        A file that holds the moment (``time.time()``) once it has happened.
    """
    fault = Fault(point=point, rank=rank, step=step, **options)
    return install(client, [fault], Path(folder))[0]


def slow_steps(seconds: float) -> Fault:
    """Make every step take so much longer, so that what a test does in between is not late."""
    return Fault(point="applied", action="sleep", seconds=seconds, every_time=True)


def install(client: Client, planned: Sequence[Fault], folder: Path) -> list[Path]:
    """Install several faults in all worker processes, and in those that will join."""
    from distributed import WorkerPlugin

    marks = [folder / f"fault-{os.getpid()}-{time.time_ns()}-{n}" for n in range(len(planned))]
    pairs = list(zip(planned, map(str, marks), strict=True))

    class FaultPlugin(WorkerPlugin):
        name = "dask-nn-faults"

        def setup(self, worker: Any) -> None:
            del worker
            arm(pairs)

        def teardown(self, worker: Any) -> None:
            # The ranks of a worker that closes are still to be broken, or to be recorded.
            if worker.status.name == "running":
                disarm()

    client.register_plugin(FaultPlugin())
    return marks


def clear_faults(client: Client, *, ledger: bool = True) -> None:
    """Take the faults out of the workers again, and the ledger too unless it is to go on."""
    for name in ("dask-nn-faults", "dask-nn-ledger") if ledger else ("dask-nn-faults",):
        try:
            client.unregister_worker_plugin(name)
        except ValueError:
            continue
    client.run(disarm, ledger=ledger)


# By what they are for: "faults" and "ledger".
_hooks: dict[str, Any] = {}


def arm(pairs: Sequence[tuple[Fault, str]]) -> None:
    """Set the hook of this process."""

    def hook(point: str, place: dict[str, Any]) -> None:
        for fault, mark in pairs:
            if fault.matches(point, place) and (fault.every_time or _claim(mark)):
                _break(fault)

    _set("faults", hook)


def disarm(*, ledger: bool = False) -> None:
    """Take the faults of this process away, and the ledger too if wanted."""
    _set("faults", None)
    if ledger:
        _set("ledger", None)


def _set(purpose: str, hook: Any) -> None:
    _hooks[purpose] = hook
    hooks = tuple(each for each in _hooks.values() if each is not None)

    def call_all(point: str, place: dict[str, Any]) -> None:
        for each in hooks:
            each(point, place)

    faults.hook = call_all if hooks else None


def _claim(mark: str) -> bool:
    """Let a fault happen once in all processes: who makes the file may."""
    try:
        handle = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    os.write(handle, repr(time.time()).encode())
    os.close(handle)
    return True


def _break(fault: Fault) -> None:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(fault.seconds)
        case "compute":
            deadline = time.monotonic() + fault.seconds
            while time.monotonic() < deadline:
                pass
        case "memory":
            taken = []
            while True:
                taken.append(b"\1" * MEMORY_STEP_BYTES)
                time.sleep(0.1)
        case "raise":
            message = f"broken on purpose at {fault.point!r}"
            raise RuntimeError(message)
        case kind:
            raise OSError(getattr(errno, kind), f"broken on purpose at {fault.point!r}")


def pretend_cores(client: Client, cores: int) -> None:
    """Make all workers say that their host has so many cores, so that more ranks than cores run."""
    from distributed import WorkerPlugin

    class CoresPlugin(WorkerPlugin):
        name = "dask-nn-cores"

        def setup(self, worker: Any) -> None:
            del worker
            from dask_nn.controller import worker_side

            vars(worker_side)["cpu_count"] = lambda: cores

    client.register_plugin(CoresPlugin())


def record_steps(client: Client, folder: Path) -> Ledger:
    """Let every rank write down which samples it computes with and which steps it completes.

    The first feature of every row must be the row's number.
    """
    from distributed import WorkerPlugin

    target = str(folder)

    class LedgerPlugin(WorkerPlugin):
        name = "dask-nn-ledger"

        def setup(self, worker: Any) -> None:
            del worker
            _record_in(target)

    client.register_plugin(LedgerPlugin())
    return Ledger(folder)


def _record_in(folder: str) -> None:
    name = f"ledger-{os.getpid()}-{threading.get_ident()}.jsonl"
    file = Path(folder, name).open("a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def hook(point: str, place: dict[str, Any]) -> None:
        if point == "forward" and place["step"] >= 0:
            rows = place["batch"][0].reshape(len(place["batch"][0]), -1)[:, 0].long().tolist()
            file.write(json.dumps(["computed", place["step"], place["shard"], rows]) + "\n")
        elif point == "applied":
            file.write(json.dumps(["applied", place["step"] - 1, place["rank"]]) + "\n")

    _set("ledger", hook)


@dataclass(frozen=True)
class Ledger:
    """What the ranks of a run wrote down.

    Parameters
    ----------
    folder : path
        Of their files.
    """

    folder: Path

    def check(
        self,
        expected: dict[tuple[int, int], list[int]],
        *,
        cut_short: dict[tuple[int, int], list[int]] | None = None,
    ) -> dict[str, int]:
        """Compare with the samples that each (step, shard) shall have.

        Every step must have been completed, every shard of it computed with exactly its samples,
        however often: an attempt that was cut short is repeated, never changed. No process may
        have applied a step twice: a rank that lives has its completed steps.

        Parameters
        ----------
        expected : dict
            From (step, shard) to the numbers of its rows.
        cut_short : dict, optional
            The same of a step that was under way when the run ended: its shards may be there, and
            no rank may have completed it.

        Returns
        -------
        dict of str to int
            ``computed`` and ``repeated`` shards; ``reapplied``, the (step, rank) that were applied
            once more, by another process: what a rank completed that died before any other had.

        Raises
        ------
        AssertionError
            Names the first gap, the first shard with other samples, or the first step that a
            process applied twice.
        """
        computed, applied = self._read()
        for place, rows in expected.items():
            attempts = computed.pop(place, [])
            if rows and not attempts:
                raise AssertionError(f"(step, shard) {place} was never computed")
            if any(attempt != rows for attempt in attempts):
                raise AssertionError(f"(step, shard) {place} was computed with other samples")
            if place[0] not in applied:
                raise AssertionError(f"step {place[0]} was never completed")
            computed[place] = attempts
        for place, rows in (cut_short or {}).items():
            if any(attempt != rows for attempt in computed.pop(place, [])):
                raise AssertionError(f"(step, shard) {place} was computed with other samples")
            if place[0] in applied:
                raise AssertionError(f"step {place[0]} was completed after the run's last")
        unknown = computed.keys() - expected.keys()
        if unknown:
            raise AssertionError(f"computed without being asked for: {sorted(unknown)[:3]}")
        total = sum(map(len, computed.values()))
        return {
            "computed": total,
            "repeated": total - sum(map(bool, expected.values())),
            "reapplied": _count_reapplied(applied),
        }

    def _read(
        self,
    ) -> tuple[dict[tuple[int, int], list[list[int]]], dict[int, list[tuple[int, str]]]]:
        """Give the samples of each attempt at a (step, shard), and who applied each step."""
        computed = defaultdict(list)
        applied = defaultdict(list)
        for path in sorted(self.folder.glob("ledger-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # the last line of a process that was killed
                if entry[0] == "computed":
                    computed[entry[1], entry[2]].append(entry[3])
                else:
                    applied[entry[1]].append((entry[2], path.stem))
        return computed, applied


def _count_reapplied(applied: dict[int, list[tuple[int, str]]]) -> int:
    """Count the (step, rank) that several processes applied; none may do so twice."""
    again = 0
    for step, done in sorted(applied.items()):
        processes = {process for _, process in done}
        if len(processes) < len(done):
            raise AssertionError(f"step {step} was applied twice by one process")
        again += len(done) - len({rank for rank, _ in done})
    return again
