from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from torch import nn
from torch.optim import SGD

import dask_nn
from dask_nn.training import in_process


@pytest.mark.timeout(20)
def test_a_rank_that_breaks_beyond_repair_does_not_leave_its_caller_waiting(monkeypatch):
    def broken(spec, env):
        message = "out of the blue"
        raise SystemError(message)

    monkeypatch.setattr(in_process, "rank_main", broken)
    with pytest.raises(SystemError, match="out of the blue"):
        dask_nn.train(
            nn.Linear(2, 1),
            np.ones((8, 2), "f4"),
            np.ones((8, 1), "f4"),
            loss=nn.MSELoss(),
            optimizer=partial(SGD, lr=0.1),
            batch_size=4,
        )
