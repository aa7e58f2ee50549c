"""The same training without Dask: as a beginner's guide writes it, and as fast as we can.

This file imports nothing of dask_nn, so that what it shows depends on PyTorch alone.
"""

from __future__ import annotations

import copy
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

    EpochEnd = Callable[[int, float, float], None]

__all__ = ["Digits", "LoopResult", "best_loop", "guide_loop"]


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Images and labels to train and to test on.

    Parameters
    ----------
    train_images, test_images : numpy.ndarray
        uint8, (n, 784).
    train_labels, test_labels : numpy.ndarray
        int64 of 0 to 9, (n,).
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class LoopResult:
    """What a loop reached.

    Parameters
    ----------
    epoch_s : tuple of float
        Seconds of every epoch, training only.
    loss : tuple of float
        Mean training loss of every epoch.
    accuracy : float
        Share of the test images that the trained network reads right.
    threads : int
        Threads that PyTorch computed with.
    """

    epoch_s: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: float
    threads: int


def guide_loop(
    model: nn.Module,
    data: Digits,
    *,
    epochs: int = 5,
    batch_size: int = 128,
    lr: float = 0.01,
    seed: int = 0,
    on_epoch_end: EpochEnd | None = None,
) -> LoopResult:
    """Train as a beginner's guide does: a DataLoader, and loss and accuracy read at every step.

    Parameters
    ----------
    model : nn.Module
        Trained in place; maps (n, 784) of float32 to (n, 10).
    data : Digits
        What to train and to test on.
    epochs, batch_size, lr, seed
        As for any training; `seed` sets the order of the samples.
    on_epoch_end : callable, optional
        Called with epoch (from 0), mean loss and seconds.

    Returns
    -------
    LoopResult
        With PyTorch's own choice of threads.
    """
    torch.manual_seed(seed)
    images = torch.from_numpy(data.train_images).float() / 255
    labels = torch.from_numpy(data.train_labels)
    loader = DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=True)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    epoch_s, losses = [], []
    model.train()
    for epoch in range(epochs):
        start = time.perf_counter()
        running_loss = 0.0
        correct = 0
        for inputs, targets in loader:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            loss.backward()
            optimizer.step()
            running_loss += loss.item() * targets.size(0)
            correct += (outputs.argmax(1) == targets).sum().item()
        epoch_s.append(time.perf_counter() - start)
        losses.append(running_loss / len(labels))
        if on_epoch_end is not None:
            on_epoch_end(epoch, losses[-1], epoch_s[-1])
    return LoopResult(
        epoch_s=tuple(epoch_s),
        loss=tuple(losses),
        accuracy=_accuracy(model, data),
        threads=torch.get_num_threads(),
    )


def best_loop(
    model: nn.Module,
    data: Digits,
    *,
    epochs: int = 5,
    batch_size: int = 128,
    lr: float = 0.01,
    seed: int = 0,
    threads: tuple[int, ...] | None = None,
    calibration_steps: int = 200,
    on_epoch_end: EpochEnd | None = None,
) -> LoopResult:
    """Train as fast as one process can: whole batches by index, nothing read until the epoch ends.

    Four ways are tried first for a few hundred steps each (images kept as bytes or as float32, one
    thread or all), and the fastest trains. The update is written out, which for plain SGD is
    quicker than the optimizer object.

    Parameters
    ----------
    model : nn.Module
        Trained in place; maps (n, 784) of float32 to (n, 10).
    data : Digits
        What to train and to test on.
    epochs, batch_size, lr, seed
        As for any training; `seed` sets the order of the samples.
    threads : tuple of int, optional
        Numbers of threads to try; 1 and all that this process may use by default.
    calibration_steps : int, default 200
        Steps in which each way is tried.
    on_epoch_end : callable, optional
        Called with epoch (from 0), mean loss and seconds.

    Returns
    -------
    LoopResult
        With the number of threads that was the fastest.
    """
    stored = torch.from_numpy(data.train_images)
    labels = torch.from_numpy(data.train_labels)
    sources = (stored, stored.float().mul_(1 / 255))
    counts = threads or tuple(dict.fromkeys((1, os.process_cpu_count() or 1)))
    ways = [(images, count) for count in counts for images in sources]

    with _restored_threads():
        durations_s: list[list[float]] = [[] for _ in ways]
        # Every way is tried twice, in turns, so that a disturbance does not decide.
        for way in [*range(len(ways)), *range(len(ways))]:
            images, count = ways[way]
            torch.set_num_threads(count)
            order = torch.randperm(len(labels))[: calibration_steps // 2 * batch_size]
            _, step_s = _steps(copy.deepcopy(model), images, labels, order, batch_size, lr)
            durations_s[way] += step_s
        fastest = min(range(len(ways)), key=lambda way: median(durations_s[way]))
        images, count = ways[fastest]

        torch.set_num_threads(count)
        torch.manual_seed(seed)
        epoch_s, losses = [], []
        model.train()
        for epoch in range(epochs):
            start = time.perf_counter()
            order = torch.randperm(len(labels))
            total, _ = _steps(model, images, labels, order, batch_size, lr)
            losses.append(total.item() / len(labels))
            epoch_s.append(time.perf_counter() - start)
            if on_epoch_end is not None:
                on_epoch_end(epoch, losses[-1], epoch_s[-1])
    return LoopResult(
        epoch_s=tuple(epoch_s), loss=tuple(losses), accuracy=_accuracy(model, data), threads=count
    )


def _steps(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    order: torch.Tensor,
    batch_size: int,
    lr: float,
) -> tuple[torch.Tensor, list[float]]:
    parameters = list(model.parameters())
    loss_fn = nn.CrossEntropyLoss()
    total = torch.zeros(())
    clock = time.perf_counter
    duration_s = []
    before = clock()
    for rows in order.split(batch_size):
        batch = images.index_select(0, rows)
        if batch.dtype == torch.uint8:
            batch = batch.float().mul_(1 / 255)
        loss = loss_fn(model(batch), labels.index_select(0, rows))
        loss.backward()
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-lr)
                    parameter.grad = None
        total.add_(loss.detach(), alpha=len(rows))
        now = clock()
        duration_s.append(now - before)
        before = now
    return total, duration_s


def _accuracy(model: nn.Module, data: Digits) -> float:
    model.eval()
    with torch.inference_mode():
        outputs = model(torch.from_numpy(data.test_images).float().mul_(1 / 255))
        right = outputs.argmax(1) == torch.from_numpy(data.test_labels)
    model.train()
    return float(right.double().mean())


@contextmanager
def _restored_threads() -> Iterator[None]:
    count = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(count)
