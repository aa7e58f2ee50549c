"""The trained weights depend on the plan and the shards, never on who computes what."""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import cloudpickle
import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.checkpoint import checkpoint

import dask_nn
from dask_nn.checkpoints.serialization import weights_sha256
from dask_nn.collectives.serial import SerialCommunicator
from dask_nn.collectives.threads import ThreadsCommunicator
from dask_nn.config import settings
from dask_nn.controller import worker_side
from dask_nn.controller.options import Options
from dask_nn.controller.preparation import PreparedRun, prepare
from dask_nn.data.reader import MemoryReader
from dask_nn.errors import Aborted
from dask_nn.training.orders import Orders
from dask_nn.training.rank_main import RankEnvironment, rank_main

if TYPE_CHECKING:
    from collections.abc import Callable

    from dask_nn.training.outcome import RankOutcome
    from dask_nn.training.snapshot import Keepsake

# Workers cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.filterwarnings("ignore:Sending large graph")

WORLD_SIZES = (1, 2, 3, 5, 8)
SHARDS = 8
gangs = itertools.count()


def data(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return X (rows, 6), y in 0..2 and positive weights."""
    rng = np.random.Generator(np.random.PCG64(rows))
    X = rng.normal(size=(rows, 6)).astype(np.float32)
    y = (X[:, 0] + 0.3 * rng.normal(size=rows) > 0).astype(np.int64) + (X[:, 1] > 0.8)
    return X, y.astype(np.int64), rng.uniform(0.0, 2.0, size=rows)


def perceptron() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))


def normalized() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.4), nn.Linear(9, 3)
    )


class Branching(nn.Module):
    """Uses a part of itself, and draws random numbers, for some batches only."""

    def __init__(self, *, noisy: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Linear(6, 3)
        self.branch = nn.Linear(6, 3)
        self.never = nn.Linear(6, 3)
        self.noisy = noisy

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.trunk(x)
        if x[:, 0].sum() > 1.0:
            out = out + self.branch(x)
            if self.noisy:
                out = nn.functional.dropout(out, 0.3)
        return out


class Ones(nn.Module):
    """A model with a buffer of integers and one of booleans."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layer = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False, True, True, True, True]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x * self.mask)


class Drawing(nn.Module):
    """Draws random numbers in evaluation, too, and again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.4))
        self.last = nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = checkpoint(self.first, x, use_reentrant=False)
        return self.last(hidden + 0.1 * torch.randn_like(hidden))


def drawing_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output + 0.5 * torch.randn_like(output), target)


class Langevin(SGD):
    """Begins with random numbers, and goes on with more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["drift"] = 0.01 * torch.randn_like(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                drift = self.state[parameter]["drift"]
                parameter.add_(drift).add_(torch.randn_like(parameter), alpha=0.01)


@dataclass
class Case:
    """One training, of 8 shards."""

    rows: int
    model: Callable[[], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    weighted: bool = False
    validated: bool = False
    block: int = 13

    def arguments(self) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """Return what ``train`` takes: positional arguments and options."""
        X, y, weight = data(self.rows)
        options = {
            "model": self.model(),
            "loss": nn.CrossEntropyLoss(),
            "optimizer": partial(SGD, lr=0.1, momentum=0.9),
            "epochs": 2,
            "batch_size": 48,
            "window": 3,
            "seed": 5,
            "strategy": dask_nn.Synchronous(shards=SHARDS, threads_per_rank=1),
        } | self.options
        if self.weighted:
            options["sample_weight"] = weight
        if self.validated:
            Xv, yv, wv = data(150)
            options["validation"] = (da.from_array(Xv, chunks=(40, 6)), yv)
            options["validation"] += (wv,) if self.weighted else ()
        return (da.from_array(X, chunks=(self.block, 6)), y), options


DRAWS = "random numbers in forward, backward, loss and validation"
LANGEVIN = "an optimizer that draws random numbers"
NORMALIZED = "batch norm, dropout, Adam, schedule, clipping"
CASES = {
    "ragged last batch, validation and metrics": Case(
        203, perceptron, {"metrics": ["accuracy", "auroc"]}, validated=True
    ),
    NORMALIZED: Case(
        208,
        normalized,
        {
            "optimizer": partial(Adam, lr=0.01, weight_decay=1e-3),
            "lr_scheduler": partial(StepLR, step_size=3, gamma=0.5),
            "lr_scheduler_every": "step",
            "clip_grad_norm": 0.5,
        },
    ),
    "shards without rows in the last step": Case(17, perceptron, {"batch_size": 8}, block=2),
    "one shard has one row more": Case(25, perceptron, {"batch_size": 24}, block=25),
    "sample weights and class weights": Case(
        203,
        perceptron,
        {"loss": nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]))},
        weighted=True,
        validated=True,
    ),
    "class weights and an ignored label": Case(
        203,
        perceptron,
        {"loss": nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]), ignore_index=2)},
    ),
    "a sum as loss": Case(
        203,
        perceptron,
        {"loss": nn.CrossEntropyLoss(reduction="sum"), "optimizer": partial(SGD, lr=0.001)},
    ),
    "parameters unused in some shards": Case(203, partial(Branching, noisy=False)),
    "random numbers in some shards": Case(203, partial(Branching, noisy=True)),
    "integer and boolean buffers": Case(203, Ones),
    "blocks stay with their shard": Case(203, perceptron, {"shuffle": "within"}),
    "data in its own order": Case(203, perceptron, {"shuffle": False}),
    DRAWS: Case(203, Drawing, {"loss": drawing_loss}, validated=True),
    LANGEVIN: Case(
        203,
        perceptron,
        {
            "optimizer": partial(Langevin, lr=0.1, momentum=0.9),
            "lr_scheduler": ReduceLROnPlateau,
        },
        validated=True,
    ),
    "double precision": Case(208, lambda: normalized().double()),
}
ON_CLUSTERS = (
    ("ragged last batch, validation and metrics", "spmd"),
    ("ragged last batch, validation and metrics", "graph"),
    (NORMALIZED, "spmd"),
    (NORMALIZED, "graph"),
    ("sample weights and class weights", "spmd"),
    ("random numbers in some shards", "spmd"),
    (DRAWS, "spmd"),
    (DRAWS, "graph"),
    (LANGEVIN, "spmd"),
    (LANGEVIN, "graph"),
)
TIMES = ("seconds", "samples_per_s")


def prepared(case: Case) -> PreparedRun:
    (X, y), options = case.arguments()
    placed = {name: options.pop(name, None) for name in ("sample_weight", "validation")}
    defaults = {
        "metrics": (),
        "engine": "spmd",
        "transform": None,
        "lr_scheduler": None,
        "lr_scheduler_every": "epoch",
        "clip_grad_norm": None,
        "shuffle": True,
        "callbacks": (),
        "device": "cpu",
    }
    return prepare(
        Options(**(defaults | options)), X, y, client=None, settings=settings(), **placed
    )


def run_gang(run: PreparedRun, world_size: int, **options: Any) -> list[RankOutcome]:
    """Run as many ranks as threads of this process, without Dask and whatever its cores."""
    gang = f"test-bits-{next(gangs)}"

    def rank(number: int) -> RankOutcome:
        comm = (
            SerialCommunicator(0, 1)
            if world_size == 1
            else ThreadsCommunicator(number, world_size, gang=gang, timeout_s=30, **options)
        )
        validation = None if run.validation is None else MemoryReader(run.validation.arrays)
        env = RankEnvironment(
            comm=comm,
            reader=MemoryReader(run.blocks.arrays),
            validation_reader=validation,
        )
        return rank_main(run.spec, env)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(rank, range(world_size)))


def facts(outcome: RankOutcome) -> tuple[str, list[dict[str, float]]]:
    """Return what must be equal: the weights' digest and the history without times."""
    assert outcome.status == "finished", outcome.traceback
    return weights_sha256(outcome.state), timeless(outcome.history)


def timeless(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in history]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_ranks_gives_the_same_bits(name):
    run = prepared(CASES[name])
    expected = facts(run_gang(run, 1)[0])
    untrained = weights_sha256(run.spec.model.state_dict())
    assert expected[0] != untrained
    for world_size in WORLD_SIZES[1:]:
        assert facts(run_gang(run, world_size)[0]) == expected, f"world size {world_size}"


def test_reducing_by_slices_gives_the_same_bits():
    run = prepared(CASES[NORMALIZED])
    expected = facts(run_gang(run, 1)[0])
    for world_size in (2, 3, 8):
        assert facts(run_gang(run, world_size, slice_above_bytes=64)[0]) == expected


def test_random_numbers_in_some_shards_never_reach_another_rank():
    run = prepared(CASES["random numbers in some shards"])
    expected = facts(run_gang(run, 1)[0])
    for _ in range(10):
        assert facts(run_gang(run, 4)[0]) == expected


def test_a_loss_in_place_is_applied_once():
    """The first rank that draws beside others computes its shard once more."""

    class NextClass(nn.Module):
        def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            target.add_(1).remainder_(output.shape[1])
            return nn.functional.cross_entropy(output, target)

    run = prepared(CASES["random numbers in some shards"])
    run = replace(run, spec=replace(run.spec, loss=NextClass()))
    expected = facts(run_gang(run, 1)[0])
    for _ in range(3):
        assert facts(run_gang(run, 4)[0]) == expected


def test_a_transform_in_place_is_applied_once():
    def center(x: torch.Tensor) -> torch.Tensor:
        return x.sub_(0.5).mul_(2.0)

    run = prepared(CASES["random numbers in some shards"])
    run = replace(run, spec=replace(run.spec, transform=center))
    expected = facts(run_gang(run, 1)[0])
    for _ in range(3):
        assert facts(run_gang(run, 4)[0]) == expected


class NobodyCame(SerialCommunicator):
    """A gang that breaks while it forms."""

    def open(self, **_: Any) -> None:
        message = "nobody came"
        raise Aborted(message)


def test_a_rank_that_has_not_begun_leaves_what_it_started_from():
    """With metrics of the epoch so far; whoever it has that from may be gone by then."""
    run = prepared(CASES["ragged last batch, validation and metrics"])
    kept: list[Keepsake] = []

    def one_rank(comm: SerialCommunicator, **options: Any) -> RankOutcome:
        before = kept[-1] if kept else None
        env = RankEnvironment(
            comm=comm,
            reader=MemoryReader(run.blocks.arrays),
            validation_reader=MemoryReader(run.validation.arrays),
            start=None if before is None else lambda: before.snapshot,
            carried=before,
            keep=kept.append,
            **options,
        )
        return rank_main(run.spec, env)

    orders = Orders()
    orders.stop.set()
    assert one_rank(SerialCommunicator(0, 1), orders=orders).status == "stopped"
    outcome = one_rank(NobodyCame(0, 1))
    assert (outcome.status, outcome.has_state, outcome.steps) == ("aborted", True, 1)
    assert len(kept) == 2
    assert facts(one_rank(SerialCommunicator(0, 1))) == facts(run_gang(run, 1)[0])


def test_the_seed_and_the_number_of_shards_change_the_bits():
    case = CASES["ragged last batch, validation and metrics"]
    run = prepared(case)
    other_seed = replace(run, spec=replace(run.spec, seed=6))
    other_shards = replace(run, spec=replace(run.spec, shards=4))
    digests = {facts(run_gang(r, 1)[0])[0] for r in (run, other_seed, other_shards)}
    assert len(digests) == 3


def expected_bits(name: str) -> tuple[str, list[dict[str, float]]]:
    return facts(run_gang(prepared(CASES[name]), 1)[0])


def check_training(name: str, client: Client | None, engine: str = "spmd") -> None:
    arrays, options = CASES[name].arguments()
    model = options.pop("model")
    result = dask_nn.train(model, *arrays, engine=engine, client=client, **options)
    assert (result.weights_sha256, timeless(result.history)) == expected_bits(name)
    assert result.bitwise


def test_train_without_a_cluster_gives_these_bits():
    check_training(NORMALIZED, None)


@pytest.mark.parametrize(("name", "engine"), ON_CLUSTERS)
def test_two_worker_processes_give_these_bits(client, name, engine):
    check_training(name, client, engine)


@pytest.mark.parametrize(("name", "engine"), ON_CLUSTERS)
def test_two_workers_in_one_process_give_these_bits(threads_client, name, engine):
    check_training(name, threads_client, engine)


@pytest.mark.parametrize(
    ("workers", "engine"), [(1, "spmd"), (3, "spmd"), (3, "graph"), (4, "spmd"), (8, "spmd")]
)
@pytest.mark.usefixtures("_quiet_dask")
def test_any_number_of_workers_gives_these_bits(monkeypatch, workers, engine):
    monkeypatch.setattr(worker_side, "cpu_count", lambda: 8)
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=2, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        check_training(NORMALIZED, client, engine)
