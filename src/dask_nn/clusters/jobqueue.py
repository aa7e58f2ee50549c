"""Clusters whose workers are jobs of a batch system, through dask-jobqueue."""

from __future__ import annotations

import inspect
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
from dask.utils import format_bytes, parse_bytes
from distributed import Security

from dask_nn.clusters.batch_jobs import BatchJobs
from dask_nn.clusters.certificates import pem_texts, security_of_files
from dask_nn.clusters.dashboard_port import free_or_any
from dask_nn.clusters.gpu_requests import asks_for_gpu, with_slurm_gpu
from dask_nn.clusters.jobqueue_import import import_dask_jobqueue
from dask_nn.clusters.known_names import refuse_unknown
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
OAR_GPU = "/nodes=1/gpu=1"
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
    _check_options(request, getattr(import_dask_jobqueue(request.kind), system.cluster))
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
    _check_options(request, kind)
    options = _with_defaults(request, folder)
    job_class = kind.job_cls if jobs is None else jobs.recorded(kind.job_cls)
    try:
        return kind(job_cls=job_class, asynchronous=asynchronous, **options)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{SYSTEMS[request.kind].cluster}: {error}") from error


def _check_options(request: ClusterRequest, kind: type[Any]) -> None:
    known: set[str] = set()
    for part in (*kind.__mro__, *kind.job_cls.__mro__):
        if part.__module__.startswith("dask_jobqueue"):
            known |= set(inspect.signature(part.__init__).parameters)
    known -= {"self", "scheduler", "name", "loop", "asynchronous", "n_workers", "job_cls"}
    refuse_unknown(request.options, sorted(known), of=f"{kind.__name__} has")
    if request.gpus and request.options.get("processes", 1) != 1:
        raise ConfigurationError(
            "processes= puts several workers into a job, which would see all GPUs of the job; "
            "leave it out, and each worker gets a job with a GPU of its own"
        )
    if request.gpus and request.kind == "oar":
        directives, resources = _asked_resources(request)
        if resources and not asks_for_gpu("oar", directives, resources):
            raise ConfigurationError(
                f"gpus=1 asks for a GPU and resource_spec {resources!r} for none; write it there "
                f"too, such as {OAR_GPU!r}, or leave gpus out"
            )
    if request.walltime is not None:
        if request.kind == "htcondor":
            raise ConfigurationError(
                "HTCondor has no walltime of its own; give what your pool uses, such as "
                'job_extra_directives={"+MaxRuntime": "7200"}'
            )
        walltime_s(request.kind, request.walltime)


def _with_defaults(request: ClusterRequest, folder: Path) -> dict[str, Any]:
    options = dict(request.options)
    processes = options.setdefault("processes", 1)
    options["cores"] = request.cores * processes
    memory = request.memory or _configured(request.kind, "memory") or DEFAULT_MEMORY
    options["memory"] = format_bytes(parse_bytes(memory) * processes)
    options["log_directory"] = str(_log_folder(request, folder))
    scheduler = options.get("scheduler_options")
    if scheduler is None:
        scheduler = _configured(request.kind, "scheduler-options") or {}
    options["scheduler_options"] = {"dashboard_address": free_or_any(":8787"), **scheduler}
    if isinstance(request.security, Security):
        options["security"] = security_of_files(folder, pem_texts(request.security))
    if request.walltime is not None:
        options["walltime"] = request.walltime
    if request.kind == "htcondor":
        options.setdefault("disk", _configured(request.kind, "disk") or DEFAULT_DISK)
    if request.kind == "lsf":
        # Where LSF is, dask-jobqueue asks it for the units of its memory limits.
        options.setdefault("lsf_units", _configured("lsf", "lsf-units") or _lsf_units())
    if request.gpus:
        _add_gpu(request, options)
    preload = [word for module in request.preload for word in ("--preload", module)]
    extra = options.get("worker_extra_args") or _configured(request.kind, "worker-extra-args") or []
    options["worker_extra_args"] = [*extra, *preload]
    before = options.get("job_script_prologue")
    if before is None:
        before = _configured(request.kind, "job-script-prologue") or []
    options["job_script_prologue"] = [*_environment(request), *before]
    return options


def _log_folder(request: ClusterRequest, folder: Path) -> Path:
    """Give the folder of the jobs' output: what was asked for, the site's, or one's own."""
    asked = request.options.get("log_directory") or _configured(request.kind, "log-directory")
    return Path(asked or folder)


def _environment(request: ClusterRequest) -> list[str]:
    lines = [f"export {name}={_quoted(value)}" for name, value in request.env.items()]
    if (seconds := _job_s(request)) is not None:
        lines.append(
            f'export {JOB_END_TIME}="${{SLURM_JOB_END_TIME:-$(($(date +%s) + {seconds}))}}"'
        )
    return lines


def _job_s(request: ClusterRequest) -> int | None:
    """Give how long a job may run, where that is known."""
    walltime = request.walltime or _configured(request.kind, "walltime")
    if not walltime or request.kind == "htcondor":
        return None
    try:
        return walltime_s(request.kind, str(walltime))
    except ConfigurationError:
        # What was asked for is checked; what a site has configured may be UNLIMITED.
        return None


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "'\\''") + "'"


def _configured(kind: str, key: str) -> Any:
    """Give what the site has set in Dask's configuration (``jobqueue.yaml``)."""
    return dask.config.get(f"jobqueue.{kind}.{key}", None)


def _lsf_units() -> str:
    lsf: Any = import_optional("dask_jobqueue.lsf", "jobqueue", "lsf")
    return str(lsf.lsf_detect_units()) if shutil.which("bsub") else "mb"


def _add_gpu(request: ClusterRequest, options: dict[str, Any]) -> None:
    """Ask for a GPU in the batch system's words, unless the options do so themselves."""
    kind = request.kind
    directives, resource_spec = _asked_resources(request)
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
        options["job_extra_directives"] = {**dict(directives), "request_gpus": "1"}
    elif kind == "slurm":
        options["job_extra_directives"] = with_slurm_gpu(directives)
    else:
        gpu = {"lsf": '-gpu "num=1"', "sge": "-l gpu=1"}[kind]
        options["job_extra_directives"] = [*directives, gpu]


def _asked_resources(request: ClusterRequest) -> tuple[Any, str]:
    """Give the directives and the resources of the options, or else of the site."""
    directives = request.options.get("job_extra_directives")
    if directives is None:
        directives = _configured(request.kind, "job-extra-directives") or []
    resources = request.options.get("resource_spec")
    return directives, resources or _configured(request.kind, "resource-spec") or ""
