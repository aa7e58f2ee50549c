"""The newest state of a run of the graph engine, and the tasks that bring it on."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import cloudpickle

from dask_nn.controller import graph_tasks as tasks
from dask_nn.controller.graph_canary import compare_bits
from dask_nn.controller.graph_steps import BlockTasks, StepTasks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from distributed import Client, Future

    from dask_nn.controller.graph_waits import TaskWaits
    from dask_nn.controller.worker_side import RankPayload
    from dask_nn.data.plan import Plan
    from dask_nn.training.snapshot import Snapshot

__all__ = ["GraphProgress"]


class GraphProgress:
    """How far a run is; each method waits for the tasks that it submits.

    Parameters
    ----------
    payload : RankPayload
        What is trained, and the keys of its blocks.
    client : Client
        Of the cluster.
    waits : TaskWaits
        Wait for tasks; what they raise, the methods raise.
    run_id : str
        The run.

    Attributes
    ----------
    is_sent : bool
        Whether the workers have what only the client can send; a failure makes that untrue.
    """

    def __init__(
        self, payload: RankPayload, *, client: Client, waits: TaskWaits, run_id: str
    ) -> None:
        self._spec = payload.spec
        self._data = payload.data
        self._validation = payload.validation
        self._client = client
        self._waits = waits
        self._run_id = run_id
        self._pickled = cloudpickle.dumps(payload.spec, protocol=pickle.HIGHEST_PROTOCOL)
        self._sent_spec: Future[Any]
        self._steps: StepTasks
        self._latest: Snapshot | None = payload.start
        self._state: Future[Any]
        self.is_sent = False

    @property
    def latest(self) -> Snapshot:
        """The newest state that the client has."""
        assert self._latest is not None  # noqa: S101  (since the run has begun)
        return self._latest

    @property
    def steps(self) -> int:
        """Steps completed over the whole run."""
        return 0 if self._latest is None else self._latest.steps

    def send(self, attempt: int) -> None:
        """Put on the cluster what only the client has."""
        self._sent_spec = self._waits.send(self._pickled)
        self._steps = StepTasks(
            self._client,
            self._spec,
            payload=self._sent_spec,
            data=self._data,
            run_id=self._run_id,
            # A second attempt must not meet the tasks of the first.
            suffix=f"-{attempt}" if attempt else "",
        )
        if self._latest is not None:
            self._state = self._waits.send(self._latest)
        self.is_sent = True

    def begin(self, workers: Sequence[str], is_present: Callable[[str], bool]) -> Snapshot:
        """Compare what the workers compute, and give the state before the first step.

        Parameters
        ----------
        workers : sequence of str
            Those that are compared.
        is_present : callable
            Tells whether one of them is still there.
        """
        first = self._latest
        if first is None:
            future = self._client.submit(
                tasks.first_snapshot, self._sent_spec, self._run_id, pure=False
            )
            first = self._waits.value(future, step=0)
        canary, same = compare_bits(
            self._client,
            self._waits,
            [address for address in workers if is_present(address)],
            payload=self._sent_spec,
            run_id=self._run_id,
            spec=self._spec,
            saved=first.canary,
            is_present=is_present,
        )
        begun = replace(first, canary=canary, bitwise=first.bitwise and same)
        self._state = self._waits.send(begun)
        self._latest = begun
        return begun

    def run_group(self, plan: Plan, epoch: int, steps: range) -> list[Any]:
        """Run some steps from the latest snapshot; give each shard's metrics."""
        state, found = self._steps.submit(plan, epoch, steps, self._state)
        snapshot, *partials = self._waits.values([state, *found], step=self.steps)
        self._steps.drop_before(steps.stop)
        self._state, self._latest = state, snapshot
        return partials

    def end_epoch(self, monitored: float) -> None:
        """Let the schedule see the loss that an epoch ended with."""
        state = self._client.submit(
            tasks.end_epoch, self._sent_spec, self._run_id, self._state, monitored, pure=False
        )
        self._latest = self._waits.value(state, step=self.steps)
        self._state = state

    def validate(self) -> list[Any]:
        """Give the partial metrics of every block of the validation data; none without any."""
        if self._validation is None:
            return []
        futures = [
            self._client.submit(
                tasks.validate_block,
                self._sent_spec,
                self._run_id,
                self._state,
                number,
                block,
                pure=False,
            )
            for number, block in enumerate(
                BlockTasks(self._client, self._validation, self._run_id, validates=True).all(
                    self.steps
                )
            )
        ]
        return self._waits.values(futures, step=self.steps)
