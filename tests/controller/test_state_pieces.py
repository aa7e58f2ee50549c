"""States as bytes in pieces: every bit arrives, and nothing is copied whole at its owner."""

from __future__ import annotations

import threading

import pytest
import torch

from dask_nn.controller import keeping
from dask_nn.controller.state_pieces import StatePieces, assemble
from dask_nn.errors import Aborted
from dask_nn.training.snapshot import Keepsake, Snapshot


def state() -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(5, 7, generator=generator)
    return {
        "plain": plain,
        "again": plain,
        "half": plain.bfloat16(),
        "double": plain.double()[:3],
        "number": torch.tensor(3),
        "flags": plain > 0,
        "nothing": torch.zeros(0, 4),
        "transposed": plain.t(),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "complex": torch.randn(3, dtype=torch.complex64, generator=generator),
        "conjugate": torch.randn(3, dtype=torch.complex64, generator=generator).conj(),
        "options": {"lr": 0.1, "betas": (0.9, 0.999), "foreach": None},
    }


@pytest.mark.parametrize("size", [1, 13, 64, 1000, 1 << 20])
def test_any_pieces_give_the_state_again(size):
    original = state()
    pieces = StatePieces(original)
    received = bytearray()
    while len(received) < len(pieces):
        received += pieces.piece(len(received), size)
    assert len(received) == len(pieces)
    found = assemble(received)
    assert found.keys() == original.keys()
    for name, value in original.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            assert found[name].stride() == value.stride(), name
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value
    found["plain"] += 1  # it can be trained on
    assert not torch.equal(found["plain"], original["plain"])


def test_the_owner_makes_no_second_copy():
    """Pieces are read from the tensors when they are asked for."""
    weights = torch.zeros(1000)
    pieces = StatePieces({"weights": weights})
    weights += 1
    assert torch.equal(assemble(bytearray(pieces.piece(0, len(pieces))))["weights"], weights)


def keepsake(steps: int) -> Keepsake:
    return Keepsake(snapshot=Snapshot(weights={"w": torch.ones(3)}, optimizer={}, steps=steps))


def test_a_run_that_is_over_leaves_nothing_to_a_rank_that_ends_late():
    keeping.keep("a", "run", 0, keepsake(1))
    keeping.forget("run")
    keeping.keep("a", "run", 0, keepsake(2))
    assert keeping.kept("a", "run") is None


def test_what_older_gangs_left_is_dropped_for_a_newer_one_alone():
    keeping.keep("a", "of gangs", 3, keepsake(1))
    keeping.forget_older("a", "of gangs", 3)
    assert keeping.kept("a", "of gangs") is not None
    keeping.forget_older("a", "of gangs", 4)
    assert keeping.kept("a", "of gangs") is None


def test_runs_of_clients_that_are_gone_are_dropped_on_one_worker():
    for address in ("a", "b"):
        keeping.keep(address, "dead", 0, keepsake(1))
        keeping.keep(address, "alive", 0, keepsake(1))
    keeping.forget_all_but("a", {"alive"})
    assert keeping.kept("a", "dead") is None
    assert keeping.kept("a", "alive") is not None
    assert keeping.kept("b", "dead") is not None
    for run_id in ("dead", "alive"):
        keeping.forget(run_id)


def test_pieces_of_two_states_make_none():
    """A rank may leave another one, of the same position, while its worker serves the first."""
    source = keeping.StateSource(address="a", generation=1, position=keeping.Position(0, 0))
    answers = iter([(1, 10, b"12345"), (2, 10, b"67890")])
    with pytest.raises(Aborted, match="any more"):
        keeping.collect_state(lambda _: next(answers), source)


def test_one_run_is_served_while_another_is_made_ready():
    """Whoever makes pieces of a large state holds up nobody else."""
    entered, leave = threading.Event(), threading.Event()

    class Slow:
        def __reduce__(self):
            entered.set()
            leave.wait(10)
            return (int, ())

    large = Keepsake(snapshot=Snapshot(weights={}, optimizer={"slow": Slow()}))
    small = keepsake(1)
    start = large.snapshot.position
    keeping.keep("a", "large", 0, large)
    keeping.keep("a", "small", 0, small)
    busy = threading.Thread(target=keeping._piece, args=("a", "large", start, 0))
    busy.start()
    try:
        assert entered.wait(10)
        answered: list[object] = []

        def ask() -> None:
            answered.append(keeping._piece("a", "small", small.snapshot.position, 0))

        other = threading.Thread(target=ask)
        other.start()
        other.join(10)
        assert answered
        assert answered[0] is not None
    finally:
        leave.set()
        busy.join()
        for run_id in ("large", "small"):
            keeping.forget(run_id)
