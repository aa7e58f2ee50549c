"""Whether the blocks of a data set suit the workers."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from dask.utils import format_bytes

from dask_nn.data.memory import PROCESS_SHARE, Room
from dask_nn.diagnosis.report import Line, fail, ok, some, warn

if TYPE_CHECKING:
    from dask_nn.diagnosis.facts import ClusterFacts, DataFacts

__all__ = ["check_blocks", "check_placement"]

SKEWED_LENGTHS = 4
SKEWED_WORKERS = 2


def check_blocks(facts: ClusterFacts) -> Line:
    """Check number, lengths and sizes of blocks."""
    data = facts.data
    if data is None:
        return ok("blocks", "no data given (--data URL)")
    if data.problem:
        remedy = (
            "mend what is named here; dask-nn train reads zarr:, parquet:, hdf5: or npy: and a "
            "path that this machine and all workers can read"
        )
        return fail("blocks", data.problem, remedy)
    details = {
        "num_blocks": data.num_blocks,
        "lengths": list(data.lengths),
        "fields": data.fields,
        "row_bytes": data.row_bytes,
    }
    what = some(f"{name} {kind}" for name, kind in data.fields.items())
    if not data.lengths:
        text = f"{data.num_blocks} of lengths that are known when they are read; {what}"
        return ok("blocks", text, **details)
    return _check_lengths(facts, data, what, details)


def _check_lengths(
    facts: ClusterFacts, data: DataFacts, what: str, details: dict[str, Any]
) -> Line:
    longest, usual = max(data.lengths), median(data.lengths)
    largest = longest * data.row_bytes
    room = _room(facts)
    text = f"{data.num_blocks} of up to {longest:,} rows ({format_bytes(largest)}); {what}"
    if room is not None and room.block_bytes is not None and largest > room.block_bytes:
        fits = max(1, room.block_bytes // max(1, data.row_bytes))
        remedy = f"rechunk to at most {fits:,} rows a block, or use workers with more memory"
        over = largest > (room.worker_bytes or 0)
        text += f": a worker has room for {format_bytes(room.block_bytes)}"
        return (fail if over else warn)("blocks", text, remedy, **details)
    if longest >= SKEWED_LENGTHS * max(1, usual):
        text += f": skewed, half of them have {int(usual):,} or fewer"
        remedy = f"rechunk to blocks of one length, such as X.rechunk({{0: {_even(data)}}})"
        return warn("blocks", text, remedy, **details)
    if data.num_blocks < len(facts.registered):
        text += f": fewer than the {len(facts.registered)} workers"
        remedy = "rechunk to several blocks for each worker, so that reading and shuffling spread"
        return warn("blocks", text, remedy, **details)
    return ok("blocks", text, **details)


def check_placement(facts: ClusterFacts) -> Line:
    """Check that data held by workers is spread over them."""
    data = facts.data
    if data is not None and data.places_problem:
        remedy = "ask again when the scheduler is less busy, or wait longer (--timeout)"
        return warn("placement", f"not known: {data.places_problem}", remedy, rows_held={})
    if data is None or data.problem or not any((data.rows_held or {}).values()):
        return ok("placement", "nothing is held by workers yet", rows_held={})
    unit = "rows" if data.lengths else "blocks"
    rows_held = data.rows_held or {}
    held = {address: rows_held.get(address, 0) for address in facts.registered}
    mean = sum(held.values()) / max(1, len(held))
    most = max(held, key=lambda address: held[address], default="")
    details = {"rows_held": held, "unit": unit}
    if len(held) > 1 and held[most] >= SKEWED_WORKERS * mean:
        text = f"skewed: {held[most]:,} of {sum(held.values()):,} {unit} lie on {most}"
        remedy = (
            "spread them: client.rebalance(), or persist once all workers are there; blocks that "
            "lie elsewhere cross the network in every epoch"
        )
        return warn("placement", text, remedy, **details)
    text = f"{min(held.values()):,} to {held[most]:,} {unit} on each worker" if held else "nowhere"
    return ok("placement", text, **details)


def _room(facts: ClusterFacts) -> Room | None:
    """Give the room of the least worker, as a run counts it."""
    rooms = [
        max(0, int(worker.memory_limit_bytes * PROCESS_SHARE) - worker.used_bytes)
        for worker in facts.workers
        if worker.memory_limit_bytes
    ]
    return Room(held_bytes=0, worker_bytes=min(rooms)) if rooms else None


def _even(data: DataFacts) -> int:
    return -(-sum(data.lengths) // max(1, data.num_blocks))
