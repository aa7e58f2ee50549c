"""The tasks of the graph engine: functions from values to values."""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
import traceback
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from distributed import get_worker

from dask_nn.allocator import keeping_freed_memory
from dask_nn.data.batches import batch_dtypes
from dask_nn.data.lengths import check_rows
from dask_nn.data.problem import VALIDATION, of_validation_data
from dask_nn.data.randomness import SeededRandomness, restored_generator
from dask_nn.errors import DaskNNError, RankFailed
from dask_nn.metrics.forward import between_tasks_s
from dask_nn.metrics.objective import Objective
from dask_nn.metrics.streams import BufferedMetrics
from dask_nn.training.canary import fingerprint
from dask_nn.training.layout import LeafLayout
from dask_nn.training.runtime import task_runtime
from dask_nn.training.snapshot import Snapshot
from dask_nn.training.state import TrainingState
from dask_nn.training.step import ShardOutput, ShardStep
from dask_nn.training.update import StepTotal, Update, is_finite
from dask_nn.training.validation import evaluate_block

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dask_nn.data.plan import Window
    from dask_nn.metrics.merge import Partial
    from dask_nn.training.spec import TrainingSpec

__all__ = [
    "Place",
    "StepShard",
    "add_leaves",
    "at_work",
    "canary",
    "compute_block",
    "end_epoch",
    "first_snapshot",
    "forget_benches",
    "metric_partials",
    "open_window",
    "shard_gradient",
    "update",
    "validate_block",
]

CPU = torch.device("cpu")
# Models that a worker process keeps ready between tasks.
KEPT_BENCHES = 16


class StepShard(NamedTuple):
    """Which part of which step a gradient task computes.

    ``segments`` are slices of the task's windows.
    """

    step: int
    shard: int
    rows: int
    step_count: int
    segments: tuple[tuple[int, int], ...]


class Place(NamedTuple):
    """For which step and shard of which run a task works; the shard is -1 if it is for all."""

    run_id: str
    step: int
    shard: int = -1


class Leaf(NamedTuple):
    """A gradient task's value: the leaf, shape (leaf_size,), and what metrics need."""

    flat: torch.Tensor
    output: ShardOutput | None


class _Bench:
    """A model and its tools, kept by one thread of a worker for the tasks of one run."""

    def __init__(self, payload: bytes) -> None:
        self.spec: TrainingSpec = pickle.loads(payload)  # noqa: S301  (made by the run's client)
        self.randomness = SeededRandomness(self.spec.seed)
        self.validation_randomness = SeededRandomness(self.spec.seed)
        self.state = self.first_state()
        self.layout = LeafLayout(self.state.model)
        self.dtypes = batch_dtypes(self.spec.fields, self.layout.floating)
        self.objective = Objective(self.spec.loss, weighted=self.spec.weighted).with_ignored(
            self.spec.ignored_labels
        )
        self.step = ShardStep(
            self.state.model,
            objective=self.objective,
            layout=self.layout,
            randomness=self.randomness,
            transform=self.spec.transform,
            grouping=self.spec.grouping,
            device=CPU,
        )
        self.total = self.layout.views(torch.zeros(self.layout.size, dtype=self.layout.dtype))
        self.update = Update(
            self.layout,
            self.total,
            base_buffers=self.step.base_buffers,
            optimizer=self.state.optimizer,
            scheduler=self.state.step_scheduler,
            divides=self.objective.kind == "mean_normalized",
            clip_grad_norm=self.spec.clip_grad_norm,
            randomness=self.randomness,
        )

    def first_state(self) -> TrainingState:
        return self.randomness.run_once(lambda: TrainingState(self.spec, CPU), "state")

    def load(self, snapshot: Snapshot, *, weights_only: bool = False) -> None:
        snapshot.load(self.state, weights_only=weights_only)
        for base, buffer in zip(self.step.base_buffers, self.layout.buffers, strict=True):
            base.copy_(buffer)


_benches: OrderedDict[tuple[int, str], _Bench] = OrderedDict()
# By thread, the run and since when; by run, the seconds of its longest task here.
_began: dict[int, tuple[str, float]] = {}
_longest: dict[str, float] = {}
_benches_lock = threading.Lock()


def at_work(run_id: str) -> tuple[float, float]:
    """Tell for how long this process's slowest task of a run has been at work.

    Returns
    -------
    float
        Seconds; 0 if none is at work.
    float
        What the longest task that ended took, in seconds; 0 before one has.
    """
    now = time.monotonic()
    with _benches_lock:
        began = min((at for run, at in _began.values() if run == run_id), default=now)
        return now - began, _longest.get(run_id, 0.0)


def first_snapshot(payload: bytes, run_id: str) -> Snapshot:
    """Give the state before the first step."""
    with _at_bench(payload, run_id, step=0) as bench:
        return Snapshot.take(bench.first_state())


def open_window(
    place: Place,
    window: Window,
    order: Any,
    blocks: list[list[Any]],
    lengths: tuple[int, ...],
    fields: tuple[Any, ...],
    dtypes: tuple[torch.dtype, ...],
) -> tuple[torch.Tensor, ...]:
    """Lay a window's pieces end to end and take its rows in order; shape (window.length, ...).

    `blocks` and `lengths` are those of the pieces.
    """
    from dask_nn.data.batches import load_window, new_rows
    from dask_nn.data.reader import MemoryReader

    with _watched(place.run_id), _named(place):
        numbers = [piece.block for piece in window.pieces]
        names = [field.name for field in fields]
        reader = MemoryReader(
            dict(zip(numbers, map(tuple, blocks), strict=True)),
            lengths=dict(zip(numbers, lengths, strict=True)),
            names=names,
        )
        rows = new_rows(window.length, fields, dtypes)
        load_window(window, order, reader, rows, names)
        return rows


def compute_block(
    place: Place, block: int, order: bytes, shared: list[Any], validates: bool
) -> list[Any]:
    """Compute a block of a stream, for the step and shard that need it first."""
    from dask_nn.data.reader import with_retries

    stream = pickle.loads(order)  # noqa: S301  (made by the run's client)
    naming = of_validation_data() if validates else contextlib.nullcontext()
    said = VALIDATION if validates else ""
    with (
        _named(place, f"{said}block {block} of {stream.computed} could not be computed: "),
        naming,
    ):
        values = stream.values | dict(zip(stream.shared, shared, strict=False))
        return list(with_retries(lambda: stream.compute(0, 0, values)))


def shard_gradient(
    payload: bytes,
    run_id: str,
    snapshot: Snapshot,
    part: StepShard,
    windows: list[tuple[torch.Tensor, ...]],
) -> Leaf:
    """Compute one leaf from the weights and the rows of some windows."""
    with _at_bench(payload, run_id, step=part.step, shard=part.shard) as bench:
        flat = torch.zeros(bench.layout.size, dtype=bench.layout.dtype)
        if snapshot.non_finite:
            return Leaf(flat, None)
        bench.load(snapshot, weights_only=True)
        pieces = [
            [tensor[lo:hi] for tensor in window]
            for window, (lo, hi) in zip(windows, part.segments, strict=True)
        ]
        batch = tuple(
            column[0].clone() if len(column) == 1 else torch.cat(column)
            for column in map(list, zip(*pieces, strict=True))
        )
        output = bench.step.compute(
            bench.layout.views(flat),
            batch,
            step=part.step,
            shard=part.shard,
            count=part.rows,
            step_count=part.step_count,
        )
        return Leaf(flat, output if bench.spec.metrics else None)


def add_leaves(place: Place, left: Leaf, right: Leaf) -> Leaf:
    """Add two nodes of the tree."""
    with _watched(place.run_id), _named(place):
        return Leaf(torch.add(left.flat, right.flat), None)


def update(
    payload: bytes, run_id: str, snapshot: Snapshot, total: Leaf, step_count: int
) -> Snapshot:
    """Apply the total of a step."""
    if snapshot.non_finite:
        return snapshot
    with _at_bench(payload, run_id, step=snapshot.steps) as bench:
        bench.load(snapshot)
        bench.total.flat.copy_(total.flat)
        found: StepTotal = bench.update.read()
        if not is_finite(found):
            return replace(snapshot, non_finite=True, last_loss=found.mean_loss)
        bench.update.apply(found, step_count, snapshot.steps)
        bench.state.step += 1
        bench.state.steps += 1
        return Snapshot.take(
            bench.state,
            loss_sum=snapshot.loss_sum + found.loss,
            normalizer=snapshot.normalizer + found.normalizer,
            last_loss=found.mean_loss,
        )


def metric_partials(payload: bytes, place: Place, leaves: list[Leaf]) -> dict[str, Partial]:
    """Update metrics with the outputs of one shard in some steps, from the place's on."""
    with _at_bench(payload, place.run_id, step=place.step, shard=place.shard) as bench:
        metrics = BufferedMetrics(bench.spec.metrics, bench.spec.heads)
        for leaf in leaves:
            if leaf.output is not None:
                metrics.update(*leaf.output)
        return dict(metrics.partial())


def validate_block(
    payload: bytes, run_id: str, snapshot: Snapshot, block: int, arrays: list[Any]
) -> dict[str, Partial]:
    """Evaluate one block of the validation data."""
    with _at_bench(payload, run_id, step=snapshot.steps) as bench:
        bench.load(snapshot, weights_only=True)
        with of_validation_data():
            names = [field.name for field in bench.spec.fields]
            check_rows(block, arrays, bench.spec.validation_lengths[block], of=names)
            return evaluate_block(
                bench.state.model,
                block,
                arrays,
                bench.dtypes,
                spec=bench.spec,
                objective=bench.objective,
                randomness=bench.validation_randomness,
                step=snapshot.steps,
            )


def end_epoch(payload: bytes, run_id: str, snapshot: Snapshot, monitored: float) -> Snapshot:
    """Go to the next epoch."""
    with _at_bench(payload, run_id, step=snapshot.steps) as bench:
        bench.load(snapshot)
        bench.randomness.run_once(
            lambda: bench.state.end_epoch(monitored), "epoch", bench.state.epoch
        )
        return Snapshot.take(bench.state)


def canary(payload: bytes, run_id: str) -> bytes:
    """Hash what this worker computes for the run's sample."""
    with _at_bench(payload, run_id, step=0) as bench:
        return fingerprint(
            bench.spec.model,
            bench.objective,
            bench.spec,
            dtypes=bench.dtypes,
            device=CPU,
            randomness=bench.randomness,
        )


@contextlib.contextmanager
def _at_bench(payload: bytes, run_id: str, *, step: int, shard: int = -1) -> Iterator[_Bench]:
    """Work with this thread's bench; other threads of this process work beside it."""
    with _watched(run_id), _named(Place(run_id, step, shard)), restored_generator(_begin_anew):
        bench = _find_bench(payload, run_id)
        with (
            keeping_freed_memory(linger_s=between_tasks_s),
            task_runtime(bench.spec.threads_per_rank, deterministic=bench.spec.bitwise),
        ):
            yield bench


@contextlib.contextmanager
def _watched(run_id: str) -> Iterator[None]:
    """Do work that others may see while it lasts, and that has to end.

    Not the reading of blocks: their source may take as long as it needs.
    """
    thread = threading.get_ident()
    with _benches_lock:
        _began[thread] = (run_id, time.monotonic())
    try:
        yield
    finally:
        with _benches_lock:
            _, began = _began.pop(thread)
            took = time.monotonic() - began
            _longest[run_id] = max(took, _longest.get(run_id, 0.0))


def _begin_anew() -> None:
    """Count this thread's work from now on: so far it has waited for that of others."""
    thread = threading.get_ident()
    with _benches_lock:
        run_id, _ = _began[thread]
        _began[thread] = (run_id, time.monotonic())


@contextlib.contextmanager
def _named(place: Place, what: str = "") -> Iterator[None]:
    """Give the error of a task its place and a traceback.

    Without that, an OSError of the user's code would look like one of the cluster.
    """
    try:
        yield
    except DaskNNError:
        raise
    except Exception as error:
        message = f"{what}{type(error).__name__}: {error}"
        text = "".join(traceback.format_exception(error))
        address = get_worker().address
        # Tasks have no rank; a shard's task does what the rank of that shard would.
        raise RankFailed(message, place.shard, place.step, address, text) from None


def _find_bench(payload: bytes, run_id: str) -> _Bench:
    key = (threading.get_ident(), run_id)
    with _benches_lock:
        bench = _benches.pop(key, None)
    if bench is None:
        bench = _Bench(payload)
    with _benches_lock:
        _benches[key] = bench
        while len(_benches) > KEPT_BENCHES:
            _benches.popitem(last=False)
    return bench


def forget_benches(run_id: str) -> None:
    """Drop the models that tasks of a run left behind."""
    with _benches_lock:
        for key in [key for key in _benches if key[1] == run_id]:
            del _benches[key]
        _longest.pop(run_id, None)
