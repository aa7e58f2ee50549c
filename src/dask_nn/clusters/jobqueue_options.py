"""Options that are handed to dask-jobqueue, of the request or of the site."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import dask

from dask_nn.clusters.gpu_requests import asks_for_gpu
from dask_nn.clusters.known_names import refuse_unknown
from dask_nn.clusters.option_types import (
    ARGUMENTS,
    COUNT,
    LINES,
    MAPPING,
    OF_SCHEDULERS,
    PATH,
    SECONDS,
    SWITCH,
    TEXT,
    WHOLE,
    WORD,
    check_types,
    lines,
)
from dask_nn.clusters.walltime import walltime_s
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from dask_nn.clusters.option_types import OptionType
    from dask_nn.clusters.request import ClusterRequest

__all__ = ["OAR_GPU", "asked", "asked_resources", "check_options", "configured"]

OAR_GPU = "/nodes=1/gpu=1"
# Chosen by what is asked of every kind of cluster, or by dask-jobqueue itself.
OF_THE_REQUEST = {"self", "scheduler", "name", "loop", "asynchronous", "n_workers", "job_cls"}
# dask-jobqueue takes the second where the first is not given.
FORMER_NAMES = {
    "job_directives_skip": "header_skip",
    "job_extra_directives": "job_extra",
    "job_script_prologue": "env_extra",
    "worker_extra_args": "extra",
}
TYPES = {
    **dict.fromkeys(("account", "disk", "job_mem", "job_name", "project", "queue"), WORD),
    **dict.fromkeys(("interface", "protocol", "resource_spec", "shebang", "worker_command"), TEXT),
    **dict.fromkeys(("local_directory", "log_directory", "python", "shared_temp_directory"), PATH),
    **dict.fromkeys(("nanny", "use_stdin"), SWITCH),
    **dict.fromkeys(("job_cpu", "ncpus", "processes"), COUNT),
    **dict.fromkeys(("cancel_command_extra", "submit_command_extra"), ARGUMENTS),
    **dict.fromkeys(("job_directives_skip", "job_extra_directives", "job_script_prologue"), LINES),
    **dict.fromkeys(("env_extra", "header_skip", "job_extra"), LINES),
    **dict.fromkeys(("extra", "worker_extra_args"), ARGUMENTS),
    "config_name": TEXT,
    "death_timeout": SECONDS,
    "lsf_units": TEXT,
    "mem": WHOLE,
    "memory_per_core_property_name": TEXT,
    "scheduler_options": OF_SCHEDULERS,
}
TYPES_OF_HTCONDOR = {**TYPES, "job_extra": MAPPING, "job_extra_directives": MAPPING}


def asked(request: ClusterRequest, name: str) -> Any:
    """Give an option, or else what the site has set; None where neither is there."""
    given = request.options.get(name)
    if given is None:
        given = configured(request.kind, name)
    if not given and name in FORMER_NAMES:
        return asked(request, FORMER_NAMES[name])
    return given


def configured(kind: str, name: str) -> Any:
    """Give what the site has set in Dask's configuration (``jobqueue.yaml``)."""
    return dask.config.get(f"jobqueue.{kind}.{name.replace('_', '-')}", None)


def asked_resources(request: ClusterRequest) -> tuple[Any, str]:
    """Give directives, a list or for HTCondor a mapping, and what stands behind ``-l``."""
    directives = asked(request, "job_extra_directives")
    if request.kind == "htcondor":
        return dict(directives or {}), ""
    return lines(directives), str(asked(request, "resource_spec") or "")


def check_options(request: ClusterRequest, cluster_class: type[Any]) -> None:
    """Refuse options that cannot work, whether this host has the batch system or not.

    Parameters
    ----------
    request : ClusterRequest
        What is asked for.
    cluster_class : type
        Of dask-jobqueue.

    Raises
    ------
    ConfigurationError
        If an option is unknown or of the wrong type, or contradicts what is asked for.
    """
    known: set[str] = set()
    for part in (*cluster_class.__mro__, *cluster_class.job_cls.__mro__):
        if part.__module__.startswith("dask_jobqueue"):
            known |= set(inspect.signature(part.__init__).parameters)
    known -= OF_THE_REQUEST
    refuse_unknown(request.options, sorted(known), of=f"{cluster_class.__name__} has")
    types: dict[str, OptionType] = TYPES_OF_HTCONDOR if request.kind == "htcondor" else TYPES
    check_types(request.options, types)
    site = {name: configured(request.kind, name) for name in types if name not in request.options}
    check_types(site, types, prefix=f"jobqueue.{request.kind} in Dask's configuration: ")
    if request.gpus:
        _check_gpu(request)
    if request.walltime is not None:
        if request.kind == "htcondor":
            raise ConfigurationError(
                "HTCondor has no walltime of its own; give what your pool uses, such as "
                'job_extra_directives={"+MaxRuntime": "7200"}'
            )
        walltime_s(request.kind, request.walltime)


def _check_gpu(request: ClusterRequest) -> None:
    if (request.options.get("processes") or 1) != 1:
        raise ConfigurationError(
            "processes= puts several workers into a job, which would see all GPUs of the job; "
            "leave it out, and each worker gets a job with a GPU of its own"
        )
    directives, resources = asked_resources(request)
    if request.kind == "oar" and resources and not asks_for_gpu("oar", directives, resources):
        raise ConfigurationError(
            f"gpus=1 asks for a GPU and resource_spec {resources!r} for none; write it there too, "
            f"such as {OAR_GPU!r}, or leave gpus out"
        )
