from __future__ import annotations

from pathlib import Path

import torch

from dask_nn.collectives import shared_file
from dask_nn.collectives.rendezvous import LocalRendezvous
from dask_nn.collectives.shared_memory import SharedMemoryCommunicator


def test_files_of_gangs_that_never_formed_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_file, "FAST_FOLDER", str(tmp_path))
    for name in ("dask-nn-abc-0-x1", "dask-nn-abc-12-x2", "dask-nn-abd-0-x3"):
        Path(tmp_path, name).touch()
    shared_file.remove_abandoned("abc")
    assert [path.name for path in tmp_path.iterdir()] == ["dask-nn-abd-0-x3"]


def test_a_watchman_may_abort_while_its_rank_leaves(tmp_path):
    """He holds the flags at the moment at which they are given back."""
    comm = SharedMemoryCommunicator(0, 1, rendezvous=LocalRendezvous(), folder=str(tmp_path))
    comm.open(shards=1, leaf_size=4, dtype=torch.float32, device=torch.device("cpu"))
    region = comm._region
    assert region is not None
    region._flags.release()
    comm.abort()
    assert comm.abort_event.is_set()
    comm.close()
    comm.abort()
