"""Clusters whose workers are jobs of a batch system, through dask-jobqueue."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask.utils import format_bytes, parse_bytes
from distributed import Security

from dask_nn.clusters.batch_jobs import BatchJobs
from dask_nn.clusters.certificates import pem_texts, security_of_files
from dask_nn.clusters.dashboard_port import free_or_any
from dask_nn.clusters.gpu_requests import asks_for_gpu, with_slurm_gpu
from dask_nn.clusters.jobqueue_import import import_dask_jobqueue
from dask_nn.clusters.jobqueue_options import (
    OAR_GPU,
    asked,
    asked_resources,
    check_options,
    configured,
)
from dask_nn.clusters.option_types import arguments, lines
from dask_nn.clusters.optional import import_optional
from dask_nn.clusters.serve import serve
from dask_nn.clusters.walltime import walltime_s
from dask_nn.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client

    from dask_nn.clusters.request import ClusterRequest

__all__ = ["JOB_END_TIME", "check_request", "make_cluster", "open_cluster"]

DEFAULT_MEMORY = "4 GiB"
DEFAULT_DISK = "4 GB"
# What Checkpoint(before_walltime_s=) reads where the batch system itself does not say it.
JOB_END_TIME = "DASK_NN_JOB_END_TIME"


@dataclass(frozen=True, kw_only=True)
class _System:
    """One batch system.

    Parameters
    ----------
    cluster : str
        The class of dask-jobqueue.
    submit : str
        The command that submits a job.
    """

    cluster: str
    submit: str


SYSTEMS = {
    "slurm": _System(cluster="SLURMCluster", submit="sbatch"),
    "pbs": _System(cluster="PBSCluster", submit="qsub"),
    "lsf": _System(cluster="LSFCluster", submit="bsub"),
    "sge": _System(cluster="SGECluster", submit="qsub"),
    "oar": _System(cluster="OARCluster", submit="oarsub"),
    "htcondor": _System(cluster="HTCondorCluster", submit="condor_submit"),
}


@contextmanager
def open_cluster(request: ClusterRequest) -> Iterator[Client]:
    """Run a scheduler here and its workers as jobs, one worker in each.

    Raises
    ------
    ConfigurationError
        If an option cannot work, dask-jobqueue is not installed, or this host submits no jobs.
    ClusterError
        If the batch system refuses the jobs, or they do not start in time; with what it says.
    """
    # Jobs have the working directory in common with this process: their output, and their
    # certificates, must be where both see them.
    try:
        folder = Path(tempfile.mkdtemp(prefix=".dask-nn-jobs-", dir=Path.cwd()))
    except OSError as error:
        raise ConfigurationError(
            f"the jobs of a cluster need a folder in {Path.cwd()}, which cannot be made "
            f"({error.strerror}); start where you may write, and which the nodes see too"
        ) from error
    try:
        jobs = BatchJobs(kind=request.kind, log_folder=_log_folder(request, folder))
        with serve(
            request,
            lambda: make_cluster(request, folder=folder, jobs=jobs, asynchronous=True),
            explain=jobs.explain,
            hopeless=jobs.hopeless,
            lost=jobs.lost,
            close=lambda _: jobs.end_all(),
        ) as client:
            yield client
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_request(request: ClusterRequest) -> None:
    """Check the options, and that jobs can be submitted here.

    Raises
    ------
    ConfigurationError
        If not.
    """
    system = SYSTEMS[request.kind]
    check_options(request, getattr(import_dask_jobqueue(request.kind), system.cluster))
    if shutil.which(system.submit) is None:
        raise ConfigurationError(
            f"cluster kind {request.kind!r} submits jobs with {system.submit}, which is not on "
            "this host's PATH; run this on a login node"
        )


def make_cluster(
    request: ClusterRequest,
    *,
    folder: Path,
    jobs: BatchJobs | None = None,
    asynchronous: bool = False,
) -> Any:
    """Make the cluster of dask-jobqueue that a request describes.

    Parameters
    ----------
    request : ClusterRequest
        What is asked for.
    folder : Path
        A folder that jobs and this process share, for output and temporary certificates.
    jobs : BatchJobs, optional
        Where submitted jobs are noted.
    asynchronous : bool
        As Dask understands it.

    Returns
    -------
    dask_jobqueue.JobQueueCluster
        Without workers; ``job_script()`` shows what would be submitted.

    Raises
    ------
    ConfigurationError
        If an option cannot work.
    """
    module = import_dask_jobqueue(request.kind)
    kind = getattr(module, SYSTEMS[request.kind].cluster)
    check_options(request, kind)
    options = _with_defaults(request, folder)
    job_class = kind.job_cls if jobs is None else jobs.recorded(kind.job_cls)
    try:
        return kind(job_cls=job_class, asynchronous=asynchronous, **options)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{SYSTEMS[request.kind].cluster}: {error}") from error


def _with_defaults(request: ClusterRequest, folder: Path) -> dict[str, Any]:
    options = dict(request.options)
    processes = options["processes"] = options.get("processes") or 1
    options["cores"] = request.cores * processes
    memory = request.memory or configured(request.kind, "memory") or DEFAULT_MEMORY
    options["memory"] = format_bytes(parse_bytes(memory) * processes)
    options["log_directory"] = str(_log_folder(request, folder))
    scheduler = asked(request, "scheduler_options") or {}
    options["scheduler_options"] = {"dashboard_address": free_or_any(":8787"), **scheduler}
    if isinstance(request.security, Security):
        options["security"] = security_of_files(folder, pem_texts(request.security))
    if request.walltime is not None:
        options["walltime"] = request.walltime
    if request.kind == "htcondor":
        options.setdefault("disk", configured(request.kind, "disk") or DEFAULT_DISK)
    if request.kind == "lsf":
        # Where LSF is, dask-jobqueue asks it for the units of its memory limits.
        options.setdefault("lsf_units", configured("lsf", "lsf_units") or _lsf_units())
    directives, _ = asked_resources(request)
    options["job_extra_directives"] = directives
    options["job_directives_skip"] = lines(asked(request, "job_directives_skip"))
    for name in ("cancel_command_extra", "submit_command_extra"):
        if (extra := asked(request, name)) is not None:
            options[name] = arguments(extra)
    if request.gpus:
        _add_gpu(request, options)
    preload = [word for module in request.preload for word in ("--preload", module)]
    # A shell reads them from the script, so that a text stays as it is, with its quotes.
    options["worker_extra_args"] = [*lines(asked(request, "worker_extra_args")), *preload]
    before = lines(asked(request, "job_script_prologue"))
    options["job_script_prologue"] = [*_environment(request), *before]
    return options


def _log_folder(request: ClusterRequest, folder: Path) -> Path:
    """Give the folder of the jobs' output: what was asked for, the site's, or one's own."""
    return Path(asked(request, "log_directory") or folder)


def _environment(request: ClusterRequest) -> list[str]:
    exports = [f"export {name}={_quoted(value)}" for name, value in request.env.items()]
    if (seconds := _job_s(request)) is not None:
        exports.append(
            f'export {JOB_END_TIME}="${{SLURM_JOB_END_TIME:-$(($(date +%s) + {seconds}))}}"'
        )
    return exports


def _job_s(request: ClusterRequest) -> int | None:
    """Give how long a job may run, where that is known."""
    walltime = request.walltime or configured(request.kind, "walltime")
    if not walltime or request.kind == "htcondor":
        return None
    try:
        return walltime_s(request.kind, str(walltime))
    except ConfigurationError:
        # What was asked for is checked; what a site has configured may be UNLIMITED.
        return None


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "'\\''") + "'"


def _lsf_units() -> str:
    lsf: Any = import_optional("dask_jobqueue.lsf", "jobqueue", "lsf")
    return str(lsf.lsf_detect_units()) if shutil.which("bsub") else "mb"


def _add_gpu(request: ClusterRequest, options: dict[str, Any]) -> None:
    """Ask for a GPU in the batch system's words, unless the options do so themselves."""
    kind = request.kind
    directives, resource_spec = asked_resources(request)
    if asks_for_gpu(kind, directives, resource_spec):
        return
    if kind == "pbs":
        pbs: Any = import_optional("dask_jobqueue.pbs", "jobqueue", "pbs")
        size = pbs.pbs_format_bytes_ceil(parse_bytes(options["memory"]))
        default = f"select=1:ncpus={options['cores']}:mem={size}"
        options["resource_spec"] = f"{resource_spec or default}:ngpus=1"
    elif kind == "oar":
        options["resource_spec"] = OAR_GPU
    elif kind == "htcondor":
        options["job_extra_directives"] = {**directives, "request_gpus": "1"}
    elif kind == "slurm":
        options["job_extra_directives"] = with_slurm_gpu(directives)
    else:
        gpu = {"lsf": '-gpu "num=1"', "sge": "-l gpu=1"}[kind]
        options["job_extra_directives"] = [*directives, gpu]
