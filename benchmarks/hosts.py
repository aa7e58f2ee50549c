"""How long one all-reduce of four ranks takes, by the ways that lead between hosts.

The ranks are on two pretended hosts of two ranks each, all on this machine; their connections go
over the loopback interface: what is compared is the work of the processors, not of a network.
``make bench`` does not run this; ``python -m benchmarks.hosts`` does.
"""

from __future__ import annotations

import logging
from statistics import median
from typing import TYPE_CHECKING, Any

import click
from distributed import Client, LocalCluster, Security
from rich.console import Console
from rich.table import Table

from benchmarks.exchange import ELEMENT_BYTES, OwnExchange, durations_s, time_exchanges
from dask_nn.testing.worker_gangs import WorkerGang

if TYPE_CHECKING:
    from dask_nn.collectives.base import Communicator

WAYS = {
    "gloo": "gloo among 4 ranks",
    "shared_memory+gloo": "shared memory in 2 hosts, gloo between",
    "dask": "Dask's TLS among 4 ranks",
    "shared_memory+dask": "shared memory in 2 hosts, Dask's TLS between",
}
# Bytes of float32, and how often they are exchanged.
SIZES_BYTES = {400_000: 200, 25_000_000: 15}
HOSTS = (2, 2)
WARM_UPS = 3
# So that what disturbs the machine for a while disturbs all ways.
ROUNDS = 3


def time_communicator(communicator: Communicator, num_elements: int, repeats: int) -> list[Any]:
    return time_exchanges(OwnExchange(communicator), num_elements, WARM_UPS, repeats)


def measure(client: Client, name: str, size_bytes: int, repeats: int) -> list[float]:
    hosts = {"hosts": HOSTS} if "+" in name else {}
    outcomes = WorkerGang(client, name).run(
        sum(HOSTS), time_communicator, size_bytes // ELEMENT_BYTES, repeats, **hosts
    )
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return durations_s([outcome.value for outcome in outcomes])


@click.command()
@click.option("--quick", is_flag=True, help="A tenth of the exchanges.")
def main(quick: bool) -> None:
    """Compare the ways between hosts."""
    table = Table("way", *(f"{size / 1e6:g} MB" for size in SIZES_BYTES))
    with (
        LocalCluster(
            n_workers=sum(HOSTS),
            threads_per_worker=1,
            security=Security.temporary(),
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        times: dict[tuple[str, int], list[float]] = {}
        for _ in range(ROUNDS):
            for size_bytes, full in SIZES_BYTES.items():
                repeats = max(3, full // 10) if quick else full
                for name in WAYS:
                    found = measure(client, name, size_bytes, repeats)
                    times.setdefault((name, size_bytes), []).extend(found)
    for name, text in WAYS.items():
        table.add_row(text, *(f"{median(times[name, size]) * 1e3:.2f} ms" for size in SIZES_BYTES))
    Console().print(table)


if __name__ == "__main__":
    main()
