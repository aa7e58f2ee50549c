"""Whether the workers of the graph engine compute the same bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dask_nn.controller import graph_tasks as tasks
from dask_nn.errors import IncompatibleWorkers
from dask_nn.training.canary import canary_of, expected_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from distributed import Client, Future

    from dask_nn.controller.graph_waits import TaskWaits
    from dask_nn.training.spec import TrainingSpec

__all__ = ["compare_bits"]


def compare_bits(
    client: Client,
    waits: TaskWaits,
    addresses: Sequence[str],
    *,
    payload: Future[Any],
    run_id: str,
    spec: TrainingSpec,
    saved: dict[str, str],
    is_present: Callable[[str], bool],
) -> tuple[dict[str, str], bool]:
    """Compare what workers compute from the run's sample.

    Parameters
    ----------
    client : Client
        Of the cluster.
    waits : TaskWaits
        Of the run.
    addresses : sequence of str
        The workers; one that leaves meanwhile is not waited for.
    payload : Future
        The pickled spec on the workers.
    run_id : str
        The run.
    spec : TrainingSpec
        What is trained.
    saved : dict
        The canary of the checkpoint from which the run goes on, if there is one.
    is_present : callable
        Tells whether a worker is still there.

    Returns
    -------
    dict
        The canary that the run is held to.
    bool
        Whether all agree with it.

    Raises
    ------
    IncompatibleWorkers
        If they do not and the spec refuses such workers; names them.
    """
    futures = {
        address: client.submit(tasks.canary, payload, run_id, workers=[address], pure=False)
        for address in addresses
    }
    try:
        waits.ended(
            list(futures.values()), lambda: [f for a, f in futures.items() if not is_present(a)]
        )
        asked = [address for address, future in futures.items() if future.done()]
        digests = waits.values([futures[address] for address in asked], step=0)
    finally:
        for future in futures.values():
            future.release()
    if not digests:
        message = "all workers left while they were compared"
        raise ConnectionError(message)
    expected = expected_bits(saved, spec)
    right = expected or digests[0]
    different = [a for a, digest in zip(asked, digests, strict=True) if digest != right]
    if different and spec.bitwise:
        before = "when the run was saved" if expected else f"on {asked[0]}"
        message = (
            f"the same batch gives other bits on {', '.join(different)} than {before}; use "
            "workers of one kind, or Synchronous(bitwise=False)"
        )
        raise IncompatibleWorkers(message, tuple(different))
    return (saved if expected else canary_of(spec, right)), not different
