from __future__ import annotations

import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

from dask_nn.data.batches import ShardBatches, batch_dtypes, load_window, new_rows
from dask_nn.data.blocks import Field
from dask_nn.data.plan import Piece, Plan, Window
from dask_nn.data.reader import BlockReader, MemoryReader
from dask_nn.errors import DataError

LENGTHS = (5, 0, 9, 1, 1, 13, 4, 8, 2)
FIELDS = (
    Field(name="X", shape=(2,), dtype=np.dtype("f8")),
    Field(name="y", shape=(), dtype=np.dtype("i4")),
)
DTYPES = (torch.float32, torch.int64)
TOTAL = sum(LENGTHS)


def blocks() -> list[tuple[np.ndarray, ...]]:
    """Return blocks whose y is the number of the row, and whose X is (y, -y)."""
    rows = np.arange(TOTAL, dtype=np.int32)
    cuts = np.cumsum(LENGTHS)[:-1]
    return [(np.stack([y, -y], axis=1).astype("f8"), y) for y in np.split(rows, cuts)]


class CountingReader(MemoryReader):
    def __init__(self, arrays):
        super().__init__(arrays)
        self.blocks: list[int] = []

    def read(self, block):
        self.blocks.append(block)
        return super().read(block)


def plan_of(epoch: int, **options) -> Plan:
    defaults = {"shards": 4, "batch_size": 8, "window": 2, "seed": 3}
    return Plan(block_lengths=LENGTHS, epoch=epoch, **(defaults | options))


def make(
    shards: range,
    *,
    reader: BlockReader | None = None,
    first_epoch: int = 0,
    first_step: int = 0,
    **options,
):
    return ShardBatches(
        partial(plan_of, **options),
        epochs=range(first_epoch, 3),
        first_step=first_step,
        shards=shards,
        reader=reader or MemoryReader(blocks()),
        fields=FIELDS,
        dtypes=DTYPES,
    )


@pytest.mark.parametrize("shards", [range(4), range(1, 3), range(3, 4)])
@pytest.mark.parametrize("window", [1, 2, 100])
def test_batches_are_those_of_the_plan(shards, window):
    batches = make(shards, window=window)
    batches.start()
    for epoch in range(3):
        plan = plan_of(epoch, window=window)
        for t in range(plan.num_steps):
            for v in shards:
                if count := plan.count(t, v):
                    X, y = batches.next(v, count)
                    ids = plan.sample_ids(t, v)
                    np.testing.assert_array_equal(y.numpy(), ids)
                    np.testing.assert_array_equal(X.numpy(), np.stack([ids, -ids], axis=1))
                    assert (X.dtype, y.dtype) == DTYPES
                    assert X.is_contiguous()
    batches.close()


def test_batches_stay_as_they_are_when_windows_are_used_again():
    batches = make(range(4), window=1)
    batches.start()
    kept = []
    for epoch in range(3):
        plan = plan_of(epoch, window=1)
        kept += [
            (batches.next(v, plan.count(t, v))[1], plan.sample_ids(t, v))
            for t in range(plan.num_steps)
            for v in range(4)
            if plan.count(t, v)
        ]
    batches.close()
    for y, ids in kept:
        np.testing.assert_array_equal(y.numpy(), ids)


@pytest.mark.parametrize("window", [1, 2])
def test_rows_that_are_not_there_yet_are_not_waited_for(window):
    """A batch of several windows is put together from what came before, and what comes later."""

    class Late(MemoryReader):
        def read_many(self, wanted):
            assert may_load.acquire(timeout=20)
            return super().read_many(wanted)

    may_load = threading.Semaphore(0)
    batches = make(range(4), window=window, batch_size=16, reader=Late(blocks()))
    batches.start()
    late, deadline = 0, time.monotonic() + 30
    for epoch in range(3):
        plan = plan_of(epoch, window=window, batch_size=16)
        for t in range(plan.num_steps):
            for v in range(4):
                if count := plan.count(t, v):
                    batch = batches.next_if_there(v, count)
                    while batch is None:
                        assert time.monotonic() < deadline
                        late += 1
                        may_load.release()
                        time.sleep(0.002)
                        batch = batches.next_if_there(v, count)
                    np.testing.assert_array_equal(batch[1].numpy(), plan.sample_ids(t, v))
    batches.close()
    assert late >= 3 * len(LENGTHS) / window


@pytest.mark.parametrize("first_step", [1, 3, 5])
def test_resuming_gives_the_rest_and_opens_no_earlier_window(first_step):
    reader = CountingReader(blocks())
    batches = make(range(4), reader=reader, first_step=first_step, first_epoch=2)
    batches.start()
    plan = plan_of(2)
    for t in range(first_step, plan.num_steps):
        for v in range(4):
            if count := plan.count(t, v):
                np.testing.assert_array_equal(
                    batches.next(v, count)[1].numpy(), plan.sample_ids(t, v)
                )
    batches.close()
    position = first_step * plan.shard_batch_size
    needed = [
        piece.block
        for v in range(4)
        for window in plan.windows(v)
        if window.stop > position
        for piece in window.pieces
    ]
    assert sorted(reader.blocks) == sorted(needed)


def test_a_failing_read_arrives_where_its_batch_is_wanted():
    class Broken(MemoryReader):
        def read(self, block):
            if block == 5:
                message = "block 5 is gone"
                raise OSError(message)
            return super().read(block)

    batches = make(range(4), reader=Broken(blocks()))
    batches.start()
    plan = plan_of(0)
    wanted = [
        (v, count) for t in range(plan.num_steps) for v in range(4) if (count := plan.count(t, v))
    ]
    with pytest.raises(OSError, match="block 5 is gone"):
        [batches.next(*one) for one in wanted]
    assert batches.next_if_there(*wanted[-1]) is None
    batches.close()


def test_waiting_for_data_can_be_ended():
    def stop():
        raise InterruptedError

    class Endless(MemoryReader):
        def read(self, block):
            closed.wait(5)
            return super().read(block)

    closed = threading.Event()
    batches = ShardBatches(
        plan_of,
        epochs=range(1),
        shards=range(4),
        reader=Endless(blocks()),
        fields=FIELDS,
        dtypes=DTYPES,
        check=stop,
    )
    batches.start()
    with pytest.raises(InterruptedError):
        batches.next(0, 1)
    closed.set()
    batches.close()


@pytest.mark.parametrize(
    ("name", "stored", "seen"),
    [
        ("X", "f8", torch.float32),
        ("X", ">f4", torch.float32),
        ("X", "f2", torch.float32),
        ("X", "u1", torch.uint8),
        ("X", ">i2", torch.int16),
        ("X", "?", torch.bool),
        ("y", "f8", torch.float32),
        ("y", "i1", torch.int64),
        ("y", "u4", torch.int64),
        ("y", "?", torch.bool),
        ("sample_weight", "i8", torch.float32),
        ("sample_weight", "f8", torch.float32),
    ],
)
def test_model_and_loss_see_their_own_types(name, stored, seen):
    field = Field(name=name, shape=(), dtype=np.dtype(stored))
    assert batch_dtypes([field], torch.float32) == (seen,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_windows_are_loaded_in_every_floating_type(dtype):
    fields = (Field(name="X", shape=(), dtype=np.dtype(">f8")),)
    reader = MemoryReader([(np.array([1.0, 2.0, 3.0], ">f8"),), (np.array([4.0], ">f8"),)])
    rows = new_rows(3, fields, (dtype,))
    window = Window(0, 3, (Piece(1, 0, 1), Piece(0, 1, 3)))
    load_window(window, np.array([2, 0, 1]), reader, rows, ["X"])
    assert rows[0].tolist() == [3.0, 4.0, 2.0]


@pytest.mark.parametrize("found", [np.ones((1, 2)), np.ones((3, 1)), np.ones(3)])
def test_a_block_of_another_shape_is_not_repeated_to_fit(found):
    fields = (Field(name="X", shape=(2,), dtype=np.dtype("f8")),)
    rows = new_rows(3, fields, (torch.float64,))
    window = Window(0, 3, (Piece(0, 0, 3),))
    said = r"block 0 of X, cut to rows 0 to 3, has shape .*, expected \(3, 2\)"
    with pytest.raises(DataError, match=said):
        load_window(window, np.arange(3), MemoryReader([(found,)]), rows, ["X"])
