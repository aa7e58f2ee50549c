"""What a job file may hold: its example, its tables and keys."""

from __future__ import annotations

from dask_nn.cli.cluster_options import CLUSTER_KEYS

__all__ = ["EXAMPLE", "OPEN_SECTIONS", "REQUIRED", "SECTIONS", "TYPES"]

EXAMPLE = """\
# A training job for dask-nn:  dask-nn train job.toml
# Names like "package.module:Name" are imported; the folder of this file is searched too.

[data]
# zarr:, parquet:, hdf5: or npy:, with a path or URL that all workers can read.
train = "zarr:train.zarr"
x = "X"                       # an array of the store, or columns: ["age", "height"]
y = "y"                       # a name, or its own URL: "npy:labels.npy"
# sample_weight = "w"
# validation = "zarr:valid.zarr"    # with the same names for x, y and sample_weight
# validation_y = "npy:valid-labels.npy"    # where y is a URL; and
# validation_sample_weight = "npy:valid-weights.npy"
memory = "auto"               # "resident" holds the data, "stream" reads it block by block

[model]
module = "model:Network"      # a class or function that makes a torch.nn.Module
arguments = { hidden = 128 }
# transform = "model:scale"   # applied to each batch of X on the worker

[loss]
name = "CrossEntropyLoss"     # of torch.nn, or "package.module:Name"

[optimizer]
name = "SGD"                  # of torch.optim
lr = 0.01

# [schedule]
# name = "StepLR"             # of torch.optim.lr_scheduler
# every = "epoch"             # or "step"
# step_size = 2

[training]
epochs = 5
batch_size = 128
metrics = ["accuracy"]
seed = 0
# shards = 4                  # fixed, the bits are the same on any number of workers
# threads_per_rank = 1
# engine = "spmd"             # or "graph"
# device = "cpu"              # or "cuda", which is the default where [cluster] has gpus
# shuffle = true              # "within" or false
# window = 10                 # blocks among which a shard shuffles
# clip_grad_norm = 1.0

[cluster]
kind = "local"                # ssh, slurm, pbs, lsf, sge, oar, htcondor, kubernetes, aws, address
workers = 2                   # kept at this number; locally by default one for each core
cores = 1                     # threads of each worker
# memory = "4 GiB"            # of each worker
# adapt = [1, 4]              # a range instead of workers
# walltime = "02:00:00"       # of a batch job
# gpus = 1                    # of each worker
# tls = true                  # temporary certificates
# env = { OMP_NUM_THREADS = "1" }
# start_timeout_s = 600
# scheduler = "tcp://10.0.0.5:8786"   # a running cluster instead

# [cluster.options]           # of the library that starts the cluster
# queue = "gpu"
# account = "physics"

# [recovery]                  # when workers are lost, hang or join
# hang_timeout_s = 10
# max_failures = 100
# min_workers = 1
# replacement_timeout_s = 0
# workers_timeout_s = 120
# elastic = true

# [checkpoint]
# url = "checkpoints"
# every = "epoch"             # or a number of steps, or "10 minutes"
# keep = 3
# best = "val_loss"
# before_walltime_s = 60      # save once more before a batch job ends

[output]
weights = "model.safetensors"
# history = "history.json"
"""

SECTIONS: dict[str, tuple[str, ...]] = {
    "data": (
        "train",
        "x",
        "y",
        "sample_weight",
        "validation",
        "validation_y",
        "validation_sample_weight",
        "memory",
    ),
    "model": ("module", "arguments", "transform"),
    "training": (
        "epochs",
        "batch_size",
        "metrics",
        "seed",
        "shards",
        "threads_per_rank",
        "engine",
        "device",
        "shuffle",
        "window",
        "clip_grad_norm",
    ),
    "cluster": CLUSTER_KEYS,
    "recovery": (
        "hang_timeout_s",
        "max_failures",
        "min_workers",
        "replacement_timeout_s",
        "workers_timeout_s",
        "elastic",
    ),
    "checkpoint": ("url", "every", "keep", "best", "before_walltime_s"),
    "output": ("weights", "history"),
}
# Their other keys are arguments of what they name.
OPEN_SECTIONS = ("loss", "optimizer", "schedule")
REQUIRED = {"data": ("train", "y"), "model": ("module",), "loss": ("name",), "optimizer": ("name",)}
# What their values have to be; TOML's own kinds.
TYPES: dict[str, dict[str, tuple[type, ...]]] = {
    "data": {
        "train": (str,),
        "x": (str, list),
        "y": (str, list),
        "sample_weight": (str,),
        "validation": (str,),
        "validation_y": (str,),
        "validation_sample_weight": (str,),
        "memory": (str,),
    },
    "model": {"module": (str,), "arguments": (dict,), "transform": (str,)},
    "loss": {"name": (str,)},
    "optimizer": {"name": (str,)},
    "schedule": {"name": (str,), "every": (str,)},
    "training": {"metrics": (str, list, dict)},
    "checkpoint": {"url": (str,), "best": (str,)},
    "output": {"weights": (str,), "history": (str,)},
}
