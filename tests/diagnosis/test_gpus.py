"""What the check of GPUs makes of workers that see cards, and of those that do not."""

from __future__ import annotations

import pytest
from tests.diagnosis.made_facts import FIRST, ONE_HOST, SECOND, cluster

from dask_nn.diagnosis.examine import examine

CARD = {"uuid": "GPU-1", "name": "NVIDIA H100", "memory_mib": 81_559}
SECOND_CARD = CARD | {"uuid": "GPU-2"}
ONE_CARD = {"gpus": [CARD], "num_cuda_devices": 1, "cuda": "12.8", "nccl": True}
TWO_CARDS = {"gpus": [CARD, SECOND_CARD], "num_cuda_devices": 1, "nccl": True}
FAULTS = {
    "a card that PyTorch does not see": (
        {"first": {"gpus": [CARD]}},
        ("warn", f"no CUDA device on {FIRST}", "PyTorch with CUDA"),
    ),
    "one card for two workers": (
        {
            "first": ONE_HOST | {"gpus": [CARD], "num_cuda_devices": 1, "nccl": True},
            "second": ONE_HOST | {"gpus": [CARD], "num_cuda_devices": 1, "nccl": True},
        },
        ("warn", f"2 workers share one card: {FIRST}, {SECOND}", "CUDA_VISIBLE_DEVICES"),
    ),
    "one card of two for two workers": (
        {
            "first": ONE_HOST | TWO_CARDS | {"environment": {"CUDA_VISIBLE_DEVICES": "1"}},
            "second": ONE_HOST | TWO_CARDS | {"environment": {"CUDA_VISIBLE_DEVICES": "GPU-2"}},
        },
        ("warn", f"2 workers share one card: {FIRST}, {SECOND}", "CUDA_VISIBLE_DEVICES"),
    ),
    "a worker that sees more cards than it uses": (
        {"first": TWO_CARDS | {"num_cuda_devices": 2}},
        ("warn", f"{FIRST} uses 1 of the 2 cards that it sees", "one worker for each"),
    ),
    "cards without nccl": (
        {
            "first": {"gpus": [CARD], "num_cuda_devices": 1},
            "second": {"gpus": [SECOND_CARD], "num_cuda_devices": 1},
        },
        ("warn", "without nccl", "with CUDA"),
    ),
    "cards of two kinds": (
        {
            "first": {"gpus": [CARD], "num_cuda_devices": 1, "nccl": True},
            "second": {"gpus": [SECOND_CARD | {"name": "T4"}], "num_cuda_devices": 1, "nccl": True},
        },
        ("warn", "mixed: NVIDIA H100 on 1 worker, T4 on 1 worker; training", "one kind"),
    ),
    "a card on one worker of two": (
        {"first": ONE_CARD},
        (
            "warn",
            f"mixed: NVIDIA H100 on 1 of 2 workers, no card on {SECOND}, where no rank would run",
            "one card each",
        ),
    ),
    "cards that were asked for and nobody sees": (
        {"gpus": 1},
        (
            "fail",
            f"asked for, but no worker sees one: {FIRST}, {SECOND}: neither nvidia-smi nor PyTorch",
            "nvidia-smi on that host",
        ),
    ),
    "a card that was asked for and one worker does not see": (
        {"gpus": 1, "first": ONE_CARD, "second": {"cuda": "12.8"}},
        (
            "fail",
            f"not seen by 1 of 2 workers: {SECOND}: neither nvidia-smi nor PyTorch shows one",
            "docker run --gpus all",
        ),
    ),
    "a card that was asked for and PyTorch does not see": (
        {"gpus": 1, "first": ONE_CARD, "second": {"gpus": [SECOND_CARD]}},
        (
            "fail",
            f"{SECOND}: the driver shows NVIDIA H100, not so PyTorch, which is built without CUDA",
            "built with CUDA",
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault):
    changes, (status, found, remedy) = FAULTS[fault]
    line = examine(cluster(**changes))["GPU"]
    assert line.status == status
    assert found in line.found
    assert remedy in line.remedy


def seeing(listed: str, count: int = 1) -> dict:
    environment = {"CUDA_VISIBLE_DEVICES": listed}
    return ONE_HOST | TWO_CARDS | {"environment": environment, "num_cuda_devices": count}


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        (seeing("0"), seeing("GPU-2"), "NVIDIA H100"),
        (seeing("0,1", 2), seeing("1,0", 2), "NVIDIA H100"),
        (TWO_CARDS | {"gpus": [CARD]}, TWO_CARDS | {"gpus": [SECOND_CARD]}, "NVIDIA H100"),
        (TWO_CARDS | {"gpus": []}, TWO_CARDS | {"gpus": []}, "cards that nvidia-smi does not name"),
    ],
)
def test_workers_that_each_have_a_card_are_in_order(first, second, name):
    line = examine(cluster(first=first | {"cuda": "12.8"}, second=second, gpus=1))["GPU"]
    text = f'{name}, CUDA 12.8, one for each of 2; training uses them only with device="cuda"'
    assert (line.status, line.found) == ("ok", text)


def test_a_card_that_was_asked_for_is_not_missed_where_pytorch_is_not_loaded():
    """Another line says why it is not; whether PyTorch would see the card is not known."""
    unloaded = {"gpus": [CARD], "torch_threads": 0}
    line = examine(cluster(first=unloaded, second=TWO_CARDS, gpus=1))["GPU"]
    assert line.status == "warn"
    assert f"no CUDA device on {FIRST}" in line.found
