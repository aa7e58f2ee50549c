"""Train on a cluster and in this process, and print the hashes of both weights as JSON.

``python training_job.py KIND OPTIONS...``, with the options of ``dask_nn.cluster`` as JSON; with
several of them on one cluster after the other, and a line for each.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import Any

import dask_nn

SHARDS = 2


def train() -> str:
    # Here, for a job that is interrupted before it trains.
    import numpy as np
    import torch

    rng = np.random.Generator(np.random.PCG64(5))
    X = rng.normal(size=(512, 16)).astype(np.float32)
    y = (X[:, 0] > 0).astype(np.int64) + (X[:, 1] > 0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    result = dask_nn.train(
        model,
        X,
        y,
        loss=torch.nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        epochs=2,
        batch_size=64,
        strategy=dask_nn.Synchronous(shards=SHARDS),
    )
    return result.weights_sha256


def main() -> None:
    for options in sys.argv[2:]:
        said: dict[str, Any] = {}
        with dask_nn.cluster(sys.argv[1], **json.loads(options)) as client:
            said["address"] = client.scheduler.address
            said["workers"] = len(client.scheduler_info(n_workers=-1)["workers"])
            said["env"] = sorted(client.run(os.getenv, "GREETING", "").values())
            said["cluster"] = train()
        said["local"] = train()
        print(json.dumps(said))  # noqa: T201 - its answer


if __name__ == "__main__":
    main()
