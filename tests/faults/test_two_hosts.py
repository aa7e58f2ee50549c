"""Two hosts with addresses of their own, each with two workers; in the clear, and over TLS."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import cloudpickle
import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Security, get_worker
from torch import nn
from torch.optim import SGD

import dask_nn
from dask_nn.callbacks.progress import sentence
from dask_nn.controller import keeping
from dask_nn.errors import ConfigurationError
from dask_nn.testing.capture import Capture, listening_ports
from dask_nn.testing.faults import Fault, clear_faults, install, pretend_cores
from dask_nn.testing.network import Network, SpreadCluster
from dask_nn.training.snapshot import Keepsake, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Worker

cloudpickle.register_pickle_by_value(sys.modules[__name__])

FEATURES, PLANTED_ROWS, PLANTED_SHARDS = 512, 64, 4


@pytest.fixture(scope="module")
def _clear(
    network: Network, tmp_path_factory: pytest.TempPathFactory, _quiet_dask: None
) -> Iterator[SpreadCluster]:
    with SpreadCluster(network, tmp_path_factory.mktemp("clear"), workers_per_host=2) as cluster:
        pretend_cores(cluster.client, 8)
        yield cluster


@pytest.fixture(scope="module")
def _tls(
    network: Network, tmp_path_factory: pytest.TempPathFactory, _quiet_dask: None
) -> Iterator[SpreadCluster]:
    folder = tmp_path_factory.mktemp("tls")
    security = Security.temporary()
    with SpreadCluster(network, folder, workers_per_host=2, security=security) as cluster:
        pretend_cores(cluster.client, 8)
        yield cluster


@pytest.fixture
def clear(_clear: SpreadCluster) -> Iterator[SpreadCluster]:
    """Give two hosts of two workers each, all alive."""
    _clear.replace_dead()
    yield _clear
    clear_faults(_clear.client)


@pytest.fixture
def tls(_tls: SpreadCluster) -> Iterator[SpreadCluster]:
    """Give two hosts of two workers each, all alive, that talk over TLS alone."""
    _tls.replace_dead()
    yield _tls
    clear_faults(_tls.client)


def test_two_hosts_of_two_ranks_give_the_bits_of_one_process(
    job, undisturbed, clear, same_bits, heard
):
    result = job.train(clear.client, callbacks=[heard])
    assert result.run.world_size == 4
    assert result.run.collective == "shared_memory+gloo"
    same_bits(result, undisturbed)
    assert not heard.named("encrypted-exchange")


@pytest.mark.parametrize("name", ["gloo", "dask", "shared_memory+dask"])
def test_a_communicator_that_was_asked_for_gives_the_same_bits(
    job, undisturbed, clear, same_bits, dask_config, name
):
    with dask_config({"dask-nn.collective": name}):
        result = job.train(clear.client)
    assert result.run.collective == name
    same_bits(result, undisturbed)


def test_memory_of_one_host_is_refused_for_two(job, clear, dask_config):
    with (
        dask_config({"dask-nn.collective": "shared_memory"}),
        pytest.raises(ConfigurationError, match="the ranks are on 2 hosts; possible here: shared"),
    ):
        job.train(clear.client)


class Row(nn.Module):
    """Weights that are known before and after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((FEATURES,), 3.1415927))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def mean_output(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Average what the module gives: the gradient is the mean of the rows."""
    return (output - 0 * target).mean()


class Ports(dask_nn.Callback):
    """Notes where a host listens while a run goes on."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.before = listening_ports(pid)
        self.during: set[int] = set()

    def on_progress(self, progress: Any) -> None:
        self.during |= listening_ports(self._pid)

    def on_epoch_end(self, record: Any) -> None:
        self.during |= listening_ports(self._pid)

    def on_train_start(self, run: Any) -> None:
        self.during |= listening_ports(self._pid)


def planted_run(cluster: SpreadCluster, **options: Any) -> tuple[Any, dict[str, bytes], Ports]:
    """Train on rows that are all the same; give the floats that this sends about, as bytes."""
    row = np.linspace(1.2345, 7.6543, FEATURES, dtype=np.float32)
    X = np.tile(row, (PLANTED_ROWS, 1))
    y = np.zeros(PLANTED_ROWS, np.float32)
    ports = Ports(cluster.workers[-1].pid)
    options = {"engine": "spmd", "callbacks": [ports]} | options
    result = dask_nn.train(
        Row(),
        X,
        y,
        client=cluster.client,
        loss=mean_output,
        optimizer=partial(SGD, lr=0.01),
        epochs=8,
        batch_size=16,
        strategy=dask_nn.Synchronous(shards=PLANTED_SHARDS, threads_per_rank=1),
        **options,
    )
    final = result.model.weight.detach().numpy()
    np.testing.assert_allclose(final, 3.1415927 - 0.01 * row * result.steps, rtol=1e-4)
    # A mean of equal rows times a power of two: the mantissas of the row itself.
    found = {
        "initial weights": np.full(4, 3.1415927, np.float32),
        "rows": row[:4],
        "gradient of a shard": row[100:104] / np.float32(4),
        "gradient of a host": row[100:104] / np.float32(2),
        "gradient": row[100:104],
        "final weights": final[:4],
        "more final weights": final[200:204],
    }
    return result, {name: values.tobytes() for name, values in found.items()}, ports


def interfaces(network: Network) -> list[str]:
    return [host.name for host in network.hosts]


def use_everything(cluster: SpreadCluster, model: Row) -> None:
    """Evaluate and predict on the cluster."""
    row = np.linspace(1.2345, 7.6543, FEATURES, dtype=np.float32)
    X = da.from_array(np.tile(row, (PLANTED_ROWS, 1)), chunks=(16, FEATURES))
    y = da.zeros(PLANTED_ROWS, chunks=16, dtype=np.float32)
    client = cluster.client
    dask_nn.evaluate(model, X, y, loss=mean_output, metrics=[], client=client)
    predicted = dask_nn.predict(model, X, output="raw")
    client.compute(predicted).result(timeout=60)


def state_values() -> torch.Tensor:
    return torch.linspace(2.1357, 2.9753, FEATURES)


def leave_state(dask_worker: Worker) -> None:
    keeping.serve_states(dask_worker)
    snapshot = Snapshot(weights={"weight": state_values()}, optimizer={})
    keeping.keep(dask_worker.address, "planted", 1, Keepsake(snapshot=snapshot))


def take_state(address: str) -> bool:
    source = keeping.StateSource(address=address, generation=1, position=keeping.Position(0, 0))
    snapshot = keeping.fetch_state(get_worker(), source, "planted", lambda: None)
    return torch.equal(snapshot.weights["weight"], state_values())


def copy_a_state(cluster: SpreadCluster) -> dict[str, bytes]:
    """Copy a state from one host to the other, as a rank does that joins a run."""
    addresses = sorted(cluster.client.scheduler_info(n_workers=-1)["workers"])
    first, last = addresses[0], addresses[-1]
    cluster.client.run(leave_state, workers=[first])
    assert cluster.client.submit(take_state, first, workers=[last], pure=False).result(60)
    cluster.client.run(keeping.forget, "planted", workers=[first])
    return {"copied state": state_values()[:4].numpy().tobytes()}


def test_without_tls_the_capture_finds_every_planted_float(network, clear):
    """So that finding none with TLS says something; and the process group listens."""
    with Capture(interfaces(network)) as capture:
        result, patterns, ports = planted_run(clear)
        patterns |= copy_a_state(clear)
    assert result.run.collective == "shared_memory+gloo"
    assert not capture.dropped
    found = capture.find(patterns)
    # Shards are added inside a host, and the total of all hosts on each.
    assert found >= patterns.keys() - {"gradient of a shard", "gradient"}, patterns.keys() - found
    assert ports.during - ports.before


def test_with_tls_nothing_of_a_run_is_in_the_capture(network, tls, heard):
    with Capture(interfaces(network)) as capture:
        result, patterns, ports = planted_run(tls)
        graph, more, _ = planted_run(tls, engine="graph", callbacks=[heard])
        use_everything(tls, result.model)
        patterns |= copy_a_state(tls)
    assert result.run.collective == "shared_memory+dask"
    assert graph.weights_sha256 == result.weights_sha256
    assert not capture.dropped
    assert sum(map(len, capture.streams())) > 8 * FEATURES * 4
    assert not capture.find(patterns | {f"graph: {name}": value for name, value in more.items()})
    # Neither the process group nor its rendezvous listens anywhere.
    assert ports.during == ports.before
    (event,) = [event for event in result.events if event.name == "encrypted-exchange"]
    assert "Dask's own encrypted connections, which is slower than gloo" in str(sentence(event))


def test_with_tls_the_process_group_is_refused(tls, dask_config):
    with (
        dask_config({"dask-nn.collective": "shared_memory+gloo"}),
        pytest.raises(ConfigurationError, match=r"does not encrypt.*possible here: shared_memory"),
    ):
        planted_run(tls)


def test_with_tls_the_bits_are_those_of_one_process(job, undisturbed, tls, same_bits):
    result = job.train(tls.client)
    assert result.run.collective == "shared_memory+dask"
    same_bits(result, undisturbed)


@pytest.mark.parametrize("kind", ["clear", "tls"])
def test_killed_ranks_of_either_level_are_trained_around(
    job, undisturbed, same_bits, heard, tmp_path, request, kind
):
    """First a rank that leads no host, then the leader of the first host."""
    cluster = request.getfixturevalue(kind)
    kills = [Fault(point="forward", rank=3, step=20), Fault(point="forward", rank=0, step=50)]
    install(cluster.client, kills, tmp_path)
    result = job.train(cluster.client, callbacks=[heard])
    same_bits(result, undisturbed)
    assert len(heard.named("recovered")) == 2
    assert sum(not worker.is_alive for worker in cluster.workers) == 2
