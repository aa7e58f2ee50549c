"""DistributedDataParallel over gloo, as well as we can write it; torchrun starts one per rank.

It does what the best sequential loop does: whole batches by index out of bytes, scaled in the
batch, nothing read before the epoch ends, plain SGD written out. One thread per rank.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.networks import make_network
from benchmarks.tasks import load_digits

__all__ = ["main"]


def main() -> None:
    """Train one rank's share; rank 0 writes when the epochs ended, and the last one's loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=["guide", "cnn"], required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        ends_s, loss = train(options)
        if dist.get_rank() == 0:
            options.out.write_text(json.dumps({"ends_s": ends_s, "loss": loss}))
    finally:
        dist.destroy_process_group()


def train(options: argparse.Namespace) -> tuple[list[float], float]:
    """Train for some epochs; return the moments of their ends and the last one's mean loss."""
    digits = load_digits(options.folder)
    images = torch.from_numpy(digits.train_images)
    labels = torch.from_numpy(digits.train_labels)
    model = DistributedDataParallel(
        make_network(options.network, options.seed),
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
    # Every rank draws the same order and takes its part of every batch of it.
    generator = torch.Generator().manual_seed(options.seed)
    ends_s = []
    mean_loss = 0.0
    for _ in range(options.epochs):
        order = torch.randperm(len(labels), generator=generator)
        total = train_epoch(model, images, labels, order, options.batch_size, options.lr)
        dist.all_reduce(total)
        mean_loss = total.item() / len(labels)
        ends_s.append(time.perf_counter())
    return ends_s, mean_loss


def train_epoch(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    order: torch.Tensor,
    batch_size: int,
    lr: float,
) -> torch.Tensor:
    """Take this rank's part of every batch of an order; return the sum of its losses."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parameters = list(model.parameters())
    loss_fn = nn.CrossEntropyLoss()
    total = torch.zeros(())
    for batch in order.split(batch_size):
        rows = batch.tensor_split(world_size)[rank]
        inputs = images.index_select(0, rows).float().mul_(1 / 255)
        loss = loss_fn(model(inputs), labels.index_select(0, rows))
        loss.backward()
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-lr)
                    parameter.grad = None
        total.add_(loss.detach(), alpha=len(rows))
    return total


if __name__ == "__main__":
    main()
