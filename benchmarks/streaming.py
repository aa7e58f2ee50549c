"""Measure work on data larger than memory: ``python -m benchmarks.streaming``."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click
import dask
import dask.array as da
import numpy as np
import psutil
import torch
import zarr
from dask.utils import format_bytes, parse_bytes
from rich.console import Console
from rich.table import Table
from torch import nn

import dask_nn
from benchmarks.load import OtherLoad
from dask_nn.callbacks.progress import RichProgress
from dask_nn.clusters.local import local_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client

RANKS = 2
IMAGE = (3, 64, 64)
BLOCK_BYTES = 8 << 20
PRELOAD = ("torch._dynamo", "dask_nn.training.rank_main", "dask_nn.data.peek")
BATCH = 256


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(512, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Guide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def scale(x: torch.Tensor) -> torch.Tensor:
    return x.float() / 255


def write_store(path: Path, rows: int, shape: tuple[int, ...], block_rows: int) -> None:
    """Write images that compress to about a half, and labels, block by block."""
    group = zarr.open_group(path, mode="w")
    X = group.create_array("X", shape=(rows, *shape), chunks=(block_rows, *shape), dtype="u1")
    y = group.create_array("y", shape=(rows,), chunks=(rows,), dtype="i8")
    rng = np.random.Generator(np.random.PCG64(0))
    noise = rng.integers(0, 16, (2 * block_rows, *shape), dtype="u1") * 16
    labels = np.zeros(rows, "i8")
    for number, start in enumerate(range(0, rows, block_rows)):
        stop = min(start + block_rows, rows)
        at = number * 37 % block_rows
        X[start:stop] = noise[at : at + stop - start]
        labels[start:stop] = (noise[at : at + stop - start].reshape(stop - start, -1)[:, 0]) % 10
    y[:] = labels


class Watch:
    """Notes the memory of the workers, and whether one was paused or spilled."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._pids = client.run(lambda: __import__("os").getpid())
        self.times: list[float] = []
        self.rss: dict[str, list[int]] = {address: [] for address in self._pids}
        self.paused = False
        self.spilled = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(0.5):
            self.times.append(time.monotonic() - self._began)
            for address, pid in self._pids.items():
                with contextlib.suppress(psutil.Error):
                    self.rss[address].append(psutil.Process(pid).memory_info().rss)
            for worker in self._client.scheduler_info(n_workers=-1)["workers"].values():
                self.paused |= worker["status"] == "paused"
                spilled = worker["metrics"].get("spilled_bytes", {}).get("disk", 0)
                self.spilled = max(self.spilled, spilled)

    @property
    def peak(self) -> int:
        return max(max(values, default=0) for values in self.rss.values())


def train(client: Client | None, model: type[nn.Module], X: Any, y: Any, **options: Any) -> Any:
    defaults = {
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(torch.optim.SGD, lr=0.01),
        "batch_size": BATCH,
        "transform": scale,
        "client": client,
    }
    return dask_nn.train(model, X, y, **(defaults | options))


def opened(path: Path, rows: int | None = None) -> tuple[da.Array, da.Array]:
    found = dask_nn.open_data(f"zarr:{path}")
    return found["X"][:rows], found["y"][:rows]


@contextlib.contextmanager
def cluster(workers: int, limit: Any = "auto") -> Iterator[Client]:
    with local_cluster(workers, memory_limit=limit, preload=PRELOAD) as client:
        yield client


def larger_than_memory(folder: Path, size: int, limit: int, console: Console) -> dict[str, Any]:
    """Compare a stream of ten times the cluster's memory with the same rows held in memory."""
    row = int(np.prod(IMAGE))
    rows = size // row
    path = folder / "large.zarr"
    began = time.perf_counter()
    write_store(path, rows, IMAGE, BLOCK_BYTES // row)
    os.sync()  # or the disk is written to while it is measured
    on_disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    console.print(
        f"wrote {rows:,} images, {format_bytes(size)}, {format_bytes(on_disk)} on disk, in "
        f"{time.perf_counter() - began:.0f} s"
    )
    few = min(rows, (300 << 20) // row)
    with cluster(RANKS) as client:
        X, y = opened(path, few)
        held = train(client, Cnn, X, y, memory="resident", epochs=4)
    with cluster(RANKS, limit) as client, Watch(client) as watch:
        X, y = opened(path)
        streamed = train(client, Cnn, X, y, epochs=1, callbacks=[RichProgress(console)])
    with cluster(RANKS) as client:
        X, y = opened(path, few)
        again = train(client, Cnn, X, y, memory="resident", epochs=4)
    resident = [record["samples_per_s"] for run in (held, again) for record in run.history[1:]]
    rate = streamed.history[0]["samples_per_s"]
    found = {
        "size_bytes": size,
        "on_disk_bytes": on_disk,
        "limit_bytes": limit,
        "workers": RANKS,
        "streamed": streamed.run.streamed,
        "resident_samples_per_s": resident,
        "streamed_samples_per_s": rate,
        "time_over_resident": statistics.median(resident) / rate,
        "peak_bytes": watch.peak,
        "paused": watch.paused,
        "spilled_bytes": watch.spilled,
        "start_s": streamed.start_s,
        "memory": {"times": watch.times, "rss": list(watch.rss.values())},
    }
    found |= predictions(folder, path, limit, console)
    shutil.rmtree(path)
    return found


def predictions(folder: Path, path: Path, limit: int, console: Console) -> dict[str, Any]:
    """Predict everything to Zarr, and compare with plain loops over blocks, before and after."""
    model = Cnn().eval()
    X, _ = opened(path)
    alone, together = [], []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(RANKS, mp_context=context) as pool:

        def measure() -> None:
            list(pool.map(plain_predictions, [path] * RANKS, range(RANKS)))  # imports, the cache
            alone.append(pool.submit(plain_predictions, path, 0).result())
            together.append(sum(pool.map(plain_predictions, [path] * RANKS, range(RANKS))))

        measure()
        with cluster(RANKS, limit) as client, Watch(client) as watch:
            began = time.perf_counter()
            labels = dask_nn.predict(model, X, transform=scale)
            labels.to_zarr(str(folder / "labels.zarr"))
            rate = len(X) / (time.perf_counter() - began)
        measure()
    one, both = statistics.mean(alone), statistics.mean(together)
    console.print(
        f"predict: {rate:,.0f} rows/s; a plain loop {one:,.0f} rows/s, {RANKS} at once {both:,.0f}"
    )
    return {
        "predict_rows_per_s": rate,
        "predict_plain_rows_per_s": alone,
        "predict_plain_at_once_rows_per_s": together,
        "predict_over_plain_per_worker": rate / one / RANKS,
        "predict_over_plain_at_once": rate / both,
        "predict_peak_bytes": watch.peak,
        "predict_paused": watch.paused,
    }


def plain_predictions(path: Path, part: int) -> float:
    """Predict a part of the rows block by block in one thread, without writing; rows/s."""
    torch.set_num_threads(1)
    model = Cnn().eval()
    store = zarr.open(path / "X", mode="r")
    block = store.chunks[0]
    number = max(1, min(store.shape[0] // block // RANKS, 80))
    began = time.perf_counter()
    with torch.inference_mode():
        for start in range(part * number * block, (part + 1) * number * block, block):
            rows = store[start : start + block]
            for at in range(0, len(rows), 256):
                model(scale(torch.from_numpy(rows[at : at + 256]))).argmax(dim=1)
    return number * block / (time.perf_counter() - began)


def data_bound(folder: Path, rows: int, rounds: int, console: Console) -> dict[str, Any]:
    """Compare the guide's network on a stream with a plain loop over the same store, in turns.

    Two workers once share batches of 128, and once compute 128 each, as the plain loop does. They
    are also compared with two plain loops at once, which share the machine's memory as they do.
    """
    path = folder / "digits.zarr"
    write_store(path, rows, (784,), 4096)
    plain: list[float] = []
    kinds = {"one": (1, 128), "two": (RANKS, 128 * RANKS), "two_sharing": (RANKS, 128)}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    at_once: list[float] = []
    for _ in range(rounds):
        with ProcessPoolExecutor(RANKS, mp_context=multiprocessing.get_context("spawn")) as pool:
            plain.append(pool.submit(plain_stream, path).result())
            at_once.append(sum(pool.map(plain_stream, [path] * RANKS)))
        for kind, (workers, batch) in kinds.items():
            with cluster(workers) as client:
                X, y = opened(path)
                run = train(client, Guide, X, y, memory="stream", epochs=3, batch_size=batch)
            rates[kind].append(max(record["samples_per_s"] for record in run.history))
        shown = ", ".join(f"{kind} {found[-1]:,.0f}" for kind, found in rates.items())
        console.print(
            f"plain loop {plain[-1]:,.0f} samples/s, {RANKS} at once {at_once[-1]:,.0f}; "
            f"stream on workers: {shown}"
        )
    shutil.rmtree(path)
    base = statistics.median(plain)
    found: dict[str, Any] = {"plain_samples_per_s": plain, "plain_at_once_samples_per_s": at_once}
    for kind, (workers, _) in kinds.items():
        found[f"{kind}_samples_per_s"] = rates[kind]
        found[f"{kind}_over_plain_per_worker"] = statistics.median(rates[kind]) / base / workers
    found["two_over_plain_at_once"] = statistics.median(rates["two"]) / statistics.median(at_once)
    return found


def plain_stream(path: Path) -> float:
    """Train as a script does that reads block by block and shuffles inside each; samples/s."""
    torch.set_num_threads(1)
    group = zarr.open_group(path, mode="r")
    X, labels = group["X"], group["y"][:]
    block = X.chunks[0]
    model, loss = Guide(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rng = np.random.Generator(np.random.PCG64(0))
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        for start in rng.permutation(range(0, X.shape[0], block)):
            rows, targets = X[start : start + block], labels[start : start + block]
            order = rng.permutation(len(rows))
            for at in range(0, len(rows), 128):
                batch = order[at : at + 128]
                optimizer.zero_grad()
                found = loss(
                    model(scale(torch.from_numpy(rows[batch]))), torch.from_numpy(targets[batch])
                )
                found.backward()
                optimizer.step()
        best = max(best, X.shape[0] / (time.perf_counter() - began))
    return best


def many_blocks(folder: Path, console: Console) -> dict[str, Any]:
    """Start a training on ten thousand blocks."""
    path = folder / "blocks.zarr"
    # In another process: what writing leaves in memory is neither the client's nor the scheduler's.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(write_store, path, 10_000 * 64, (784,), 64).result()
    before_rss = psutil.Process().memory_info().rss
    with cluster(RANKS) as client:
        client.run(lambda: None)
        X, y = opened(path)
        before = client.run_on_scheduler(tasks_seen)
        run = train(client, Guide, X, y, memory="stream", epochs=1, batch_size=1280)
        rss = psutil.Process().memory_info().rss  # the scheduler of a local cluster is here too
        tasks = client.run_on_scheduler(tasks_seen) - before
    shutil.rmtree(path)
    console.print(f"10,000 blocks: first step after {run.start_s:.1f} s, {tasks} tasks")
    return {
        "start_s": run.start_s,
        "client_before_bytes": before_rss,
        "client_and_scheduler_bytes": rss,
        "tasks": tasks,
    }


def tasks_seen(dask_scheduler: Any) -> int:
    return int(dask_scheduler.transition_counter)


def draw_memory(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    times = found["memory"]["times"]
    for number, values in enumerate(found["memory"]["rss"]):
        axes.plot(times[: len(values)], [v / 2**20 for v in values], label=f"worker {number}")
    axes.axhline(found["limit_bytes"] / 2**20, color="grey", linestyle="--", label="limit")
    axes.set(xlabel="seconds", ylabel="memory of the process, MiB", ylim=(0, None))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=100)


@click.command(help=__doc__)
@click.option("--size", default="20 GiB", show_default=True, help="Of the large data set.")
@click.option("--limit", default="1 GiB", show_default=True, help="Memory of each of two workers.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--part", type=click.Choice(["all", "large", "bound", "blocks"]), default="all")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the data sets are made.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("bench-report"), show_default=True
)
def main(*, size: str, limit: str, rounds: int, part: str, folder: Path | None, out: Path) -> None:
    """Measure, print and write."""
    console, others = Console(highlight=False, soft_wrap=True), OtherLoad()
    found: dict[str, Any] = {}
    out.mkdir(parents=True, exist_ok=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dask-nn-bench-", dir=folder) as name:
        place = Path(name)
        with dask.config.set({"temporary-directory": name}):
            if part in {"all", "blocks"}:
                found["blocks"] = many_blocks(place, console)
            if part in {"all", "bound"}:
                found["bound"] = data_bound(place, 400_000, rounds, console)
            if part in {"all", "large"}:
                found["large"] = larger_than_memory(
                    place, parse_bytes(size), parse_bytes(limit), console
                )
                draw_memory(found["large"], out / "memory.png")
    found["others_cores"] = others.cores()
    table = Table("figure", "value")
    for group, values in found.items():
        if isinstance(values, dict):
            for key, value in values.items():
                if isinstance(value, int | float | bool):
                    is_size = key.endswith("bytes")
                    shown = format_bytes(value) if is_size else f"{value:,.3f}"
                    table.add_row(f"{group}: {key}", shown)
    console.print(table)
    (out / "streaming.json").write_text(json.dumps(found, indent=2) + "\n")
    console.print(f"Wrote {out / 'streaming.json'}")


if __name__ == "__main__":
    main()
